"""Whether draws are spread as widely as the measured values scatter around them.

All scores here estimate what infinitely many draws of the same method would get, so that methods with
different numbers of draws can be compared. The obvious definitions do not: the energy form of the CRPS
charges a small ensemble for being small, and intervals between the quantiles that `numpy.quantile`
interpolates by default are too narrow (with 20 draws, a perfect method's "90 %" interval would hold 81 % of
the measured values). Nor do those intervals allow for ties, and many genes are tied at zero in most spots.
Coverage is therefore read from the rank of the measured value among the draws, with ties split evenly.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hinge.evaluation.metrics.accuracy import as_matrix
from hinge.utils.errors import DataError

CURVE_LEVELS = tuple(np.round(np.arange(0.1, 0.91, 0.1), 1).tolist())
"""Nominal levels of a calibration curve: 10 %, 20 % ... 90 %."""

_SPOTS_AT_ONCE = 512  # bounds the memory of the CRPS: 512 spots x 200 genes x 20 draws are 16 MB


def crps(measured: ArrayLike, draws: ArrayLike) -> float:
    """Continuous ranked probability score of the draws, mean over spots and genes; see `crps_of_spots`."""
    return float(crps_of_spots(measured, draws).mean())


def crps_of_spots(measured: ArrayLike, draws: ArrayLike) -> NDArray[np.float64]:
    """Continuous ranked probability score of the draws of each spot, mean over genes.

    The fair estimator [1]_: mean |draw - measured| less half the mean |draw - other draw|, the latter over
    the K (K - 1) ordered pairs of different draws. Unbiased in the number of draws.

    Parameters
    ----------
    measured
        Values (n, G) in transform units.
    draws
        Values (K, n, G) in transform units.

    Returns
    -------
    ndarray
        (n,) in transform units, lower is better. NaN with fewer than two draws, whose spread is unknown.

    Raises
    ------
    DataError
        If the shapes do not match, or a value is not finite.

    References
    ----------
    .. [1] Ferro, "Fair scores for ensemble forecasts", Quarterly Journal of the Royal Meteorological Society
       140, 2014.
    """
    measured, draws = check_draws(measured, draws)
    n_draws = len(draws)
    if n_draws < 2:
        return np.full(len(measured), np.nan)
    # in sorted draws, the k-th is subtracted k times and is subtracted from K - 1 - k times
    weights = (2 * np.arange(n_draws) - n_draws + 1) / (n_draws * (n_draws - 1))
    scores = []
    for start in range(0, len(measured), _SPOTS_AT_ONCE):
        drawn = draws[:, start : start + _SPOTS_AT_ONCE].astype(np.float64)
        error = np.abs(drawn - measured[start : start + _SPOTS_AT_ONCE]).mean(axis=0)
        drawn.sort(axis=0)
        scores.append((error - np.tensordot(weights, drawn, axes=1)).mean(axis=1))
    return np.concatenate(scores)


def pit_distribution(measured: ArrayLike, draws: ArrayLike, points: ArrayLike) -> NDArray[np.float64]:
    """Distribution function of the probability integral transform (PIT), over all spots and genes.

    A measured value with `below` draws below and `equal` draws equal to it has its PIT spread evenly between
    below / (K + 1) and (below + equal + 1) / (K + 1), the non-randomised PIT for counts [1]_. If the measured
    value could as well be one of the draws, the PIT is uniform on [0, 1], whatever the number of draws and
    ties.

    Parameters
    ----------
    measured
        Values (n, G) in transform units.
    draws
        Values (K, n, G) in transform units. Compared in float32.
    points
        Where to evaluate, (P,) between 0 and 1. Differences between equally spaced points make a PIT
        histogram: flat if calibrated, U-shaped if the draws are too narrow, a hump if too wide.

    Returns
    -------
    ndarray
        (P,) share of the PIT's mass up to each point.

    References
    ----------
    .. [1] Czado, Gneiting, Held, "Predictive model assessment for count data", Biometrics 65, 2009.
    """
    measured, draws = check_draws(measured, draws)
    below, equal = _ranks(measured, draws)
    ranks = len(draws) + 1
    seen, count = np.unique(below * ranks + equal, return_counts=True)
    low, width = (seen // ranks) / ranks, (seen % ranks + 1) / ranks
    mass = np.clip((np.asarray(points, dtype=np.float64)[:, None] - low) / width, 0.0, 1.0)
    return mass @ count / measured.size


def pit_values(measured: ArrayLike, draws: ArrayLike, seed: int) -> NDArray[np.float64]:
    """Randomised PIT of each measured value: its rank among the draws, ties and gaps broken by chance.

    What `pit_distribution` spreads evenly is here one number, for histograms of single genes or spots with
    whatever bins, and for tests that take one value an observation.

    Parameters
    ----------
    measured
        Values (n, G) in transform units.
    draws
        Values (K, n, G) in transform units. Compared in float32.
    seed
        Of what breaks the ties.

    Returns
    -------
    ndarray
        (n, G) between 0 and 1; uniform if a measured value could as well be one of the draws.
    """
    measured, draws = check_draws(measured, draws)
    below, equal = _ranks(measured, draws)
    return (below + np.random.default_rng(seed).random(below.shape) * (equal + 1)) / (len(draws) + 1)


def coverage(measured: ArrayLike, draws: ArrayLike, levels: ArrayLike = CURVE_LEVELS) -> NDArray[np.float64]:
    """Share of the measured values in the draws' central intervals.

    The mass of `pit_distribution` in the central part of width `level`: calibrated draws have coverage =
    level. Narrow draws have less, wide draws more.

    Parameters
    ----------
    measured
        Values (n, G) in transform units.
    draws
        Values (K, n, G) in transform units.
    levels
        Nominal levels (L,) between 0 and 1. The default gives a calibration curve.

    Returns
    -------
    ndarray
        (L,) NaN for a level that K draws cannot resolve, because outside of the outermost draws lies more
        than outside of the interval: 1 / (K + 1) > (1 - level) / 2. 90 % takes 19 draws, 50 % takes 3.
    """
    levels = np.asarray(levels, dtype=np.float64)
    upper = pit_distribution(measured, draws, 0.5 + levels / 2)
    lower = pit_distribution(measured, draws, 0.5 - levels / 2)
    return np.where(_resolved(len(np.asarray(draws)), levels), upper - lower, np.nan)


def covered(measured: ArrayLike, draws: ArrayLike, level: float) -> NDArray[np.float64]:
    """How far each measured value lies in the draws' central interval, for means over spots or over genes.

    Parameters
    ----------
    measured
        Values (n, G) in transform units.
    draws
        Values (K, n, G) in transform units.
    level
        Nominal level between 0 and 1.

    Returns
    -------
    ndarray
        (n, G), 1 inside, 0 outside, between the two for ties and at the edge; the mean is `coverage`. NaN where
        K draws cannot resolve the level.
    """
    measured, draws = check_draws(measured, draws)
    if not _resolved(len(draws), level):
        return np.full(measured.shape, np.nan)
    below, equal = _ranks(measured, draws)
    low, width = below / (len(draws) + 1), (equal + 1) / (len(draws) + 1)
    lower, upper = (np.clip((0.5 + side * level / 2 - low) / width, 0.0, 1.0) for side in (-1, 1))
    return upper - lower


def _resolved(n_draws: int, level: ArrayLike) -> NDArray[np.bool_]:
    return (n_draws + 1) * (1.0 - np.asarray(level)) > 2.0 - 1e-9


def _ranks(measured: NDArray, draws: NDArray) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many draws lie below each measured value and how many equal it, (n, G) each, in float32."""
    measured = measured.astype(np.float32)
    below = np.zeros(measured.shape, dtype=np.int64)
    equal = np.zeros(measured.shape, dtype=np.int64)
    for draw in draws:
        draw = draw.astype(np.float32, copy=False)
        below += draw < measured
        equal += draw == measured
    return below, equal


def check_draws(measured: ArrayLike, draws: ArrayLike) -> tuple[NDArray[np.float64], NDArray]:
    """Give `measured` (n, G) in float64 and `draws` (K, n, G), of the same spots and genes and finite, or raise.

    Raises
    ------
    DataError
        If the shapes do not match, there is no draw, or a value is not finite.
    """
    measured, draws = as_matrix(measured, "the measured slide"), np.asarray(draws)
    if draws.ndim != 3 or draws.shape[1:] != measured.shape or not len(draws):
        raise DataError(
            f"draws must have the shape (draws, {measured.shape[0]} spots, {measured.shape[1]} genes), "
            f"not {draws.shape}"
        )
    for number, draw in enumerate(draws):
        as_matrix(draw, f"draw {number}")
    return measured, draws
