"""One ridge regression for baselines, tasks and the model's initialisation."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import StandardScaler

from hinge.evaluation.baselines import fit_baselines
from hinge.evaluation.ridge import PENALTIES, RidgeAxes, RidgeFolds, Shrinkage, fit_ridge, fit_ridge_by_component
from hinge.utils.errors import DataError


@pytest.fixture
def spots():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(90, 6)) * [1, 5, 0.1, 1, 2, 1] + 3
    features[:, 5] = 3.0  # constant
    values = features @ rng.normal(size=(6, 4)) + rng.normal(size=(90, 4)) + 1
    return features, values, np.repeat(["a", "b", "c"], 30)


def by_hand(x, y, test, penalty):
    scale = StandardScaler().fit(x)
    return Ridge(penalty).fit(scale.transform(x), y).predict(scale.transform(test))


def test_the_penalty_has_the_least_cross_validated_error_and_predictions_are_out_of_fold(spots):
    x, y, groups = spots
    errors, held_out = [], []
    for penalty in PENALTIES:
        predicted = np.empty_like(y)
        for train, test in GroupKFold(3).split(x, groups=groups):
            predicted[test] = by_hand(x[train], y[train], x[test], penalty)
        held_out.append(predicted)
        errors.append(((predicted - y) ** 2).mean())
    fit, best = fit_ridge(x, y, groups), int(np.argmin(errors))
    assert fit.penalty == PENALTIES[best]
    np.testing.assert_allclose(fit.held_out, held_out[best], atol=1e-9)
    np.testing.assert_allclose(fit.predict(x), by_hand(x, y, x, PENALTIES[best]), atol=1e-9)
    assert fit.weight.shape == (4, 6) and fit.bias.shape == (4,)


def test_a_single_value_and_a_single_group(spots):
    x, y, groups = spots
    one = fit_ridge(x, y[:, 0], groups)
    assert one.weight.shape == (1, 6) and one.held_out.shape == one.predict(x).shape == (90, 1)
    with pytest.raises(DataError, match="at least two groups"):
        fit_ridge(x, y, np.zeros(90))


def test_the_baseline_is_this_regression(spots):
    x, y, groups = spots
    (found,) = fit_baselines(x, y, groups, x[:7], ["ridge-cv"])
    np.testing.assert_array_equal(found.mean, fit_ridge(x, y, groups).predict(x[:7]))


def low_rank(n=240, genes=40, seed=0, noise=1.5):
    """Values of which features predict two components well and the rest hardly."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 30))
    signal = x[:, :2] @ (2 * np.linalg.qr(rng.normal(size=(genes, 2)))[0].T)
    return x, signal * np.sqrt(genes) / 4 + noise * rng.normal(size=(n, genes)) + 3, signal * np.sqrt(genes) / 4 + 3


def test_penalties_of_components_have_the_least_cross_validated_error():
    x, y, _ = low_rank()
    groups = np.arange(240) // 60
    fit, shrinkage = fit_ridge_by_component(RidgeFolds(x, groups), y)
    basis = shrinkage.basis
    assert basis.shape == (40, 16) and np.allclose(basis.T @ basis, np.eye(16))
    folds = list(GroupKFold(4).split(x, groups=groups))

    def error(values, penalty):
        left = [values[b] - by_hand(x[a], values[a], x[b], penalty).reshape(values[b].shape) for a, b in folds]
        return np.mean([(each**2).mean() for each in left])

    def errors(values):
        return [error(values, penalty) for penalty in PENALTIES]

    along = y @ basis
    for start, end in ((0, 1), (1, 2), (2, 4), (4, 8), (8, 16)):
        assert set(shrinkage.penalties[start:end]) == {PENALTIES[int(np.argmin(errors(along[:, start:end])))]}
    rest = y - along @ basis.T
    assert shrinkage.rest == PENALTIES[int(np.argmin(errors(rest)))]
    assert fit.penalty == PENALTIES[int(np.argmin(errors(y)))]
    expected = by_hand(x, rest, x, shrinkage.rest)
    expected += np.stack([by_hand(x, along[:, k], x, p) for k, p in enumerate(shrinkage.penalties)], axis=1) @ basis.T
    np.testing.assert_allclose(fit.predict(x), expected, atol=1e-9)


def test_where_features_predict_a_few_components_penalties_of_their_own_predict_better():
    x, y, truth = low_rank()
    groups = np.arange(240) // 60
    one = ((fit_ridge(x, y, groups).predict(x) - truth) ** 2).mean()
    assert ((fit_ridge_by_component(RidgeFolds(x, groups), y)[0].predict(x) - truth) ** 2).mean() < 0.8 * one


def test_few_spots_and_single_or_constant_values_have_one_penalty(spots):
    x, y, groups = spots
    for values in (y[:, :1], np.zeros((90, 4))):
        fit, _ = fit_ridge_by_component(RidgeFolds(x, groups), values)
        np.testing.assert_allclose(fit.predict(x), fit_ridge(x, values, groups).predict(x), atol=1e-9)
    few = np.arange(0, 90, 12)
    fit, shrinkage = fit_ridge_by_component(RidgeFolds(x[few], groups[few]), y[few])
    assert shrinkage.basis.shape == (4, 0)
    np.testing.assert_allclose(fit.held_out, fit_ridge(x[few], y[few], groups[few]).held_out, atol=1e-9)


def test_a_penalty_factor_multiplies_the_penalty_of_a_feature(spots):
    x, y, _ = spots
    factors = np.array([1.0, 4.0, 1.0, 0.01, 1.0, 1.0])
    axes = RidgeAxes(x, factors)
    products, mean = axes.products(y)
    found = axes.coordinates(x) @ Shrinkage.of_all_values(4, 10.0).coefficients(axes, products) + mean
    scaled = StandardScaler().fit_transform(x)
    weight = np.linalg.solve(scaled.T @ scaled + np.diag(10 * factors), scaled.T @ (y - y.mean(axis=0)))
    np.testing.assert_allclose(found, scaled @ weight + y.mean(axis=0), atol=1e-9)


def test_components_of_few_spots_are_shrunk_towards_known_factors():
    """The right ones bring them closer to the programs that features predict; with many spots they do not count."""
    x, y, truth = low_rank(n=4000, noise=3.0)
    signal = np.linalg.svd(truth - truth.mean(axis=0), full_matrices=False)[2][:2]

    def found(rows, loadings):
        basis = fit_ridge_by_component(RidgeFolds(x[rows], rows % 4), y[rows], loadings)[1].basis[:, :2]
        return ((signal @ basis) ** 2).sum()

    loadings = 0.5 * signal.T * np.sqrt(40 / 2)
    few, many = np.arange(40), np.arange(4000)
    assert found(few, loadings) > found(few, None) + 0.1
    wrong = np.linalg.qr(np.random.default_rng(3).normal(size=(40, 2)))[0]
    assert found(many, wrong) > 0.98 * found(many, None)
