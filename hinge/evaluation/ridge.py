"""Ridge regression of expression on features, as a baseline and as the start of the model."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hinge.utils.errors import DataError

PENALTIES = np.logspace(-1, 6, 29)
"""Ridge penalties that cross-validation chooses from, for standardised features: four a decade."""

MAX_FOLDS = 5


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
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_predict
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = np.asarray(features, dtype=np.float64), np.asarray(values, dtype=np.float64)
    y = y.reshape(len(x), -1)
    num_groups = len(np.unique(groups))
    if num_groups < 2:
        raise DataError("cross-validation of ridge regression takes training spots of at least two groups")
    folds = list(GroupKFold(min(num_groups, MAX_FOLDS)).split(x, groups=groups))
    search = GridSearchCV(
        Pipeline([("standardise", StandardScaler()), ("ridge", Ridge())]),
        {"ridge__alpha": PENALTIES},
        scoring="neg_mean_squared_error",
        cv=folds,
    ).fit(x, y)
    chosen = search.best_estimator_
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
