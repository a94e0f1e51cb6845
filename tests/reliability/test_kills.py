"""Killed anywhere: what goes on afterwards loses next to nothing and ends where it would have ended.

Processes come from a server that has imported everything, so that a life costs no ten seconds of imports. They are
killed by a real SIGKILL: at random moments, and while something is being written, which the tests see by the temporary
folder that `atomic_path` makes.
"""

import contextlib
import csv
import json
import os
import random
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from anndata import AnnData

from hinge.config import check_config
from hinge.data import read_slide, simulate_slides
from hinge.run.run import Run
from hinge.utils.files import file_digest

pytestmark = pytest.mark.full

CHECKPOINT_EVERY = 4
SECONDS = 1200  # after which a life is taken to hang


@pytest.fixture(scope="module")
def slides(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tissue")
    simulate_slides(folder, n_slides=3, grid=(6, 6), n_genes=40, um_per_px=2.0)
    simulate_slides(folder, n_slides=1, grid=(6, 6), n_genes=40, um_per_px=2.0, first=10, with_image=False)
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
            "pretrain": optimised,
        },
        "model": {"feature_dropout": 0.2, "dropout": 0.1},
        "training": {**optimised, "epochs": None, "evaluate_every": 6, "ema_decay": 0.9},
        "sampling": {"draws": 3, "steps": 3},
    }


# --- what the processes do ---------------------------------------------------------------------------


def noted_steps(path: Path, seconds: float) -> None:
    """Let every step of a loop leave its number in a file, and take some time."""
    import hinge.training.loop

    batch_rows, life = hinge.training.loop.batch_rows, os.getpid()

    def noted(seed, step, *arguments):
        with path.open("a") as file:
            file.write(f"{life} {step}\n")
        time.sleep(seconds)
        return batch_rows(seed, step, *arguments)

    hinge.training.loop.batch_rows = noted


def train(content: dict, steps: Path, seconds: float = 0.01) -> None:
    noted_steps(steps, seconds)
    Run(check_config(content, "test")).train()


def pretrain(content: dict, steps: Path, seconds: float = 0.01) -> None:
    noted_steps(steps, seconds)
    Run(check_config(content, "test")).pretrain()


def pretrain_encoder(content: dict, steps: Path, seconds: float = 0.01) -> None:
    from hinge.tasks.pretrain_encoder import PretrainHistologyConfig
    from hinge.tasks.pretrain_encoder import pretrain as pretrain_histology

    noted_steps(steps, seconds)
    pretrain_histology(PretrainHistologyConfig.model_validate(content))


def lingering(kind: type, name: str, seconds: float) -> None:
    """Let a file stay for a while under its temporary name once it has been written."""
    write = getattr(kind, name)

    def linger(self, *arguments, **options):
        write(self, *arguments, **options)
        time.sleep(seconds)

    setattr(kind, name, linger)


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
    lingering(module.FeatureWriter, "write", 10 * seconds)
    extract_features(read_slide(slides, "sim0"), load_encoder("stain-texture"), path, batch_size=2)


def sample(run: Path, path: Path, log: Path, seconds: float = 0.01) -> None:
    import hinge.diffusion.sampler as module
    from hinge.utils.resumable import ResumableArrays

    write = ResumableArrays.write

    def noted(self, number, *arguments):
        time.sleep(seconds)
        write(self, number, *arguments)
        with log.open("a") as file:
            file.write(f"{os.getpid()} {number}\n")

    ResumableArrays.write, module.BATCHES_IN_A_PART = noted, 1
    lingering(AnnData, "write_h5ad", 10 * seconds)
    Run.open(run).sample("sim2", output=path, batch_size=6)


def ablate(grid: Path, output: Path) -> None:
    from hinge.experiments.ablation import ablate
    from hinge.experiments.grid import load_grid

    tables = ablate(load_grid(grid), output)
    assert not tables.failures, tables.failures


def small_parts() -> None:
    """Many parts, that take some time each."""
    import hinge.diffusion.sampler as module
    from hinge.utils.resumable import ResumableArrays

    write = ResumableArrays.write

    def slow(self, *arguments):
        time.sleep(0.03)
        write(self, *arguments)

    ResumableArrays.write, module.BATCHES_IN_A_PART = slow, 1


def command(arguments: list[str], errors: Path, prepare: Callable | None = None, *more) -> None:
    """The command line, its stderr in a file."""
    # what starts the tests in the background may leave Ctrl-C ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from hinge.cli.app import main

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
            time.sleep(0.001)
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


