"""Ridge regression of expression on features, as a baseline and as the start of the model."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hinge.utils.errors import DataError
from hinge.utils.threads import in_threads, limit_threads

if TYPE_CHECKING:
    from hinge.data.gene_parts import GenePart

PENALTIES = np.logspace(-1, 6, 29)
"""Ridge penalties that cross-validation chooses from, for standardised features: four a decade."""

MAX_FOLDS = 5

MOST_SEARCHED = 8
"""Parts of a panel whose cross-validated errors decide on the penalty."""

MOST_TOGETHER = 1 << 22
"""Numbers of the features up to which folds are fitted at the same time, each by one thread: it gains more than
several threads in each decomposition, and memory is no concern."""


@dataclass(frozen=True)
class RidgeFit:
    """A ridge regression of values (n, G) on features (n, d).

    Attributes
    ----------
    weight
        (G, d), for features as they were given.
    bias
        (G,).
    held_out
        (n, G) predictions of the training spots by cross-validation.
    penalty
        The chosen penalty, of standardised features.
    """

    weight: NDArray
    bias: NDArray
    held_out: NDArray
    penalty: float

    def predict(self, features: ArrayLike) -> NDArray:
        """Return the predicted values (m, G) of features (m, d)."""
        return np.asarray(features, dtype=np.float64) @ self.weight.T + self.bias


def fit_ridge(features: ArrayLike, values: ArrayLike, groups: ArrayLike) -> RidgeFit:
    """Fit ridge regression on standardised features, with the penalty of the least cross-validated squared error.

    Parameters
    ----------
    features
        (n, d).
    values
        (n, G), or (n,) for a single value.
    groups
        (n,) group of each spot, of which cross-validation holds out whole ones, in at most five folds; see
        `hinge.data.spots.spot_groups`.

    Raises
    ------
    DataError
        There is only one group.
    """
    x, y = np.asarray(features, dtype=np.float64), np.asarray(values, dtype=np.float64)
    y, folds = y.reshape(len(x), -1), _folds(x, groups)
    return _with_penalty(x, y, folds, float(PENALTIES[int(np.argmin(_held_out_errors(x, y, folds)))]))


def fit_ridge_of_parts(features: ArrayLike, values: ArrayLike, parts: "Sequence[GenePart]") -> RidgeFit:
    """Fit ridge regression as `fit_ridge` does, each gene to the spots that have it, with one penalty for all genes.

    Parameters
    ----------
    features
        (n, d).
    values
        (n, G).
    parts
        Of `hinge.data.gene_parts.gene_parts`. The penalty has the least error over the largest of them.

    Returns
    -------
    RidgeFit
        `held_out` of a spot that lacks a gene is what the regression on all spots with the gene predicts.
    """
    x, y = np.asarray(features, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if len(parts) == 1 and len(parts[0].rows) == len(x):
        return fit_ridge(x, y, parts[0].groups)
    sizes = [len(part.rows) * len(part.columns) for part in parts]
    errors = np.zeros(len(PENALTIES))
    for number in np.argsort([-size for size in sizes], kind="stable")[:MOST_SEARCHED]:
        own, target, folds = _piece(x, y, parts[number])
        errors += sizes[number] * _held_out_errors(own, target, folds)
    penalty = float(PENALTIES[int(np.argmin(errors))])
    weight, bias, held_out = np.zeros((y.shape[1], x.shape[1])), np.zeros(y.shape[1]), np.zeros_like(y)
    for part in parts:
        own, target, of_part = _piece(x, y, part)  # one at a time: together they are many times x
        fit = _with_penalty(own, target, of_part, penalty)
        weight[part.columns], bias[part.columns] = fit.weight, fit.bias
        held_out[:, part.columns] = fit.predict(x)
        held_out[np.ix_(part.rows, part.columns)] = fit.held_out
    return RidgeFit(weight, bias, held_out, penalty)


def _piece(x: NDArray, y: NDArray, part: "GenePart") -> tuple[NDArray, NDArray, list]:
    """Return features (m, d) and values (m, C) of the spots and genes of a part, and the folds of the spots."""
    own = x[part.rows]
    return own, y[np.ix_(part.rows, part.columns)], _folds(own, part.groups)


def _folds(x: NDArray, groups: ArrayLike) -> list:
    from sklearn.model_selection import GroupKFold

    num_groups = len(np.unique(groups))
    if num_groups < 2:
        raise DataError("cross-validation of ridge regression takes training spots of at least two groups")
    return list(GroupKFold(min(num_groups, MAX_FOLDS)).split(x, groups=groups))


def _held_out_errors(x: NDArray, y: NDArray, folds: list) -> NDArray[np.float64]:
    """Return the mean squared error of held-out spots (number of `PENALTIES`,), mean over folds.

    One eigendecomposition of the products of features serves all penalties of a fold; a search that fits each penalty
    by itself takes many times as long.
    """
    from sklearn.preprocessing import StandardScaler

    def of_fold(fold: tuple[NDArray, NDArray]) -> list[float]:
        fit, held = fold
        scaler = StandardScaler().fit(x[fit])
        sizes, vectors = _principal_axes(scaled := scaler.transform(x[fit]))
        mean = y[fit].mean(axis=0)
        products, held_out = vectors.T @ (scaled.T @ (y[fit] - mean)), scaler.transform(x[held]) @ vectors
        predictions = (held_out @ (products / (sizes + penalty)[:, None]) + mean for penalty in PENALTIES)
        return [float(np.mean((predicted - y[held]) ** 2)) for predicted in predictions]

    with _few_threads(x):
        return np.mean(list(in_threads(of_fold, folds, None if _is_small(x) else 1)), axis=0)


def _is_small(x: NDArray) -> bool:
    return x.size <= MOST_TOGETHER


def _few_threads(x: NDArray) -> contextlib.AbstractContextManager[None]:
    """Keep decompositions of small matrices from several threads each."""
    return limit_threads() if _is_small(x) else contextlib.nullcontext()


def _principal_axes(x: NDArray) -> tuple[NDArray, NDArray]:
    """Return the eigenvalues (r,) and eigenvectors (d, r) of xᵀx, from the smaller product of x (n, d)."""
    if len(x) >= x.shape[1]:
        sizes, vectors = np.linalg.eigh(x.T @ x)
        return np.maximum(sizes, 0.0), vectors
    sizes, vectors = np.linalg.eigh(x @ x.T)
    kept = sizes > 1e-12 * max(sizes[-1], 1e-300)
    return sizes[kept], x.T @ (vectors[:, kept] / np.sqrt(sizes[kept]))


def _with_penalty(x: NDArray, y: NDArray, folds: list, penalty: float) -> RidgeFit:
    """Return the fit to x (n, d) and y (n, G) with a penalty."""
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import cross_val_predict
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import StandardScaler

    scaler, ridge = StandardScaler(), Ridge(penalty)
    pipeline = Pipeline([("standardise", scaler), ("ridge", ridge)])
    with _few_threads(x):
        held_out = cross_val_predict(pipeline, x, y, cv=folds).reshape(y.shape)
        pipeline.fit(x, y)
    weight = np.reshape(ridge.coef_, (y.shape[1], x.shape[1])) / scaler.scale_
    return RidgeFit(weight, np.ravel(ridge.intercept_) - weight @ scaler.mean_, held_out, penalty)


def shrink_correlations(
    covariance: NDArray[np.float64], correlation: NDArray[np.float64], share: float
) -> NDArray[np.float64]:
    """Return a covariance (G, G) of residuals whose correlations are shrunk by a share towards others (G, G)."""
    deviation = np.sqrt(np.diag(covariance))
    return (1 - share) * covariance + share * correlation * np.outer(deviation, deviation)
