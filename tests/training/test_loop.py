"""The training loop: resume equals uninterrupted, two processes equal one, schedules, devices, errors."""

import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from helpers import ROOT
from helpers.training import killed_at, log_of, make_model, train

import hinge.training.loop as loop
from hinge.training.loop import LoopConfig, batch_rows, make_accelerator, run_loop
from hinge.training.schedules import learning_rate_schedule
from hinge.utils.errors import ConfigError, DataError, HingeError


@pytest.mark.full
@pytest.mark.parametrize("step", [6, 12, 18])
def test_resume_equals_uninterrupted(tmp_path, monkeypatch, step):
    whole, _ = train(tmp_path / "whole")
    with killed_at(monkeypatch, step):
        train(tmp_path / "parts")
    parts, _ = train(tmp_path / "parts")
    assert parts.digest() == whole.digest()
    strip = [{k: v for k, v in record.items() if k != "seconds"} for record in log_of(tmp_path / "parts")]
    assert strip == [{k: v for k, v in record.items() if k != "seconds"} for record in log_of(tmp_path / "whole")]


def test_the_same_command_twice_gives_the_same_weights(tmp_path):
    assert train(tmp_path / "a", views=2)[0].digest() == train(tmp_path / "b", views=2)[0].digest()


def test_what_is_begun_again_in_another_state_of_the_generator_is_the_same(tmp_path):
    """Dropout was on during the initialisation, which therefore differed after an interruption."""
    digests = []
    for seed in (1, 2):
        model = make_model(dropout=0.3)
        torch.manual_seed(seed)
        digests.append(train(tmp_path / str(seed), model, steps=6)[0].digest())
    assert digests[0] == digests[1]


def test_an_interrupted_run_saves_and_says_so(tmp_path, monkeypatch):
    saved = loop.save_checkpoint
    fired = []

    def interrupt_once(*arguments):
        saved(*arguments)
        if not fired:
            fired.append(1)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop, "save_checkpoint", interrupt_once)
    with pytest.raises(HingeError, match="stopped at step 7 of 24"):
        train(tmp_path / "a")
    resumed, _ = train(tmp_path / "a")
    assert resumed.digest() == train(tmp_path / "b")[0].digest()


def test_early_stop_keeps_the_best_weights(tmp_path):
    # a high rate on few spots overfits before long
    options = {"steps": 400, "learning_rate": 0.02, "schedule": "constant", "ema_decay": None, "warm_start_share": 0.0}
    _, result = train(tmp_path, make_model(), **options, patience=3, evaluate_every=5)
    assert result.step < 400
    assert result.best_step == result.step - 15
    scores = {record["step"]: record.get("validation_loss") for record in log_of(tmp_path)}
    assert scores[result.best_step] == result.best_score


def test_a_loss_that_is_not_finite_stops_with_a_sentence(tmp_path):
    model = make_model()
    with torch.no_grad():
        model.gene_factor_model.mean.bias.fill_(float("nan"))
    with pytest.raises(HingeError, match="not finite for ten steps"):
        train(tmp_path, model, initialisation=False)


def test_a_folder_of_another_run_is_refused(tmp_path):
    train(tmp_path)
    with pytest.raises(ConfigError, match="run of 24 steps, this one has 30"):
        train(tmp_path, steps=30)
    (tmp_path / "latest.safetensors").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="not a checkpoint"):
        train(tmp_path)


def test_every_row_comes_once_an_epoch():
    rows = np.concatenate([batch_rows(0, step, 23, 5) for step in range(5)])
    assert sorted(rows) == list(range(23))
    assert not np.array_equal(rows, np.concatenate([batch_rows(0, step, 23, 5) for step in range(5, 10)]))


@pytest.mark.full
@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_trackers_write_into_the_folder(tmp_path, monkeypatch, tracker):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    train(tmp_path / "run", make_model(), steps=3, tracker=tracker)
    written = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    assert any(("tfevents" if tracker == "tensorboard" else ".wandb") in name for name in written)
    assert all(name.startswith("run/") for name in written)


