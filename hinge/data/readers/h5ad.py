"""Slides as `.h5ad` files, each with its image beside it."""

import glob
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData

from hinge.data.counts_source import take_counts
from hinge.data.resolution import (
    VISIUM_PITCH_UM,
    choose_resolution,
    fit_array,
    lattice_pitch_px,
    pitch_in_px,
    positive_length,
    um_per_px_of_array,
)
from hinge.data.slide import describe_slide
from hinge.data.slide_image import IMAGE_SUFFIXES, SlideImage
from hinge.utils.errors import DataError
from hinge.utils.safe_hdf5 import read_h5ad

LAYOUT = (
    "a file <sample>.h5ad or a folder of them, each with raw counts in X, layers['counts'] or raw, pixel x and y "
    f"in obsm['spatial'], and an image <sample>.tif beside it (or {', '.join(IMAGE_SUFFIXES)})"
)


def recognises(path: Path) -> bool:
    """Return whether a path has this layout."""
    return bool(_files(path))


def list_samples(path: Path) -> list[str]:
    """Return the names of the files without their ending."""
    return [file.stem for file in _files(path)]


def read(path: Path, sample: str, *, image: Path | None, um_per_px: float | None, require_image: bool) -> AnnData:
    """Read one file without its spots off tissue; its other layers, obs, obsm and uns are kept."""
    file = next(file for file in _files(path) if file.stem == sample)
    slide, notes = open_h5ad(file)
    slide = without_off_tissue(slide, notes)
    coordinates = slide.obsm["spatial"]
    facts = slide.uns.get("hinge", {})
    facts = facts if isinstance(facts, Mapping) else {}
    image = image or _find_image(file, facts, require_image)
    pitch_px, pitch_um = pitch_in_px(coordinates), positive_length(facts, "spot_pitch_um")
    hexagonal = is_hexagonal(slide)
    if math.isnan(pitch_um) and hexagonal:
        pitch_um = VISIUM_PITCH_UM
    known = {
        "option": um_per_px or math.nan,
        "metadata": positive_length(facts, "um_per_px"),
        "array": _um_per_px_of_spots(slide, pitch_um, hexagonal),
        **image_resolution(image),
        "scalefactors": 65 / _spot_diameter_px(slide) if hexagonal else math.nan,
    }
    known, um_per_px, origin = choose_resolution(known)
    if math.isnan(um_per_px):
        um_per_px = pitch_um / pitch_px
        if math.isnan(um_per_px) and require_image:
            raise DataError(
                f"neither {file} nor its image contains the resolution: give --um-per-px, µm per full-resolution pixel"
            )
    if math.isnan(pitch_um):
        pitch_um = pitch_px * um_per_px
    diameter_um = positive_length(facts, "spot_diameter_um")
    if math.isnan(diameter_um):
        diameter_um = 55.0 if hexagonal else _spot_diameter_px(slide) * um_per_px
    return describe_slide(
        slide,
        sample,
        image_path=image,
        um_per_px=um_per_px,
        spot_pitch_um=pitch_um,
        spot_diameter_um=diameter_um,
        source_format="h5ad",
        source={**notes, "resolutions": known, "um_per_px_from": origin},
    )


