"""The simple methods, compared with scikit-learn put together by hand and with what made the data."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.model_selection import LeaveOneGroupOut
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from hinge.data.spots import SpotTable
from hinge.evaluation.baselines import (
    BASELINES,
    baseline_predictions,
    fit_baselines,
    fit_mlp,
)
from hinge.evaluation.ridge import PENALTIES
from hinge.utils.errors import ConfigError, DataError

METHODS = ["mean", "ridge-hest", "ridge-cv", "ridge-cv+residual", "knn", "training-correlation"]
N_GENES, N_FEATURES = 6, 10


@pytest.fixture(scope="module")
def data():
    """Three training groups and a test group: values linear in features, plus noise that genes share."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(400, N_FEATURES)) * np.geomspace(0.1, 10, N_FEATURES) + 3
    weights = rng.normal(size=(N_FEATURES, N_GENES)) / np.geomspace(0.1, 10, N_FEATURES)[:, None]
    mixing = rng.normal(size=(N_GENES, N_GENES))
    noise = rng.normal(size=(400, N_GENES)) @ mixing
    values = 60 + features @ weights + noise  # far from 0, where draws are clipped
    return features[:300], values[:300], np.repeat(["a", "b", "c"], 100), features[300:], values[300:], mixing


@pytest.fixture(scope="module")
def fitted(data):
    return {prediction.method: prediction for prediction in fit_baselines(*data[:4], n_draws=200, seed=0)}


def test_every_method_gives_what_it_says(fitted):
    assert list(fitted) == METHODS
    for name, prediction in fitted.items():
        assert (prediction.mean is not None) == (name != "training-correlation")
        assert (prediction.draws is not None) == (name in ("ridge-cv+residual", "knn"))
        assert (prediction.correlation is not None) == (name == "training-correlation")
        if prediction.mean is not None:
            assert prediction.mean.shape == (100, N_GENES)


def test_mean_and_training_correlation(data, fitted):
    _, values, *_ = data
    np.testing.assert_allclose(fitted["mean"].mean, np.tile(values.mean(axis=0), (100, 1)))
    np.testing.assert_allclose(fitted["training-correlation"].correlation, np.corrcoef(values.T), atol=1e-12)


def test_ridge_hest_is_the_published_recipe(data, fitted):
    features, values, _, test_features, *_ = data
    recipe = make_pipeline(StandardScaler(), PCA(N_FEATURES), Ridge(alpha=100 / (N_FEATURES * N_GENES)))
    expected = recipe.fit(features, values).predict(test_features)
    np.testing.assert_allclose(fitted["ridge-hest"].mean, expected, rtol=1e-8)


def test_ridge_hest_keeps_at_most_256_components():
    rng = np.random.default_rng(1)
    features, values = rng.normal(size=(600, 300)), rng.normal(size=(600, 2))
    ridge = fit_baselines(features, values, np.arange(600) % 2, features[:50], n_draws=1)[1]
    recipe = make_pipeline(StandardScaler(), PCA(256, random_state=0), Ridge(alpha=100 / (256 * 2)))
    np.testing.assert_allclose(ridge.mean, recipe.fit(features, values).predict(features[:50]), atol=1e-6)


def test_ridge_cv_takes_the_penalty_that_generalises_to_other_groups(data, fitted):
    features, values, groups, test_features, *_ = data
    scaler = StandardScaler().fit(features)
    folds = list(LeaveOneGroupOut().split(features, values, groups))
    search = RidgeCV(PENALTIES, scoring="neg_mean_squared_error", cv=folds).fit(scaler.transform(features), values)
    assert PENALTIES[0] < search.alpha_ < PENALTIES[-1]
    expected = search.predict(scaler.transform(test_features))
    np.testing.assert_allclose(fitted["ridge-cv"].mean, expected, rtol=1e-6)
    np.testing.assert_array_equal(fitted["ridge-cv+residual"].mean, fitted["ridge-cv"].mean)


