"""Every command that writes, killed at any operation on its files or at any time: the same command ends its work.

A life is a process of its own that has imported everything. Half of the kills come at a chosen operation on files
(opened, renamed, removed, made, flushed), the others after a random time. After half of the kills a file that is not
finished is cut off or emptied, as a power loss does. Then the command is run again, and its files are compared with
those of an undisturbed run at the same place.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.backbones import published_folder
from helpers.runs import finish, tiny_settings

from hinge.config import check_config
from hinge.data import simulate_slides
from hinge.run.run import Run
from hinge.utils.files import HOST, process_mark, write_json
from hinge.utils.locks import remove_left_lock

pytestmark = pytest.mark.full

SECONDS = 300  # after which a life is taken to hang
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
WITH_TIMES = ("cell.json", "seconds.json")  # of a grid, whose table has the seconds of each run
OF_ZARR = {".zarray", ".zattrs", ".zgroup", ".zmetadata"}
ONTOLOGY = {
    "organism_ontology_term_id": "NCBITaxon:9606",
    "tissue_ontology_term_id": "UBERON:0000310",
    "disease_ontology_term_id": "MONDO:0007254",
    "assay_ontology_term_id": "EFO:0010961",
}

COMMANDS = {
    "check": "check {slides} --sample sim0 --json {out}/check.json --html {out}/check.html",
    "check --accept": "check {run} --accept",
    "features": "features {slides} --sample sim0 --sample sim1 --encoder stain-texture --batch-size 2 "
    "--output {out}/features",
    "panel": "panel {slides} --output {out}/panel.json --genes 20",
    "pretrain-expression": "pretrain-expression {slides} --sample sim0 --steps 6 --hidden-size 16 "
    "--output {out}/backbone",
    "pretrain-histology": "pretrain-histology --config {files}/encoder.json",
    "train": "train --config {files}/run.json",
    "train from disk": "train --config {files}/run.json training.store=disk",
    "run": "run --config {files}/run.json",
    "sample": "sample {run} --seed 5 --batch-size 6",
    "sample --output": "sample {run} --slide sim1 --draws 2 --batch-size 6 --output {out}/sim1.h5ad",
    "evaluate": "evaluate {run}",
    "report": "report {run}",
    "report --interactive": "report {run} --interactive",
    "export geojson": "export {run} --format geojson",
    "export spatialdata": "export {run} --format spatialdata",
    "export cellxgene": "export {run} --format cellxgene --gene-ids {files}/ids.csv --metadata {files}/ontology.json",
    "export zarr": "export {run} --format zarr --output {out}/draws.zarr",
    "export torch-export": "export {run} --format torch-export",
    "map": "map {run} --slide sim2 --pitch-um 100",
    "map draws": "map {run} --slide sim2 --pitch-um 100 --method draws --draws 2 --output {out}",
    "finetune-encoder": "finetune-encoder {slides} --sample sim0 --sample sim1 --encoder stain-texture --tune linear "
    "--epochs 2 --genes 10 --output {out}/tuned",
    "cluster": "cluster {slides} --sample sim0 --encoder stain-texture --clusters 3 --output {out}/clusters",
    "probe tumour": "probe tumour {slides} --sample sim0 --sample sim1 --sample sim2 --column array_row --above median "
    "--encoder stain-texture --output {out}/probe",
    "ablate": "ablate {files}/grid.json {out}/grid",
    "demo": "demo --output {out}/demo",
    "convert to-authors": "convert to-authors {files}/plain {out}/authors.pth",
    "convert cellfm": "convert cellfm {files}/cellfm.pth {out}/cellfm --heads 2",
    "convert hinge": "convert hinge {files}/authors.pth {out}/hinge --heads 2",
    "convert scgpt": "convert scgpt {files}/scgpt {out}/scgpt",
    "convert tahoe": "convert tahoe {files}/tahoe {out}/tahoe",
    "download run": "download run lab/run --output {out}/theirs",
}
FEW = ("check --accept", "features", "panel", "train", "sample", "evaluate", "report", "export zarr", "cluster")
FEW += (
    "train from disk",
    "map draws",
    "convert cellfm",
    "download run",
)  # in the full tier; the others take longer, or write alike
REFUSES_ITS_RESULT = {"convert cellfm", "convert hinge", "convert scgpt", "convert tahoe", "download run"}
RECORDINGS = {"convert scgpt": "scgpt_generative.safetensors", "convert tahoe": "tahoe_generative.safetensors"}


# --- a life ------------------------------------------------------------------------------------------


def life(arguments: list[str], place: Path, files: Path, at: int | None, counted: Path) -> None:
    """The command line; it is killed before its `at`-th operation on files, or notes their number."""
    place_name, operations = str(place), 0

    def count() -> None:
        nonlocal operations
        operations += 1
        if operations == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: str, values: tuple) -> None:
        if event in EVENTS and isinstance(values[0], str) and values[0].startswith(place_name):
            count()

    fsync = os.fsync

    def flush(handle: int) -> None:
        count()
        fsync(handle)

    os.fsync = flush
    _small_work()
    _hub_in_a_folder(files / "hub")
    sys.addaudithook(watch)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with counted.with_suffix(".stderr").open("w") as errors, open(os.devnull, "w") as nothing:
        os.dup2(errors.fileno(), 2)
        os.dup2(nothing.fileno(), 1)
        from hinge.cli.app import main

        sys.argv = ["hinge", *arguments]
        try:
            main()
        finally:
            counted.write_text(str(operations))


def _small_work() -> None:
    """Make parts of a few spots, and the demo's slides and networks small."""
    import hinge.diffusion.sampler
    import hinge.encoders.extract
    import hinge.experiments.demo as demo

    hinge.diffusion.sampler.BATCHES_IN_A_PART = hinge.encoders.extract.BATCHES_IN_A_PART = 1
    simulate, check = demo.simulate_slides, demo.check_config

    def simulate_small(folder, **options):
        return simulate(folder, **{**options, "grid": (5, 5), "n_genes": 40, "um_per_px": 2.0})

    def check_small(content, name):
        small = tiny_settings(Path(content["data"]["path"]), Path(content["output"]))
        return check({**content, **{key: small[key] for key in ("panel", "backbone", "training", "sampling")}}, name)

    demo.simulate_slides, demo.check_config = simulate_small, check_small


