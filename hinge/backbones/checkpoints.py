"""Weights of a CellFM as others published them, read and written tensor by tensor.

Three kinds of file hold the same tensors under nearly the same names: MindSpore's `.ckpt`; a torch state dict
(`.pth`, `.pt`, `.safetensors`) of the torch port; and a checkpoint of the authors' HINGE code, in which the
backbone is a part. `published_names` is the one table between those names and ours, used in both directions:
we hold query, key, value and gate of retention as one matrix, and so the two inputs of the gated linear unit;
the published files hold them apart.

Nothing is read before it is needed, and no more than one tensor at a time is held beside the result.
"""

import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from hinge.backbones.mindspore import MindSporeCheckpoint, is_mindspore
from hinge.backbones.vocabulary import GeneVocabulary
from hinge.utils.errors import ConfigError, WeightsError, one_line
from hinge.utils.safe_torch import load_torch, plain_tensors

logger = logging.getLogger(__name__)

Dialect = Literal["cellfm", "mindspore", "hinge"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SAFETENSORS_NAMES = {dtype: name for name, dtype in _SAFETENSORS_DTYPES.items()}
# where training scripts keep the state dict inside what they save
_WRAPPERS = ("model", "state_dict", "module", "net")
_PART_ELEMENTS = 2**20
_MAPPED_BYTES = 64 * 2**20

# both published sizes; the number of heads leaves no trace in the tensors
_HEADS_OF_WIDTH = {1536: 48}
# what the weights were trained with: CellFM under MindSpore, the authors' HINGE under torch
_TRAINED_WITH: dict[Dialect, dict[str, Any]] = {
    "cellfm": {"negative_slope": 0.2, "layer_norm_eps": 1e-7, "masked_input": "mask_token"},
    "hinge": {"negative_slope": 0.01, "layer_norm_eps": 1e-6, "masked_input": "value_plus_zero_token"},
}
# CellFM's own decoder over cells and its mask token: the authors' HINGE has dropped them
_NOT_IN_HINGE = {"mask_token": "value_enc.mask_emb", "cell_decoder.weight": "cellwise_dec.map.weight"}


# -- files -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StateFile:
    """Tensors of one file or folder: their names, shapes and types now, their contents when asked for.

    Attributes
    ----------
    path
        The file or folder.
    format
        `"mindspore"`, `"torch"` or `"safetensors"`.
    shapes, dtypes
        Of each tensor by its name in the file.
    read
        Gives one tensor, as stored. What it gives may be a view of the file: copy it or drop it.
    """

    path: Path
    format: Literal["mindspore", "torch", "safetensors"]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    read: Callable[[str], Tensor]


def open_state(path: str | Path) -> StateFile:
    """Recognise a file of weights, or a folder with safetensors, and list what it holds.

    Raises
    ------
    WeightsError
        There is no such file, it is damaged or of another format.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise WeightsError(f"{path} holds no weights: there is no .safetensors file in it")
        return _open_safetensors(path, files)
    if not path.is_file():
        raise WeightsError(f"there is no file {path}")
    if path.suffix == ".safetensors":
        return _open_safetensors(path, [path])
    with open(path, "rb") as file:
        start = file.read(2)
    # a zip archive (torch since 1.6) or a pickle (before); anything else can only be MindSpore's
    if start in (b"PK", b"\x80\x02") and not is_mindspore(path):
        return _open_torch(path)
    checkpoint = MindSporeCheckpoint(path)
    names = checkpoint.keys()
    return StateFile(
        path,
        "mindspore",
        {name: checkpoint.shape(name) for name in names},
        {name: checkpoint.dtype(name) for name in names},
        checkpoint.tensor,
    )


def _open_safetensors(path: Path, files: list[Path]) -> StateFile:
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    home: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as content:
                for name in content.keys():  # noqa: SIM118 (not a dictionary)
                    part = content.get_slice(name)
                    shapes[name], home[name] = tuple(part.get_shape()), file
                    dtypes[name] = _SAFETENSORS_DTYPES.get(part.get_dtype(), torch.uint8)
        except Exception as error:  # safetensors has an exception class of its own, and OSError
            raise WeightsError(f"{file} is not a whole safetensors file: {one_line(error)}") from error

    opened = _Mapping(lambda file: safe_open(file, "pt"))

    def read(name: str) -> Tensor:
        n_bytes = math.prod(shapes[name]) * dtypes[name].itemsize
        return opened(home[name], n_bytes).get_tensor(name)

    return StateFile(path, "safetensors", shapes, dtypes, read)


def _open_torch(path: Path) -> StateFile:
    def load(mapped: bool) -> dict[str, Tensor]:
        content = load_torch(path, mapped)
        for _ in range(2):
            for key in _WRAPPERS:
                if isinstance(content, dict) and isinstance(content.get(key), dict):
                    content = content[key]
        if not isinstance(content, dict):
            raise ValueError("it holds no dictionary of tensors")
        return plain_tensors(content)

    with open(path, "rb") as file:
        mapped = file.read(2) == b"PK"
    try:
        tensors = load(mapped)
    except Exception as error:  # a damaged or foreign archive ends in almost any exception
        raise WeightsError(f"{path} is not a readable torch state dict: {one_line(error)}") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    whole = None if mapped else tensors  # the format before torch 1.6 can only be read as a whole
    opened = _Mapping(lambda file: load(mapped))

    def read(name: str) -> Tensor:
        n_bytes = math.prod(shapes[name]) * dtypes[name].itemsize
        return (whole or opened(path, n_bytes))[name]

    return StateFile(path, "torch", shapes, dtypes, read)


class _Mapping:
    """A mapped file, opened anew after every 64 MB read: pages of a mapping that stays open count as memory in use."""

    def __init__(self, open_file: Callable[[Path], Any]):
        self._open, self._content, self._n_bytes = open_file, None, 0
        self._path: Path | None = None

    def __call__(self, path: Path, n_bytes: int) -> Any:
        if path != self._path or self._n_bytes > _MAPPED_BYTES:
            self._path, self._content, self._n_bytes = path, None, 0
            self._content = self._open(path)
        self._n_bytes += n_bytes
        return self._content


# -- names -------------------------------------------------------------------------------------------------


def published_names(num_layers: int, technical_tokens: bool, dialect: Dialect = "cellfm") -> dict[str, tuple[str, ...]]:
    """For each of our tensors the published ones which, joined along the first axis, are it.

    Parameters
    ----------
    num_layers, technical_tokens
        Of the model.
    dialect
        `"cellfm"`: the torch port's names; `"mindspore"`: those of the original (LayerNorm has gamma and beta);
        `"hinge"`: those of the backbone's part in a checkpoint of the authors' HINGE code.
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
    """The weights of a CellFMModel under the published names; copies, with nothing shared between them."""
    state, exported = model.state_dict(), {}
    names = published_names(model.config.num_hidden_layers, model.config.technical_tokens, dialect)
    for ours, theirs in names.items():
        for name, part in zip(theirs, state[ours].chunk(len(theirs)), strict=True):
            exported[name] = part.detach().cpu().clone()
    return exported


@dataclass(frozen=True)
class PublishedCellFM:
    """A published file understood as a CellFM.

    Attributes
    ----------
    state
        The file.
    dialect
        How it names its tensors.
    prefix
        What stands before every name (`net.`, `module.` …).
    config
        Arguments of a CellFMConfig, as far as the tensors tell them, with the values it was trained with.
    sources
        For each of our tensors the names in the file; empty where the file has none and zeros stand for it.
    """

    state: StateFile
    dialect: Dialect
    prefix: str
    config: dict[str, Any]
    sources: dict[str, tuple[str, ...]]


def read_published(path: str | Path, num_attention_heads: int | None = None, **options: Any) -> PublishedCellFM:
    """Recognise the weights of a CellFM in a file and infer its size from the tensors; reads no contents.

    Parameters
    ----------
    path
        As `open_state`.
    num_attention_heads
        None: 48, for the published width of 1536. The tensors do not tell it.
    options
        Arguments of CellFMConfig that shall be other than the weights were trained with.

    Notes
    -----
    The 80M generation has two technical tokens and replaces the value of a gene without a count by the zero
    token; the 800M one has none and leaves such genes out. Files of the torch port hold technical tokens in
    both generations, so there the number of layers decides. `technical_tokens` and `zero_input` override this.

    Raises
    ------
    WeightsError
        The file holds no CellFM, or only a part of one.
    ConfigError
        The number of heads is needed, or does not fit.
    """
    state = open_state(path)
    prefixes = [name.removesuffix("gene_emb") for name in state.shapes if re.fullmatch(r"(.*\.)?gene_emb", name)]
    if not prefixes:
        some = ", ".join(list(state.shapes)[:3]) or "nothing"
        raise WeightsError(f"{path} holds no CellFM: there is no tensor gene_emb in it, but {some}")
    prefix = min(prefixes, key=len)
    names = {name.removeprefix(prefix) for name in state.shapes if name.startswith(prefix)}
    dialect: Dialect = "cellfm"
    if any(name.startswith("retentionblocks.") for name in names):
        dialect = "hinge"
    elif any(re.fullmatch(r"encoder\.\d+\.post_norm1\.gamma", name) for name in names):
        dialect = "mindspore"

    layers = {int(found[1]) for name in names if (found := re.match(r"(?:encoder|retentionblocks)\.(\d+)\.", name))}
    if layers != set(range(len(layers))) or not layers:
        raise WeightsError(f"{path} holds no whole CellFM: its layers are {sorted(layers)[:8]}")
    shape_of = {name: state.shapes[prefix + name] for name in names}
    bins = shape_of.get("value_enc.value_enc.w1.weight", (0,))[0]
    if len(shape_of["gene_emb"]) != 2 or not bins:
        raise WeightsError(f"{path} holds no whole CellFM: its value encoder or its embedding table is missing")
    rows, width = shape_of["gene_emb"]
    if rows % 8:
        raise WeightsError(f"{path} has {rows:,} gene embeddings; a CellFM has a multiple of 8 of them")
    if num_attention_heads is None:
        num_attention_heads = _HEADS_OF_WIDTH.get(width)
        if num_attention_heads is None:
            raise ConfigError(
                f"{path} has width {width:,}, and its tensors do not tell the number of attention heads; "
                "give num_attention_heads (--heads on the command line)"
            )
    if num_attention_heads < 1 or width % num_attention_heads:
        raise ConfigError(f"{path} has width {width:,}, which is not divisible by {num_attention_heads} heads")

    older = "ST_emb" in names and (dialect == "mindspore" or len(layers) == 2)
    config = {
        "num_genes": rows - 1,
        "hidden_size": width,
        "num_hidden_layers": len(layers),
        "num_attention_heads": num_attention_heads,
        "num_value_bins": bins,
        "technical_tokens": older,
        "zero_input": "token" if older else "pad",
        **_TRAINED_WITH["hinge" if dialect == "hinge" else "cellfm"],
        **{name: value for name, value in options.items() if value is not None},
    }
    table = published_names(len(layers), config["technical_tokens"], dialect)
    missing = [name for theirs in table.values() for name in theirs if name not in names]
    if missing:
        raise WeightsError(
            f"{path} holds only a part of a CellFM of {len(layers)} layers: {len(missing):,} tensors are missing, "
            f"the first of them {missing[0]}"
        )
    sources = {ours: tuple(prefix + name for name in theirs) for ours, theirs in table.items()}
    if dialect == "hinge":
        sources |= {ours: () for ours in _NOT_IN_HINGE}
    else:  # of a HINGE checkpoint the rest is read elsewhere
        used = {name for theirs in sources.values() for name in theirs}
        unused = sorted(name for name in state.shapes if name not in used)
        if unused:
            logger.info("%s: %d tensors are no part of the backbone, e.g. %s", path, len(unused), unused[0])
    return PublishedCellFM(state, dialect, prefix, config, sources)


# -- loading -----------------------------------------------------------------------------------------------


def is_folder(path: str | Path) -> bool:
    """Whether a path is meant as a folder of ours, there or not, and not as a published file."""
    return Path(path).is_dir() or not (Path(path).exists() or Path(path).suffix)


def read_our_config(folder: str | Path) -> dict[str, Any]:
    """`config.json` of a backbone's folder.

    Raises
    ------
    WeightsError
        It is missing, damaged, or not that of a CellFM.
    """
    try:
        content = json.loads((Path(folder) / "config.json").read_text("utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"{folder} holds no backbone: config.json is missing") from None
    except (OSError, ValueError) as error:
        raise WeightsError(f"the backbone in {folder} cannot be read: config.json: {one_line(error)}") from None
    if not isinstance(content, dict) or content.get("model_type") != "cellfm":
        raise WeightsError(f"the backbone in {folder} cannot be read: its config.json is not that of a CellFM")
    return content


def fill(model, state: StateFile, sources: dict[str, tuple[str, ...]], dtype: torch.dtype | None) -> None:
    """Give a model on the meta device its weights, one tensor at a time.

    Parameters
    ----------
    model
        A CellFMModel, its parameters without storage.
    state, sources
        The file, and for each parameter the tensors in it that are joined to it; zeros where there are none.
    dtype
        Of the parameters; None: as stored.

    Raises
    ------
    WeightsError
        Names or shapes do not fit the model.
    """
    parameters = dict(model.named_parameters())
    wrong = sorted(parameters.keys() ^ sources.keys())
    if wrong:
        raise WeightsError(f"the weights in {state.path} are not those of a CellFM of its config: {wrong[0]}")
    stored = state.dtypes[sources["cls_token"][0]]
    check_shapes(parameters, state, sources)
    for name, parameter in tqdm(parameters.items(), desc=state.path.name, delay=2, disable=None):
        own = torch.zeros(parameter.shape, dtype=dtype or stored)
        start = 0
        for source in sources[name]:
            part = state.read(source)
            own[start : start + len(part)].copy_(part) if own.ndim else own.copy_(part)
            start += len(part)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, torch.nn.Parameter(own))


def check_shapes(parameters: dict[str, Tensor], state: StateFile, sources: dict[str, tuple[str, ...]]) -> None:
    """Whether every tensor in the file has the shape and a type that the model needs.

    Raises
    ------
    WeightsError
        One has not.
    """
    for name, theirs in sources.items():
        for source in theirs:
            shape = parameters[name].shape
            expected = (shape[0] // len(theirs), *shape[1:])
            if state.shapes[source] != expected:
                raise WeightsError(
                    f"{state.path}: {source} has the shape {state.shapes[source]} where a model of this size has "
                    f"{expected}"
                )
            if not state.dtypes[source].is_floating_point:
                raise WeightsError(f"{state.path}: {source} holds no floating-point numbers")


# -- converting --------------------------------------------------------------------------------------------


def vocabulary_for(path: str | Path, num_embeddings: int) -> GeneVocabulary:
    """Read a vocabulary and make sure that the weights have as many embeddings as it needs.

    Raises
    ------
    WeightsError
        They have not.
    """
    vocabulary = GeneVocabulary.load(path)
    if vocabulary.n_embeddings != num_embeddings:
        raise WeightsError(
            f"the vocabulary {path} does not belong to these weights: its {vocabulary.n_genes:,} genes take "
            f"{vocabulary.n_embeddings:,} embeddings and the weights have {num_embeddings:,}"
        )
    return vocabulary


def stream_safetensors(
    state: StateFile,
    sources: dict[str, tuple[str, ...]],
    shapes: dict[str, tuple[int, ...]],
    out: Path,
    dtype: torch.dtype,
) -> None:
    """Write tensors as one safetensors file, in parts of 4 MB.

    Parameters
    ----------
    state, sources
        The file they come from, and for each tensor the names in it that are joined to it along the first axis;
        zeros where there are none.
    shapes
        Of each tensor.
    out
        The file to write.
    dtype
        Of all its tensors.

    Raises
    ------
    WeightsError
        A finite weight would become infinite.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt", "converted_from": state.path.name}}
    at = 0
    for name, shape in shapes.items():
        start, at = at, at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": [start, at]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with (
        open(out, "wb") as file,
        tqdm(total=at, desc=out.name, unit="B", unit_scale=True, disable=None) as bar,
    ):
        file.write(len(head).to_bytes(8, "little"))
        file.write(head)
        for name, shape in shapes.items():
            if not sources[name]:
                file.seek(math.prod(shape) * dtype.itemsize, os.SEEK_CUR)  # a hole in a file reads as zeros
                file.truncate()
            for source in sources[name]:
                for part in _parts(state, source):
                    converted = part.to(dtype)
                    infinite = converted.isinf()
                    if infinite.any() and not part[infinite].isinf().all():
                        raise WeightsError(
                            f"{state.path}: {source} has weights beyond the range of {str(dtype)[6:]}; "
                            "convert to fp32 or bf16"
                        )
                    bar.update(file.write(memoryview(converted.contiguous().view(torch.uint8).numpy())))


def _parts(state: StateFile, name: str) -> Iterator[Tensor]:
    """The numbers of one tensor in flat parts of at most 4 MB in float32."""
    yield from state.read(name).reshape(-1).split(_PART_ELEMENTS)