@pytest.mark.full
def test_ridge_cv_does_not_overfit_groups():
    """Where features identify groups, random folds would overestimate the accuracy on another slide."""
    rng = np.random.default_rng(4)
    groups = rng.permutation(np.arange(300) % 6)
    features = rng.normal(size=(6, 20))[groups] + 0.1 * rng.normal(size=(300, 20))
    values = rng.normal(size=(6, 3))[groups] + 0.1 * rng.normal(size=(300, 3))
    by_group, at_random = (
        fit_baselines(features, values, labels, features)[2].mean for labels in (groups, np.arange(300))
    )
    assert by_group.std(axis=0).mean() < 0.5 * at_random.std(axis=0).mean()


def test_ridge_cv_gives_up_where_features_say_nothing(data):
    _, values, groups, *_ = data
    features = np.random.default_rng(2).normal(size=(300, 100))
    predictions = {p.method: p.mean for p in fit_baselines(features, values, groups, features[:20])}
    spread = {name: predictions[name].std(axis=0).mean() for name in ("ridge-cv", "ridge-hest")}
    assert spread["ridge-cv"] < 0.1 * spread["ridge-hest"]


def test_residual_draws_have_the_spread_and_correlation_of_the_noise(data, fitted):
    mixing = data[-1]
    prediction = fitted["ridge-cv+residual"]
    noise = (prediction.draws - prediction.mean).reshape(-1, N_GENES)
    np.testing.assert_allclose(noise.mean(axis=0), 0, atol=0.1)
    expected = mixing.T @ mixing
    scale = np.outer(*[np.sqrt(np.diag(expected))] * 2)
    np.testing.assert_allclose(np.cov(noise.T) / scale, expected / scale, atol=0.2)
    # spots are independent of each other
    across = np.corrcoef((prediction.draws - prediction.mean)[:, :2, 0].T)[0, 1]
    assert abs(across) < 0.25


def test_residuals_are_those_of_spots_not_trained_on():
    """A ridge on many features fits its training spots too well; its errors elsewhere are what counts."""
    rng = np.random.default_rng(3)
    features = rng.normal(size=(840, 60))
    values = 50 + features @ rng.normal(size=(60, 3)) + rng.normal(size=(840, 3))
    prediction = fit_baselines(features[:240], values[:240], np.arange(240) % 5, features[240:], n_draws=50)[3]
    drawn = (prediction.draws - prediction.mean).std()
    fit = Ridge().fit(features[:240], values[:240])
    assert drawn == pytest.approx((values[240:] - prediction.mean).std(), rel=0.1)
    assert drawn > 1.2 * (values[:240] - fit.predict(features[:240])).std()


def test_draws_are_not_below_zero_but_the_mean_may_be(data):
    features, values, groups, test_features, *_ = data
    low = fit_baselines(features, np.maximum(values - 60, 0), groups, test_features)
    assert low[3].draws.min() == 0
    assert low[2].mean.min() < 0


@pytest.mark.full
def test_the_seed_decides_the_draws(data, fitted):
    again = fit_baselines(*data[:4], n_draws=200, seed=0)[3].draws
    np.testing.assert_array_equal(again, fitted["ridge-cv+residual"].draws)
    assert (fit_baselines(*data[:4], n_draws=200, seed=1)[3].draws != again).any()


def test_one_gene_one_test_spot_and_one_draw(data):
    features, values, groups, test_features, *_ = data
    for prediction in fit_baselines(features, values[:, :1], groups, test_features[:1], BASELINES, n_draws=1):
        if prediction.mean is not None:
            assert prediction.mean.shape == (1, 1)
        if prediction.draws is not None:
            assert prediction.draws.shape == (1, 1, 1)


def test_constant_genes_and_features_are_predicted_as_they_were(data):
    features, values, groups, test_features, *_ = (array.copy() for array in data)
    features[:, 0], values[:, 2] = 4.0, 0.0
    for prediction in fit_baselines(features, values, groups, test_features, BASELINES)[:6]:
        # the network's own scale for a constant gene is 1, and what it predicts there small
        np.testing.assert_allclose(prediction.mean[:, 2], 0, atol=0.2 if prediction.method == "mlp" else 1e-9)
        assert np.isfinite(prediction.mean).all()


