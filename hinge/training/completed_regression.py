"""Ridge regression on spots of which some lack genes: what the other genes of a spot say of them is used."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import FactorAnalysis

from hinge.data.gene_parts import GenePart
from hinge.evaluation.ridge import (
    RidgeFit,
    RidgeFolds,
    Shrinkage,
    fit_ridge_by_component,
    fit_ridge_of_parts,
)
from hinge.training.measured import MeasuredGenes
from hinge.training.prior_covariance import COMPLETION_ROUNDS, factor_scores, fit_factors

MOST_GENES = 4000
"""Genes up to which values are completed; more take too long, and each is regressed on the spots that have it."""


def fit_completed_ridge(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    parts: Sequence[GenePart],
    groups: NDArray,
    measured: MeasuredGenes,
    num_factors: int,
    penalty_factors: NDArray | None = None,
    loadings: NDArray | None = None,
) -> RidgeFit:
    """Fit ridge regression to values that are completed by expectation maximisation.

    In turn, `fit_ridge_by_component` is fitted to completed values, a factor analysis to its residuals, and a value
    that was not measured becomes what the regression predicts without the spot, plus what the factors expect of the
    residual given those of the spot's measured genes (Little and Rubin, Statistical Analysis with Missing Data, 2002,
    chapter 11). The shift of a slide is no part of the residuals.

    Parameters
    ----------
    x
        (n, d) features.
    y
        (n, G) values; where a gene was not measured, they are not looked at.
    parts, groups
        Of the spots, see `gene_parts` and `spot_groups` with `"fold"`.
    measured
        Of the n spots.
    num_factors
        Of the factor analysis.
    penalty_factors, loadings
        As of `RidgeFolds` and `fit_ridge_by_component`.

    Returns
    -------
    RidgeFit
        `held_out` of a measured value is predicted by a regression that is completed without the held-out spots; with
        a gene that no other spots have, by the cross-validation of `fit_ridge_of_parts`.
    """
    start = fit_ridge_of_parts(x, y, parts, penalty_factors)
    if y.shape[1] > MOST_GENES:
        return start
    folds, known = RidgeFolds(x, groups, penalty_factors), measured.values()
    completed = np.where(known, y, start.held_out)
    for _ in range(COMPLETION_ROUNDS):
        fit, _ = fit_ridge_by_component(folds, completed, loadings)
        residual = _without_shifts(y - fit.held_out, measured)
        analysis = fit_factors(residual, groups, num_factors, None, measured) if num_factors else None
        completed = np.where(known, y, fit.held_out + _expected(analysis, residual, measured))
    fit, shrinkage = fit_ridge_by_component(folds, completed, loadings)
    held_out = fit.held_out.copy()
    for number, (rows, held) in enumerate(folds.folds):
        predicted = _fitted_without(folds, number, y, shrinkage, analysis, measured)
        elsewhere = known[rows].any(axis=0)
        held_out[held] = np.where(known[held], np.where(elsewhere, predicted, start.held_out[held]), held_out[held])
    return RidgeFit(fit.weight, fit.bias, held_out, fit.penalty)


def _fitted_without(
    folds: RidgeFolds,
    number: int,
    y: NDArray,
    shrinkage: Shrinkage,
    analysis: FactorAnalysis | None,
    measured: MeasuredGenes,
) -> NDArray[np.float64]:
    """Return the predictions (h, G) of a fold's held-out spots by a regression completed on the others alone."""
    (rows, held), axes = folds.folds[number], folds.axes(number)
    of_rows, known = measured.of_rows(rows), measured.values()[rows]
    own, held_out = axes.coordinates(folds.features[rows]), axes.coordinates(folds.features[held])
    mean = np.where(known, y[rows], 0.0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    completed = np.where(known, y[rows], mean)
    for _ in range(2 * COMPLETION_ROUNDS):  # the start is farther away
        products, mean = axes.products(completed)
        fitted = own @ shrinkage.coefficients(axes, products) + mean
        residual = _without_shifts(y[rows] - fitted, of_rows)
        completed = np.where(known, y[rows], fitted + _expected(analysis, residual, of_rows))
    products, mean = axes.products(completed)
    return held_out @ shrinkage.coefficients(axes, products) + mean


def _without_shifts(residual: NDArray[np.float64], measured: MeasuredGenes) -> NDArray[np.float64]:
    """Return residuals (n, G) without their mean over each slide, 0 where a gene was not measured."""
    centred = np.zeros_like(residual)
    for on_slide, has in measured.slides():
        centred[on_slide] = np.where(has, residual[on_slide] - residual[on_slide].mean(axis=0), 0.0)
    return centred


def _expected(
    analysis: FactorAnalysis | None, residual: NDArray, measured: MeasuredGenes
) -> NDArray[np.float64] | float:
    """Return the residuals (n, G) that the factors expect given the measured ones."""
    return 0.0 if analysis is None else factor_scores(analysis, residual, measured) @ analysis.components_
