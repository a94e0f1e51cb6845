"""Arrays on disk that are computed part by part, so that a stopped computation can be resumed."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from hinge.utils.errors import DataError
from hinge.utils.files import read_json, write_json


class ResumableArrays:
    """Arrays in a folder beside the output file, memory-mapped, with a mark for each finished part.

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
        self.folder = path.parent / f".{path.stem}.unfinished"
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
            if there["about"] == self.about and there["spots_per_part"] >= 1:
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

    def missing(self) -> list[tuple[int, slice]]:
        """Return number and spots of each part that is not finished."""
        self.spots_per_part = read_json(self.folder / "about.json")["spots_per_part"]
        parts = enumerate(range(0, self.num_spots, self.spots_per_part))
        return [
            (number, slice(start, min(start + self.spots_per_part, self.num_spots)))
            for number, start in parts
            if not self._mark(number).exists()
        ]

    def write(self, number: int, spots: slice | np.ndarray, *contents: np.ndarray) -> None:
        """Store a part: for every array its values for these spots."""
        for (name, (_, _, axis)), content in zip(self.arrays.items(), contents, strict=True):
            array = np.lib.format.open_memmap(self.folder / f"{name}.npy", "r+")
            array[(slice(None),) * axis + (spots,)] = content
            array.flush()
        self._mark(number).touch()

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