def test_neighbours_are_chosen_by_cross_validation_and_drawn_as_they_are(data, fitted):
    features, values, groups, test_features, truth, _ = data
    scaler, prediction = StandardScaler().fit(features), fitted["knn"]
    distance = cdist(scaler.transform(test_features), scaler.transform(features)).argsort(axis=1)
    means = {k: values[distance[:, :k]].mean(axis=1) for k in (5, 10, 20, 40, 80)}
    k = min(means, key=lambda k: np.abs(means[k] - prediction.mean).max())
    np.testing.assert_allclose(prediction.mean, means[k], rtol=1e-6)
    errors = {}
    for count in means:
        fold = [
            KNeighborsRegressor(count)
            .fit(scale.transform(features[groups != group]), values[groups != group])
            .predict(scale.transform(features[groups == group]))
            - values[groups == group]
            for group in "abc"
            for scale in [StandardScaler().fit(features[groups != group])]
        ]
        errors[count] = np.mean([np.mean(error**2) for error in fold])
    assert k == min(errors, key=errors.get)
    # every draw is the whole expression of one of the k, and all of them have their turn
    drawn = prediction.draws[:, 0]
    of_neighbours = values[distance[0, :k]].astype(np.float32)
    found = (drawn[:, None] == of_neighbours[None]).all(axis=2)
    assert (found.sum(axis=1) == 1).all() and found.any(axis=0).mean() > 0.9
    assert np.mean((prediction.mean - truth) ** 2) < np.mean((fitted["mean"].mean - truth) ** 2)


def test_few_spots_have_few_neighbours():
    rng = np.random.default_rng(0)
    features, values = rng.normal(size=(9, 3)), rng.normal(size=(9, 2))
    groups = np.repeat(["a", "b", "c"], 3)
    (prediction,) = fit_baselines(features, values, groups, features, ["knn"], n_draws=4)
    assert prediction.mean.shape == (9, 2) and np.isfinite(prediction.draws).all()


@pytest.mark.full
def test_the_network_learns_what_is_not_linear():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(900, 4))
    values = 5 + np.stack([features[:, 0] * features[:, 1], np.abs(features[:, 2])], axis=1)
    values += 0.1 * rng.normal(size=values.shape)
    groups = rng.integers(6, size=600)
    train, test = (features[:600], values[:600], groups), features[600:]
    with torch.random.fork_rng():
        torch.manual_seed(5)
        first = fit_mlp(*train, test, seed=1)
        torch.manual_seed(6)  # the seed given is the only one that counts
        np.testing.assert_array_equal(first, fit_mlp(*train, test, seed=1))
    assert (first != fit_mlp(*train, test, seed=2)).any()
    truth = values[600:]
    mean, ridge, network = fit_baselines(*train, test, ["mean", "ridge-cv", "mlp"], seed=1)
    np.testing.assert_array_equal(network.mean, first)
    errors = [np.mean((prediction.mean - truth) ** 2) for prediction in (mean, ridge, network)]
    assert errors[2] < 0.4 * errors[1] and errors[2] < 0.4 * errors[0]


def test_the_network_stops_before_it_learns_noise():
    rng = np.random.default_rng(1)
    features, values = rng.normal(size=(200, 30)), rng.normal(size=(200, 5))
    predicted = fit_mlp(features, values, np.arange(200) % 5, features)
    # learned by heart it would follow the values, of variance 1
    assert predicted.var() < 0.3


def test_only_known_methods_are_fitted_in_a_fixed_order(data):
    chosen = fit_baselines(*data[:4], ["training-correlation", "mean"])
    assert [prediction.method for prediction in chosen] == ["mean", "training-correlation"]
    with pytest.raises(ConfigError, match="no baseline 'stem'; choose from mean, ridge-hest"):
        fit_baselines(*data[:4], ["mean", "stem"])


