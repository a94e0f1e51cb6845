"""What the tags of a TIFF say: channels, bits, orientation, compression, and which of its pages is the slide."""

import math
from dataclasses import dataclass
from pathlib import Path

import tifffile

TIFF_SUFFIXES = {".tif", ".tiff", ".btf", ".tf2", ".tf8"}
# JPEG 2000 (five tags), JPEG XL (two), WebP, zstd, LZMA: neither OpenSlide nor every Pillow reads tiles of these
_OTHER_COMPRESSIONS = {33003, 33004, 33005, 33007, 34712, 50002, 52546, 50001, 50000, 34925}
_MOST_PAGES = 1000


@dataclass(frozen=True)
class TiffFacts:
    """Tags of the page of a plain TIFF that holds the slide.

    Attributes
    ----------
    channels, bits
        Samples per pixel and bits per sample.
    same_size
        Number of pages of this size: more than one, with one channel each, are channels or layers.
    orientation
        Tag 274; 1 for pixels stored as they are shown.
    compression
        Tag 259.
    first
        Whether the slide is the first page.
    palette
        Whether the one channel is an index of colours.
    um_per_px
        By the resolution tags, NaN without them.
    """

    channels: int
    bits: int
    same_size: int
    orientation: int
    compression: int
    first: bool
    palette: bool
    um_per_px: float

    @property
    def needs_tifffile(self) -> bool:
        """Whether neither OpenSlide nor Pillow reads the pixels of this page as stored."""
        return self.orientation != 1 or not self.first or self.compression in _OTHER_COMPRESSIONS


def tiff_facts(path: Path) -> TiffFacts | None:
    """Return the facts of a TIFF; None for other files, and for OME-TIFF, which has its own metadata."""
    if path.suffix.lower() not in TIFF_SUFFIXES or not path.is_file():
        return None
    try:
        with tifffile.TiffFile(path) as file:
            if file.is_ome:
                return None
            pages = [page for page, _ in zip(file.pages, range(_MOST_PAGES), strict=False)]
            page = largest_page(pages)
            tags = page.tags
            return TiffFacts(
                channels=int(page.samplesperpixel),
                bits=int(page.bitspersample),
                same_size=sum(each.shape[:2] == page.shape[:2] for each in pages),
                orientation=int(tags[274].value) if 274 in tags else 1,
                compression=int(page.compression),
                first=page is pages[0],
                palette=int(page.photometric) == 3,
                um_per_px=_um_per_px(tags),
            )
    except Exception:  # damage is named by whoever reads the pixels
        return None


def largest_page(pages: list) -> tifffile.TiffPage:
    """Return the first of the largest pages."""
    return max(pages, key=lambda page: page.imagewidth * page.imagelength).keyframe.aspage()


def _um_per_px(tags: tifffile.TiffTags) -> float:
    unit = {2: 25_400.0, 3: 10_000.0}.get(int(tags[296].value) if 296 in tags else 1, math.nan)
    if 282 not in tags:
        return math.nan
    numerator, denominator = tags[282].value
    return unit * denominator / numerator if numerator else math.nan
