"""Reader of Zarr arrays from untrusted sources: a chunk may unpack to far more than its array declares."""

import bz2
import gzip
import io
import itertools
import lzma
import math
import mmap
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from hinge.utils.errors import DataError
from hinge.utils.safe_hdf5 import MOST_UNPACKED, UNPACKED_ANYWAY, check_size, inside

# the codecs of zarr except pickle: those that compress, and those that hardly change the size
_PACKING = {"zstd", "blosc", "gzip", "zlib", "lz4", "bz2", "lzma", "sharding_indexed"}
_PLAIN = set(
    [
        "bytes",
        "transpose",
        "vlen-utf8",
        "vlen-bytes",
        "vlen-array",
        "shuffle",
        "delta",
        "fixedscaleoffset",
        "quantize",
        "bitround",
        "packbits",
        "astype",
        "categorize",
        "crc32",
        "crc32c",
        "adler32",
        "fletcher32",
        "jenkins_lookup3",
    ]
)
_CHUNK = re.compile(r"c|(c[/.])?\d+([/.]\d+)*")
_MOST_OF_DEFLATE, _ZSTD, _ZSTD_BLOCK = 1032, 0xFD2FB528, 128 << 10


def check_zarr(group: zarr.Group, path: Path) -> None:
    """Check that the arrays of a group declare no more than its folder can hold, and that their chunks agree.

    Reads the header of every chunk, and all of the chunks of gzip, zlib, bz2 and lzma, which do not store their
    unpacked size.

    Raises
    ------
    DataError
        As in `check_size` and `CheckedArray`.
    """
    arrays = {name: member for name, member in group.members(max_depth=None) if isinstance(member, zarr.Array)}
    unpacked = sum(array.nbytes for array in arrays.values())
    check_size(path, sum(file.stat().st_size for file in path.rglob("*") if file.is_file()), unpacked)
    for name, array in arrays.items():
        top = inside(path, name, path)
        checked = CheckedArray(array, top)
        for folder, inner, files in os.walk(top):
            if any(Path(folder, each).is_symlink() for each in inner):
                raise DataError(
                    f"{folder} holds links to other folders, and chunks must lie in the folder of their array"
                )
            for file in files:
                if _CHUNK.fullmatch(Path(folder, file).relative_to(top).as_posix()):
                    checked.check(Path(folder, file))


