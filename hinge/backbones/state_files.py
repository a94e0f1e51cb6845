"""Read and write the tensors of weight files one at a time.

A file is a MindSpore checkpoint (`.ckpt`), a torch state dict (`.pth`, `.pt`) or safetensors. Opening it lists names,
shapes and types; a tensor is read when it is needed. At most one tensor is held in memory in addition to the result.
"""

import argparse
import json
import math
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from hinge.backbones.mindspore import MindSporeCheckpoint, is_mindspore
from hinge.utils.errors import WeightsError, one_line
from hinge.utils.safe_torch import load_torch, plain_tensors
from hinge.utils.weights import check_weights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SAFETENSORS_NAMES = {dtype: name for name, dtype in _SAFETENSORS_DTYPES.items()}
# keys under which training scripts save the state dict
_WRAPPERS = ("state", "model", "state_dict", "module", "net", "model_state_dict", "model_state")
_PART_ELEMENTS = 2**20
_MAPPED_BYTES = 64 * 2**20


@dataclass(frozen=True)
class StateFile:
    """The tensors of one file or folder. Names, shapes and types are in memory; contents are read on demand.

    Attributes
    ----------
    path
        The file or folder.
    format
        `"mindspore"`, `"torch"` or `"safetensors"`.
    shapes, dtypes
        Shape and type of each tensor, by its name in the file.
    read
        Function that returns one tensor as stored. It may be a view of the mapped file: copy it to keep it.
    """

    path: Path
    format: Literal["mindspore", "torch", "safetensors"]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    read: Callable[[str], Tensor]


