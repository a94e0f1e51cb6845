"""Published weights of Tahoe-x1: safetensors, two YAML files of settings and `vocab.json` in one folder."""

import re
from pathlib import Path
from typing import Any

import yaml

from hinge.backbones.published_files import Table, prefix_of, read_tokens, size_of, tokens_with_specials
from hinge.backbones.state_files import open_state
from hinge.backbones.transformer_config import DRUG, TahoeConfig
from hinge.backbones.weights import Weights, built_from, holds_our_config, read_own
from hinge.utils.errors import WeightsError, one_line
from hinge.utils.yaml import parse_yaml

MODEL_CONFIG, COLLATOR_CONFIG, VOCABULARY = "model_config.yml", "collator_config.yml", "vocab.json"
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


def is_tahoe(path: str | Path) -> bool:
    """Return whether a folder, or the folder of a file, is laid out as published Tahoe-x1 weights."""
    return (_folder(path) / MODEL_CONFIG).is_file()


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
    state = open_state(path)
    content, collator = _read_yaml(folder / MODEL_CONFIG), _read_yaml(folder / COLLATOR_CONFIG)
    prefix = prefix_of(state, "gene_encoder.embedding.weight", "Tahoe-x1")
    shapes = {name.removeprefix(prefix): shape for name, shape in state.shapes.items()}
    with built_from(folder):
        settings = _settings(content, collator, shapes, folder)
    sources = published_names(settings).sources(state, prefix, r"(?!)")
    rows = settings["vocab_size"]
    tokens = tokens_with_specials(read_tokens(folder / VOCABULARY), (), rows, folder / VOCABULARY)
    pad_id = collator.get("pad_token_id", tokens.index("<pad>"))
    if tokens.index("<pad>") != pad_id:
        raise WeightsError(
            f"{folder / COLLATOR_CONFIG}: pad_token_id {pad_id!r} is not the id of <pad> in the vocabulary"
        )
    if settings["num_drugs"] and DRUG not in tokens:
        raise WeightsError(f"the vocabulary {folder / VOCABULARY} has no token {DRUG}")
    if attention is None:
        masks = _at(content, "attn_config.use_attn_mask", True)
        attention = "generative" if masks else "full"
    with built_from(folder):
        config = TahoeConfig(attention=attention, tokens=tokens, **settings)
    return Weights(state, config, sources)


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


def _at(content: dict[str, Any], key: str, default: Any) -> Any:
    """Return the value at a dotted key."""
    node: Any = content
    for part in key.split("."):
        if not isinstance(node, dict) or node.get(part) is None:
            return default
        node = node[part]
    return node


def _settings(
    content: dict[str, Any], collator: dict[str, Any], shapes: dict[str, tuple[int, ...]], folder: Path
) -> dict[str, Any]:
    """Return arguments of `TahoeConfig`, which must agree with the shapes of the tensors."""
    path = folder / MODEL_CONFIG
    for key, value in _ONLY.items():
        if _at(content, key, value) != value:
            raise WeightsError(f"{path}: {key} is {_at(content, key, value)!r}, and only {value!r} can be read")
    rows, width = shapes["gene_encoder.embedding.weight"]
    if size_of(content, "vocab_size", path) != rows:
        raise WeightsError(f"{path} announces {content['vocab_size']:,} tokens and the weights have {rows:,}")
    activations = {
        "activation": _at(content, "transformer_activation", "gelu"),
        "decoder_activation": _at(content, "expression_decoder.activation", "leaky_relu"),
        "drug_activation": _at(content, "chemical_encoder.activation", "gelu"),
    }
    encoder = _at(content, "expression_encoder.activation", activations["activation"])
    for key, value in (*activations.items(), ("expression_encoder.activation", encoder)):
        if value not in _ACTIVATIONS:
            raise WeightsError(f"{path}: the {key} {value!r} is none of {', '.join(_ACTIVATIONS)}")
    if encoder != activations["activation"]:
        raise WeightsError(f"{path}: value encoder and layers have different activations, which cannot be read")
    layers = {int(found[1]) for name in shapes if (found := re.match(r"transformer_encoder\.layers\.(\d+)\.", name))}
    if layers != set(range(size_of(content, "n_layers", path))):
        raise WeightsError(f"{path} announces {content['n_layers']} layers and the weights have {len(layers)}")
    drugs = shapes.get("chem_encoder.embedding.weight", (0, 0))
    return {
        **activations,
        "vocab_size": rows,
        "hidden_size": size_of(content, "d_model", path),
        "num_hidden_layers": len(layers),
        "num_attention_heads": size_of(content, "n_heads", path),
        "intermediate_size": round(width * float(_at(content, "expansion_ratio", 4))),
        "num_decoder_layers": size_of({"n_layers": _at(content, "expression_decoder.n_layers", 2)}, "n_layers", path),
        "scaled_cell_decoder": bool(_at(content, "mvc.scaled_dot_product", False)),
        "num_drugs": drugs[0],
        "fingerprint_size": drugs[1],
        "layer_norm_eps": float(_at(content, "norm_config.eps", 1e-5)),
        "max_value": float(_at(content, "expression_encoder.max_value", 512)),
        "num_bins": size_of({"num_bins": 51, **collator}, "num_bins", folder / COLLATOR_CONFIG),
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
