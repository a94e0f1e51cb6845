"""Baselines: simple methods on the same features, which a model is compared with."""

import itertools
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hinge.evaluation.completion import complete_spots
from hinge.evaluation.metrics.accuracy import as_matrix
from hinge.evaluation.metrics.coexpression import correlation_matrix
from hinge.evaluation.names import BASELINES, DEFAULT_BASELINES, DEFAULT_DRAWS, LEVELLED, PRETRAINED
from hinge.evaluation.predictions import Prediction
from hinge.evaluation.ridge import MAX_FOLDS, fit_ridge, shrink_correlations
from hinge.utils.errors import ConfigError, DataError

if TYPE_CHECKING:
    from hinge.data.spots import SpotTable
    from hinge.evaluation.ridge import RidgeFit

BASELINES_VERSION = 1
"""Version of the baselines: kept predictions of another one are not used. Raise it with every change of a baseline."""

NEIGHBOURS = (5, 10, 20, 40, 80)
"""Numbers of neighbours that cross-validation chooses from."""

# weights of the correlations of other counts that cross-validation chooses from
_SHRINKAGES = (0.0, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9)

_MLP_WEIGHT_DECAY = 3.0  # of scikit-learn's loss, in which a batch divides it by its size


def baseline_predictions(
    train: "SpotTable",
    test: "SpotTable",
    methods: Sequence[str] = DEFAULT_BASELINES,
    *,
    n_draws: int = DEFAULT_DRAWS,
    seed: int = 0,
    levels: NDArray | None = None,
    correlation: NDArray | None = None,
) -> list[Prediction]:
    """Predict one slide from others by the methods of `fit_baselines`.

    Parameters
    ----------
    train, test
        Spots on the same panel, under the same transform, with features of the same encoder; of several
        views of a patch the first is used, the patch as it is.
    methods, n_draws, seed, levels, correlation
        See `fit_baselines`. Genes that a training slide lacks are completed, see `complete_spots`.

    Raises
    ------
    DataError
        If the two tables do not fit each other, share a spot, or lack features.
    """
    from hinge.data.spots import spot_groups

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
    train = complete_spots(train, seed)
    return fit_baselines(
        train.features[:, 0],
        train.values,
        spot_groups(train.slide, train.coords, "fold"),
        test.features[:, 0],
        methods,
        n_draws=n_draws,
        seed=seed,
        levels=levels,
        correlation=correlation,
    )


