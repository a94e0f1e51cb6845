"""Each script of examples/ runs and prints what it promises."""

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT

from hinge.data.draws import read_draws

EXAMPLES = ROOT / "examples"


def run(script: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / script, *map(str, arguments)], capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_example_is_tested():
    tested = Path(__file__).read_text()
    for script in EXAMPLES.glob("*.py"):
        assert f'run("{script.name}"' in tested, f"{script.name} has no test"


@pytest.mark.full
def test_train_and_sample(tmp_path):
    printed = run("train_and_sample.py", tmp_path)
    assert "64 spots, 20 genes" in printed and "ridge-cv+residual" in printed


@pytest.mark.full
def test_impute_from_panel(tiny_run, tiny_slides):
    lines = run("impute_from_panel.py", tiny_run.folder, tiny_slides, "sim2").splitlines()
    alone, imputed = (float(line.rsplit(" ", 1)[1]) for line in lines[-2:])
    assert 0 < imputed < alone * 1.2


@pytest.mark.full
def test_uncertainty(tiny_run):
    assert "correlation over spots" in run("uncertainty.py", tiny_run.samples_path("sim2"))


@pytest.mark.full
def test_napari_layers(tiny_run, monkeypatch):
    """The layers as arrays; napari itself is not needed."""
    path = tiny_run.samples_path("sim2")
    draws = read_draws(path)
    gene = draws.var_names[1]
    assert run("napari_layers.py", path, gene).splitlines()[0].startswith("image H&E: (")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    image, *points = importlib.import_module("napari_layers").layers(draws, gene)
    extent = np.array(image[0].shape[:2]) * image[1]["scale"]
    values = [draws.X, draws.layers["std"], draws.layers["draw_000"]]
    for (places, attributes, kind), expected in zip(points, values, strict=True):
        assert kind == "points" and (places > 0).all() and (places < extent).all()
        np.testing.assert_array_equal(attributes["features"]["value"], expected[:, 1])


@pytest.mark.full
def test_score_predictions(tiny_slides, tmp_path):
    assert "mine" in run("score_predictions.py", tiny_slides, "sim2", tmp_path)


@pytest.mark.full
def test_own_encoder(tiny_slides, tmp_path):
    assert "features:" in run("own_encoder.py", tiny_slides, "sim2", tmp_path)
    assert (tmp_path / "sim2.h5").exists()
