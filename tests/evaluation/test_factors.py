"""A factor analysis of the covariance alone is that of all spots."""

import numpy as np
import pytest
from sklearn.decomposition import FactorAnalysis

from hinge.evaluation.factors import fit_factor_analysis


@pytest.mark.parametrize("num_spots", [500, 12])
def test_fewer_rows_give_the_same_factors(num_spots):
    rng = np.random.default_rng(0)
    loadings = rng.normal(size=(3, 20)) * np.array([[3.0], [2.0], [1.0]])
    values = 5 + rng.normal(size=(num_spots, 3)) @ loadings + rng.normal(size=(num_spots, 20))
    expected = FactorAnalysis(3, svd_method="lapack", tol=0.05, max_iter=40).fit(values)
    found = fit_factor_analysis(values, 3, tol=0.05, max_iter=40)
    assert found.n_iter_ == expected.n_iter_
    np.testing.assert_allclose(found.get_covariance(), expected.get_covariance(), rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(found.mean_, expected.mean_)
    signs = np.sign((found.components_ * expected.components_).sum(axis=1))
    np.testing.assert_allclose(found.transform(values) * signs, expected.transform(values), atol=1e-7)
