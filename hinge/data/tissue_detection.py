"""Detect tissue in an H&E image, and make a slide without counts with a grid of spots on the tissue."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse
from anndata import AnnData
from scipy.ndimage import uniform_filter
from skimage.filters import apply_hysteresis_threshold, gaussian, threshold_otsu
from skimage.morphology import remove_small_holes, remove_small_objects

from hinge.data.resolution import choose_resolution
from hinge.data.slide import describe_slide
from hinge.data.slide_image import SlideImage, image_name
from hinge.utils.errors import DataError

# defaults: spot pitch and diameter of Visium
DEFAULT_PITCH_UM, DEFAULT_DIAMETER_UM = 100.0, 55.0

_MASK_UM = 10.0  # side of a pixel of the mask
_BLUR_UM = 20.0
_MOST_SPOTS = 10_000_000  # on one image; a bin of 2 µm on a slide of 6.5 mm makes as many
_SMALLEST_MM2 = 0.02  # smaller pieces are debris, smaller holes belong to the tissue
_GLASS_DENSITY = 0.25  # glass absorbs less green than this (natural logarithm), the palest tissue more
_LEAST_CONTRAST = 0.05  # in green density, between tissue and glass
_LEAST_SATURATION = 0.04  # shadows, dust and black borders have less
_INK_MARGIN = 8  # green above red by more: marker ink, no stain of H&E


def find_tissue(image: SlideImage, um_per_px: float) -> np.ndarray:
    """Return the mask of tissue in an H&E image.

    Both stains absorb green, so that tissue has a high density in green. Otsu's threshold on the blurred density gives
    the core of the mask. The mask grows by hysteresis into adjoining pixels whose density is nearer to the tissue than
    to the glass, so that pale stroma and fat are kept. Grey pixels (shadows, dust, black borders) and marker ink count
    as glass.

    Parameters
    ----------
    image
        The slide's image.
    um_per_px
        Microns per full-resolution pixel.

    Returns
    -------
    numpy.ndarray
        bool (h, w), the whole image at about 10 µm a pixel; all False if nothing is stained, all True if the image
        shows no glass.
    """
    width, height = image.dimensions
    small = image.thumbnail(max(16, math.ceil(max(width, height) * um_per_px / _MASK_UM)))
    return tissue_mask(small, width * um_per_px / small.shape[1])


def tissue_mask(small: np.ndarray, step_um: float) -> np.ndarray:
    """Return the mask of tissue, bool (h, w), in a small RGB image (h, w, 3) with `step_um` µm per pixel.

    `find_tissue` describes the method.
    """
    colour = small.astype(np.float32)
    brightest = colour.max(axis=2)
    saturation = (brightest - colour.min(axis=2)) / np.maximum(brightest, 1)
    no_stain = (saturation < _LEAST_SATURATION) | (colour[..., 1] > colour[..., 0] + _INK_MARGIN) | (brightest < 40)
    density = np.where(no_stain, 0, -np.log((colour[..., 1] + 1) / 256))
    density = gaussian(density, _BLUR_UM / step_um)
    if np.ptp(density) < _LEAST_CONTRAST:
        return np.full(density.shape, bool(density.mean() > _GLASS_DENSITY))
    sure = threshold_otsu(density)
    pale, dense = np.median(density[density <= sure]), np.median(density[density > sure])
    if pale > _GLASS_DENSITY:
        return np.ones(density.shape, bool)
    if dense - pale < _LEAST_CONTRAST:
        return np.zeros(density.shape, bool)
    mask = apply_hysteresis_threshold(density, (pale + sure) / 2, sure)
    smallest = round(_SMALLEST_MM2 * 1e6 / step_um**2)
    return remove_small_holes(remove_small_objects(mask, max_size=smallest), max_size=smallest)


def lay_spots(mask: np.ndarray, dimensions: tuple[int, int], pitch_px: float, diameter_px: float) -> np.ndarray:
    """Return a square grid of spots, centred on the image, that lie at least half on tissue.

    Parameters
    ----------
    mask
        bool (h, w) over the whole image, as returned by `find_tissue`.
    dimensions
        Width and height of the image in full-resolution pixels.
    pitch_px, diameter_px
        Distance between spots and size of one, in full-resolution pixels.

    Returns
    -------
    numpy.ndarray
        int (n, 2), column and row in the grid; column c of C lies at x = (width + (2c + 1 - C) pitch) / 2.
    """
    if not pitch_px > 0 or dimensions[0] * dimensions[1] > _MOST_SPOTS * pitch_px**2:
        raise DataError(
            f"spots {pitch_px:.3g} pixels apart on {dimensions[0]} x {dimensions[1]} pixels are more than "
            f"{_MOST_SPOTS:,}: check the distance between spots and --um-per-px"
        )
    shape = [max(1, math.floor(side / pitch_px)) for side in dimensions]
    scale = mask.shape[1] / dimensions[0]
    share = uniform_filter(mask.astype(np.float32), max(1, round(diameter_px * scale)))
    columns, rows = (grid.ravel() for grid in np.meshgrid(np.arange(shape[0]), np.arange(shape[1])))
    places = _places(np.stack([columns, rows], axis=1), shape, dimensions, pitch_px)
    x, y = np.minimum((places * scale).astype(int), np.array(mask.shape[::-1]) - 1).T
    on_tissue = share[y, x] >= 0.5
    return np.stack([columns[on_tissue], rows[on_tissue]], axis=1)


def slide_from_image(
    image: str | Path,
    um_per_px: float | None = None,
    spot_pitch_um: float = DEFAULT_PITCH_UM,
    spot_diameter_um: float = DEFAULT_DIAMETER_UM,
    name: str | None = None,
) -> AnnData:
    """Return a slide of an H&E image without counts: spots on a square grid on its tissue, and no genes.

    Parameters
    ----------
    image
        Whole-slide image.
    um_per_px
        Microns per full-resolution pixel; None to read it from the metadata of the image.
    spot_pitch_um, spot_diameter_um
        Distance and diameter of the spots; for a trained model, use those of its training slides.
    name
        Name of the slide; None for the name of the image.

    Returns
    -------
    AnnData
        A slide with n spots named `<column>x<row>` and 0 genes.

    Raises
    ------
    DataError
        The image is missing or damaged, its resolution is unknown, or no tissue is found.
    """
    path = Path(image)
    with SlideImage(path) as opened:
        where, stored = opened.resolution
        known, _, origin = choose_resolution({"option": um_per_px or math.nan, where: stored})
        um_per_px = um_per_px or opened.um_per_px
        if um_per_px is None:
            raise DataError(f"{path} has no resolution in its metadata: give --um-per-px, µm per full-resolution pixel")
        if opened.channels not in (3, 4):
            raise DataError(f"{path} has {opened.channels} channel, and H&E has three: give the H&E image")
        dimensions = opened.dimensions
        mask = find_tissue(opened, um_per_px)
    pitch_px = spot_pitch_um / um_per_px
    cells = lay_spots(mask, dimensions, pitch_px, spot_diameter_um / um_per_px)
    if not len(cells):
        raise DataError(f"no tissue was found in {path} ({mask.mean():.1%} of it looks stained)")
    shape = [max(1, math.floor(side / pitch_px)) for side in dimensions]
    slide = AnnData(
        X=scipy.sparse.csr_matrix((len(cells), 0), dtype=np.float32),
        obs=pd.DataFrame(
            {"array_x": cells[:, 0], "array_y": cells[:, 1]}, index=[f"{column}x{row}" for column, row in cells]
        ),
        obsm={"spatial": _places(cells, shape, dimensions, pitch_px)},
    )
    return describe_slide(
        slide,
        name or image_name(path) or path.name,
        image_path=path,
        um_per_px=um_per_px,
        spot_pitch_um=spot_pitch_um,
        spot_diameter_um=spot_diameter_um,
        source_format="image",
        source={"resolutions": known, "um_per_px_from": origin},
    )


def _places(cells: np.ndarray, shape: list[int], dimensions: tuple[int, int], pitch_px: float) -> np.ndarray:
    """Return full-resolution pixel x, y (n, 2) of columns and rows (n, 2) of a grid centred on the image."""
    return (np.asarray(dimensions) + (2 * cells + 1 - np.asarray(shape)) * pitch_px) / 2
