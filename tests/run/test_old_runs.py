"""Runs made by version 0.1: they open, sample and evaluate.

The draws were recorded with that version. It drew those of `run-log2` in random order, because the order that its
configuration names was removed.
"""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from hinge.config import RunConfig, check_config
from hinge.data.draws import read_draws
from hinge.run.run import Run
from hinge.utils.errors import ConfigError
from hinge.utils.former_settings import REMOVED, RENAMED

DATA = Path(__file__).parent / "data" / "version_0_1"


@pytest.fixture(params=["run", pytest.param("run-log2", marks=pytest.mark.full)])
def old(request, tmp_path) -> Path:
    """The folder of a run in a place of its own, with the slides beside it."""
    shutil.copytree(DATA / "slides", tmp_path / "slides")
    folder = Path(shutil.copytree(DATA / request.param, tmp_path / request.param))
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("{folder}", str(tmp_path)))
    return folder


def test_an_old_run_opens_samples_and_evaluates(old):
    with pytest.warns(DeprecationWarning) as caught:
        run = Run.open(old)
    said = str(caught[0].message)
    for part in (
        "model.gene_path is now model.gene_factors",
        "training.closed_form_start is now training.initialisation",
        "sampling.coherent is now sampling.spatially_correlated",
        "sampling.corrections is now sampling.remasking",
        "features.neighbours is now features.neighbourhood",
        "sampling.order",
    ):
        assert part in said
    recorded = np.load(old / "draws.npz")
    drawn = read_draws(run.sample("sim2"))
    draws = np.stack([drawn.layers[f"draw_{number:03d}"] for number in range(3)])
    np.testing.assert_allclose(draws, recorded["draws"], atol=1e-4)
    np.testing.assert_allclose(drawn.layers["expected"], recorded["expected"], atol=1e-4)

    before = {row["method"]: row for row in json.loads((old / "scores.json").read_text())["rows"]}
    after = {row["method"]: row for row in json.loads(run.evaluate().read_text())["rows"]}
    for method in ("mean", "oracle", "noise-ceiling"):
        for key in ("pcc_mean", "mse"):
            if key in before[method]:
                close = 5e-3 if method == "oracle" else 1e-4
                if method == "oracle" and old.name == "run-log2":
                    # its mean was that of draws and is exact now: better, by at most 2 %
                    gain = (after[method][key] / before[method][key] - 1) * (1 if key == "pcc_mean" else -1)
                    assert 0 < gain < 2e-2, (key, gain)
                    continue
                assert after[method][key] == pytest.approx(before[method][key], rel=close), (method, key)
    if old.name == "run":
        assert after["hinge"]["mse"] == pytest.approx(before["hinge"]["mse"], rel=1e-4)


def content(**sections) -> dict:
    return {"output": "o", "data": {"path": "d", "train": ["a"]}, **sections}


def test_settings_of_today_give_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_config(content(model={"gene_factors": False}), "run.yaml")


def test_an_old_name_and_a_new_one_exclude_each_other():
    with pytest.raises(ConfigError, match=r"model\.gene_path is now gene_factors"):
        check_config(content(model={"gene_path": True, "gene_factors": False}), "run.yaml")


@pytest.mark.parametrize(
    "section, key, ignored, refused",
    [
        ("sampling", "order", "random", "confidence"),
        ("training", "weight_decay", 0.0, 0.1),
        ("model", "drop_masked", True, False),
        ("model", "library_size", None, True),
        ("model", "standardise_features", True, False),
        ("backbone", "lora_rank", 4, {"tuning": "lora", "lora_rank": 4}),
        ("backbone", "num_value_bins", 64, 32),
    ],
)
def test_removed_settings(section, key, ignored, refused):
    with pytest.warns(DeprecationWarning, match=rf"{section}\.{key} is ignored"):
        check_config(content(**{section: {key: ignored}}), "run.yaml")
    with pytest.raises(ConfigError, match=rf"{section}\.{key} was removed"):
        check_config(content(**{section: refused if isinstance(refused, dict) else {key: refused}}), "run.yaml")


def test_former_keys_are_not_those_of_today():
    def exists(key: str) -> bool:
        model = RunConfig
        for part in key.split(".")[:-1]:
            model = model.model_fields[part].annotation
        return key.rpartition(".")[2] in model.model_fields

    assert [key for key in (*RENAMED, *REMOVED) if exists(key)] == []


def test_removed_settings_that_change_no_result():
    sections = {"features": {"batch_size": 8}, "sampling": {"batch_size": 16}}
    sections["backbone"] = {"pretrain": {"checkpoint_every": 50}}
    with pytest.warns(DeprecationWarning, match=r"features\.batch_size is ignored"):
        check_config(content(**sections), "run.yaml")
