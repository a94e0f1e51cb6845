"""Checks of the image: that it is bright-field RGB, and that it shows this section."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from anndata import AnnData
from PIL import Image

from hinge.data.checks.findings import Context, Finding
from hinge.data.checks.placement import ORIENTATIONS, spots_on_thumbnail, thumbnail_of
from hinge.data.slide_image import SlideImage
from hinge.data.thumbnails import read_thumbnail
from hinge.utils.errors import DataError

_DARK, _WHITE = 60.0, 200
_GREY = 3  # largest difference between the channels of a grey image, after compression
_FLAT = 1.5  # standard deviation of grey levels below which an image shows nothing
_SMALL = (96, 96)  # images are compared at this size, whatever their shape
_SAME, _OTHER = 0.9, 0.8  # correlation of an image with its thumbnail, and with that of another section
_GIVE = "give the H&E image of this section, 8 bits RGB, with --image"


def bright_field(slide: AnnData, context: Context) -> Iterator[Finding]:
    """Find an image that is no bright-field RGB image."""
    path, small = slide.uns["hinge"].get("image_path"), thumbnail_of(slide)
    if not path or small is None:
        return
    name = Path(path).name
    with SlideImage(path) as image:
        channels, tags, orientation = image.channels, image.tags, image.orientation
    if channels not in (3, 4):
        pages = tags.same_size if tags else 1
        what = f"{pages} pages of one channel each" if pages > 1 else f"{channels} channel{'s' * (channels > 1)}"
        yield Finding("error", "image-channels", f"{name} has {what}, and H&E has three", _GIVE)
        return
    if orientation != 1:
        yield Finding(
            "warning",
            "image-rotated-tag",
            f"{name} has the orientation tag {orientation}, and pixels are read as they are stored",
            "save the image as it is shown, without the tag, if positions refer to that",
        )
    grey = small.astype(np.float32).mean(axis=2)
    if tags and tags.bits > 8 and np.quantile(grey, 0.999) < 128:
        yield Finding(
            "error",
            "image-bits",
            f"{name} has {tags.bits} bits a channel and fills a part of them: its brightest pixels are "
            f"{np.quantile(grey, 0.999):.0f} of 255",
            "save the image with 8 bits a channel",
        )
        return
    if grey.std() < _FLAT:
        transparent = " or all of it is transparent" if channels == 4 else ""
        yield Finding(
            "error",
            "image-blank",
            f"{name} shows nothing: all pixels have a grey level near {grey.mean():.0f}{transparent}",
            f"save the image without an alpha channel, or {_GIVE}",
        )
        return
    if _is_dark(slide, grey, small):
        yield Finding(
            "error",
            "image-dark",
            f"{name} is dark (a grey level of {np.median(grey):.0f} in the median), as fluorescence is and H&E is not",
            _GIVE,
        )
    elif np.ptp(small.astype(np.int16), axis=2).max() <= _GREY:
        yield Finding("error", "image-channels", f"{name} is grey: its three channels are equal", _GIVE)


def _is_dark(slide: AnnData, grey: np.ndarray, small: np.ndarray) -> bool:
    x, y = spots_on_thumbnail(slide, small.shape)
    inside = (x >= 0) & (y >= 0) & (x < grey.shape[1]) & (y < grey.shape[0])
    at_spots = grey[y[inside].astype(int), x[inside].astype(int)]
    if len(at_spots) and np.median(at_spots) < _DARK:
        return True
    # bright objects on black: a scan with black borders shows white glass somewhere
    return bool(np.median(grey) < _DARK and (small.min(axis=2) > _WHITE).mean() < 0.005)


def same_section(slide: AnnData, context: Context) -> Iterator[Finding]:
    """Compare the image with the thumbnail that Space Ranger made of its own."""
    facts = slide.uns["hinge"]
    source, small = facts.get("source", {}), thumbnail_of(slide)
    if not facts.get("image_path") or "reference_image" not in source or small is None:
        return
    try:
        reference = read_thumbnail(source["reference_image"])
    except DataError:
        return
    name, scale = Path(facts["image_path"]).name, float(source["reference_scale"])
    with SlideImage(facts["image_path"]) as image:
        size = image.dimensions
    expected = tuple(side / scale for side in reference.shape[1::-1])
    # each side of the thumbnail was rounded to a whole pixel
    if any(abs(one - other) > 1.5 / scale for one, other in zip(size, expected, strict=True)):
        yield Finding(
            "error",
            "image-size",
            f"{name} has {size[0]} x {size[1]} pixels, and Space Ranger was run on an image of about "
            f"{expected[0]:.0f} x {expected[1]:.0f}",
            "give that image with --image",
        )
    shown, wanted = _small_grey(small), _small_grey(reference)
    if min(shown.std(), wanted.std()) < _FLAT:
        return
    # turning the image by each of the eight gives the reference
    fits = {how: _correlation(turn(shown), wanted) for how, turn in ORIENTATIONS.items()}
    best, straight = max(fits, key=lambda how: fits[how]), fits["as it is"]
    if fits[best] > _SAME and fits[best] > straight + 0.01 and best != "as it is":
        yield Finding(
            "error",
            "image-orientation",
            f"{name} fits Space Ranger's thumbnail {best} (correlation {fits[best]:.2f}) and not as it is "
            f"({straight:.2f})",
            "give the image as Space Ranger read it with --image",
        )
    elif straight < _SAME:
        yield Finding(
            "error" if straight < _OTHER else "warning",
            "image-mismatch",
            f"{name} and Space Ranger's thumbnail differ (correlation {straight:.2f})",
            "give the image that Space Ranger was run on with --image",
        )
    elif _correlation(_red_over_blue(small), _red_over_blue(reference)) < -_SAME / 2:
        yield Finding(
            "error",
            "image-mismatch",
            f"red and blue of {name} are exchanged against Space Ranger's thumbnail",
            "save the image with its channels in the order red, green, blue",
        )


def _red_over_blue(pixels: np.ndarray) -> np.ndarray:
    small = Image.fromarray(pixels).convert("RGB").resize(_SMALL, Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float64) @ (1, 0, -1)


def _small_grey(pixels: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).convert("L").resize(_SMALL, Image.Resampling.BOX), dtype=np.float64)


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Return Pearson's correlation of two images, 0 where one is constant."""
    if min(one.std(), other.std()) < 1e-9:
        return 0.0
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1])


IMAGE_CHECKS: tuple[Callable[[AnnData, Context], Iterator[Finding]], ...] = (bright_field, same_section)
