"""Scheduler, objective and sampling."""

import json
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hinge.diffusion import (
    MaskedDiffusionScheduler,
    draw_timesteps,
    loss_mask,
    spot_weights,
)
from hinge.diffusion.scheduler import SCHEDULES


def test_schedules_equal_the_published_ones(parity):
    for key, recorded in json.loads((parity / "mask_schedule.json").read_text()).items():
        name, options, genes, steps = key.split("|")
        options = json.loads(options)
        if options.pop("K_tail", 1) != 1 or options.pop("beta", 3.0) != 3.0:
            continue  # the other values of the released code's parameters are not in use
        arguments = {"num_train_timesteps": int(steps[1:]), "schedule": "power" if name == "poly" else name}
        arguments |= {{"alpha": "exponent"}.get(k, k): value for k, value in options.items()}
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
    mask_times = scheduler.mask_times(torch.rand(4, genes, generator=torch.Generator().manual_seed(0)))
    for count in (1, 7, 50):
        scheduler.set_timesteps(count)
        assert len(scheduler.timesteps) == count
        values, visible = torch.zeros(4, genes), torch.zeros(4, genes)
        for number, timestep in enumerate(scheduler.timesteps.tolist()):
            step = scheduler.step(torch.full((4, genes), float(number + 1)), timestep, values, visible, mask_times)
            assert torch.equal(step.prev_sample[visible > 0], values[visible > 0])
            end = scheduler.previous_timestep(timestep)
            assert (step.visible.sum(1) == genes - scheduler.num_masked(end, genes)).all()
            assert torch.equal(step.visible - visible, step.revealed)
            values, visible = step.prev_sample, step.visible
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


@pytest.mark.parametrize("reveal", ["budget", "bernoulli"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_mask_times_say_the_same_as_the_masked_share(schedule, reveal):
    scheduler = MaskedDiffusionScheduler(17, schedule, reveal=reveal)
    uniform = torch.rand(3, 23, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    uniform[0, :2] = torch.tensor([0.0, 1.0])
    rank = uniform.argsort(dim=1).argsort(dim=1)
    for t in range(18):
        masked, share = int(scheduler.num_masked(t, 23)), float(scheduler.masked_share(t, 23))
        expected = rank < 23 - masked if reveal == "budget" else (uniform < 1 - share) | (1 - share >= 1)
        assert torch.equal(scheduler.visible_at(torch.full((3,), t), uniform), expected.float())


def test_timesteps_fit_the_number_of_visible_genes():
    scheduler = MaskedDiffusionScheduler(10, "linear")
    visible = torch.zeros(4, 20)
    visible[1, :4], visible[2, :5], visible[3] = 1, 1, 1
    assert scheduler.timesteps_of(visible).tolist() == [10, 8, 8, 1]
    assert scheduler.timesteps_of(visible, 9).tolist() == [9, 8, 8, 1]


def test_saved_and_loaded(tmp_path):
    scheduler = MaskedDiffusionScheduler(12, "cosine", fill="noise")
    scheduler.save_pretrained(tmp_path)
    for again in (
        MaskedDiffusionScheduler.from_pretrained(tmp_path),
        MaskedDiffusionScheduler.from_config(scheduler.config),
    ):
        assert again.config.num_train_timesteps == 12 and again.config.schedule == "cosine"
        assert again.config.fill == "noise" and again.config.reveal == "budget"
    assert scheduler.compatibles == []
    scheduler.set_timesteps(3)
    out = scheduler.step(torch.ones(1, 4), 12, torch.zeros(1, 4), torch.zeros(1, 4), torch.tensor([[1, 5, 9, 12]]))
    assert out.prev_sample.tolist() == [[0, 0, 1, 1]] and out["visible"] is out.visible
    plain = scheduler.step(
        torch.ones(1, 4), 12, torch.zeros(1, 4), torch.zeros(1, 4), torch.tensor([[1, 5, 9, 12]]), return_dict=False
    )
    assert all(torch.equal(one, two) for one, two in zip(plain, out.to_tuple(), strict=True))


def test_parameters_of_earlier_versions_are_read_or_refused(tmp_path):
    config = {"num_train_timesteps": 10, "schedule": "exp", "beta": 3.0, "tail": 1}
    assert MaskedDiffusionScheduler.from_config(config).config.num_train_timesteps == 10
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    assert "beta" not in MaskedDiffusionScheduler.from_pretrained(tmp_path).config
    with pytest.raises(ValueError, match=r"beta 2\.0 is no longer supported: beta is always 3"):
        MaskedDiffusionScheduler.from_config({**config, "beta": 2.0})
