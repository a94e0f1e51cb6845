"""Numbers at their ends: round trips, schedules, scores against other libraries, half precision, a million counts."""

import math
from itertools import pairwise

import numpy as np
import pytest
import scipy.stats
import scoringrules
import sklearn.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from hinge.backbones import CellFMConfig, CellFMModel
from hinge.data.transforms import get_transform
from hinge.diffusion import MaskedDiffusionScheduler
from hinge.diffusion.scheduler import FILLS, SCHEDULES
from hinge.evaluation import (
    coexpression_scores,
    correlation_matrix,
    coverage,
    crps_of_spots,
    energy_score,
    gene_pcc,
    matrix_scores,
    mean_scores,
    pit_distribution,
    score_draws,
    variogram_score,
)
from hinge.models import HingeModel
from hinge.models.options import COUNT_HEADS, HEADS
from hinge.utils.errors import DataError

TRANSFORMS = ("log2p1", "log1p_cp10k")
FEW = settings(max_examples=40, deadline=None)
MILLION = 1e6

counts = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=6), elements=st.integers(0, 10**6))
numbers = st.floats(-1e3, 1e3, width=32)


@st.composite
def pairs(draw, least_spots=1, least_genes=1):
    """Two matrices (n, G) of one shape."""
    shape = draw(st.integers(least_spots, 12)), draw(st.integers(least_genes, 5))
    return tuple(draw(arrays(np.float64, shape, elements=numbers)) for _ in range(2))


@st.composite
def measured_and_draws(draw, least_draws=2, least_genes=1):
    """Measured (n, G) and draws (K, n, G)."""
    shape = draw(st.integers(1, 6)), draw(st.integers(least_genes, 4))
    few = st.integers(0, 40).map(lambda number: number / 4)
    return tuple(
        draw(arrays(np.float64, size, elements=few)) for size in (shape, (draw(st.integers(least_draws, 7)), *shape))
    )


# --- transforms -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRANSFORMS)
@given(counts)
@FEW
def test_counts_come_back(name, values):
    """Also from torch, from integers, and where a spot is empty."""
    transform, total = get_transform(name), values.sum(axis=1)
    there = transform.forward(values, total)
    assert there.dtype == np.float32 and np.isfinite(there).all() and (there >= 0).all()
    np.testing.assert_allclose(transform.inverse(there, total), values, rtol=2e-5, atol=1e-4)
    again = transform.forward(torch.from_numpy(values.astype(np.int64)), torch.from_numpy(total))
    np.testing.assert_allclose(again.numpy(), there, rtol=1e-5)
    # the order of counts is kept
    for spot, own in zip(there, values, strict=True):
        assert (np.diff(spot[np.argsort(own, kind="stable")]) >= 0).all()


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_counts_are_transformed(name, dtype):
    """float16 ends at 65,504: a million is infinite before any transform, and is not made NaN by it."""
    values = torch.tensor([[0.0, 1.0, 100.0, 60_000.0, MILLION]]).to(dtype)
    total = torch.tensor([2e6])
    there = get_transform(name).forward(values, total)
    assert there.dtype == torch.float32 and not there.isnan().any()
    finite = values.isfinite()
    assert there[finite].isfinite().all()
    back = get_transform(name).inverse(there.to(dtype)[finite][None], total)
    assert not back.isnan().any()


# --- schedules and masks ----------------------------------------------------------------------------


@given(
    st.sampled_from(SCHEDULES),
    st.integers(1, 200),
    st.integers(1, 20_000),
    st.floats(0.05, 8),
)
@FEW
def test_schedules_rise_from_nothing_to_everything(schedule, steps, genes, exponent):
    made = MaskedDiffusionScheduler(steps, schedule, exponent=exponent)
    share, masked = (each(np.arange(steps + 1), genes) for each in (made.masked_share, made.num_masked))
    assert share[0] == 0 and share[-1] == pytest.approx(1, abs=1e-12)
    assert (np.diff(share) >= 0).all() and ((share >= 0) & (share <= 1 + 1e-12)).all()
    assert masked[0] == 0 and masked[-1] == genes
    assert (np.diff(masked) >= 0).all()
    np.testing.assert_allclose(masked, share * genes, atol=1)


