"""Scheduler, objective and sampling."""

import json
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hinge.backbones import CellFMConfig, CellFMModel
from hinge.diffusion import (
    HingePipeline,
    MaskedDiffusionScheduler,
    draw_timesteps,
    loss_mask,
    spot_uniforms,
    spot_weights,
)
from hinge.diffusion.scheduler import SCHEDULES
from hinge.models import HingeModel


def test_schedules_equal_the_published_ones(parity):
    for key, recorded in json.loads((parity / "mask_schedule.json").read_text()).items():
        name, options, genes, steps = key.split("|")
        options = json.loads(options)
        arguments = {"num_train_timesteps": int(steps[1:]), "schedule": "power" if name == "poly" else name}
        arguments |= {{"K_tail": "tail", "alpha": "exponent"}.get(k, k): value for k, value in options.items()}
        scheduler = MaskedDiffusionScheduler(**arguments)
        masked = scheduler.num_masked(range(int(steps[1:]) + 1), int(genes[1:]))
        assert masked.tolist() == recorded["masked"], key


@given(
    st.sampled_from(SCHEDULES),
    st.sampled_from(["budget", "bernoulli"]),
    st.integers(1, 60),
    st.integers(1, 40),
    st.integers(0, 2**31),
)
@settings(max_examples=80, deadline=None)
def test_masks_grow_with_time_from_none_to_all(schedule, reveal, steps, genes, seed):
    scheduler = MaskedDiffusionScheduler(steps, schedule, exponent=1.5, reveal=reveal)
    uniform = torch.rand(3, genes, generator=torch.Generator().manual_seed(seed))
    visible = [scheduler.visible_at(torch.full((3,), t), uniform) for t in range(steps + 1)]
    assert (visible[0] == 1).all()
    assert (visible[-1] == 0).all()
    for earlier, later in pairwise(visible):
        assert (later <= earlier).all()
    if reveal == "budget":
        masked = [int(genes - v[0].sum()) for v in visible]
        assert masked == scheduler.num_masked(range(steps + 1), genes).tolist()


def test_bernoulli_masks_with_the_schedule_s_probability():
    scheduler = MaskedDiffusionScheduler(10, "linear", reveal="bernoulli")
    uniform = torch.rand(400, 50, generator=torch.Generator().manual_seed(0))
    for t in (2, 5, 8):
        share = 1 - scheduler.visible_at(torch.full((400,), t), uniform).mean().item()
        assert share == pytest.approx(t / 10, abs=0.01)


def test_reverse_steps_reveal_the_budget_and_keep_what_is_visible():
    scheduler = MaskedDiffusionScheduler(50, "poly_auto")
    genes = 40
    uniform = torch.rand(4, genes, generator=torch.Generator().manual_seed(0))
    for count in (1, 7, 50):
        scheduler.set_timesteps(count)
        assert len(scheduler.timesteps) == count
        values, visible = torch.zeros(4, genes), torch.zeros(4, genes)
        for number, timestep in enumerate(scheduler.timesteps.tolist()):
            step = scheduler.step(torch.full((4, genes), float(number + 1)), timestep, values, visible, uniform)
            assert torch.equal(step.values[visible > 0], values[visible > 0])
            end = scheduler.previous_timestep(timestep)
            assert (step.visible.sum(1) == genes - scheduler.num_masked(end, genes)).all()
            assert torch.equal(step.visible - visible, step.revealed)
            values, visible = step.values, step.visible
        assert (visible == 1).all()
        assert (values > 0).all()


def test_fills():
    x0, uniform, noise = torch.rand(2, 8) + 1, torch.rand(2, 8), torch.randn(2, 8)
    for fill in ("zero", "mask_token", "noise"):
        scheduler = MaskedDiffusionScheduler(10, "linear", fill=fill)
        values, visible = scheduler.add_mask(x0, torch.tensor([5, 5]), uniform=uniform, noise=noise)
        assert torch.equal(values[visible > 0], x0[visible > 0])
        assert torch.equal(values[visible == 0], (noise if fill == "noise" else torch.zeros(2, 8))[visible == 0])


