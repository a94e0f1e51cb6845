"""Draws from features: the reveal loop, its random numbers, and devices without float64."""

import tracemalloc

import numpy as np
import pytest
import torch
from helpers.draws import draw_features

from hinge.backbones import CellFMConfig, CellFMModel
from hinge.diffusion import MaskedDiffusionScheduler, sampler
from hinge.diffusion.slide_effect import LoadingsEffect
from hinge.models import HingeModel, precision
from hinge.utils.errors import DataError

GENES, FEATURES = 12, 4


def make_parts(head="gaussian", fill="mask_token", reveal="budget", genes=12):
    torch.manual_seed(0)
    backbone = CellFMModel(
        CellFMConfig(num_genes=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_value_bins=8)
    )
    model = HingeModel.from_backbone(backbone, 5, genes, head=head).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, MaskedDiffusionScheduler(20, "linear", fill=fill, reveal=reveal)


@pytest.mark.parametrize("fill", ["mask_token", "noise", "zero"])
@pytest.mark.parametrize("reveal", ["budget", "bernoulli"])
def test_draws_do_not_depend_on_the_batch_size(fill, reveal):
    parts = make_parts(fill=fill, reveal=reveal)
    features, ids = np.random.default_rng(0).normal(size=(9, 5)), torch.arange(1, 13)
    names = [f"spot{i}" for i in range(9)]
    runs = {
        size: draw_features(*parts, features, ids, names, num_draws=3, num_inference_steps=6, batch_size=size, seed=4)
        for size in (1, 7, 64)
    }
    for size in (7, 64):
        np.testing.assert_allclose(runs[size].values, runs[1].values, atol=2e-5)
        np.testing.assert_allclose(runs[size].expected, runs[1].expected, atol=2e-5)
    again = draw_features(*parts, features, ids, names, num_draws=3, num_inference_steps=6, batch_size=7, seed=4)
    assert np.array_equal(again.values, runs[7].values)


def test_one_spot_and_later_draws_can_be_drawn_again_alone():
    parts = make_parts()
    features, ids = np.random.default_rng(0).normal(size=(4, 5)), torch.arange(1, 13)
    names = list("abcd")
    whole = draw_features(*parts, features, ids, names, num_draws=4, num_inference_steps=5, seed=1)
    alone = draw_features(*parts, features[2:3], ids, ["c"], num_draws=2, num_inference_steps=5, seed=1, first_draw=2)
    np.testing.assert_allclose(alone.values[:, 0], whole.values[2:, 2], atol=2e-5)
    other = draw_features(*parts, features, ids, names, num_draws=4, num_inference_steps=5, seed=2)
    assert not np.allclose(other.values, whole.values)


def test_draws_spread_and_are_not_negative():
    parts = make_parts()
    draws = draw_features(
        *parts, np.zeros((2, 5)), torch.arange(1, 13), ["a", "b"], num_draws=30, num_inference_steps=5
    )
    assert draws.values.shape == (30, 2, 12)
    assert draws.values.min() >= 0
    assert (draws.values.std(axis=0) > 0.1).any()


def test_more_steps_than_trained_are_refused():
    with pytest.raises(ValueError, match="between 1 and the 20"):
        draw_features(*make_parts(), np.zeros((1, 5)), torch.arange(1, 13), ["a"], num_inference_steps=21)


@pytest.mark.full
def test_memory_does_not_grow_with_the_spots():
    """Spots drawn alone share nothing, so nothing is kept of them; it was 35 MB."""
    parts, ids, peaks = make_parts(), torch.arange(1, 13), {}
    for spots in (20, 300):
        names, features = [f"spot{i}" for i in range(spots)], np.zeros((spots, 5), dtype=np.float32)
        tracemalloc.start()
        draw_features(*parts, features, ids, names, num_draws=2, num_inference_steps=2, batch_size=20)
        peaks[spots] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[300] < peaks[20] + 5e6


def slide_parts(fill="mask_token", library_size=False, head="rounded_gaussian"):
    torch.manual_seed(0)
    backbone = CellFMModel(
        CellFMConfig(num_genes=GENES, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_value_bins=8)
    )
    transform = "log1p_cp10k" if library_size else "log2p1"
    model = HingeModel.from_backbone(
        backbone,
        FEATURES,
        GENES,
        head=head,
        transform=transform,
        library_size=library_size,
        num_factors=3,
        num_slide_factors=4,
    ).eval()
    with torch.no_grad():
        model.gene_factor_model.mean.weight.normal_()
        model.gene_factor_model.readout.copy_(model.gene_factor_model.loadings)
        model.gene_factor_model.loadings.normal_()
        model.gene_factor_model.slide_loadings.normal_()
        model.gene_factor_model.spatial_share.fill_(0.5)
        model.gene_factor_model.factor_spatial_share.fill_(0.8)
        if head == "rounded_gaussian":
            model.value_head.gene_log_scale.fill_(0.0)
        if library_size:
            model.library_size_model.mean.bias.fill_(8.0)
    return model, MaskedDiffusionScheduler(10, "linear", fill=fill)


def draw(parts, rows=slice(None), **options):
    rng = np.random.default_rng(0)
    features, positions = rng.normal(size=(9, FEATURES)).astype(np.float32), rng.random((9, 2)) * 5
    names = np.array([f"b{i}" for i in range(9)])
    settings = {"num_draws": 3, "num_inference_steps": 4, "seed": 5, "slide": "s", "positions": positions[rows]}
    if "observed" in options:
        options["observed"] = options["observed"][rows]
    return draw_features(*parts, features[rows], torch.arange(1, GENES + 1), names[rows], **{**settings, **options})


