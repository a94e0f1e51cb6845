"""The leverage of a spot against the closed form of ridge regression."""

import numpy as np
import pytest

from hinge.models.regression_uncertainty import RegressionUncertainty


@pytest.mark.parametrize("num_features", [5, 90])
def test_leverage_is_that_of_the_posterior_and_grows_away_from_training(num_features):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, num_features)) * rng.uniform(0.5, 2, num_features) + 3
    uncertainty = RegressionUncertainty(num_features)
    uncertainty.fit(x, penalty=7.0)
    scaled = (x - x.mean(axis=0)) / x.std(axis=0)
    posterior = np.linalg.inv(scaled.T @ scaled + 7.0 * np.eye(num_features))
    new = rng.normal(size=(8, num_features)) * 3
    standardised = (new - x.mean(axis=0)) / x.std(axis=0)
    exact = np.einsum("nd,de,ne->n", standardised, posterior, standardised)
    np.testing.assert_allclose((uncertainty.coefficients(new) ** 2).sum(axis=1), exact, rtol=1e-3)
    # spots like those of training add nothing beyond what their residuals contain, others do
    excess = (uncertainty.excess(new) ** 2).sum(axis=1)
    np.testing.assert_allclose(excess, np.maximum(exact - float(uncertainty.typical), 0), rtol=1e-3)
    assert not uncertainty.excess(x.mean(axis=0, keepdims=True)).any()
    assert uncertainty.novelty(x.mean(axis=0, keepdims=True))[0] < 1e-3
    assert uncertainty.novelty(new * 10).min() > 1


def test_a_part_of_the_spots_stands_for_all():
    features = np.random.default_rng(2).normal(size=(80, 12))
    whole, part = RegressionUncertainty(12), RegressionUncertainty(12)
    whole.fit(np.repeat(features, 3, axis=0), 20.0)
    part.fit(features, 20.0, num_spots=240)
    others = np.random.default_rng(3).normal(size=(9, 12)) * 2
    leverages = [(each.coefficients(others) ** 2).sum(axis=1) for each in (whole, part)]
    np.testing.assert_allclose(leverages[1], leverages[0], rtol=1e-4)
    np.testing.assert_allclose(part.novelty(others), whole.novelty(others), rtol=0.05)
