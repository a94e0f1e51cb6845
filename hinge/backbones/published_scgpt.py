"""Published weights of scGPT and scGPT-spatial: a state dict, `args.json` and `vocab.json` in one folder."""

import csv
import math
from pathlib import Path
from typing import Any

from hinge.backbones.published_files import (
    Table,
    check_settings,
    num_layers,
    prefix_of,
    read_json_object,
    read_tokens,
    size_of,
    tokens_with_specials,
    weights_of,
)
from hinge.backbones.state_files import open_state
from hinge.backbones.transformer_config import ScGPTConfig
from hinge.backbones.weights import Weights, built_from, holds_our_config, read_own
from hinge.utils.errors import WeightsError

ARGUMENTS, VOCABULARY, GENE_MEANS = "args.json", "vocab.json", "all_dict_mean_std.csv"
# keys that change what the model computes → the only value that can be read
_ONLY: dict[str, Any] = {
    "input_style": "binned",
    "input_emb_style": "continuous",
    "pad_token": "<pad>",
    "pre_norm": False,
}
_HEADS = ("nheads", "nhead", "n_heads")
_SPECIALS = ("<pad>", "<cls>", "<eoc>")
# of the classifier, which no output of the model needs
_EXTRAS = r"cls_decoder\..+"
_CHOSEN_EXPERTS = 2  # of the published code; no file contains it
# names of the attention's products in a layer: with flash attention, in a later version of it, and of torch
_ATTENTION = {
    "Wqkv.": "out_proj.",
    "_impl.Wqkv.": "_impl.out_proj.",
    "in_proj_": "out_proj.",
}


def is_scgpt(path: str | Path) -> bool:
    """Return whether a folder, or the folder of a file, is laid out as published scGPT weights."""
    return (_folder(path) / ARGUMENTS).is_file()


def _folder(path: str | Path) -> Path:
    return Path(path) if Path(path).is_dir() else Path(path).parent


def read_scgpt(path: str | Path, attention: str | None = None) -> Weights:
    """Recognise weights of scGPT or scGPT-spatial.

    Parameters
    ----------
    path
        A folder of ours; or the published one with `best_model.pt`, `args.json`, `vocab.json` and, for scGPT-spatial,
        `all_dict_mean_std.csv`, or the file of the weights in it.
    attention
        `"generative"` or `"full"`; None: generative, as in pre-training, where the weights have the flags it needs.

    Raises
    ------
    WeightsError
        A file is missing or damaged, a tensor is missing, unknown or of another shape.
    ConfigError
        The attention is not possible with these weights.
    """
    if holds_our_config(path):
        return read_own(path, ScGPTConfig, attention=attention)
    folder = _folder(path)
    state = open_state(path if Path(path).is_file() else weights_of(folder, "scGPT"))
    arguments = read_json_object(folder / ARGUMENTS)
    prefix = prefix_of(state, "encoder.embedding.weight", "scGPT")
    shapes = {name.removeprefix(prefix): shape for name, shape in state.shapes.items()}
    with built_from(folder):
        settings = _settings(arguments, shapes, state.path, folder / ARGUMENTS)
    table = published_names(shapes, settings)
    sources = table.sources(state, prefix, _EXTRAS)
    rows = shapes["encoder.embedding.weight"][0]
    tokens = tokens_with_specials(read_tokens(folder / VOCABULARY), _SPECIALS, rows, folder / VOCABULARY)
    if attention is None:
        attention = "generative" if settings["with_flag"] else "full"
    with built_from(folder):
        means = _gene_means(folder / GENE_MEANS, rows) if settings["num_experts"] else None
        config = ScGPTConfig(vocab_size=rows, attention=attention, tokens=tokens, gene_means=means, **settings)
    return Weights(state, config, sources)


