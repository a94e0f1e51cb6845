"""Published weights of CellFM: the names of their tensors and the model that they belong to.

Three kinds of file hold the same tensors under nearly the same names: a MindSpore checkpoint, a state dict of the torch
port, and a checkpoint of the authors' HINGE code, of which the backbone is a part. `published_names` is the one table
between those names and ours, used in both directions. Our model holds query, key, value and gate of retention in one
matrix, and likewise both inputs of the gated linear unit; the published files hold them separately.
"""

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from hinge.backbones.cellfm_config import CellFMConfig
from hinge.backbones.state_files import StateFile, open_state
from hinge.backbones.weights import Weights, built_from, is_folder, read_own
from hinge.utils.errors import ConfigError, WeightsError

logger = logging.getLogger(__name__)

Dialect = Literal["cellfm", "mindspore", "hinge"]
# both published sizes; tensors do not contain the number of heads
_HEADS_OF_WIDTH = {1536: 48}
# settings of training: CellFM under MindSpore, the authors' HINGE under torch
_TRAINED_WITH: dict[Dialect, dict[str, Any]] = {
    "cellfm": {"negative_slope": 0.2, "layer_norm_eps": 1e-7, "masked_input": "mask_token"},
    "hinge": {"negative_slope": 0.01, "layer_norm_eps": 1e-6, "masked_input": "value_plus_zero_token"},
}
# the authors' HINGE has neither the cell-wise decoder nor the mask token
_NOT_IN_HINGE = {"mask_token": "value_enc.mask_emb", "cell_decoder.weight": "cellwise_dec.map.weight"}


def published_names(num_layers: int, technical_tokens: bool, dialect: Dialect = "cellfm") -> dict[str, tuple[str, ...]]:
    """Return for each of our tensors the published tensors that form it, concatenated along the first axis.

    Parameters
    ----------
    num_layers, technical_tokens
        Size and variant of the model.
    dialect
        `"cellfm"`: the names of the torch port; `"mindspore"`: those of the original (LayerNorm has gamma and
        beta); `"hinge"`: those of the backbone in a checkpoint of the authors' HINGE code.
    """
    names: dict[str, tuple[str, ...]] = {
        "gene_embedding.weight": ("gene_emb",),
        "cls_token": ("cls_token",),
        "zero_token": ("zero_emb",),
        "mask_token": ("value_enc.mask_emb",),
    }
    encoders = {"value_encoder": "value_enc.value_enc"}
    if technical_tokens:
        names["technical_tokens"] = ("ST_emb",)
        encoders["technical_encoder"] = "ST_enc"
    for ours, theirs in encoders.items():
        names[f"{ours}.to_bins.weight"] = (f"{theirs}.w1.weight",)
        names[f"{ours}.mix_bins.weight"] = (f"{theirs}.w3.weight",)
        names[f"{ours}.table.weight"] = (f"{theirs}.table.weight",)
        names[f"{ours}.skip"] = (f"{theirs}.a",)
    layers, decoder = ("retentionblocks", "final_layer") if dialect == "hinge" else ("encoder", "value_dec")
    scale, shift = ("gamma", "beta") if dialect == "mindspore" else ("weight", "bias")
    for k in range(num_layers):
        ours, theirs = f"layers.{k}", f"{layers}.{k}"
        names[f"{ours}.retention.qkvu.weight"] = tuple(f"{theirs}.attn.{x}_proj.weight" for x in "qkvu")
        names[f"{ours}.retention.out.weight"] = (f"{theirs}.attn.o_proj.weight",)
        names[f"{ours}.feed_forward.uv.weight"] = tuple(f"{theirs}.ffn.{x}_proj.weight" for x in "uv")
        names[f"{ours}.feed_forward.out.weight"] = (f"{theirs}.ffn.o_proj.weight",)
        for n in "12":
            names[f"{ours}.norm{n}.weight"] = (f"{theirs}.post_norm{n}.{scale}",)
            names[f"{ours}.norm{n}.bias"] = (f"{theirs}.post_norm{n}.{shift}",)
    names["gene_decoder.hidden.weight"] = (f"{decoder}.w1.weight",)
    names["gene_decoder.output.weight"] = (f"{decoder}.w2.weight",)
    names["cell_decoder.weight"] = ("cellwise_dec.map.weight",)
    if dialect == "hinge":
        for ours in _NOT_IN_HINGE:
            del names[ours]
    return names


def export_cellfm(model, dialect: Dialect = "cellfm") -> dict[str, Tensor]:
    """Return copies of the weights of a CellFMModel under the published names."""
    state, exported = model.state_dict(), {}
    names = published_names(model.config.num_hidden_layers, model.config.technical_tokens, dialect)
    for ours, theirs in names.items():
        for name, part in zip(theirs, state[ours].chunk(len(theirs)), strict=True):
            exported[name] = part.detach().cpu().clone()
    return exported


@dataclass(frozen=True)
class PublishedCellFM:
    """A CellFM recognised in a published file.

    Attributes
    ----------
    state
        The file.
    dialect
        Naming of its tensors.
    prefix
        Prefix of every name (`net.`, `module.` …).
    config
        Arguments of a CellFMConfig, inferred from the tensors, with the settings of training.
    sources
        For each of our tensors the names in the file; empty if the file has none and it becomes zeros.
    """

    state: StateFile
    dialect: Dialect
    prefix: str
    config: dict[str, Any]
    sources: dict[str, tuple[str, ...]]


