"""Mean and variance of a gene over the spots of a slide, given its share of all counts and the library size.

Counts are Poisson around a rate that differs between spots by a log-normal factor of spread τ. The transform of the
mean count is larger than the mean of the transformed counts, by an amount that depends on the depth of sequencing.
"""

from collections.abc import Callable

import numpy as np
from numpy.polynomial.hermite_e import hermegauss
from numpy.typing import NDArray
from scipy.special import gammaln

from hinge.data.slide_levels import shares_of_composition
from hinge.data.transforms import get_transform

NUM_NODES = 15
# counts that are summed; above, the distribution of a Poisson count is narrow beside that of its rate
MOST_SUMMED = 200
_RATES = np.concatenate([[0.0], np.geomspace(1e-4, MOST_SUMMED / 2, 160)])
_COUNTS = np.arange(2 * MOST_SUMMED)
_POISSON = np.exp(_COUNTS * np.log(np.maximum(_RATES[:, None], 1e-300)) - _RATES[:, None] - gammaln(_COUNTS + 1))

DISPERSIONS = np.linspace(0.05, 2.5, 50)
"""Spreads τ that `fit_dispersion` chooses from."""


def expected_values(
    shares: NDArray, library_size: float, ratios: NDArray, dispersion: NDArray, transform: str
) -> NDArray[np.float64]:
    """Return the mean (G,) of the transformed counts of a slide's spots; arguments as of `moments`."""
    return _average(shares, library_size, ratios, dispersion, transform, 1)


