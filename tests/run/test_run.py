"""A whole run on simulated tissue: what its folder holds, what is skipped, what is refused."""

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
from helpers.runs import finish, tiny_settings
from safetensors.torch import load_file, save_file

from hinge.backbones import CellFMModel
from hinge.config import check_config
from hinge.data import list_samples, load_spots, read_slide, simulate_slides
from hinge.data.draws import read_draws
from hinge.data.layers import named_layers
from hinge.report import report_run
from hinge.run.run import Run
from hinge.utils import checksums
from hinge.utils.errors import ConfigError, DataError, WeightsError
from hinge.utils.resumable import ResumableArrays

EDGE, EMPTY = 5, 14  # spots of the test slide


def edit(path: Path, change) -> None:
    slide = ad.read_h5ad(path)
    change(slide)
    slide.write_h5ad(path)


def set_counts(rows, counts):
    def change(slide):
        dense = slide.X.toarray()
        dense[rows] = counts
        slide.X = type(slide.X)(dense)

    return change


def to_the_corner(slide) -> None:
    slide.obsm["spatial"][EDGE] = 0


@pytest.fixture(scope="module")
def slides(tmp_path_factory) -> Path:
    """Two training slides and a test slide with 36 spots and 40 genes, two slides of counts alone."""
    folder = tmp_path_factory.mktemp("tissue")
    simulate_slides(folder, n_slides=3, grid=(6, 6), n_genes=40, um_per_px=2.0)
    simulate_slides(folder, n_slides=2, grid=(6, 6), n_genes=40, um_per_px=2.0, first=10, with_image=False)
    edit(folder / "sim0.h5ad", set_counts([EMPTY], 0))
    edit(folder / "sim2.h5ad", set_counts([EMPTY], 0))
    edit(folder / "sim2.h5ad", to_the_corner)
    return folder


def make_run(*arguments, **changes) -> Run:
    return Run(check_config(tiny_settings(*arguments, **changes), "test"))


@pytest.fixture(scope="module")
def finished(slides, tmp_path_factory) -> Run:
    """A run through all stages."""
    run = make_run(slides, tmp_path_factory.mktemp("runs") / "tiny")
    finish(run)
    return run


@pytest.fixture
def copied(finished, tmp_path) -> Run:
    """The finished run in another folder, for tests that change it."""
    shutil.copytree(finished.folder, tmp_path / "copied")
    return Run.open(tmp_path / "copied")


def files(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def layers(path: Path) -> dict[str, np.ndarray]:
    draws = read_draws(path)
    return {"X": draws.X, **named_layers(draws)}


def same(one: Path, other: Path) -> bool:
    first, second = layers(one), layers(other)
    return first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)


# --- what a run leaves -------------------------------------------------------------------------------


def test_the_folder_holds_what_is_needed_to_understand_the_run(finished):
    assert set(files(finished.folder)) == {
        "checksums.json",
        "config.yaml",
        "environment.json",
        "panel.json",
        "split.json",
        "features/sim0.stain-texture.h5",
        "features/sim1.stain-texture.h5",
        "features/sim2.stain-texture.h5",
        "backbone/config.json",
        "backbone/model.safetensors",
        "backbone-training/log.jsonl",
        "backbone-training/masked_genes.json",
        "backbone-training/latest.safetensors",
        "backbone-training/best.safetensors",
        "training/log.jsonl",
        "training/latest.safetensors",
        "training/best.safetensors",
        "model_index.json",
        "model/config.json",
        "model/scheduler_config.json",
        "model/diffusion_pytorch_model.safetensors",
        "samples/sim2.h5ad",
        "baselines/sim2.npz",
        "scores/sim2.json",
        "scores.json",
        "report.html",
    }


