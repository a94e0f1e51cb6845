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

_SPOTS_AT_ONCE = 32  # of the variogram score


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
    # all pairs of all draws would be gigabytes; the parts fit into a processor's cache
    for start in range(0, n_spots, _SPOTS_AT_ONCE):
        part = slice(start, start + _SPOTS_AT_ONCE)
        result[part] = _variogram_of_part(measured[part], draws[:, part].astype(np.float32))
    return result


def _variogram_of_part(measured: NDArray, draws: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the variogram score (n,) of `measured` (n, G) and `draws` (K, n, G).

    Each gene is paired with the k-th after it, in a circle and for every k up to G / 2: contiguous differences, which
    are several times as fast as a list of pairs. The fair estimator over pairs of draws would take K² G² roots a spot;
    with the variance of the roots in place of the pairs it takes K G². The mean square of a root is the mean of what
    the root was taken of, whose sum over pairs follows from sorted values.
    """
    n_draws, n_spots, n_genes = draws.shape
    most = n_genes // 2
    # of sorted genes, the g-th is subtracted from g of them and G - 1 - g are subtracted from it
    ranks = 2.0 * np.arange(n_genes) - n_genes + 1
    total = -(np.sort(draws, axis=2) @ ranks).sum(axis=0) / (n_draws * (n_draws - 1))
    # genes before spots, so that the genes of a shift are contiguous
    truth, draws = measured.T.astype(np.float32), np.ascontiguousarray(draws.transpose(0, 2, 1))
    circle = np.concatenate([draws, draws[:, :most]], axis=1)
    truth = np.concatenate([truth, truth[:most]])
    root, share = np.empty_like(draws), np.full(n_draws, 1 / n_draws, dtype=np.float32)
    for k in range(1, most + 1):
        # at half a circle, every pair comes twice
        pairs = most if 2 * k == n_genes else n_genes
        np.subtract(draws, circle[:, k : k + n_genes], out=root)
        np.sqrt(np.abs(root, out=root), out=root)
        mean = (share @ root.reshape(n_draws, -1)).reshape(n_genes, n_spots)[:pairs]
        error = mean - np.sqrt(np.abs(truth[:pairs] - truth[k : k + pairs]))
        total += np.einsum("gs,gs->s", error, error)
        total += np.einsum("gs,gs->s", mean, mean) / (n_draws - 1)
    return total / (n_genes * (n_genes - 1) / 2)