def test_arrays_that_do_not_fit_are_errors(data):
    features, values, groups, test_features, *_ = data
    with pytest.raises(DataError, match="at least two groups"):
        fit_baselines(features, values, np.zeros(300), test_features)
    with pytest.raises(DataError, match="300, 299 and 300 spots"):
        fit_baselines(features, values[1:], groups, test_features)
    with pytest.raises(DataError, match="9 features a spot, training 10"):
        fit_baselines(features, values, groups, test_features[:, 1:])
    with pytest.raises(DataError, match="at least one draw"):
        fit_baselines(features, values, groups, test_features, n_draws=0)
    holed = features.copy()
    holed[2, 3] = np.nan
    with pytest.raises(DataError, match=r"the training features .* spot 2"):
        fit_baselines(holed, values, groups, test_features)


def table(data, rows, slide, views=2) -> SpotTable:
    features, values = np.concatenate([data[0], data[3]])[rows], np.concatenate([data[1], data[4]])[rows]
    views = np.stack([features, *[np.full_like(features, np.nan)] * (views - 1)], axis=1).astype(np.float32)
    n = len(values)
    return SpotTable(
        slide=np.broadcast_to(slide, n),
        barcodes=np.arange(n).astype(str),
        coords=np.random.default_rng(0).uniform(size=(n, 2)),
        features=views,
        counts=np.zeros((n, N_GENES), np.float32),
        library_size=np.zeros(n, np.float32),
        values=values.astype(np.float32),
        genes=[f"G{i}" for i in range(N_GENES)],
        transform="log2p1",
    )


@pytest.mark.full
def test_tables_are_predicted_from_the_first_view_and_the_slides(data):
    train, test = table(data, slice(300), data[2]), table(data, slice(300, 400), "d")
    predictions = baseline_predictions(train, test, n_draws=3, seed=5)
    expected = fit_baselines(train.features[:, 0], train.values, data[2], test.features[:, 0], n_draws=3, seed=5)
    np.testing.assert_array_equal(predictions[3].draws, expected[3].draws)
    one_slide = baseline_predictions(table(data, slice(300), "a"), test)
    assert [prediction.method for prediction in one_slide] == METHODS


def test_tables_that_do_not_fit_are_errors(data):
    train, test = table(data, slice(300), data[2]), table(data, slice(300, 400), "d")
    seen = replace(test, slide=np.full(100, "c"), barcodes=(np.arange(100) + 250).astype(str))
    for wrong, match in (
        (replace(test, genes=test.genes[::-1]), "different panels"),
        (replace(test, transform="log1p_cp10k"), "training values are log2p1, test values log1p_cp10k"),
        (replace(test, features=None), "some have none"),
        (seen, "spot 250 of slide c is among"),
    ):
        with pytest.raises(DataError, match=match):
            baseline_predictions(train, wrong)


def test_ridge_with_a_level_has_that_level_and_the_pattern_of_ridge(data, fitted):
    features, values, groups, test_features, *_ = data
    levels = np.stack([np.full(N_GENES, 40.0 + number) for number in range(4)])
    prediction = fit_baselines(features, values, groups, test_features, ["ridge-cv+residual+level"], levels=levels)[0]
    np.testing.assert_allclose(prediction.mean.mean(axis=0), levels[0])
    ridge = fitted["ridge-cv"].mean
    np.testing.assert_allclose(prediction.mean - levels[0], ridge - ridge.mean(axis=0))
    drawn = prediction.draws.mean(axis=1)
    np.testing.assert_allclose(drawn[:3].mean(axis=1), [41, 42, 43], atol=0.6)
    np.testing.assert_allclose(drawn[3], drawn[0], atol=1.5)  # levels are used again where draws are more


def test_residual_correlations_are_shrunk_to_given_ones_where_spots_are_few(data):
    features, values, groups, test_features, _, mixing = data
    covariance = mixing.T @ mixing
    truth = covariance / np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)))
    rows = np.r_[0:6, 100:106, 200:206]
    methods = ["ridge-cv+residual", "ridge-cv+residual+pretrained"]
    own, shrunk = fit_baselines(
        features[rows], values[rows], groups[rows], test_features, methods, n_draws=100, correlation=truth
    )

    def missed(prediction):
        noise = (prediction.draws - prediction.mean).reshape(-1, N_GENES)
        return np.abs(np.corrcoef(noise.T) - truth).mean()

    assert missed(shrunk) < missed(own)
    assert [each.method for each in fit_baselines(features, values, groups, test_features, methods)] == methods[:1]
