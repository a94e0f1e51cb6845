"""Two runs on one folder: the second says who has it; what a dead process left is taken over and tidied up."""

import json
import logging
import multiprocessing
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest

import hinge.utils.locks as locks
from hinge.config import check_config
from hinge.data import simulate_slides
from hinge.run.run import Run
from hinge.utils.errors import DataError
from hinge.utils.files import HOST, atomic_path, process_mark
from hinge.utils.locks import lock_file, lock_folder, try_lock

CONTEXT = multiprocessing.get_context("fork")


def _hold(lock, path: Path, ready, leave: bool) -> None:
    with lock(path):
        if leave:
            folder = path if path.is_dir() else path.parent
            with atomic_path(folder / "result.h5") as temporary:
                temporary.write_text("half")
                ready.set()
                time.sleep(60)
        ready.set()
        time.sleep(60)


class Holder:
    """A process that has a folder or file."""

    def __init__(self, lock, path: Path, leave: bool = False):
        ready = CONTEXT.Event()
        self.process = CONTEXT.Process(target=_hold, args=(lock, path, ready, leave), daemon=True)
        self.process.start()
        assert ready.wait(30)
        self.pid = self.process.pid

    def kill(self) -> None:
        if self.process.is_alive():
            os.kill(self.pid, signal.SIGKILL)
        self.process.join(30)


@pytest.fixture
def held():
    holders = []

    def hold(*arguments, **options) -> Holder:
        holders.append(Holder(*arguments, **options))
        return holders[-1]

    yield hold
    for holder in holders:
        holder.kill()


@pytest.mark.parametrize("lock, name", [(lock_folder, "run"), (lock_file, "out/C5.h5ad")])
def test_the_second_process_is_told_of_the_first(tmp_path, held, lock, name):
    holder = held(lock, tmp_path / name)
    with pytest.raises(DataError) as refused, lock(tmp_path / name):
        pass
    began = r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d \(.+\)"
    assert re.search(
        rf"{name} is in use by process {holder.pid} on {re.escape(HOST)} {began}; wait", str(refused.value)
    )


def test_nothing_is_left_and_a_process_may_lock_twice(tmp_path):
    with (
        lock_folder(tmp_path / "run"),
        lock_folder(tmp_path / "run"),
        lock_file(tmp_path / "run" / "samples" / "a.h5ad"),
    ):
        assert (tmp_path / "run" / ".lock.json").exists()
    assert not list(tmp_path.rglob("*"))
    with pytest.raises(ZeroDivisionError), lock_folder(tmp_path / "run"):
        (tmp_path / "run" / "log").write_text("kept")
        raise ZeroDivisionError
    assert list(tmp_path.rglob("*")) == [tmp_path / "run", tmp_path / "run" / "log"]


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path, held, caplog):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "samples").mkdir()
    other = folder / "samples" / f".result.h5.{process_mark(os.getpid(), 'elsewhere')}.abc"
    other.mkdir()  # of a process that lives
    holder = held(lock_folder, folder, leave=True)
    [half] = folder.glob(".result.h5.*")
    holder.kill()
    assert half.exists() and (folder / ".lock.json").exists()
    with caplog.at_level(logging.INFO), lock_folder(folder):
        assert not half.exists() and other.exists()
    assert f"was left by process {holder.pid} on {HOST} since" in caplog.text and "taking it over" in caplog.text
    assert [path.name for path in folder.iterdir()] == ["samples"]


def elsewhere(folder: Path, age: float) -> Path:
    """The record of a process on another machine, whose locks are not seen from here."""
    folder.mkdir(exist_ok=True)
    record = folder / ".lock.json"
    about = {"pid": 77, "host": "node4", "since": "2026-01-01 00:00:00+00:00", "command": "hinge train"}
    record.write_text(json.dumps(about))
    os.utime(record, (time.time() - age, time.time() - age))
    return record


def test_another_machine_that_is_silent_is_dead(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(locks, "SILENCE", 0.5)
    elsewhere(tmp_path / "long", age=600)
    with caplog.at_level(logging.INFO), lock_folder(tmp_path / "long"):
        assert "waiting" not in caplog.text
    elsewhere(tmp_path / "just", age=0)
    with caplog.at_level(logging.INFO), lock_folder(tmp_path / "just"):
        pass
    assert "waiting 0 s for it to renew its lock" in caplog.text and "node4" in caplog.text


def test_another_machine_that_lives_is_respected(tmp_path, monkeypatch):
    record, alive = elsewhere(tmp_path / "run", age=0), time.time
    look = locks._read_record
    monkeypatch.setattr(locks, "_read_record", lambda path: (look(path), os.utime(record, (alive(), alive())))[0])
    with (
        pytest.raises(DataError, match="in use by process 77 on node4 since 2026-01-01"),
        lock_folder(tmp_path / "run"),
    ):
        pass
    assert record.exists()


def test_a_holder_shows_that_it_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "HEARTBEAT", 0.02)
    with lock_folder(tmp_path):
        os.utime(tmp_path / ".lock.json", (0, 0))
        while (tmp_path / ".lock.json").stat().st_mtime == 0:
            time.sleep(0.02)


