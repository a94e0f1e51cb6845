"""Image pyramids of chunked arrays: OME-TIFF (through tifffile) and OME-Zarr, also in SpatialData stores."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import tifffile
import zarr
from PIL import Image

from hinge.data.tiff_facts import TIFF_SUFFIXES, tiff_facts
from hinge.utils.errors import DataError
from hinge.utils.safe_hdf5 import inside
from hinge.utils.safe_zarr import CheckedArray

_UM = {"nm": 1e-3, "µm": 1.0, "um": 1.0, "mm": 1e3, "cm": 1e4, "nanometer": 1e-3, "micrometer": 1.0, "millimeter": 1e3}
_BAND_ROWS, _BAND_PIXELS = 2048, 1 << 24


class ArrayPyramid:
    """Levels of one RGB image, finest first.

    Parameters
    ----------
    name
        Name in errors.
    levels
        Arrays with slice access, all with the same `axes`.
    axes
        One letter per axis: Y, X, and C or S for channels; other axes are read at index 0.
    um_per_px
        Microns per pixel of level 0, None if the file does not contain it.
    close
        Called to release the file.

    Raises
    ------
    DataError
        The values do not have 8 bits, or there are not 1, 3 or 4 channels.
    """

    def __init__(
        self, name: str, levels: list[Any], axes: str, um_per_px: float | None, close: Callable[[], None]
    ) -> None:
        self.um_per_px, self.close, self.channels = um_per_px, close, 1
        self._levels, self._axes = levels, axes.upper()
        if "Y" not in self._axes or "X" not in self._axes:
            raise DataError(f"{name} has the axes {axes}, and an image with the axes Y and X is needed")
        long = [axis for axis in "CS" if axis in self._axes and self._size(0, axis) > 1]
        self._channels = long[0] if long else None
        n = self._size(0, self._channels) if self._channels else 1
        self.channels = n
        if len(long) > 1 or n not in (1, 3, 4):
            raise DataError(f"{name} has {n} channels, and an RGB image is needed")
        if levels[0].dtype != np.uint8:
            raise DataError(f"{name} has pixels of type {levels[0].dtype}; an image with 8 bits a channel is needed")
        width = self._size(0, "X")
        self.dimensions = (width, self._size(0, "Y"))
        self.level_dimensions = [(self._size(level, "X"), self._size(level, "Y")) for level in range(len(levels))]
        self.level_downsamples = [width / each[0] for each in self.level_dimensions]

    def choose_level(self, downsample: float) -> int:
        """Return the coarsest level that is not coarser than `downsample`."""
        return max(level for level, factor in enumerate(self.level_downsamples) if factor <= max(downsample, 1.0))

    def crop(self, left: int, top: int, width: int, height: int, level: int) -> Image.Image:
        """Return an RGB rectangle in pixels of a level, white outside the image."""
        right, bottom = (self._size(level, axis) for axis in "XY")
        x = slice(min(max(left, 0), right), min(max(left + width, 0), right))
        y = slice(min(max(top, 0), bottom), min(max(top + height, 0), bottom))
        canvas = np.full((height, width, 3), 255, np.uint8)
        if x.start < x.stop and y.start < y.stop:
            canvas[y.start - top : y.stop - top, x.start - left : x.stop - left] = self._read(level, y, x)
        return Image.fromarray(canvas)

    def thumbnail(self, max_px: int) -> Image.Image:
        """Return the whole image with a long side of `max_px` or up to twice as long, read in bands of rows."""
        level = self.choose_level(max(self.dimensions) / max_px)
        size = self._size(level, "X"), self._size(level, "Y")
        return reduce_by_bands(size, max_px, lambda top, rows: self.crop(0, top, size[0], rows, level))

    def _size(self, level: int, axis: str) -> int:
        return int(self._levels[level].shape[self._axes.index(axis)])

    def _read(self, level: int, y: slice, x: slice) -> np.ndarray:
        """Return RGB (h, w, 3) of a part within a level."""
        taken = {"Y": y, "X": x, self._channels: slice(0, 3)}
        pixels = np.asarray(self._levels[level][tuple(taken.get(axis, 0) for axis in self._axes)])
        if self._channels is None:
            return pixels[..., None]
        order = [axis for axis in self._axes if axis in taken]
        return pixels.transpose([order.index(axis) for axis in ("Y", "X", self._channels)])


def reduce_by_bands(size: tuple[int, int], max_px: int, read: Callable[[int, int], Image.Image]) -> Image.Image:
    """Shrink an image that is read in bands of rows.

    Parameters
    ----------
    size
        Width and height.
    max_px
        The result's long side is this or up to twice as long.
    read
        Function that returns `rows` full rows from `top` on.
    """
    factor = max(1, max(size) // max_px)
    step = factor * max(1, min(_BAND_ROWS, _BAND_PIXELS // size[0]) // factor)
    bands = [read(top, min(step, size[1] - top)).reduce(factor) for top in range(0, size[1], step)]
    return Image.fromarray(np.concatenate([np.asarray(band) for band in bands]))


def open_arrays(path: Path) -> ArrayPyramid | None:
    """Open an OME-TIFF, an OME-Zarr folder, or a TIFF that only tifffile reads; return None for other files.

    Raises
    ------
    DataError
        As `ArrayPyramid`.
    """
    if path.is_dir():
        return _open_ome_zarr(path)
    if path.suffix.lower() not in TIFF_SUFFIXES:
        return None
    try:
        file = tifffile.TiffFile(path)
    except tifffile.TiffFileError:
        return None
    if not file.is_ome and not _only_tifffile_reads(path):
        file.close()
        return None
    try:
        # macro and label images are series of their own; the slide is the largest
        number = max(range(len(file.series)), key=lambda each: _area(file.series[each]))
        series = file.series[number]
        levels = [zarr.open_array(series.aszarr(level=level), mode="r") for level in range(len(series.levels))]
        um_per_px = _ome_um_per_px(file, number) if file.is_ome else None
        return ArrayPyramid(str(path), levels, series.axes, um_per_px, file.close)
    except BaseException:
        file.close()
        raise


def open_strips(path: Path) -> ArrayPyramid | None:
    """Open the largest page of a plain TIFF to be read in bands; return None where tifffile cannot decode it."""
    try:
        file = tifffile.TiffFile(path)
    except (OSError, tifffile.TiffFileError):
        return None
    try:
        series = max(file.series, key=_area)
        arrays = ArrayPyramid(str(path), [zarr.open_array(series.aszarr(), mode="r")], series.axes, None, file.close)
        arrays.crop(0, 0, 1, 1, 0)  # the decoder may be missing
        return arrays
    except Exception:  # Pillow reads the file, or says what is wrong with it
        file.close()
        return None


def _only_tifffile_reads(path: Path) -> bool:
    """Return whether a TIFF of no scanner's vendor needs tifffile; OpenSlide knows the pages of vendors."""
    facts = tiff_facts(path)
    return (
        facts is not None and facts.needs_tifffile and openslide.OpenSlide.detect_format(path) in (None, "generic-tiff")
    )


