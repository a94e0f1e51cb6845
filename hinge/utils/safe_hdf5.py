"""Readers of HDF5 and gzip files from untrusted sources.

The HDF5 library trusts a file: it follows links to other files, allocates any declared size, and with damaged heaps of
strings it loops forever or reads out of bounds. A gzip file, like Zarr (`hinge.utils.safe_zarr`), may unpack to any
size. The checks here refuse such files before the library opens them. They read no array of numbers.
"""

import gzip
import math
import mmap
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import anndata
import h5py
import numpy as np
import scipy.sparse
from anndata import AnnData

from hinge.utils import checksums
from hinge.utils.errors import DataError, HingeError, one_line

# zlib compresses at most a thousandfold, counts of genes seldom more than twentyfold
MOST_UNPACKED = 200
UNPACKED_ANYWAY = 256 << 20

_HEAP, _HEAP_HEADER, _OBJECT = b"GCOL\x01\0\0\0", 16, struct.Struct("<HHIQ")
# reference to a string: its length (4 bytes), its heap (8) and its number in the heap (4)
_REFERENCE, _LONGEST_ANYWAY, _MOST_NAMES = 16, 128 << 20, 1000
_VLEN = {bytes([version << 4 | 9]) for version in range(1, 6)}  # HDF5's types of variable length


def check_size(path: Path, stored: int, unpacked: int) -> None:
    """Refuse a file that would unpack to far more than its size.

    Parameters
    ----------
    path
        File named in the error.
    stored, unpacked
        Bytes on disk and in memory.
    """
    if unpacked > max(UNPACKED_ANYWAY, MOST_UNPACKED * stored):
        raise DataError(
            f"{path} has {stored:,} bytes and would take {unpacked:,} in memory: it is damaged or malicious"
        )


def check_gzip(path: Path) -> None:
    """Check that a gzip file holds text of plausible size.

    Raises
    ------
    DataError
        As in `check_size`, or it holds zero bytes. Other damage is left to its reader.
    """
    stored, unpacked = path.stat().st_size, 0
    try:
        with gzip.open(path) as file:
            while part := file.read(1 << 20):
                unpacked += len(part)
                # numbers of one digit take eight bytes in memory
                check_size(path, stored, 4 * unpacked)
                if b"\0" in part:  # scipy's reader of matrices crashes at a zero byte
                    raise DataError(f"{path} is damaged: it is not text")
    except (OSError, EOFError, zlib.error):
        return


def inside(folder: Path, name: str, named_in: Path) -> Path:
    """Return the path of a file that is named in another file and must lie in a folder.

    Raises
    ------
    DataError
        It lies outside the folder.
    """
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{named_in} names {name!r}, which is outside {folder}")
    return path


def check_hdf5(path: str | Path, what: str = "a readable HDF5 file") -> None:
    """Check that a file is HDF5, refers to no other file, and declares no more data than it can hold.

    Reads the structure of the file and the positions of its strings, and no array of numbers.

    Raises
    ------
    DataError
        It is missing, damaged, refers to other files, or would unpack to far more than its size.
    """
    path = checksums.verified(path)
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
    except Exception as error:  # h5py raises many kinds of exception for a damaged file
        raise DataError(f"{path} is not {what}: {one_line(error)}") from error


def read_h5ad(path: str | Path) -> AnnData:
    """Read an h5ad file after `check_hdf5`.

    Raises
    ------
    DataError
        As in `check_hdf5`, or it holds no AnnData.
    """
    check_hdf5(path, "a readable h5ad file")
    try:
        content = anndata.read_h5ad(path)
        check_sparse(content)
    except Exception as error:  # h5py raises many kinds of exception for a damaged file
        raise DataError(f"{path} is not a readable h5ad file: {one_line(error)}") from error
    return content


def check_sparse(content: AnnData) -> None:
    """Check the indices of sparse matrices: scipy reads out of bounds with wrong ones.

    Raises
    ------
    ValueError
        An index is out of bounds.
    """
    mappings = (content.layers, content.obsm, content.varm, content.obsp, content.varp)
    for matrix in (content.X, *(value for mapping in mappings for value in mapping.values())):
        if scipy.sparse.issparse(matrix) and matrix.format in ("csr", "csc"):
            matrix.check_format(full_check=True)


