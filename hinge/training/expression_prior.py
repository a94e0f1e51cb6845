"""Closed-form fit of the expression prior of a backbone to the counts that it is pre-trained on."""

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import FactorAnalysis

from hinge.evaluation.factors import fit_factor_analysis

FACTORS, FACTORS_OF_MANY = 32, 64
"""Factors of the differences between spots of one patient, up to `MOST_GENES_EXACT` genes and beyond."""

BETWEEN_SHARE = 0.9
"""Share of the variance between patients that a few directions carry; the rest is of each gene alone.

Chosen by holding out the pairs D and H, A and G, and E and F of the patients of HER2ST (docs/results/pretraining.md).
The directions in which a few patients differ are not all directions in which another one may differ.
"""

COMMON_VARIANCE = {"log2p1": 0.3, "log1p_cp10k": 0.0}
"""Variance of a shift that all genes share, in units of a transform squared: counts that are not divided by the
library size rise together in a spot that was sequenced deeper than any of the pre-training."""

SMALLEST_VARIANCE = 1e-3
MOST_GENES_EXACT = 1000
ROUNDS = 2


def fit_expression_prior(
    values: NDArray[np.float32], patients: NDArray[np.str_], transform: str, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Fit the mean, the loadings and the noise of an `ExpressionPrior`.

    Differences within patients are those of a factor analysis. Those between patients are the covariance of their
    means, of which a part is moved to the diagonal.

    Parameters
    ----------
    values
        (n, G), NaN where a gene was not measured.
    patients
        (n,) name of each spot's patient. With one patient, a factor analysis of its spots is all.
    transform
        Name of the transform of `values`.
    seed
        Seed of the singular value decomposition of large panels.

    Returns
    -------
    tuple
        Mean (G,), loadings (G, K) and variances of the noise (G,).
    """
    known = np.isfinite(values)
    mean = np.nanmean(values.astype(np.float64), axis=0)
    names, of_spot = np.unique(patients, return_inverse=True)
    means = np.stack([_mean_or(values[of_spot == number], mean) for number in range(len(names))])
    centred = np.where(known, values - means[of_spot], 0.0)
    for _ in range(1 if known.all() else ROUNDS):
        loadings, noise, scores = _factor_analysis(centred, seed)
        # what a file lacks is filled with what its other genes predict
        centred = np.where(known, centred, scores @ loadings.T)
    parts = [loadings]
    if len(names) > 1:
        between = (means - means.mean(axis=0)) / np.sqrt(len(names) - 1)
        parts.append(np.sqrt(BETWEEN_SHARE) * between.T)
        noise = noise + (1 - BETWEEN_SHARE) * (between**2).sum(axis=0)
    if COMMON_VARIANCE[transform]:
        parts.append(np.full((values.shape[1], 1), np.sqrt(COMMON_VARIANCE[transform])))
    return mean, np.concatenate(parts, axis=1), np.maximum(noise, SMALLEST_VARIANCE)


def num_spot_factors(num_spots: int, num_genes: int) -> int:
    """Return the number of factors of the differences between spots of one patient."""
    most = FACTORS if num_genes <= MOST_GENES_EXACT else FACTORS_OF_MANY
    return max(1, min(most, num_genes // 2, num_spots // 10))


def _mean_or(values: NDArray[np.float32], default: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean (G,) of each gene over spots (n, G), the default where none has it."""
    known = np.isfinite(values)
    count = known.sum(axis=0)
    total = np.where(known, values, 0.0).sum(axis=0, dtype=np.float64)
    return np.where(count > 0, total / np.maximum(count, 1), default)


def _factor_analysis(centred: NDArray[np.float64], seed: int) -> tuple[NDArray, NDArray, NDArray]:
    """Return loadings (G, K), noise variances (G,) and scores (n, K)."""
    count = num_spot_factors(*centred.shape)
    if centred.shape[1] <= MOST_GENES_EXACT:
        analysis = fit_factor_analysis(centred, count, tol=0.1, max_iter=60)
    else:
        analysis = FactorAnalysis(count, tol=0.1, max_iter=15, random_state=seed).fit(centred)
    return analysis.components_.T, analysis.noise_variance_, analysis.transform(centred)