@given(
    st.sampled_from(SCHEDULES),
    st.sampled_from(["budget", "bernoulli"]),
    st.sampled_from(FILLS),
    st.integers(1, 30),
    st.integers(1, 30),
    st.data(),
)
@FEW
def test_sampling_reveals_every_gene_once_and_keeps_it(schedule, reveal, fill, steps, genes, data):
    """Any number of reverse steps, each gene takes the value of the step it was revealed in."""
    made = MaskedDiffusionScheduler(steps, schedule, reveal=reveal, fill=fill)
    made.set_timesteps(data.draw(st.integers(1, steps)))
    uniform = torch.rand(2, genes, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    values, visible, mask_times = torch.zeros(2, genes), torch.zeros(2, genes), made.mask_times(uniform)
    revealed = torch.zeros(2, genes)
    for number, timestep in enumerate(made.timesteps.tolist(), 1):
        step = made.step(torch.full((2, genes), float(number)), timestep, values, visible, mask_times)
        values, visible = step.prev_sample, step.visible
        revealed += step.revealed
    assert (revealed == 1).all() and (visible == 1).all()
    assert ((values >= 1) & (values <= len(made.timesteps))).all()
    assert made.timesteps[0] == steps and all(a > b for a, b in pairwise(made.timesteps.tolist()))


@given(st.integers(2, 40), st.integers(0, 99))
@FEW
def test_masked_values_leave_no_trace(genes, seed):
    """What is masked is filled: what stood there does not matter, be it NaN."""
    made = MaskedDiffusionScheduler(10, fill="noise")
    rng = torch.Generator().manual_seed(seed)
    x0, uniform = torch.rand(3, genes, generator=rng), torch.rand(3, genes, generator=rng)
    noise, timesteps = torch.randn(3, genes, generator=rng), torch.tensor([2, 5, 10])
    filled, visible = made.add_mask(x0, timesteps, uniform=uniform, noise=noise)
    other, _ = made.add_mask(torch.where(visible > 0, x0, math.nan), timesteps, uniform=uniform, noise=noise)
    assert torch.equal(filled, other) and torch.equal(filled[visible > 0], x0[visible > 0])


# --- scores against other libraries -----------------------------------------------------------------


@given(pairs(least_spots=3))
@FEW
def test_correlations_are_scipys(values):
    measured, predicted = values
    pcc = gene_pcc(measured, predicted)
    for gene, own in enumerate(pcc):
        x, y = measured[:, gene], predicted[:, gene]
        if np.ptp(x) <= 1e-3 * np.abs(x).max():
            continue  # constant, or close to what counts as constant: tested below
        if np.ptp(y) <= 1e-3 * np.abs(y).max():
            assert own == 0 or np.ptp(y) > 0
            continue
        assert own == pytest.approx(scipy.stats.pearsonr(x, y).statistic, abs=1e-6)


@given(pairs(least_spots=2))
@FEW
def test_errors_are_sklearns(values):
    scores = mean_scores(*values)
    assert scores["mse"] == pytest.approx(sklearn.metrics.mean_squared_error(*values), rel=1e-9, abs=1e-12)
    assert scores["mae"] == pytest.approx(sklearn.metrics.mean_absolute_error(*values), rel=1e-9, abs=1e-12)


@given(measured_and_draws())
@FEW
def test_crps_and_energy_score_are_scoringrules(values):
    measured, draws = values
    fair = scoringrules.crps_ensemble(measured, np.moveaxis(draws, 0, -1), estimator="fair")
    np.testing.assert_allclose(crps_of_spots(measured, draws), np.asarray(fair).mean(axis=1), atol=1e-8)
    vectors = scoringrules.es_ensemble(measured, np.moveaxis(draws, 0, 1), estimator="fair")
    np.testing.assert_allclose(energy_score(measured, draws), vectors, atol=1e-6)


@given(measured_and_draws(least_genes=2))
@FEW
def test_variogram_score_is_scoringrules(values):
    measured, draws = values
    genes = measured.shape[1]
    theirs = scoringrules.vs_ensemble(measured, np.moveaxis(draws, 0, 1), p=0.5, estimator="fair")
    # theirs is the sum over ordered pairs
    np.testing.assert_allclose(variogram_score(measured, draws), np.asarray(theirs) / (genes * (genes - 1)), atol=1e-4)


@given(pairs(least_spots=3, least_genes=2))
@FEW
def test_correlation_matrices_are_numpys(values):
    matrix = correlation_matrix(values[0])
    varies = np.ptp(values[0], axis=0) > 1e-3 * np.abs(values[0]).max(axis=0)
    if varies.sum() > 1:
        expected = np.corrcoef(values[0][:, varies], rowvar=False)
        np.testing.assert_allclose(matrix[np.ix_(varies, varies)], expected, atol=1e-6)
    np.testing.assert_array_equal(matrix, matrix.T)
    assert (np.abs(matrix[np.isfinite(matrix)]) <= 1).all()


@given(measured_and_draws(least_draws=1))
@FEW
def test_the_pit_is_a_distribution(values):
    points = np.linspace(0, 1, 21)
    mass = pit_distribution(*values, points)
    assert mass[0] == pytest.approx(0) and mass[-1] == pytest.approx(1) and (np.diff(mass) >= -1e-12).all()
    known = coverage(*values)
    assert np.isnan(known).all() or (np.nanmin(known) >= -1e-12 and np.nanmax(known) <= 1 + 1e-12)


# --- ends -------------------------------------------------------------------------------------------


def test_constant_genes_have_no_correlation():
    rng = np.random.default_rng(0)
    measured, predicted = rng.random((20, 4)), rng.random((20, 4))
    measured[:, 0] = 3
    predicted[:, 1] = 3
    pcc = gene_pcc(measured, predicted)
    assert np.isnan(pcc[0]) and pcc[1] == 0 and np.isfinite(pcc[2:]).all()
    matrix = correlation_matrix(measured)
    assert np.isnan(matrix[0]).all() and np.isnan(matrix[:, 0]).all() and np.isfinite(matrix[1:, 1:]).all()
    scores = coexpression_scores(measured, np.stack([predicted, predicted + 1]))
    assert all(np.isfinite(value) for value in scores.values())
    nothing = coexpression_scores(np.ones((20, 4)), np.stack([predicted] * 2))
    assert all(math.isnan(value) for value in nothing.values())


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1)])
def test_single_spots_and_single_genes(shape):
    """A number or, by definition, NaN."""
    rng = np.random.default_rng(0)
    measured, draws = rng.random(shape), rng.random((3, *shape))
    scores = {**mean_scores(measured, draws[0]), **coexpression_scores(measured, draws), **score_draws(measured, draws)}
    assert scores["mse"] >= 0
    if shape[0] == 1:
        assert math.isnan(scores["pcc_mean"]) and math.isnan(scores["r"])
    if shape[1] == 1:
        assert math.isnan(scores["r"]) and math.isnan(scores["rmse"])
        assert np.isnan(variogram_score(measured, draws)).all()
    assert np.isfinite(crps_of_spots(measured, draws)).all() and np.isfinite(energy_score(measured, draws)).all()
    assert not any(math.isinf(value) for value in scores.values())


