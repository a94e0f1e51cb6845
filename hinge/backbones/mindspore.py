"""Read MindSpore checkpoints (`.ckpt`) without MindSpore.

A checkpoint is a sequence of protobuf messages, which together form one message::

    Checkpoint  { repeated Value value = 1 }
    Value       { string tag = 1; TensorProto tensor = 2 }
    TensorProto { repeated int64 dims = 1; string tensor_type = 2; bytes tensor_content = 3 }

and may end with the seven letters `crc_num` and ten big-endian bytes, the CRC-32 of all bytes before.
A tensor above 512 MB is split into several Values of the same tag, each with the dims of the whole tensor.

The index is read through a memory map, which touches a few bytes per tensor. The contents are read from the file
on request, because protobuf does not align them and they cannot be used in place.
"""

import math
import mmap
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path

import torch
from tqdm import tqdm

from hinge.utils.errors import WeightsError

_DTYPES = {
    "Float16": torch.float16,
    "BFloat16": torch.bfloat16,
    "Float32": torch.float32,
    "Float64": torch.float64,
    "Int8": torch.int8,
    "Int16": torch.int16,
    "Int32": torch.int32,
    "Int64": torch.int64,
    "UInt8": torch.uint8,
    "UInt16": torch.uint16,
    "UInt32": torch.uint32,
    "UInt64": torch.uint64,
    "Bool": torch.bool,
}
# strings and generator states that MindSpore stores beside the parameters
_NOT_TENSORS = {"str", "random_op"}

# tensors that MindSpore's optimizers, loss scaling and checkpoint callback add to the weights
_OPTIMIZER = re.compile(
    r"(optimizer\.)?("
    r"(moment1|moment2|moments|accum|vhat|adam_m|adam_v)\..+"
    r"|beta1_power|beta2_power|learning_rate|global_step|epoch_num|step_num|loss_scale|scale_sense"
    r"|current_iterator_step|last_overflow_iterator_step)",
    re.DOTALL,
)

_TRAILER = b"crc_num"
_TRAILER_BYTES = len(_TRAILER) + 10
_CHUNK_BYTES = 4 * 2**20
_MAX_DIMS = 32
_MAX_TEXT_BYTES = 4096


