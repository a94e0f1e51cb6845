"""Energy and variogram score against scoringrules, and that they see what they are for."""

import numpy as np
import pytest
import scoringrules

from hinge.evaluation.metrics.calibration import crps
from hinge.evaluation.metrics.multivariate import energy_score, variogram_score
from hinge.utils.errors import DataError


@pytest.fixture
def correlated():
    """Values of 60 spots x 8 genes and 12 draws of the same correlated distribution."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(8, 8))
    draws = 2 + rng.normal(size=(13, 60, 8)) @ mixing
    return draws[0], draws[1:]


@pytest.mark.parametrize("genes", [2, 3, 7, 8])
def test_they_are_the_fair_estimators_of_scoringrules(correlated, genes):
    measured, draws = (values[..., :genes] for values in correlated)
    drawn = draws.swapaxes(0, 1).copy()
    np.testing.assert_allclose(
        energy_score(measured, draws), scoringrules.es_ensemble(measured, drawn, estimator="fair"), rtol=1e-10
    )
    # over ordered pairs, the diagonal of zeros among them
    expected = scoringrules.vs_ensemble(measured, drawn, p=0.5, estimator="fair") / (genes * (genes - 1))
    np.testing.assert_allclose(variogram_score(measured, draws), expected, rtol=1e-4, atol=1e-6)


def test_the_energy_score_of_one_gene_is_the_crps(correlated):
    measured, draws = correlated
    assert energy_score(measured[:, :1], draws[:, :, :1]).mean() == pytest.approx(
        crps(measured[:, :1], draws[:, :, :1])
    )
    assert np.isnan(variogram_score(measured[:, :1], draws[:, :, :1])).all()


def test_they_do_not_depend_on_the_number_of_draws():
    rng = np.random.default_rng(1)
    measured = rng.normal(size=(3000, 5))
    for score in (energy_score, variogram_score):
        few, many = (score(measured, rng.normal(size=(k, 3000, 5))).mean() for k in (2, 25))
        assert few == pytest.approx(many, rel=0.03)


def test_they_charge_for_what_is_wrong(correlated):
    measured, draws = correlated
    for score in (energy_score, variogram_score):
        right = score(measured, draws).mean()
        assert right < score(measured, 2 * draws).mean()
        assert right < score(measured, 0.3 * draws).mean()
    # the variogram score sees dependence: genes drawn on their own, each with its right distribution
    rng = np.random.default_rng(2)
    apart = np.stack([rng.permutation(draws[:, :, gene].ravel()).reshape(12, 60) for gene in range(8)], axis=2)
    assert variogram_score(measured, draws).mean() < 0.95 * variogram_score(measured, apart).mean()
    # ... and not what all genes share
    np.testing.assert_allclose(variogram_score(measured, draws + 7), variogram_score(measured, draws), atol=1e-4)


@pytest.mark.parametrize("score", [energy_score, variogram_score])
def test_edges(correlated, score):
    measured, draws = correlated
    assert np.isnan(score(measured, draws[:1])).all()
    assert score(measured[:1], draws[:, :1]).shape == (1,)
    assert np.isfinite(score(np.zeros_like(measured), draws)).all()
    np.testing.assert_allclose(score(measured, np.stack([measured] * 3)), 0, atol=1e-6)
    for wrong in (draws[:0], draws[:, 1:], draws[0]):
        with pytest.raises(DataError, match="60 spots, 8 genes"):
            score(measured, wrong)
