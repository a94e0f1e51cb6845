"""Slides as `.h5ad` files, each with its image beside it."""

import glob
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
from anndata import AnnData
from scipy.spatial import KDTree

from hinge.data.slide import describe_slide
from hinge.data.slide_image import IMAGE_SUFFIXES, SlideImage
from hinge.utils.errors import DataError
from hinge.utils.safe_hdf5 import read_h5ad

LAYOUT = (
    "a file <sample>.h5ad or a folder of them, each with raw counts in X or layers['counts'], pixel x and y "
    f"in obsm['spatial'], and an image <sample>.tif beside it (or {', '.join(IMAGE_SUFFIXES)})"
)


def recognises(path: Path) -> bool:
    """Return whether a path has this layout."""
    return bool(_files(path))


def list_samples(path: Path) -> list[str]:
    """Return the names of the files without their ending."""
    return [file.stem for file in _files(path)]


def read(path: Path, sample: str, *, image: Path | None, um_per_px: float | None, require_image: bool) -> AnnData:
    """Read one file; its other layers, obs, obsm and uns are kept."""
    file = next(file for file in _files(path) if file.stem == sample)
    slide = open_h5ad(file)
    coordinates = slide.obsm["spatial"]
    facts = slide.uns.get("hinge", {})
    facts = facts if isinstance(facts, Mapping) else {}
    image = image or _find_image(file, facts, require_image)
    pitch_px = pitch_in_px(coordinates)
    pitch_um = positive_length(facts, "spot_pitch_um")
    if um_per_px is None:
        um_per_px = positive_length(facts, "um_per_px")
        if math.isnan(um_per_px):
            um_per_px = pitch_um / pitch_px
        if math.isnan(um_per_px) and image:
            with SlideImage(image) as opened:
                um_per_px = opened.um_per_px or math.nan
        if math.isnan(um_per_px) and require_image:
            raise DataError(
                f"neither {file} nor its image contains the resolution: give --um-per-px, µm per full-resolution "
                "pixel (um_per_px= in Python)"
            )
    if math.isnan(pitch_um):
        pitch_um = pitch_px * um_per_px
    diameter_um = positive_length(facts, "spot_diameter_um")
    if math.isnan(diameter_um):
        diameter_um = _spot_diameter_px(slide) * um_per_px
    return describe_slide(
        slide,
        sample,
        image_path=image,
        um_per_px=um_per_px,
        spot_pitch_um=pitch_um,
        spot_diameter_um=diameter_um,
        source_format="h5ad",
    )


def open_h5ad(file: Path) -> AnnData:
    """Read a file's raw counts into X, CSR float32, and its coordinates into obsm["spatial"], float64 (n, 2).

    Raises
    ------
    DataError
        If the file is damaged or lacks either.
    """
    slide = read_h5ad(file)
    slide.X = scipy.sparse.csr_matrix(raw_counts(slide, file), dtype=np.float32)
    coordinates = slide.obsm.get("spatial")
    if coordinates is None or np.ndim(coordinates) != 2 or np.shape(coordinates)[1] != 2:
        raise DataError(f"{file} needs pixel x and y of each spot, shape ({slide.n_obs}, 2), in obsm['spatial']")
    try:
        coordinates = np.asarray(coordinates, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{file} has coordinates in obsm['spatial'] that are not numbers") from error
    slide.obsm["spatial"] = coordinates
    return slide


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(path.glob("[!.]*.h5ad"))
    return [path] if path.suffix == ".h5ad" and path.is_file() else []


def raw_counts(slide: AnnData, file: Path) -> Any:
    """Return X if it holds integers, else the layer `counts`, which is removed from the layers."""
    if slide.X is not None and _integral(slide.X):
        return slide.X
    if "counts" not in slide.layers:
        held = "nothing" if slide.X is None else "values that are not integers"
        raise DataError(f"{file} has no raw counts: X holds {held} and there is no layers['counts']")
    return slide.layers.pop("counts")


def _integral(matrix: Any) -> bool:
    values = np.asarray(matrix.data if scipy.sparse.issparse(matrix) else matrix)
    # NaN and infinities are left for check_slide to name
    return values.dtype.kind in "iub" or bool((np.isnan(values) | (values == np.round(values))).all())


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
            "give --image (image= in Python, or require_image=False for counts alone)"
        )
    return None


def positive_length(facts: Mapping[str, Any], key: str) -> float:
    """Return a positive length, NaN if there is none."""
    try:
        value = float(facts[key])
    except (KeyError, TypeError, ValueError, OverflowError):
        return math.nan
    return value if 0 < value < math.inf else math.nan


def pitch_in_px(coordinates: np.ndarray) -> float:
    """Return the median distance from a spot to its nearest neighbour, NaN for fewer than two spots."""
    coordinates = coordinates[np.isfinite(coordinates).all(axis=1)]
    if len(coordinates) < 2:
        return math.nan
    distances = KDTree(coordinates).query(coordinates, k=2)[0][:, 1]
    return float(np.median(distances)) or math.nan


def _spot_diameter_px(slide: AnnData) -> float:
    """Return the spot diameter in scanpy's scale factors, NaN if there is none."""
    try:
        (library,) = slide.uns["spatial"].values()
        return positive_length(library["scalefactors"], "spot_diameter_fullres")
    except (KeyError, TypeError, ValueError, AttributeError):
        return math.nan
