"""Files of draws: the finished h5ad, and what is there of one that is still being drawn."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import numpy as np
from anndata import AnnData

from hinge.data.slide import slide_name
from hinge.data.writers import attach_draws, write_draws_zarr
from hinge.errors import DataError
from hinge.files import atomic_path, read_json, write_json

MOST_BYTES_IN_LAYERS = 2 << 30  # draws; a Visium slide's 20 draws of 200 genes are 80 MB


def write_draws(
    path: str | Path, values: np.ndarray, expected: np.ndarray, slide: AnnData, genes: list[str], about: dict
) -> None:
    """Write draws as AnnData: X the mean, layers std, expected and draw_000 ….

    Draws of more than `MOST_BYTES_IN_LAYERS` go to a chunked array in `<slide>.draws.zarr` beside the file, so that
    the file still opens at once in scanpy; `read_draws` brings them back.

    Parameters
    ----------
    path
        The h5ad file.
    values
        (K, n, G) draws, in memory or mapped from a file.
    expected
        (n, G) the head's mean averaged over draws.
    slide
        Where the spots lie; its name, image and coordinates go along.
    genes
        G symbols.
    about
        What is needed to repeat the draws; goes to `uns["hinge"]`.
    """
    result = AnnData(X=values.mean(axis=0, dtype=np.float64).astype(np.float32))
    result.obs_names, result.var_names = slide.obs_names, genes
    result.layers["std"] = values.std(axis=0, dtype=np.float64).astype(np.float32)
    result.layers["expected"] = np.asarray(expected)
    for number, draw in enumerate(values):
        result.layers[f"draw_{number:03d}"] = np.asarray(draw)  # of a mapped file: anndata knows no such class
    result.obsm["spatial"] = slide.obsm["spatial"]
    result.uns["spatial"] = slide.uns.get("spatial", {})
    result.uns["hinge"] = {**slide.uns["hinge"], **about}
    if values.nbytes > MOST_BYTES_IN_LAYERS:
        store = write_draws_zarr(result, Path(path).with_suffix(".draws.zarr"))
        for number in range(len(values)):
            del result.layers[f"draw_{number:03d}"]
        result.uns["hinge"]["draws_store"] = store.name
    with atomic_path(path) as temporary:
        result.write_h5ad(temporary, compression="gzip")


def read_draws(path: str | Path) -> AnnData:
    """Read what `write_draws` wrote."""
    try:
        draws = ad.read_h5ad(path)
    except Exception as error:
        raise DataError(f"{path} is not a readable h5ad file: {error}") from error
    if "draws" not in draws.uns.get("hinge", {}):
        raise DataError(f"{path} holds no draws: uns['hinge'] does not describe any")
    if "draws_store" in draws.uns["hinge"]:
        attach_draws(draws, Path(path).parent / str(draws.uns["hinge"]["draws_store"]))
    return draws


def same_draws(path: Path, about: dict, slide: AnnData) -> bool:
    """Whether a file holds the draws of a slide that `about` describes."""
    there = read_draws(path)
    facts = {"name": slide_name(slide), **about}
    return (
        all(there.uns["hinge"].get(key) == value for key, value in facts.items())
        and list(there.obs_names) == list(slide.obs_names)
        and np.array_equal(there.obsm.get("spatial"), slide.obsm["spatial"])
    )


class UnfinishedDraws:
    """Draws on their way: arrays mapped from files in a folder beside the h5ad file, filled part by part.

    A part is a range of spots, the same whatever the number of processes; a finished one has a mark of its own, so
    that whoever goes on draws only what is missing. Memory holds one part.

    Parameters
    ----------
    path
        The h5ad file to be.
    about
        What the draws depend on, as JSON keeps it: parts of other draws are thrown away.
    num_draws, num_spots, num_genes
        K, n and G.
    spots_per_part
        Spots in a part.
    """

    def __init__(self, path: Path, about: dict, num_draws: int, num_spots: int, num_genes: int, spots_per_part: int):
        self.folder = path.parent / f".{path.stem}.unfinished"
        self.about = {**about, "shape": [num_draws, num_spots, num_genes], "spots_per_part": spots_per_part}
        self.shape, self.spots_per_part = (num_draws, num_spots, num_genes), spots_per_part

    def prepare(self) -> None:
        """Make the folder, or keep the one there if it is of the same draws; for one process.

        Raises
        ------
        DataError
            There is no room for the draws, or no permission.
        """
        try:
            if read_json(self.folder / "about.json") == self.about:
                return
        except DataError:  # none, or one that was killed while being made
            pass
        try:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            for name, shape in (("values", self.shape), ("expected", self.shape[1:])):
                array = np.lib.format.open_memmap(self.folder / f"{name}.npy", "w+", np.float32, shape)
                del array
                # reserved now: writing to a mapped file on a full disk would kill the process without a word
                if hasattr(os, "posix_fallocate"):
                    with open(self.folder / f"{name}.npy", "r+b") as file:
                        os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        except OSError as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise DataError(f"cannot write draws to {self.folder}: {error.strerror or error}") from error
        write_json(self.folder / "about.json", self.about)

    def missing(self) -> Iterator[tuple[int, slice]]:
        """Number and spots of each part that is not finished."""
        for number, start in enumerate(range(0, self.shape[1], self.spots_per_part)):
            if not self._mark(number).exists():
                yield number, slice(start, min(start + self.spots_per_part, self.shape[1]))

    def write(self, number: int, spots: slice, values: np.ndarray, expected: np.ndarray) -> None:
        """Keep a part: values (K, spots, G) and expected (spots, G)."""
        for name, content in (("values", values), ("expected", expected)):
            array = np.lib.format.open_memmap(self.folder / f"{name}.npy", "r+")
            array[..., spots, :] = content
            array.flush()
        self._mark(number).touch()

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Values (K, n, G) and expected (n, G), mapped."""
        return tuple(np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in ("values", "expected"))

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _mark(self, number: int) -> Path:
        return self.folder / f"{number}.finished"
