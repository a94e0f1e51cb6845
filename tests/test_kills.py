"""Killed anywhere: what goes on afterwards loses next to nothing and ends where it would have ended.

Processes come from a server that has imported everything, so that a life costs no ten seconds of imports. They are
killed by a real SIGKILL: at random moments, and while something is being written, which the tests see by the temporary
folder that `atomic_path` makes.
"""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from hinge.config import check_config
from hinge.data import read_slide, simulate_tissue
from hinge.files import file_digest
from hinge.run import Run

PRELOADED = [
    "hinge.run",
    "hinge.ablation",
    "hinge.cli",
    "hinge.tasks.pretraining",
    "lightly.loss",
    "lightly.models.utils",
]
CHECKPOINT_EVERY = 4
SECONDS = 240  # after which a life is taken to hang


@pytest.fixture(scope="module")
def server():
    """Starts processes: server.Process(target=…, args=…)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        # the server forks: it must have no threads of OpenMP
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("OPENBLAS_NUM_THREADS", "1")
        yield context


@pytest.fixture(scope="module")
def slides(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tissue")
    simulate_tissue(folder, n_slides=3, grid=(6, 6), n_genes=40, um_per_px=2.0)
    simulate_tissue(folder, n_slides=1, grid=(6, 6), n_genes=40, um_per_px=2.0, first=10, with_image=False)
    return folder


def settings(slides: Path, output: Path, steps: int = 40) -> dict:
    optimised = {"steps": steps, "batch_size": 16, "checkpoint_every": CHECKPOINT_EVERY}
    return {
        "output": str(output),
        "data": {"path": str(slides), "train": ["sim0", "sim1"], "test": ["sim2"], "pretrain": ["sim10"]},
        "panel": {"genes": 12},
        "backbone": {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_value_bins": 8,
            "pretrain": optimised,
        },
        "model": {"feature_dropout": 0.2, "dropout": 0.1},
        "training": {**optimised, "epochs": None, "evaluate_every": 6, "ema_decay": 0.9},
        "sampling": {"draws": 3, "steps": 3},
    }


# --- what the processes do ---------------------------------------------------------------------------


def noted_steps(path: Path, seconds: float) -> None:
    """Let every step of a loop leave its number in a file, and take some time."""
    import hinge.loop

    batch_rows, life = hinge.loop.batch_rows, os.getpid()

    def noted(seed, step, *arguments):
        with path.open("a") as file:
            file.write(f"{life} {step}\n")
        time.sleep(seconds)
        return batch_rows(seed, step, *arguments)

    hinge.loop.batch_rows = noted


def train(content: dict, steps: Path, seconds: float = 0.01) -> None:
    noted_steps(steps, seconds)
    Run(check_config(content, "test")).train()


def pretrain(content: dict, steps: Path, seconds: float = 0.01) -> None:
    noted_steps(steps, seconds)
    Run(check_config(content, "test")).pretrain()


def pretrain_encoder(content: dict, steps: Path, seconds: float = 0.01) -> None:
    from hinge.tasks.pretraining import PretrainHistologyConfig
    from hinge.tasks.pretraining import pretrain as pretrain_histology

    noted_steps(steps, seconds)
    pretrain_histology(PretrainHistologyConfig.model_validate(content))


def extract(slides: Path, path: Path, log: Path, seconds: float = 0.01) -> None:
    import hinge.encoders.extract as module
    from hinge.encoders import Encoder, extract_features, load_encoder

    encode = Encoder.encode

    def slow(self, batch, *arguments):
        with log.open("a") as file:
            file.write(f"{os.getpid()} {len(batch)}\n")
        time.sleep(seconds)
        return encode(self, batch, *arguments)

    Encoder.encode, module.BATCHES_IN_A_PART = slow, 1
    extract_features(read_slide(slides, "sim0"), load_encoder("stain-texture"), path, batch_size=2)


def sample(run: Path, path: Path, log: Path, seconds: float = 0.01) -> None:
    import hinge.run as module
    from hinge.data.unfinished import UnfinishedArrays

    write = UnfinishedArrays.write

    def noted(self, number, *arguments):
        time.sleep(seconds)
        write(self, number, *arguments)
        with log.open("a") as file:
            file.write(f"{os.getpid()} {number}\n")

    UnfinishedArrays.write, module.BATCHES_IN_A_PART = noted, 1
    Run.open(run).sample("sim2", output=path, batch_size=6)


def ablate(grid: Path, output: Path) -> None:
    from hinge.ablation import ablate, load_grid

    tables = ablate(load_grid(grid), output)
    assert not tables.failures, tables.failures


def command(arguments: list[str], errors: Path, prepare: Callable | None = None, *more) -> None:
    """The command line, its stderr in a file."""
    from hinge.cli import main

    with errors.open("a") as file:
        os.dup2(file.fileno(), 2)
    if prepare is not None:
        prepare(*more)
    sys.argv = ["hinge", *arguments]
    main()


# --- killing -----------------------------------------------------------------------------------------


def survive(server, work: Callable, arguments: tuple, moments: list[Callable[[], bool]]) -> list[Path]:
    """Start a process again and again; kill it at each of the moments, then let it end.

    A moment is asked all the time and says when; one that finds the process at its end has come too late and fails.
    Given are the temporary folders that were there when the process died.
    """
    left = []
    for moment in moments:
        process = server.Process(target=work, args=arguments)
        process.start()
        began = time.monotonic()
        while not moment():
            assert process.exitcode is None, f"it ended, with {process.exitcode}, before it was killed"
            assert time.monotonic() - began < SECONDS
            time.sleep(0.0005)
        os.kill(process.pid, signal.SIGKILL)
        process.join(SECONDS)
        assert process.exitcode == -signal.SIGKILL
        left.append(moment.left() if hasattr(moment, "left") else [])
    process = server.Process(target=work, args=arguments)
    process.start()
    process.join(SECONDS)
    assert process.exitcode == 0
    return left


class After:
    """Some seconds after a file has grown in the life that is watched."""

    def __init__(self, path: Path, seconds: float):
        self.path, self.seconds = path, seconds
        self.size: int | None = None
        self.since: float | None = None

    def __call__(self) -> bool:
        size = self.path.stat().st_size if self.path.exists() else 0
        if self.size is None:
            self.size = size
        if self.since is None and size > self.size:
            self.since = time.monotonic()
        return self.since is not None and time.monotonic() - self.since >= self.seconds


class WhileWriting:
    """While a file is being written under its temporary name; the n-th time that this is seen."""

    def __init__(self, path: Path, times: int = 1):
        self.path, self.times, self.seen = path, times, set()

    def left(self) -> list[Path]:
        return list(self.path.parent.glob(f".{self.path.name}.*"))

    def __call__(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            self.seen |= {entry.name for entry in os.scandir(self.path.parent) if self._is_ours(entry.name)}
        return len(self.seen) >= self.times

    def _is_ours(self, name: str) -> bool:
        return name.startswith(f".{self.path.name}.") and not name.endswith((".lock", ".json"))


def whole(server, work: Callable, *arguments) -> None:
    """The same without being killed."""
    process = server.Process(target=work, args=arguments)
    process.start()
    process.join(SECONDS)
    assert process.exitcode == 0


def repeated(log: Path, every: int) -> tuple[int, int]:
    """Lives that took a step, and the most steps that one of them took again; they must be at most `every`."""
    lives: dict[str, list[int]] = {}
    for line in log.read_text().splitlines():
        life, step = line.split()
        lives.setdefault(life, []).append(int(step))
    most, reached = 0, 0
    for steps in lives.values():
        assert steps == list(range(steps[0], steps[-1] + 1))
        assert steps[0] <= reached, "a step was left out"
        most = max(most, reached - steps[0])
        reached = max(reached, steps[-1] + 1)
    assert most <= every
    return len(lives), most


def nothing_left(folder: Path) -> None:
    """No lock, nothing temporary, nothing unfinished."""
    hidden = [path for path in folder.rglob(".*")]
    assert not hidden, hidden


def same_files(one: Path, other: Path, but: tuple[str, ...] = ()) -> None:
    """Two folders hold the same bytes, but for files with these names."""
    listed = [
        {
            str(path.relative_to(folder)): file_digest(path)
            for path in folder.rglob("*")
            if path.is_file() and path.name not in but
        }
        for folder in (one, other)
    ]
    assert listed[0] == listed[1]


def check_training(server, slides: Path, tmp_path: Path, kills: int, writing: int, seed: int, steps: int) -> dict:
    content = settings(slides, tmp_path / "whole", steps)
    whole(server, train, content, tmp_path / "whole.steps", 0.0)
    content["output"] = str(tmp_path / "killed")
    chance, log = random.Random(seed), tmp_path / "steps"
    checkpoint = tmp_path / "killed" / "training" / "latest.safetensors"
    moments = [After(log, chance.uniform(0, 0.12)) for _ in range(kills - writing)]
    moments += [WhileWriting(checkpoint) for _ in range(writing)]
    chance.shuffle(moments)
    left = survive(server, train, (content, log), moments)
    hits = sum(bool(found) for found in left)
    for part in ("model", "backbone"):
        same_files(tmp_path / "whole" / part, tmp_path / "killed" / part)
    for name in ("latest", "best"):
        assert file_digest(tmp_path / "whole" / "training" / f"{name}.safetensors") == file_digest(
            tmp_path / "killed" / "training" / f"{name}.safetensors"
        )
    logged = [json.loads(line)["step"] for line in (checkpoint.parent / "log.jsonl").read_text().splitlines()]
    assert logged == list(range(1, steps + 1))
    nothing_left(tmp_path / "killed")
    return {"kills": len(moments), "in_checkpoints": hits, "repeated": repeated(log, CHECKPOINT_EVERY)[1]}


def test_training_killed_twenty_times(server, slides, tmp_path):
    figures = check_training(server, slides, tmp_path, kills=20, writing=8, seed=0, steps=160)
    assert figures["kills"] == 20 and figures["in_checkpoints"] >= 4, figures
