"""Files of strangers, looked through before a library is let loose on them.

The HDF5 library follows what a file says: into other files, into sizes that no memory holds, and where its heaps of
strings are damaged, round in circles or out of bounds. Zarr and gzip announce or unpack to any size as well. What can
be seen beforehand is refused here, at little cost: no array is read.
"""

import bz2
import gzip
import io
import itertools
import lzma
import math
import mmap
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import scipy.sparse
import zarr
from anndata import AnnData

from hinge.errors import DataError, HingeError, one_line

# zlib makes at most a thousand zeros of one byte, counts of genes seldom compress twentyfold
MOST_UNPACKED = 200
UNPACKED_ANYWAY = 256 << 20

_HEAP, _HEAP_HEADER, _OBJECT = b"GCOL\x01\0\0\0", 16, struct.Struct("<HHIQ")
# where a string lies: its length (4 bytes), its heap (8) and the number in it (4)
_REFERENCE, _LONGEST_ANYWAY, _MOST_NAMES = 16, 128 << 20, 1000


# what zarr has at hand: codecs that pack, and others that leave the size about as it is. Not among them: pickle
_PACKING = {"zstd", "blosc", "gzip", "zlib", "lz4", "bz2", "lzma", "sharding_indexed"}
_PLAIN = {
    *(
        "bytes",
        "transpose",
        "vlen-utf8",
        "vlen-bytes",
        "vlen-array",
        "shuffle",
        "delta",
        "fixedscaleoffset",
        "quantize",
    ),
    *("bitround", "packbits", "astype", "categorize", "crc32", "crc32c", "adler32", "fletcher32", "jenkins_lookup3"),
}
_CHUNK = re.compile(r"c|(c[/.])?\d+([/.]\d+)*")
_VLEN = {bytes([version << 4 | 9]) for version in range(1, 6)}  # HDF5's types of a length of their own
_MOST_OF_DEFLATE, _ZSTD, _ZSTD_BLOCK = 1032, 0xFD2FB528, 128 << 10


def check_size(path: Path, stored: int, unpacked: int) -> None:
    """Refuse what would unpack to far more than it is.

    Parameters
    ----------
    path
        For the error.
    stored, unpacked
        Bytes on disk and in memory.
    """
    if unpacked > max(UNPACKED_ANYWAY, MOST_UNPACKED * stored):
        raise DataError(
            f"{path} has {stored:,} bytes and would take {unpacked:,} in memory: it is damaged, or made to fill it"
        )


def check_gzip(path: Path) -> None:
    """Make sure that a gzip file holds text, and no more of it than a table of its size can.

    Raises
    ------
    DataError
        As `check_size`, or it holds bytes of 0; what else is wrong with it is left to who reads it.
    """
    stored, unpacked = path.stat().st_size, 0
    try:
        with gzip.open(path) as file:
            while part := file.read(1 << 20):
                unpacked += len(part)
                # numbers of one digit take eight bytes in memory
                check_size(path, stored, 4 * unpacked)
                if b"\0" in part:  # scipy's reader of matrices ends the process over one
                    raise DataError(f"{path} is damaged: it is no text")
    except (OSError, EOFError, zlib.error):
        return


def check_zarr(group: zarr.Group, path: Path) -> None:
    """Make sure that the arrays of a group announce no more than its folder can hold, and their chunks keep to it.

    Every file of the folder is opened; read are the heads of chunks, and all of those packed by gzip, zlib, bz2 or
    lzma, which do not tell their size.

    Raises
    ------
    DataError
        As `check_size` and `CheckedArray`.
    """
    arrays = {name: member for name, member in group.members(max_depth=None) if isinstance(member, zarr.Array)}
    unpacked = sum(array.nbytes for array in arrays.values())
    check_size(path, sum(file.stat().st_size for file in path.rglob("*") if file.is_file()), unpacked)
    for name, array in arrays.items():
        top = inside(path, name, path)
        checked = CheckedArray(array, top)
        for folder, inner, files in os.walk(top):
            if any(Path(folder, each).is_symlink() for each in inner):
                raise DataError(f"{folder} holds links to other folders, and chunks must lie in their array's own")
            for file in files:
                if _CHUNK.fullmatch(Path(folder, file).relative_to(top).as_posix()):
                    checked.check(Path(folder, file))


