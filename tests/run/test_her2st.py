"""The whole chain on real slides: does it run, and is what comes out roughly right?"""

import pytest
from helpers import ROOT
from helpers.runs import finish

from hinge.config import load_config
from hinge.run.run import Run
from hinge.utils.files import read_json

CONFIG = ROOT / "configs" / "her2st-quick.yaml"


@pytest.mark.full
@pytest.mark.real
def test_her2st_from_nothing_to_scores(her2st, tmp_path):
    """Sane, not best: a bound here is broken by a defect, not by bad luck."""
    overrides = [f"data.path={her2st}", f"output={tmp_path / 'run'}", f"features.folder={tmp_path / 'features'}"]
    run = Run(load_config(CONFIG, overrides))
    finish(run)

    # HER2-positive tumours: ERBB2 is what they are known for
    assert "ERBB2" in run.panel().genes
    rows = {row["method"]: row for row in read_json(run.paths.scores)["rows"]}
    assert set(rows) == {
        "hinge",
        "mean",
        "knn",
        "ridge-hest",
        "ridge-cv",
        "ridge-cv+residual",
        "ridge-cv+residual+level",
        "training-correlation",
        "noise-ceiling",
    }
    assert {(row["slide"], row["n_genes"]) for row in rows.values()} == {("C5", run.config.panel.genes)}
    model, ridge, ceiling = rows["hinge"], rows["ridge-cv"], rows["noise-ceiling"]
    assert ridge["pcc_mean"] > 0.3
    assert model["pcc_mean"] > 0.25
    assert max(model["pcc_mean"], ridge["pcc_mean"]) < ceiling["pcc_mean"]
    assert model["mse"] < rows["mean"]["mse"]
    assert model["crps"] < 1.25 * rows["ridge-cv+residual"]["crps"]
    assert 0.6 < model["coverage_90"] < 0.99
    # draws know that genes go together, which predictions of each gene by itself do not
    assert model["coexpression_r"] > 0.3
    assert run.paths.report.stat().st_size > 100_000
