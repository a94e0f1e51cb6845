"""The published sizes of scGPT, scGPT-spatial and Tahoe-x1: names, shapes and counts, and memory of a conversion."""

import json
import math

import pytest
import torch
import yaml
from helpers.memory import peak_of
from safetensors.torch import save_file

from hinge.backbones import ScGPTConfig, ScGPTModel, TahoeConfig, TahoeModel, load_backbone
from hinge.backbones.published_scgpt import published_names as scgpt_names
from hinge.backbones.published_tahoe import published_names as tahoe_names
from hinge.models import HingeModel
from hinge.sharing.convert import convert_transformer

# rows of the tables of genes and of drugs and the width of a fingerprint are those of the files and may differ
SCGPT_ROWS, TAHOE_ROWS, DRUGS, FINGERPRINT = 60697, 62720, 380, 2048
SIZES = {
    "scgpt": (ScGPTModel, {"vocab_size": SCGPT_ROWS}, 512, 12, 512),
    "scgpt-spatial": (
        ScGPTModel,
        {"vocab_size": SCGPT_ROWS, "num_experts": 4, "with_impute_decoder": True},
        512,
        12,
        512,
    ),
    "tahoe-70m": (TahoeModel, {"vocab_size": TAHOE_ROWS, "num_attention_heads": 8}, 512, 12, 2048),
    "tahoe-1.3b": (TahoeModel, {"vocab_size": TAHOE_ROWS, "num_attention_heads": 16}, 2048, 24, 8192),
    "tahoe-3b": (
        TahoeModel,
        {
            "vocab_size": TAHOE_ROWS,
            "num_attention_heads": 20,
            "activation": "gelu",
            "decoder_activation": "gelu",
            "attention": "full",
            "num_drugs": DRUGS,
            "fingerprint_size": FINGERPRINT,
        },
        2560,
        32,
        10240,
    ),
}


def build(name):
    model_class, options, width, layers, inner = SIZES[name]
    config_class = ScGPTConfig if model_class is ScGPTModel else TahoeConfig
    config = config_class(hidden_size=width, num_hidden_layers=layers, intermediate_size=inner, **options)
    with torch.device("meta"):
        return model_class(config)


def expected_shapes(name) -> dict[str, tuple[int, ...]]:
    """Return the shape of each published tensor."""
    _, options, d, layers, inner = SIZES[name]
    tahoe = name.startswith("tahoe")
    gene, value = ("gene_encoder", "expression_encoder") if tahoe else ("encoder", "value_encoder")
    up, down = ("up_proj", "down_proj") if tahoe else ("linear1", "linear2")
    shapes: dict[str, tuple[int, ...]] = {f"{gene}.embedding.weight": (options["vocab_size"], d)}

    def linear(key, rows, columns, bias=True):
        shapes[f"{key}.weight"] = (rows, columns)
        if bias:
            shapes[f"{key}.bias"] = (rows,)

    def norm(key):
        shapes[f"{key}.weight"] = shapes[f"{key}.bias"] = (d,)

    norm(f"{gene}.enc_norm")
    linear(f"{value}.linear1", d, 1)
    linear(f"{value}.linear2", d, d)
    norm(f"{value}.norm")
    shapes["flag_encoder.weight"] = (2, d)
    for number in range(layers):
        key = f"transformer_encoder.layers.{number}"
        linear(f"{key}.self_attn.Wqkv", 3 * d, d)
        linear(f"{key}.self_attn.out_proj", d, d)
        linear(f"{key}.{up}", inner, d)
        linear(f"{key}.{down}", d, inner)
        norm(f"{key}.norm1")
        norm(f"{key}.norm2")
    cells = ["mvc_decoder"]
    if tahoe:
        norm("transformer_encoder.norm")
        linear("expression_decoder.linear_layers.0", d, d)
        linear("expression_decoder.out_proj", 1, d)
    elif "num_experts" in options:
        linear("decoder.moe.gate.gate", options["num_experts"], d)
        cells.append("impute_mvc_decoder")
    decoders = [f"decoder.moe.experts.{number}" for number in range(options.get("num_experts", 0))] or ["decoder"]
    for key in [] if tahoe else decoders:
        linear(f"{key}.fc.0", d, d)
        linear(f"{key}.fc.2", d, d)
        linear(f"{key}.fc.4", 1, d)
    for key in cells:
        linear(f"{key}.gene2query", d, d)
        linear(f"{key}.W", d, d, bias=False)
    if "num_drugs" in options:
        shapes["chem_encoder.embedding.weight"] = (DRUGS, FINGERPRINT)
        linear("chem_encoder.fc", d, FINGERPRINT)
        linear("chem_encoder.proj", d, d)
        norm("chem_encoder.norm")
    return shapes


