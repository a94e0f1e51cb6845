"""Ridge regression of expression on features, as a baseline and as the start of the model."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hinge.utils.errors import DataError
from hinge.utils.threads import in_threads, limit_threads

if TYPE_CHECKING:
    from hinge.data.gene_parts import GenePart

Result = TypeVar("Result")

PENALTIES = np.logspace(-1, 6, 29)
"""Ridge penalties that cross-validation chooses from, for standardised features: four a decade."""

MAX_FOLDS = 5

MOST_SEARCHED = 8
"""Parts of a panel whose cross-validated errors decide on the penalty."""

MOST_TOGETHER = 1 << 22
"""Numbers of the features up to which folds are fitted at the same time, each by one thread: it gains more than
several threads in each decomposition, and memory is no concern: their decompositions are kept."""

MOST_COMPONENTS = 64
"""Principal components of the values that have a penalty of their own, at most."""

SPOTS_OF_COMPONENT = 10
"""Spots that each of them takes, at least."""

SPOTS_OF_PRIOR = 150
"""Number of training spots whose covariance counts as much as what is known of it before."""


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


def fit_ridge(
    features: ArrayLike, values: ArrayLike, groups: ArrayLike, penalty_factors: NDArray | None = None
) -> RidgeFit:
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
    penalty_factors
        As of `RidgeFolds`.

    Raises
    ------
    DataError
        There is only one group.
    """
    folds = RidgeFolds(features, groups, penalty_factors)
    y = np.asarray(values, dtype=np.float64).reshape(len(folds.features), -1)
    errors = _held_out_errors(folds, y).sum(axis=1)
    return _fit(folds, y, Shrinkage.of_all_values(y.shape[1], float(PENALTIES[int(np.argmin(errors))])))


def fit_ridge_by_component(
    folds: "RidgeFolds", values: ArrayLike, loadings: NDArray | None = None
) -> tuple[RidgeFit, "Shrinkage"]:
    """Fit ridge regression as `fit_ridge` does, with penalties of their own for the leading components of the values.

    Genes vary together, and features predict the leading principal components of their values better than the rest. A
    single penalty shrinks these too much and the rest too little; the idea is that of Breiman and Friedman (Journal of
    the Royal Statistical Society B 59, 1997), where what is predicted of components is shrunk.

    Parameters
    ----------
    folds
        Of the spots.
    values
        (n, G).
    loadings
        (G, L) of factors that are known to vary in other data, for values of variance 1. The components are those of
        the training spots' covariance, shrunk towards that of these factors. None: not shrunk.

    Returns
    -------
    RidgeFit
        Its `penalty` is the best common one.
    Shrinkage
        The components and their penalties, each with the least cross-validated error: of the first, the second, the
        next two, four and so on, and of the rest.
    """
    y = np.asarray(values, dtype=np.float64)
    basis = _principal_components(y, loadings)
    errors = _held_out_errors(folds, np.concatenate([y, y @ basis], axis=1))
    errors, along = errors[:, : y.shape[1]].sum(axis=1), errors[:, y.shape[1] :]
    best, end = np.empty(basis.shape[1], dtype=int), 0
    while end < len(best):
        start, end = end, max(1, 2 * end)
        best[start:end] = along[:, start:end].sum(axis=1).argmin()
    rest = int((errors - along.sum(axis=1)).argmin())
    shrinkage = Shrinkage(basis, PENALTIES[best], float(PENALTIES[rest]))
    return replace(_fit(folds, y, shrinkage), penalty=float(PENALTIES[int(errors.argmin())])), shrinkage