def test_leftovers_of_ended_processes_are_removed(tmp_path):
    """Half-written files of ended processes of this machine, with or without a lock; no others."""
    ended = CONTEXT.Process(target=int)
    ended.start()
    ended.join()
    dead, other = process_mark(ended.pid, HOST), process_mark(ended.pid, "elsewhere.example")
    alive = process_mark(os.getppid(), HOST)
    for name in (f".model.{dead}.x1", f"deep/.latest.safetensors.{dead}.x2", f"deep/.x.{other}.x3", f".y.{alive}.x4"):
        (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / "deep" / "mine@home").mkdir()
    with lock_folder(tmp_path / "run"):
        pass
    left = {path.name for path in (tmp_path / "run").rglob("*")}
    assert left == {"deep", "mine@home", f".x.{other}.x3", f".y.{alive}.x4"}


@pytest.mark.parametrize("content", ["", "[1]", '{"pid": "x"}', "\x00"])
def test_a_damaged_record_names_no_process(tmp_path, content):
    (tmp_path / ".lock.json").write_text(content)
    with lock_folder(tmp_path):
        pass


def _count(path: Path, times: int) -> None:
    for _ in range(times):
        with lock_file(path, wait=True):
            number = int(path.read_text())
            time.sleep(0.001)
            path.write_text(str(number + 1))


def test_only_one_at_a_time(tmp_path):
    """Lock files come and go: none of those who wait is left with one that is gone."""
    (tmp_path / "number").write_text("0")
    processes = [CONTEXT.Process(target=_count, args=(tmp_path / "number", 25)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert (tmp_path / "number").read_text() == "100"
    assert [path.name for path in tmp_path.iterdir()] == ["number"]


def test_of_processes_launched_together_the_first_locks(tmp_path, held, monkeypatch):
    held(lock_folder, tmp_path)
    monkeypatch.setenv("RANK", "1")
    with lock_folder(tmp_path):
        pass
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(DataError), lock_folder(tmp_path):
        pass


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write .*file/\.lock: "), lock_folder(tmp_path / "file"):
        pass
    with try_lock(tmp_path / "a.lock") as mine, try_lock(tmp_path / "a.lock") as again:
        assert mine and not again


# --- commands ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slides(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tissue")
    simulate_slides(folder, n_slides=3, grid=(5, 5), n_genes=30, um_per_px=2.0)
    return folder


def settings(slides: Path, output: Path) -> dict:
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {
        "output": str(output),
        "data": {"path": str(slides), "train": ["sim0", "sim1"], "test": ["sim2"]},
        "panel": {"genes": 8},
        "backbone": {**size, "weights": "random"},
        "training": {"epochs": None, "steps": 2, "batch_size": 16},
        "sampling": {"draws": 2, "steps": 2},
    }


@pytest.fixture(scope="module")
def trained(slides, tmp_path_factory) -> Run:
    run = Run(check_config(settings(slides, tmp_path_factory.mktemp("runs") / "tiny"), "test"))
    run.train()
    return run


@pytest.mark.parametrize(
    "arguments, lock, place",
    [
        ("train --config {out}.json", lock_folder, "out"),
        ("run --config {out}.json", lock_folder, "out"),
        (
            "features {slides} --sample sim0 --encoder stain-texture --output {out}",
            lock_file,
            "out/sim0.stain-texture.h5",
        ),
        ("sample {run} --output {out}/sim2.h5ad", lock_file, "out/sim2.h5ad"),
        ("pretrain-expression {slides} --steps 2 --output {out}", lock_folder, "out-training"),
        ("pretrain-histology --config {out}.encoder.json", lock_folder, "out-training"),
        ("finetune-encoder {slides} --encoder stain-texture --tune linear --output {out}", lock_folder, "out"),
        ("ablate {out}.grid.json {out}", lock_folder, "out"),
        ("demo --output {out}", lock_folder, "out"),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_a_command_refuses_a_folder_in_use(
    arguments, lock, place, trained, slides, tmp_path, held, monkeypatch, capsys
):
    from hinge.cli.app import main

    out = tmp_path / "out"
    run = settings(slides, out)
    encoder = {"arguments": {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}}
    (tmp_path / "out.json").write_text(json.dumps(run))
    (tmp_path / "out.grid.json").write_text(json.dumps({"base": "out.json", "variants": {"a": {}}}))
    training = {"steps": 1, "batch_size": 4, "local_crops": 0, "outputs": 8, "hidden": 8, "bottleneck": 4}
    (tmp_path / "out.encoder.json").write_text(
        json.dumps({"output": str(out), "data": {"path": str(slides)}, "vit": encoder, "training": training})
    )
    holder = held(lock, tmp_path / place)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    words = arguments.format(out=out, run=trained.folder, slides=slides).split()
    monkeypatch.setattr("sys.argv", ["hinge", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    output, errors = capsys.readouterr()
    assert (stopped.value.code, output) == (2, "")
    messages = [line for line in errors.splitlines() if line.startswith("hinge: ")]
    assert (
        len(messages) == 1 and f"{tmp_path / place} is in use by process {holder.pid} on {HOST} since 20" in messages[0]
    )
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before


def test_features_that_another_run_extracts_are_waited_for(trained, tmp_path, held, caplog):
    folder = tmp_path / "features"
    features = trained.config.features.model_copy(update={"folder": folder})
    run = Run(trained.config.model_copy(update={"output": tmp_path / "run", "features": features}))
    holder = held(lock_file, run.paths.features("sim2"))
    timer = threading.Timer(1.0, holder.kill)
    timer.start()
    with caplog.at_level(logging.INFO):
        path = run.features(run.slide("sim2"))
    timer.join()
    assert path.exists() and "waiting until it has ended" in caplog.text
    assert list(folder.iterdir()) == [path]
