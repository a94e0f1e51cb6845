"""Deep-zoom tiles of a slide's image, cut on request."""

import io
import threading
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from openslide import AbstractSlide, ImageSlide
from openslide.deepzoom import DeepZoomGenerator
from PIL import Image

from hinge.data import SlideImage

TILE_PX, OVERLAP_PX = 510, 1
JPEG_QUALITY = 82
TILES_KEPT = 400  # of an image in memory, of about 30 kB each
OVERVIEW_PX = 4096  # long side of the level that is added to an image without a level this coarse


class TiledImage:
    """Deep-zoom tiles of one image. Safe to use from several threads at once.

    Parameters
    ----------
    source
        Image file at full resolution, as `SlideImage` takes it, or pixels (h, w, 3), uint8.
    """

    def __init__(self, source: str | Path | NDArray[np.uint8]):
        if isinstance(source, np.ndarray):
            self._slide: AbstractSlide = ImageSlide(Image.fromarray(source))
        else:
            self._slide = _Levels(SlideImage(source))
        self._tiles = DeepZoomGenerator(self._slide, TILE_PX, OVERLAP_PX)
        self._cut_once = lru_cache(TILES_KEPT)(self._cut)

    @property
    def dimensions(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self._slide.dimensions

    @property
    def level_tiles(self) -> tuple[tuple[int, int], ...]:
        """Columns and rows of tiles at each level, coarsest first."""
        return self._tiles.level_tiles

    def tile(self, level: int, column: int, row: int) -> bytes | None:
        """Return a tile as JPEG, None if there is none."""
        if level >= len(self.level_tiles):
            return None
        columns, rows = self.level_tiles[level]
        if column >= columns or row >= rows:
            return None
        return self._cut_once(level, column, row)

    def _cut(self, level: int, column: int, row: int) -> bytes:
        file = io.BytesIO()
        self._tiles.get_tile(level, (column, row)).save(file, "JPEG", quality=JPEG_QUALITY)
        return file.getvalue()

    def descriptor(self) -> bytes:
        """Return the DZI file, which describes the tiles to other programs."""
        return self._tiles.get_dzi("jpeg").encode()

    @property
    def decoded_bytes(self) -> int:
        """Memory of the decoded pixels of an image without tiles, 0 for others."""
        return self._slide.image.decoded_bytes if isinstance(self._slide, _Levels) else 0

    def release(self) -> None:
        """Release the decoded pixels of an image without tiles; they are decoded again when they are needed."""
        if isinstance(self._slide, _Levels):
            self._slide.image.release()

    def close(self) -> None:
        """Release the file."""
        self._slide.close()


class _Levels(AbstractSlide):
    """A SlideImage with the interface of OpenSlide, and an overview below its coarsest level."""

    def __init__(self, image: SlideImage):
        super().__init__()
        self.image = image
        self._sizes = list(image.level_dimensions)
        self._overview: Image.Image | None = None
        self._lock = threading.Lock()
        # without the overview, each coarse tile of an image without a pyramid would read the whole image
        if max(self._sizes[-1]) > OVERVIEW_PX:
            shrink = OVERVIEW_PX / max(image.dimensions)
            width, height = (max(1, round(side * shrink)) for side in image.dimensions)
            self._sizes.append((width, height))

    @classmethod
    def detect_format(cls, filename: Any) -> None:
        return None

    def close(self) -> None:
        self.image.close()

    @property
    def level_count(self) -> int:
        return len(self._sizes)

    @property
    def level_dimensions(self) -> tuple[tuple[int, int], ...]:
        return tuple(self._sizes)

    @property
    def level_downsamples(self) -> tuple[float, ...]:
        return tuple(self._sizes[0][0] / width for width, _ in self._sizes)

    @property
    def properties(self) -> Mapping[str, str]:
        return MappingProxyType({})

    @property
    def associated_images(self) -> Mapping[str, Image.Image]:
        return MappingProxyType({})

    def get_best_level_for_downsample(self, downsample: float) -> int:
        # downsampling factors are seldom exact powers: accept 4.0003 for 4
        return max(level for level, own in enumerate(self.level_downsamples) if own <= max(1.0, downsample) * 1.01)

    def read_region(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Image.Image:
        left, top = (round(place / self.level_downsamples[level]) for place in location)
        with self._lock:
            # first: the thumbnail of an image that is decoded whole is made of a copy of it
            if self._overview is None and len(self._sizes) > len(self.image.level_dimensions):
                small = Image.fromarray(self.image.thumbnail(OVERVIEW_PX))
                self._overview = small.resize(self._sizes[-1]).convert("RGBA")
        if level < len(self.image.level_dimensions):
            return self.image.read_level(left, top, *size, level).convert("RGBA")
        return self._overview.crop((left, top, left + size[0], top + size[1]))