@pytest.mark.full
@pytest.mark.parametrize("fill", ["mask_token", "noise"])
@pytest.mark.parametrize("library_size", [False, True])
def test_slides_are_drawn_the_same_in_any_batch(fill, library_size):
    parts = slide_parts(fill, library_size)
    whole = draw(parts, remasking=2)
    for batch in (1, 7, 64):
        again = draw(parts, remasking=2, batch_size=batch)
        np.testing.assert_allclose(again.values, whole.values, atol=1e-4)
        np.testing.assert_allclose(again.expected, whole.expected, atol=1e-4)
    alone = draw(parts, rows=slice(4, 5), remasking=2)
    np.testing.assert_allclose(alone.values[:, 0], whole.values[:, 4], atol=1e-4)
    assert whole.values.std(axis=0).max() > 0


@pytest.mark.parametrize("library_size", [False, True])
def test_threads_change_nothing(library_size):
    parts, before, drawn = slide_parts(library_size=library_size), torch.get_num_threads(), {}
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            drawn[threads] = draw(parts, remasking=1, batch_size=3)
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(drawn[1].values, drawn[4].values) and np.array_equal(drawn[1].expected, drawn[4].expected)


def test_measured_genes_pass_through_to_the_bit_and_inform_the_rest():
    parts = slide_parts()
    observed = np.full((9, GENES), np.nan, dtype=np.float32)
    observed[:6, :5] = np.random.default_rng(1).random((6, 5)).astype(np.float32) * 4
    drawn = draw(parts, observed=observed)
    known = ~np.isnan(observed)
    for values in drawn.values:
        np.testing.assert_array_equal(values[known], observed[known])
    np.testing.assert_allclose(drawn.expected[known], observed[known], atol=1e-6)
    free = draw(parts)
    assert not np.allclose(drawn.values[:, :6, 5:], free.values[:, :6, 5:])
    # spots without a measurement learn the shift of their slide from the others, and nothing else
    assert not np.allclose(drawn.values[:, 6:], free.values[:, 6:])
    untold = draw(parts, observed=observed, slide_effect=LoadingsEffect(parts[0], GENES, None))
    np.testing.assert_allclose(untold.values[:, 6:], free.values[:, 6:], atol=1e-4)
    everything = draw(parts, observed=np.ones((9, GENES), dtype=np.float32))
    assert (everything.values == 1).all()


def test_observed_values_of_another_shape_are_refused():
    with pytest.raises(DataError, match="observed values must be"):
        draw(slide_parts(), observed=np.zeros((9, GENES + 1), dtype=np.float32))
    inputs = sampler.SlideInputs("s", ["b"], np.zeros((1, FEATURES)))
    with pytest.raises(ValueError, match="need the positions"):
        sampler.draw_spots(*slide_parts(), torch.arange(1, GENES + 1), inputs, sampler.SamplingSettings())


def test_every_value_comes_from_the_schedulers_step(monkeypatch):
    """The sampler had a loop of its own, and `step` was called by tests alone."""
    model, scheduler = slide_parts()
    calls, step = [], scheduler.step

    def counted(*arguments, **named):
        calls.append(step(*arguments, **named))
        return calls[-1]

    monkeypatch.setattr(scheduler, "step", counted)
    drawn = draw((model, scheduler), remasking=1, num_draws=1, batch_size=64)
    assert len(calls) == 4 + 1
    np.testing.assert_array_equal(calls[-1].prev_sample.numpy(), drawn.values[0])
    assert sum(int(call.revealed.sum()) for call in calls[:4]) == 9 * GENES


@pytest.mark.parametrize("head", ["rounded_gaussian", "negative_binomial", "rounded_mixture", "gaussian"])
def test_float64_stays_on_the_cpu(head, monkeypatch):
    """Apple's MPS has no float64: all that is moved to the model's device is of another type."""
    model, scheduler = slide_parts(library_size=True, head=head)
    moved = []

    class Elsewhere(torch.Tensor):
        """A tensor that counts as one of another device: the result of a computation with it is one too."""

        @classmethod
        def __torch_function__(cls, function, types, arguments=(), named=None):
            result = super().__torch_function__(function, types, arguments, named or {})
            name = getattr(function, "__name__", "")
            if name in ("cpu", "numpy", "tolist", "item"):
                return result.as_subclass(torch.Tensor) if isinstance(result, torch.Tensor) else result
            for each in result if isinstance(result, tuple | list) else [result]:
                if isinstance(each, torch.Tensor) and isinstance(each, cls):
                    moved.append((name, each.dtype))
            return result

    monkeypatch.setattr(precision, "FLOAT64_DEVICES", ())
    to_device = sampler._Sampler._tensor
    monkeypatch.setattr(sampler._Sampler, "_tensor", lambda self, array: to_device(self, array).as_subclass(Elsewhere))
    observed = np.full((9, GENES), np.nan, dtype=np.float32)
    observed[:, 2] = 1
    drawn = draw((model, scheduler), observed=observed, remasking=1)
    assert len(moved) > 100 and np.isfinite(drawn.values).all()
    assert {name for name, dtype in moved if dtype == torch.float64} == set()
