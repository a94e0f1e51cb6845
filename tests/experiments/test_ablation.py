"""Grids of runs: which cells there are, what they share, what is skipped, and what a failure leaves."""

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from helpers import ROOT

from hinge.config import check_config
from hinge.data import simulate_slides
from hinge.experiments.ablation import ablate, run_grid
from hinge.experiments.grid import load_grid, make_cells
from hinge.experiments.table import COLUMNS, markdown, summarise_cells
from hinge.run.preparation import Preparation
from hinge.run.run import Run
from hinge.utils.errors import ConfigError, HingeError, Interrupted

GRIDS = sorted((ROOT / "configs" / "ablations").glob("*.yaml"))


@pytest.fixture(scope="module")
def slides(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tissue")
    simulate_slides(folder, n_slides=3, grid=(5, 5), n_genes=30, um_per_px=2.0)
    simulate_slides(folder, n_slides=1, grid=(5, 5), n_genes=30, first=10, with_image=False)
    return folder


BASE = {
    "output": "never",
    "data": {"path": "", "train": ["sim0", "sim1"], "test": ["sim2"], "pretrain": ["sim10"]},
    "panel": {"genes": 12},
    "backbone": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "pretrain": {"steps": 3, "batch_size": 16},
    },
    "training": {"epochs": None, "steps": 2, "batch_size": 16, "validation_share": 0.0},
    "sampling": {"draws": 3, "steps": 2},
    "evaluation": {"baselines": ["mean"], "bootstrap": 0},
}


@pytest.fixture
def write_grid(slides, tmp_path):
    """Write base.yaml and grid.yaml; keyword arguments are the keys of the grid."""

    def write(**content) -> Path:
        base = BASE | {"data": BASE["data"] | {"path": str(slides)}}
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(base, sort_keys=False))
        path = tmp_path / "grid.yaml"
        path.write_text(yaml.safe_dump({"base": "base.yaml", **content}, sort_keys=False))
        return path

    return write


