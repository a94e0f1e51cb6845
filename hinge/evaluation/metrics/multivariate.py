"""Whether the genes of a drawn spot go together: scores of whole expression vectors.

Both scores are proper, and both are given as fair estimators: in expectation what infinitely many draws of the
same method would get, so that methods with different numbers of draws can be compared.

Genes are taken as they are, in transform units, and none is standardised: the slide's own scatter would make a
score depend on what else was measured, and genes of little variance would count with their noise. So genes that
vary much count more, as in the mean squared error.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hinge.evaluation.metrics.calibration import check_draws


def energy_score(measured: ArrayLike, draws: ArrayLike) -> NDArray[np.float64]:
    """Energy score [1]_ of each spot's expression vector: the CRPS of all genes at once.

    Mean |draw - measured| less half the mean |draw - other draw|, |.| the Euclidean norm over genes and the
    latter mean over the K (K - 1) ordered pairs of different draws. It sees errors of location and spread well
    and errors of dependence only weakly.

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
    .. [1] Gneiting, Raftery, "Strictly proper scoring rules, prediction, and estimation", Journal of the
       American Statistical Association 102, 2007.
    """
    measured, draws = check_draws(measured, draws)
    if len(draws) < 2:
        return np.full(len(measured), np.nan)
    from scipy.spatial.distance import cdist, pdist

    result = np.empty(len(measured))
    # a spot at a time: the differences of all pairs of draws of all spots would be gigabytes
    for spot, truth in enumerate(measured):
        drawn = draws[:, spot].astype(np.float64)
        result[spot] = cdist(drawn, truth[None]).mean() - pdist(drawn).mean() / 2
    return result


def variogram_score(measured: ArrayLike, draws: ArrayLike) -> NDArray[np.float64]:
    """Variogram score [1]_ of order 0.5 of each spot, mean over the pairs of different genes.

    Squared difference of |y_i - y_j|^0.5 and the draws' mean |x_i - x_j|^0.5, every pair weighted alike, less
    the sampling variance of that mean. It sees wrong dependence between genes, and no shift that all genes
    share.

    Parameters
    ----------
    measured
        Values (n, G) in transform units.
    draws
        Values (K, n, G) in transform units.

    Returns
    -------
    ndarray
        (n,) in transform units (the square of their root), lower is better. NaN with fewer than two draws or
        genes.

    Raises
    ------
    DataError
        If the shapes do not match, or a value is not finite.

    References
    ----------
    .. [1] Scheuerer, Hamill, "Variogram-based proper scoring rules for probabilistic forecasts of multivariate
       quantities", Monthly Weather Review 143, 2015.
    """
    measured, draws = check_draws(measured, draws)
    n_draws, n_spots, n_genes = draws.shape
    result = np.full(n_spots, np.nan)
    if n_draws < 2 or n_genes < 2:
        return result
    first, second = np.triu_indices(n_genes, k=1)
    # a spot at a time: all pairs of all draws would be gigabytes. The fair estimator over pairs of draws takes
    # K² G² roots a spot; with the variance instead of the pairs it takes K G²
    for spot in range(n_spots):
        drawn = draws[:, spot].astype(np.float32)
        distance = np.abs(drawn[:, first] - drawn[:, second])
        truth = np.sqrt(np.abs(measured[spot, first] - measured[spot, second]))
        mean = np.sqrt(distance).mean(axis=0, dtype=np.float64)
        # the mean square of a root is the mean of what the root was taken of
        variance = (distance.mean(axis=0, dtype=np.float64) - mean**2) / (n_draws - 1)
        result[spot] = np.mean((mean - truth) ** 2 - variance)
    return result