def fit_baselines(
    train_features: ArrayLike,
    train_values: ArrayLike,
    train_groups: ArrayLike,
    test_features: ArrayLike,
    methods: Sequence[str] = DEFAULT_BASELINES,
    *,
    n_draws: int = DEFAULT_DRAWS,
    seed: int = 0,
    levels: NDArray | None = None,
    correlation: NDArray | None = None,
) -> list[Prediction]:
    """Fit the simple methods on training spots and predict the test spots.

    - `mean`: each gene's mean over the training spots.
    - `ridge-hest`: standardised features, 256 principal components, ridge with penalty 100 / (components ·
      G), as in HEST-Benchmark [1]_ but with an intercept, without which its errors would mean nothing.
    - `ridge-cv`: ridge on standardised features with a cross-validated penalty, see `fit_ridge`. Not clipped: a
      prediction may be below 0.
    - `ridge-cv+residual`: the same mean; draws are that mean plus Gaussian noise, clipped at 0. The noise is
      independent between spots and correlated between genes, with the Ledoit-Wolf [2]_ covariance of the
      cross-validated residuals (training residuals would be too small).
    - `ridge-cv+residual+level`: the same with the mean of each gene over the test slide replaced by a given level, a
      drawn one for each draw. It separates what is known of the slide as a whole from what the model adds.
    - `ridge-cv+residual+pretrained`: `ridge-cv+residual` whose residual correlations are shrunk towards those of other
      counts, with the weight of the largest likelihood of held-out groups.
    - `knn`: retrieval, as BLEEP [3]_ infers: the mean of the training spots that are nearest in standardised
      features, their number of `NEIGHBOURS` by cross-validation over groups; a draw is the whole expression of
      one of them. (BLEEP learns the space first; here it is the encoder's.)
    - `mlp`: two layers on the features, as on top of ST-Net's [4]_ encoder; see `fit_mlp`.
    - `training-correlation`: the correlation matrix of all training spots.

    Parameters
    ----------
    train_features, test_features
        Features (n_train, d) and (n_test, d).
    train_values
        Values (n_train, G) in transform units.
    train_groups
        Group of each training spot (n_train,), at least two; see `hinge.data.spots.spot_groups`.
    methods
        Which of them.
    n_draws
        Draws of `ridge-cv+residual` and `knn`.
    seed
        Of these draws, of the MLP, and of a randomised PCA where the features are many.
    levels
        (1 + K, G) expected level of the slide and that of each draw, for `ridge-cv+residual+level`; without them that
        method is left out.
    correlation
        (G, G) gene-gene correlations for `ridge-cv+residual+pretrained`; without them that method is left out.

    Returns
    -------
    list of Prediction
        In the order above.

    Raises
    ------
    ConfigError
        If there is no such method.
    DataError
        If a value is not finite, the shapes do not match or there is only one group.

    References
    ----------
    .. [1] Jaume et al., "HEST-1k: A Dataset for Spatial Transcriptomics and Histology Image Analysis",
       NeurIPS 2024.
    .. [2] Ledoit, Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", Journal of
       Multivariate Analysis 88, 2004.
    .. [3] Xie et al., "Spatially Resolved Gene Expression Prediction from H&E Histology Images via Bi-modal
       Contrastive Learning", NeurIPS 2023.
    .. [4] He et al., "Integrating spatial gene expression and breast tumour morphology via deep learning",
       Nature Biomedical Engineering 4, 2020.
    """
    unknown = [method for method in methods if method not in BASELINES]
    if unknown:
        raise ConfigError(f"there is no baseline {unknown[0]!r}; choose from {', '.join(BASELINES)}")
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
    n_test = len(test_features)

    fit = _Fit(train_features, train_values, train_groups, test_features, n_draws, seed, levels, correlation)
    makers = {
        "mean": lambda: Prediction("mean", mean=np.tile(train_values.mean(axis=0), (n_test, 1))),
        "ridge-hest": fit.ridge_hest,
        "ridge-cv": lambda: Prediction("ridge-cv", mean=fit.ridge),
        "ridge-cv+residual": fit.ridge_with_residual,
        LEVELLED: fit.ridge_with_level,
        PRETRAINED: fit.ridge_with_pretrained,
        "knn": fit.neighbours,
        "mlp": lambda: Prediction(
            "mlp", mean=fit_mlp(train_features, train_values, train_groups, test_features, seed=seed)
        ),
        "training-correlation": lambda: Prediction(
            "training-correlation", correlation=correlation_matrix(train_values)
        ),
    }
    left_out = {name for name, given in ((LEVELLED, levels), (PRETRAINED, correlation)) if given is None}
    return [makers[method]() for method in BASELINES if method in methods and method not in left_out]


