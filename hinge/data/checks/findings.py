"""What a check finds, and the table of all codes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Level = Literal["error", "warning"]

CODES = {
    "slide-unreadable": "no slide can be built from the files",
    "resolution-contradiction": "two sources of the µm per pixel differ",
    "resolution-implausible": "the µm per pixel are outside what a microscope gives",
    "image-coarse": "the image is coarser than an encoder's patches",
    "image-thumbnail": "a thumbnail serves as the full-resolution image",
    "image-channels": "the image is no RGB image",
    "image-bits": "the values of the image are not 8 bits wide",
    "image-dark": "the image is dark, as fluorescence is",
    "image-blank": "the image shows nothing",
    "image-rotated-tag": "the file says that the picture is turned",
    "image-size": "the image has another size than the one Space Ranger was run on",
    "image-orientation": "the image is turned or mirrored against the spots",
    "image-mismatch": "the image shows another section than Space Ranger's thumbnail",
    "spots-outside": "spots lie outside the image",
    "spots-off-tissue": "spots are marked as off tissue",
    "spots-on-glass": "spots lie where the image shows no tissue",
    "spots-array": "positions do not follow the array",
    "spots-repeated": "several spots lie at the same place",
    "barcodes-off-tissue": "barcodes of filtered counts are not on tissue in spatial/",
    "several-sections": "a table holds several sections",
    "counts-elsewhere": "the counts were taken from elsewhere than X",
    "counts-not-raw": "whole numbers that are no counts of molecules",
    "counts-empty": "most spots have no counts",
    "genes-controls": "control features are among the genes",
    "genes-two-genomes": "the genes are of two genomes",
    "genes-ensembl": "genes have Ensembl names and no symbols",
    "genes-species": "the genes are of another species",
    "genes-panel": "the slide lacks genes of the panel",
    "features-novel": "the slide looks unlike those that a run was trained on",
}
"""Every code and what it stands for; the page docs/reference/findings.md has a section for each."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or may be, with a slide.

    Attributes
    ----------
    level
        "error" stops a command, "warning" does not.
    code
        A key of `CODES`.
    message
        One sentence with the numbers.
    action
        What to do, with the option of the command line; "" where the message says it.
    """

    level: Level
    code: str
    message: str
    action: str

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise ValueError(f"{self.code} is no code of a finding")

    def __str__(self) -> str:
        return f"{self.message}{f': {self.action}' if self.action else ''} [{self.code}]"


@dataclass(frozen=True)
class Context:
    """What a slide is checked for.

    Attributes
    ----------
    target_um_per_px
        Resolution of the patches of the encoder.
    panel
        Genes that the slide needs.
    """

    target_um_per_px: float = 0.5
    panel: Sequence[str] = ()
