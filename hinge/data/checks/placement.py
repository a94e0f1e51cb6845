"""Checks of where the spots lie: on the image, on its tissue, on their array, and on this section."""

import math
import re
from collections.abc import Callable, Iterator

import numpy as np
from anndata import AnnData

from hinge.data.checks.findings import Context, Finding
from hinge.data.resolution import fit_array
from hinge.data.tissue_detection import tissue_mask

ORIENTATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as it is": lambda pixels: pixels,
    "turned by 90° to the left": lambda pixels: np.rot90(pixels),
    "turned by 180°": lambda pixels: np.rot90(pixels, 2),
    "turned by 90° to the right": lambda pixels: np.rot90(pixels, 3),
    "mirrored left to right": lambda pixels: pixels[:, ::-1],
    "mirrored top to bottom": lambda pixels: pixels[::-1],
    "mirrored along the diagonal": lambda pixels: np.swapaxes(pixels, 0, 1),
    "mirrored along the other diagonal": lambda pixels: np.swapaxes(pixels[::-1, ::-1], 0, 1),
}
"""The eight ways to lay an image on its own frame."""

_LEAST_ON_TISSUE = 0.5
_BETTER_TURNED = 0.2
_MOST_OFF_ARRAY = 0.5  # array columns; printed spots of older arrays are up to a fifth away
_LIBRARY_COLUMNS = (
    *("library_id", "library", "library_name", "sample", "sample_id", "sample_name", "slide", "slide_id", "slide_name"),
    *("section", "section_id", "section_name", "slice", "slice_id", "capture_area", "orig.ident", "batch"),
)
_MOST_SHARED = 0.05  # of the spots at a place of the array that another spot has
_MOST_NOT_ON_TISSUE = 0.02


def thumbnail_of(slide: AnnData) -> np.ndarray | None:
    """Return the thumbnail of a slide's image, uint8 (h, w, 3), None without one."""
    try:
        return np.asarray(next(iter(slide.uns["spatial"].values()))["images"]["hires"])
    except (KeyError, TypeError, AttributeError, StopIteration):
        return None


