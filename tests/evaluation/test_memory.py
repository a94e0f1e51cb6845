"""Memory of the scores of draws: an upper bound that is linear in the spots."""

import tracemalloc

import numpy as np
import pytest

from hinge.evaluation.scores import score_draws

pytestmark = pytest.mark.full
GENES, DRAWS = 60, 20


def peak_of_scores(side: int) -> tuple[float, float]:
    """Return the peak memory of all scores of side² spots, and that of the draws, in MB."""
    rng = np.random.default_rng(0)
    y, x = (grid.ravel() for grid in np.mgrid[:side, :side])
    measured = rng.normal(size=(side**2, GENES))
    draws = (measured + rng.normal(size=(DRAWS, side**2, GENES))).astype(np.float32)
    tracemalloc.start()
    try:
        scores = score_draws(measured, draws, np.stack([x, y], axis=1).astype(float))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.isfinite(scores["energy"])
    return peak / 2**20, draws.nbytes / 2**20


@pytest.mark.parametrize("side", [20, 50])
def test_scores_need_a_small_multiple_of_the_draws(side):
    """All pairs of draws of all spots at once, 8·n·K²·G bytes, would be 457 MB for 2,500 spots."""
    peak, draws = peak_of_scores(side)
    assert peak < 6 * draws + 96, (peak, draws)
