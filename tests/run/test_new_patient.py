"""A slide of a patient never seen, on simulated tissue whose patients differ as those of HER2ST do."""

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from hinge.config import check_config
from hinge.data.readers import read_slide
from hinge.data.simulate import simulate_slides
from hinge.evaluation.metrics.calibration import coverage
from hinge.run.run import Run
from hinge.tasks.adapt import adapt_run
from hinge.utils.errors import DataError
from tests.helpers.commands import call_hinge

pytestmark = pytest.mark.full

PATIENTS = 7


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Run:
    """Trained on two slides of patient P0, with counts of P2 to P6; sim1 and sim8 are of P1."""
    folder = tmp_path_factory.mktemp("patients")
    tissue = {"grid": (10, 10), "n_genes": 80, "um_per_px": 2.0, "n_patients": PATIENTS}
    for first in (0, 1, 7, 8):
        simulate_slides(folder / "slides", n_slides=1, first=first, **tissue)
    pretrain = [f"sim{number}" for number in range(100, 114) if number % PATIENTS not in (0, 1)]
    for name in pretrain:
        simulate_slides(folder / "slides", n_slides=1, first=int(name[3:]), with_image=False, **tissue)
    config = {
        "output": str(folder / "run"),
        "data": {"path": str(folder / "slides"), "train": ["sim0", "sim7"], "test": ["sim1"], "pretrain": pretrain},
        "panel": {"genes": 40},
        "features": {"encoder": "stain-texture", "patch_um": 150.0},
        "backbone": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "pretrain": {"steps": 20}},
        "training": {"epochs": None, "steps": 20, "batch_size": 32},
        "sampling": {"draws": 20, "steps": 4},
    }
    run = Run(check_config(config, "test"))
    run.train()
    return run


def sampled(run, tmp_path, **options):
    """Draws (K, n, G), their mean and the measured values of sim1."""
    draws = ad.read_h5ad(run.sample("sim1", output=tmp_path / "draws.h5ad", **options))
    measured = run.spots(["sim1"]).values
    stacked = np.stack([draws.layers[f"draw_{number:03d}"] for number in range(20)])
    return stacked, draws.layers["expected"], measured, draws


def error(expected, measured) -> float:
    return float(((expected - measured) ** 2).mean())


def observed_spots(run, path, count: int):
    slide = read_slide(run.config.data.path, "sim1")
    rows = np.random.default_rng(0).choice(slide.n_obs, count, replace=False)
    measured = slide[rows].copy()
    measured.obs["total_counts"] = np.asarray(measured.X.sum(axis=1)).ravel()
    measured.write_h5ad(path)
    return path, rows


def test_intervals_cover_and_evidence_helps(trained, tmp_path):
    drawn, expected, measured, draws = sampled(trained, tmp_path)
    assert draws.uns["hinge"]["patient"] == "new"
    half, most = coverage(measured, drawn, (0.5, 0.9))
    assert 0.35 < half < 0.65 and 0.8 < most < 0.97
    alone = error(expected, measured)

    other = read_slide(trained.config.data.path, "sim8")
    bulk = pd.Series(np.asarray(other.X.sum(axis=0)).ravel(), other.var_names)
    drawn, expected, _, draws = sampled(trained, tmp_path, bulk=bulk, bulk_sd=0.2)
    assert error(expected, measured) < 0.7 * alone
    assert 0.8 < coverage(measured, drawn, (0.9,))[0] < 0.97
    assert draws.uns["hinge"]["bulk"] and draws.uns["hinge"]["bulk_sd"] == 0.2

    path, rows = observed_spots(trained, tmp_path / "spots.h5ad", 10)
    _, expected, _, _ = sampled(trained, tmp_path, observed=path)
    rest = np.setdiff1d(np.arange(len(measured)), rows)
    assert error(expected[rest], measured[rest]) < 0.7 * alone