COUNTS = {
    "scgpt": 51_330_049,
    "scgpt-spatial": 53_434_376,
    "tahoe-70m": 70_996_993,
    "tahoe-1.3b": 1_353_854_977,
    "tahoe-3b": 2_717_045_761,
}


@pytest.mark.parametrize("name", SIZES)
def test_names_shapes_and_counts(name):
    model = build(name)
    expected, settings = expected_shapes(name), model.config.to_dict()
    scgpt = isinstance(model, ScGPTModel)
    table = (scgpt_names(expected, settings) if scgpt else tahoe_names(settings)).names
    parameters = dict(model.named_parameters())
    assert table.keys() == parameters.keys() and set(table.values()) == expected.keys()
    for ours, theirs in table.items():
        assert tuple(parameters[ours].shape) == expected[theirs], theirs
    assert sum(parameter.numel() for parameter in parameters.values()) == COUNTS[name]


@pytest.mark.parametrize("name", SIZES)
def test_low_rank_modulation_is_a_small_share(name):
    backbone = build(name)
    frozen = sum(parameter.numel() for parameter in backbone.parameters())
    config, counts = backbone.config, {}
    for rank in (32, None):
        with torch.device("meta"):
            model = HingeModel(
                1024, 200, config.hidden_size, config.num_hidden_layers, modulation_rank=rank, num_bins=51
            )
        counts[rank] = model.num_parameters(only_trainable=True)
    assert counts[32] < 0.07 * frozen and counts[32] < 0.2 * counts[None]


def write_published(name, folder, parts=1) -> int:
    """Write published files of a size with a repeated pattern as weights, in some parts; return their bytes."""
    _, options, width, layers, inner = SIZES[name]
    pattern = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
    shapes = expected_shapes(name)
    state = {
        key: pattern.repeat(math.prod(shape) // len(pattern) + 1)[: math.prod(shape)].reshape(shape).clone()
        for key, shape in shapes.items()
    }
    rows = options["vocab_size"]
    tokens = ["<pad>", "<cls>", "<eoc>", *[f"ENSG{number:011d}" for number in range(rows - 3)]]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    if name.startswith("scgpt"):
        torch.save(state, folder / "best_model.pt")
        sizes = {"embsize": width, "nheads": 8, "d_hid": inner, "nlayers": layers}
        (folder / "args.json").write_text(json.dumps(sizes))
        (folder / "all_dict_mean_std.csv").write_text(",mean\n5,2.5\n")
    else:
        keys = list(state)
        for part in range(parts):
            end = f"-{part + 1:05d}-of-{parts:05d}" if parts > 1 else ""
            save_file({f"model.{key}": state[key] for key in keys[part::parts]}, folder / f"model{end}.safetensors")
        sizes = {
            "vocab_size": rows,
            "d_model": width,
            "n_heads": options["num_attention_heads"],
            "n_layers": layers,
            "expansion_ratio": inner // width,
            "transformer_activation": "relu",
            "expression_decoder": {"n_layers": 1, "activation": "leaky_relu"},
        }
        (folder / "model_config.yml").write_text(yaml.safe_dump(sizes))
        (folder / "collator_config.yml").write_text("pad_token_id: 0")
    return sum(4 * math.prod(shape) for shape in shapes.values())


@pytest.mark.full
@pytest.mark.parametrize(("name", "parts"), [("scgpt", 1), ("scgpt-spatial", 1), ("tahoe-70m", 1), ("tahoe-70m", 3)])
def test_converting_and_loading_need_little_memory(name, parts, tmp_path):
    total = write_published(name, tmp_path, parts)
    kind = name.partition("-")[0]
    convert = peak_of(lambda: convert_transformer(kind, tmp_path, tmp_path / "out", "bf16"))
    load = peak_of(lambda: load_backbone(tmp_path, dtype=torch.bfloat16))
    # less than the file: it is never in memory as a whole; how many of its mapped pages are differs between machines
    assert convert < total
    assert load < 1.5 * total
