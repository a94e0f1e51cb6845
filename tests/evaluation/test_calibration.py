"""Calibration scores, for any number of draws and with ties."""

import numpy as np
import pytest
import scoringrules
from hypothesis import given, settings
from hypothesis import strategies as st

from hinge.evaluation.metrics.calibration import CURVE_LEVELS, coverage, crps, pit_distribution
from hinge.utils.errors import DataError


@pytest.fixture
def poisson():
    """Counts, and 40 draws of the distribution that made them: most are 0."""
    rng = np.random.default_rng(0)
    rate = rng.gamma(0.7, size=(600, 20))
    return rng.poisson(rate).astype(float), rng.poisson(rate, size=(40, 600, 20)).astype(np.float32)


def test_crps_is_the_fair_estimator_of_scoringrules_on_all_spots(poisson):
    measured, draws = poisson
    expected = scoringrules.crps_ensemble(measured, draws.astype(float), m_axis=0, estimator="fair").mean()
    assert crps(measured, draws) == pytest.approx(expected)


def test_crps_is_the_formula():
    rng = np.random.default_rng(1)
    measured, draws = rng.normal(size=(3, 2)), rng.normal(size=(4, 3, 2))
    error = np.abs(draws - measured).mean()
    spread = np.abs(draws[:, None] - draws[None]).sum(axis=(0, 1)).mean() / (4 * 3)
    assert crps(measured, draws) == pytest.approx(error - spread / 2)


def test_crps_does_not_depend_on_the_number_of_draws():
    rng = np.random.default_rng(2)
    measured = rng.normal(size=(4000, 20))
    expected = scoringrules.crps_normal(measured, 0.0, 1.0).mean()
    for n_draws in (2, 5, 20):
        assert crps(measured, rng.normal(size=(n_draws, 4000, 20))) == pytest.approx(expected, abs=0.01)


def test_one_draw_has_no_crps_and_no_coverage(poisson):
    measured, draws = poisson
    assert np.isnan(crps(measured, draws[:1]))
    assert np.isnan(coverage(measured, draws[:1])).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=25))
def test_pit_is_uniform_if_each_of_several_values_takes_its_turn_as_the_measured_one(values):
    """Exactly so, for every number of draws and every pattern of ties."""
    values = np.array(values, dtype=float)
    points = np.linspace(0, 1, 11)
    others = [np.delete(values, turn)[:, None, None] for turn in range(len(values))]
    turns = [pit_distribution([[value]], rest, points) for value, rest in zip(values, others, strict=True)]
    np.testing.assert_allclose(np.mean(turns, axis=0), points, atol=1e-12)


@pytest.mark.parametrize("n_draws", [19, 20, 40])
def test_calibrated_draws_cover_what_they_should(poisson, n_draws):
    measured, draws = poisson
    np.testing.assert_allclose(coverage(measured, draws[:n_draws]), CURVE_LEVELS, atol=0.02)


def test_without_ties_the_outermost_draws_hold_their_share():
    rng = np.random.default_rng(3)
    measured, draws = rng.normal(size=(50, 4)), rng.normal(0.3, 0.7, size=(19, 50, 4))
    inside = (draws.min(axis=0) < measured) & (measured < draws.max(axis=0))
    assert coverage(measured, draws, [0.9])[0] == pytest.approx(inside.mean())


def test_narrow_draws_cover_less_and_wide_draws_more():
    rng = np.random.default_rng(4)
    measured, noise = rng.normal(size=(500, 5)), rng.normal(size=(20, 500, 5))
    assert (coverage(measured, 0.5 * noise) < np.array(CURVE_LEVELS) - 0.03).all()
    assert (coverage(measured, 2.0 * noise) > np.array(CURVE_LEVELS) + 0.03).all()
    assert coverage(measured, 0.0 * noise, [0.9])[0] == pytest.approx(0)
    histogram = np.diff(pit_distribution(measured, 0.5 * noise, np.linspace(0, 1, 8)))
    assert histogram.sum() == pytest.approx(1)
    assert histogram[[0, -1]].min() > 2 * histogram[3]


def test_levels_that_the_draws_cannot_resolve_are_nan(poisson):
    measured, draws = poisson
    assert np.isnan(coverage(measured, draws[:18], [0.9])).all()
    assert np.isfinite(coverage(measured, draws[:19], [0.9])).all()
    assert np.isnan(coverage(measured, draws[:2], [0.5])).all()
    assert np.isfinite(coverage(measured, draws[:3], [0.5])).all()


def test_values_that_were_transformed_alike_tie_whatever_their_float_type():
    measured = np.log2(np.full((5, 2), 3.0))
    draws = np.log2(np.full((20, 5, 2), 3.0, dtype=np.float32))
    assert coverage(measured, draws, [0.5])[0] == pytest.approx(0.5)


@pytest.mark.parametrize("score", [crps, coverage, lambda y, x: pit_distribution(y, x, [0.5])])
def test_draws_that_do_not_fit_are_errors(poisson, score):
    measured, draws = poisson
    for wrong in (draws[:0], draws[:, 1:], draws[0]):
        with pytest.raises(DataError, match="600 spots, 20 genes"):
            score(measured, wrong)
    draws[4, 3, 2] = np.nan
    with pytest.raises(DataError, match=r"draw 4 .* spot 3, gene 2"):
        score(measured, draws)
