"""What lies on disk is what was computed: changed bytes, numbers that are not finite, files cut off by a power loss.

A run may be refused with a sentence; it never gives other draws, scores or weights without one.
"""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hinge.data.draws import draws_of_slide, read_draws
from hinge.data.feature_writer import FeatureWriter
from hinge.data.features import read_features
from hinge.report import report_run
from hinge.run.integrity import verify_run
from hinge.run.run import Run
from hinge.training.checkpoints import previous_of, read_tensors
from hinge.training.loop import LoopConfig, run_loop
from hinge.utils import checksums, files
from hinge.utils.errors import DataError, HingeError, WeightsError
from hinge.utils.files import atomic_path, file_digest
from hinge.utils.resumable import ResumableArrays

# what is read by which stage; a report is read by nobody, and versions are only told
READERS: dict[str, tuple[str, ...]] = {
    "config.yaml": ("sample", "evaluate"),
    "panel.json": ("sample", "evaluate"),
    "model_index.json": ("sample", "evaluate"),
    "split.json": ("pitch",),
    "checksums.json": ("sample", "evaluate"),
    "features/sim2.stain-texture.h5": ("sample", "evaluate"),
    "features/sim0.stain-texture.h5": ("evaluate",),
    "backbone/config.json": ("sample",),
    "backbone/model.safetensors": ("sample",),
    "model/config.json": ("sample",),
    "model/scheduler_config.json": ("sample",),
    "model/diffusion_pytorch_model.safetensors": ("sample",),
    "samples/sim2.h5ad": ("evaluate", "report"),
    "baselines/sim2.npz": ("evaluate",),
    "scores/sim2.json": ("evaluate",),
    "scores.json": ("report",),
    "training/latest.safetensors": ("train",),
    "training/best.safetensors": ("train",),
    "backbone-training/best.safetensors": ("checkpoint",),
}


def outcome(folder: Path, stage: str) -> str:
    """Run a stage on a folder and return a digest of its result."""
    run = Run.open(folder)
    if stage == "sample":
        drawn = read_draws(run.sample("sim2", output=folder.parent / "again.h5ad"))
        return files.arrays_digest({name: np.asarray(drawn.layers[name]) for name in sorted(drawn.layers)})
    if stage == "evaluate":
        return file_digest(run.evaluate(output=folder.parent / "scores.json"))
    if stage == "report":
        return file_digest(report_run(run))
    if stage == "pitch":
        return repr(run.spot_grid())
    if stage == "checkpoint":
        read_tensors(folder / "backbone-training" / "best.safetensors")
        return ""
    shutil.rmtree(folder / "model")
    run.train()
    return file_digest(folder / "model" / "diffusion_pytorch_model.safetensors")


def silent_changes(whole: Path, scratch: Path, name: str, places: int) -> tuple[int, int]:
    """Flip a bit at some places of a file; return how often a stage noticed, and how often it gave another result."""
    refused, silent, right = 0, 0, {}
    content = (whole / name).read_bytes()
    chance = random.Random(f"{name} 0")
    for place in [None, *(chance.randrange(len(content)) for _ in range(places))]:
        for stage in READERS[name]:
            folder = scratch / "run"
            shutil.rmtree(scratch, ignore_errors=True)
            shutil.copytree(whole, folder)
            if place is not None:
                changed = bytearray(content)
                changed[place] ^= 1 << chance.randrange(8)
                (folder / name).write_bytes(changed)
            try:
                result = outcome(folder, stage)
            except HingeError as error:
                assert place is not None, error
                refused += 1
                continue
            if place is None:
                right[stage] = result
            silent += result != right[stage]
    return refused, silent