def _hub_in_a_folder(root: Path) -> None:
    """Take downloads from a folder, a file at a time as the hub's client does."""
    import huggingface_hub

    def snapshot_download(repository, revision=None, local_dir=None, allow_patterns=None):
        for source in sorted(path for path in (root / repository).rglob("*") if path.is_file()):
            target = Path(local_dir) / source.relative_to(root / repository)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
        return str(local_dir)

    huggingface_hub.snapshot_download = snapshot_download


# --- what the commands start from --------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with slides, a finished run, and files that commands read."""
    import torch

    from hinge.backbones.published_cellfm import export_cellfm
    from hinge.sharing.convert import export_hinge_folder
    from hinge.sharing.upload import prepare

    folder = tmp_path_factory.mktemp("inputs")
    slides = folder / "slides"
    simulate_slides(slides, n_slides=3, grid=(5, 5), n_genes=40, um_per_px=2.0)
    simulate_slides(slides, n_slides=2, grid=(5, 5), n_genes=40, um_per_px=2.0, first=10, with_image=False)
    settings = tiny_settings(slides, Path("OUT/run"))
    settings["evaluation"] = {"baselines": ["mean", "ridge-cv+residual"], "bootstrap": 5}
    settings["training"] |= {"checkpoint_every": 2, "evaluate_every": 2}
    settings["backbone"]["pretrain"] |= {"checkpoint_every": 2}
    write_json(folder / "run.json", settings)
    write_json(folder / "grid.json", {"base": "run.json", "variants": {"a": {}, "b": {"diffusion.schedule": "cosine"}}})
    vit = {"arguments": {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}}
    steps = {"steps": 4, "batch_size": 4, "local_crops": 0, "outputs": 16, "hidden": 16, "bottleneck": 8}
    data = {"path": str(slides), "samples": ["sim0", "sim1"]}
    write_json(
        folder / "encoder.json",
        {"output": "OUT/encoder", "data": data, "vit": vit, "training": {**steps, "checkpoint_every": 2}},
    )
    run = Run(check_config({**settings, "output": str(folder / "run")}, "test"))
    finish(run)
    write_json(folder / "ontology.json", ONTOLOGY)  # JSON is YAML
    ids = [f"{gene},ENSG{number:011d}" for number, gene in enumerate(run.slide("sim0").var_names)]
    (folder / "ids.csv").write_text("\n".join(["symbol,ensembl_id", *ids]))
    plain = {**settings, "output": str(folder / "plain"), "features": {"encoder": "stain-texture"}}
    plain["features"]["standardise_slide"] = False
    plain["backbone"] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "weights": "random"}
    plain["model"] = {"head": "point", "gene_factors": False, "condition_on_visible": "next"}
    Run(check_config(plain, "test")).train()
    export_hinge_folder(folder / "plain", folder / "authors.pth")
    torch.save(export_cellfm(Run.open(folder / "plain").backbone()), folder / "cellfm.pth")
    prepare(run, folder / "hub" / "lab" / "run", "lab/run", "cc-by-4.0")
    return folder


