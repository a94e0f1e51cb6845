"""Arrays on disk that are computed part by part, so that a stopped computation can be resumed."""

import contextlib
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from hinge.utils.errors import DataError
from hinge.utils.files import read_json, write_json
from hinge.utils.locks import lock_file


def remove_leftovers(path: Path) -> None:
    """Remove what a process left that was killed after it had finished a file: locks and unfinished arrays."""
    unfinished = _folder_of(path)
    if unfinished.exists() or path.with_name(f".{path.name}.lock").exists():
        with contextlib.suppress(DataError), lock_file(path):  # in use: the other process removes them
            shutil.rmtree(unfinished, ignore_errors=True)


def _folder_of(path: Path) -> Path:
    return path.parent / f".{path.stem}.unfinished"


class ResumableArrays:
    """Arrays in a folder beside the output file, memory-mapped, with a mark and a checksum for each finished part.

    A part is a range of spots and does not depend on the number of processes. A resumed computation computes the parts
    without a mark. Memory holds one part.

    Parameters
    ----------
    path
        The output file.
    about
        Inputs that the arrays depend on, as JSON. Parts of other inputs are deleted.
    arrays
        Name → shape, type and the axis of the spots.
    num_spots
        Number of spots, n.
    spots_per_part
        Spots in a part. A computation that was started with another size keeps that size.
    """

    def __init__(
        self,
        path: Path,
        about: dict[str, Any],
        arrays: dict[str, tuple[tuple[int, ...], DTypeLike, int]],
        num_spots: int,
        spots_per_part: int,
    ):
        self.folder = _folder_of(path)
        self.arrays = arrays
        described = {name: [list(shape), np.dtype(dtype).name] for name, (shape, dtype, _) in arrays.items()}
        self.about = {**about, "arrays": described}
        self.num_spots, self.spots_per_part = num_spots, spots_per_part

    def prepare(self) -> None:
        """Create the folder, or keep an existing one of the same arrays. One process calls this.

        Raises
        ------
        DataError
            The disk has no space for the arrays, or permission is missing.
        """
        try:
            there = read_json(self.folder / "about.json")
            if there["about"] == self.about and there["spots_per_part"] >= 1 and self._is_whole():
                return
        except (DataError, KeyError, TypeError):  # no folder, or its creation was interrupted
            pass
        try:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            for name, (shape, dtype, _) in self.arrays.items():
                array = np.lib.format.open_memmap(self.folder / f"{name}.npy", "w+", dtype, shape)
                del array
                # reserved now: writing to a mapped file on a full disk kills the process without an error
                if hasattr(os, "posix_fallocate"):
                    with open(self.folder / f"{name}.npy", "r+b") as file:
                        os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
            write_json(self.folder / "about.json", {"about": self.about, "spots_per_part": self.spots_per_part})
        except OSError as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise DataError(f"cannot write {self.folder}: {error.strerror or error}") from error

    def _is_whole(self) -> bool:
        """Return whether the arrays have their shapes and sizes; a power loss may leave them empty or cut off."""
        try:
            return all(
                (stored.shape, stored.dtype) == (shape, np.dtype(dtype))
                for stored, (shape, dtype, _) in zip(self.read(), self.arrays.values(), strict=True)
            )
        except DataError:
            return False

    def missing(self) -> list[tuple[int, slice]]:
        """Return number and spots of each part that is not finished, or is not as it was written."""
        self.spots_per_part = read_json(self.folder / "about.json")["spots_per_part"]
        parts = enumerate(range(0, self.num_spots, self.spots_per_part))
        arrays = self.read()
        return [
            (number, slice(start, min(start + self.spots_per_part, self.num_spots)))
            for number, start in parts
            if not self._is_finished(number, arrays)
        ]

    def write(self, number: int, spots: slice | np.ndarray, *contents: np.ndarray) -> None:
        """Store a part: for every array its values for these spots, and a mark with these spots and a checksum."""
        for (name, (_, _, axis)), content in zip(self.arrays.items(), contents, strict=True):
            array = np.lib.format.open_memmap(self.folder / f"{name}.npy", "r+")
            array[(slice(None),) * axis + (spots,)] = content
            array.flush()
        chosen = np.arange(self.num_spots)[spots]
        mark = {"spots": chosen.tolist(), "crc32": self._checksum(self.read(), chosen)}
        write_json(self._mark(number), mark, durable=False)

    def _is_finished(self, number: int, arrays: tuple[np.ndarray, ...]) -> bool:
        try:
            mark = read_json(self._mark(number))
            return mark["crc32"] == self._checksum(arrays, np.array(mark["spots"], dtype=np.intp))
        except (DataError, KeyError, TypeError, ValueError, IndexError, OverflowError):
            return False

    def _checksum(self, arrays: tuple[np.ndarray, ...], spots: np.ndarray) -> int:
        """Return a checksum over the stored values of some spots."""
        total = 0
        for array, (_, _, axis) in zip(arrays, self.arrays.values(), strict=True):
            total = zlib.crc32(np.ascontiguousarray(array[(slice(None),) * axis + (spots,)]).tobytes(), total)
        return total

    def read(self) -> tuple[np.ndarray, ...]:
        """Return the arrays, memory-mapped."""
        files = [self.folder / f"{name}.npy" for name in self.arrays]
        try:
            return tuple(np.load(file, mmap_mode="r", allow_pickle=False) for file in files)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{self.folder} is damaged; delete it to start again: {error}") from error

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Keep the folder if the block fails and at least one part is finished. One process calls this."""
        try:
            yield
        except BaseException:
            if not any(self.folder.glob("*.finished")):
                self.remove()
            raise

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _mark(self, number: int) -> Path:
        return self.folder / f"{number}.finished"
