"""A whole run on slides that measured different genes."""

import json
import shutil

import anndata as ad
import numpy as np
import pytest
from helpers.runs import finish, tiny_settings

from hinge.config import check_config
from hinge.data.draws import read_draws
from hinge.run.run import Run

ONLY_IN_SIM0 = 3  # this gene


@pytest.fixture(scope="module")
def slides(tiny_slides, tmp_path_factory):
    """sim0 has all genes but one, sim1 lacks every third gene, and the test slide sim2 lacks another three."""
    folder = tmp_path_factory.mktemp("different") / "slides"
    shutil.copytree(tiny_slides, folder)
    for name, lacking in (("sim0", [1]), ("sim1", range(0, 40, 3)), ("sim2", [4, 5, 6])):
        slide = ad.read_h5ad(folder / f"{name}.h5ad")
        kept = np.setdiff1d(np.arange(40), list(lacking))
        slide.uns.pop("hinge_truth", None)
        slide[:, kept].copy().write_h5ad(folder / f"{name}.h5ad")
    return folder


@pytest.mark.full
@pytest.mark.parametrize("transform", ["log2p1", "log1p_cp10k"])
def test_all_genes_are_drawn_and_those_that_a_slide_has_are_scored(slides, tmp_path, transform):
    panel = {"method": "union", "genes": None}
    settings = tiny_settings(slides, tmp_path / "run", transform=transform, panel=panel)
    settings["evaluation"] = {"baselines": ["mean", "ridge-cv+residual", "knn", "flow-matching"], "bootstrap": 10}
    run = Run(check_config(settings, "config"))
    finish(run)
    genes = run.panel().genes
    assert len(genes) == 40
    only = ad.read_h5ad(slides / "sim10.h5ad").var_names[ONLY_IN_SIM0]
    assert only not in ad.read_h5ad(slides / "sim1.h5ad").var_names
    draws = read_draws(run.paths.samples("sim2"))
    assert list(draws.var_names) == genes and np.isfinite(draws.X).all()
    measured = run.slide("sim2")
    mean, own = draws[:, only].X.mean(), np.asarray(run.spots(["sim2"]).values[:, genes.index(only)]).mean()
    assert abs(mean - own) < max(1.5, 0.6 * own)
    scores = json.loads(run.paths.scores.read_text())
    assert {row["method"] for row in scores["rows"]} >= {"hinge", "mean", "ridge-cv+residual", "knn", "flow-matching"}
    for row in scores["rows"]:
        assert row["n_genes"] == 37 and (row["mse"] is None) == (row["method"] == "noise-ceiling")
    detail = next(each for each in scores["details"] if each["method"] == "hinge")
    assert only in detail["genes"] and set(detail["genes"]) == set(genes) & set(measured.var_names)
    assert run.log_likelihoods("sim2")["model"] < 0