def test_no_draws_and_one_draw():
    measured = np.ones((4, 3))
    for score in (crps_of_spots, energy_score, variogram_score, score_draws, coverage, coexpression_scores):
        with pytest.raises(DataError):
            score(measured, np.empty((0, 4, 3)))
    for score in (crps_of_spots, energy_score, variogram_score):
        assert np.isnan(score(measured, np.ones((1, 4, 3)))).all()


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0, 0)])
def test_no_spots_and_no_genes(shape):
    nothing = np.empty(shape)
    for score in (gene_pcc, mean_scores, coexpression_scores):
        with pytest.raises(DataError, match="matrix of spots x genes"):
            score(nothing, nothing)
    for score in (crps_of_spots, energy_score, variogram_score, coverage):
        with pytest.raises(DataError):
            score(nothing, np.empty((2, *shape)))
    assert all(math.isnan(value) for value in matrix_scores(np.empty((0, 0)), np.empty((0, 0))).values())


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_named(wrong):
    measured, draws = np.ones((4, 3)), np.ones((2, 4, 3))
    draws[1, 2, 0] = wrong
    for score in (crps_of_spots, energy_score, variogram_score, coverage, coexpression_scores):
        with pytest.raises(DataError):
            score(measured, draws)


# --- half precision ---------------------------------------------------------------------------------