class CheckedArray:
    """A Zarr array in a folder whose chunks are checked before they are unpacked.

    Parameters
    ----------
    array
        The opened array.
    folder
        Its folder.

    Raises
    ------
    DataError
        Its chunks are larger than the array, or use two compressors or an unknown codec. When values are read: a chunk
        would unpack to far more than the array declares.
    """

    def __init__(self, array: zarr.Array, folder: Path) -> None:
        self.shape, self.dtype = array.shape, array.dtype
        self._array, self._folder, self._known = array, folder, set[tuple[int, ...]]()
        self._grid = array.shards or array.chunks
        described = array.metadata.to_dict()
        if "codecs" in described:
            self._codecs = [_codec(each) for each in described["codecs"]]
        else:
            self._codecs = [_codec(each) for each in (*(described["filters"] or ()), described["compressor"]) if each]
        size = array.dtype.itemsize * math.prod(self._grid)
        if size > max(UNPACKED_ANYWAY, array.nbytes):
            raise DataError(f"{folder} has chunks of {size:,} bytes, and the whole array has {array.nbytes:,}")
        # several chunks are unpacked at once; the size of a chunk of strings is not declared
        self._most, self._strings = max(UNPACKED_ANYWAY // 4, 2 * size), array.dtype.kind in "OT"
        _packing(self._codecs, folder)

    def __getitem__(self, index: tuple[int | slice, ...]) -> np.ndarray:
        """Values at an index of a number or slice for each axis."""
        ranges = [
            range(*each.indices(size)) if isinstance(each, slice) else range(each, each + 1)
            for each, size in zip(index, self.shape, strict=True)
        ]
        if all(ranges):
            spans = [range(r[0] // side, r[-1] // side + 1) for r, side in zip(ranges, self._grid, strict=True)]
            for place in itertools.product(*spans):
                if place not in self._known:
                    file = self._folder / self._array.metadata.encode_chunk_key(place)
                    if file.is_file():
                        self.check(file)
                    self._known.add(place)
        return self._array[index]

    def check(self, file: Path) -> None:
        """Refuse a file of chunks that would unpack to far more than the array declares."""
        stored = file.stat().st_size
        if not stored:
            return
        with open(file, "rb") as raw, mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as view:
            self._check_packed(view, self._codecs, file)

    def _check_packed(self, view: mmap.mmap | bytes, codecs: list[tuple[str, dict[str, Any]]], file: Path) -> None:
        name, settings = _packing(codecs, file)
        if name == "sharding_indexed":
            inner = [_codec(each) for each in settings["codecs"]]
            for start, length in _pieces_of_shard(view, math.prod(self._grid), settings):
                self._check_packed(view[start : start + length], inner, file)
            return
        most = max(self._most, MOST_UNPACKED * len(view)) if self._strings else self._most
        unpacked = _unpacked_size(view, name, settings, most)
        if unpacked > most:
            raise DataError(
                f"{file} has {len(view):,} bytes and would unpack to {unpacked:,} or more, where at most {most:,} are "
                "declared: it is damaged or malicious"
            )


def _codec(described: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return name and settings of a codec in format 2 or 3 of Zarr."""
    if "id" in described:
        return described["id"], described
    return described["name"].removeprefix("numcodecs."), described.get("configuration") or {}


def _packing(codecs: list[tuple[str, dict[str, Any]]], path: Path) -> tuple[str, dict[str, Any]]:
    """Return the one codec that compresses, with its settings; ("", {}) if there is none."""
    for name, _ in codecs:
        if name not in _PACKING | _PLAIN:
            raise DataError(f"{path} uses the codec {name!r}, which is not supported")
    found = [each for each in codecs if each[0] in _PACKING]
    if len(found) > 1:
        raise DataError(f"{path} is compressed twice, by {found[0][0]} and {found[1][0]}, which is not supported")
    if found and found[0][0] == "sharding_indexed":
        _packing([_codec(each) for each in found[0][1]["codecs"]], path)
    return found[0] if found else ("", {})


def _pieces_of_shard(view: mmap.mmap | bytes, values: int, settings: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """Yield the positions (start, length) of the chunks of a shard, from its index."""
    codecs = dict(_codec(each) for each in settings.get("index_codecs", ()))
    size = 16 * (values // math.prod(settings["chunk_shape"])) + 4 * ("crc32c" in codecs)
    if size > len(view):
        return
    index = view[:size] if settings.get("index_location") == "start" else view[len(view) - size :]
    kind = ">u8" if codecs.get("bytes", {}).get("endian") == "big" else "<u8"
    for start, length in np.frombuffer(index[: size // 16 * 16], kind).reshape(-1, 2).tolist():
        if start < len(view):
            yield start, length


def _unpacked_size(view: mmap.mmap | bytes, codec: str, settings: dict[str, Any], most: int) -> int:
    """Return the unpacked size of a chunk: from its header, or counted up to `most`."""
    if codec == "zstd":
        return _size_of_zstd(view)
    if codec == "blosc":
        return int.from_bytes(view[4:8], "little")
    if codec == "lz4":
        return int.from_bytes(view[:4], "little")
    if not codec or (codec in ("gzip", "zlib") and _MOST_OF_DEFLATE * len(view) <= most):
        return 0
    packed, count = io.BytesIO(view[:]), 0
    formats = {"format": settings.get("format", lzma.FORMAT_XZ), "filters": settings.get("filters")}
    openers: dict[str, Callable[[], Any]] = {
        "gzip": lambda: gzip.GzipFile(fileobj=packed),
        "zlib": lambda: io.BytesIO(zlib.decompressobj().decompress(view[:], most + 1)),
        "bz2": lambda: bz2.BZ2File(packed),
        "lzma": lambda: lzma.open(packed, **formats),  # noqa: SIM115
    }
    try:
        with openers[codec]() as file:
            while count <= most and (part := file.read(1 << 20)):
                count += len(part)
    except (OSError, EOFError, zlib.error, lzma.LZMAError):
        pass  # zarr will find it as well
    return count


def _size_of_zstd(view: mmap.mmap | bytes) -> int:
    """Return the unpacked size of all frames of a chunk: declared in the frame, or the largest size of its blocks."""
    at, total = 0, 0
    while at + 5 < len(view):
        magic, flags = int.from_bytes(view[at : at + 4], "little"), view[at + 4]
        if magic >> 4 == 0x184D2A5:  # a frame to be skipped
            at += 8 + int.from_bytes(view[at + 4 : at + 8], "little")
            continue
        if magic != _ZSTD:
            raise ValueError("a chunk is not compressed by zstd as declared")
        one_segment = flags >> 5 & 1
        at += 5 + (1 - one_segment) + (0, 1, 2, 4)[flags & 3]
        width = (one_segment, 2, 4, 8)[flags >> 6]
        stated = int.from_bytes(view[at : at + width], "little") + (256 if width == 2 else 0)
        at, last, room = at + width, 0, 0
        while not last and at + 3 <= len(view):
            head = int.from_bytes(view[at : at + 3], "little")
            last, kind, size = head & 1, head >> 1 & 3, head >> 3
            # stored, one repeated byte, or compressed
            room += size if kind < 2 else _ZSTD_BLOCK
            at += 3 + (1 if kind == 1 else size)
        at += 4 * (flags >> 2 & 1)
        total += stated if width else room
    return total
