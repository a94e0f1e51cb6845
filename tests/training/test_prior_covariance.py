"""Residual correlations of few spots are shrunk towards those of the pre-training counts, where that helps."""

import numpy as np
import torch

from hinge.backbones import CellFMConfig, CellFMModel
from hinge.training.prior_covariance import PriorCovariance, fit_factors, prior_covariance

GENES, FACTORS = 40, 4


def population(seed=0):
    rng = np.random.default_rng(seed)
    loadings = rng.normal(size=(GENES, FACTORS))
    covariance = loadings @ loadings.T + np.eye(GENES)
    return covariance, PriorCovariance(loadings, np.ones(GENES))


def draw(covariance, n, seed):
    return np.random.default_rng(seed).multivariate_normal(np.zeros(len(covariance)), covariance, n)


def test_a_good_prior_helps_few_spots_and_a_bad_one_is_left_out():
    covariance, prior = population()
    new = draw(covariance, 2000, 9)
    few = draw(covariance, 30, 1)
    groups = np.arange(30) % 5
    plain = fit_factors(few, groups, FACTORS, None).score(new)
    assert fit_factors(few, groups, FACTORS, prior).score(new) > plain + 1
    bad = population(seed=5)[1]
    many = draw(covariance, 600, 2)
    groups = np.arange(600) % 5
    plain = fit_factors(many, groups, FACTORS, None).score(new)
    assert fit_factors(many, groups, FACTORS, bad).score(new) > plain - 0.1


def test_the_correlations_are_those_within_patients():
    model = CellFMModel(
        CellFMConfig(
            num_genes=GENES,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_prior_factors=FACTORS + 2,
            num_spot_factors=FACTORS,
        )
    )
    rng = np.random.default_rng(0)
    loadings = rng.normal(size=(GENES, FACTORS + 2))
    model.set_expression_prior(np.zeros(GENES), loadings, np.ones(GENES))
    covariance = loadings[:, :FACTORS] @ loadings[:, :FACTORS].T + np.eye(GENES)
    expected = covariance / np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)))
    ids = torch.tensor([5, 1, 9])
    np.testing.assert_allclose(
        prior_covariance(model, ids).correlation(), expected[np.ix_([4, 0, 8], [4, 0, 8])], atol=1e-5
    )
    plain = CellFMModel(CellFMConfig(num_genes=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2))
    assert prior_covariance(plain, ids[:1]) is None
