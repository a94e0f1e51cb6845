"""The check of a slide against the training slides of a run."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from hinge.data.checks.findings import Finding

NOVEL_SHARE = 0.1
"""Share of spots that are unlike those of training from which on a slide is warned of."""


def check_novelty(novelty: NDArray[np.floating]) -> Iterator[Finding]:
    """Yield a warning for a slide many of whose spots look unlike those of training.

    Parameters
    ----------
    novelty
        (n,) how far the features of each spot are from those of training, 1 for the 99th percentile there.
    """
    share = float((novelty > 1).mean())
    if share > NOVEL_SHARE:
        yield Finding(
            "warning",
            "features-novel",
            f"{share:.0%} of the spots are farther from the training features than 99 % of the training spots; the "
            "draws of these spots are wider, and may be wrong",
            "train on slides of this kind too, or look at novelty in the draws",
        )