def open_state(path: str | Path) -> StateFile:
    """Open a file of weights or a folder of safetensors, and list its tensors.

    Raises
    ------
    WeightsError
        The file is missing, damaged or of another format.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise WeightsError(f"{path} holds no weights: it has no .safetensors file")
        return _open_safetensors(path, files)
    if not path.is_file():
        raise WeightsError(f"there is no file {path}")
    if path.suffix == ".safetensors":
        return _open_safetensors(path, [path])
    with open(path, "rb") as file:
        start = file.read(2)
    # a zip archive (torch since 1.6) or a pickle (before); any other file can only be a MindSpore checkpoint
    pickled = start[:1] == b"\x80" and start[1:] in (b"\x02", b"\x03", b"\x04", b"\x05")
    if (start == b"PK" or pickled) and not is_mindspore(path):
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
    repeated = None
    for file in files:
        try:
            with safe_open(file, "pt") as content:
                for name in content.keys():  # noqa: SIM118 (not a dictionary)
                    repeated = repeated or (name if name in home else None)
                    part = content.get_slice(name)
                    shapes[name], home[name] = tuple(part.get_shape()), file
                    dtypes[name] = _SAFETENSORS_DTYPES.get(part.get_dtype(), torch.uint8)
        except Exception as error:  # safetensors has an exception class of its own, and OSError
            raise WeightsError(f"{file} is not a complete safetensors file: {one_line(error)}") from error
        if repeated is not None:
            raise WeightsError(f"{path} holds {repeated} in several files; keep the files of one model")

    opened = _Mapping(lambda file: safe_open(file, "pt"))

    def read(name: str) -> Tensor:
        n_bytes = math.prod(shapes[name]) * dtypes[name].itemsize
        return opened(home[name], n_bytes).get_tensor(name)

    return StateFile(path, "safetensors", shapes, dtypes, read)


def _open_torch(path: Path) -> StateFile:
    def load(mapped: bool) -> dict[str, Tensor]:
        # training scripts store their arguments as a Namespace, which holds no code
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = load_torch(path, mapped)
        for _ in range(3):
            for key in _WRAPPERS:
                if isinstance(content, dict) and isinstance(content.get(key), dict):
                    content = content[key]
        if not isinstance(content, dict):
            raise ValueError("it holds no dictionary of tensors")
        tensors = plain_tensors(content)
        if not tensors:
            raise ValueError(f"it holds no tensors, but {', '.join(map(repr, list(content)[:5])) or 'nothing'}")
        return tensors

    with open(path, "rb") as file:
        mapped = file.read(2) == b"PK"
    try:
        tensors = load(mapped)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} is not a readable torch state dict: it holds objects other than tensors, which are not loaded, or "
            "is damaged; save its state dict alone"
        ) from error
    except Exception as error:  # torch raises many kinds of exception for a damaged archive
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
    """A mapped file that is reopened after every 64 MB read: pages of an open mapping count as memory in use."""

    def __init__(self, open_file: Callable[[Path], Any]):
        self._open, self._content, self._n_bytes = open_file, None, 0
        self._path: Path | None = None

    def __call__(self, path: Path, n_bytes: int) -> Any:
        if path != self._path or self._n_bytes > _MAPPED_BYTES:
            self._path, self._content, self._n_bytes = path, None, 0
            self._content = self._open(path)
        self._n_bytes += n_bytes
        return self._content


def fill_parameters(model, state: StateFile, sources: dict[str, tuple[str, ...]], dtype: torch.dtype | None) -> None:
    """Load the weights of a model on the meta device, one tensor at a time.

    Parameters
    ----------
    model
        An `ExpressionBackbone`, its parameters without storage.
    state, sources
        The file, and for each parameter the tensors of the file that form it; without any it becomes zeros.
    dtype
        Type of the parameters; None: the stored type.

    Raises
    ------
    WeightsError
        Names or shapes do not fit the model.
    """
    parameters = dict(model.named_parameters())
    wrong = sorted(parameters.keys() ^ sources.keys())
    if wrong:
        raise WeightsError(f"the weights in {state.path} do not fit its config.json: {wrong[0]}")
    # the type that holds all of them, where norms are stored in float32 beside products in half precision
    stored = reduce(torch.promote_types, {state.dtypes[each] for theirs in sources.values() for each in theirs})
    check_shapes(parameters, state, sources)
    for name, parameter in tqdm(parameters.items(), desc=state.path.name, delay=2, disable=None):
        own = torch.zeros(parameter.shape, dtype=dtype or stored)
        start = 0
        for source in sources[name]:
            part = state.read(source)
            own[start : start + len(part)].copy_(part) if own.ndim else own.copy_(part)
            start += len(part)
        check_weights({" + ".join(sources[name]) or name: own}, state.path)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, torch.nn.Parameter(own))


def check_shapes(parameters: dict[str, Tensor], state: StateFile, sources: dict[str, tuple[str, ...]]) -> None:
    """Check that every tensor of the file has the shape and type that the model needs.

    Raises
    ------
    WeightsError
        A tensor has another shape or type.
    """
    for name, theirs in sources.items():
        for source in theirs:
            shape = parameters[name].shape
            expected = (shape[0] // len(theirs), *shape[1:])
            if state.shapes[source] != expected:
                raise WeightsError(
                    f"{state.path}: {source} has the shape {state.shapes[source]}, and a model of this size needs "
                    f"{expected}"
                )
            if not state.dtypes[source].is_floating_point:
                raise WeightsError(f"{state.path}: {source} holds no floating-point numbers")


def stream_safetensors(
    state: StateFile,
    sources: dict[str, tuple[str, ...]],
    shapes: dict[str, tuple[int, ...]],
    out: Path,
    dtype: torch.dtype,
) -> None:
    """Write tensors to one safetensors file in parts of 4 MB.

    Parameters
    ----------
    state, sources
        The file that is read, and for each tensor the names in it that are concatenated along the first axis;
        without any it becomes zeros.
    shapes
        Shape of each tensor.
    out
        The file to write.
    dtype
        Type of all tensors.

    Raises
    ------
    WeightsError
        A weight is not finite, or would become infinite.
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
                    check_weights({source: part}, state.path)
                    converted = part.to(dtype)
                    if converted.isinf().any():
                        raise WeightsError(
                            f"{state.path}: {source} has weights beyond the range of {str(dtype)[6:]}; "
                            "convert to fp32 or bf16"
                        )
                    bar.update(file.write(memoryview(converted.contiguous().view(torch.uint8).numpy())))


def _parts(state: StateFile, name: str) -> Iterator[Tensor]:
    """Yield the numbers of one tensor in flat parts of at most 4 MB in float32."""
    yield from state.read(name).reshape(-1).split(_PART_ELEMENTS)