def spots_on_thumbnail(slide: AnnData, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return x and y of the spots in pixels of the thumbnail."""
    scales = next(iter(slide.uns["spatial"].values()))["scalefactors"]
    x, y = np.asarray(slide.obsm["spatial"], dtype=np.float64).T * float(scales["tissue_hires_scalef"])
    return x, y


def mask_of(slide: AnnData) -> np.ndarray | None:
    """Return the mask of tissue on the thumbnail, None where it tells nothing: no image, no tissue, or no glass."""
    small = thumbnail_of(slide)
    facts = slide.uns["hinge"]
    um_per_px = float(facts.get("um_per_px", math.nan))
    if small is None or not facts.get("image_path") or not um_per_px > 0:
        return None
    scale = float(next(iter(slide.uns["spatial"].values()))["scalefactors"]["tissue_hires_scalef"])
    every = min(max(1, int(10 * scale / um_per_px)), max(1, min(small.shape[:2]) // 8))
    mask = tissue_mask(small[::every, ::every], every * um_per_px / scale)
    mask = np.repeat(np.repeat(mask, every, axis=0), every, axis=1)[: small.shape[0], : small.shape[1]]
    return mask if 0.005 < mask.mean() < 0.97 else None


def share_on_tissue(slide: AnnData, mask: np.ndarray, exchanged: bool = False) -> float:
    """Return the share of spots whose centres lie on the mask, as they are or with x and y exchanged."""
    x, y = spots_on_thumbnail(slide, mask.shape)
    x, y = (y, x) if exchanged else (x, y)
    return _share(mask, x / mask.shape[1], y / mask.shape[0])


def _share(mask: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
    """Return the share of places, in units of the frame, that lie on the mask."""
    column, row = (x * mask.shape[1]).astype(int), (y * mask.shape[0]).astype(int)
    inside = (column >= 0) & (row >= 0) & (column < mask.shape[1]) & (row < mask.shape[0])
    return float((mask[row[inside], column[inside]]).sum() / max(len(x), 1))


def on_tissue(slide: AnnData, context: Context) -> Iterator[Finding]:
    """Find spots on glass, and an orientation of the image in which they lie on tissue."""
    facts = slide.uns["hinge"]
    mask = None if facts.get("source_format") == "image" else mask_of(slide)
    if mask is None:
        return
    x, y = spots_on_thumbnail(slide, mask.shape)
    x, y = x / mask.shape[1], y / mask.shape[0]
    shares = {how: _share(turn(mask), x, y) for how, turn in ORIENTATIONS.items()}
    shares["with x and y of the positions exchanged"] = share_on_tissue(slide, mask, exchanged=True)
    straight, best = shares["as it is"], max(shares, key=lambda how: shares[how])
    if straight < 0.85 and shares[best] > straight + _BETTER_TURNED:
        yield Finding(
            "error",
            "image-orientation",
            f"{straight:.0%} of the spots lie on tissue, and {shares[best]:.0%} on that of the image {best}",
            "give the image in the orientation that the positions belong to with --image, or correct the positions",
        )
    elif straight < _LEAST_ON_TISSUE:
        yield Finding(
            "error" if straight < _LEAST_ON_TISSUE / 2 else "warning",
            "spots-on-glass",
            f"{straight:.0%} of the {slide.n_obs} spots lie on tissue of the image",
            "give the image of this section with --image, or positions in its full-resolution pixels",
        )


def left_out(slide: AnnData, context: Context) -> Iterator[Finding]:
    """Find spots that are outside the image or marked as off tissue."""
    source = slide.uns["hinge"].get("source", {})
    removed = source.get("left_out", {})
    if outside := int(removed.get("outside", 0)):
        yield Finding(
            "warning",
            "spots-outside",
            f"{outside} of {slide.n_obs + outside} spots lie outside the image and are left out",
            "give the whole image with --image if they belong to it",
        )
    if outside := int(source.get("outside", 0)):
        yield Finding(
            "error",
            "spots-outside",
            f"{outside} of {slide.n_obs} spots lie outside the image",
            "give the image whose full-resolution pixels the positions are with --image",
        )
    if off := int(removed.get("off_tissue", 0)):
        yield Finding(
            "warning",
            "spots-off-tissue",
            f"{off} of {slide.n_obs + off} spots are marked in_tissue = 0 and are left out",
            "remove the column in_tissue to keep them",
        )


def other_sections_barcodes(slide: AnnData, context: Context) -> Iterator[Finding]:
    """Find filtered counts whose barcodes are not those on tissue: positions of another section."""
    source = slide.uns["hinge"].get("source", {})
    barcodes, off = int(source.get("barcodes", 0)), int(source.get("not_on_tissue", 0))
    if off and len(source.get("suffixes", ())) < 2:
        yield Finding(
            "error" if off > _MOST_NOT_ON_TISSUE * barcodes else "warning",
            "barcodes-off-tissue",
            f"{off} of {barcodes} barcodes of the filtered counts are not on tissue in spatial/ (and "
            f"{int(source.get('without_counts', 0))} on tissue have no counts)",
            "put counts and spatial/ of the same section together: barcodes are the same on every slide",
        )


def array(slide: AnnData, context: Context) -> Iterator[Finding]:
    """Find positions that do not follow their array, and spots at the same place."""
    places = np.asarray(slide.obsm["spatial"], dtype=np.float64)
    repeated = slide.n_obs - len(np.unique(places.round(3), axis=0))
    if repeated:
        yield Finding(
            "error" if repeated > 0.05 * slide.n_obs else "warning",
            "spots-repeated",
            f"{repeated} of {slide.n_obs} spots lie where another spot does",
            "give one section, with a position for each spot",
        )
    if not {"array_row", "array_col"} <= set(slide.obs):
        return
    try:
        fit = fit_array(slide.obs[["array_row", "array_col"]].to_numpy(np.float64), places)
    except (TypeError, ValueError):
        return
    if fit and fit.residual > _MOST_OFF_ARRAY:
        yield Finding(
            "error" if fit.residual > 2 else "warning",
            "spots-array",
            f"positions are {fit.residual:.1f} array columns from where array_row and array_col put them",
            "take positions and array coordinates of the same section, in the order of the barcodes",
        )


def one_section(slide: AnnData, context: Context) -> Iterator[Finding]:
    """Find several sections or libraries in one table."""
    source = slide.uns["hinge"].get("source", {})
    found = [str(suffix) for suffix in source.get("suffixes", ())]
    what = "barcodes of the samples -" + ", -".join(found)
    if len(found) < 2:
        found, what = _libraries(slide, source)
    shared = _sharing_a_place(slide)
    if len(found) < 2 and shared > _MOST_SHARED * slide.n_obs:
        yield Finding(
            "error",
            "several-sections",
            f"{shared} of {slide.n_obs} spots have the array_row and array_col of another spot, as spots of several "
            "sections have",
            "write one file for each section, with its own image",
        )
    if len(found) > 1:
        yield Finding(
            "error",
            "several-sections",
            f"the table has {len(found)} sections: {what}",
            "write one file for each section, with its own image",
        )


def _sharing_a_place(slide: AnnData) -> int:
    """Return the number of spots whose place on the array another spot has, 0 without an array."""
    if not {"array_row", "array_col"} <= set(slide.obs):
        return 0
    return int(slide.obs[["array_row", "array_col"]].duplicated().sum())


def _libraries(slide: AnnData, source: dict) -> tuple[list[str], str]:
    """Return the names of the libraries in a table, and where they stand."""
    columns = {str(column).lower(): column for column in slide.obs}
    for name in _LIBRARY_COLUMNS:
        if name in columns:
            values = [str(value) for value in slide.obs[columns[name]].dropna().unique()]
            if len(values) > 1 and len(values) <= max(20, slide.n_obs // 20):
                return values, f"{', '.join(values[:5])} in the column {columns[name]}"
            if len(values) == 1:
                return [], ""
    endings = [re.search(r"^[ACGT]{14,}(-\d+(?:-\d+)?)$", name) for name in slide.obs_names]
    suffixes = sorted({match[1] for match in endings if match})
    if len(suffixes) > 1 and all(endings):
        return suffixes, f"barcodes ending in {', '.join(suffixes[:5])}"
    libraries = [str(name) for name in source.get("libraries", ())]
    return libraries, f"{', '.join(libraries[:5])} in uns['spatial']"


PLACEMENT_CHECKS: tuple[Callable[[AnnData, Context], Iterator[Finding]], ...] = (
    left_out,
    on_tissue,
    other_sections_barcodes,
    array,
    one_section,
)