class Place:
    """A folder in which one command is tried: `run/`, a copy of the finished run, and `out/`."""

    def __init__(self, server, inputs: Path, folder: Path, name: str):
        self.server, self.inputs, self.name = server, inputs, name
        self.place, self.counted = folder / "place", folder / "counted"
        self.files = folder / "files"
        shutil.copytree(inputs, self.files, ignore=shutil.ignore_patterns("run", "slides"))
        if (inputs / "hub").exists():
            shutil.copytree(inputs / "hub", self.files / "hub", dirs_exist_ok=True)
        for file in self.files.glob("*.json"):
            file.write_text(file.read_text().replace("OUT/", f"{self.place / 'out'}/"))
        places = {"slides": inputs / "slides", "run": self.place / "run", "out": self.place / "out"}
        self.arguments = [word.format(files=self.files, **places) for word in COMMANDS[name].split()]
        self.restore()
        before = contents(self.place)
        began = time.monotonic()
        code = self.live()
        assert code == 0, self.said()
        self.seconds, self.operations = time.monotonic() - began, int(self.counted.read_text())
        self.whole = contents(self.place)
        assert self.whole != before or name == "check --accept", "the command wrote nothing"
        assert not hidden(self.place), hidden(self.place)

    def restore(self) -> None:
        """Put back what the command starts from."""
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.inputs / "run", self.place / "run")
        (self.place / "out").mkdir()
        if self.name == "evaluate":
            for left in ("baselines", "scores"):
                shutil.rmtree(self.place / "run" / left)
        if self.name == "report":
            (self.place / "run" / "report.html").unlink()

    def live(self, at: int | None = None, seconds: float | None = None) -> int | None:
        """Run the command, with a kill at an operation or after some seconds; its exit code, −9 if it was killed."""
        self.counted.unlink(missing_ok=True)
        process = self.server.Process(target=life, args=(self.arguments, self.place, self.files, at, self.counted))
        process.start()
        process.join(SECONDS if seconds is None else seconds)
        if process.exitcode is None:
            process.kill()
            process.join(SECONDS)
            assert seconds is not None, f"{self.name} hangs"
        return process.exitcode

    def said(self) -> str:
        return self.counted.with_suffix(".stderr").read_text()


def hidden(place: Path) -> list[str]:
    return sorted(str(path.relative_to(place)) for path in place.rglob(".*") if path.name not in OF_ZARR)


def unfinished(place: Path) -> list[Path]:
    """Files in hidden folders that have content: those that have no name of their own yet."""
    found = [path for path in place.rglob("*") if path.is_file() and path.stat().st_size]
    return [path for path in found if any(part.startswith(".") for part in path.relative_to(place).parts[:-1])]


def contents(place: Path) -> dict[str, str]:
    """Digests of all files, without times and random identifiers."""
    return {
        str(path.relative_to(place)): hashlib.sha256(_constant(path)).hexdigest()
        for path in sorted(place.rglob("*"))
        if path.is_file()
    }