@dataclass
class _Entry:
    """One tensor, and the start and stop of its pieces in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: list[tuple[int, int]] = field(default_factory=list)
    stored: int = 0

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _Wire:
    """Parse protobuf's wire format; a violation raises a `WeightsError` with the byte offset."""

    def __init__(self, path: Path, view: mmap.mmap):
        self.path, self.view = path, view
        self.has_trailer = len(view) >= _TRAILER_BYTES and view[-_TRAILER_BYTES:-10] == _TRAILER
        self.end = len(view) - (_TRAILER_BYTES if self.has_trailer else 0)

    def damaged(self, offset: int, why: str) -> WeightsError:
        return WeightsError(f"{self.path} is not a complete MindSpore checkpoint: at byte {offset:,} {why}")

    def varint(self, at: int, end: int) -> tuple[int, int]:
        """Return the unsigned number at `at` and the offset after it."""
        value = 0
        for k in range(10):
            if at + k >= end:
                raise self.damaged(at, "a number is cut off")
            byte = self.view[at + k]
            value |= (byte & 0x7F) << (7 * k)
            if byte < 0x80:
                return value & (2**64 - 1), at + k + 1
        raise self.damaged(at, "a number has more than ten bytes")

    def fields(self, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield each field from `at` to `end` as (number, wire type, start and stop of its payload)."""
        while at < end:
            key, start = self.varint(at, end)
            number, kind = key >> 3, key & 7
            if kind == 0:
                stop = self.varint(start, end)[1]
            elif kind == 1:
                stop = start + 8
            elif kind == 2:
                length, start = self.varint(start, end)
                stop = start + length
            elif kind == 5:
                stop = start + 4
            else:
                raise self.damaged(at, f"a field has the unknown wire type {kind}")
            if number == 0:
                raise self.damaged(at, "a field has the number 0")
            if stop > end:
                raise self.damaged(at, f"a field of {stop - start:,} bytes does not fit before byte {end:,}")
            yield number, kind, start, stop
            at = stop

    def text(self, start: int, stop: int, what: str) -> str:
        if not 0 < stop - start <= _MAX_TEXT_BYTES:
            raise self.damaged(start, f"{what} has {stop - start:,} bytes")
        try:
            return self.view[start:stop].decode()
        except UnicodeDecodeError:
            raise self.damaged(start, f"{what} is not UTF-8 text") from None

    def dims(self, kind: int, start: int, stop: int) -> Iterator[int]:
        """Yield one dim (wire type 0) or a packed sequence of dims (2)."""
        if kind not in (0, 2):
            raise self.damaged(start, "the dims of a tensor are not whole numbers")
        while start < stop:
            at = start
            dim, start = self.varint(at, stop)
            if dim >= 2**63:
                raise self.damaged(at, f"a tensor has the negative dim {dim - 2**64}")
            yield dim

    def values(self) -> Iterator[tuple[int, str, str, list[int], tuple[int, int]]]:
        """Yield each Value as (offset, tag, tensor type, dims, payload)."""
        for number, kind, start, stop in self.fields(0, self.end):
            if (number, kind) != (1, 2):
                raise self.damaged(start, f"there is field {number} with wire type {kind} instead of a parameter")
            tag = tensor = None
            for number, kind, first, last in self.fields(start, stop):
                if (number, kind) == (1, 2):
                    tag = self.text(first, last, "a parameter's name")
                elif (number, kind) == (2, 2):
                    tensor = (first, last)
                elif number in (1, 2):
                    raise self.damaged(first, f"field {number} of a parameter has the wire type {kind}")
            if tag is None or tensor is None:
                raise self.damaged(start, f"a parameter has no {'name' if tag is None else 'tensor'}")
            tensor_type = content = None
            dims: list[int] = []
            for number, kind, first, last in self.fields(*tensor):
                if number == 1:
                    for dim in self.dims(kind, first, last):
                        dims.append(dim)
                        if len(dims) > _MAX_DIMS:
                            raise self.damaged(first, f"{_short(tag)} has more than {_MAX_DIMS} dims")
                elif (number, kind) == (2, 2):
                    tensor_type = self.text(first, last, "a tensor's type")
                elif (number, kind) == (3, 2):
                    content = (first, last)
                elif number in (2, 3):
                    raise self.damaged(first, f"field {number} of a tensor has the wire type {kind}")
            if tensor_type is None:
                raise self.damaged(tensor[0], f"{_short(tag)} has no tensor type")
            if tensor_type not in _DTYPES and tensor_type not in _NOT_TENSORS:
                raise self.damaged(tensor[0], f"{_short(tag)} has the unknown type {_short(tensor_type)}")
            yield start, tag, tensor_type, dims, content or (tensor[1], tensor[1])

    def index(self, include_optimizer: bool) -> dict[str, _Entry]:
        """Return the pieces of each tensor; a name may be repeated only as the next piece of an incomplete tensor."""
        entries: dict[str, _Entry] = {}
        for offset, tag, tensor_type, dims, (start, stop) in self.values():
            if tensor_type in _NOT_TENSORS or (not include_optimizer and _OPTIMIZER.fullmatch(tag)):
                continue
            dtype, name = _DTYPES[tensor_type], _short(tag)
            # torch counts the strides of empty tensors too
            if math.prod(max(dim, 1) for dim in dims) * dtype.itemsize >= 2**63:
                raise self.damaged(offset, f"{name} has impossible dims {dims}")
            if (stop - start) % dtype.itemsize:
                raise self.damaged(start, f"{name} has {stop - start:,} bytes, not whole elements")
            # MindSpore 1 writes the dims of a scalar as [0], MindSpore 2 as none
            shape = () if dims == [0] and stop > start else tuple(dims)
            entry = entries.setdefault(tag, _Entry(dtype, shape))
            if (entry.dtype, entry.shape) != (dtype, shape):
                raise self.damaged(offset, f"a further piece of {name} has another type or other dims")
            if entry.pieces and entry.stored == entry.n_bytes:
                raise self.damaged(offset, f"{name} occurs a second time")
            entry.pieces.append((start, stop))
            entry.stored += stop - start
            if entry.stored > entry.n_bytes:
                raise self.damaged(
                    stop, f"{name} of dims {dims} takes {entry.n_bytes:,} bytes but has {entry.stored:,}"
                )
        for tag, entry in entries.items():
            if entry.stored < entry.n_bytes:
                raise self.damaged(
                    entry.pieces[-1][1],
                    f"{_short(tag)} of dims {list(entry.shape)} ends after {entry.stored:,} of {entry.n_bytes:,} bytes",
                )
        return entries


def is_mindspore(path: str | Path) -> bool:
    """Return whether a file starts like a MindSpore checkpoint; only its first few bytes are read."""
    try:
        with _map(Path(path)) as view:
            return next(_Wire(Path(path), view).values(), None) is not None
    except WeightsError:
        return False


class MindSporeCheckpoint:
    """The index of a MindSpore checkpoint; tensors are read one by one on request.

    Parameters
    ----------
    path
        The `.ckpt` file.
    include_optimizer
        Also list the tensors of the optimizer: moments, beta powers, learning rate, step counters.
        Strings and generator states are never listed.

    Raises
    ------
    WeightsError
        The file is missing, truncated, damaged (its CRC, if it has one, does not match) or in another format; the
        message gives the byte offset.
    """

    def __init__(self, path: str | Path, include_optimizer: bool = False):
        self.path = Path(path)
        with _map(self.path) as view:
            wire = _Wire(self.path, view)
            self._entries = wire.index(include_optimizer)
            end, trailer = wire.end, view[wire.end + len(_TRAILER) :] if wire.has_trailer else None
        if not self._entries:
            raise WeightsError(f"{self.path} holds no weights in its {end:,} bytes")
        if trailer is not None:
            self._check_crc(end, int.from_bytes(trailer, "big"))

    def _check_crc(self, end: int, expected: int) -> None:
        crc = 0
        with (
            open(self.path, "rb") as file,
            tqdm(total=end, desc="checking the CRC", unit="B", unit_scale=True, disable=None) as bar,
        ):
            for chunk in _chunks(self.path, file, 0, end):
                crc = zlib.crc32(chunk, crc)
                bar.update(len(chunk))
        if crc != expected:
            raise WeightsError(
                f"{self.path} is damaged: the CRC of its first {end:,} bytes is {crc}, and byte {end:,} stores "
                f"{expected}; download it again"
            )

    def keys(self) -> list[str]:
        """Return the names of the tensors in the order of the file."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the stored type of a tensor."""
        return self._entry(name).dtype

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor into new memory; its pieces are concatenated."""
        entry = self._entry(name)
        buffer = torch.empty(entry.stored, dtype=torch.uint8)
        view, at = memoryview(buffer.numpy()), 0
        with open(self.path, "rb") as file:
            for start, stop in entry.pieces:
                file.seek(start)
                if file.readinto(view[at : at + stop - start]) != stop - start:
                    raise WeightsError(f"{self.path} was cut off before byte {stop:,} after it was opened")
                at += stop - start
        return _as_dtype(buffer, entry.dtype).reshape(entry.shape)

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise WeightsError(
                f"{self.path} has no tensor {_short(name)}; it has {len(self._entries):,}, the first of them "
                + ", ".join(_short(key) for key in list(self._entries)[:3])
            )
        return self._entries[name]


def read_mindspore(path: str | Path, include_optimizer: bool = False) -> dict[str, torch.Tensor]:
    """Read all tensors of a MindSpore checkpoint.

    Parameters
    ----------
    path
        The `.ckpt` file.
    include_optimizer
        Also read the tensors of the optimizer: moments, beta powers, learning rate, step counters.

    Returns
    -------
    dict
        Tensors by MindSpore's own names (LayerNorm's are `gamma` and `beta`), types as stored.

    Raises
    ------
    WeightsError
        As `MindSporeCheckpoint`.
    """
    checkpoint = MindSporeCheckpoint(path, include_optimizer)
    names = checkpoint.keys()
    return {name: checkpoint.tensor(name) for name in names}


def _map(path: Path) -> mmap.mmap:
    """Map a file read-only; raise a `WeightsError` if it is missing, unreadable or empty."""
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise WeightsError(f"there is no file {path}") from None
    except ValueError:
        raise WeightsError(f"{path} is not a MindSpore checkpoint: it ends at byte 0") from None
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or error}") from None


def _chunks(path: Path, file: BufferedReader, start: int, stop: int) -> Iterator[bytearray]:
    """Yield the bytes from `start` to `stop` in parts of at most 4 MB."""
    file.seek(start)
    while start < stop:
        chunk = bytearray(min(_CHUNK_BYTES, stop - start))
        if file.readinto(chunk) != len(chunk):
            raise WeightsError(f"{path} was cut off before byte {start + len(chunk):,} after it was opened")
        yield chunk
        start += len(chunk)


def _as_dtype(buffer: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # MindSpore stores True as any byte above 0, torch as 1 only
    return buffer != 0 if dtype == torch.bool else buffer.view(dtype)


def _short(name: str) -> str:
    return repr(name) if len(name) <= 80 else repr(name[:77]) + "..."
