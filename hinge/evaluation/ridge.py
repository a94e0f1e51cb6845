"""Ridge regression of expression on features, as a baseline and as the start of the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hinge.utils.errors import DataError

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

    from hinge.data.gene_parts import GenePart

PENALTIES = np.logspace(-1, 6, 29)
"""Ridge penalties that cross-validation chooses from, for standardised features: four a decade."""

MAX_FOLDS = 5

MOST_SEARCHED = 8
"""Parts of a panel whose cross-validated errors decide on the penalty."""


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
    folds = _folds(x, groups)
    return _with_penalty(x, y.reshape(len(x), -1), folds, _search(x, y.reshape(len(x), -1), folds, refit=True))


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
    scores = np.zeros(len(PENALTIES))
    for number in np.argsort([-size for size in sizes], kind="stable")[:MOST_SEARCHED]:
        own, target, folds = _piece(x, y, parts[number])
        scores += sizes[number] * _search(own, target, folds, refit=False).cv_results_["mean_test_score"]
    penalty = float(PENALTIES[int(np.argmax(scores))])
    weight, bias, held_out = np.zeros((y.shape[1], x.shape[1])), np.zeros(y.shape[1]), np.zeros_like(y)
    for part in parts:
        own, target, of_part = _piece(x, y, part)  # one at a time: together they are many times x
        pipeline = _pipeline().set_params(ridge__alpha=penalty).fit(own, target)
        fit = _with_penalty(own, target, of_part, pipeline)
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


def _pipeline() -> "Pipeline":
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import StandardScaler

    return Pipeline([("standardise", StandardScaler()), ("ridge", Ridge())])


def _search(x: NDArray, y: NDArray, folds: list, refit: bool) -> Any:
    """Return the cross-validated search of the penalty; with `refit` it is the best estimator, fitted to all."""
    from sklearn.model_selection import GridSearchCV

    grid, scoring = {"ridge__alpha": PENALTIES}, "neg_mean_squared_error"
    search = GridSearchCV(_pipeline(), grid, scoring=scoring, cv=folds, refit=refit).fit(x, y)
    return search.best_estimator_ if refit else search


def _with_penalty(x: NDArray, y: NDArray, folds: list, chosen: "Pipeline") -> RidgeFit:
    """Return the fit of a pipeline that was fitted to x (n, d) and y (n, G)."""
    from sklearn.model_selection import cross_val_predict

    held_out = cross_val_predict(chosen, x, y, cv=folds).reshape(y.shape)
    scaler, ridge = chosen["standardise"], chosen["ridge"]
    weight = np.reshape(ridge.coef_, (y.shape[1], x.shape[1])) / scaler.scale_
    return RidgeFit(weight, np.ravel(ridge.intercept_) - weight @ scaler.mean_, held_out, ridge.alpha)


def shrink_correlations(
    covariance: NDArray[np.float64], correlation: NDArray[np.float64], share: float
) -> NDArray[np.float64]:
    """Return a covariance (G, G) of residuals whose correlations are shrunk by a share towards others (G, G)."""
    deviation = np.sqrt(np.diag(covariance))
    return (1 - share) * covariance + share * correlation * np.outer(deviation, deviation)