def rates(name: str, warmup: int, total: int, begin: int = 0) -> list[float]:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = learning_rate_schedule(optimizer, name, warmup, total, begin)
    found = []
    for _ in range(begin, total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("warmup", [0, 1, 10])
@pytest.mark.parametrize("total", [1, 7, 40, 101])
def test_learning_rates_follow_their_formula(warmup, total):
    warm = [0.5 * (step + 1) / warmup for step in range(min(warmup, total))]
    after = np.arange(len(warm), total)
    share = (after - warmup) / max(total - warmup, 1)
    for name, decay in {
        "constant": np.ones(len(after)),
        "cosine": 0.5 * (1 + np.cos(np.pi * share)),
        "step": 0.2 ** ((after / total >= 0.5).astype(int) + (after / total >= 0.875)),
    }.items():
        np.testing.assert_allclose(rates(name, warmup, total), [*warm, *0.5 * decay], rtol=1e-9, err_msg=name)


@pytest.mark.parametrize("name", ["constant", "cosine", "step"])
def test_a_schedule_continues_with_the_same_rates(name):
    whole = rates(name, 5, 40)
    assert [rates(name, 5, 40, begin)[0] for begin in range(40)] == whole


def linear_loop(folder, loss_of=None, **settings):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)

    def batch_loss(module, step, rows, positions, generator):
        loss = module(torch.ones(len(positions), 3)).square().mean()
        return loss if loss_of is None else loss_of(loss)

    config = LoopConfig(steps=3, batch_size=4, **settings)
    return model, run_loop(model, batch_loss, 4, config, folder, seed=0)


class _Spy(torch.autograd.Function):
    """Notes whether autocast is on in the forward and in the backward pass."""

    @staticmethod
    def forward(ctx, loss, seen):
        ctx.seen = seen
        seen.append(("forward", torch.is_autocast_enabled("cpu")))
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.seen.append(("backward", torch.is_autocast_enabled("cpu")))
        return grad, None


def test_the_backward_pass_runs_outside_of_autocast(tmp_path):
    seen = []
    linear_loop(tmp_path, lambda loss: _Spy.apply(loss, seen), precision="bf16")
    assert seen == [("forward", True), ("backward", False)] * 3


def test_half_precision_is_refused_with_a_sentence():
    with pytest.raises(ValueError, match="fp16 is not offered, because gradients overflow in it; choose bf16"):
        LoopConfig(precision="fp16")


@pytest.mark.parametrize(
    ("available", "cpu"), [(None, True), ("mps", True), ("cuda", False), ("xpu", False), ("npu", False)]
)
def test_mps_is_not_used_and_other_accelerators_are(monkeypatch, available, cpu):
    class Device:
        type = available

    found = None if available is None else Device()
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    monkeypatch.setattr(loop, "Accelerator", lambda **arguments: arguments)
    assert make_accelerator(LoopConfig())["cpu"] is cpu


def test_weight_decay_pulls_at_matrices_alone(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    start = [parameter.detach().clone() for parameter in model.parameters()]

    def batch_loss(module, step, rows, positions, generator):
        return 0.0 * module(torch.ones(len(positions), 3)).sum()

    config = LoopConfig(steps=2, batch_size=4, learning_rate=0.1, schedule="constant")
    run_loop(model, batch_loss, 4, config, tmp_path, seed=0, weight_decay=lambda step: (0.5, 0.2)[step])
    torch.testing.assert_close(model.weight.detach(), start[0] * (1 - 0.1 * 0.5) * (1 - 0.1 * 0.2))
    assert torch.equal(model.bias, start[1])


def launch(script, processes: int, *arguments) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *start, str(script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.full
def test_two_processes_equal_one(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import logging
            import sys
            from pathlib import Path

            import torch
            from accelerate import PartialState
            from helpers.training import make_model, train

            torch.set_num_threads(1)
            logging.basicConfig(level=logging.INFO)
            model, _ = train(Path(sys.argv[1]), make_model(feature_dropout=0.2), batch_size=15)
            assert PartialState().num_processes == int(sys.argv[2])
            if PartialState().is_main_process:
                torch.save([p.detach() for p in model.parameters()], sys.argv[1] + ".pt")
            """
        )
    )
    for name, processes in (("one", 1), ("two", 2)):
        done = launch(script, processes, tmp_path / name, processes)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stderr.count("training on 2 processes") == processes - 1
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "two"))
    for first, second in zip(one, two, strict=True):
        torch.testing.assert_close(first, second, atol=2e-5, rtol=1e-3)
    scores = [
        [r["validation_loss"] for r in log_of(tmp_path / name) if "validation_loss" in r] for name in ("one", "two")
    ]
    np.testing.assert_allclose(*scores, rtol=1e-4)
