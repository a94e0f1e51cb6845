"""Covariance of few spots, shrunk towards that of the counts that a backbone was pre-trained on.

No matrix of all pairs of genes is made where the panel is large: a covariance is that of rows (spots, and loadings of
the prior) and a diagonal.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import FactorAnalysis
from sklearn.model_selection import GroupKFold

from hinge.backbones import ExpressionBackbone
from hinge.evaluation.ridge import shrink_correlations
from hinge.training.measured import MeasuredGenes
from hinge.training.stacked_covariance import StackedCovariance
from hinge.utils.threads import in_threads, limit_threads

SHRINKAGES = (0.0, 0.1, 0.2, 0.35, 0.5, 0.7)
"""Weights of the pre-training correlations that cross-validation chooses from."""

MAX_FOLDS = 4

MOST_DENSE = 1000
"""Genes up to which covariances are matrices."""

GENES_OF_SHARE = 300
"""Random genes of a larger panel that decide on the weight of the prior."""

COMPLETION_ROUNDS = 6
"""Rounds in which factors of genes that some slides lack are fitted to what the last factors expect of these genes."""


class PriorCovariance(NamedTuple):
    """Covariance of genes within patients by the expression prior: loadings (G, K) and noise variances (G,)."""

    loadings: NDArray[np.float64]
    noise: NDArray[np.float64]

    def correlation(self) -> NDArray[np.float64]:
        """Return the correlations (G, G)."""
        covariance = self.loadings @ self.loadings.T + np.diag(self.noise)
        deviation = np.sqrt(np.diag(covariance))
        return covariance / np.outer(deviation, deviation)

    def standardised_loadings(self) -> NDArray[np.float64]:
        """Return the loadings (G, K) for values of variance 1."""
        return self.loadings / np.sqrt((self.loadings**2).sum(axis=1) + self.noise)[:, None]

    def of_genes(self, chosen: NDArray) -> "PriorCovariance":
        """Return the covariance of some genes."""
        return PriorCovariance(self.loadings[chosen], self.noise[chosen])


def prior_covariance(backbone: ExpressionBackbone, gene_ids: torch.Tensor) -> PriorCovariance | None:
    """Return the covariance of genes within patients by the expression prior; None where there is none."""
    prior = getattr(backbone, "expression_prior", None)
    count = getattr(backbone.config, "num_spot_factors", 0)
    if prior is None or not count:
        return None
    ids = gene_ids.cpu()
    loadings = prior.loadings.detach().cpu()[ids, :count].double().numpy()
    return PriorCovariance(loadings, prior.log_noise.detach().cpu()[ids].double().exp().numpy())


def fit_factors(
    residual: NDArray[np.float64],
    groups: NDArray,
    num_factors: int,
    prior: PriorCovariance | None,
    measured: MeasuredGenes | None = None,
) -> FactorAnalysis:
    """Fit a factor analysis to residuals (n, G), whose correlations are shrunk towards those of a prior.

    The variances are those of the residuals. The weight of the prior's correlations has the largest likelihood of
    held-out groups. Genes that some slides lack are completed by expectation maximisation (Little and Rubin,
    Statistical Analysis with Missing Data, 2002, chapter 11): to the covariance of the expected residuals of these
    genes, that of what is not known of them is added.

    Parameters
    ----------
    residual
        Centred, 0 where a gene was not measured.
    groups
        (n,) of which cross-validation holds out whole ones.
    num_factors
        K.
    prior
        Of the G genes; None for no shrinkage.
    measured
        Of the n spots; None where all have all genes.
    """
    if residual.shape[1] > MOST_DENSE:
        return _fit_large(residual, groups, num_factors, prior, measured)
    with limit_threads():  # many decompositions of small matrices
        return _fit_dense(residual, groups, num_factors, prior, measured)


def _fit_dense(
    residual: NDArray[np.float64],
    groups: NDArray,
    num_factors: int,
    prior: PriorCovariance | None,
    measured: MeasuredGenes | None,
) -> FactorAnalysis:
    """Return what `fit_factors` does, with matrices of all pairs of genes."""
    if prior is None and measured is None:
        return FactorAnalysis(num_factors, svd_method="lapack").fit(residual)
    share, correlation = 0.0, None if prior is None else prior.correlation()
    if prior is not None:
        share = _best_share(residual, groups, num_factors, prior, measured)
    if measured is None:
        return _of_covariance(_shrunk(residual, correlation, share), num_factors)
    analysis = None
    for _ in range(COMPLETION_ROUNDS):
        covariance = completed_covariance(residual, measured, analysis).dense()
        if correlation is not None:
            covariance = shrink_correlations(covariance, correlation, share)
        analysis = _of_covariance(covariance, num_factors)
    return analysis


def _fit_large(
    residual: NDArray[np.float64],
    groups: NDArray,
    num_factors: int,
    prior: PriorCovariance | None,
    measured: MeasuredGenes | None,
) -> FactorAnalysis:
    """Return what `fit_factors` does, without a matrix of all pairs of genes."""
    share = 0.0
    if prior is not None:
        some = np.sort(np.random.default_rng(0).choice(residual.shape[1], GENES_OF_SHARE, replace=False))
        of_some = None if measured is None else measured.of_genes(some)
        with limit_threads():
            share = _best_share(residual[:, some], groups, num_factors, prior.of_genes(some), of_some)
    analysis = None
    for _ in range(1 if measured is None else COMPLETION_ROUNDS):
        covariance = completed_covariance(residual, measured, analysis)
        if prior is not None:
            covariance = covariance.shrunk(prior.loadings, prior.noise, share)
        analysis = _analysis(*covariance.factor_analysis(num_factors))
    return analysis


def _best_share(
    residual: NDArray, groups: NDArray, num_factors: int, prior: PriorCovariance, measured: MeasuredGenes | None
) -> float:
    """Return the weight of the prior with the largest likelihood of held-out groups."""
    folds = list(GroupKFold(min(len(np.unique(groups)), MAX_FOLDS)).split(residual, groups=groups))
    correlation = prior.correlation()

    def scores(fold: tuple[NDArray, NDArray]) -> list[float]:
        """Return the likelihood of held-out spots with each weight."""
        fit, held = fold
        if measured is None:
            covariance = residual[fit].T @ residual[fit] / len(fit)
        else:
            covariance = _completed(residual[fit], measured.of_rows(fit), num_factors)
        analyses = (
            _of_covariance(shrink_correlations(covariance, correlation, share), num_factors) for share in SHRINKAGES
        )
        if measured is None:
            return [len(held) * analysis.score(residual[held]) for analysis in analyses]
        return [log_likelihood(analysis, residual[held], measured.of_rows(held)) for analysis in analyses]

    total = np.sum(list(in_threads(scores, folds)), axis=0)
    return SHRINKAGES[int(np.argmax(total))]


def _completed(residual: NDArray, measured: MeasuredGenes, num_factors: int) -> NDArray[np.float64]:
    """Return the covariance (G, G) that is completed with factors of its own."""
    covariance = completed_covariance(residual, measured, None)
    for _ in range(COMPLETION_ROUNDS):
        covariance = completed_covariance(residual, measured, _of_covariance(covariance.dense(), num_factors))
    return covariance.dense()


def completed_covariance(
    residual: NDArray[np.float64], measured: MeasuredGenes | None, analysis: FactorAnalysis | None
) -> StackedCovariance:
    """Return the covariance of residuals (n, G) that is expected given their measured genes.

    Parameters
    ----------
    residual
        Of mean 0, and 0 where a gene was not measured.
    measured
        Of the n spots; None where all have all genes.
    analysis
        Factors that say what to expect of the other genes; None: their variance alone.
    """
    if measured is None:
        return StackedCovariance(residual / np.sqrt(len(residual)), np.zeros(residual.shape[1]))
    rows, diagonal = [residual], np.zeros(residual.shape[1])
    if analysis is None:
        count = measured.count()
        variance = (residual**2).sum(axis=0) / np.maximum(count, 1)
        diagonal += (len(residual) - count) * variance
    else:
        filled = residual.copy()
        for on_slide, has in measured.slides():
            scores, root = _posterior(analysis, residual[on_slide], has)
            loadings = np.where(has, 0.0, analysis.components_)
            filled[on_slide] += scores @ loadings
            rows.append(np.sqrt(len(on_slide)) * root.T @ loadings)
            diagonal += len(on_slide) * np.where(has, 0.0, analysis.noise_variance_)
        rows[0] = filled
    return StackedCovariance(np.concatenate(rows) / np.sqrt(len(residual)), diagonal / len(residual))


def factor_scores(
    analysis: FactorAnalysis, residual: NDArray[np.float64], measured: MeasuredGenes | None
) -> NDArray[np.float64]:
    """Return the posterior mean (n, K) of the factors given the measured residuals (n, G)."""
    if measured is None:
        return analysis.transform(residual)
    scores = np.zeros((len(residual), len(analysis.components_)))
    for on_slide, has in measured.slides():
        scores[on_slide] = _posterior(analysis, residual[on_slide], has)[0]
    return scores


def log_likelihood(analysis: FactorAnalysis, residual: NDArray[np.float64], measured: MeasuredGenes) -> float:
    """Return the log-likelihood of the measured residuals, summed over spots (n, G)."""
    total = 0.0
    for on_slide, has in measured.slides():
        own, noise = residual[on_slide][:, has], analysis.noise_variance_[has]
        weighted = analysis.components_[:, has] / noise
        precision = np.eye(len(weighted)) + weighted @ analysis.components_[:, has].T
        along = own @ weighted.T
        distance = (own**2 / noise).sum() - (along * np.linalg.solve(precision, along.T).T).sum()
        constant = np.log(2 * np.pi * noise).sum() + np.linalg.slogdet(precision)[1]
        total -= 0.5 * (distance + len(own) * constant)
    return float(total)


def _posterior(analysis: FactorAnalysis, residual: NDArray, has: NDArray[np.bool_]) -> tuple[NDArray, NDArray]:
    """Return posterior means (n, K) of the factors of spots that have some genes (G,), and a root (K, K) of the rest.

    The root R gives the posterior covariance as RRᵀ.
    """
    weighted = np.where(has, analysis.components_ / analysis.noise_variance_, 0.0)
    covariance = np.linalg.inv(np.eye(len(weighted)) + weighted @ analysis.components_.T)
    return residual @ weighted.T @ covariance, np.linalg.cholesky((covariance + covariance.T) / 2)


def _shrunk(residual: NDArray[np.float64], correlation: NDArray[np.float64], share: float) -> NDArray[np.float64]:
    return shrink_correlations(residual.T @ residual / len(residual), correlation, share)


def _of_covariance(covariance: NDArray[np.float64], num_factors: int) -> FactorAnalysis:
    """Return the factor analysis of data of mean 0 with this covariance."""
    sizes, directions = np.linalg.eigh(covariance)
    root = np.sqrt(len(sizes) * np.maximum(sizes, 0))[:, None] * directions.T
    return FactorAnalysis(num_factors, svd_method="lapack").fit(np.concatenate([root, -root]))


def _analysis(loadings: NDArray[np.float64], noise: NDArray[np.float64]) -> FactorAnalysis:
    """Return a fitted factor analysis of data of mean 0 with loadings (G, K) and noise variances (G,)."""
    analysis = FactorAnalysis(loadings.shape[1])
    analysis.components_, analysis.noise_variance_, analysis.mean_ = loadings.T, noise, np.zeros(len(noise))
    return analysis