def _constant(path: Path) -> bytes:
    """Return the bytes of a file without seconds."""
    if path.name == "seconds.json":
        return b""
    if path.name in WITH_TIMES or path.name in ("checksums.json", "log.jsonl"):
        content = [json.loads(line) for line in path.read_text().splitlines()] if path.suffix == ".jsonl" else None
        content = json.loads(path.read_text()) if content is None else content
        if path.name == "checksums.json":  # an entry keeps the digest of the file before
            files = content["files"]
            content = {key: files[key][0] for key in files if not key.endswith(WITH_TIMES)}
        return json.dumps(_without_seconds(content)).encode()
    if path.name in ("table.csv", "table.md"):
        import pandas as pd

        table = pd.read_csv(path.with_suffix(".csv"))
        return table[[name for name in table if not name.startswith("seconds")]].to_csv().encode()
    return path.read_bytes()


def _without_seconds(content):
    if isinstance(content, list):
        return [_without_seconds(item) for item in content]
    if isinstance(content, dict):
        return {key: _without_seconds(item) for key, item in content.items() if not key.startswith("seconds")}
    return content


# --- killing -----------------------------------------------------------------------------------------


def check(place: Place, kills: int, chance: random.Random) -> dict[str, int]:
    """Kill the command so many times, up to three times before it may end; compare each time it has ended."""
    figures = {"kills": 0, "cut": 0, "ended": 0}
    while figures["kills"] < kills:
        place.restore()
        for _ in range(chance.randint(1, min(3, kills - figures["kills"]))):
            if chance.random() < 0.5:
                code = place.live(at=chance.randint(1, place.operations))
            else:
                code = place.live(seconds=chance.uniform(0, place.seconds))
            if code != -signal.SIGKILL:  # it had less to do than the first time
                break
            figures["kills"] += 1
            left = unfinished(place.place)
            if left and chance.random() < 0.5:
                cut = chance.choice(left)
                os.truncate(cut, chance.choice([0, cut.stat().st_size // 2]))
                figures["cut"] += 1
        code = place.live()
        there = place.name in REFUSES_ITS_RESULT and code == 2 and "exists already" in place.said()
        assert code == 0 or there, place.said()
        assert not hidden(place.place), hidden(place.place)
        now = contents(place.place)
        differ = sorted(key for key in {*now, *place.whole} if now.get(key) != place.whole.get(key))
        assert not differ, differ
        figures["ended"] += 1
    return figures


@pytest.fixture
def make_place(server, inputs, tmp_path, request) -> Callable[[str], Place]:
    def make(name: str) -> Place:
        if name in RECORDINGS:
            recording = request.getfixturevalue("backbones") / RECORDINGS[name]
            published_folder(recording, inputs / name.split()[1])
        return Place(server, inputs, tmp_path, name)

    return make


@pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in COMMANDS]
)
def test_killed_twice(make_place, name):
    figures = check(make_place(name), 2, random.Random(name))
    assert figures["kills"] >= 2 and figures["ended"] >= 1


def test_killed_after_the_last_checkpoint(tmp_path):
    """The checkpoint before it, which was to be removed next, is removed by the process that finds the work done."""
    import torch

    from hinge.training.loop import LoopConfig, run_loop

    def loss(module, step, rows, positions, generator):
        return module(torch.ones(len(positions), 2)).square().sum()

    settings = LoopConfig(steps=4, batch_size=4, checkpoint_every=2)
    for _ in range(2):
        run_loop(torch.nn.Linear(2, 1), loss, 4, settings, tmp_path, seed=0)
        assert not list(tmp_path.glob("previous-*"))
        shutil.copy(tmp_path / "latest.safetensors", tmp_path / "previous-latest.safetensors")


def test_killed_after_the_result_had_its_name(tmp_path):
    """Locks and temporary folders, in the folder and beside it, are removed by the process that finds the work done."""
    folder = tmp_path / "encoder-training"
    folder.mkdir()
    remove_left_lock(folder)
    assert folder.is_dir()
    for name in (".lock", ".lock.json"):
        (folder / name).write_text("")
    beside = tmp_path / f".encoder.{process_mark(2**22 + 1, HOST)}.abc"
    (beside / "encoder").mkdir(parents=True)
    remove_left_lock(folder)
    assert list(folder.iterdir()) == [] and list(tmp_path.iterdir()) == [folder]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_seven_times(make_place, name):
    """With -s, the figures of docs/reliability.md."""
    place = make_place(name)
    figures = check(place, 7, random.Random(f"many {name}"))
    print(name, figures, f"{place.operations} operations, {place.seconds:.1f} s", flush=True)
