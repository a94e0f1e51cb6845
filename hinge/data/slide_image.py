"""Whole-slide images: read any region at any resolution.

Pyramidal scans (SVS, NDPI, MRXS, tiled TIFF and the other formats of OpenSlide), OME-TIFF and OME-Zarr are read
tile by tile; all other images (JPEG, PNG, striped TIFF) are decoded once by Pillow and cropped from memory.
"""

import contextlib
import math
import re
import struct
import threading
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import openslide
from PIL import Image

from hinge.data.image_pyramids import open_arrays, open_strips, reduce_by_bands
from hinge.data.tiff_facts import TiffFacts, tiff_facts
from hinge.utils.errors import DataError
from hinge.utils.packages import require
from hinge.utils.safe_hdf5 import UNPACKED_ANYWAY, check_size

# Endings under which a slide's image is looked for, whole-slide formats first.
IMAGE_SUFFIXES = (
    *(".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".svslide", ".bif"),
    *(".ome.tif", ".ome.tiff", ".tif", ".tiff", ".btf", ".png", ".jpg", ".jpeg"),
)

# Pillow's limit of 89 megapixels is below the size of ordinary slides. An image that is decoded whole may have
# a gigapixel (4 GB in memory); images that are read by tile have no limit.
MAX_DECODED_PIXELS = 1_000_000_000

# A TIFF without tiles of more pixels is not decoded whole (three bytes a pixel) to make a thumbnail.
DECODED_FOR_THUMBNAIL = 60_000_000

# Longest side of a region in pixels of its level; a longer one means a wrong resolution.
MAX_REGION_PX = 9_000

# The resolution tags of a TIFF are often a printer's default (72 dpi is 353 µm/px): used in this range only.
PLAUSIBLE_UM_PER_PX = (0.05, 10.0)

_pillow_limit_lock = threading.RLock()


class SlideImage:
    """One slide's full-resolution image.

    Safe to use from several threads at once. Use it as a context manager or call `close`.

    Parameters
    ----------
    path
        Image file: any format of OpenSlide or Pillow, or OME-TIFF, with 8 bits a channel; or the folder of an
        OME-Zarr image.

    Raises
    ------
    DataError
        The file is missing, damaged or not an image, does not have 8 bits a channel, or is not tiled and has more
        than `MAX_DECODED_PIXELS`.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._decode_lock = threading.Lock()
        self._flat: Image.Image | None = None
        self._decoded = False
        self._pyramid: openslide.OpenSlide | None = None
        if not self.path.exists():
            raise DataError(f"there is no image file {self.path}")
        with self._damage_named():
            # before OpenSlide, which sees neither the levels nor the channels that OME-TIFF keeps apart
            self._arrays = open_arrays(self.path)
            if self._arrays:
                self._check_overview()
                return
            if self.path.is_dir():
                raise DataError(f"{self.path} is a folder but not an OME-Zarr image")
            if openslide.OpenSlide.detect_format(self.path):
                self._pyramid = openslide.OpenSlide(self.path)
                self._check_overview()
            else:
                self._flat = self._open_flat()

    @property
    def dimensions(self) -> tuple[int, int]:
        """Width and height in full-resolution pixels."""
        return (self._arrays or self._pyramid).dimensions if self._flat is None else self._flat.size

    @property
    def um_per_px(self) -> float | None:
        """Microns per full-resolution pixel in the metadata of the file, None if absent or implausible."""
        value = self.resolution[1]
        return value if PLAUSIBLE_UM_PER_PX[0] <= value <= PLAUSIBLE_UM_PER_PX[1] else None

    @property
    def resolution(self) -> tuple[str, float]:
        """Where the file has its resolution, and µm per pixel there.

        "image" stands for a scanner's or OME's metadata, "tag" for the resolution tags of a TIFF, which many programs
        fill with a printer's default or keep when they resize; NaN if there is none.
        """
        if self._arrays and self._arrays.um_per_px:
            return "image", self._arrays.um_per_px
        if self._pyramid:
            vendor = self._pyramid.properties.get(openslide.PROPERTY_NAME_VENDOR)
            value = float(self._pyramid.properties.get(openslide.PROPERTY_NAME_MPP_X) or math.nan)
            return "tag" if vendor == "generic-tiff" else "image", value
        return "tag", self.tags.um_per_px if self.tags else math.nan

    @cached_property
    def tags(self) -> TiffFacts | None:
        """The tags of a plain TIFF, None for other formats."""
        if self._pyramid and self._pyramid.properties.get(openslide.PROPERTY_NAME_VENDOR) != "generic-tiff":
            return None
        return tiff_facts(self.path)

    @property
    def channels(self) -> int:
        """Channels as stored: 1 for grey, 3 for RGB, 4 with alpha."""
        if self._arrays:
            return self._arrays.channels
        if self.tags:
            return 3 if self.tags.palette else self.tags.channels
        if self._pyramid:
            return 3
        return {"1": 1, "L": 1, "LA": 1, "P": 3, "PA": 3}.get(self._flat.mode, len(self._flat.getbands()))

    @property
    def orientation(self) -> int:
        """The tag that says how a camera turned the picture; 1 if it did not. Pixels are read as they are stored."""
        if self.tags:
            return self.tags.orientation
        return int(self._flat.getexif().get(274, 1)) if self._flat is not None else 1

    def read_region(
        self, center_xy_px: tuple[float, float] | np.ndarray, size_um: float, size_px: int, um_per_px: float
    ) -> np.ndarray:
        """Read a square region and resample it to a given number of pixels.

        The pyramid level at or just finer than the target resolution is read; the square's corner lies on a
        whole pixel of that level, so that a square at the level's own resolution is an exact crop. Everything
        else is resampled bicubically with antialiasing. Pixels outside the image are white.

        Parameters
        ----------
        center_xy_px
            Centre x, y in full-resolution pixels; may lie outside the image.
        size_um
            Side of the square in µm.
        size_px
            Side of the result in pixels.
        um_per_px
            Microns per full-resolution pixel of this image.

        Returns
        -------
        numpy.ndarray
            RGB, uint8 (size_px, size_px, 3).

        Raises
        ------
        DataError
            The image is damaged in this region, or the region is wider than `MAX_REGION_PX`.
        """
        if not (size_um > 0 and size_px > 0 and um_per_px > 0):
            raise ValueError(f"sizes must be positive, not {size_um=}, {size_px=}, {um_per_px=}")
        side = size_um / um_per_px
        level, downsample = self._choose_level(side / size_px)
        side /= downsample
        if abs(side - size_px) < 1e-3:  # 224 and not 224.00000000000003
            side = size_px
        left, top = (round(float(c) / downsample - side / 2) for c in center_xy_px)
        # the neighbours that the resampling kernel reaches for: a patch's border is as good as its middle
        margin = math.ceil(2 * side / size_px) if side != size_px else 0
        width = math.ceil(side) + 2 * margin
        if width > MAX_REGION_PX:
            raise DataError(
                f"a region of {size_um:g} µm at {um_per_px:g} µm per pixel is {width} pixels wide "
                f"in {self.path}, and at most {MAX_REGION_PX} can be read at once; check --um-per-px"
            )
        with self._damage_named():
            crop = self._crop(left - margin, top - margin, width, width, level, downsample)
        if side != size_px:
            box = (margin, margin, margin + side, margin + side)
            crop = crop.resize((size_px, size_px), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
        return np.asarray(crop)

    def read_pixels(self, left: int, top: int, width: int, height: int) -> np.ndarray:
        """Return a rectangle of full-resolution pixels, white outside the image.

        Returns
        -------
        numpy.ndarray
            RGB, uint8 (height, width, 3).
        """
        with self._damage_named():
            return np.asarray(self._crop(left, top, width, height, 0, 1.0))

    @property
    def level_dimensions(self) -> list[tuple[int, int]]:
        """Width and height of each level of the image's own pyramid, finest first."""
        if self._arrays:
            return self._arrays.level_dimensions
        return list(self._pyramid.level_dimensions) if self._pyramid else [self.dimensions]

    def read_level(self, left: int, top: int, width: int, height: int, level: int) -> Image.Image:
        """Return a rectangle in pixels of a level, RGB, white outside the image."""
        with self._damage_named():
            return self._crop(left, top, width, height, level, self.dimensions[0] / self.level_dimensions[level][0])

    def thumbnail(self, max_px: int) -> np.ndarray:
        """Return the whole image with its long side reduced to at most `max_px`.

        Returns
        -------
        numpy.ndarray
            RGB, uint8 (h, w, 3).
        """
        with self._damage_named():
            if self._arrays:
                small = self._arrays.thumbnail(max_px)
            elif self._pyramid:
                small = self._thumbnail_of_pyramid(max_px)
            elif self._decoded:
                small = self._flat.copy()
            else:  # a fresh handle: Pillow decodes a JPEG directly at reduced size
                small = self._thumbnail_of_strips(max_px) or self._open_flat()
            with _no_pillow_limit():
                small.thumbnail((max_px, max_px), reducing_gap=3.0)
            return np.asarray(_to_rgb(small))

    @property
    def decoded_bytes(self) -> int:
        """Memory of the decoded pixels: four bytes each, as Pillow stores RGB, and 0 if tiles are read."""
        return 0 if self._flat is None else 4 * self._flat.width * self._flat.height

    def release(self) -> None:
        """Release the decoded pixels; they are decoded again when they are needed."""
        # where the file is not there any more, the pixels are kept
        with self._decode_lock, contextlib.suppress(OSError, DataError):
            if self._decoded:
                self._flat, self._decoded = self._open_flat(), False

    def close(self) -> None:
        """Release the file and the decoded pixels."""
        for image in (self._arrays, self._pyramid, self._flat):
            if image is not None:
                image.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _choose_level(self, downsample: float) -> tuple[int, float]:
        """Return the coarsest level that is not coarser than `downsample`, and its own downsample factor."""
        # downsampling factors are seldom exact powers: accept 4.0003 for 4
        if self._arrays:
            level = self._arrays.choose_level(downsample * 1.01)
            return level, self._arrays.level_downsamples[level]
        if not self._pyramid:
            return 0, 1.0
        level = self._pyramid.get_best_level_for_downsample(downsample * 1.01)
        return level, self._pyramid.level_downsamples[level]

    def _thumbnail_of_pyramid(self, max_px: int) -> Image.Image:
        # not OpenSlide's own, which holds a whole level: all of it where a scan has only one
        level = self._pyramid.get_best_level_for_downsample(max(self.dimensions) / max_px)
        size, downsample = self._pyramid.level_dimensions[level], self._pyramid.level_downsamples[level]

        def read(top: int, rows: int) -> Image.Image:
            return _to_rgb(self._pyramid.read_region((0, round(top * downsample)), level, (size[0], rows)))

        return reduce_by_bands(size, max_px, read)

    def _thumbnail_of_strips(self, max_px: int) -> Image.Image | None:
        """Return the thumbnail of a large RGB TIFF without tiles, read in bands of rows; None for other images."""
        large = self._flat.width * self._flat.height > DECODED_FOR_THUMBNAIL
        strips = open_strips(self.path) if large and self.tags and self._flat.mode == "RGB" else None
        if strips is None:
            return None
        try:
            return strips.thumbnail(max_px)
        finally:
            strips.close()

    def _crop(self, left: int, top: int, width: int, height: int, level: int, downsample: float) -> Image.Image:
        """Return a rectangle in pixels of one level, white outside the image."""
        if self._arrays:
            return self._arrays.crop(left, top, width, height, level)
        if self._pyramid:
            corner = (round(left * downsample), round(top * downsample))
            return _to_rgb(self._pyramid.read_region(corner, level, (width, height)))
        with self._decode_lock:
            if not self._decoded:
                with _no_pillow_limit():
                    self._flat = _to_rgb(self._flat)
                self._decoded = True
            flat = self._flat  # another thread may release it
        image_width, image_height = flat.size
        inside = (max(left, 0), max(top, 0), min(left + width, image_width), min(top + height, image_height))
        if inside == (left, top, left + width, top + height):
            return flat.crop(inside)
        canvas = Image.new("RGB", (width, height), "white")
        if inside[0] < inside[2] and inside[1] < inside[3]:
            canvas.paste(flat.crop(inside), (inside[0] - left, inside[1] - top))
        return canvas

    def _open_flat(self) -> Image.Image:
        with _no_pillow_limit():
            image = Image.open(self.path)
        pixels = image.width * image.height
        if pixels > MAX_DECODED_PIXELS:
            raise DataError(
                f"{self.path} has {image.width} x {image.height} pixels, and an image without tiles may have "
                f"at most {MAX_DECODED_PIXELS:,}: convert it to a tiled pyramidal TIFF"
            )
        check_size(self.path, self.path.stat().st_size, 3 * pixels)
        if image.mode.startswith(("I", "F")):
            raise DataError(f"{self.path} has pixels of type {image.mode}; an image with 8 bits a channel is needed")
        return image

    def _check_overview(self) -> None:
        """Raise an error if the coarsest level or a tile is too large, since each is held in memory whole."""
        width, height = self.level_dimensions[-1]
        if 3 * width * height > UNPACKED_ANYWAY:
            files = [self.path] if self.path.is_file() else [file for file in self.path.rglob("*") if file.is_file()]
            check_size(self.path, sum(file.stat().st_size for file in files), 3 * width * height)
        # OpenSlide aborts the process if it cannot allocate a tile
        properties = self._pyramid.properties if self._pyramid else {}
        for name, side in properties.items():
            if re.fullmatch(r"openslide\.level\[\d+\]\.tile-(width|height)", name) and int(side) > MAX_REGION_PX:
                raise DataError(f"{self.path} has tiles of {side} pixels, and at most {MAX_REGION_PX} are supported")

    @contextlib.contextmanager
    def _damage_named(self) -> Iterator[None]:
        try:
            yield
        except DataError:
            raise
        # imagecodecs raises RuntimeErrors; damaged metadata lack keys or hold values of other types
        except (
            *(OSError, SyntaxError, ValueError, LookupError, RuntimeError, openslide.OpenSlideError),
            *(TypeError, AttributeError, ArithmeticError, AssertionError, MemoryError, struct.error),
        ) as error:
            if "'imagecodecs'" in str(error):  # tifffile needs it for this compression
                require("imagecodecs", "ome-tiff", f"reading {self.path}")
            raise DataError(f"{self.path} is damaged or not an image that can be read: {error}") from error


@contextlib.contextmanager
def _no_pillow_limit() -> Iterator[None]:
    """Lift Pillow's limit, which it applies when a file is opened and again when it is decoded."""
    with _pillow_limit_lock:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def image_name(path: Path) -> str:
    """Return the name of an image file without its ending (`.ome.tif` is one ending), "" for other files."""
    for suffix in sorted(IMAGE_SUFFIXES, key=len, reverse=True):
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return ""


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return an image as RGB, white where it is transparent."""
    if image.mode == "RGBA" and image.getextrema()[3] == (255, 255):
        return image.convert("RGB")  # a third of the time of blending
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    if image.mode != "RGB":
        return image.convert("RGB")
    image.load()
    return image
