"""The resolution of a slide: all that is known of it, and the distances between spots that it follows from."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.spatial import KDTree
from scipy.spatial.distance import pdist

VISIUM_PITCH_UM = 100.0
# array_row and array_col of a hexagonal array count half rows: one step is √3/2 pitches down, half a pitch right
_STEP_UM = np.array([VISIUM_PITCH_UM * math.sqrt(3) / 2, VISIUM_PITCH_UM / 2])
_MOST_PAIRED = 3000  # spots among which all pairs are measured
_LEAST_SPOTS = 12  # fewer spots tell no lattice

SOURCES = {
    "option": "--um-per-px",
    "metadata": "the metadata",
    "array": "the distance between spots",
    "alignment": "the alignment matrix",
    "image": "the header of the image",
    "tag": "the resolution tag of the TIFF",
    "scalefactors": "the spot diameter in the scale factors",
}
"""Where a resolution may come from, as named in messages."""


@dataclass(frozen=True)
class ArrayFit:
    """The affine map from array row and column to pixels.

    Attributes
    ----------
    hexagonal
        Whether it is Visium's array: every other column of a row is left out, and the axes have its ratio.
    residual
        Root mean square distance of spots from the map, in steps along a row.
    column_px
        Pixels of one array column.
    """

    hexagonal: bool
    residual: float
    column_px: float


def choose_resolution(known: Mapping[str, float]) -> tuple[dict[str, float], float, str]:
    """Return what is known of a resolution, the value to use, and its source.

    Parameters
    ----------
    known
        µm per pixel by source (keys of `SOURCES`), the one to use first; NaN where unknown.

    Returns
    -------
    tuple
        The finite values, the first of them (NaN if there is none), and its source ("" if there is none).
    """
    finite = {source: float(value) for source, value in known.items() if math.isfinite(value) and value > 0}
    source = next(iter(finite), "")
    return finite, finite.get(source, math.nan), source


def fit_array(array: np.ndarray, pixels: np.ndarray) -> ArrayFit | None:
    """Return the affine fit of pixels (n, 2) to array row and column (n, 2); None for too few spots."""
    good = np.isfinite(array).all(axis=1) & np.isfinite(pixels).all(axis=1)
    array, pixels = array[good], pixels[good]
    if len(array) < _LEAST_SPOTS or (np.ptp(array, axis=0) == 0).any():
        return None
    design = np.column_stack([array, np.ones(len(array))])
    solution, _, rank, _ = np.linalg.lstsq(design, pixels, rcond=None)
    row_px, column_px = np.linalg.norm(solution[0]), np.linalg.norm(solution[1])
    if rank < 3 or not column_px > 0:
        return None
    residual = float(np.sqrt(((design @ solution - pixels) ** 2).sum(axis=1).mean()) / column_px)
    left_out = len(np.unique(array.sum(axis=1) % 2)) == 1
    return ArrayFit(
        bool(left_out and (residual > 1 or abs(row_px / column_px / math.sqrt(3) - 1) < 0.1)),
        residual,
        float(column_px),
    )


def um_per_px_of_array(array: np.ndarray, pixels: np.ndarray) -> float:
    """Return microns per pixel by a hexagonal array's geometry: the median over all pairs of spots; NaN for one spot.

    Parameters
    ----------
    array
        Array row and column, float (n, 2).
    pixels
        Full-resolution pixel coordinates, float (n, 2).
    """
    step = math.ceil(len(array) / _MOST_PAIRED)
    apart_um, apart_px = pdist(array[::step] * _STEP_UM), pdist(pixels[::step])
    apart = (apart_um > 0) & (apart_px > 0)
    return float(np.median(apart_um[apart] / apart_px[apart])) if apart.any() else math.nan


def pitch_in_px(coordinates: np.ndarray) -> float:
    """Return the median distance from a spot to its nearest neighbour, NaN for fewer than two spots."""
    distances = _nearest(coordinates)
    return float(np.median(distances)) or math.nan if len(distances) else math.nan


def lattice_pitch_px(coordinates: np.ndarray) -> float:
    """Return the distance between neighbours of spots on a lattice, NaN for spots at other places."""
    distances = _nearest(coordinates)
    if len(distances) < _LEAST_SPOTS:
        return math.nan
    low, middle, high = np.quantile(distances, [0.1, 0.5, 0.9])
    return float(middle) if middle > 0 and high - low < 0.15 * middle else math.nan


def positive_length(facts: Mapping[str, object], key: str) -> float:
    """Return a positive length, NaN if there is none."""
    try:
        value = float(facts[key])  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError, OverflowError):
        return math.nan
    return value if 0 < value < math.inf else math.nan


def _nearest(coordinates: np.ndarray) -> np.ndarray:
    coordinates = coordinates[np.isfinite(coordinates).all(axis=1)]
    if len(coordinates) < 2:
        return np.array([])
    return KDTree(coordinates).query(coordinates, k=2)[0][:, 1]
