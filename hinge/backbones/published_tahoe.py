"""Published weights of Tahoe-x1: safetensors, two YAML files of settings and `vocab.json` in one folder."""

from pathlib import Path
from typing import Any

import yaml

from hinge.backbones.published_files import (
    Table,
    check_settings,
    num_layers,
    prefix_of,
    read_tokens,
    size_of,
    tokens_with_specials,
    value_at,
    weights_of,
)
from hinge.backbones.state_files import open_state
from hinge.backbones.transformer_config import DRUG, TahoeConfig
from hinge.backbones.weights import Weights, built_from, holds_our_config, read_own
from hinge.utils.errors import WeightsError, one_line
from hinge.utils.yaml import parse_yaml

MODEL_CONFIG, COLLATOR_CONFIG, VOCABULARY = "model_config", "collator_config", "vocab.json"
_ACTIVATIONS = ("relu", "gelu", "leaky_relu")
# keys that change what the model computes → the only value that can be read, which is the default of the code
_ONLY: dict[str, Any] = {
    "norm_scheme": "pre",
    "use_glu": False,
    "cell_emb_style": "cls",
    "norm_config.norm_type": "layernorm",
    "expression_encoder.input_emb_style": "continuous",
    "expression_encoder.use_norm": True,
    "gene_encoder.use_norm": True,
    "mvc.arch_style": "inner product",
    "mvc.query_activation": "sigmoid",
    "expression_decoder.n_outputs": 1,
    "standard_scale_outputs": False,
}
_ONLY_COLLATOR: dict[str, Any] = {"do_binning": True, "right_binning": False}


def is_tahoe(path: str | Path) -> bool:
    """Return whether a folder, or the folder of a file, is laid out as published Tahoe-x1 weights."""
    return _yaml_file(_folder(path), MODEL_CONFIG).is_file()


def _folder(path: str | Path) -> Path:
    return Path(path) if Path(path).is_dir() else Path(path).parent


def read_tahoe(path: str | Path, attention: str | None = None) -> Weights:
    """Recognise weights of Tahoe-x1.

    Parameters
    ----------
    path
        A folder of ours; or the published one with `model.safetensors`, `model_config.yml`, `collator_config.yml` and
        `vocab.json`, or the file of the weights in it.
    attention
        `"generative"` or `"full"`; None: as the model was trained (`attn_config.use_attn_mask`).

    Raises
    ------
    WeightsError
        A file is missing or damaged, a tensor is missing, unknown or of another shape, or the model is of a kind that
        is not known.
    """
    if holds_our_config(path):
        return read_own(path, TahoeConfig, attention=attention)
    folder = _folder(path)
    state = open_state(path if Path(path).is_file() else weights_of(folder, "Tahoe-x1"))
    content, collator = (_read_yaml(_yaml_file(folder, name)) for name in (MODEL_CONFIG, COLLATOR_CONFIG))
    prefix = prefix_of(state, "gene_encoder.embedding.weight", "Tahoe-x1")
    shapes = {name.removeprefix(prefix): shape for name, shape in state.shapes.items()}
    with built_from(folder):
        settings = _settings(content, collator, shapes, folder, state.path)
    sources = published_names(settings).sources(state, prefix, r"(?!)")
    rows = settings["vocab_size"]
    tokens = tokens_with_specials(read_tokens(folder / VOCABULARY), (), rows, folder / VOCABULARY)
    pad_id = collator.get("pad_token_id", tokens.index("<pad>"))
    if tokens.index("<pad>") != pad_id:
        raise WeightsError(
            f"{_yaml_file(folder, COLLATOR_CONFIG)}: pad_token_id {pad_id!r} is not the id of <pad> in the vocabulary"
        )
    if settings["num_drugs"] and DRUG not in tokens:
        raise WeightsError(f"the vocabulary {folder / VOCABULARY} has no token {DRUG}")
    if attention is None:
        masks = _truth(content, "attn_config.use_attn_mask", True, folder)
        attention = "generative" if masks else "full"
    with built_from(folder):
        config = TahoeConfig(attention=attention, tokens=tokens, **settings)
    return Weights(state, config, sources)


def _yaml_file(folder: Path, name: str) -> Path:
    """Return the path of settings, which end with `.yml` or `.yaml`."""
    other = folder / f"{name}.yaml"
    return other if other.is_file() else folder / f"{name}.yml"


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = parse_yaml(path.read_bytes())
    except FileNotFoundError:
        raise WeightsError(f"{path.parent} holds no {path.name}") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise WeightsError(f"{path} cannot be read: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{path} must hold keys and values, not {type(content).__name__}")
    return content


def _truth(content: dict[str, Any], key: str, default: bool, folder: Path) -> bool:
    value = value_at(content, key, default)
    if not isinstance(value, bool):
        raise WeightsError(f"{_yaml_file(folder, MODEL_CONFIG)}: {key} must be true or false, not {value!r}")
    return value


