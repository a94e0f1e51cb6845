"""Accuracy of one predicted value for each spot and gene."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import pearsonr
from sklearn.metrics import mean_absolute_error, mean_squared_error

from hinge.evaluation.metrics.accuracy import error_parts, gene_pcc, mean_scores, summarise_pcc
from hinge.utils.errors import DataError

PCC = ("pcc_10", "pcc_50", "pcc_200", "pcc_mean", "pcc_hvg50")


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    measured = rng.gamma(2.0, size=(40, 250)) * rng.uniform(0.2, 3.0, size=250)
    return measured, 0.6 * measured + rng.normal(size=measured.shape)


def test_gene_pcc_is_scipys_for_each_gene(pair):
    measured, predicted = pair
    expected = [pearsonr(measured[:, gene], predicted[:, gene]).statistic for gene in range(250)]
    np.testing.assert_allclose(gene_pcc(measured, predicted), expected, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(
    arrays(np.float32, (7, 3), elements=st.floats(0, 16, width=32)),
    arrays(np.float32, (7, 3), elements=st.floats(0, 16, width=32)),
    st.floats(0.1, 10),
    st.floats(-5, 5),
)
def test_gene_pcc_stays_in_bounds_and_ignores_scale_and_shift(measured, predicted, scale, shift):
    pcc = gene_pcc(measured, predicted)
    np.testing.assert_array_equal(np.isnan(pcc), np.ptp(measured, axis=0) == 0)
    assert (np.abs(pcc[~np.isnan(pcc)]) <= 1).all()
    varies = predicted.std(axis=0) > 1e-3
    moved = gene_pcc(measured, scale * predicted.astype(float) + shift)
    np.testing.assert_allclose(moved[varies], pcc[varies], atol=1e-6)


def test_constant_genes_measured_have_no_pcc_and_predicted_get_zero(pair):
    measured, predicted = (array.copy() for array in pair)
    measured[:, 0] = 3.0
    measured[:, 1] = predicted[:, 1] = 0.0
    # a mean tiled in float32 and averaged over draws is constant but for rounding
    predicted[:, 2] = 7.3 + 1e-7 * np.arange(40)
    pcc = gene_pcc(measured, predicted)
    assert np.isnan(pcc[:2]).all()
    assert pcc[2] == 0
    scores = mean_scores(measured, predicted)
    assert scores["n_genes_constant"] == 2
    assert scores["pcc_mean"] == pytest.approx(pcc[2:].mean())
    assert np.isfinite(list(scores.values())).all()


def test_summaries_take_the_best_genes_or_the_most_variable():
    pcc = np.linspace(-0.2, 0.9, 300)
    variance = np.linspace(5.0, 1.0, 300)  # the most variable genes are predicted worst
    pcc[0], variance[0] = np.nan, 0.0
    scores = summarise_pcc(pcc, variance)
    assert scores["pcc_10"] == pytest.approx(pcc[-10:].mean())
    assert scores["pcc_50"] == pytest.approx(pcc[-50:].mean())
    assert scores["pcc_200"] == pytest.approx(pcc[-200:].mean())
    assert scores["pcc_mean"] == pytest.approx(pcc[1:].mean())
    assert scores["pcc_hvg50"] == pytest.approx(pcc[1:51].mean())


def test_k_larger_than_the_panel_is_the_mean_of_all_genes():
    scores = summarise_pcc([0.1, 0.5, 0.3], [1.0, 2.0, 3.0])
    assert [scores[name] for name in PCC] == pytest.approx([0.3] * 5)


def test_errors_are_sklearns_and_rvd_is_the_formula(pair):
    measured, predicted = pair
    scores = mean_scores(measured, predicted)
    assert scores["mse"] == pytest.approx(mean_squared_error(measured, predicted))
    assert scores["mae"] == pytest.approx(mean_absolute_error(measured, predicted))
    var_measured, var_predicted = measured.var(axis=0), predicted.var(axis=0)
    assert scores["rvd"] == pytest.approx(np.mean((var_predicted - var_measured) ** 2 / var_measured**2))


def test_perfect_and_constant_predictions(pair):
    measured, _ = pair
    perfect = mean_scores(measured, measured)
    assert perfect["pcc_mean"] == pytest.approx(1)
    assert perfect["mse"] == perfect["mae"] == perfect["rvd"] == 0
    constant = mean_scores(measured, np.tile(measured.mean(axis=0), (40, 1)))
    assert constant["pcc_10"] == constant["pcc_mean"] == 0
    assert constant["mse"] == pytest.approx(measured.var(axis=0).mean())
    assert constant["rvd"] == pytest.approx(1)


def test_one_gene(pair):
    measured, predicted = pair
    scores = mean_scores(measured[:, :1], predicted[:, :1])
    expected = pearsonr(measured[:, 0], predicted[:, 0]).statistic
    assert [scores[name] for name in PCC] == pytest.approx([expected] * 5)


def test_one_spot_has_errors_but_no_correlation(pair):
    measured, predicted = pair
    scores = mean_scores(measured[:1], predicted[:1])
    assert np.isnan([scores[name] for name in (*PCC, "rvd")]).all()
    assert scores["n_genes_constant"] == 250
    assert scores["mse"] == pytest.approx(mean_squared_error(measured[:1], predicted[:1]))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_named(pair, bad):
    measured, predicted = pair
    predicted[3, 7] = bad
    with pytest.raises(DataError, match=r"the prediction .* spot 3, gene 7"):
        mean_scores(measured, predicted)
    with pytest.raises(DataError, match="the measured slide"):
        mean_scores(predicted, measured)


def test_shapes_must_match(pair):
    measured, predicted = pair
    with pytest.raises(DataError, match="39 spots x 250 genes, the measured slide 40 x 250"):
        mean_scores(measured, predicted[1:])
    with pytest.raises(DataError, match=r"shape \(0, 250\)"):
        mean_scores(measured[:0], predicted[:0])


def test_level_slope_and_pattern_add_up_to_the_error():
    rng = np.random.default_rng(0)
    measured = rng.normal(size=(40, 5))
    predicted = 0.5 * measured + rng.normal(size=(40, 5)) + 2.0
    parts = error_parts(measured, predicted)
    assert sum(parts.values()) == pytest.approx(((predicted - measured) ** 2).mean())
    assert error_parts(measured, measured + 3.0) == pytest.approx({"mse_level": 9, "mse_slope": 0, "mse_pattern": 0})
    centred = measured - measured.mean(axis=0)
    half = error_parts(centred, 0.5 * centred)
    assert half["mse_slope"] == pytest.approx(0.25 * (centred**2).mean())
    assert half["mse_level"] == pytest.approx(0) and half["mse_pattern"] == pytest.approx(0, abs=1e-12)
    constant = error_parts(centred, np.zeros_like(centred))
    assert constant["mse_pattern"] == pytest.approx((centred**2).mean())