def read_published(path: str | Path, num_attention_heads: int | None = None, **options: Any) -> PublishedCellFM:
    """Recognise the weights of a CellFM in a file and infer its size from the shapes of its tensors.

    Parameters
    ----------
    path
        As in `open_state`.
    num_attention_heads
        Number of heads; None: 48, for the published width of 1536. Tensors do not contain it.
    options
        Arguments of `CellFMConfig` that shall differ from those of training.

    Notes
    -----
    The 80M model has two technical tokens and replaces the value of a gene without a count by the zero token. The 800M
    model has no technical tokens and omits such genes. Files of the torch port hold technical tokens for both models,
    so there the number of layers decides. `technical_tokens` and `zero_input` override this.

    Raises
    ------
    WeightsError
        The file holds no CellFM, or only a part of one.
    ConfigError
        The number of heads is missing or does not fit.
    """
    state = open_state(path)
    prefixes = [name.removesuffix("gene_emb") for name in state.shapes if re.fullmatch(r"(.*\.)?gene_emb", name)]
    if not prefixes:
        some = ", ".join(list(state.shapes)[:3]) or "no tensors"
        raise WeightsError(f"{path} holds no CellFM: it has no tensor gene_emb, but {some}")
    prefix = min(prefixes, key=len)
    shapes = {name.removeprefix(prefix): shape for name, shape in state.shapes.items() if name.startswith(prefix)}
    dialect = _recognise_dialect(shapes)
    config = _infer_config(path, shapes, dialect, num_attention_heads)
    config |= {name: value for name, value in options.items() if value is not None}
    num_layers = config["num_hidden_layers"]
    table = published_names(num_layers, config["technical_tokens"], dialect)
    missing = [name for theirs in table.values() for name in theirs if name not in shapes]
    if missing:
        raise WeightsError(
            f"{path} holds only a part of a CellFM of {num_layers} layers: {len(missing):,} tensors are missing, "
            f"the first of them {missing[0]}"
        )
    sources = {ours: tuple(prefix + name for name in theirs) for ours, theirs in table.items()}
    if dialect == "hinge":
        sources |= {ours: () for ours in _NOT_IN_HINGE}
    else:  # the other tensors of a HINGE checkpoint are read by hinge.sharing
        used = {name for theirs in sources.values() for name in theirs}
        unused = sorted(name for name in state.shapes if name not in used)
        if unused:
            logger.info("%s: %d tensors are no part of the backbone, e.g. %s", path, len(unused), unused[0])
    return PublishedCellFM(state, dialect, prefix, config, sources)


def read_cellfm(path: str | Path, num_attention_heads: int | None = None, **options: Any) -> Weights:
    """Return the weights of a CellFM in a folder or a published file; see `CellFMModel.from_pretrained`."""
    if is_folder(path):
        return read_own(path, CellFMConfig, **options)
    published = read_published(path, num_attention_heads, **options)
    with built_from(path):
        config = CellFMConfig(**published.config)
    return Weights(published.state, config, published.sources)


def _recognise_dialect(names: Iterable[str]) -> Dialect:
    """Return which code wrote a checkpoint with tensors of these names."""
    for name in names:
        if name.startswith("retentionblocks."):
            return "hinge"
        if re.fullmatch(r"encoder\.\d+\.post_norm1\.gamma", name):
            return "mindspore"
    return "cellfm"


def _infer_config(
    path: str | Path, shapes: dict[str, tuple[int, ...]], dialect: Dialect, num_attention_heads: int | None
) -> dict[str, Any]:
    """Return the arguments of a `CellFMConfig` for tensors of these shapes."""
    layers = {int(found[1]) for name in shapes if (found := re.match(r"(?:encoder|retentionblocks)\.(\d+)\.", name))}
    if layers != set(range(len(layers))) or not layers:
        raise WeightsError(f"{path} holds no complete CellFM: its layers are {sorted(layers)[:8]}")
    bins = shapes.get("value_enc.value_enc.w1.weight", (0,))[0]
    if len(shapes["gene_emb"]) != 2 or not bins:
        raise WeightsError(f"{path} holds no complete CellFM: its value encoder or its embedding table is missing")
    rows, width = shapes["gene_emb"]
    if rows % 8:
        raise WeightsError(f"{path} has {rows:,} gene embeddings; a CellFM has a multiple of 8")
    if num_attention_heads is None:
        num_attention_heads = _HEADS_OF_WIDTH.get(width)
        if num_attention_heads is None:
            raise ConfigError(
                f"{path} has width {width:,}, and the number of attention heads cannot be inferred from its tensors; "
                "give num_attention_heads (--heads on the command line)"
            )
    if num_attention_heads < 1 or width % num_attention_heads:
        raise ConfigError(f"{path} has width {width:,}, which is not divisible by {num_attention_heads} heads")
    older = "ST_emb" in shapes and (dialect == "mindspore" or len(layers) == 2)
    return {
        "num_genes": rows - 1,
        "hidden_size": width,
        "num_hidden_layers": len(layers),
        "num_attention_heads": num_attention_heads,
        "num_value_bins": bins,
        "technical_tokens": older,
        "zero_input": "token" if older else "pad",
        **_TRAINED_WITH["hinge" if dialect == "hinge" else "cellfm"],
    }
