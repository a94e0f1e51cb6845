"""Full disk, no permission, numbers that are none, no memory: a sentence, an exit code, nothing half-written."""

import ctypes
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from helpers.runs import finish

import hinge.encoders.extract as extract_module
import hinge.utils.memory as memory
from hinge.config import check_config
from hinge.data import read_slide, simulate_slides
from hinge.data.draws import read_draws
from hinge.data.layers import named_layers
from hinge.diffusion import sampler
from hinge.encoders import Encoder, extract_features, load_encoder
from hinge.run.run import Run
from hinge.training.loop import LoopConfig, run_loop
from hinge.utils.errors import HingeError
from hinge.utils.files import file_digest
from hinge.utils.memory import with_less_memory

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def slides(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tissue")
    simulate_slides(folder, n_slides=3, grid=(6, 6), n_genes=40, um_per_px=2.0)
    return folder


def settings(slides: Path, output: Path) -> dict:
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {
        "output": str(output),
        "data": {"path": str(slides), "train": ["sim0", "sim1"], "test": ["sim2"]},
        "panel": {"genes": 12},
        "features": {"standardise_slide": False},
        "model": {
            "head": "point",
            "gene_factors": False,
            "condition_on_visible": "next",
        },
        "backbone": {**size, "weights": "random"},
        "training": {"epochs": None, "steps": 30, "batch_size": 16, "checkpoint_every": 3},
        "sampling": {"draws": 3, "steps": 3},
        "evaluation": {"baselines": ["mean"], "bootstrap": 0},
    }


@pytest.fixture(scope="module")
def finished(slides, tmp_path_factory) -> Run:
    run = Run(check_config(settings(slides, tmp_path_factory.mktemp("runs") / "tiny"), "test"))
    finish(run)
    return run


# --- commands that cannot write ----------------------------------------------------------------------

COMMANDS = {
    "features": "features {slides} --sample sim0 --output {out}",
    "panel": "panel {slides} --output {out}/panel.json --genes 38",
    "pretrain-expression": "pretrain-expression {slides} --steps 2 --hidden-size 16 --output {out}/backbone",
    "pretrain-histology": "pretrain-histology --config {encoder}",
    "train": "train --config {config}",
    "run": "run --config {config}",
    "sample": "sample {run} --seed 5",
    "sample elsewhere": "sample {run} --seed 5 --output {out}/sim2.h5ad",
    "evaluate": "evaluate {run}",
    "report": "report {run}",
    "viewer": "report {run} --interactive",
    "geojson": "export {run} --format geojson --output {out}/a.geojson",
    "spatialdata": "export {run} --format spatialdata --output {out}/a.zarr",
    "zarr": "export {run} --format zarr --output {out}/a.zarr",
    "torch-export": "export {run} --format torch-export --output {out}/a.pt2",
    "finetune-encoder": "finetune-encoder {slides} --encoder stain-texture --tune linear --epochs 1 --output {out}",
    "map": "map {run} --slide sim2 --pitch-um 100",
    "cluster": "cluster {slides} --sample sim0 --encoder stain-texture --clusters 3 --output {out}",
    "ablate": "ablate {grid} {out}",
    "demo": "demo --output {out}",
    "convert": "convert to-authors {run} {out}/model.pth",
}
FEW = ("features", "train", "sample", "report", "torch-export")


def call(arguments: list[str], errors, prepare: Callable, *more) -> None:
    """The command line, its stderr in a pipe, after something that makes it hard."""
    from hinge.cli.app import main

    os.dup2(errors.fileno(), 2)
    prepare(*more)
    sys.argv = ["hinge", *arguments]
    main()


def small_files(size: int) -> None:
    """Files may not grow beyond a size: what the system then says is what it says of a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def ordinary_rights(*read_only: Path) -> None:
    """Permissions count for root too; these folders are read-only."""
    if os.geteuid() == 0:
        header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None, use_errno=True).capset(header, nothing) == 0
    for folder in read_only:
        for path in [folder, *folder.rglob("*")]:
            if path.is_dir():
                path.chmod(0o555)


def nothing() -> None:
    pass


def contents(*folders: Path) -> dict[str, str]:
    return {str(path): file_digest(path) for folder in folders for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def attempt(server, slides, finished, tmp_path):
    """Run a command in a process of its own that cannot write: attempt(command, prepare, …) → what it said.

    What was there is still there, and what is new is whole: it has a name of its own.
    """
    run, out = tmp_path / "tiny", tmp_path / "out"
    shutil.copytree(finished.folder, run)
    out.mkdir()
    files = {"config": tmp_path / "config.json", "grid": tmp_path / "grid.json", "encoder": tmp_path / "encoder.json"}
    files["config"].write_text(json.dumps(settings(slides, out / "run")))
    files["grid"].write_text(json.dumps({"base": "config.json", "variants": {"a": {}}}))
    vit = {"arguments": {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}}
    training = {"steps": 2, "batch_size": 4, "local_crops": 0, "outputs": 16, "hidden": 16, "bottleneck": 8}
    asked = {"output": str(out / "encoder"), "data": {"path": str(slides)}, "vit": vit, "training": training}
    files["encoder"].write_text(json.dumps(asked))

    def attempt(command: str, prepare: Callable, *more, where: Path | None = None) -> str:
        reader, errors = server.Pipe(duplex=False)
        places = {"slides": slides, "out": where or out, "run": run, **files}
        arguments = [word.format(**places) for word in COMMANDS[command].split()]
        before = contents(run, slides)
        process = server.Process(target=call, args=(arguments, errors, prepare, *more))
        process.start()
        errors.close()
        said = b""
        while piece := os.read(reader.fileno(), 1 << 16):
            said += piece
        said = said.decode()
        process.join(240)
        sentences = [line for line in said.splitlines() if line.startswith("hinge: ")]
        assert "Traceback" not in said, said
        assert process.exitcode == 2 and len(sentences) == 1, (process.exitcode, said)
        assert sentences[0] == said.splitlines()[-1], said
        after = contents(run, slides)
        assert {path: after.get(path) for path in before} == before
        hidden = [path for folder in (run, out, where or out) for path in folder.rglob(".*")]
        assert all(path.name.endswith(".unfinished") for path in hidden), hidden
        return sentences[0]

    yield attempt
    for folder in (run, out, slides):
        for path in [folder, *folder.rglob("*")]:
            if path.is_dir():
                path.chmod(0o755)
    shutil.rmtree(run)


@pytest.mark.parametrize(
    "command", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in COMMANDS]
)
def test_no_room(attempt, command):
    said = attempt(command, small_files, 256 if command == "panel" else 2048)
    assert any(word in said for word in ("File too large", "errno = 27", "os error 27", "Errno 27")), said


@pytest.mark.parametrize(
    "command", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in COMMANDS]
)
def test_a_read_only_folder(attempt, command, tmp_path):
    said = attempt(command, ordinary_rights, tmp_path / "out", tmp_path / "tiny")
    assert "ermission denied" in said, said
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


@pytest.fixture
def disk(tmp_path):
    """A disk of its own, of 48 kB; for root on Linux."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k", "none", str(folder)], capture_output=True)
    except FileNotFoundError:
        pytest.skip("no mount here")
    if done.returncode:
        pytest.skip("may not mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("command", ["features", "sample elsewhere", "torch-export", "zarr", "convert"])
def test_a_full_disk(attempt, disk, command):
    (disk / "filler").write_bytes(b"0" * 32_000)
    said = attempt(command, nothing, where=disk)
    assert "No space left" in said or "os error 28" in said, said
    left = [str(path) for path in disk.rglob("*") if path.is_file() and ".unfinished" not in str(path)]
    assert left == [str(disk / "filler")], left


def test_permission_lost_and_found_again(server, slides, tmp_path):
    """In the middle of training: what was saved before is there and is gone on with."""
    config, run = tmp_path / "config.json", tmp_path / "run"
    config.write_text(json.dumps(settings(slides, run)))
    arguments = ["train", "--config", str(config)]
    reader, errors = server.Pipe(duplex=False)
    process = server.Process(target=call, args=(arguments, errors, slowly_with_ordinary_rights))
    process.start()
    errors.close()
    checkpoint = run / "training" / "latest.safetensors"
    while not checkpoint.exists() and process.exitcode is None:
        time.sleep(0.005)
    checkpoint.parent.chmod(0o555)
    process.join(240)
    checkpoint.parent.chmod(0o755)
    said = b""
    while piece := os.read(reader.fileno(), 1 << 16):
        said += piece
    last = said.decode().splitlines()[-1]
    assert process.exitcode == 2 and last.startswith("hinge: ") and "ermission denied" in last, said.decode()
    # the folder may have been closed while a file was being written, which then cannot be removed
    assert {path.name for path in checkpoint.parent.iterdir() if not path.name.startswith(".")} <= {
        "latest.safetensors",
        "best.safetensors",
        "log.jsonl",
    }
    again = Run(check_config(settings(slides, run), "test"))
    again.train()
    assert not [path for path in checkpoint.parent.iterdir() if path.name.startswith(".")]
    whole = Run(check_config(settings(slides, tmp_path / "whole"), "test"))
    whole.train()
    for folder in ("model", "backbone"):
        ours, theirs = contents(run / folder), contents(tmp_path / "whole" / folder)
        assert list(ours.values()) == list(theirs.values())


def slowly_with_ordinary_rights() -> None:
    import hinge.training.loop

    batch_rows = hinge.training.loop.batch_rows

    def slow(*arguments):
        time.sleep(0.05)
        return batch_rows(*arguments)

    hinge.training.loop.batch_rows = slow
    ordinary_rights()


# --- a loss that is no number ------------------------------------------------------------------------


def linear_loop(folder: Path, bad: set[int], **options):
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)

    def batch_loss(module, step, rows, positions, generator):
        loss = module(torch.ones(len(positions), 2)).square().mean()
        return loss * torch.tensor(float("nan" if step % 2 else "inf")) if step in bad else loss

    config = LoopConfig(steps=20, batch_size=4, checkpoint_every=5, learning_rate=0.1, **options)
    return model, run_loop(model, batch_loss, 4, config, folder, seed=0)


