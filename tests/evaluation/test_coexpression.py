"""Gene-gene correlation matrices and how two of them are compared."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import pearsonr

from hinge.evaluation.metrics.coexpression import coexpression_scores, correlation_matrix, matrix_scores
from hinge.utils.errors import DataError

N_GENES = 12
UPPER = np.triu_indices(N_GENES, k=1)


@pytest.fixture
def slides():
    """A measured slide, and five draws from the same correlated distribution."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(4, N_GENES))
    noise = 0.5 * rng.normal(size=(6, 300, N_GENES))
    six = rng.normal(size=(6, 300, 4)) @ mixing + noise
    return six[0], six[1:]


def test_correlation_matrix_is_numpys(slides):
    measured, _ = slides
    np.testing.assert_allclose(correlation_matrix(measured), np.corrcoef(measured.T), atol=1e-12)


def test_constant_genes_are_nan_as_in_pandas_and_nothing_warns(slides, recwarn):
    measured, _ = slides
    measured[:, [2, 5]] = [0.0, 4.0]
    matrix = correlation_matrix(measured)
    np.testing.assert_allclose(matrix, pd.DataFrame(measured).corr(), atol=1e-12)
    assert np.isnan(matrix[2]).all() and np.isnan(matrix[:, 5]).all()
    assert not recwarn.list


def test_scores_are_over_pairs_of_different_genes(slides):
    measured, draws = slides
    one, two = np.corrcoef(measured.T)[UPPER], np.corrcoef(draws[0].T)[UPPER]
    scores = coexpression_scores(measured, draws[0])
    assert scores["r"] == pytest.approx(pearsonr(one, two).statistic)
    assert scores["rmse"] == pytest.approx(np.sqrt(np.mean((one - two) ** 2)))


def test_pairs_with_a_gene_constant_in_the_measured_slide_are_left_out(slides):
    measured, draws = slides
    rest = np.delete(np.arange(N_GENES), 3)
    expected = coexpression_scores(measured[:, rest], draws[0][:, rest])
    measured[:, 3] = 1.0
    assert coexpression_scores(measured, draws[0]) == pytest.approx(expected)


def test_a_gene_predicted_constant_goes_with_none(slides):
    measured, draws = slides
    predicted = draws[0].copy()
    predicted[:, 3] = 1.0
    matrix = np.corrcoef(draws[0].T)
    matrix[3], matrix[:, 3] = 0.0, 0.0
    one, two = np.corrcoef(measured.T)[UPPER], matrix[UPPER]
    scores = coexpression_scores(measured, predicted)
    assert scores["r"] == pytest.approx(pearsonr(one, two).statistic)
    assert scores["rmse"] == pytest.approx(np.sqrt(np.mean((one - two) ** 2)))


def test_draws_are_scored_one_by_one_and_averaged(slides):
    measured, draws = slides
    each = [coexpression_scores(measured, draw) for draw in draws]
    together = coexpression_scores(measured, draws.astype(np.float32))
    for key in ("r", "rmse"):
        assert together[key] == pytest.approx(np.mean([scores[key] for scores in each]), abs=1e-6)
    single = coexpression_scores(measured, draws[:1])
    assert {key: single[key] for key in ("r", "rmse")} == pytest.approx(each[0])
    assert single["r_pooled"] == pytest.approx(single["r"])


def test_good_draws_beat_their_mean_where_noise_is_not_shared():
    rng = np.random.default_rng(1)
    shared = rng.normal(size=(400, 1)) * np.linspace(-1, 1, N_GENES)
    slides = shared + rng.normal(size=(21, 400, N_GENES))
    measured, draws = slides[0], slides[1:]
    assert (
        coexpression_scores(measured, draws)["rmse"] < 0.08 < 0.3
        < coexpression_scores(measured, draws.mean(axis=0))["rmse"]
    )  # fmt: skip


def test_a_constant_prediction_has_r_zero(slides):
    measured, _ = slides
    scores = coexpression_scores(measured, np.ones_like(measured))
    assert scores["r"] == 0
    assert scores["rmse"] == pytest.approx(np.sqrt(np.mean(np.corrcoef(measured.T)[UPPER] ** 2)))


def test_one_spot_or_one_gene_has_no_pair_and_two_genes_have_no_r(slides):
    measured, draws = slides
    assert np.isnan(list(coexpression_scores(measured[:1], draws[0, :1]).values())).all()
    assert np.isnan(list(coexpression_scores(measured[:, :1], draws[0, :, :1]).values())).all()
    scores = coexpression_scores(measured[:, :2], draws[0][:, :2])
    assert np.isnan(scores["r"])
    difference = pearsonr(*measured[:, :2].T).statistic - pearsonr(*draws[0, :, :2].T).statistic
    assert scores["rmse"] == pytest.approx(abs(difference))


def test_nothing_to_score_is_an_error(slides):
    measured, draws = slides
    with pytest.raises(DataError, match="without any draw"):
        coexpression_scores(measured, draws[:0])
    with pytest.raises(DataError, match=r"\(11, 11\)"):
        matrix_scores(np.eye(12), np.eye(11))
    draws[2, 0, 0] = np.nan
    with pytest.raises(DataError, match="finite"):
        coexpression_scores(measured, draws)


def test_pooled_draws_show_what_they_stand_for():
    rng = np.random.default_rng(0)
    truth = 0.5 * np.ones((12, 12)) + 0.5 * np.eye(12)
    truth[:6, 6:] = truth[6:, :6] = -0.2
    measured = rng.multivariate_normal(np.zeros(12), truth, size=4000)
    draws = rng.multivariate_normal(np.zeros(12), truth, size=(30, 40))
    scores = coexpression_scores(measured, draws)
    # forty spots are uncertain by 0.16, their mean over thirty draws by 0.03
    assert scores["rmse"] > 0.1 > 0.04 > scores["rmse_pooled"]
    assert scores["r_pooled"] > 0.99 > scores["r"]
    matrices = np.mean([correlation_matrix(draw) for draw in draws], axis=0)
    assert np.isclose(scores["r_pooled"], matrix_scores(correlation_matrix(measured), matrices)["r"])
    assert set(coexpression_scores(measured, draws[0])) == {"r", "rmse"}