def _settings(
    content: dict[str, Any],
    collator: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
    folder: Path,
    weights: Path,
) -> dict[str, Any]:
    """Return arguments of `TahoeConfig`, which must agree with the shapes of the tensors."""
    path, of_collator = (_yaml_file(folder, name) for name in (MODEL_CONFIG, COLLATOR_CONFIG))
    check_settings(content, _ONLY, path)
    check_settings(collator, _ONLY_COLLATOR, of_collator)
    rows, width = shapes["gene_encoder.embedding.weight"]
    heads = size_of(content, "n_heads", path)
    check_settings(content, {"attn_config.kv_n_heads": heads}, path)
    inner = shapes.get("transformer_encoder.layers.0.up_proj.weight", (4 * width,))[0]
    if inner != round(width * float(value_at(content, "expansion_ratio", inner / width))):
        raise WeightsError(f"{path}: expansion_ratio is not that of the weights, {inner / width:g}")
    decoder = num_layers(shapes, "expression_decoder.linear_layers", weights)
    size_of({"n_layers": value_at(content, "expression_decoder.n_layers", decoder)}, "n_layers", path, decoder)
    activations = {
        "activation": value_at(content, "transformer_activation", "gelu"),
        "decoder_activation": value_at(content, "expression_decoder.activation", "leaky_relu"),
        "drug_activation": value_at(content, "chemical_encoder.activation", "gelu"),
    }
    encoder = value_at(content, "expression_encoder.activation", activations["activation"])
    for key, value in (*activations.items(), ("expression_encoder.activation", encoder)):
        if value not in _ACTIVATIONS:
            raise WeightsError(f"{path}: the {key} {value!r} is none of {', '.join(_ACTIVATIONS)}")
    if encoder != activations["activation"]:
        raise WeightsError(f"{path}: value encoder and layers have different activations, which cannot be read")
    drugs = shapes.get("chem_encoder.embedding.weight", (0, 0))
    return {
        **activations,
        "vocab_size": size_of(content, "vocab_size", path, rows),
        "hidden_size": size_of(content, "d_model", path, width),
        "num_hidden_layers": size_of(
            content, "n_layers", path, num_layers(shapes, "transformer_encoder.layers", weights)
        ),
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "num_decoder_layers": decoder,
        "scaled_cell_decoder": _truth(content, "mvc.scaled_dot_product", False, folder),
        "num_drugs": drugs[0],
        "fingerprint_size": drugs[1],
        "layer_norm_eps": float(value_at(content, "norm_config.eps", 1e-5)),
        "max_value": float(value_at(content, "expression_encoder.max_value", 512)),
        "num_bins": size_of({"num_bins": 51, **collator}, "num_bins", of_collator),
        "pad_value": float(collator.get("pad_value", -2)),
        "mask_value": float(collator.get("mask_value", -1)),
    }


def published_names(settings: dict[str, Any]) -> Table:
    """Return the published name of each of our tensors, without the prefix; `settings` are those of `TahoeConfig`."""
    table = Table()
    table.add("gene_embedding", "gene_encoder.embedding", bias=False)
    table.add("gene_norm", "gene_encoder.enc_norm")
    for part in ("linear1", "linear2", "norm"):
        table.add(f"value_encoder.{part}", f"expression_encoder.{part}")
    table.add("flag_embedding", "flag_encoder", bias=False)
    for number in range(settings["num_hidden_layers"]):
        ours, theirs = f"layers.{number}", f"transformer_encoder.layers.{number}"
        table.add(f"{ours}.attention.qkv", f"{theirs}.self_attn.Wqkv")
        table.add(f"{ours}.attention.out", f"{theirs}.self_attn.out_proj")
        table.add(f"{ours}.feed_forward.up", f"{theirs}.up_proj")
        table.add(f"{ours}.feed_forward.down", f"{theirs}.down_proj")
        for norm in ("norm1", "norm2"):
            table.add(f"{ours}.{norm}", f"{theirs}.{norm}")
    table.add("final_norm", "transformer_encoder.norm")
    for number in range(settings["num_decoder_layers"]):
        table.add(f"value_decoder.hidden.{number}", f"expression_decoder.linear_layers.{number}")
    table.add("value_decoder.output", "expression_decoder.out_proj")
    table.add("cell_decoder.query", "mvc_decoder.gene2query")
    table.add("cell_decoder.product", "mvc_decoder.W", bias=False)
    if settings["num_drugs"]:
        table.add("drug_encoder.fingerprints", "chem_encoder.embedding", bias=False)
        for ours, theirs in (("linear1", "fc"), ("linear2", "proj"), ("norm", "norm")):
            table.add(f"drug_encoder.{ours}", f"chem_encoder.{theirs}")
    return table
