"""One ridge regression for baselines, tasks and the model's initialisation."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import StandardScaler

from hinge.evaluation.baselines import fit_baselines
from hinge.evaluation.ridge import PENALTIES, fit_ridge
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