def _area(series: tifffile.TiffPageSeries) -> int:
    width, height = _size_of(series)
    return width * height


def _size_of(series: tifffile.TiffPageSeries) -> tuple[int, int]:
    """Return width and height; `series.sizes` names its axes otherwise in other versions of tifffile."""
    sides = dict(zip(series.axes, series.shape, strict=True))
    return sides.get("X", 0), sides.get("Y", 0)


def _ome_um_per_px(file: tifffile.TiffFile, number: int) -> float | None:
    """Return the resolution of the image that is the series of this number."""
    images = tifffile.xml2dict(file.ome_metadata)["OME"]["Image"]
    images = images if isinstance(images, list) else [images]
    series = file.series[number]
    sizes = [(int(each["Pixels"].get("SizeX", 0)), int(each["Pixels"].get("SizeY", 0))) for each in images]
    wanted = _size_of(series)
    # the numbers of images and series differ where a file leaves out an image
    if number >= len(images) or sizes[number] != wanted:
        number = sizes.index(wanted) if wanted in sizes else min(number, len(images) - 1)
    pixels = images[number]["Pixels"]
    size, unit = pixels.get("PhysicalSizeX"), _UM.get(pixels.get("PhysicalSizeXUnit", "µm"))
    return None if size is None or unit is None else float(size) * unit


def _open_ome_zarr(path: Path) -> ArrayPyramid | None:
    scales = _multiscales(path)
    if scales is None:
        return None
    axes = [axis["name"] for axis in scales["axes"]]
    datasets = scales["datasets"]
    folders = [inside(path, each["path"], path) for each in datasets]
    levels = [CheckedArray(zarr.open_array(folder, mode="r"), folder) for folder in folders]
    x = axes.index("x")
    # the finest level is the first by the standard, not by every writer
    order = sorted(range(len(levels)), key=lambda number: -levels[number].shape[x])
    unit = next((_UM.get(axis.get("unit", "")) for axis in scales["axes"] if axis["name"] == "x"), None)
    # the whole image may be scaled after its levels are
    steps = [
        float(each["scale"][x])
        for each in (
            *datasets[order[0]].get("coordinateTransformations", []),
            *scales.get("coordinateTransformations", []),
        )
        if each["type"] == "scale"
    ]
    um_per_px = math.prod(steps) * unit if unit and steps else None
    return ArrayPyramid(str(path), [levels[number] for number in order], "".join(axes), um_per_px, lambda: None)


def _multiscales(path: Path) -> dict[str, Any] | None:
    """Return the multiscales metadata of an OME-Zarr image (versions 0.4 and 0.5), None for other folders."""
    for name, keys in (("zarr.json", ("attributes", "ome")), (".zattrs", ())):
        if not (path / name).is_file():
            continue
        content = json.loads((path / name).read_text())
        for key in keys:
            content = content.get(key, {})
        if content.get("multiscales"):
            return content["multiscales"][0]
    return None