class Anytime:
    """Some seconds after the process was started."""

    def __init__(self, seconds: float):
        self.seconds, self.since = seconds, None

    def __call__(self) -> bool:
        self.since = self.since or time.monotonic()
        return time.monotonic() - self.since >= self.seconds


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
    whole(server, pretrain, content, tmp_path / "whole.steps", 0.0)  # so that all are killed in training
    chance, log = random.Random(seed), tmp_path / "steps"
    checkpoint = tmp_path / "killed" / "training" / "latest.safetensors"
    moments = [WhileWriting(checkpoint) for _ in range(writing)]
    moments += [Anytime(chance.uniform(0, 0.5)) for _ in range(kills // 5)]
    moments += [After(log, chance.uniform(0, 0.12)) for _ in range(kills - len(moments))]
    chance.shuffle(moments)
    left = survive(server, train, (content, log), moments)
    same_files(tmp_path / "whole", tmp_path / "killed", but=("config.yaml", "checksums.json", "log.jsonl"))
    logged = [json.loads(line)["step"] for line in (checkpoint.parent / "log.jsonl").read_text().splitlines()]
    assert logged == list(range(1, steps + 1))
    nothing_left(tmp_path / "killed")
    lives, most = repeated(log, CHECKPOINT_EVERY)
    return {"kills": len(left), "in_checkpoints": sum(map(bool, left)), "lives": lives, "repeated": most}


def test_training_killed_twenty_times(server, slides, tmp_path):
    figures = check_training(server, slides, tmp_path, kills=20, writing=8, seed=0, steps=200)
    assert figures["kills"] == 20 and figures["in_checkpoints"] >= 4 and figures["lives"] > 10, figures


def check_backbone(server, slides: Path, tmp_path: Path, kills: int, seed: int, steps: int) -> dict:
    content = settings(slides, tmp_path / "whole", steps)
    whole(server, pretrain, content, tmp_path / "whole.steps", 0.0)
    content["output"] = str(tmp_path / "killed")
    chance, log = random.Random(seed), tmp_path / "steps"
    checkpoint = tmp_path / "killed" / "backbone-training" / "latest.safetensors"
    moments = [
        WhileWriting(checkpoint) if number % 2 else After(log, chance.uniform(0, 0.12)) for number in range(kills)
    ]
    left = survive(server, pretrain, (content, log), moments)
    same_files(tmp_path / "whole", tmp_path / "killed", but=("config.yaml", "checksums.json", "log.jsonl"))
    nothing_left(tmp_path / "killed")
    return {
        "kills": len(left),
        "in_checkpoints": sum(map(bool, left)),
        "repeated": repeated(log, CHECKPOINT_EVERY)[1],
    }


def test_a_backbones_pretraining_is_killed(server, slides, tmp_path):
    assert check_backbone(server, slides, tmp_path, kills=4, seed=1, steps=80)["in_checkpoints"] >= 1


def encoder_settings(slides: Path, output: Path, steps: int) -> dict:
    return {
        "output": str(output),
        "data": {"path": str(slides), "samples": ["sim0", "sim1"]},
        "vit": {
            "architecture": "vit_tiny_patch16_224",
            "arguments": {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2},
        },
        "training": {
            "steps": steps,
            "batch_size": 8,
            "outputs": 32,
            "hidden": 32,
            "bottleneck": 16,
            "local_crops": 2,
            "local_px": 16,
            "global_scale": (0.4, 1.0),
            "local_scale": (0.1, 0.4),
            "frozen_last_layer_steps": 2,
            "checkpoint_every": CHECKPOINT_EVERY,
        },
    }


def check_encoder(server, slides: Path, tmp_path: Path, kills: int, seed: int, steps: int) -> dict:
    whole(server, pretrain_encoder, encoder_settings(slides, tmp_path / "whole", steps), tmp_path / "whole.steps", 0.0)
    content = encoder_settings(slides, tmp_path / "killed", steps)
    chance, log = random.Random(seed), tmp_path / "steps"
    checkpoint = tmp_path / "killed-training" / "latest.safetensors"
    moments = [
        WhileWriting(checkpoint) if number % 2 else After(log, chance.uniform(0, 0.2)) for number in range(kills)
    ]
    left = survive(server, pretrain_encoder, (content, log), moments)
    for name in ("", "-training"):
        same_files(tmp_path / f"whole{name}", tmp_path / f"killed{name}", but=("log.jsonl",))
        nothing_left(tmp_path / f"killed{name}")
    return {
        "kills": len(left),
        "in_checkpoints": sum(map(bool, left)),
        "repeated": repeated(log, CHECKPOINT_EVERY)[1],
    }


def test_an_encoders_pretraining_is_killed(server, slides, tmp_path):
    assert check_encoder(server, slides, tmp_path, kills=2, seed=2, steps=24)["kills"] == 2


def check_features(server, slides: Path, tmp_path: Path, kills: int, seed: int) -> dict:
    whole(server, extract, slides, tmp_path / "whole.h5", tmp_path / "whole.log", 0.0)
    chance, log, path = random.Random(seed), tmp_path / "log", tmp_path / "killed" / "features.h5"
    moments = [After(log, chance.uniform(0, 0.02)) for _ in range(kills - 1)] + [WhileWriting(path)]
    survive(server, extract, (slides, path, log), moments)
    assert file_digest(path) == file_digest(tmp_path / "whole.h5")
    assert list(path.parent.iterdir()) == [path]
    encoded = sum(int(line.split()[1]) for line in log.read_text().splitlines())
    assert encoded <= 36 + 2 * kills  # a part has two spots here
    return {"kills": kills, "encoded_again": encoded - 36}


def test_feature_extraction_is_killed(server, slides, tmp_path):
    assert check_features(server, slides, tmp_path, kills=5, seed=3)["kills"] == 5


@pytest.fixture(scope="module")
def trained(server, slides, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    whole(server, train, settings(slides, folder / "tiny", 8), folder / "steps", 0.0)
    whole(server, sample, folder / "tiny", folder / "whole.h5ad", folder / "whole.log", 0.0)
    return folder


def check_sampling(server, trained: Path, tmp_path: Path, kills: int, seed: int) -> dict:
    chance, log, path = random.Random(seed), tmp_path / "log", tmp_path / "killed" / "sim2.h5ad"
    moments = [After(log, chance.uniform(0, 0.03)) for _ in range(kills - 1)] + [WhileWriting(path)]
    survive(server, sample, (trained / "tiny", path, log), moments)
    assert file_digest(path) == file_digest(trained / "whole.h5ad")
    assert list(path.parent.iterdir()) == [path]
    parts = [line.split()[1] for line in log.read_text().splitlines()]
    assert sorted(parts, key=int) == [str(number) for number in range(len(set(parts)))], "a finished part came again"
    return {"kills": kills, "parts": len(parts)}


def test_sampling_is_killed(server, trained, tmp_path):
    assert check_sampling(server, trained, tmp_path, kills=5, seed=4)["parts"] == 18


def check_ablation(server, slides: Path, tmp_path: Path, kills: int, seed: int) -> dict:
    base = settings(slides, tmp_path / "never", 8)
    base["evaluation"] = {"baselines": ["mean"], "bootstrap": 0}
    (tmp_path / "base.yaml").write_text(json.dumps(base))  # JSON is YAML
    grid = tmp_path / "grid.yaml"
    grid.write_text(json.dumps({"base": "base.yaml", "variants": {"a": {}, "b": {"diffusion.schedule": "cosine"}}}))
    began = time.monotonic()
    whole(server, ablate, grid, tmp_path / "whole")
    seconds, chance = time.monotonic() - began, random.Random(seed)
    moments = [Anytime(chance.uniform(0.02, min(0.3, 1.5 / kills)) * seconds) for _ in range(kills)]
    survive(server, ablate, (grid, tmp_path / "killed"), moments)
    tables = []
    for name in ("whole", "killed"):
        with (tmp_path / name / "table.csv").open() as file:
            rows = list(csv.DictReader(file))
        tables.append([{key: cell for key, cell in row.items() if not key.startswith("seconds")} for row in rows])
    assert tables[0] == tables[1]
    for variant in ("a", "b"):
        cell = Path(variant) / "sim2" / "seed0"
        same_files(tmp_path / "whole" / cell / "model", tmp_path / "killed" / cell / "model")
        same_files(tmp_path / "whole" / cell / "samples", tmp_path / "killed" / cell / "samples")
    nothing_left(tmp_path / "killed")
    return {"kills": kills}


def test_an_ablation_is_killed(server, slides, tmp_path):
    check_ablation(server, slides, tmp_path, kills=2, seed=5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "what, check, options",
    [
        ("training", check_training, {"kills": 60, "writing": 25, "steps": 600, "seed": 10}),
        ("training", check_training, {"kills": 60, "writing": 25, "steps": 600, "seed": 11}),
        ("backbone", check_backbone, {"kills": 30, "steps": 300, "seed": 12}),
        ("encoder", check_encoder, {"kills": 16, "steps": 120, "seed": 13}),
        *(("features", check_features, {"kills": 6, "seed": seed}) for seed in range(14, 18)),
        *(("sampling", check_sampling, {"kills": 6, "seed": seed}) for seed in range(18, 22)),
        ("ablation", check_ablation, {"kills": 12, "seed": 22}),
    ],
)
def test_killed_many_more_times(what, check, options, server, slides, trained, tmp_path):
    """Minutes; with -s, the figures that docs/reliability.md tells."""
    figures = check(server, trained if what == "sampling" else slides, tmp_path, **options)
    print(what, figures, flush=True)


# --- asked to stop -----------------------------------------------------------------------------------


def stop(server, number: int, moment: Callable[[], bool], *arguments) -> int:
    """Send a signal to a command at a moment; its exit code."""
    process = server.Process(target=command, args=arguments)
    process.start()
    began = time.monotonic()
    while not moment():
        assert process.exitcode is None and time.monotonic() - began < SECONDS
        time.sleep(0.001)
    os.kill(process.pid, number)
    process.join(SECONDS)
    return process.exitcode


def messages_of(errors: Path) -> list[str]:
    """What a command that was stopped printed last, and the arguments with which it goes on."""
    lines = [line for line in errors.read_text().splitlines() if line.startswith("hinge: ")]
    assert len(lines) == 2 and lines[1].startswith("hinge: continue with: hinge "), errors.read_text()
    return [lines[0].removeprefix("hinge: "), shlex.split(lines[1].removeprefix("hinge: continue with: hinge "))]


def test_sigterm_saves_and_says_how_to_go_on(server, slides, trained, tmp_path):
    content = settings(slides, tmp_path / "stopped", 8)
    (tmp_path / "run file.yaml").write_text(json.dumps(content))
    shutil.copytree(trained / "tiny" / "backbone", tmp_path / "stopped" / "backbone")
    log, errors = tmp_path / "steps", tmp_path / "stderr"
    arguments = ["train", "--config", str(tmp_path / "run file.yaml")]
    code = stop(server, signal.SIGTERM, After(log, 0.02), arguments, errors, noted_steps, log, 0.05)
    sentence, again = messages_of(errors)
    assert code == 128 + signal.SIGTERM
    assert sentence.startswith("stopped at step ") and again == arguments
    nothing_left(tmp_path / "stopped")
    done = len(log.read_text().splitlines())
    assert done < 8
    whole(server, command, again, errors, noted_steps, log, 0.0)
    steps = [int(line.split()[1]) for line in log.read_text().splitlines()]
    assert steps == list(range(8))  # what was done is not done again
    same_files(tmp_path / "stopped" / "model", trained / "tiny" / "model")


def test_ctrl_c_keeps_what_is_drawn_and_says_how_to_go_on(server, trained, tmp_path):
    output, errors = tmp_path / "out" / "sim2.h5ad", tmp_path / "stderr"
    arguments = ["sample", str(trained / "tiny"), "--batch-size", "6", "--output", str(output)]
    part = output.parent / ".sim2.unfinished" / "2.finished"
    code = stop(server, signal.SIGINT, part.exists, arguments, errors, small_parts)
    sentence, again = messages_of(errors)
    assert (code, sentence, again) == (128 + signal.SIGINT, "stopped; what is finished is kept", arguments)
    assert [path.name for path in output.parent.iterdir()] == [".sim2.unfinished"]
    kept = {path.name: path.stat().st_mtime_ns for path in part.parent.glob("*.finished")}
    assert 3 <= len(kept) < 18
    whole(server, command, again, errors, small_parts)
    assert file_digest(output) == file_digest(trained / "whole.h5ad")
    assert list(output.parent.iterdir()) == [output]


@pytest.fixture
def ctrl_c_counts():
    """Also where the tests themselves were put into the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_counts")
def test_ctrl_c_in_the_last_step_of_training_is_not_lost(tmp_path):
    """It came too late for the loop, whose work is done, and stops what would have followed."""
    import torch

    from hinge.training.loop import LoopConfig, run_loop

    model = torch.nn.Linear(2, 1)

    def batch_loss(module, step, rows, positions, generator):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return module(torch.ones(len(positions), 2)).square().sum()

    with pytest.raises(KeyboardInterrupt):
        run_loop(model, batch_loss, 4, LoopConfig(steps=3, batch_size=4), tmp_path, seed=0)
    assert run_loop(model, batch_loss, 4, LoopConfig(steps=3, batch_size=4), tmp_path, seed=0).step == 3