def _check_heaps(view: mmap.mmap) -> list[tuple[int, int]]:
    """Check the global heaps of strings, in which the library loops at an object of size 0.

    Returns their positions (start, end).
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
            # object 0 is the free space, its size that of the rest of the heap
            place += size if index == 0 else _OBJECT.size + -(-size // 8) * 8
            if place > end or (index == 0 and size < _OBJECT.size):
                raise ValueError("a heap of strings is damaged")
        at = view.find(_HEAP, at + 1)
    return heaps


def _check_structure(file: h5py.File, path: Path, view: mmap.mmap) -> tuple[list[tuple[int, int]], set[bytes]]:
    """Check every object, without reading numbers.

    Returns the positions of arrays in the file (start, end) and the names of attributes that hold strings.
    """
    stored, unpacked, arrays, names = len(view), 0, [], set[bytes]()

    def check_attributes(thing: h5py.Group | h5py.Dataset, name: str) -> None:
        for number in range(h5py.h5a.get_num_attrs(thing.id)):
            attribute = h5py.h5a.open(thing.id, index=number)
            _check_type(attribute.get_type(), name, path)
            if _references(attribute.get_type())[0]:
                names.add(attribute.name)

    links: dict[str, object] = {}
    file.visititems_links(links.__setitem__)  # the library discards exceptions of a callback
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
            raise DataError(
                f"{path}: {name!r} must be a dataset in the file itself, and its values are stored in other files"
            )
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
    """Return the offsets of string references in a stored element, and its stored size."""
    if kind.get_class() == h5py.h5t.STRING and kind.is_variable_str():
        return [0], _REFERENCE
    places, size = list[int](), kind.get_size()
    if isinstance(kind, h5py.h5t.TypeCompoundID):
        for number in range(kind.get_nmembers()):
            member = kind.get_member_type(number)
            inner, width = _references(member)
            # in this description a string is a pointer
            places += [kind.get_member_offset(number) + size - kind.get_size() + place for place in inner]
            size += width - member.get_size()
    return places, size


def _check_lengths(content: bytes, places: list[int], width: int, stored: int) -> None:
    """Check the lengths of strings: the library allocates the declared length before it reads the string."""
    elements = np.frombuffer(content[: len(content) // width * width], np.uint8).reshape(-1, width)
    for place in places:
        longest = elements[:, place : place + 4].copy().view("<u4").max(initial=0)
        if longest > max(stored, _LONGEST_ANYWAY):
            raise ValueError(f"a string declares {longest:,} bytes, and the file has {stored:,}")


def _pieces(dataset: h5py.Dataset, width: int) -> list[tuple[int, int, int]]:
    """Return the positions (start, end) of the chunks of a dataset, and the mask of filters that each chunk skips."""
    if dataset.chunks is None:
        start = dataset.id.get_offset()  # None if nothing was written, or the data are in the header
        size = min(dataset.id.get_storage_size(), (dataset.size or 0) * width)
        return [] if start is None else [(start, start + size, 0)]
    found: list[tuple[int, int, int]] = []
    most = math.prod(-(-size // chunk) for size, chunk in zip(dataset.shape, dataset.chunks, strict=True))

    def add(chunk: h5py.h5d.StoreInfo) -> bool | None:
        found.append((chunk.byte_offset, chunk.byte_offset + chunk.size, chunk.filter_mask))
        return True if len(found) > most else None  # a damaged index may loop; any value other than None stops

    dataset.id.chunk_iter(add)
    if len(found) > most:
        raise ValueError(f"the index of {dataset.name!r} is damaged")
    return found


def _unfiltered(dataset: h5py.Dataset, piece: bytes, mask: int, width: int) -> bytes:
    """Return the elements of a chunk before its filters; empty if a filter is not known here."""
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
    """Check the lengths of strings in attributes, anywhere in the file.

    A stored attribute is its version, flags, the sizes of its name, type and space, then these three and its values.
    Arrays and heaps (`known`) are skipped, so that little of the file is searched.
    """
    if len(names) > _MOST_NAMES:
        raise ValueError(f"it has attributes of {len(names):,} names, and a slide has at most {_MOST_NAMES:,}")
    for start, end in _between(known, len(view)):
        for name in names:
            at = view.find(name + b"\0", start, end)
            while at >= 0:
                for version, before, grain in ((1, 8, 8), (2, 8, 1), (3, 9, 1)):
                    if at >= before and view[at - before] == version:
                        _check_attribute(view, at - before, at, grain, len(name) + 1)
                at = view.find(name + b"\0", at + 1, end)


def _check_attribute(view: mmap.mmap, head: int, at: int, grain: int, length: int) -> None:
    """Check the strings of a possible attribute whose name of `length` bytes starts at `at`."""
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
    """Yield the gaps between spans of a file that are large enough for an attribute."""
    at = 0
    for start, stop in [*sorted(spans), (end, end)]:
        if start - at >= _REFERENCE:
            yield at, min(start, end)
        at = max(at, stop)


def _check_type(kind: h5py.h5t.TypeID, name: str, path: Path) -> None:
    """Refuse types of variable length other than strings: the formats have none, and damaged types look like them."""
    if isinstance(kind, h5py.h5t.TypeCompoundID):
        for number in range(kind.get_nmembers()):
            _check_type(kind.get_member_type(number), name, path)
    elif kind.get_class() == h5py.h5t.VLEN:
        raise DataError(f"{path}: {name!r} holds sequences of variable length, which slides do not have")