class CheckedArray:
    """A Zarr array in a folder whose chunks are looked at before they are unpacked.

    Parameters
    ----------
    array
        As opened.
    folder
        Where it lies.

    Raises
    ------
    DataError
        Its chunks are larger than itself and than memory, or packed twice or in a way that is not known here; later,
        as `check_size`, where a chunk would unpack to far more than the array announces.
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
            raise DataError(f"{folder} has chunks of {size:,} bytes, and would itself have {array.nbytes:,}")
        # several chunks are unpacked at once; what a chunk of strings takes is not announced
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
        """Refuse a file of chunks that would unpack to far more than the array announces."""
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
                "announced: it is damaged, or made to fill the memory"
            )


def inside(folder: Path, name: str, named_in: Path) -> Path:
    """The path of a file that another file names, which must lie in a folder.

    Raises
    ------
    DataError
        It leads out of the folder.
    """
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{named_in} names {name!r}, which leads out of {folder}")
    return path


def check_hdf5(path: str | Path, what: str = "a readable HDF5 file") -> None:
    """Make sure that a file is HDF5, keeps to itself, and announces no more than it can hold.

    Reads the file's structure and where its strings lie, and none of its arrays of numbers.

    Raises
    ------
    DataError
        It is missing, damaged, leads into other files, or would unpack to far more than its own size.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    try:
        if not path.stat().st_size:
            raise ValueError("it is empty")
        with open(path, "rb") as raw, mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as view:
            heaps = _check_heaps(view)
            with h5py.File(path, "r") as file:
                arrays, names = _check_structure(file, path, view)
            _check_attributes(view, names, heaps + arrays)
    except HingeError:
        raise
    except Exception as error:  # a damaged HDF5 file ends in almost any exception
        raise DataError(f"{path} is not {what}: {one_line(error)}") from error


def read_h5ad(path: str | Path) -> AnnData:
    """Read a file of AnnData after `check_hdf5`.

    Raises
    ------
    DataError
        As `check_hdf5`, or it holds no AnnData.
    """
    check_hdf5(path, "a readable h5ad file")
    try:
        content = anndata.read_h5ad(path)
        check_sparse(content)
    except Exception as error:  # a damaged HDF5 file ends in almost any exception
        raise DataError(f"{path} is not a readable h5ad file: {one_line(error)}") from error
    return content


def check_sparse(content: AnnData) -> None:
    """Make sure that the indices of sparse matrices lie within them: scipy believes them, and reads beyond its memory.

    Raises
    ------
    ValueError
        They do not.
    """
    mappings = (content.layers, content.obsm, content.varm, content.obsp, content.varp)
    for matrix in (content.X, *(value for mapping in mappings for value in mapping.values())):
        if scipy.sparse.issparse(matrix) and matrix.format in ("csr", "csc"):
            matrix.check_format(full_check=True)