@pytest.mark.full
@pytest.mark.parametrize("name", READERS)
def test_a_changed_byte_changes_no_result(tiny_run, tmp_path, name):
    refused, silent = silent_changes(tiny_run.folder, tmp_path / "scratch", name, places=2)
    assert silent == 0
    # a damaged cache is made again
    assert refused or name.startswith(("baselines/", "scores/"))


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_twenty_changed_bytes_change_no_result(tiny_run, tmp_path, name):
    refused, silent = silent_changes(tiny_run.folder, tmp_path / "scratch", name, places=20)
    print(name, "refused", refused, "silent", silent, flush=True)
    assert silent == 0


def test_every_changed_file_is_found_and_named(copied_tiny_run):
    folder = copied_tiny_run.folder
    whole = verify_run(folder)
    assert whole.faults == whole.missing == whole.unknown == [] and whole.right > 15
    panel = (folder / "panel.json").read_bytes()
    for name in ("panel.json", "samples/sim2.h5ad", "training/best.safetensors"):
        path = folder / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    (folder / "report.html").unlink()
    found = verify_run(folder)
    assert found.missing == ["report.html"]
    assert [any(name in fault for fault in found.faults) for name in ("panel.json", "sim2.h5ad", "best")] == [True] * 3
    with pytest.raises(DataError, match=r"panel\.json was changed or damaged after hinge train wrote it"):
        copied_tiny_run.panel()
    (folder / "panel.json").write_bytes(panel)
    with pytest.raises(DataError, match=r"sim2\.h5ad was changed .* run hinge sample again"):
        copied_tiny_run.evaluate()


def test_a_configuration_that_is_cut_off_is_refused(copied_tiny_run):
    path = copied_tiny_run.paths.config
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-20]))
    with pytest.raises(DataError, match=r"config\.yaml was changed or damaged"):
        Run.open(copied_tiny_run.folder)
    checksums.accept(copied_tiny_run.folder)
    Run.open(copied_tiny_run.folder)


def test_a_panel_in_another_order_does_not_fit_the_model(copied_tiny_run):
    folder = copied_tiny_run.folder
    for name in ("panel.json", "model_index.json"):
        text = (folder / name).read_text()
        content = json.loads(text)
        genes = content["genes"] if name == "panel.json" else content["settings"]["genes"]
        genes[0], genes[1] = genes[1], genes[0]
        (folder / name).write_text(json.dumps(content))
        checksums.accept(folder)
        with pytest.raises(DataError, match="than the model was trained with"):
            Run.open(folder).sample("sim2")
        if name == "panel.json":
            continue
        with pytest.raises(DataError, match=r"model_index\.json names other genes"):
            Run.open(folder).pipeline()


def test_a_changed_number_of_shared_features_is_found(tmp_path):
    path, features = tmp_path / "a.h5", np.random.default_rng(0).normal(size=(30, 1, 8)).astype(np.float32)
    coords, barcodes = np.arange(60.0).reshape(30, 2), [f"b{i}" for i in range(30)]
    about = {"encoder": "e", "digest": "d", "patch_um": 112.0, "patch_px": 224, "dtype": "float32"}
    with FeatureWriter(path, barcodes, coords, 1, 8, **about) as writer:
        writer.write(np.arange(30), features)
    whole = path.read_bytes()
    for array in (features, coords):
        at = whole.index(array.tobytes()[:64]) + 20
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(DataError, match="not a readable feature file"):
            read_features(path)


# --- weights and draws that are not finite -----------------------------------------------------------

WEIGHTS = ("model/diffusion_pytorch_model.safetensors", "backbone/model.safetensors")


@pytest.mark.parametrize("weights", WEIGHTS)
def test_weights_that_are_not_finite_are_refused(copied_tiny_run, weights):
    path = copied_tiny_run.folder / weights
    tensors = load_file(path)
    for name, tensor in ((name, tensor) for name, tensor in tensors.items() if tensor.numel()):
        for bad in (float("nan"), float("inf")):
            changed = tensor.clone()
            changed.view(-1)[changed.numel() // 2] = bad
            save_file({**tensors, name: changed}, path, metadata={"format": "pt"})
            checksums.accept(copied_tiny_run.folder)
            with pytest.raises(WeightsError, match="not finite"):
                copied_tiny_run.pipeline()


def test_weights_of_whole_numbers_are_refused(copied_tiny_run):
    path = copied_tiny_run.folder / WEIGHTS[0]
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name].to(torch.int64)}, path, metadata={"format": "pt"})
    checksums.accept(copied_tiny_run.folder)
    with pytest.raises(WeightsError, match=f"{name} holds int64 numbers"):
        copied_tiny_run.pipeline()