def _settings(
    arguments: dict[str, Any], shapes: dict[str, tuple[int, ...]], weights: Path, path: Path
) -> dict[str, Any]:
    """Return arguments of `ScGPTConfig` from the tensors and from args.json, which must agree."""
    check_settings(arguments, _ONLY, path)
    layers = num_layers(shapes, "transformer_encoder.layers", weights)
    inner = shapes.get("transformer_encoder.layers.0.linear1.weight", (None,))[0]
    heads = next((key for key in _HEADS if key in arguments), _HEADS[0])
    settings: dict[str, Any] = {
        "hidden_size": size_of(arguments, "embsize", path, shapes["encoder.embedding.weight"][1]),
        "num_hidden_layers": size_of(arguments, "nlayers", path, layers),
        "num_attention_heads": size_of(arguments, heads, path),
        "intermediate_size": size_of(arguments, "d_hid", path, inner),
        "num_bins": size_of({"n_bins": 51, **arguments}, "n_bins", path),
        "pad_value": float(arguments.get("pad_value", -2)),
        "mask_value": float(arguments.get("mask_value", -1)),
        "with_flag": "flag_encoder.weight" in shapes,
        "with_impute_decoder": any(name.startswith("impute_mvc_decoder.") for name in shapes),
    }
    mixture = any(name.startswith("decoder.moe.") for name in shapes)
    experts = num_layers(shapes, "decoder.moe.experts", weights) if mixture else 0
    return settings | {"num_experts": experts, "num_chosen": min(_CHOSEN_EXPERTS, experts or _CHOSEN_EXPERTS)}


def published_names(shapes: dict[str, tuple[int, ...]], settings: dict[str, Any]) -> Table:
    """Return the published name of each of our tensors, without the prefix.

    Parameters
    ----------
    shapes
        Tensors of the file: they decide how the attention is spelled.
    settings
        Of `ScGPTConfig`.
    """
    table = Table()
    table.add("gene_embedding", "encoder.embedding", bias=False)
    table.add("gene_norm", "encoder.enc_norm")
    for part in ("linear1", "linear2", "norm"):
        table.add(f"value_encoder.{part}", f"value_encoder.{part}")
    if settings["with_flag"]:
        table.add("flag_embedding", "flag_encoder", bias=False)
    for number in range(settings["num_hidden_layers"]):
        ours, theirs = f"layers.{number}", f"transformer_encoder.layers.{number}"
        spelled = next(
            (key for key in _ATTENTION if f"{theirs}.self_attn.{key}weight" in shapes), next(iter(_ATTENTION))
        )
        for end in ("weight", "bias"):
            table.names[f"{ours}.attention.qkv.{end}"] = f"{theirs}.self_attn.{spelled}{end}"
            table.names[f"{ours}.attention.out.{end}"] = f"{theirs}.self_attn.{_ATTENTION[spelled]}{end}"
        table.add(f"{ours}.feed_forward.up", f"{theirs}.linear1")
        table.add(f"{ours}.feed_forward.down", f"{theirs}.linear2")
        for norm in ("norm1", "norm2"):
            table.add(f"{ours}.{norm}", f"{theirs}.{norm}")
    if settings["num_experts"]:
        table.add("value_decoder.gate", "decoder.moe.gate.gate")
        for number in range(settings["num_experts"]):
            _add_decoder(table, f"value_decoder.experts.{number}", f"decoder.moe.experts.{number}")
    else:
        _add_decoder(table, "value_decoder", "decoder")
    cells = {"cell_decoder": "mvc_decoder"}
    if settings["with_impute_decoder"]:
        cells["impute_decoder"] = "impute_mvc_decoder"
    for ours, theirs in cells.items():
        table.add(f"{ours}.query", f"{theirs}.gene2query")
        table.add(f"{ours}.product", f"{theirs}.W", bias=False)
    return table


def _add_decoder(table: Table, ours: str, theirs: str) -> None:
    for part, number in (("hidden.0", 0), ("hidden.1", 2), ("output", 4)):
        table.add(f"{ours}.{part}", f"{theirs}.fc.{number}")


def _gene_means(path: Path, rows: int) -> list[float | None]:
    """Return the mean of each gene by its id, None where the table has none; the first column names the ids."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = list(csv.DictReader(file))
    except FileNotFoundError:
        raise WeightsError(
            f"{path.parent} holds no {path.name}: scGPT-spatial ranks counts relative to the genes' means in it"
        ) from None
    except (OSError, ValueError, csv.Error) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
    means: list[float | None] = [None] * rows
    seen: set[int] = set()
    for line in lines:
        try:
            label, value = float(next(iter(line.values()))), float(line["mean"] or "nan")
        except (KeyError, TypeError, ValueError):
            label, value = -1.0, math.nan
        if not (0 <= label < rows and label.is_integer()) or value < 0:
            raise WeightsError(
                f"{path} must hold a row label (id below {rows:,}) and a mean of at least 0 in the column mean, "
                f"not {line!r:.80}"
            )
        if int(label) in seen:
            raise WeightsError(f"{path} has the row label {int(label)} twice")
        seen.add(int(label))
        if math.isfinite(value) and value > 0:
            means[int(label)] = value
    return means