def _codec(described: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and settings of a codec as format 2 or 3 of Zarr writes it down."""
    if "id" in described:
        return described["id"], described
    return described["name"].removeprefix("numcodecs."), described.get("configuration") or {}


def _packing(codecs: list[tuple[str, dict[str, Any]]], path: Path) -> tuple[str, dict[str, Any]]:
    """The one codec of several that packs, with its settings; ("", {}) if none does."""
    for name, _ in codecs:
        if name not in _PACKING | _PLAIN:
            raise DataError(f"{path} is packed by the codec {name!r}, which is not read here")
    found = [each for each in codecs if each[0] in _PACKING]
    if len(found) > 1:
        raise DataError(f"{path} is packed twice, by {found[0][0]} and {found[1][0]}: it is made to fill the memory")
    if found and found[0][0] == "sharding_indexed":
        _packing([_codec(each) for each in found[0][1]["codecs"]], path)
    return found[0] if found else ("", {})


def _pieces_of_shard(view: mmap.mmap | bytes, values: int, settings: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """Where in a shard of so many values its chunks lie (start, length), as its index tells."""
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
    """Bytes that a chunk unpacks to: told by it, or counted until they are more than `most`."""
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
    """Bytes in all frames of a chunk: as each tells, which the library holds it to, or as its blocks have room for."""
    at, total = 0, 0
    while at + 5 < len(view):
        magic, flags = int.from_bytes(view[at : at + 4], "little"), view[at + 4]
        if magic >> 4 == 0x184D2A5:  # a frame to be skipped
            at += 8 + int.from_bytes(view[at + 4 : at + 8], "little")
            continue
        if magic != _ZSTD:
            raise ValueError("a chunk is not packed by zstd as it should be")
        one_segment = flags >> 5 & 1
        at += 5 + (1 - one_segment) + (0, 1, 2, 4)[flags & 3]
        width = (one_segment, 2, 4, 8)[flags >> 6]
        told = int.from_bytes(view[at : at + width], "little") + (256 if width == 2 else 0)
        at, last, room = at + width, 0, 0
        while not last and at + 3 <= len(view):
            head = int.from_bytes(view[at : at + 3], "little")
            last, kind, size = head & 1, head >> 1 & 3, head >> 3
            # kept as it is, one byte repeated, or packed
            room += size if kind < 2 else _ZSTD_BLOCK
            at += 3 + (1 if kind == 1 else size)
        at += 4 * (flags >> 2 & 1)
        total += told if width else room
    return total


def _check_heaps(view: mmap.mmap) -> list[tuple[int, int]]:
    """Walk the global heaps, where strings of any length lie, as the library will; it does not stop at a size of 0.

    Returns where they lie (start, end).
    """
    heaps = []
    at = view.find(_HEAP)
    while at >= 0:
        head = view[at : at + _HEAP_HEADER]
        end = at + struct.unpack("<Q", head[8:])[0] if len(head) == _HEAP_HEADER else len(view) + 1
        if end > len(view):
            raise ValueError("a heap of strings is cut off")
        heaps.append((at, end))
        place = at + _HEAP_HEADER
        while place + _OBJECT.size <= end:
            index, _, _, size = _OBJECT.unpack(view[place : place + _OBJECT.size])
            # object 0 is what is free, its size that of all that follows
            place += size if index == 0 else _OBJECT.size + -(-size // 8) * 8
            if place > end or (index == 0 and size < _OBJECT.size):
                raise ValueError("a heap of strings is damaged")
        at = view.find(_HEAP, at + 1)
    return heaps


def _check_structure(file: h5py.File, path: Path, view: mmap.mmap) -> tuple[list[tuple[int, int]], set[bytes]]:
    """Look at every object, but not into numbers.

    Returns where in the file (start, end) arrays lie, and the names of attributes that hold strings.
    """
    stored, unpacked, arrays, names = len(view), 0, [], set[bytes]()

    def check_attributes(thing: h5py.Group | h5py.Dataset, name: str) -> None:
        for number in range(h5py.h5a.get_num_attrs(thing.id)):
            attribute = h5py.h5a.open(thing.id, index=number)
            _check_type(attribute.get_type(), name, path)
            if _references(attribute.get_type())[0]:
                names.add(attribute.name)

    links: dict[str, object] = {}
    file.visititems_links(links.__setitem__)  # an exception in there would be lost on its way through the library
    check_attributes(file, "/")
    for name, link in links.items():
        if isinstance(link, h5py.ExternalLink):
            raise DataError(f"{path}: {name!r} must be a dataset in the file itself, not a link into another")
        if not isinstance(link, h5py.HardLink):
            continue
        thing = file[name]
        check_attributes(thing, name)
        if not isinstance(thing, h5py.Dataset):
            continue
        if thing.external or thing.is_virtual:
            raise DataError(f"{path}: {name!r} must be a dataset in the file itself, and its values lie in others")
        kind = thing.id.get_type()
        _check_type(kind, name, path)
        unpacked += thing.size * kind.get_size() if thing.shape is not None else 0
        check_size(path, stored, unpacked)
        places, width = _references(kind)
        for start, end, mask in _pieces(thing, width):
            if end > stored:
                raise ValueError(f"{name!r} is cut off")
            arrays.append((start, end))
            if places:
                _check_lengths(_unfiltered(thing, view[start:end], mask, width), places, width, stored)
    return arrays, names


def _references(kind: h5py.h5t.TypeID) -> tuple[list[int], int]:
    """Where in an element as it is stored strings of any length are referred to, and the element's size there."""
    if kind.get_class() == h5py.h5t.STRING and kind.is_variable_str():
        return [0], _REFERENCE
    places, size = list[int](), kind.get_size()
    if isinstance(kind, h5py.h5t.TypeCompoundID):
        for number in range(kind.get_nmembers()):
            member = kind.get_member_type(number)
            inner, width = _references(member)
            # as it is told here, a string is a pointer
            places += [kind.get_member_offset(number) + size - kind.get_size() + place for place in inner]
            size += width - member.get_size()
    return places, size


def _check_lengths(content: bytes, places: list[int], width: int, stored: int) -> None:
    """The library asks for the memory that a string's length tells before it looks how long the string is."""
    elements = np.frombuffer(content[: len(content) // width * width], np.uint8).reshape(-1, width)
    for place in places:
        longest = elements[:, place : place + 4].copy().view("<u4").max(initial=0)
        if longest > max(stored, _LONGEST_ANYWAY):
            raise ValueError(f"a string of {longest:,} bytes is announced, and the file has {stored:,}")


def _pieces(dataset: h5py.Dataset, width: int) -> list[tuple[int, int, int]]:
    """Where in the file (start, end) the parts of a dataset lie, each with the mask of the filters it was spared."""
    if dataset.chunks is None:
        start = dataset.id.get_offset()  # None where nothing was written, or all of it lies with the description
        size = min(dataset.id.get_storage_size(), (dataset.size or 0) * width)
        return [] if start is None else [(start, start + size, 0)]
    found: list[tuple[int, int, int]] = []
    most = math.prod(-(-size // chunk) for size, chunk in zip(dataset.shape, dataset.chunks, strict=True))

    def add(chunk: h5py.h5d.StoreInfo) -> bool | None:
        found.append((chunk.byte_offset, chunk.byte_offset + chunk.size, chunk.filter_mask))
        return True if len(found) > most else None  # a damaged index may lead round in circles; anything but None ends

    dataset.id.chunk_iter(add)
    if len(found) > most:
        raise ValueError(f"the index of {dataset.name!r} is damaged")
    return found


def _unfiltered(dataset: h5py.Dataset, piece: bytes, mask: int, width: int) -> bytes:
    """Elements of a dataset as before its filters; empty where these cannot be undone here."""
    plan = dataset.id.get_create_plist()
    for number in reversed(range(plan.get_nfilters())):
        code = plan.get_filter(number)[0]
        if mask >> number & 1:
            continue
        if code == h5py.h5z.FILTER_DEFLATE:
            piece = zlib.decompressobj().decompress(piece, width * math.prod(dataset.chunks))
        elif code == h5py.h5z.FILTER_SHUFFLE and len(piece) % width == 0:
            piece = np.frombuffer(piece, np.uint8).reshape(width, -1).T.tobytes()
        else:
            return b""
    return piece


def _check_attributes(view: mmap.mmap, names: set[bytes], known: list[tuple[int, int]]) -> None:
    """Check the lengths of attributes' strings, wherever in the file the library put them.

    There, an attribute is its version, flags, the sizes of its name, type and space, and these three with its values.
    Arrays and heaps (`known`) are left out: nothing in them can be taken for one, and what is left is little.
    """
    if len(names) > _MOST_NAMES:
        raise ValueError(f"it has attributes of {len(names):,} names, and no slide has so many")
    for start, end in _between(known, len(view)):
        for name in names:
            at = view.find(name + b"\0", start, end)
            while at >= 0:
                for version, before, grain in ((1, 8, 8), (2, 8, 1), (3, 9, 1)):
                    if at >= before and view[at - before] == version:
                        _check_attribute(view, at - before, at, grain, len(name) + 1)
                at = view.find(name + b"\0", at + 1, end)


def _check_attribute(view: mmap.mmap, head: int, at: int, grain: int, length: int) -> None:
    """Check strings of an attribute whose name of `length` bytes is at `at`, if it is one."""
    sizes = struct.unpack("<3H", view[head + 2 : head + 8])
    kind = at + -(-length // grain) * grain
    space = kind + -(-sizes[1] // grain) * grain
    if sizes[0] != length or view[kind : kind + 1][:1] not in _VLEN or sizes[2] < 4 or space + 4 > len(view):
        return
    rank, dimensions = view[space + 1], space + (8 if view[space] == 1 else 4)
    shape = struct.unpack_from(f"<{rank}Q", view[dimensions : dimensions + 8 * rank].ljust(8 * rank, b"\0"))
    values = space + -(-sizes[2] // grain) * grain
    _check_lengths(view[values : values + _REFERENCE * math.prod(shape)], [0], _REFERENCE, len(view))


def _between(spans: list[tuple[int, int]], end: int) -> Iterator[tuple[int, int]]:
    """What spans leave of a file, where an attribute has room."""
    at = 0
    for start, stop in [*sorted(spans), (end, end)]:
        if start - at >= _REFERENCE:
            yield at, min(start, end)
        at = max(at, stop)


def _check_type(kind: h5py.h5t.TypeID, name: str, path: Path) -> None:
    """Strings may be of any length, other sequences not: the formats have none, and damaged types look like them."""
    if isinstance(kind, h5py.h5t.TypeCompoundID):
        for number in range(kind.get_nmembers()):
            _check_type(kind.get_member_type(number), name, path)
    elif kind.get_class() == h5py.h5t.VLEN:
        raise DataError(f"{path}: {name!r} holds sequences of various lengths, which no slide has")
