"""What simple methods make of the same features: the lines a model has to be read beside."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from hinge.data.spots import SpotTable
from hinge.errors import DataError
from hinge.evaluation.coexpression import correlation_matrix
from hinge.evaluation.metrics import as_matrix

ALPHAS = np.logspace(0, 6, 13)
"""Ridge penalties that cross-validation chooses from, for standardised features: two a decade."""

_FOLDS = 5


@dataclass(frozen=True)
class Prediction:
    """What one method says of one slide. What it says nothing of is None.

    Attributes
    ----------
    method
        Name, as in the rows of scores.
    mean
        One value for each spot and gene (n, G), in transform units.
    draws
        Several possible slides (K, n, G), in transform units.
    correlation
        Gene-gene correlation matrix (G, G), from a method that predicts nothing else.
    """

    method: str
    mean: NDArray | None = None
    draws: NDArray | None = None
    correlation: NDArray | None = None


def spot_groups(slides: ArrayLike, coords: ArrayLike) -> NDArray:
    """Divide training spots into groups that cross-validation leaves out as a whole.

    The slides themselves; where there is only one, five bands of as many spots each across its longer side,
    since neighbouring spots resemble each other and random folds would flatter.

    Parameters
    ----------
    slides
        Slide of each spot (n,).
    coords
        Position of each spot (n, 2), in pixels.

    Returns
    -------
    ndarray
        (n,) labels.
    """
    slides, coords = np.asarray(slides), np.asarray(coords, dtype=np.float64)
    if len(np.unique(slides)) > 1:
        return slides
    along = coords[:, np.argmax(np.ptp(coords, axis=0))]
    return np.argsort(np.argsort(along, kind="stable"), kind="stable") * _FOLDS // len(along)


def baseline_predictions(train: SpotTable, test: SpotTable, *, n_draws: int = 20, seed: int = 0) -> list[Prediction]:
    """Predict one slide from others by the methods of `fit_baselines`.

    Parameters
    ----------
    train, test
        Spots on the same panel, under the same transform, with features of the same encoder; of several
        views of a patch the first is used, the patch as it is.
    n_draws, seed
        See `fit_baselines`.

    Raises
    ------
    DataError
        If the two tables do not fit each other, share a spot, or lack features.
    """
    if train.genes != test.genes:
        raise DataError("training spots and test spots are on different panels")
    if train.transform != test.transform:
        raise DataError(f"training values are {train.transform}, test values {test.transform}")
    if train.features is None or test.features is None:
        raise DataError("the baselines take features of the training and the test spots, but some have none")
    seen = set(zip(train.slide, train.barcodes, strict=True))
    for slide, barcode in zip(test.slide, test.barcodes, strict=True):
        if (slide, barcode) in seen:
            raise DataError(f"spot {barcode} of slide {slide} is among the training and the test spots")
    return fit_baselines(
        train.features[:, 0],
        train.values,
        spot_groups(train.slide, train.coords),
        test.features[:, 0],
        n_draws=n_draws,
        seed=seed,
    )


def fit_baselines(
    train_features: ArrayLike,
    train_values: ArrayLike,
    train_groups: ArrayLike,
    test_features: ArrayLike,
    *,
    n_draws: int = 20,
    seed: int = 0,
) -> list[Prediction]:
    """Fit the simple methods on training spots and predict the test spots.

    - `mean`: each gene's mean over the training spots.
    - `ridge-hest`: standardised features, 256 principal components, ridge with penalty 100 / (components ·
      G), as in HEST-Benchmark [1]_ but with an intercept, without which its errors would mean nothing.
    - `ridge-cv`: standardised features, ridge with the penalty of `ALPHAS` that has the least squared error
      in cross-validation over groups. Not clipped: a prediction may be below 0.
    - `ridge-cv+residual`: the same mean; draws are that mean plus Gaussian noise, clipped at 0. The noise is
      independent between spots and correlated between genes, with the Ledoit-Wolf [2]_ covariance of the
      cross-validated residuals (training residuals would be too small).
    - `training-correlation`: the correlation matrix of all training spots.

    Parameters
    ----------
    train_features, test_features
        Features (n_train, d) and (n_test, d).
    train_values
        Values (n_train, G) in transform units.
    train_groups
        Group of each training spot (n_train,), at least two; see `spot_groups`.
    n_draws
        Draws of `ridge-cv+residual`.
    seed
        Of these draws, and of a randomised PCA where the features are many.

    Returns
    -------
    list of Prediction
        In the order above.

    Raises
    ------
    DataError
        If a value is not finite, the shapes do not match or there is only one group.

    References
    ----------
    .. [1] Jaume et al., "HEST-1k: A Dataset for Spatial Transcriptomics and Histology Image Analysis",
       NeurIPS 2024.
    .. [2] Ledoit, Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", Journal of
       Multivariate Analysis 88, 2004.
    """
    train_features = as_matrix(train_features, "the training features")
    test_features = as_matrix(test_features, "the test features")
    train_values = as_matrix(train_values, "the training values")
    train_groups = np.asarray(train_groups)
    if not len(train_features) == len(train_values) == len(train_groups):
        raise DataError(
            f"training features, values and groups are of {len(train_features)}, {len(train_values)} and "
            f"{len(train_groups)} spots, but must be of the same"
        )
    if train_features.shape[1] != test_features.shape[1]:
        raise DataError(
            f"the test slide has {test_features.shape[1]} features a spot, training {train_features.shape[1]}"
        )
    n_groups = len(np.unique(train_groups))
    if n_groups < 2:
        raise DataError("cross-validation of the ridge baseline takes training spots of at least two groups")
    if n_draws < 1:
        raise DataError(f"the ridge baseline takes at least one draw, not {n_draws}")
    n_test, n_genes = len(test_features), train_values.shape[1]

    n_components = min(256, *train_features.shape)
    hest = make_pipeline(
        StandardScaler(), PCA(n_components, random_state=seed), Ridge(100 / (n_components * n_genes))
    ).fit(train_features, train_values)

    search = GridSearchCV(
        Pipeline([("standardise", StandardScaler()), ("ridge", Ridge())]),
        {"ridge__alpha": ALPHAS},
        scoring="neg_mean_squared_error",
        cv=GroupKFold(min(n_groups, _FOLDS)),
    ).fit(train_features, train_values, groups=train_groups)
    ridge = search.predict(test_features).reshape(n_test, n_genes)
    held_out = cross_val_predict(
        search.best_estimator_, train_features, train_values, groups=train_groups, cv=search.cv
    )
    covariance = LedoitWolf().fit(train_values - held_out.reshape(train_values.shape)).covariance_
    noise = np.random.default_rng(seed).multivariate_normal(
        np.zeros(n_genes), covariance, size=(n_draws, n_test), method="eigh"
    )

    return [
        Prediction("mean", mean=np.tile(train_values.mean(axis=0), (n_test, 1))),
        Prediction("ridge-hest", mean=hest.predict(test_features).reshape(n_test, n_genes)),
        Prediction("ridge-cv", mean=ridge),
        Prediction("ridge-cv+residual", mean=ridge, draws=np.maximum(ridge + noise, 0.0).astype(np.float32)),
        Prediction("training-correlation", correlation=correlation_matrix(train_values)),
    ]