def fit_ridge_of_parts(
    features: ArrayLike, values: ArrayLike, parts: "Sequence[GenePart]", penalty_factors: NDArray | None = None
) -> RidgeFit:
    """Fit ridge regression as `fit_ridge` does, each gene to the spots that have it, with one penalty for all genes.

    Parameters
    ----------
    features
        (n, d).
    values
        (n, G).
    parts
        Of `hinge.data.gene_parts.gene_parts`. The penalty has the least error over the largest of them.
    penalty_factors
        As of `RidgeFolds`.

    Returns
    -------
    RidgeFit
        `held_out` of a spot that lacks a gene is what the regression on all spots with the gene predicts.
    """
    x, y = np.asarray(features, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if len(parts) == 1 and len(parts[0].rows) == len(x):
        return fit_ridge(x, y, parts[0].groups, penalty_factors)
    sizes = [len(part.rows) * len(part.columns) for part in parts]
    errors = np.zeros(len(PENALTIES))
    for number in np.argsort([-size for size in sizes], kind="stable")[:MOST_SEARCHED]:
        errors += sizes[number] * _held_out_errors(*_piece(x, y, parts[number], penalty_factors)).mean(axis=1)
    penalty = float(PENALTIES[int(np.argmin(errors))])
    weight, bias, held_out = np.zeros((y.shape[1], x.shape[1])), np.zeros(y.shape[1]), np.zeros_like(y)
    for part in parts:
        of_part, target = _piece(x, y, part, penalty_factors)  # one at a time: together they are many times x
        fit = _fit(of_part, target, Shrinkage.of_all_values(target.shape[1], penalty))
        weight[part.columns], bias[part.columns] = fit.weight, fit.bias
        held_out[:, part.columns] = fit.predict(x)
        held_out[np.ix_(part.rows, part.columns)] = fit.held_out
    return RidgeFit(weight, bias, held_out, penalty)


def _piece(
    x: NDArray, y: NDArray, part: "GenePart", penalty_factors: NDArray | None
) -> tuple["RidgeFolds", NDArray[np.float64]]:
    """Return the folds and the values (m, C) of the spots and genes of a part."""
    return RidgeFolds(x[part.rows], part.groups, penalty_factors), y[np.ix_(part.rows, part.columns)]


class RidgeAxes:
    """The principal axes of some spots' standardised features, with which a ridge regression of any penalty is cheap.

    Parameters
    ----------
    features
        (n, d) of the spots to fit to.
    penalty_factors
        (d,) by which the penalties of each feature are multiplied; None: 1.
    """

    def __init__(self, features: NDArray, penalty_factors: NDArray | None = None):
        from sklearn.preprocessing import StandardScaler

        scaler = StandardScaler().fit(features)
        self.centre = scaler.mean_
        # a feature that is k times as wide needs 1 / k of the weight, of which the penalty takes the square
        self.width = scaler.scale_ if penalty_factors is None else scaler.scale_ * np.sqrt(penalty_factors)
        self._standardised = (features - self.centre) / self.width
        self.sizes, self.vectors = _principal_axes(self._standardised)

    def products(self, values: NDArray) -> tuple[NDArray, NDArray]:
        """Return the products (r, G) of the axes with centred values (n, G), and the mean of the values (G,)."""
        mean = values.mean(axis=0)
        return self.vectors.T @ (self._standardised.T @ (values - mean)), mean

    def coordinates(self, features: NDArray) -> NDArray[np.float64]:
        """Return the coordinates (m, r) of other spots' features (m, d)."""
        return ((features - self.centre) / self.width) @ self.vectors


class RidgeFolds:
    """Spots in folds for cross-validation, with the principal axes of the spots that each fold fits to.

    Parameters
    ----------
    features
        (n, d).
    groups
        (n,) of which whole ones are held out, in at most five folds.
    penalty_factors
        (d,) by which the penalties of each feature are multiplied; None: 1.

    Attributes
    ----------
    folds
        Of each, the numbers of the spots to fit to and of those to hold out.

    Raises
    ------
    DataError
        There is only one group.
    """

    def __init__(self, features: ArrayLike, groups: ArrayLike, penalty_factors: NDArray | None = None):
        from sklearn.model_selection import GroupKFold

        self.features, self.penalty_factors = np.asarray(features, dtype=np.float64), penalty_factors
        num_groups = len(np.unique(groups))
        if num_groups < 2:
            raise DataError("cross-validation of ridge regression takes training spots of at least two groups")
        splitter = GroupKFold(min(num_groups, MAX_FOLDS))
        self.folds: list[tuple[NDArray, NDArray]] = list(splitter.split(self.features, groups=groups))
        self.small = self.features.size <= MOST_TOGETHER
        self._kept: dict[int, RidgeAxes] = {}

    def axes(self, number: int) -> RidgeAxes:
        """Return the axes of the spots that a fold fits to; those of all spots for the number of folds."""
        if number in self._kept:
            return self._kept[number]
        rows = slice(None) if number == len(self.folds) else self.folds[number][0]
        axes = RidgeAxes(self.features[rows], self.penalty_factors)
        if self.small:
            self._kept[number] = axes
        return axes

    def map(self, function: Callable[[int], Result]) -> list[Result]:
        """Return the results of a function of the number of each fold, small ones computed at the same time."""
        # decompositions of small matrices are kept from several threads each
        with limit_threads() if self.small else contextlib.nullcontext():
            return list(in_threads(function, range(len(self.folds)), None if self.small else 1))


@dataclass(frozen=True)
class Shrinkage:
    """Ridge penalties of the principal components of values (n, G).

    Attributes
    ----------
    basis
        (G, K) orthonormal, the components.
    penalties
        (K,).
    rest
        Penalty of what is outside of these components.
    """

    basis: NDArray[np.float64]
    penalties: NDArray[np.float64]
    rest: float

    @classmethod
    def of_all_values(cls, count: int, penalty: float) -> Self:
        """Return a single penalty for G values."""
        return cls(np.zeros((count, 0)), np.zeros(0), penalty)

    def coefficients(self, axes: RidgeAxes, products: NDArray) -> NDArray[np.float64]:
        """Return the regression coefficients (r, G) along the axes, of products (r, G) of `RidgeAxes.products`."""
        of_rest = 1 / (axes.sizes + self.rest)[:, None]
        along = (products @ self.basis) * (1 / (axes.sizes[:, None] + self.penalties) - of_rest)
        return products * of_rest + along @ self.basis.T


def _held_out_errors(folds: RidgeFolds, y: NDArray) -> NDArray[np.float64]:
    """Return the mean squared error (number of `PENALTIES`, C) of held-out spots' values (n, C), mean over folds.

    One eigendecomposition of the products of features serves all penalties of a fold; a search that fits each penalty
    by itself takes many times as long.
    """

    def of_fold(number: int) -> NDArray[np.float64]:
        (fit, held), axes = folds.folds[number], folds.axes(number)
        products, mean = axes.products(y[fit])
        held_out, target = axes.coordinates(folds.features[held]), y[held] - mean
        predictions = (held_out @ (products / (axes.sizes + penalty)[:, None]) for penalty in PENALTIES)
        return np.stack([((predicted - target) ** 2).mean(axis=0) for predicted in predictions])

    return np.mean(folds.map(of_fold), axis=0)


def _principal_axes(x: NDArray) -> tuple[NDArray, NDArray]:
    """Return the eigenvalues (r,) and eigenvectors (d, r) of xᵀx, from the smaller product of x (n, d)."""
    if len(x) >= x.shape[1]:
        sizes, vectors = np.linalg.eigh(x.T @ x)
        return np.maximum(sizes, 0.0), vectors
    sizes, vectors = np.linalg.eigh(x @ x.T)
    kept = sizes > 1e-12 * max(sizes[-1], 1e-300)
    return sizes[kept], x.T @ (vectors[:, kept] / np.sqrt(sizes[kept]))


def _principal_components(y: NDArray, loadings: NDArray | None) -> NDArray[np.float64]:
    """Return the leading principal components (G, K) of values (n, G), K a power of two, or 0 where spots are few.

    The covariance is shrunk towards that of factors with loadings (G, L) for values of variance 1; None: not shrunk.
    """
    from sklearn.utils.extmath import randomized_svd

    most = min(MOST_COMPONENTS, len(y) // SPOTS_OF_COMPONENT, y.shape[1] - 1)
    if most < 1:
        return np.zeros((y.shape[1], 0))
    rows = (y - y.mean(axis=0)) / np.sqrt(len(y))
    if loadings is not None:
        share = SPOTS_OF_PRIOR / (len(y) + SPOTS_OF_PRIOR)
        known = (loadings * y.std(axis=0)[:, None]).T
        rows = np.concatenate([np.sqrt(1 - share) * rows, np.sqrt(share) * known])
    return randomized_svd(rows, 1 << (most.bit_length() - 1), random_state=0)[2].T


def _fit(folds: RidgeFolds, y: NDArray, shrinkage: Shrinkage) -> RidgeFit:
    """Return the fit to values (n, G) with given penalties."""
    held_out = np.empty_like(y)

    def hold_out(number: int) -> None:
        (fit, held), axes = folds.folds[number], folds.axes(number)
        products, mean = axes.products(y[fit])
        held_out[held] = axes.coordinates(folds.features[held]) @ shrinkage.coefficients(axes, products) + mean

    folds.map(hold_out)
    with limit_threads() if folds.small else contextlib.nullcontext():
        axes = folds.axes(len(folds.folds))
        products, mean = axes.products(y)
        weight = (axes.vectors @ shrinkage.coefficients(axes, products)).T / axes.width
    return RidgeFit(weight, mean - weight @ axes.centre, held_out, shrinkage.rest)


def shrink_correlations(
    covariance: NDArray[np.float64], correlation: NDArray[np.float64], share: float
) -> NDArray[np.float64]:
    """Return a covariance (G, G) of residuals whose correlations are shrunk by a share towards others (G, G)."""
    deviation = np.sqrt(np.diag(covariance))
    return (1 - share) * covariance + share * correlation * np.outer(deviation, deviation)