def open_h5ad(file: Path) -> tuple[AnnData, dict[str, Any]]:
    """Read a file's raw counts into X, CSR float32, and its coordinates into obsm["spatial"], float64 (n, 2).

    Returns
    -------
    tuple
        The slide, and notes: where the counts were, and the names of the libraries in uns["spatial"].

    Raises
    ------
    DataError
        If the file is damaged or lacks either.
    """
    slide, where = take_counts(read_h5ad(file), file)
    libraries = slide.uns.get("spatial")
    notes: dict[str, Any] = {"counts": where}
    if isinstance(libraries, Mapping) and len(libraries) > 1:
        notes["libraries"] = [str(name) for name in libraries]
    coordinates = slide.obsm.get("spatial")
    if coordinates is None or np.ndim(coordinates) != 2 or np.shape(coordinates)[1] != 2:
        raise DataError(
            f"{file} needs pixel x and y of each spot, shape ({slide.n_obs}, 2), in obsm['spatial'], and has "
            f"{_positions_elsewhere(slide)}"
        )
    try:
        coordinates = np.asarray(coordinates, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{file} has coordinates in obsm['spatial'] that are not numbers") from error
    slide.obsm["spatial"] = coordinates
    return slide, notes


def without_off_tissue(slide: AnnData, notes: dict[str, Any]) -> AnnData:
    """Return a slide without the spots that Space Ranger found off tissue; all where the column says so of all."""
    if "in_tissue" not in slide.obs:
        return slide
    marks = slide.obs["in_tissue"].astype(str).str.strip().str.lower()
    off = marks.isin(["0", "0.0", "false"]).to_numpy()
    if off.all() or not off.any():
        return slide
    notes.setdefault("left_out", {})["off_tissue"] = int(off.sum())
    notes["spots"] = slide.n_obs
    return slide[~off].copy()


def is_hexagonal(slide: AnnData) -> bool:
    """Return whether the columns array_row and array_col are those of a Visium array."""
    fit = fit_array(array, slide.obsm["spatial"]) if (array := array_of(slide)) is not None else None
    return fit is not None and fit.hexagonal


def array_of(slide: AnnData) -> np.ndarray | None:
    """Return array row and column, float (n, 2); None where there are none."""
    if not {"array_row", "array_col"} <= set(slide.obs):
        return None
    try:
        return slide.obs[["array_row", "array_col"]].to_numpy(np.float64)
    except (TypeError, ValueError):
        return None


def image_resolution(image: Path | None) -> dict[str, float]:
    """Return what an image says of its resolution, by source; a value that no scan has is left out."""
    if image is None:
        return {}
    with SlideImage(image) as opened:
        return {opened.resolution[0]: opened.um_per_px or math.nan}


def _um_per_px_of_spots(slide: AnnData, pitch_um: float, hexagonal: bool) -> float:
    coordinates = slide.obsm["spatial"]
    array = array_of(slide)
    if hexagonal and array is not None and pitch_um == VISIUM_PITCH_UM:
        return um_per_px_of_array(array, coordinates)
    return pitch_um / lattice_pitch_px(coordinates)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(path.glob("[!.]*.h5ad"))
    return [path] if path.suffix == ".h5ad" and path.is_file() else []


def _positions_elsewhere(slide: AnnData) -> str:
    """Return what a table has in place of positions in pixels."""
    if "spatial" in slide.obsm:
        return f"shape {np.shape(slide.obsm['spatial'])} there: keep the columns of x and y"
    obsm = [f"obsm['{name}']" for name in slide.obsm if np.ndim(slide.obsm[name]) == 2]
    columns = [f"obs['{name}']" for name in slide.obs if re.search(r"^(pxl|x|y)(_|$)|pixel|coord", str(name).lower())]
    found = [*obsm, *columns][:6]
    return f"{', '.join(found)}: copy the positions from there" if found else "no positions"


def _find_image(file: Path, facts: Mapping[str, Any], require_image: bool) -> Path | None:
    """Return the image in `uns["hinge"]["image_path"]` (absolute or relative to the file), else the one beside it."""
    named = facts.get("image_path")
    if named and (file.parent / str(named)).exists():
        return file.parent / str(named)
    for suffix in IMAGE_SUFFIXES:
        for other in sorted(file.parent.glob(f"{glob.escape(file.stem)}.*")):
            if other.name.lower() == file.stem.lower() + suffix:
                return other
    if require_image:
        missing = f"its uns['hinge']['image_path'] {named} does not exist and " if named else ""
        raise DataError(
            f"{file} has no image: {missing}there is no {file.stem}{{{','.join(IMAGE_SUFFIXES)}}} beside it; "
            "give --image"
        )
    return None


def _spot_diameter_px(slide: AnnData) -> float:
    """Return the spot diameter in scanpy's scale factors, NaN if there is none."""
    try:
        library = next(iter(slide.uns["spatial"].values()))
        return positive_length(library["scalefactors"], "spot_diameter_fullres")
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration):
        return math.nan