def test_evaluating_again_fits_no_baseline(copied, caplog):
    before, scores = files(copied.folder), copied.paths.scores.read_bytes()
    caplog.set_level("INFO", logger="hinge")
    copied.evaluate()
    assert "fitting baselines" not in caplog.text
    kept = {"baselines/sim2.npz", "scores/sim2.json"}
    assert {name: files(copied.folder)[name] for name in kept} == {name: before[name] for name in kept}
    assert copied.paths.scores.read_bytes() == scores
    # draws of another number are compared with as many of the baselines
    copied.sample("sim2", draws=2)
    copied.evaluate()
    assert "fitting baselines: " in caplog.text
    assert {row["n_draws"] for row in json.loads(copied.paths.scores.read_text())["rows"]} == {0, 2}


def test_the_records_say_what_was_done(finished, slides):
    environment = json.loads((finished.folder / "environment.json").read_text())
    assert environment["packages"]["torch"] and environment["packages"]["hinge-histology"]
    split = json.loads((finished.folder / "split.json").read_text())
    assert (split["train"], split["test"]) == (["sim0", "sim1"], ["sim2"])
    held = [spot.split("/") for spot in split["validation_spots"]]
    assert 0 < len(held) < 36 and {slide for slide, _ in held} <= {"sim0", "sim1"}
    log = [json.loads(line) for line in (finished.folder / "training" / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [1, 2, 3, 4, 5, 6]
    assert Run.open(finished.folder).config == finished.config


def test_scores_have_every_method_and_leave_the_empty_spot_out(finished):
    rows = {row["method"]: row for row in json.loads(finished.paths.scores.read_text())["rows"]}
    assert {"hinge", "oracle", "mean", "ridge-hest", "ridge-cv", "ridge-cv+residual", "noise-ceiling"} <= set(rows)
    assert {row["n_spots"] for row in rows.values()} == {35}
    assert rows["hinge"]["n_draws"] == 3
    assert np.isfinite([rows["hinge"][key] for key in ("pcc_mean", "mse", "crps", "coexpression_r")]).all()
    assert "sim2" in finished.paths.report.read_text()


def test_draws_are_an_anndata_that_stands_on_its_own(finished, slides):
    path = finished.paths.samples("sim2")
    draws, slide = ad.read_h5ad(path), read_slide(slides, "sim2")
    panel = json.loads(finished.paths.panel.read_text())["genes"]
    assert list(draws.var_names) == panel and len(panel) == 20
    assert list(draws.obs_names) == list(slide.obs_names)
    names = ["draw_000", "draw_001", "draw_002"]
    assert set(named_layers(draws)) == {"std", "expected", *names}
    stacked = np.stack([draws.layers[name] for name in names])
    assert stacked.dtype == np.float32 and np.isfinite(stacked).all()
    assert not np.array_equal(stacked[0], stacked[1])
    np.testing.assert_allclose(draws.X, stacked.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(draws.layers["std"], stacked.std(axis=0), atol=1e-6)
    # the head's own mean has less noise than three draws, and the same expectation; draws differ in the slide's level
    apart = stacked.mean(axis=(1, 2)).std(ddof=1) / np.sqrt(3)
    assert abs((draws.layers["expected"] - draws.X).mean()) < 4 * stacked.std() / np.sqrt(stacked.size) + 5 * apart
    assert draws.varm["slide_level"].shape == (20, 4) and (draws.varm["slide_level"] >= 0).all()
    assert (draws.obs["novelty"] > 0).all()
    np.testing.assert_array_equal(draws.obsm["spatial"], slide.obsm["spatial"])

    about = draws.uns["hinge"]
    asked = {
        "name": "sim2",
        "transform": "log2p1",
        "seed": 0,
        "draws": 3,
        "steps": 4,
        "encoder": "stain-texture",
        "patient": "P0",
        "library_size": "patient",
        "bulk": "",
    }
    assert {key: about[key] for key in asked} == asked
    assert about["um_per_px"] == 2.0 and about["image_path"].endswith("sim2.jpg")
    pipeline = finished.pipeline()
    assert about["model_digest"] == pipeline.model.digest()
    assert about["backbone_digest"] == pipeline.model.backbone.digest()
    assert about["encoder_digest"] == finished.encoder.digest


def test_scanpy_can_plot_draws_on_the_tissue(finished):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import scanpy

    draws = ad.read_h5ad(finished.paths.samples("sim2"))
    scanpy.pl.spatial(draws, color=draws.var_names[0], layer="std", show=False)
    image = plt.gca().images[0].get_array()
    assert image.shape == draws.uns["spatial"]["sim2"]["images"]["hires"].shape
    plt.close("all")


def test_a_spot_at_the_edge_and_an_empty_one_are_drawn_too(finished, slides):
    slide = read_slide(slides, "sim2")
    assert slide.X[EMPTY].sum() == 0 and not slide.obsm["spatial"][EDGE].any()
    draws = read_draws(finished.paths.samples("sim2"))
    for spot in (EDGE, EMPTY):
        assert np.isfinite(draws.X[spot]).all() and draws.layers["std"][spot].max() > 0
    barcodes = load_spots(slide, finished.panel(), "log2p1").barcodes
    assert slide.obs_names[EMPTY] not in barcodes and slide.obs_names[EDGE] in barcodes


# --- what is the same, and what is not ---------------------------------------------------------------


def test_finished_stages_are_skipped(finished):
    before = files(finished.folder)
    again = Run.open(finished.folder)
    again.train()
    again.sample("sim2")
    assert files(finished.folder) == before


def test_scores_and_report_come_out_the_same_again(copied):
    before = copied.paths.scores.read_bytes()
    copied.paths.scores.unlink()
    copied.paths.report.unlink()
    finish(copied)
    assert copied.paths.scores.read_bytes() == before
    assert copied.paths.report.exists()


@pytest.mark.full
def test_training_from_the_start_gives_the_same_weights(finished, slides, tmp_path):
    other = make_run(slides, tmp_path / "again")
    other.train()
    for name in ("backbone/model.safetensors", "model/diffusion_pytorch_model.safetensors"):
        first, second = load_file(finished.folder / name), load_file(other.folder / name)
        assert first.keys() == second.keys()
        assert all(np.array_equal(first[key], second[key]) for key in first), name


def test_the_seed_alone_decides_the_draws(finished, tmp_path):
    first = finished.paths.samples("sim2")
    again = finished.sample("sim2", output=tmp_path / "again.h5ad", batch_size=7)
    other = finished.sample("sim2", output=tmp_path / "other.h5ad", seed=1)
    for key, values in layers(first).items():
        np.testing.assert_allclose(layers(again)[key], values, atol=1e-5)
    assert same(finished.sample("sim2", output=tmp_path / "third.h5ad"), first)
    assert not np.allclose(layers(other)["draw_000"], layers(first)["draw_000"], atol=0.1)


def test_draws_made_otherwise_are_replaced_and_other_slides_not_taken_for_the_same(copied, slides, tmp_path):
    path = copied.paths.samples("sim2")
    copied.sample("sim2", draws=2)
    assert read_draws(path).uns["hinge"]["draws"] == 2
    # another slide that happens to have the name
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    shutil.copy(slides / "sim2.jpg", folder)
    moved = ad.read_h5ad(slides / "sim2.h5ad")[::2].copy()
    moved.write_h5ad(folder / "sim2.h5ad")
    shutil.rmtree(copied.folder / "features")
    copied.sample(slide=read_slide(folder / "sim2.h5ad"), draws=2)
    assert read_draws(path).n_obs == 18


@pytest.mark.full
def test_sampling_goes_on_where_it_was_killed(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("hinge.diffusion.sampler.BATCHES_IN_A_PART", 1)
    whole = finished.sample("sim2", output=tmp_path / "whole.h5ad", batch_size=16)
    drawn, write = [], ResumableArrays.write

    def die_at_the_third(self, number, spots, *arrays):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(spots)
        write(self, number, spots, *arrays)

    monkeypatch.setattr(ResumableArrays, "write", die_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        finished.sample("sim2", output=tmp_path / "parts.h5ad", batch_size=16)
    assert not (tmp_path / "parts.h5ad").exists()

    def note(self, number, spots, *arrays):
        drawn.append(spots)
        write(self, number, spots, *arrays)

    monkeypatch.setattr(ResumableArrays, "write", note)
    parts = finished.sample("sim2", output=tmp_path / "parts.h5ad", batch_size=16)
    # every spot once, and the same file in the end
    assert sorted(index for spots in drawn for index in range(36)[spots]) == list(range(36))
    assert same(parts, whole)
    assert {path.name for path in tmp_path.iterdir()} == {"whole.h5ad", "parts.h5ad"}

    # with another batch size what is there counts too
    drawn.clear()
    monkeypatch.setattr(ResumableArrays, "write", die_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        finished.sample("sim2", output=tmp_path / "sizes.h5ad", batch_size=16)
    monkeypatch.setattr(ResumableArrays, "write", note)
    finished.sample("sim2", output=tmp_path / "sizes.h5ad", batch_size=7)
    assert sorted(index for spots in drawn for index in range(36)[spots]) == list(range(36))

    # what is there of other draws is not gone on with
    monkeypatch.setattr(ResumableArrays, "write", die_at_the_third)
    drawn.clear()
    with pytest.raises(KeyboardInterrupt):
        finished.sample("sim2", output=tmp_path / "parts2.h5ad", batch_size=16, seed=9)
    monkeypatch.setattr(ResumableArrays, "write", note)
    drawn.clear()
    again = finished.sample("sim2", output=tmp_path / "parts2.h5ad", batch_size=16)
    assert len(drawn) == len(list(range(0, 36, drawn[0].stop)))
    assert same(again, whole)


def test_a_slide_from_outside_the_data_set(copied, slides, tmp_path):
    slide = ad.read_h5ad(slides / "sim2.h5ad")
    # its own counts and genes do not matter: what is drawn is what the image says
    slide = slide[:, :3].copy()
    slide.write_h5ad(tmp_path / "external.h5ad")
    shutil.copy(slides / "sim2.jpg", tmp_path / "external.jpg")
    path = copied.sample(slide=read_slide(tmp_path / "external.h5ad"))
    assert path == copied.folder / "samples" / "external.h5ad"
    draws = read_draws(path)
    assert draws.shape == (36, 20) and draws.uns["hinge"]["name"] == "external"
    # the seed is mixed with the slide's name: other noise, the same expectation
    inside = read_draws(copied.paths.samples("sim2"))
    assert not np.array_equal(draws.layers["draw_000"], inside.layers["draw_000"])
    assert np.corrcoef(draws.layers["expected"].ravel(), inside.layers["expected"].ravel())[0, 1] > 0.9


def test_a_run_that_was_moved_still_opens(finished, tmp_path, monkeypatch):
    shutil.copytree(finished.folder, tmp_path / "moved")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    moved = Run.open("../moved")
    assert moved.folder == tmp_path / "moved"
    before = files(moved.folder)
    moved.train()
    assert files(moved.folder) == before
    assert same(moved.sample("sim2", output=tmp_path / "again.h5ad"), finished.paths.samples("sim2"))


@pytest.mark.full
def test_two_processes_draw_what_one_does(finished, tmp_path):
    output = tmp_path / "two.h5ad"
    # accelerate launch starts one process on a CPU, whatever its arguments
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "hinge.cli", "sample", str(finished.folder), "--slide", "sim2", "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"draws: {output}") == 2  # each process says so
    for key, values in layers(finished.paths.samples("sim2")).items():
        np.testing.assert_allclose(layers(output)[key], values, atol=1e-5)


# --- the panel ---------------------------------------------------------------------------------------


def panel_after(slides: Path, folder: Path, sample: str | None) -> list[str]:
    """The panel, where the counts of a sample were shuffled over genes beforehand."""
    shutil.copytree(slides, folder / "slides")
    if sample is not None:
        order = np.random.default_rng(0).permutation(40)
        edit(folder / "slides" / f"{sample}.h5ad", lambda slide: setattr(slide, "X", slide.X[:, order]))
    return make_run(folder / "slides", folder / "run").panel().genes


def test_the_panel_depends_on_training_slides_only(slides, finished, tmp_path):
    genes = finished.panel().genes
    assert finished.panel().slides == ["sim0", "sim1"]
    for sample in ("sim2", "sim10"):
        assert panel_after(slides, tmp_path / sample, sample) == genes
    # the same change to a training slide is seen
    assert panel_after(slides, tmp_path / "sim1", "sim1") != genes


# --- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"seed": 1}, "seed"),
        ({"transform": "log1p_cp10k"}, "transform"),
        ({"panel__genes": 10}, "panel.genes"),
        ({"training": {"epochs": None, "steps": 6, "batch_size": 8}}, "training.batch_size"),
        ({"backbone__pretrain": {"steps": 6, "batch_size": 8}}, "backbone.pretrain.batch_size"),
    ],
)
def test_a_folder_belongs_to_its_settings(finished, slides, change, key):
    before = files(finished.folder)
    with pytest.raises(ConfigError, match=rf"another {key};"):
        make_run(slides, finished.folder, **change).train()
    assert files(finished.folder) == before


def test_sampling_settings_may_change(finished, slides):
    before = files(finished.folder)
    make_run(slides, finished.folder, sampling={"draws": 9}).train()
    assert files(finished.folder) == before


def test_a_run_that_cannot_start_leaves_nothing(slides, finished, tmp_path):
    external = tmp_path / "features"
    shutil.copytree(finished.folder / "features", external)
    with h5py.File(external / "sim1.stain-texture.h5", "a") as file:
        file.attrs["digest"] = "0" * 64
    genes = tmp_path / "genes.txt"
    genes.write_text("SIM001\nMISSING1\n")
    for changes, message in (
        ({"data__train": ["sim0", "sim9"]}, "no sample 'sim9'"),
        ({"data__test": ["sim9"]}, "no sample 'sim9'"),
        ({"data__pretrain": ["sim9"]}, "no sample 'sim9'"),
        ({"panel__genes": 41}, "a panel of 41 genes"),
        ({"panel": {"method": "file", "file": str(genes)}}, "lacks 1 of the panel's 2 genes: MISSING1"),
        ({"panel": {"method": "file", "file": str(tmp_path / "none.txt")}}, "no file"),
        ({"features": {"encoder": "resnet-unknown"}}, "no encoder 'resnet-unknown'"),
        (
            {"features": {"folder": str(external), "encoder": "stain-texture"}},
            "sim1.stain-texture.h5 was made by another encoder",
        ),
        ({"backbone": {"path": str(tmp_path)}}, "holds no backbone"),
    ):
        run = make_run(slides, tmp_path / "run", **changes)
        with pytest.raises((ConfigError, DataError, WeightsError), match=message):
            run.train()
        left = set(files(run.folder)) if run.folder.exists() else set()
        # finished feature files serve the next try, all else would stand in its way
        assert left <= {"features/sim0.stain-texture.h5", "features/sim1.stain-texture.h5"}, message


def test_pretraining_needs_every_gene_of_the_panel_somewhere(slides, finished, tmp_path):
    folder = tmp_path / "slides"
    shutil.copytree(slides, folder)
    absent = finished.panel().genes[3]
    for name in ("sim10", "sim11"):
        slide = ad.read_h5ad(folder / f"{name}.h5ad")
        slide[:, slide.var_names != absent].copy().write_h5ad(folder / f"{name}.h5ad")
    run = make_run(
        folder, tmp_path / "run", features={"folder": str(finished.folder / "features"), "encoder": "stain-texture"}
    )
    with pytest.raises(DataError, match=f"1 genes of the panel are in none of the files.*{absent}"):
        run.train()
    assert not run.folder.exists()


def test_without_slides_to_pretrain_on_the_training_slides_serve(slides, tmp_path, caplog):
    run = make_run(slides, tmp_path / "run", data__pretrain=[])
    with caplog.at_level("INFO"):
        run.pretrain()
    assert "the expression model is pre-trained on the training slides" in caplog.text
    spots = sum(int((read_slide(slides, name)[:, run.panel().genes].X.sum(1) > 0).sum()) for name in ("sim0", "sim1"))
    assert len(run.pretraining_counts()) == spots
    assert (run.paths.backbone / "config.json").exists()


def test_features_of_another_encoder_are_refused(copied):
    path = copied.paths.features("sim2")
    with h5py.File(path, "a") as file:
        file.attrs["digest"] = "0" * 64
    checksums.accept(copied.folder)
    before = files(copied.folder)
    with pytest.raises(DataError, match=r"sim2\.stain-texture\.h5 was made by another encoder"):
        copied.sample("sim2", seed=5)
    assert files(copied.folder) == before


def replace_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["cls_token"] = weights["cls_token"] + 0.01
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def remove_a_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["cls_token"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: str):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def pickle_instead(folder: Path) -> None:
    import pickle

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(str(folder / "unpickled"))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace_weights, "not the backbone weights the model was trained on"),
        (remove_a_tensor, "cls_token"),
        (truncate, "cannot be read"),
        (pickle_instead, "cannot be read"),
        (shutil.rmtree, "config.json is missing"),
    ],
)
def test_another_backbone_is_refused(copied, change, message):
    change(copied.paths.backbone)
    checksums.accept(copied.folder)
    before = files(copied.folder)
    with pytest.raises(WeightsError, match=message):
        copied.sample("sim2", seed=5)
    assert files(copied.folder) == before
    assert not (copied.paths.backbone / "unpickled").exists()


def test_a_damaged_model_is_refused(copied):
    weights = copied.paths.model / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    checksums.accept(copied.folder)
    with pytest.raises(WeightsError, match="is damaged"):
        copied.sample("sim2", seed=5)


@pytest.mark.full
def test_a_backbone_from_elsewhere_serves_a_new_run(finished, slides, tmp_path):
    run = make_run(slides, tmp_path / "run", backbone={"path": str(finished.folder / "backbone")}, data__pretrain=[])
    run.train()
    assert not (run.folder / "backbone").exists()
    assert (
        run.pipeline().model.config.backbone_digest
        == CellFMModel.from_pretrained(finished.folder / "backbone").digest()
    )


def test_stages_say_which_one_comes_before(slides, tmp_path, finished):
    run = make_run(slides, tmp_path / "run")
    with pytest.raises(DataError, match="holds no trained model; run hinge train first"):
        run.sample("sim2")
    with pytest.raises(DataError, match=r"no draws of sim2 .* run hinge sample first"):
        run.evaluate()
    with pytest.raises(DataError, match=r"no scores in .* run hinge evaluate first"):
        report_run(run)
    assert not run.folder.exists()
    with pytest.raises(DataError, match="not the folder of a run"):
        Run.open(tmp_path)


def test_more_steps_than_timesteps_are_refused(finished):
    with pytest.raises(ConfigError, match=r"51 steps cannot be taken.*num_train_timesteps 50"):
        finished.sample("sim2", steps=51)


def test_pretraining_slides_have_no_image(slides):
    assert list_samples(slides) == ["sim0", "sim1", "sim10", "sim11", "sim2"]
    with pytest.raises(DataError, match="no image"):
        read_slide(slides, "sim10")
