"""Spots of many slides in a folder, for training that holds some of them in memory.

A folder in format 3 of Zarr, with a group for each slide:

    features      (n, V, d) float16, as of `SpotTable`, in shards of chunks of `BLOCK_SPOTS` spots
    counts        (n, G) float32, in the same shards and chunks
    library_size  (n,) float32
    coords        (n, 2) float64
    barcodes      (n, characters) uint8, UTF-8 filled up with zeros
    measured      (G,) bool, the genes that the slide measured
    attributes    spots, made_from, sha256 of the descriptions of the arrays (zarr.json)

Every chunk has a checksum, which is compared whenever the chunk is read; the descriptions are compared when a slide is
opened. A slide gets its name when it is complete.
"""

import contextlib
import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from hinge.data.slide_levels import SlideLevels
from hinge.data.spots import SpotTable, concatenate_spots
from hinge.data.transforms import get_transform
from hinge.utils.errors import DataError, HingeError, one_line
from hinge.utils.files import atomic_path
from hinge.utils.safe_zarr import CheckedArray

STORE_NAME = "spots.zarr"

BLOCK_SPOTS = 64
"""Spots of a chunk, which are read together."""

SHARD_BYTES = 64 << 20
"""Bytes of a file of chunks, about."""

PART_SPOTS = 32
"""Spots of a slide, at least, where a part of it stands for the slide: enough that neighbours are among them."""

_SLIDES_OPEN = 256
_READ_SPOTS = 1024
_ARRAYS = ("features", "counts", "library_size", "coords", "barcodes", "measured")


def write_slide(folder: Path, spots: SpotTable, made_from: str) -> None:
    """Write the spots of one slide to a store; a slide of that name is replaced.

    Parameters
    ----------
    folder
        The store; it is created if needed.
    spots
        Of one slide, with features.
    made_from
        Digest of the inputs, see `digest_of_slide`.

    Raises
    ------
    DataError
        A feature is too large for half precision, or the folder cannot be written to.
    """
    assert spots.features is not None
    name = str(spots.slide[0])
    with np.errstate(over="ignore"):
        features = spots.features.astype(np.float16)
    if not np.isfinite(features).all():
        raise DataError(
            f"slide {name} has features above {np.finfo(np.float16).max:g}, which a store in half precision cannot "
            "hold; set training.store: memory, or features.standardise_slide: true"
        )
    encoded = [barcode.encode() for barcode in spots.barcodes.tolist()]
    letters = np.zeros((len(encoded), max(map(len, encoded))), dtype=np.uint8)
    for row, each in zip(letters, encoded, strict=True):
        row[: len(each)] = np.frombuffer(each, dtype=np.uint8)
    arrays = {
        "features": features,
        "counts": spots.counts,
        "library_size": spots.library_size,
        "coords": spots.coords,
        "barcodes": letters,
        "measured": spots.measured.get(name, np.ones(len(spots.genes), dtype=bool)),
    }
    with atomic_path(folder / name) as temporary:
        group = zarr.create_group(temporary, zarr_format=3, attributes={"spots": len(spots), "made_from": made_from})
        for key, array in arrays.items():
            _create(group, key, array)
        group.attrs["sha256"] = _digest_of_descriptions(temporary)


