"""The command line: what each command does, and that a mistake is one sentence and leaves nothing behind."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pytest
import typer
import yaml
from helpers import ROOT
from helpers.runs import tiny_settings
from safetensors.torch import load_file

from hinge.backbones import CellFMModel
from hinge.cli.app import app
from hinge.data import Panel, read_features
from hinge.data.draws import read_draws

PLAIN = ("--encoder", "stain-texture")  # an encoder without a network
COMMANDS = [command.name or command.callback.__name__ for command in app.registered_commands]


@pytest.fixture
def fails(call_cli, tmp_path):
    """Call with a mistake: one sentence, exit code 2, and no file that was not there before."""

    def call(*arguments, says: str) -> None:
        before = left(tmp_path)
        code, out, err = call_cli(*arguments)
        assert (code, out) == (2, ""), out + err
        said = [line for line in err.splitlines() if "[image-coarse]" not in line]  # true of these small images
        assert len(said) == 1 and said[0].startswith("hinge: "), err
        assert says in err, err
        assert left(tmp_path) == before

    return call


def left(folder: Path) -> dict[Path, int]:
    """Files, and whatever is hidden as temporary things are."""
    found = [path for path in folder.rglob("*") if path.is_file() or path.name.startswith(".")]
    return {path: path.stat().st_mtime_ns for path in found}


def launch(*arguments, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def slides(tiny_slides) -> Path:
    return tiny_slides


@pytest.fixture(scope="module")
def config(slides, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "tiny.yaml"
    content = tiny_settings(slides, Path("tiny"))
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def trained(config, tiny_run) -> Path:
    """Folder of a trained run, which `config` describes."""
    folder = config.parent / "tiny"
    for name in ("config.yaml", "panel.json", "split.json", "model_index.json", "environment.json"):
        folder.mkdir(exist_ok=True)
        shutil.copy(tiny_run.folder / name, folder)
    for name in ("backbone", "features", "model", "training"):
        shutil.copytree(tiny_run.folder / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def trained_on_two_processes(config) -> Path:
    """Folder of a run, trained on two processes."""
    # accelerate launch starts one process on a CPU, whatever its arguments
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    folder = config.parent / "two"
    done = launch(*torchrun, ROOT / "scripts" / "train.py", "--config", config, f"output={folder}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"model: {folder / 'model'}") == 2  # one line of each process
    return folder


# --- help --------------------------------------------------------------------------------------------


def test_commands():
    assert COMMANDS == [
        "demo",
        "check",
        "run",
        "train",
        "sample",
        "adapt",
        "evaluate",
        "report",
        "view",
        "export",
        "map",
        "panel",
        "features",
        "pretrain-expression",
        "pretrain-histology",
        "finetune-encoder",
        "cluster",
        "ablate",
        "push",
        "config",
        "doctor",
    ]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(call_cli, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = call_cli(command, "--help")
    assert (code, err) == (0, "")
    assert f"Example: hinge {command} " in out


def test_help_needs_no_heavy_import():
    script = (
        "import sys\n"
        "from hinge.cli.app import main\n"
        "sys.argv = ['hinge', *sys.argv[1:]]\n"
        "try:\n    main()\n"
        "except SystemExit as stopped:\n    assert not stopped.code\n"
        "heavy = {'torch', 'timm', 'transformers', 'diffusers', 'scanpy', 'anndata', 'pandas', 'plotly'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    for arguments in (["--help"], ["train", "--help"]):
        done = launch("-c", script, *arguments)
        assert done.returncode == 0, done.stderr
        assert "Usage" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["train"],
        ["train", "--config"],
        ["features", "x", "--views", "many", "--output", "y"],
        ["sample", "x", "--draws", "0"],
        ["demo", "--seed", "-1"],
        ["report"],
    ],
)
def test_usage_errors(call_cli, arguments):
    code, out, err = call_cli(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("hinge: ") and err.endswith(" --help\n") and err.count("\n") == 1, err


def test_every_argument_and_option_is_described():
    def parameters(command, name):
        for key, each in getattr(command, "commands", {}).items():
            yield from parameters(each, f"{name} {key}")
        for parameter in command.params:
            yield f"{name} {parameter.name}", parameter

    found = dict(parameters(typer.main.get_command(app), "hinge"))
    assert [name for name, each in found.items() if not (each.help or "").split("[default")[0].strip()] == []
    arguments = {each.metavar for each in found.values() if each.param_type_name == "argument"}
    assert arguments == {"RUN", "DATA", "OUTPUT", "KEY=VALUE", "GRID", "FOLDER", "REPOSITORY", "CHECKPOINT"}


# --- what the commands do ----------------------------------------------------------------------------


def test_features(call_cli, tiny_slide, tmp_path):
    arguments = [
        "features",
        tiny_slide.parent,
        "--sample",
        "tiny",
        "--encoder",
        "stain-texture",
        "--views",
        "8",
        "--output",
        tmp_path / "features",
    ]
    code, out, _ = call_cli(*arguments)
    path = tmp_path / "features" / "tiny.stain-texture.h5"
    assert (code, out) == (0, f"features: {path}\n")
    stored = read_features(path)
    assert stored.features.shape[:2] == (30, 8) and stored.encoder == "stain-texture"
    assert stored.patch_um == 112
    # finished: left as it is
    before = left(tmp_path)
    assert call_cli(*arguments)[0] == 0
    assert left(tmp_path) == before
    assert call_cli(*arguments, "--overwrite", "--patch-um", "56")[0] == 0
    assert read_features(path).patch_um == 56


def test_features_of_one_file_with_its_image_elsewhere(call_cli, tiny_slide, tmp_path):
    image = tiny_slide.with_suffix(".png").rename(tmp_path / "scan.png")
    code, _, err = call_cli("features", tiny_slide, "--image", image, "--um-per-px", "2.5", *PLAIN, "-o", tmp_path)
    assert code == 0, err
    assert (tmp_path / "tiny.stain-texture.h5").exists()


def test_panel(call_cli, slides, tmp_path):
    output = tmp_path / "panel.json"
    chosen = ["--sample", "sim0", "--sample", "sim1", "--genes", "7"]
    code, out, _ = call_cli("panel", slides, *chosen, "--output", output)
    assert (code, out) == (0, f"panel: {output} (7 genes)\n")
    panel = Panel.load(output)
    assert (len(panel.genes), panel.method, panel.slides) == (7, "hmhvg", ["sim0", "sim1"])


def test_panel_from_a_list(call_cli, slides, tmp_path):
    (tmp_path / "genes.txt").write_text("SIM007\n\n  SIM003 \n")
    arguments = ["panel", slides, "--list", tmp_path / "genes.txt", "--output", tmp_path / "panel.json"]
    assert call_cli(*arguments)[0] == 0
    assert Panel.load(tmp_path / "panel.json").genes == ["SIM007", "SIM003"]


def test_pretrain_expression(call_cli, slides, tmp_path):
    (tmp_path / "genes.txt").write_text("SIM007\nSIM003\nSIM011\n")
    size = ["--hidden-size", "8", "--num-hidden-layers", "2", "--num-attention-heads", "2"]
    arguments = ["--sample", "sim10", "--sample", "sim11", "--steps", "3", "--batch-size", "8", *size]
    output = tmp_path / "backbone"
    code, out, err = call_cli(
        "pretrain-expression", slides, "--panel", tmp_path / "genes.txt", *arguments, "-o", output
    )
    assert (code, out) == (0, f"backbone: {output}\n"), err
    backbone = CellFMModel.from_pretrained(output)
    assert backbone.config.gene_names == ["SIM007", "SIM003", "SIM011"]
    assert backbone.config.hidden_size == 8
    # without a panel: all genes that the files share
    code, _, err = call_cli("pretrain-expression", slides / "sim10.h5ad", *arguments[4:], "-o", tmp_path / "all")
    assert code == 0, err
    assert len(CellFMModel.from_pretrained(tmp_path / "all").config.gene_names) == 40


@pytest.mark.full
def test_the_training_script_from_inside_its_folder(trained, config):
    arguments = ["-m", "accelerate.commands.launch", "--cpu", "train.py", "--config", config]
    done = launch(*arguments, cwd=ROOT / "scripts")
    assert (done.returncode, done.stdout) == (0, f"model: {trained / 'model'}\n"), done.stderr


@pytest.mark.full
def test_training_on_two_processes_does_what_one_process_does(trained, trained_on_two_processes):
    for name in ("backbone/model.safetensors", "model/diffusion_pytorch_model.safetensors"):
        two, one = load_file(trained_on_two_processes / name), load_file(trained / name)
        assert two.keys() == one.keys()
        for key, values in one.items():
            np.testing.assert_allclose(two[key], values, atol=2e-5, err_msg=key)


@pytest.mark.full
def test_sample_evaluate_and_report(trained, call_cli, slides, tmp_path):
    code, out, _ = call_cli("sample", trained, "--draws", "4", "--steps", "3", "--seed", "7")
    path = trained / "samples" / "sim2.h5ad"
    assert (code, out) == (0, f"draws: {path}\n")
    about = read_draws(path).uns["hinge"]
    assert (about["draws"], about["steps"], about["seed"]) == (4, 3, 7)

    code, out, _ = call_cli("evaluate", trained)
    assert code == 0
    assert f"scores: {trained / 'scores.json'}" in out
    methods = [row["method"] for row in json.loads((trained / "scores.json").read_text())["rows"]]
    assert methods[0] == "hinge" and "ridge-cv" in methods
    assert all(f" {method} " in out for method in methods)
    assert max(map(len, out.splitlines())) > 120  # a pipe gets the table in its full width

    code, out, _ = call_cli("report", trained)
    assert (code, out) == (0, f"report: {trained / 'report.html'}\n")
    assert "ridge-cv" in (trained / "report.html").read_text()


def test_sample_takes_slides_of_the_data_set_and_other_files(trained, call_cli, slides, tmp_path):
    other = tmp_path / "other.h5ad"
    other.write_bytes((slides / "sim1.h5ad").read_bytes())
    (tmp_path / "other.jpg").write_bytes((slides / "sim1.jpg").read_bytes())
    slide = ad.read_h5ad(other)
    del slide.uns["hinge"]["image_path"]
    slide.write_h5ad(other)
    code, out, err = call_cli("sample", trained, "--slide", "sim1", "--slide", other, "--draws", "2")
    samples = trained / "samples"
    assert (code, out) == (0, f"draws: {samples / 'sim1.h5ad'}\ndraws: {samples / 'other.h5ad'}\n"), err
    assert read_draws(samples / "other.h5ad").uns["hinge"]["image_path"] == str(tmp_path / "other.jpg")


@pytest.mark.full
def test_run_does_all_stages_and_skips_finished_ones(trained, config, call_cli):
    model = trained / "model" / "diffusion_pytorch_model.safetensors"
    before = model.stat().st_mtime_ns
    code, out, _ = call_cli("run", "--config", config, "sampling.draws=2")
    assert code == 0
    assert out.endswith(f"scores: {trained / 'scores.json'}\nreport: {trained / 'report.html'}\n")
    assert read_draws(trained / "samples" / "sim2.h5ad").uns["hinge"]["draws"] == 2
    assert model.stat().st_mtime_ns == before


# --- mistakes ----------------------------------------------------------------------------------------


def negative_count(slide):
    slide.X[3, 7] = -1


def fractional_count(slide):
    slide.X[3, 7] = 0.5


def missing_count(slide):
    slide.X[3, 7] = np.nan


def missing_coordinate(slide):
    slide.obsm["spatial"][4, 1] = np.nan


def outside_the_image(slide):
    slide.obsm["spatial"][4:14] = 10_000


def repeated_barcode(slide):
    slide.obs_names = ["0x0", *slide.obs_names[:-1]]


def repeated_gene(slide):
    slide.var_names = ["GENE1", *slide.var_names[1:]]


def no_coordinates(slide):
    del slide.obsm["spatial"]


BAD_SLIDES = {
    negative_count: "spot 3x0, gene GENE7: count -1 is below 0",
    fractional_count: "none of them holds whole numbers only",
    missing_count: "spot 3x0, gene GENE7: count nan is not a finite number",
    missing_coordinate: "spot 4x0: its coordinates are not finite numbers",
    outside_the_image: "10 of 30 spots lie outside the image",
    repeated_barcode: "has barcode 0x0 more than once",
    repeated_gene: "has gene GENE1 more than once",
    no_coordinates: "needs pixel x and y of each spot",
}


def test_a_mistake_leaves_no_folders(fails, config, slides, write_slide, tmp_path):
    bad = write_slide("bad", edit=negative_count)
    out = tmp_path / "new"
    settings = [f"output={out / 'parent' / 'run'}"]
    fails("train", "-c", config, *settings, f"data={{path: {bad}, train: [bad]}}", says="count -1")
    fails("train", "-c", config, *settings, "data.test=[sim9]", says="no sample 'sim9'")
    fails("features", bad, "--output", out / "parent" / "features", says="count -1")
    fails("panel", slides, "--genes", "41", "--output", out / "parent" / "panel.json", says="a panel of 41 genes")
    assert not out.exists()


@pytest.mark.parametrize("edit", BAD_SLIDES, ids=lambda edit: edit.__name__)
def test_damaged_slides(fails, trained, config, write_slide, tmp_path, edit):
    path = write_slide("bad", edit=edit)
    write_slide("good", seed=1)
    says = BAD_SLIDES[edit]
    fails("features", path, "--output", tmp_path / "out", says=says)
    fails("sample", trained, "--slide", path, "--output", tmp_path / "out.h5ad", says=says)
    data = f"data={{path: {path.parent}, train: [good, bad], pretrain: []}}"
    fails("train", "-c", config, f"output={tmp_path / 'run'}", data, f"backbone.path={trained}", says=says)
    if edit is not outside_the_image:  # nothing is wrong with the counts
        fails("panel", path, "--genes", "5", "--output", tmp_path / "out.json", says=says)
        fails("pretrain-expression", path, "--output", tmp_path / "backbone", says=says)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_damaged_files(fails, trained, tiny_slide, tmp_path):
    image = tiny_slide.with_suffix(".png")
    whole = image.read_bytes()
    truncated(image)
    for says in ("is damaged or not an image", "is damaged or not an image", "has no image"):
        fails("features", tiny_slide, "--output", tmp_path / "out", says=says)
        fails("sample", trained, "--slide", tiny_slide, "--output", tmp_path / "out.h5ad", says=says)
        if not image.exists():
            break
        image.write_bytes(b"") if image.stat().st_size else image.unlink()
    image.write_bytes(whole)
    truncated(tiny_slide)
    fails("features", tiny_slide, "--output", tmp_path / "out", says="not a readable h5ad file")
    fails("panel", tiny_slide, "--output", tmp_path / "out.json", says="not a readable h5ad file")


def test_an_image_that_breaks_off_while_patches_are_read(fails, call_cli, tiny_slide, tmp_path, monkeypatch):
    import hinge.data.patches as patches
    from hinge.utils.errors import DataError

    read, calls = patches.SlideImage.read_region, []

    def breaks_off(*arguments):
        calls.append(1)
        if len(calls) > 20:
            raise DataError("scan.png is damaged")
        return read(*arguments)

    monkeypatch.setattr(patches.SlideImage, "read_region", breaks_off)
    fails("features", tiny_slide, "--batch-size", "8", "--output", tmp_path / "out", says="scan.png is damaged")
    assert len(calls) > 20


def test_features_of_another_encoder(fails, call_cli, trained, tiny_slide, slides, tmp_path):
    assert call_cli("features", tiny_slide, *PLAIN, "--output", tmp_path)[0] == 0
    with h5py.File(tmp_path / "tiny.stain-texture.h5", "a") as file:
        file.attrs["digest"] = "0" * 64
    fails("features", tiny_slide, *PLAIN, "--output", tmp_path, says="was made by another encoder")
    fails("features", tiny_slide, *PLAIN, "--output", tmp_path, "--views", "8", says="was made by another encoder")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["features", "{tmp}/none", "-o", "{tmp}/out"], "there is no file or folder {tmp}/none"),
        (["features", "{tmp}", "-o", "{tmp}/out"], "holds no slides in a known format"),
        (["features", "{slides}", "--sample", "sim9", "-o", "{tmp}/out"], "no sample 'sim9'"),
        (["features", "{slides}", "--sample", "sim10", "-o", "{tmp}/out"], "has no image"),
        (["features", "{slides}", "--encoder", "nonsense", "-o", "{tmp}/out"], "no encoder 'nonsense'"),
        (["features", "{slides}", "--encoder", "uni@{tmp}/none.pth", "-o", "{tmp}/out"], "there is no file"),
        (
            ["features", "{slides}", "--sample", "sim0", "--views", "3", "-o", "{tmp}/out"],
            "1 or 8 views, not 3",
        ),
        (
            ["features", "{slides}", "--sample", "sim0", "--patch-um", "-1", "-o", "{tmp}/out"],
            "a side above 0",
        ),
        (
            ["features", "{slides}", "--sample", "sim0", "--um-per-px", "0", "-o", "{tmp}/out"],
            "--um-per-px takes",
        ),
        (["features", "{slides}", "--image", "{tmp}/x.png", "-o", "{tmp}/out"], "image of one slide"),
        (["features", "{slides}", "--sample", "sim0", "-o", "{config}/out"], "cannot write"),
        (["panel", "{tmp}/none", "-o", "{tmp}/out.json"], "there is no file or folder {tmp}/none"),
        (["panel", "{slides}", "--sample", "sim9", "-o", "{tmp}/out.json"], "no sample 'sim9'"),
        (["panel", "{slides}", "--genes", "41", "-o", "{tmp}/out.json"], "a panel of 41 genes"),
        (["panel", "{slides}", "--genes", "0", "-o", "{tmp}/out.json"], "at least one gene"),
        (["panel", "{slides}", "--method", "best", "-o", "{tmp}/out.json"], "no panel method 'best'"),
        (["panel", "{slides}", "--genes", "5", "-o", "{tmp}"], "{tmp}"),
        (["panel", "{slides}", "--list", "{tmp}/none.txt", "-o", "{tmp}/out.json"], "no file {tmp}/none.txt"),
        (
            ["panel", "{slides}", "--list", "{genes}", "-o", "{tmp}/out.json"],
            "lacks 1 of the panel's 2 genes: ERBB2",
        ),
        (["pretrain-expression", "{tmp}/none", "-o", "{tmp}/out"], "there is no file or folder"),
        (
            ["pretrain-expression", "{slides}", "--sample", "sim0", "--sample", "x", "-o", "{tmp}/out"],
            "no sample x",
        ),
        (["pretrain-expression", "{slides}", "--panel", "{genes}", "-o", "{tmp}/out"], "ERBB2"),
        (
            ["pretrain-expression", "{slides}", "--transform", "sqrt", "-o", "{tmp}/out"],
            "no transform 'sqrt'",
        ),
        (["pretrain-expression", "{slides}", "--num-attention-heads", "3", "-o", "{tmp}/out"], "multiple of"),
        (
            ["pretrain-expression", "{slides}", "--num-attention-heads", "0", "-o", "{tmp}/out"],
            "num_attention_heads",
        ),
        (["pretrain-expression", "{slides}", "--steps", "0", "-o", "{tmp}/out"], "pretrain.steps"),
        (["pretrain-expression", "{slides}", "--precision", "int8", "-o", "{tmp}/out"], "pretrain.precision"),
        (["train", "--config", "{tmp}/none.yaml"], "there is no configuration file {tmp}/none.yaml"),
        (["train", "--config", "{tmp}"], "not readable"),
        (
            ["train", "--config", "{config}", "output={tmp}/run", "training.lr=1"],
            "training.lr: there is no such key",
        ),
        (["train", "--config", "{config}", "output={tmp}/run", "epochs"], "not an override"),
        (
            ["train", "--config", "{config}", "output={tmp}/run", "data.path={tmp}/x"],
            "no file or folder {tmp}/x",
        ),
        (["train", "--config", "{config}", "output={tmp}/run", "data.path={tmp}"], "holds no slides"),
        (["train", "--config", "{config}", "output={tmp}/run", "data.format=csv"], "no format 'csv'"),
        (
            ["train", "--config", "{config}", "output={tmp}/run", "data.test=[sim9]"],
            "no sample 'sim9' in {slides}, which has sim0, sim1, sim10, sim11, sim2",
        ),
        (["train", "--config", "{config}", "output={tmp}/run", "data.train=[sim9]"], "which has sim0, sim1, sim10"),
        (
            ["train", "--config", "{config}", "output={tmp}/run", "features.encoder=nonsense"],
            "no encoder 'nonsense'",
        ),
        (["train", "--config", "{config}", "seed=1"], "holds a run with another seed"),
        (["run", "--config", "{tmp}/none.yaml"], "there is no configuration file"),
        (["sample", "{tmp}/none"], "{tmp}/none is not the folder of a run: config.yaml is missing; hinge train"),
        (["sample", "{slides}"], "is not the folder of a run"),
        (["sample", "{trained}", "--slide", "sim9"], "no sample 'sim9'"),
        (["sample", "{trained}", "--slide", "{tmp}/none.h5ad"], "no sample '{tmp}/none.h5ad'"),
        (["sample", "{trained}", "--slide", "{genes}"], "holds no slides in a known format"),
        (["sample", "{trained}", "--slide", "sim1", "--slide", "sim2", "-o", "{tmp}/out.h5ad"], "one slide"),
        (["sample", "{trained}", "--steps", "51", "-o", "{tmp}/out.h5ad"], "51 steps cannot be taken"),
        (["sample", "{trained}", "--draws", "2", "-o", "{genes}"], "is not a readable h5ad file"),
        (["evaluate", "{tmp}"], "is not the folder of a run"),
        (["evaluate", "{trained}", "--slide", "sim0"], "no draws of sim0"),
        (["report", "{tmp}"], "is not the folder of a run"),
        (["demo", "--output", "{genes}"], "cannot write"),
    ],
)
def test_a_mistake_is_one_sentence(fails, trained, config, slides, tmp_path, arguments, says):
    genes = tmp_path / "genes.txt"
    genes.write_text("SIM001\nERBB2\n")
    names = {"tmp": tmp_path, "slides": slides, "config": config, "trained": trained, "genes": genes}
    # what lies in the run's own folder must stay as it is too
    before = left(trained)
    fails(*(argument.format(**names) for argument in arguments), says=says.format(**names))
    assert left(trained) == before


@pytest.mark.full
def test_a_mistake_in_a_process_of_its_own(trained, tmp_path):
    """Nothing that libraries say on import or while they load weights comes between."""
    output = tmp_path / "notes.txt"
    output.write_text("not mine to replace")
    done = launch("-m", "hinge.cli", "sample", trained, "--output", output)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"hinge: {output} is not a readable h5ad file") and done.stderr.count("\n") == 1
    assert output.read_text() == "not mine to replace"
