"""Read and write files of draws."""

from pathlib import Path

import h5py
import numpy as np
from anndata import AnnData

from hinge.data.layers import draw_names
from hinge.data.slide import slide_name
from hinge.data.writers import attach_draws, write_draws_zarr
from hinge.utils.errors import DataError
from hinge.utils.files import atomic_path
from hinge.utils.safe_hdf5 import inside, read_h5ad

MOST_BYTES_IN_LAYERS = 2 << 30  # draws; a Visium slide's 20 draws of 200 genes are 80 MB

_SPOTS_AT_ONCE = 512  # the deviation of all draws at once takes four times their memory


def draws_of_slide(
    values: np.ndarray,
    expected: np.ndarray,
    slide: AnnData,
    genes: list[str],
    about: dict,
    levels: np.ndarray | None = None,
    novelty: np.ndarray | None = None,
) -> AnnData:
    """Return draws as AnnData: X the mean, layers std, expected and draw_000 ….

    Parameters
    ----------
    values
        (K, n, G) draws, in memory or mapped from a file.
    expected
        (n, G) mean of the predicted distribution, averaged over draws.
    slide
        The slide, whose name, image and coordinates are stored too.
    genes
        G symbols.
    about
        Settings that reproduce the draws, stored in `uns["hinge"]`.
    levels
        (1 + K, G) mean value over the slide's spots that was expected of each gene, and that each draw was given,
        stored in `varm["slide_level"]`; NaN for genes outside the panel. None where there is no prior of slide levels.
    novelty
        (n,) stored in `obs["novelty"]`: how far the features of a spot are from those of training, 1 for the 99th
        percentile of the training spots.

    Raises
    ------
    DataError
        A draw or an expectation is not a finite number.
    """
    for what, numbers in (("draws", values), ("expectations", expected[None])):
        for each in numbers:  # one at a time: many draws of a large slide are mapped from a file
            if not np.isfinite(each).all():
                spot, gene = np.argwhere(~np.isfinite(each))[0]
                raise DataError(
                    f"the {what} of slide {slide_name(slide)} are not finite numbers, the first of them that of spot "
                    f"{slide.obs_names[spot]} and gene {genes[gene]}; nothing was written: check the weights of the "
                    "model and the slide's features, or sample with sampling.precision no"
                )
    result = AnnData(X=values.mean(axis=0, dtype=np.float64).astype(np.float32))
    result.obs_names, result.var_names = slide.obs_names, genes
    if "outside_panel" in about:
        result.var["in_panel"] = ~result.var_names.isin(about["outside_panel"])
    parts = range(0, max(1, values.shape[1]), _SPOTS_AT_ONCE)
    deviations = [values[:, start : start + _SPOTS_AT_ONCE].std(axis=0, dtype=np.float64) for start in parts]
    result.layers["std"] = np.concatenate(deviations).astype(np.float32)
    result.layers["expected"] = np.asarray(expected)
    for number, draw in enumerate(values):
        result.layers[f"draw_{number:03d}"] = np.asarray(draw)  # anndata does not accept a memory map
    if novelty is not None:
        result.obs["novelty"] = np.asarray(novelty, dtype=np.float32)
    if levels is not None:
        result.varm["slide_level"] = np.full((len(genes), len(levels)), np.nan, dtype=np.float32)
        result.varm["slide_level"][: levels.shape[1]] = levels.T
    result.obsm["spatial"] = slide.obsm["spatial"]
    result.uns["spatial"] = slide.uns.get("spatial", {})
    result.uns["hinge"] = {**slide.uns["hinge"], **about}
    result.uns["hinge"]["summary"] = _summary(result, len(values), about)
    return result


def _summary(draws: AnnData, count: int, about: dict) -> str:
    """Return one line that says what draws are of, for a look at `uns["hinge"]`."""
    kinds = (
        f"{count} draws of {draws.n_vars} genes at {draws.n_obs} spots of slide {slide_name(draws)}",
        f"in units of {about.get('transform', 'the transform')}",
        f"mean {draws.X.mean():.2f}",
        f"mean standard deviation {draws.layers['std'].mean():.2f}",
    )
    return ", ".join(kinds)


def write_draws(path: str | Path, draws: AnnData) -> None:
    """Write an AnnData of `draws_of_slide` to the h5ad file `path`.

    Draws of more than `MOST_BYTES_IN_LAYERS` are written to a chunked array in `<slide>.draws.zarr` beside the file, so
    that scanpy opens the file quickly, and taken out of the layers of `draws`. `read_draws` reads both.
    """
    names = draw_names(draws)
    if sum(draws.layers[name].nbytes for name in names) > MOST_BYTES_IN_LAYERS:
        store = write_draws_zarr(draws, Path(path).with_suffix(".draws.zarr"))
        for name in names:
            del draws.layers[name]
        draws.uns["hinge"]["draws_store"] = store.name
    with atomic_path(path) as temporary:
        draws.write_h5ad(temporary, compression="gzip")


def draws_files(path: str | Path) -> list[Path]:
    """Return the file that `write_draws` wrote and, where the draws lie beside it, their store."""
    path = Path(path)
    with h5py.File(path, "r") as file:
        store = file.get("uns/hinge/draws_store")
        return [path] if store is None else [path, inside(path.parent, store.asstr()[()], path)]


def read_draws(path: str | Path) -> AnnData:
    """Read draws that `write_draws` wrote, as an AnnData with layers `draw_000`, `draw_001`, ….

    Raises
    ------
    DataError
        The file or its store is missing or damaged, or holds no draws.
    """
    draws = read_h5ad(path)
    about = draws.uns.get("hinge")
    if not isinstance(about, dict) or "draws" not in about:
        raise DataError(f"{path} holds no draws: uns['hinge']['draws'] is missing; give a file that hinge sample wrote")
    if "draws_store" in about:
        attach_draws(draws, inside(Path(path).parent, str(about["draws_store"]), Path(path)))
    return draws


def same_draws(path: Path, about: dict, slide: AnnData, genes: list[str]) -> bool:
    """Return whether a file holds the draws of genes of a slide with the settings `about`."""
    there = read_draws(path)
    facts = {"name": slide_name(slide), **about}
    return (
        all(_plain(there.uns["hinge"].get(key)) == value for key, value in facts.items())
        and list(there.obs_names) == list(slide.obs_names)
        and list(there.var_names) == list(genes)
        and np.array_equal(there.obsm.get("spatial"), slide.obsm["spatial"])
    )


def _plain(value: object) -> object:
    """Return an array of a file as a list."""
    return value.tolist() if isinstance(value, np.ndarray) else value
