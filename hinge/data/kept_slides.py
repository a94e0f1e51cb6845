"""Slides that were read last, so that the stages of a run read and decode a slide once."""

from collections import OrderedDict
from collections.abc import Callable

import scipy.sparse
from anndata import AnnData


class KeptSlides:
    """Reads slides and keeps the last ones.

    Parameters
    ----------
    read
        Returns the slide of a name.
    most_bytes
        Of counts and thumbnails. The last slide is kept in any case.
    """

    def __init__(self, read: Callable[[str], AnnData], most_bytes: int):
        self.read, self.most_bytes = read, most_bytes
        self._kept: OrderedDict[str, tuple[AnnData, int]] = OrderedDict()

    def __call__(self, name: str) -> AnnData:
        """Return the slide of a name."""
        if name not in self._kept:
            slide = self.read(name)
            self._kept[name] = slide, slide_bytes(slide)
            while len(self._kept) > 1 and sum(size for _, size in self._kept.values()) > self.most_bytes:
                self._kept.popitem(last=False)
        self._kept.move_to_end(name)
        return self._kept[name][0]


def slide_bytes(slide: AnnData) -> int:
    """Return the bytes of a slide's counts and thumbnails."""
    counts = slide.X
    if scipy.sparse.issparse(counts):
        size = counts.data.nbytes + counts.indices.nbytes + counts.indptr.nbytes
    else:
        size = 0 if counts is None else counts.nbytes
    pictures = [image for each in slide.uns.get("spatial", {}).values() for image in each["images"].values()]
    return int(size + sum(image.nbytes for image in pictures))