def moments(
    shares: NDArray, library_size: float, ratios: NDArray, dispersion: NDArray, transform: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return mean and variance (G,) of the transformed counts of a slide's spots.

    Parameters
    ----------
    shares
        (G,) of each gene in all counts.
    library_size
        Mean of the spots' counts over all genes.
    ratios
        (Q,) library sizes of equally many spots, in units of the mean.
    dispersion
        (G,) standard deviation τ of the logarithm of a spot's rate.
    transform
        Name of the transform.
    """
    mean = _average(shares, library_size, ratios, dispersion, transform, 1)
    return mean, np.maximum(_average(shares, library_size, ratios, dispersion, transform, 2) - mean**2, 0.0)


def counting_variance(
    shares: NDArray, library_size: float, ratios: NDArray, dispersion: NDArray, transform: str
) -> NDArray[np.float64]:
    """Return the part (G,) of the variance of `moments` that is of Poisson counts around the rates of the spots.

    By the law of total variance the rest is that of the spots' expected values. Arguments as of `moments`.
    """
    rates, weights = _rates(shares, dispersion)
    forward, total = get_transform(transform).forward, np.zeros(len(shares))
    for size in library_size * np.asarray(ratios, dtype=np.float64):
        total += np.interp(size * rates, _RATES, _of_counts(forward, size)[1]) @ weights
    return total / len(ratios)


class CountingVariance:
    """Variance of transformed Poisson counts whose transformed mean is given.

    Parameters
    ----------
    transform
        Name of the transform.
    """

    def __init__(self, transform: str):
        self.forward = get_transform(transform).forward
        self.tables: dict[int, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}

    def __call__(self, values: NDArray, library_size: float) -> NDArray[np.float64]:
        """Return the variance (…) of values of mean `values` (…) in a spot of a library size."""
        # tables of library sizes 5 % apart
        number = round(np.log(library_size) / 0.05)
        if number not in self.tables:
            self.tables[number] = self._table(np.exp(0.05 * number))
        return np.interp(values, *self.tables[number])

    def _table(self, library_size: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return means and variances of rates, of few counts exactly, of many by the slope of the transform."""
        size = np.array([library_size])
        mean, variance = _of_counts(self.forward, library_size)
        rates = np.geomspace(_RATES[-1] * 1.05, 1e7, 200)
        dense, more = (self.forward(each[None, :], size).astype(np.float64)[0] for each in (rates, rates * 1.001))
        slope = (more - dense) / (0.001 * rates)
        return np.append(mean, dense), np.append(variance, slope**2 * rates)


def _of_counts(
    forward: Callable[[NDArray, NDArray], NDArray], library_size: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return mean and variance of transformed Poisson counts at the rates `_RATES`."""
    of_counts = forward(_COUNTS[None, :], np.array([library_size])).astype(np.float64)[0]
    mean = _POISSON @ of_counts
    return mean, _POISSON @ of_counts**2 - mean**2


def _rates(shares: NDArray, dispersion: NDArray) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return rates (G, M) in units of the library size, and their weights (M,)."""
    nodes, weights = hermegauss(NUM_NODES)
    spread = np.exp(np.outer(dispersion, nodes) - 0.5 * np.asarray(dispersion)[:, None] ** 2)
    return np.asarray(shares)[:, None] * spread, weights / weights.sum()


def _average(
    shares: NDArray, library_size: float, ratios: NDArray, dispersion: NDArray, transform: str, power: int
) -> NDArray[np.float64]:
    """Return the mean (G,) of a power of the transformed counts; other arguments as of `moments`."""
    rates, weights = _rates(shares, dispersion)
    forward, total = get_transform(transform).forward, np.zeros(len(shares))
    for size in library_size * np.asarray(ratios, dtype=np.float64):
        rate = size * rates
        of_counts = forward(_COUNTS[None, :], np.array([size])).astype(np.float64)[0] ** power
        summed = np.interp(rate, _RATES, _POISSON @ of_counts)
        dense = forward(rate, np.full(len(rate), size)).astype(np.float64) ** power
        total += np.where(rate > _RATES[-1], dense, summed) @ weights
    return total / len(ratios)


def fit_dispersion(
    shares: NDArray, library_sizes: NDArray, ratios: NDArray, values: NDArray, weights: NDArray, transform: str
) -> NDArray[np.float64]:
    """Return the spreads τ (G,) with which the mean values of slides are expected best (least squares).

    Parameters
    ----------
    shares, values
        (S, G) of slides, NaN where a slide lacks a gene.
    library_sizes, ratios
        (S,) and (S, Q).
    weights
        (S,) of the slides.
    transform
        Name of the transform.
    """
    errors = np.zeros((len(DISPERSIONS), shares.shape[1]))
    for number, dispersion in enumerate(DISPERSIONS):
        spread = np.full(shares.shape[1], dispersion)
        for row, weight in enumerate(weights):
            known = np.nan_to_num(shares[row])
            error = expected_values(known, library_sizes[row], ratios[row], spread, transform) - values[row]
            errors[number] += weight * np.nan_to_num(error) ** 2
    found = DISPERSIONS[errors.argmin(axis=0)]
    # a gene that none of the slides has
    unknown = ~np.isfinite(values).any(axis=0)
    return np.where(unknown, np.median(found[~unknown]), found) if unknown.any() else found


def composition_of_values(
    values: NDArray,
    library_size: float,
    ratios: NDArray,
    dispersion: NDArray,
    offset: NDArray,
    transform: str,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the composition (G,) at which values (G,) are expected, and the derivative of the value by it.

    Inverse of `expected_values` + offset on a grid of compositions; arguments as there. A value that no composition
    gives has the one at the end of the grid.
    """
    grid = np.linspace(0.02, 13.3, 80)
    curve = np.stack(
        [
            expected_values(
                np.full(len(values), shares_of_composition(np.array([point]))[0]),
                library_size,
                ratios,
                dispersion,
                transform,
            )
            for point in grid
        ]
    )
    curve = curve + offset
    result, slope = np.zeros(len(values)), np.zeros(len(values))
    for gene, value in enumerate(values):
        result[gene] = np.interp(value, curve[:, gene], grid)
        slope[gene] = np.interp(result[gene], grid, np.gradient(curve[:, gene], grid))
    return result, slope
