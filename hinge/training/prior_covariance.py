"""Covariance of few spots, shrunk towards that of the counts that a backbone was pre-trained on."""

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import FactorAnalysis
from sklearn.model_selection import GroupKFold

from hinge.backbones import ExpressionBackbone
from hinge.evaluation.ridge import shrink_correlations

SHRINKAGES = (0.0, 0.1, 0.2, 0.35, 0.5, 0.7)
"""Weights of the pre-training correlations that cross-validation chooses from."""

MAX_FOLDS = 4


def prior_correlation(backbone: ExpressionBackbone, gene_ids: torch.Tensor) -> NDArray[np.float64] | None:
    """Return the correlations (G, G) of genes within patients by the expression prior; None where there is none."""
    prior = getattr(backbone, "expression_prior", None)
    count = getattr(backbone.config, "num_spot_factors", 0)
    if prior is None or not count:
        return None
    ids = gene_ids.cpu()
    loadings = prior.loadings.detach().cpu()[ids, :count].double().numpy()
    noise = prior.log_noise.detach().cpu()[ids].double().exp().numpy()
    covariance = loadings @ loadings.T + np.diag(noise)
    deviation = np.sqrt(np.diag(covariance))
    return covariance / np.outer(deviation, deviation)


def fit_factors(
    residual: NDArray[np.float64], groups: NDArray, num_factors: int, correlation: NDArray[np.float64] | None
) -> FactorAnalysis:
    """Fit a factor analysis to residuals (n, G), whose correlations are shrunk towards those of a prior.

    The variances are those of the residuals. The weight of the prior's correlations has the largest likelihood of
    held-out groups.

    Parameters
    ----------
    residual
        Centred.
    groups
        (n,) of which cross-validation holds out whole ones.
    num_factors
        K.
    correlation
        (G, G) of the prior; None for no shrinkage.
    """
    if correlation is None:
        return FactorAnalysis(num_factors, svd_method="lapack").fit(residual)
    folds = list(GroupKFold(min(len(np.unique(groups)), MAX_FOLDS)).split(residual, groups=groups))
    scores = np.zeros(len(SHRINKAGES))
    for fit, held in folds:
        for number, share in enumerate(SHRINKAGES):
            analysis = _of_covariance(_shrunk(residual[fit], correlation, share), num_factors)
            scores[number] += len(held) * analysis.score(residual[held])
    best = SHRINKAGES[int(np.argmax(scores))]
    return _of_covariance(_shrunk(residual, correlation, best), num_factors)


def _shrunk(residual: NDArray[np.float64], correlation: NDArray[np.float64], share: float) -> NDArray[np.float64]:
    return shrink_correlations(residual.T @ residual / len(residual), correlation, share)


def _of_covariance(covariance: NDArray[np.float64], num_factors: int) -> FactorAnalysis:
    """Return the factor analysis of data of mean 0 with this covariance."""
    sizes, directions = np.linalg.eigh(covariance)
    root = np.sqrt(len(sizes) * np.maximum(sizes, 0))[:, None] * directions.T
    return FactorAnalysis(num_factors, svd_method="lapack").fit(np.concatenate([root, -root]))