def test_draws_that_are_not_finite_are_not_written(tiny_run):
    slide, values = tiny_run.slide("sim2"), np.zeros((2, 36, 3), np.float32)
    values[1, 4, 2] = np.nan
    with pytest.raises(DataError, match=rf"spot {slide.obs_names[4]} and gene c; nothing was written"):
        draws_of_slide(values, values[0], slide, ["a", "b", "c"], {})


# --- power loss --------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["emptied", "halved", "changed", "gone"])
def test_unfinished_arrays_that_are_damaged_are_computed_again(tmp_path, damage):
    arrays = {"values": ((2, 6, 3), np.float32, 1), "expected": ((6, 3), np.float32, 0)}

    def work() -> tuple[list[int], tuple[np.ndarray, ...]]:
        unfinished = ResumableArrays(tmp_path / "x.h5ad", {"seed": 0}, arrays, 6, 2)
        unfinished.prepare()
        computed = []
        for number, part in unfinished.missing():
            computed.append(number)
            spots = np.arange(6)[part]
            expected = np.repeat(spots[:, None], 3, axis=1)
            unfinished.write(number, part, np.stack([expected, expected + 1]), expected)
        return computed, unfinished.read()

    assert work()[0] == [0, 1, 2] and work()[0] == []
    path = tmp_path / ".x.unfinished" / "values.npy"
    content = bytearray(path.read_bytes())
    if damage == "changed":
        content[-1] ^= 1
    path.write_bytes(b"" if damage == "emptied" else content[: len(content) // 2] if damage == "halved" else content)
    if damage == "gone":
        path.unlink()
    again, (values, expected) = work()
    assert again == ([2] if damage == "changed" else [0, 1, 2])
    np.testing.assert_array_equal(expected[:, 0], np.arange(6))
    np.testing.assert_array_equal(values[1, :, 2], np.arange(6) + 1)


def loop(folder: Path, until: int | None = None) -> torch.nn.Module:
    """Train a small module; `until` stops it after that step."""
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)

    def batch_loss(module, step, rows, positions, generator):
        if step == until:
            raise KeyboardInterrupt
        return module(torch.ones(len(positions), 2) * (step + 1)).square().sum()

    run_loop(model, batch_loss, 4, LoopConfig(steps=12, batch_size=4, checkpoint_every=3), folder, seed=0)
    return model


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[: len(content) // 2]])
def test_training_falls_back_on_the_checkpoint_before(tmp_path, damage: Callable[[bytes], bytes], caplog):
    whole = loop(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        loop(tmp_path / "cut", until=8)
    latest = tmp_path / "cut" / "latest.safetensors"
    assert read_tensors(previous_of(latest))[1]["step"] == 3
    latest.write_bytes(damage(latest.read_bytes()))
    again = loop(tmp_path / "cut")
    assert "continuing from the one before" in caplog.text
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    assert sorted(path.name for path in latest.parent.iterdir()) == ["latest.safetensors", "log.jsonl"]
    with pytest.raises(KeyboardInterrupt):
        loop(tmp_path / "first", until=4)
    (tmp_path / "first" / "latest.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match="delete the folder of the training to begin again"):
        loop(tmp_path / "first")


def test_content_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    happened: list[tuple[str, int]] = []
    flush, replace = os.fsync, os.replace

    def fsync(handle: int) -> None:
        happened.append(("flush", os.fstat(handle).st_ino))
        flush(handle)

    def rename(one, other) -> None:
        happened.append(("rename", os.stat(one).st_ino))
        replace(one, other)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    with atomic_path(tmp_path / "file") as temporary:
        temporary.write_text("content")
    inode, folder = (tmp_path / "file").stat().st_ino, tmp_path.stat().st_ino
    assert happened == [("flush", inode), ("rename", inode), ("flush", folder)]
    happened.clear()
    with atomic_path(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "a").write_text("content")
    flushed = {inode for what, inode in happened[:-2] if what == "flush"}
    assert flushed == {(tmp_path / "folder").stat().st_ino, (tmp_path / "folder" / "a").stat().st_ino}


def test_a_folder_is_replaced_without_a_moment_in_which_there_is_none(tmp_path, monkeypatch):
    def write(content: str) -> None:
        with atomic_path(tmp_path / "folder") as temporary:
            temporary.mkdir()
            (temporary / "a").write_text(content)

    write("old")
    moved = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda one, other: (moved.append(Path(one)), replace(one, other)))
    write("new")
    assert (tmp_path / "folder" / "a").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    if not moved:  # the system exchanges names
        return
    pytest.skip("this system cannot exchange two folders")


def test_the_old_folder_is_moved_away_where_names_cannot_be_exchanged(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    for content in ("old", "new"):
        with atomic_path(tmp_path / "folder") as temporary:
            temporary.mkdir()
            (temporary / "a").write_text(content)
    assert (tmp_path / "folder" / "a").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_what_killed_processes_left_is_removed(copied_tiny_run):
    folder = copied_tiny_run.folder
    dead = files.process_mark(2**22 + 1, files.HOST)  # more than a process id can be
    left = [
        folder / "exports" / f".a.geojson.{dead}.abc",
        folder / "samples" / ".sim2.unfinished",
        folder / "features" / ".sim2.stain-texture.unfinished",
    ]
    for path in left:
        path.mkdir(parents=True)
    for lock in (folder / ".lock", folder / "samples" / ".sim2.h5ad.lock"):
        lock.touch()
    with atomic_path(folder / "exports" / "a.geojson") as temporary:
        temporary.write_text("{}")
    copied_tiny_run.sample("sim2")
    copied_tiny_run.features(copied_tiny_run.slide("sim2"))
    copied_tiny_run.train()
    assert not list(folder.rglob(".*"))


# --- checksums ---------------------------------------------------------------------------------------


def write(path: Path, content: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(content)


def test_a_process_killed_before_its_file_had_its_name_leaves_no_wrong_checksum(tmp_path, monkeypatch):
    checksums.start(tmp_path)
    write(tmp_path / "a.json", "old")

    def killed(*names) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files, "_publish", killed)
        write(tmp_path / "a.json", "new")
    assert checksums.verified(tmp_path / "a.json").read_text() == "old"
    write(tmp_path / "a.json", "new")
    assert checksums.verified(tmp_path / "a.json").read_text() == "new"
    (tmp_path / "a.json").write_text("other")
    with pytest.raises(DataError, match=r"a\.json was changed"):
        checksums.verified(tmp_path / "a.json")


def test_checksums_have_a_checksum(tmp_path):
    checksums.start(tmp_path)
    write(tmp_path / "a.json", "content")
    path = tmp_path / checksums.NAME
    path.write_text(path.read_text().replace("a.json", "b.json"))
    with pytest.raises(DataError, match=r"checksums\.json was changed or damaged"):
        checksums.verified(tmp_path / "a.json")
    assert checksums.accept(tmp_path) == 1
    checksums.verified(tmp_path / "a.json")


def test_files_without_checksums_are_read(tmp_path):
    write(tmp_path / "a.json", "content")
    assert checksums.verified(tmp_path / "a.json") == tmp_path / "a.json"
    checksums.start(tmp_path)
    checksums.verified(tmp_path / "a.json")
    assert verify_run(tmp_path).unknown == ["a.json"]