def _create(group: zarr.Group, name: str, array: NDArray) -> None:
    sharded = name in ("features", "counts")
    chunk, shard = array.shape, None
    if sharded:
        block = BLOCK_SPOTS * math.prod(array.shape[1:]) * array.itemsize
        blocks = min(max(1, SHARD_BYTES // block), -(-len(array) // BLOCK_SPOTS))
        chunk, shard = (BLOCK_SPOTS, *array.shape[1:]), (blocks * BLOCK_SPOTS, *array.shape[1:])
    # half precision hardly gets smaller, and would take longer to read
    packing = [] if name == "features" else [ZstdCodec(level=1)]
    stored = group.create_array(
        name,
        shape=array.shape,
        dtype=array.dtype,
        chunks=chunk,
        shards=shard,
        compressors=[*packing, Crc32cCodec()],
        config={"write_empty_chunks": True},  # a chunk that is missing is then one that was lost
    )
    stored[:] = array


def digest_of_slide(folder: Path, name: str) -> str | None:
    """Return the digest of the inputs of a slide in a store; None where it is not there, or its digest is damaged."""
    try:
        return str(zarr.open_group(folder / name, mode="r", zarr_format=3).attrs["made_from"])
    except (OSError, KeyError, ValueError, TypeError):
        return None


class SpotStore:
    """The spots of some slides of a store, numbered slide after slide.

    Parameters
    ----------
    folder
        Where `write_slide` wrote them.
    names
        The slides, in order.
    genes, transform, token_columns
        As of `SpotTable`.

    Attributes
    ----------
    offsets
        (S + 1,) number of the first spot of each slide, and of all spots.
    of_slides
        (S, G) whether a slide measured a gene; None where all have all.
    num_views, feature_dim
        V and d.

    Raises
    ------
    DataError
        A slide is missing or damaged.
    """

    def __init__(
        self,
        folder: str | Path,
        names: Sequence[str],
        genes: Sequence[str],
        transform: str,
        token_columns: Sequence[NDArray] = (),
    ):
        self.folder, self.names, self.genes, self.transform = Path(folder), list(names), list(genes), transform
        self.token_columns = tuple(token_columns)
        self._arrays = lru_cache(maxsize=_SLIDES_OPEN)(self._open)
        sizes, measured, shapes = [], [], set()
        for number in range(len(self.names)):
            arrays = self._arrays(number)
            sizes.append(arrays["features"].shape[0])
            measured.append(self._read(number, "measured"))
            shapes.add((*arrays["features"].shape[1:], arrays["counts"].shape[1]))
        if len(shapes) != 1 or next(iter(shapes))[2] != len(self.genes):
            raise DataError(
                f"{self.folder} holds slides of other features or genes; delete it and run hinge train again"
            )
        self.num_views, self.feature_dim, _ = shapes.pop()
        self.offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        found = np.stack(measured)
        self.of_slides = None if found.all() else found
        self._kept: tuple[tuple[int, int], tuple[SpotTable, NDArray[np.int64]]] | None = None

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def _open(self, number: int) -> dict[str, CheckedArray]:
        return _open_slide(self.folder / self.names[number])

    def _read(self, number: int, name: str, rows: slice = slice(None)) -> NDArray:
        with _readable(self.folder / self.names[number]):
            array = self._arrays(number)[name]
            return array[(rows, *[slice(None)] * (len(array.shape) - 1))]

    def slide_of(self, spots: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of the slide of each spot (B,)."""
        return np.searchsorted(self.offsets, spots, side="right") - 1

    def read(self, start: int, stop: int) -> tuple[NDArray[np.float16], NDArray[np.float32], NDArray[np.float32]]:
        """Return features (m, V, d), values (m, G) and library sizes (m,) of the spots of a range within a slide."""
        number = int(self.slide_of(np.array([start]))[0])
        rows = slice(start - int(self.offsets[number]), stop - int(self.offsets[number]))
        counts, sizes = (self._read(number, name, rows) for name in ("counts", "library_size"))
        return self._read(number, "features", rows), get_transform(self.transform).forward(counts, sizes), sizes

    def slide(self, number: int, chosen: NDArray[np.int64] | slice = slice(None), features: bool = True) -> SpotTable:
        """Return some spots of a slide, by default all; without features where they are not needed."""
        name = self.names[number]
        barcodes = self._read(number, "barcodes")[chosen]
        counts, sizes = self._read(number, "counts")[chosen], self._read(number, "library_size")[chosen]
        there = None if self.of_slides is None else self.of_slides[number]
        return SpotTable(
            slide=np.full(len(barcodes), name),
            barcodes=np.array([bytes(each).rstrip(b"\0").decode() for each in barcodes], dtype=str),
            coords=self._read(number, "coords")[chosen],
            features=self._read(number, "features")[chosen].astype(np.float32) if features else None,
            counts=counts,
            library_size=sizes,
            values=get_transform(self.transform).forward(counts, sizes),
            genes=self.genes,
            transform=self.transform,
            measured={} if there is None or there.all() else {name: there},
            token_columns=self.token_columns,
        )

    def some_spots(self, most: int, seed: int) -> tuple[SpotTable, NDArray[np.int64]]:
        """Return an equal share of the spots of each slide, at most `most` in all, and their numbers.

        All spots where these are not more. The spots of a slide lie beside each other, because some of what is
        estimated from them concerns neighbours. Where the share of a slide would be below `PART_SPOTS`, slides are
        chosen, evenly spread over their order.
        """
        if self._kept is None or self._kept[0] != (most, seed):
            self._kept = ((most, seed), self._choose(most, seed))
        return self._kept[1]

    def _choose(self, most: int, seed: int) -> tuple[SpotTable, NDArray[np.int64]]:
        sizes = np.diff(self.offsets)
        slides = np.arange(len(sizes))
        if len(self) > most and PART_SPOTS * len(sizes) > most:
            slides = np.unique(np.linspace(0, len(sizes) - 1, max(1, most // PART_SPOTS)).astype(np.int64))
            slides = self._with_every_gene(slides)
        share = max(1, _share(sizes[slides], most))
        tables, numbers = [], []
        for number in slides.tolist():
            chosen = np.arange(sizes[number])
            if sizes[number] > share:
                coords = self._read(number, "coords")
                centre = np.random.default_rng([seed, 7, number]).integers(len(coords))
                away = ((coords - coords[centre]) ** 2).sum(axis=1)
                chosen = np.sort(np.argsort(away, kind="stable")[:share])
            tables.append(self.slide(number, chosen))
            numbers.append(self.offsets[number] + chosen)
        return concatenate_spots(tables), np.concatenate(numbers)

    def _with_every_gene(self, slides: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return slides and, for each gene that none of them measured, another slide that did."""
        if self.of_slides is None:
            return slides
        for gene in np.flatnonzero(~self.of_slides[slides].any(axis=0)):
            if not self.of_slides[slides, gene].any():
                slides = np.append(slides, int(self.of_slides[:, gene].argmax()))
        return np.unique(slides)

    def moments(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return mean and standard deviation (d,) of the features of all spots and views, in one pass over them."""
        total, squares, count = np.zeros(self.feature_dim), np.zeros(self.feature_dim), len(self) * self.num_views
        for number, size in enumerate(np.diff(self.offsets).tolist()):
            for start in range(0, size, _READ_SPOTS):
                found = self._read(number, "features", slice(start, start + _READ_SPOTS))
                block = found.reshape(-1, self.feature_dim).astype(np.float64)
                total += block.sum(axis=0)
                squares += (block**2).sum(axis=0)
        mean = total / count
        return mean, np.sqrt(np.maximum(squares / count - mean**2, 0))

    def levels(
        self, patients: Mapping[str, str] | None = None, tokens: Mapping[str, NDArray] | None = None
    ) -> SlideLevels:
        """Return the levels of the slides, read one after the other; arguments as of `SlideLevels.of_spots`.

        patients is slide → patient; None: each slide is of a patient of its own.
        """
        found = []
        for name in sorted(self.names):
            number = self.names.index(name)
            spots = self.slide(number, features=False)
            patient = np.full(len(spots), name if patients is None else patients[name])
            known = (spots.known_counts(), spots.library_size, spots.slide, patient, self.transform)
            found.append(SlideLevels.of_spots(*known, tokens))
        return SlideLevels.concatenated(found)


def damaged_slides(folder: Path) -> tuple[list[str], int]:
    """Read all of a store; return a sentence for each damaged slide, and the number of slides that are as written."""
    faults, right = [], 0
    for path in sorted(each for each in folder.iterdir() if each.is_dir() and not each.name.startswith(".")):
        try:
            with _readable(path):
                for array in _open_slide(path).values():
                    for start in range(0, array.shape[0], _READ_SPOTS):
                        array[(slice(start, start + _READ_SPOTS), *[slice(None)] * (len(array.shape) - 1))]
            right += 1
        except DataError as error:
            faults.append(str(error))
    return faults, right


def _open_slide(path: Path) -> dict[str, CheckedArray]:
    """Return the arrays of a slide after checking that their sizes agree and that all files of chunks are there."""
    with _readable(path):
        attributes, found = zarr.open_group(path, mode="r", zarr_format=3).attrs, {}
        spots, digest = attributes["spots"], attributes.get("sha256")  # stores of earlier versions have no digest
        if digest is not None and digest != _digest_of_descriptions(path):
            raise ValueError("the description of an array was changed")
        for name in _ARRAYS:
            array = zarr.open_array(path / name, mode="r", zarr_format=3)
            if name != "measured" and array.shape[0] != spots:
                raise ValueError(f"{name} has {array.shape[0]} spots, not {spots}")
            grid = array.shards or array.chunks
            sides = (range(-(-size // side)) for size, side in zip(array.shape, grid, strict=True))
            for place in itertools.product(*sides):  # zarr reads zeros where a file is missing
                if not (path / name / array.metadata.encode_chunk_key(place)).is_file():
                    raise ValueError(f"a file of {name} is missing")
            found[name] = CheckedArray(array, path / name)
        return found


def _digest_of_descriptions(path: Path) -> str:
    """Return the SHA-256 of the shapes, types and codecs of a slide's arrays, as they are stored."""
    return hashlib.sha256(b"".join((path / name / "zarr.json").read_bytes() for name in _ARRAYS)).hexdigest()


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except HingeError:
        raise
    except Exception as error:  # a damaged store ends in almost any exception
        raise DataError(
            f"{path} is missing, damaged or was changed after hinge train wrote it ({one_line(error)}): delete it and "
            "run hinge train again"
        ) from error


def _share(sizes: NDArray[np.int64], most: int) -> int:
    """Return how many spots of a slide may be taken so that slides of some sizes give at most `most` together."""
    low, high = 0, int(sizes.max())
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if np.minimum(sizes, middle).sum() <= most else (low, middle - 1)
    return low
