"""Patches: squares of tissue around spots, read in background threads."""

import math
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import numpy as np
from anndata import AnnData

from hinge.data.slide import slide_name
from hinge.data.slide_image import SlideImage
from hinge.utils.errors import ConfigError, DataError


class PatchReader:
    """Read batches of patches centred on a slide's spots.

    Iterating gives pairs of `indices`, int (b,), the spots' places in the slide, and `patches`, RGB uint8
    (b, H, W, 3) with H = W = `patch_px`. Every spot is read once. Spots close to each other are read together, so that
    a tile of the image is decoded few times; the order is not the slide's. Pixels outside the image are white. At most
    `workers + 1` batches exist at any time, however large the slide.

    Parameters
    ----------
    slide
        A slide with image.
    patch_um
        Side of a patch in µm.
    patch_px
        Side of a patch in pixels.
    batch_size
        Spots in a batch; the last one may be smaller.
    workers
        Threads that read, each one batch.

    Raises
    ------
    ConfigError
        If a size is not positive.
    DataError
        If the slide has no image, or while iterating if the image is missing or damaged.
    """

    def __init__(self, slide: AnnData, patch_um: float, patch_px: int, batch_size: int = 64, workers: int = 2) -> None:
        if not (math.isfinite(patch_um) and patch_um > 0 and patch_px >= 1):
            raise ConfigError(f"a patch needs a side above 0, not {patch_um} µm and {patch_px} px")
        if batch_size < 1 or workers < 1:
            raise ConfigError(f"reading patches needs batch_size and workers above 0, not {batch_size} and {workers}")
        name = slide_name(slide)
        facts = slide.uns["hinge"]
        if not facts.get("image_path"):
            raise DataError(f"slide {name} has no image, and patches need one: give --image")
        um_per_px = float(facts.get("um_per_px", math.nan))
        if not (math.isfinite(um_per_px) and um_per_px > 0):
            raise DataError(
                f"slide {name} has {um_per_px} µm per pixel, and patches need a positive number: give --um-per-px "
            )
        self.image_path = facts["image_path"]
        self.um_per_px = um_per_px
        self.patch_um, self.patch_px = float(patch_um), int(patch_px)
        self.batch_size, self.workers = batch_size, workers
        self.coords = np.asarray(slide.obsm["spatial"], dtype=np.float64)
        band = self.coords[:, 1] // (self.patch_um / self.um_per_px)
        self.order = np.lexsort((self.coords[:, 0], band))

    def __len__(self) -> int:
        """Return the number of batches."""
        return math.ceil(len(self.order) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return self.read([self.order])

    def read(self, parts: Sequence[np.ndarray]) -> Generator[tuple[np.ndarray, np.ndarray], None, None]:
        """Yield batches of some spots, given as parts of indices; a batch holds spots of one part.

        `order` (n,) is the order in which reading is fastest.
        """
        size = self.batch_size
        batches = iter([part[start : start + size] for part in parts for start in range(0, len(part), size)])
        with SlideImage(self.image_path) as image, ThreadPoolExecutor(self.workers) as pool:
            waiting: deque[tuple[np.ndarray, Future]] = deque()
            try:
                for indices in islice(batches, self.workers):
                    waiting.append((indices, pool.submit(self._read, image, indices)))
                while waiting:
                    indices, future = waiting.popleft()
                    patches = future.result()
                    for following in islice(batches, 1):
                        waiting.append((following, pool.submit(self._read, image, following)))
                    yield indices, patches
            finally:  # the caller stopped early, or a batch failed: do not read the rest
                for _, future in waiting:
                    future.cancel()

    def _read(self, image: SlideImage, indices: np.ndarray) -> np.ndarray:
        patches = np.empty((len(indices), self.patch_px, self.patch_px, 3), dtype=np.uint8)
        for patch, center in zip(patches, self.coords[indices], strict=True):
            patch[:] = image.read_region(center, self.patch_um, self.patch_px, self.um_per_px)
        return patches


def dihedral_views(batch: np.ndarray, n: int = 8) -> Iterator[np.ndarray]:
    """Yield the flips and rotations by 90° of a batch of patches.

    Parameters
    ----------
    batch
        (B, H, W, C) with H = W.
    n
        1 for the patch alone, 8 for all symmetries of the square.

    Yields
    ------
    numpy.ndarray
        (B, H, W, C), of views 0...n - 1: view 0 is the batch itself, view k < 4 is turned by k quarters
        counter-clockwise, view k + 4 is view k mirrored left to right.

    Raises
    ------
    ConfigError
        If `n` is neither 1 nor 8.
    """
    if n not in (1, 8):
        raise ConfigError(f"a patch has 1 or 8 views, not {n}")
    for view in range(n):
        turned = np.rot90(batch, view % 4, axes=(1, 2))
        yield np.ascontiguousarray(turned[:, :, ::-1] if view >= 4 else turned)
