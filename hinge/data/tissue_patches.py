"""Patches from the tissue of many slides, without spots, for the pre-training of an encoder."""

import math
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from anndata import AnnData
from tqdm import tqdm

from hinge.data.slide import slide_name
from hinge.data.slide_image import SlideImage
from hinge.data.tissue_detection import find_tissue, lay_spots
from hinge.utils.errors import ConfigError, DataError

MAX_OPEN = 32  # images a process keeps open at a time


class TissuePatches:
    """Read patches at places on the tissue of slides.

    Places form a square grid over each slide; those with less than half of a patch on tissue are left out. `read` may
    shift each place within its cell of the grid, so that all tissue is covered over the epochs. Images are opened when
    they are first read, so that an object without open images can be sent to another process.

    Parameters
    ----------
    slides
        Slides with images; counts are not used.
    patch_um
        Side of a patch in µm.
    patch_px
        Side of a patch in pixels.
    pitch_um
        Distance between places in µm; None for half a patch.

    Raises
    ------
    ConfigError
        If a size is not positive.
    DataError
        If a slide has no image or resolution, or none shows tissue.

    Attributes
    ----------
    coords
        (n, 2) places in full-resolution pixels x, y.
    slide
        (n,) number of the slide of each place.
    """

    def __init__(self, slides: Sequence[AnnData], patch_um: float, patch_px: int, pitch_um: float | None = None):
        pitch_um = patch_um / 2 if pitch_um is None else pitch_um
        if not (patch_um > 0 and patch_px >= 1 and pitch_um > 0):
            raise ConfigError(f"patches need sides above 0, not {patch_um} µm, {patch_px} px and {pitch_um} µm apart")
        self.patch_um, self.patch_px, self.pitch_um = float(patch_um), int(patch_px), float(pitch_um)
        self.paths, self.um_per_px = [], []
        coords, numbers = [], []
        for number, slide in enumerate(tqdm(slides, desc="tissue", unit="slide", disable=None)):
            facts = slide.uns["hinge"]
            path, resolution = facts.get("image_path"), float(facts.get("um_per_px", math.nan))
            if not path or not (math.isfinite(resolution) and resolution > 0):
                raise DataError(f"slide {slide_name(slide)} has no image or no resolution, and patches need both")
            self.paths.append(path)
            self.um_per_px.append(resolution)
            with SlideImage(path) as image:
                size, mask = image.dimensions, find_tissue(image, resolution)
            cells = lay_spots(mask, size, pitch_um / resolution, patch_um / resolution)
            shape = [max(1, math.floor(side * resolution / pitch_um)) for side in size]
            coords.append((np.asarray(size) + (2 * cells + 1 - np.asarray(shape)) * pitch_um / resolution) / 2)
            numbers.append(np.full(len(cells), number))
        self.coords = np.concatenate(coords) if coords else np.zeros((0, 2))
        self.slide = np.concatenate(numbers) if numbers else np.zeros(0, dtype=int)
        if not len(self.coords):
            raise DataError(f"no tissue was found on {len(self.paths)} slides")
        self._open: OrderedDict[int, SlideImage] = OrderedDict()

    def __len__(self) -> int:
        return len(self.coords)

    def read(self, rows: np.ndarray, shift: np.ndarray | None = None) -> np.ndarray:
        """Return patches at some places.

        Parameters
        ----------
        rows
            (b,) numbers of places.
        shift
            (b, 2) shift of each place in x and y in units of the grid's pitch, -0.5…0.5; None for no shift.

        Returns
        -------
        numpy.ndarray
            RGB, uint8 (b, patch_px, patch_px, 3); white outside the image.
        """
        patches = np.empty((len(rows), self.patch_px, self.patch_px, 3), dtype=np.uint8)
        # slide by slide, so that few images are open at a time
        for i in np.argsort(self.slide[rows], kind="stable"):
            number = int(self.slide[rows[i]])
            resolution = self.um_per_px[number]
            center = self.coords[rows[i]]
            if shift is not None:
                center = center + np.asarray(shift[i], dtype=np.float64) * self.pitch_um / resolution
            patches[i] = self._image(number).read_region(center, self.patch_um, self.patch_px, resolution)
        return patches

    def close(self) -> None:
        """Close the images."""
        while self._open:
            self._open.popitem()[1].close()

    def _image(self, number: int) -> SlideImage:
        if number not in self._open:
            if len(self._open) >= MAX_OPEN:
                self._open.popitem(last=False)[1].close()
            self._open[number] = SlideImage(self.paths[number])
        self._open.move_to_end(number)
        return self._open[number]