def test_as_if_the_patient_were_known_the_intervals_do_not_cover(trained, tmp_path):
    """The variance between patients is what makes them cover."""
    covered = []
    for known in ({}, {"patient": "P0", "library_size": "training"}):
        _, _, measured, draws = sampled(trained, tmp_path, **known)
        low, high = np.quantile(draws.varm["slide_level"][:, 1:], [0.05, 0.95], axis=1)
        truth = measured.mean(axis=0)
        covered.append(((truth >= low) & (truth <= high)).mean())
    assert covered[0] > 0.75 and covered[1] < 0.6


def test_a_run_adapted_to_measured_spots_predicts_the_others_better(trained, tmp_path):
    path, rows = observed_spots(trained, tmp_path / "spots.h5ad", 20)
    _, before, measured, _ = sampled(trained, tmp_path)
    output = adapt_run(trained, "sim1", path, tmp_path / "adapted")
    adapted = Run.open(output)
    _, after, _, draws = sampled(adapted, tmp_path)
    assert draws.uns["hinge"]["patient"] == "P1"
    rest = np.setdiff1d(np.arange(len(measured)), rows)
    assert error(after[rest], measured[rest]) < 0.7 * error(before[rest], measured[rest])
    assert json.loads((output / "split.json").read_text())["patients"]["sim1"] == "P1"
    with pytest.raises(DataError, match="exists; give --output"):
        adapt_run(trained, "sim1", path, output)
    few, _ = observed_spots(trained, tmp_path / "few.h5ad", 3)
    with pytest.raises(DataError, match="adapting takes 5"):
        adapt_run(trained, "sim1", few, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_the_command_and_ridge_with_the_same_level(trained, tmp_path):
    result = call_hinge("sample", trained.folder, "--slide", "sim1", "--library-size", "many")
    assert result.code == 2 and "--library-size takes a number or one of" in result.err
    other = read_slide(trained.config.data.path, "sim8")
    bulk = pd.DataFrame({"count": np.asarray(other.X.sum(axis=0)).ravel()}, index=other.var_names)
    bulk.to_csv(tmp_path / "bulk.csv")
    output = tmp_path / "bulk.h5ad"
    given = ["--slide", "sim1", "--bulk", tmp_path / "bulk.csv", "--library-size", "2000", "--output", output]
    result = call_hinge("sample", trained.folder, *given)
    assert result.code == 0 and "patient new, mean library size 2,000, bulk profile" in result.err
    facts = ad.read_h5ad(output).uns["hinge"]
    assert facts["library_size"] == 2000 and facts["bulk_sd"] == 0.5
    path, _ = observed_spots(trained, tmp_path / "spots.h5ad", 10)
    given = ["--slide", "sim1", "--observed", path, "--output", tmp_path / "adapted"]
    result = call_hinge("adapt", trained.folder, *given)
    assert result.code == 0 and (tmp_path / "adapted" / "model").is_dir()
    assert call_hinge("check", tmp_path / "adapted").code == 0
    trained.sample("sim1")
    rows = json.loads(trained.evaluate().read_text())["rows"]
    of_method = {row["method"]: row for row in rows}
    assert of_method["hinge"]["patient"] == "new" and of_method["hinge"]["library_size"] > 0
    levelled = of_method["ridge-cv+residual+level"]
    assert levelled["mse_level"] == pytest.approx(of_method["hinge"]["mse_level"], rel=0.3)
    # ridge regression with the same level covers better than without, because the level's uncertainty is drawn
    missed = {name: abs(of_method[name]["coverage_90"] - 0.9) for name in ("ridge-cv+residual", levelled["method"])}
    assert missed[levelled["method"]] < missed["ridge-cv+residual"]
    parts = sum(of_method["hinge"][f"mse_{part}"] for part in ("level", "slope", "pattern"))
    assert parts == pytest.approx(of_method["hinge"]["mse"], rel=1e-6)