class _Fit:
    """What the methods of `fit_baselines` share; arguments as there, checked."""

    def __init__(self, features, values, groups, test_features, n_draws: int, seed: int, levels=None, correlation=None):
        self.features, self.values, self.groups, self.test = features, values, groups, test_features
        self.n_draws, self.seed, self.n_genes = n_draws, seed, values.shape[1]
        self.levels, self.correlation = levels, correlation

    def predict(self, model) -> NDArray:
        """Predicted values (n_test, G), also of a single gene, for which scikit-learn leaves out the axis."""
        return model.predict(self.test).reshape(len(self.test), self.n_genes)

    @cached_property
    def ridge_fit(self) -> "RidgeFit":
        return fit_ridge(self.features, self.values, self.groups)

    @cached_property
    def ridge(self) -> NDArray:
        return self.ridge_fit.predict(self.test)

    def ridge_hest(self) -> Prediction:
        from sklearn.decomposition import PCA
        from sklearn.linear_model import Ridge
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        n_components = min(256, *self.features.shape)
        pca = PCA(n_components, random_state=self.seed)
        model = make_pipeline(StandardScaler(), pca, Ridge(100 / (n_components * self.n_genes)))
        return Prediction("ridge-hest", mean=self.predict(model.fit(self.features, self.values)))

    @cached_property
    def covariance(self) -> NDArray:
        return _covariance(self.values - self.ridge_fit.held_out, None, 0.0)

    def draw(self, means: Iterable[NDArray], covariance: NDArray) -> NDArray[np.float32]:
        """Draws (n_draws, n_test, n_genes): a mean (n_test, n_genes) each, plus random residuals, clipped at 0.

        One at a time, because the residuals of all draws of a large slide take several times the memory of the draws.
        """
        sizes, vectors = np.linalg.eigh(covariance)
        root = (vectors * np.sqrt(np.maximum(sizes, 0.0))).T
        draws = np.empty((self.n_draws, len(self.test), self.n_genes), dtype=np.float32)
        rng = np.random.default_rng(self.seed)
        for draw, mean in zip(draws, means, strict=True):
            draw[:] = np.maximum(mean + rng.standard_normal(draw.shape) @ root, 0.0)
        return draws

    def ridge_with_residual(self) -> Prediction:
        draws = self.draw(itertools.repeat(self.ridge, self.n_draws), self.covariance)
        return Prediction("ridge-cv+residual", mean=self.ridge, draws=draws)

    def ridge_with_level(self) -> Prediction:
        pattern, levels = self.ridge - self.ridge.mean(axis=0), np.asarray(self.levels, dtype=np.float64)
        drawn = levels[1 + np.arange(self.n_draws) % (len(levels) - 1)]
        draws = self.draw((pattern + level for level in drawn), self.covariance)
        return Prediction(LEVELLED, mean=np.maximum(pattern + levels[0], 0.0), draws=draws)

    def ridge_with_pretrained(self) -> Prediction:
        from scipy.stats import multivariate_normal
        from sklearn.model_selection import GroupKFold

        residual = self.values - self.ridge_fit.held_out
        scores = np.zeros(len(_SHRINKAGES))
        for fit, held in GroupKFold(min(len(np.unique(self.groups)), MAX_FOLDS)).split(residual, groups=self.groups):
            for number, share in enumerate(_SHRINKAGES):
                covariance = _covariance(residual[fit], self.correlation, share)
                scores[number] += multivariate_normal.logpdf(residual[held], cov=covariance, allow_singular=True).sum()
        best = _SHRINKAGES[int(np.argmax(scores))]
        draws = self.draw(itertools.repeat(self.ridge, self.n_draws), _covariance(residual, self.correlation, best))
        return Prediction(PRETRAINED, mean=self.ridge, draws=draws)

    def neighbours(self) -> Prediction:
        from sklearn.model_selection import GroupKFold

        # a fold of the search has fewer spots than all together
        _, sizes = np.unique(self.groups, return_counts=True)
        most = max(1, len(self.values) - sizes.max() * -(-len(sizes) // MAX_FOLDS))
        counts = [count for count in NEIGHBOURS if count <= most] or [most]
        errors = np.zeros(len(counts))
        for fit, held in GroupKFold(min(len(sizes), MAX_FOLDS)).split(self.features, groups=self.groups):
            nearest = _nearest(self.features[fit], self.features[held], counts[-1])
            for number, count in enumerate(counts):
                predicted = _mean_of_rows(self.values[fit], nearest[:, :count])
                errors[number] += np.mean((predicted - self.values[held]) ** 2)
        nearest = _nearest(self.features, self.test, counts[int(np.argmin(errors))])
        rng = np.random.default_rng(self.seed)
        chosen = rng.integers(nearest.shape[1], size=(self.n_draws, len(self.test)))
        spots = nearest[np.arange(len(self.test)), chosen]
        return Prediction("knn", mean=_mean_of_rows(self.values, nearest), draws=self.values.astype(np.float32)[spots])


def _nearest(features: NDArray, test: NDArray, count: int) -> NDArray[np.intp]:
    """Return the rows (m, count) of `features` (n, d) that are nearest to test spots (m, d), the nearest first."""
    from sklearn.neighbors import NearestNeighbors
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(features)
    search = NearestNeighbors(n_neighbors=count).fit(scaler.transform(features))
    return search.kneighbors(scaler.transform(test), return_distance=False)


def _mean_of_rows(values: NDArray, rows: NDArray) -> NDArray[np.float64]:
    """Return the means (m, G) of rows (m, k) of values (n, G), without the k values of every spot in memory."""
    from scipy.sparse import csr_matrix

    ends = np.arange(len(rows) + 1) * rows.shape[1]
    return csr_matrix((np.ones(rows.size), rows.ravel(), ends), (len(rows), len(values))) @ values / rows.shape[1]


def _covariance(residual: NDArray, correlation: NDArray | None, share: float) -> NDArray:
    """Return the Ledoit-Wolf covariance of residuals (n, G), its correlations shrunk by a share towards others."""
    from sklearn.covariance import LedoitWolf

    covariance = LedoitWolf().fit(residual).covariance_
    return covariance if correlation is None else shrink_correlations(covariance, correlation, share)


def fit_mlp(
    train_features: ArrayLike,
    train_values: ArrayLike,
    train_groups: ArrayLike,
    test_features: ArrayLike,
    *,
    seed: int = 0,
    width: int = 256,
    max_epochs: int = 200,
    patience: int = 15,
) -> NDArray[np.float32]:
    """Predict with a network of one hidden layer, trained until the error in held-out groups stops decreasing.

    Features and values are standardised over the training spots. About a fifth of the groups (at least one) is held
    out, and the weights of the epoch with the least error there are used. (`MLPRegressor` itself can hold out random
    spots only, which are neighbours of training spots, so its epochs are run one at a time.)

    Parameters
    ----------
    train_features, train_values, train_groups, test_features
        As in `fit_baselines`.
    seed
        Seed of weights, batches and held-out groups.
    width
        Hidden units.
    max_epochs, patience
        Maximum of epochs, and epochs without improvement before training stops.

    Returns
    -------
    ndarray
        (n_test, G) in transform units.
    """
    from sklearn.model_selection import GroupShuffleSplit
    from sklearn.neural_network import MLPRegressor
    from sklearn.preprocessing import StandardScaler

    x_scale, y_scale = StandardScaler().fit(train_features), StandardScaler().fit(train_values)
    x, y = x_scale.transform(train_features), y_scale.transform(train_values)
    held = next(GroupShuffleSplit(1, test_size=0.2, random_state=seed).split(x, groups=train_groups))
    (x_train, x_held), (y_train, y_held) = ([values[rows] for rows in held] for values in (x, y))
    network = MLPRegressor(
        hidden_layer_sizes=(width,), batch_size=min(64, len(x_train)), alpha=_MLP_WEIGHT_DECAY, random_state=seed
    )
    x_test = x_scale.transform(test_features)
    best, predicted, waited = np.inf, np.zeros((len(x_test), y.shape[1])), 0
    for _ in range(max_epochs):
        network.partial_fit(x_train, y_train if y.shape[1] > 1 else y_train[:, 0])
        error = np.mean((network.predict(x_held).reshape(y_held.shape) - y_held) ** 2)
        waited += 1
        if error < best:
            best, predicted, waited = error, network.predict(x_test).reshape(predicted.shape), 0
        if waited == patience:
            break
    return y_scale.inverse_transform(predicted).astype(np.float32)
