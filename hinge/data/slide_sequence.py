"""Slides that are read when they are needed."""

from collections.abc import Callable, Sequence
from typing import Any

from anndata import AnnData


class SlideSequence(Sequence[AnnData]):
    """Slides of some names, each read whenever it is asked for, so that memory holds few of them.

    Parameters
    ----------
    names
        Of the slides.
    read
        Returns the slide of a name.
    """

    def __init__(self, names: Sequence[str], read: Callable[[str], AnnData]):
        self.names, self.read = list(names), read

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Any) -> Any:
        return self.read(self.names[index])
