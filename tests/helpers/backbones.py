"""Recordings of published backbones as folders of published weights."""

import json
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, safe_open, save_file

from hinge.backbones import CellFMConfig, CellFMModel, ScGPTConfig, ScGPTModel, TahoeConfig, TahoeModel

_SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_TRANSFORMER = {
    **_SIZE,
    "vocab_size": 12,
    "intermediate_size": 24,
    "tokens": ["<pad>", *[f"G{number}" for number in range(8)], "<cls>", "<drug>", "<eoc>"],
}


def _with_prior() -> CellFMModel:
    model = CellFMModel(CellFMConfig(num_genes=8, num_value_bins=8, num_prior_factors=3, **_SIZE))
    model.set_expression_prior(torch.rand(8).numpy() + 1, torch.randn(8, 3).numpy(), 0.1 + torch.rand(8).numpy())
    return model


SMALL = {
    "cellfm-prior": _with_prior,
    "cellfm": lambda: CellFMModel(CellFMConfig(num_genes=8, num_value_bins=8, **_SIZE)),
    "cellfm-80m": lambda: CellFMModel(CellFMConfig(num_genes=8, num_value_bins=8, technical_tokens=True, **_SIZE)),
    "scgpt": lambda: ScGPTModel(ScGPTConfig(**_TRANSFORMER)),
    "scgpt-full": lambda: ScGPTModel(ScGPTConfig(attention="full", with_flag=False, **_TRANSFORMER)),
    "scgpt-spatial": lambda: ScGPTModel(
        ScGPTConfig(
            num_experts=4,
            with_impute_decoder=True,
            gene_means=[None, *[0.5 + 0.3 * number for number in range(7)]],
            **_TRANSFORMER,
        )
    ),
    "tahoe": lambda: TahoeModel(TahoeConfig(**_TRANSFORMER)),
    "tahoe-3b": lambda: TahoeModel(
        TahoeConfig(
            attention="full",
            activation="gelu",
            decoder_activation="gelu",
            num_drugs=3,
            fingerprint_size=5,
            **_TRANSFORMER,
        )
    ),
}
"""Small backbones with random weights that know the genes 1 to 8, by name."""


def small_backbone(name: str, seed: int = 0):
    """Return one of `SMALL`, in eval mode."""
    torch.manual_seed(seed)
    return SMALL[name]().eval()


def read_recording(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Return sizes and tensors of a recording."""
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["config"])
    return meta, load_file(path)


def published_folder(path: Path, folder: Path, genes: list[str] | None = None, **arguments) -> Path:
    """Write the weights of a recording as the folder that the published code writes.

    `genes` are the names of the first genes of the vocabulary; `arguments` change args.json.
    """
    meta, recorded = read_recording(path)
    state = {key.removeprefix("state."): tensor for key, tensor in recorded.items() if key.startswith("state.")}
    folder.mkdir(parents=True, exist_ok=True)
    special = {"<pad>": meta["pad_id"], "<cls>": meta["cls_id"], "<eoc>": meta["eoc_id"]}
    if "drug_id" in meta:
        special["<drug>"] = meta["drug_id"]
    names = {number: token for token, number in special.items()}
    size = meta.get("ntoken") or meta["vocab_size"]
    # file order is not that of the ids
    given = iter(genes or [])
    named = [names.get(number) or next(given, f"GENE{number}") for number in range(size)]
    tokens = {named[number]: number for number in reversed(range(size))}
    (folder / "vocab.json").write_text(json.dumps(tokens))
    if "ntoken" in meta:
        torch.save(state, folder / "best_model.pt")
        content = {
            "embsize": meta["d_model"],
            "nheads": meta["nhead"],
            "d_hid": meta["d_hid"],
            "nlayers": meta["nlayers"],
            "n_bins": meta["n_bins"],
            "pad_value": meta["pad_value"],
            "mask_value": meta["mask_value"],
            "input_emb_style": "continuous",
            **arguments,
        }
        (folder / "args.json").write_text(json.dumps(content))
        if "moe_experts" in meta:
            rows = [f"{number},{1 + number % 7}" for number in range(size - 3)]
            (folder / "all_dict_mean_std.csv").write_text("\n".join([",mean", *rows]))
        return folder
    save_file(state, folder / "model.safetensors")
    content = {
        "vocab_size": size,
        "d_model": meta["d_model"],
        "n_heads": meta["n_heads"],
        "n_layers": meta["n_layers"],
        "expansion_ratio": meta["expansion_ratio"],
        "transformer_activation": meta["activation"],
        "attn_config": {"use_attn_mask": meta.get("attention") != "full"},
        "expression_encoder": {"max_value": meta["max_value"], "activation": meta["activation"]},
        "mvc": {"scaled_dot_product": meta["mvc_scaled"]},
        "expression_decoder": {"n_layers": 1, "activation": meta["decoder_activation"]},
        **({"chemical_encoder": {"activation": meta["activation"]}} if "num_drugs" in meta else {}),
    }
    (folder / "model_config.yml").write_text(yaml.safe_dump(content))
    (folder / "collator_config.yml").write_text(
        yaml.safe_dump({"pad_token_id": meta["pad_id"], "num_bins": meta["n_bins"], "pad_value": meta["pad_value"]})
    )
    return folder