def test_losses_count_where_they_belong():
    scheduler = MaskedDiffusionScheduler(10, "linear")
    uniform = torch.rand(6, 20, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([1, 2, 5, 9, 10, 10])
    visible = scheduler.visible_at(timesteps, uniform)
    masked = loss_mask(scheduler, timesteps, visible, uniform, "masked")
    revealed = loss_mask(scheduler, timesteps, visible, uniform, "revealed")
    assert torch.equal(masked, 1 - visible)
    assert (revealed.sum(1) == 2).all()
    assert (revealed <= masked).all()
    per_spot = spot_weights(masked, "spot")
    torch.testing.assert_close(per_spot.sum(1), torch.ones(6))
    per_gene = spot_weights(masked, "gene")
    assert per_gene.sum().item() == pytest.approx(6)
    assert per_gene[per_gene > 0].unique().numel() == 1


def test_warm_start_draws_lightly_masked_steps_only():
    scheduler = MaskedDiffusionScheduler(50, "linear")
    generator = torch.Generator().manual_seed(0)
    warm = draw_timesteps(scheduler, 500, 100, generator, max_masked_share=0.2)
    assert warm.min() == 1 and warm.max() == 10
    late = draw_timesteps(scheduler, 2000, 100, generator)
    assert late.min() == 1 and late.max() == 50
    # a window narrower than the first step still leaves that step
    assert draw_timesteps(MaskedDiffusionScheduler(2, "linear"), 5, 10, generator, 0.1).tolist() == [1] * 5


def make_pipeline(head="gaussian", fill="mask_token", reveal="budget", genes=12):
    torch.manual_seed(0)
    backbone = CellFMModel(
        CellFMConfig(num_genes=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_value_bins=8)
    )
    model = HingeModel.from_backbone(backbone, 5, genes, head=head).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return HingePipeline(model, MaskedDiffusionScheduler(20, "linear", fill=fill, reveal=reveal))


@pytest.mark.parametrize("fill", ["mask_token", "noise", "zero"])
@pytest.mark.parametrize("reveal", ["budget", "bernoulli"])
def test_draws_do_not_depend_on_the_batch_size(fill, reveal):
    pipeline = make_pipeline(fill=fill, reveal=reveal)
    features, ids = np.random.default_rng(0).normal(size=(9, 5)), torch.arange(1, 13)
    names = [f"spot{i}" for i in range(9)]
    runs = {
        size: pipeline(features, ids, names, num_draws=3, num_inference_steps=6, batch_size=size, seed=4)
        for size in (1, 7, 64)
    }
    for size in (7, 64):
        np.testing.assert_allclose(runs[size].values, runs[1].values, atol=2e-5)
        np.testing.assert_allclose(runs[size].expected, runs[1].expected, atol=2e-5)
    again = pipeline(features, ids, names, num_draws=3, num_inference_steps=6, batch_size=7, seed=4)
    assert np.array_equal(again.values, runs[7].values)


def test_one_spot_and_later_draws_can_be_drawn_again_alone():
    pipeline = make_pipeline()
    features, ids = np.random.default_rng(0).normal(size=(4, 5)), torch.arange(1, 13)
    names = list("abcd")
    whole = pipeline(features, ids, names, num_draws=4, num_inference_steps=5, seed=1)
    alone = pipeline(features[2:3], ids, ["c"], num_draws=2, num_inference_steps=5, seed=1, first_draw=2)
    np.testing.assert_allclose(alone.values[:, 0], whole.values[2:, 2], atol=2e-5)
    other = pipeline(features, ids, names, num_draws=4, num_inference_steps=5, seed=2)
    assert not np.allclose(other.values, whole.values)


def test_draws_spread_and_are_not_negative():
    pipeline = make_pipeline()
    draws = pipeline(np.zeros((2, 5)), torch.arange(1, 13), ["a", "b"], num_draws=30, num_inference_steps=5)
    assert draws.values.shape == (30, 2, 12)
    assert draws.values.min() >= 0
    assert (draws.values.std(axis=0) > 0.1).any()


def test_more_steps_than_trained_are_refused():
    with pytest.raises(ValueError, match="between 1 and the 20"):
        make_pipeline()(np.zeros((1, 5)), torch.arange(1, 13), ["a"], num_inference_steps=21)


def test_uniform_numbers_depend_on_every_argument():
    base = spot_uniforms(0, "a", 0, 8)
    assert base.shape == (3, 8) and (base > 0).all() and (base < 1).all()
    assert np.array_equal(base, spot_uniforms(0, "a", 0, 8))
    for other in (spot_uniforms(1, "a", 0, 8), spot_uniforms(0, "b", 0, 8), spot_uniforms(0, "a", 1, 8)):
        assert not np.array_equal(base, other)


def test_memory_does_not_grow_with_the_spots():
    """Spots drawn alone share nothing, so nothing is kept of them; it was 35 MB."""
    pipeline, ids, peaks = make_pipeline(), torch.arange(1, 13), {}
    for spots in (20, 300):
        names, features = [f"spot{i}" for i in range(spots)], np.zeros((spots, 5), dtype=np.float32)
        tracemalloc.start()
        pipeline(features, ids, names, num_draws=2, num_inference_steps=2, batch_size=20)
        peaks[spots] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[300] < peaks[20] + 5e6