def test_a_step_without_a_number_is_skipped(tmp_path):
    model, result = linear_loop(tmp_path, bad={3, 4, 11}, ema_decay=0.5)
    assert result.step == 20
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [step for step, loss in enumerate(losses) if not np.isfinite(loss)] == [3, 4, 11]
    assert losses[5] < losses[2]


def test_ten_in_a_row_are_a_diagnosis_and_the_weights_from_before_are_kept(tmp_path):
    with pytest.raises(HingeError, match=r"not finite for ten steps up to step 16: lower learning_rate \(now "):
        linear_loop(tmp_path, bad=set(range(7, 20)))
    model, result = linear_loop(tmp_path, bad=set())  # whatever it was is put right: it goes on
    assert result.step == 20
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


# --- memory ------------------------------------------------------------------------------------------

OUT_OF_MEMORY = [
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ..."),
    MemoryError("Unable to allocate 2.00 GiB for an array with shape (1, 2) and data type float32"),
    RuntimeError("could not create a primitive"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cpu", "cuda", "numpy", "onednn"])
def test_batches_are_halved(error, monkeypatch):
    monkeypatch.setattr(memory, "clear_device_cache", lambda **_: None)  # a second each, in a process this large
    tried = []

    def work(size: int) -> str:
        tried.append(size)
        if size > 3:
            raise error
        return "done"

    assert with_less_memory(20, work) == ("done", 3)
    assert tried == [20, 10, 5, 3]

    def never(size: int) -> None:
        raise error

    with pytest.raises(HingeError, match="memory runs out even with one at a time: "):
        with_less_memory(4, never)


def test_other_errors_are_not_taken_for_it():
    def work(size: int) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        with_less_memory(8, work)


def test_sampling_goes_on_with_less(finished, tmp_path, monkeypatch, caplog):
    whole = finished.sample("sim2", seed=3, batch_size=32, output=tmp_path / "whole.h5ad")
    draw, sizes = sampler._Sampler.draw, []

    def narrow(self, spot_index, draw_index):
        sizes.append(len(spot_index))
        if len(spot_index) > 9:
            raise OUT_OF_MEMORY[0]
        return draw(self, spot_index, draw_index)

    monkeypatch.setattr(sampler._Sampler, "draw", narrow)
    with caplog.at_level(logging.WARNING):
        less = finished.sample("sim2", seed=3, batch_size=32, output=tmp_path / "less.h5ad")
    assert "memory ran out: continuing with batches of 8" in caplog.text
    assert sizes[:3] == [32, 16, 8] and set(sizes[3:]) <= {8, 4}
    one, two = read_draws(whole), read_draws(less)
    for name in named_layers(one):
        np.testing.assert_allclose(one.layers[name], two.layers[name], rtol=1e-5, atol=1e-5)


def test_features_go_on_with_less(slides, tmp_path, monkeypatch, caplog):
    encoder, slide = load_encoder("random:vit_tiny_patch16_224"), read_slide(slides, "sim0")
    whole = extract_features(slide, encoder, tmp_path / "whole.h5", batch_size=8)
    encode = Encoder.encode

    def narrow(self, batch, *arguments):
        if len(batch) > 3:
            raise OUT_OF_MEMORY[1]
        return encode(self, batch, *arguments)

    monkeypatch.setattr(Encoder, "encode", narrow)
    monkeypatch.setattr(extract_module, "BATCHES_IN_A_PART", 2)
    with caplog.at_level(logging.WARNING):
        less = extract_features(slide, encoder, tmp_path / "less.h5", batch_size=8)
    assert caplog.text.count("memory ran out") == 2  # 8, 4, 2: found once for the whole slide
    with h5py.File(whole) as one, h5py.File(less) as two:
        np.testing.assert_allclose(one["features"][:], two["features"][:], rtol=2e-3, atol=2e-3)  # float16


def test_the_error_of_the_allocator_on_this_machine(monkeypatch):
    """torch and numpy themselves, asked for more than any address space holds."""
    monkeypatch.setattr(memory, "clear_device_cache", lambda **_: None)
    for allocate in (torch.empty, np.empty):

        def work(size: int, allocate=allocate) -> int:
            if size > 3:
                allocate(1 << 58, dtype=(torch if allocate is torch.empty else np).uint8)
            return size

        assert with_less_memory(10, work) == (3, 3)