def stamps(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


# --- cells ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.name)
def test_shipped_grids_are_valid(path, tmp_path):
    grid = load_grid(path)
    cells = make_cells(grid, tmp_path)
    assert len(cells) >= 2 * len(grid.seeds)
    assert len({cell.config.output for cell in cells}) == len(cells)
    for cell in cells:
        assert set(cell.config.data.train).isdisjoint(cell.config.data.test)
        assert check_config(cell.config.model_dump(mode="json"), "again") == cell.config
    # every variant is another run than the first
    plain = [cell.config.model_dump(exclude={"output"}) for cell in cells]
    assert all(plain.count(content) == 1 for content in plain)


def test_hest_benchmark_holds_out_every_patient(hest, tmp_path, monkeypatch):
    """The folds that follow from HEST-1k's table of samples; the slides themselves are not here."""
    table = pd.read_csv(next(hest.glob("*.csv")), encoding="utf-8-sig").set_index("id")
    patients = (table["dataset_title"] + ": " + table["patient"]).fillna(pd.Series(table.index, table.index))
    monkeypatch.setattr(Preparation, "patient", lambda self, name: patients[name])
    cells = make_cells(load_grid(ROOT / "configs" / "hest" / "bench.yaml"), tmp_path)
    folds = Counter(cell.variant for cell in cells)
    wanted = {"IDC": 4, "PRAD": 2, "PAAD": 3, "SKCM": 2, "COAD": 2, "READ": 2, "CCRCC": 24, "LUNG": 2, "LYMPH_IDC": 4}
    assert folds == wanted
    for cell in cells:
        data = cell.config.data
        assert {patients[name] for name in data.train}.isdisjoint(patients[name] for name in data.test)
        assert cell.config.evaluation.baselines[0] == "ridge-hest" and cell.config.panel.genes == 50


def test_there_is_a_grid_for_every_table():
    names = {path.stem for path in GRIDS}
    assert {"weights", "objective", "conditioning", "encoder", "schedule", "cost", "simulated"} <= names


def test_cells_are_variants_times_slides_times_seeds(write_grid, tmp_path):
    path = write_grid(
        held_out=["sim0", ["sim1", "sim2"]],
        seeds=[3, 4],
        settings={"training.batch_size": 8},
        variants={"plain": {}, "wide": {"model.modulation_rank": 4, "training.batch_size": 4}},
    )
    cells = make_cells(load_grid(path), tmp_path / "out", ["sampling.draws=5"])
    assert [cell.name for cell in cells] == [
        f"{variant}/{held}/seed{seed}"
        for variant in ("plain", "wide")
        for held in ("sim0", "sim1+sim2")
        for seed in (3, 4)
    ]
    first, last = cells[0].config, cells[-1].config
    assert (first.data.train, first.data.test) == (["sim1", "sim2"], ["sim0"])
    assert (last.data.train, last.data.test) == (["sim0"], ["sim1", "sim2"])
    assert (first.seed, first.sampling.seed, last.seed) == (3, 3, 4)
    assert (first.training.batch_size, last.training.batch_size) == (8, 4)
    assert (first.model.modulation_rank, last.model.modulation_rank) == (None, 4)
    assert {cell.config.sampling.draws for cell in cells} == {5}
    assert first.output == tmp_path / "out" / "plain" / "sim0" / "seed3"
    # methods beside the model are scored once
    assert (first.evaluation.baselines, last.evaluation.baselines) == (["mean"], [])


def test_what_is_shared_and_what_is_not(write_grid, tmp_path):
    variants = {
        "plain": {},
        "random": {"backbone.weights": "random"},
        "lora": {"backbone.tuning": "lora"},
        "wide": {"backbone.hidden_size": 32},
        "log1p": {"transform": "log1p_cp10k"},
        "large": {"features.patch_um": 300},
    }
    cells = make_cells(load_grid(write_grid(variants=variants, seeds=[5, 6])), tmp_path)
    of = {(cell.variant, cell.seed): cell for cell in cells}
    backbone = {key: cell.config.backbone.path for key, cell in of.items()}
    assert backbone["plain", 5] == backbone["plain", 6] == backbone["random", 5] == backbone["lora", 6]
    assert len({backbone[name, 5] for name in ("plain", "wide", "log1p")}) == 3
    assert of["plain", 6].foundation.seed == 5
    assert of["plain", 5].config.panel.file.parent == backbone["plain", 5].parent
    folders = {name: of[name, 5].config.features.folder for name in variants}
    assert folders["plain"] == folders["lora"] == tmp_path / "features" != folders["large"]
    # a seed more does not make another backbone, other training slides do
    held = make_cells(load_grid(write_grid(variants={"plain": {}}, held_out=["sim0", "sim1"], seeds=[5])), tmp_path)
    assert len({cell.config.backbone.path for cell in held} | {backbone["plain", 5]}) == 3


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"variants": {}}, "variants: it takes at least one item"),
        ({"variants": {"a": {}}, "seeds": []}, "seeds: it takes at least one item"),
        ({"variants": {"a/b": {}}}, "cannot be the name of a folder"),
        ({"variants": {"a": {}}, "helt_out": ["sim0"]}, "helt_out: there is no such key; it takes the keys base"),
        ({"variants": {"a": {}}, "seeds": [-1]}, "seeds.0"),
        ({}, "variants: is missing"),
    ],
)
def test_a_wrong_grid_is_one_sentence(write_grid, content, says):
    with pytest.raises(ConfigError) as raised:
        load_grid(write_grid(**content))
    assert says in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"variants": {"a": {}, "b": {"model.heads": 1}}}, "variant b of .*model.heads: there is no such key"),
        ({"variants": {"a": {}}, "held_out": ["sim7"]}, "held_out names sim7"),
        ({"variants": {"a": {}}, "seeds": [1, 1]}, "the grid holds a/sim2/seed1 more than once"),
        ({"variants": {"a": {}}, "settings": {"data.test": []}}, "no test slides; give held_out"),
    ],
)
def test_a_wrong_setting_is_reported_before_anything_runs(write_grid, tmp_path, content, says):
    grid = load_grid(write_grid(**content))
    with pytest.raises(ConfigError, match=says):
        run_grid(grid, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- runs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(slides, tmp_path_factory):
    """A grid through all stages: its file, its folder and its tables."""
    folder = tmp_path_factory.mktemp("grid")
    base = BASE | {"data": BASE["data"] | {"path": str(slides)}}
    (folder / "base.yaml").write_text(yaml.safe_dump(base, sort_keys=False))
    content = {
        "base": "base.yaml",
        "seeds": [0, 1],
        "variants": {
            "plain": {},
            "more draws": {"sampling.draws": 5},
            "random": {"backbone.weights": "random", "backbone.tuning": "full"},
        },
    }
    (folder / "grid.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "grid.yaml", folder / "out", ablate(load_grid(folder / "grid.yaml"), folder / "out")


@pytest.mark.full
def test_the_table_has_every_variant_with_scores_and_costs(finished):
    _, out, tables = finished
    assert tables.failures == [] and tables.csv == out / "table.csv"
    rows = list(csv.DictReader(tables.csv.open()))
    own = {row["variant"]: row for row in rows if row["method"] == "hinge"}
    assert list(own) == ["plain", "more draws", "random"]
    assert [row["method"] for row in rows if row["variant"] == "plain"] == ["hinge", "oracle", "mean", "noise-ceiling"]
    assert "mean" not in [row["method"] for row in rows if row["variant"] == "random"]
    needed = ("pcc_mean", "mse", "crps", "energy", "variogram", "coexpression_r_pooled", "likelihood_share")
    for row in own.values():
        assert row["n"] == "2"
        for key in (*needed, "seconds_training", "seconds_sampling", "trainable"):
            assert np.isfinite(float(row[f"{key}_mean"])) and row[f"{key}_sd"] != "", key
    cells = [json.loads((out / "plain" / "sim2" / f"seed{seed}" / "cell.json").read_text()) for seed in (0, 1)]
    crps = [cell["rows"][0]["crps"] for cell in cells]
    assert float(own["plain"]["crps_mean"]) == pytest.approx(np.mean(crps), rel=1e-5)
    assert float(own["plain"]["crps_sd"]) == pytest.approx(np.std(crps, ddof=1), rel=1e-4)
    assert float(own["random"]["trainable_mean"]) > float(own["plain"]["trainable_mean"])
    text = tables.markdown.read_text()
    assert text.count("\n") == 2 + len(rows) and "| plain | hinge |" in text and "co-expr. r" in text


@pytest.mark.full
def test_shared_parts_are_made_once(finished):
    _, out, _ = finished
    assert len(list((out / "shared").iterdir())) == 1
    assert len(list((out / "features").iterdir())) == 3
    model = "sim2/seed0/model/diffusion_pytorch_model.safetensors"
    weights = {name: (out / name / model).read_bytes() for name in ("plain", "more draws", "random")}
    assert weights["plain"] == weights["more draws"] != weights["random"]
    assert not (out / "plain" / "sim2" / "seed0" / "backbone").exists()
    digests = {
        name: Run.open(out / name / "sim2" / f"seed{seed}").pipeline().model.config.backbone_digest
        for name, seed in (("plain", 0), ("more draws", 1), ("random", 0))
    }
    assert digests["plain"] == digests["more draws"] != digests["random"]
    # the run that lent its model is what it would be alone
    assert Run.open(out / "more draws" / "sim2" / "seed0").config.sampling.draws == 5


@pytest.mark.full
def test_a_finished_grid_does_nothing_and_a_missing_cell_is_made_again(finished):
    path, out, tables = finished
    before, text = stamps(out), tables.csv.read_text()
    assert ablate(load_grid(path), out).failures == []
    changed = {name for name, stamp in stamps(out).items() if before.get(name) != stamp}
    assert changed == {str(tables.csv), str(tables.markdown)} and tables.csv.read_text() == text
    victim = out / "plain" / "sim2" / "seed1"
    kept = (victim / "cell.json").read_bytes()
    (victim / "cell.json").unlink()
    ablate(load_grid(path), out)
    assert (victim / "cell.json").read_bytes() == kept


@pytest.mark.full
def test_another_setting_of_sampling_is_scored_anew(finished):
    path, out, _ = finished
    seeds = {"seeds": [0], "variants": {"plain": {"sampling.draws": 4}}}
    rows, failures = run_grid(load_grid(path).model_copy(update=seeds), out)
    assert failures == []
    assert {row["n_draws"] for row in rows if row["method"] == "hinge"} == {4}


@pytest.mark.full
def test_a_failing_cell_does_not_stop_the_others(write_grid, tmp_path):
    variants = {
        "bad": {"backbone.path": str(tmp_path / "none")},
        "worse": {"features.encoder": "no_such_encoder"},
        "good": {},
    }
    tables = ablate(load_grid(write_grid(variants=variants)), tmp_path / "out")
    assert [failure.name for failure in tables.failures] == ["bad/sim2/seed0", "worse/sim2/seed0"]
    assert "no_such_encoder" in tables.failures[1].message
    assert (tmp_path / "out" / "bad" / "sim2" / "seed0" / "error.txt").read_text().count("Traceback") == 1
    rows = list(csv.DictReader(tables.csv.open()))
    assert {row["variant"] for row in rows} == {"good"}


@pytest.mark.full
def test_a_backbone_that_cannot_be_made_names_the_cells(write_grid, tmp_path):
    path = write_grid(variants={"a": {}, "b": {"data.pretrain": ["nobody"]}})
    rows, failures = run_grid(load_grid(path), tmp_path / "out")
    assert [failure.name for failure in failures] == ["b/sim2/seed0"]
    assert failures[0].message.startswith("no backbone: ") and "nobody" in failures[0].message
    assert {row["variant"] for row in rows} == {"a"}


def test_an_interruption_stops_all_cells(write_grid, tmp_path, monkeypatch):
    calls = []

    def train(self):
        calls.append(self.folder)
        raise Interrupted("stopped at step 3 of 10; the same command continues from there")

    monkeypatch.setattr(Run, "train", train)
    with pytest.raises(HingeError, match="stopped at step 3"):
        run_grid(load_grid(write_grid(variants={"a": {}, "b": {"seed": 1}})), tmp_path / "out")
    assert len(calls) == 1


@pytest.mark.full
def test_tissue_is_simulated_for_a_grid(write_grid, tmp_path):
    simulate = {"slides": 3, "pretrain": 1, "grid": [4, 4], "pretrain_grid": [4, 4], "genes": 20}
    path = write_grid(variants={"a": {}}, simulate=simulate)
    rows, failures = run_grid(load_grid(path), tmp_path / "out")
    assert failures == []
    assert {row["slide"] for row in rows} == {"sim2"} and "oracle" in {row["method"] for row in rows}
    assert (tmp_path / "out" / "slides" / "sim100.h5ad").exists()
    simulate["genes"] = 25
    with pytest.raises(ConfigError, match="other simulated tissue"):
        run_grid(load_grid(write_grid(variants={"a": {}}, simulate=simulate)), tmp_path / "out")


# --- the table -----------------------------------------------------------------------------------


def test_spread_over_seeds_and_over_slides():
    rows = [
        {"variant": "a", "method": "hinge", "transform": "log2p1", "slide": slide, "seed": seed, "crps": value}
        for (slide, seed), value in {("x", 0): 1.0, ("x", 1): 2.0, ("y", 0): 5.0, ("y", 1): 8.0}.items()
    ]
    rows.append({"variant": "b", "method": "hinge", "transform": "log2p1", "slide": "x", "seed": 0, "mse": 1.0})
    first, second = summarise_cells(rows)
    assert (first["n"], first["mean"]["crps"]) == (4, 4.0)
    assert first["sd"]["crps"] == pytest.approx(np.std([1, 2, 5, 8], ddof=1))
    assert first["sd_seeds"]["crps"] == pytest.approx(np.std([3, 5], ddof=1))
    assert first["sd_slides"]["crps"] == pytest.approx(np.std([1.5, 6.5], ddof=1))
    assert second["sd"] == second["sd_seeds"] == {}
    lines = markdown([first, second]).splitlines()
    assert lines[0] == "| variant | method | MSE | CRPS |"
    assert lines[2:] == ["| a | hinge |  | 4.000 ± 3.162 |", "| b | hinge | 1.000 |  |"]
    assert markdown([first], "sd_seeds", with_variant=False).splitlines()[2] == "| hinge | 4.000 ± 1.414 |"
    assert set(COLUMNS) >= {"pcc_50", "seconds_training", "trainable"}