def model(head, transform, dtype, **options):
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_value_bins": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = CellFMModel(CellFMConfig(num_genes=8, **size))
        options |= {"transform": transform, "library_size": transform == "log1p_cp10k"}
        made = HingeModel.from_backbone(backbone, feature_dim=6, num_genes=6, head=head, **options)
    backbone.to(dtype)
    return made.eval()


def million(transform):
    """Values (4, 6) up to a million counts a gene, and their library size (4,)."""
    counts = torch.tensor([[0, 1, 10, 1000, 65_504, MILLION], [MILLION] * 6, [0, 0, 0, 0, 0, 1], [7, 3, 0, 1, 2, 0]])
    library_size = counts.sum(dim=1)
    return get_transform(transform).forward(counts, library_size), library_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("head", HEADS)
def test_a_model_gives_numbers_for_a_million_counts(head, transform, dtype):
    """Loss, its gradient, mean, likelihood and draws, under autocast as in training with `precision: bf16`."""
    made = model(head, transform, dtype)
    values, library_size = million(transform)
    visible = torch.tensor([[1.0, 0, 1, 0, 1, 0]]).expand(4, 6)
    given = {"library_size": library_size} if made.library_size_model is not None else {}
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = made(
            values * visible, visible, torch.tensor([1, 10, 20, 50]), torch.randn(4, 6), torch.arange(1, 7), **given
        )
    loss = output.loss(values)
    assert loss.isfinite().all() and not output.log_prob(values).isnan().any()
    assert head == "point" or output.log_prob(values).isfinite().all()  # a point mass has −∞ beside its point
    loss.mean().backward()
    gradients = [parameter.grad for parameter in made.parameters() if parameter.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)
    uniform = torch.tensor([1e-6, 0.1, 0.5, 0.9, 0.999999, 1 - 1e-7]).expand(4, 6)
    with torch.no_grad():
        for result in (output.mean, output.stddev, output.icdf(uniform)):
            assert result.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head", COUNT_HEADS)
def test_likelihoods_are_computed_in_full_precision(head, dtype):
    """Tokens in half precision and parameters far from where they begin: no NaN for any count."""
    made = model(head, "log2p1", torch.float32)
    values, _ = million("log2p1")
    visible = torch.zeros(4, 6)
    with torch.no_grad():
        for parameter in made.value_head.parameters():
            parameter.normal_(0, 3, generator=torch.Generator().manual_seed(1))
    features = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        output = made(values * 0, visible, torch.full((4,), 50), features, torch.arange(1, 7))
    rough = type(output)(
        **{
            name: value.to(dtype).float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in vars(output).items()
            if not name.startswith("_")
        }
    )
    for each in (output, rough):
        assert not each.log_prob(values).isnan().any() and not each.loss(values).isnan().any()
        assert each.mean.isfinite().all()
        assert each.icdf(torch.full((4, 6), 0.999)).isfinite().all()
