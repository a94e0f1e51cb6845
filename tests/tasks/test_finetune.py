"""Encoder and head trained end to end: folds, what comes back from disk, published weights as a start."""

import json
import shutil
from dataclasses import replace

import anndata
import numpy as np
import pytest
import safetensors
import torch
from helpers.commands import call_hinge

from hinge.data import Panel, load_spots, read_slide, simulate_slides
from hinge.encoders import RECIPES, load_encoder, registry
from hinge.evaluation.predictions import PredictionFiles, read_prediction
from hinge.tasks.finetune import finetune_config, finetune_encoder
from hinge.tasks.folds import make_folds, slide_groups
from hinge.tasks.regressor import load_regressor, predict_slide
from hinge.utils.errors import ConfigError, DataError
from hinge.utils.files import read_json

ENCODER = "random:test_vit"


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tissue")
    simulate_slides(folder, n_slides=3, grid=(6, 6), n_genes=30, um_per_px=2.0)
    return folder


def finetune(slides, output, encoder=ENCODER, hold_out=("sim2",), **settings):
    config = finetune_config(**{"epochs": 1, "batch_size": 24, **settings})
    return finetune_encoder(slides, None, encoder, output, config, hold_out=list(hold_out), n_genes=10)


def rows(path):
    return {row["method"]: row for row in read_json(path)["rows"]}


@pytest.mark.parametrize(
    "tune", [pytest.param("all", marks=pytest.mark.full), pytest.param("lora", marks=pytest.mark.full), "linear"]
)
def test_what_was_trained_comes_back_from_disk(slides, tmp_path, tune):
    """The prediction on disk is that of the encoder and head on disk, which `hinge evaluate` can read."""
    path = finetune(slides, tmp_path, tune=tune, learning_rate=1e-3)
    assert set(rows(path)) == {tune, "ridge on frozen features", "mean of training spots"}
    slide = read_slide(slides, "sim2")
    # moved elsewhere, it still finds its encoder
    shutil.copytree(tmp_path / "folds" / "sim2", tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "folds")
    model, encoder, about = load_regressor(tmp_path / "elsewhere")
    spots = load_spots(slide, Panel.from_list(about["genes"]), about["transform"])
    read = read_prediction(PredictionFiles("tuned", (str(tmp_path / "predictions" / "{slide}.h5ad"),)), spots)
    kept = slide.obs_names.get_indexer(spots.barcodes)
    predicted = predict_slide(model, slide, encoder, about["patch_um"])[kept]
    # features on disk are float16 where only the head was trained
    np.testing.assert_allclose(predicted, read.mean, atol=3e-2 if tune == "linear" else 1e-4)
    before = load_encoder(ENCODER, device="cpu")
    assert (encoder.digest == before.digest) == (tune == "linear")
    if tune != "linear":
        tuned = load_encoder(str(tmp_path / "elsewhere" / "encoder"), device="cpu")
        assert (tuned.patch_px, tuned.transform.describe()) == (before.patch_px, before.transform.describe())
    assert not (tmp_path / "patches").exists()
    for name in ("head.safetensors", "model.json", *(["encoder/model.safetensors"] if tune != "linear" else [])):
        changed = tmp_path / "elsewhere" / name
        content = changed.read_bytes()
        changed.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
        with pytest.raises(DataError, match="was changed or damaged after hinge finetune-encoder wrote it"):
            load_regressor(tmp_path / "elsewhere")
        changed.write_bytes(content)


@pytest.mark.full
def test_training_lowers_the_error_and_goes_on_where_it_stopped(slides, tmp_path):
    settings = {"tune": "lora", "start": "random", "learning_rate": 3e-3}
    path = finetune(slides, tmp_path / "once", epochs=12, **settings)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "once/folds/sim2/training/log.jsonl").open()]
    assert np.mean(losses[-3:]) < 0.5 * losses[0]
    # as if killed after training and before the rest: the checkpoint gives the same scores
    (tmp_path / "again").mkdir()
    shutil.copytree(tmp_path / "once", tmp_path / "again", dirs_exist_ok=True)
    for file in ("scores.json", "folds/sim2/scores.json", "predictions/sim2.h5ad"):
        (tmp_path / "again" / file).unlink()
    assert read_json(finetune(slides, tmp_path / "again", epochs=12, **settings)) == read_json(path)
    with pytest.raises(ConfigError, match="was made with another training; choose another folder"):
        finetune(slides, tmp_path / "once", epochs=13, **settings)


@pytest.mark.full
def test_a_solved_head_is_ridge_regression(slides, tmp_path):
    """With hardly any training the solved head is as good as ridge, a random one knows nothing."""
    solved = rows(finetune(slides, tmp_path / "ridge", tune="linear", learning_rate=1e-9))
    random = rows(finetune(slides, tmp_path / "random", tune="linear", learning_rate=1e-9, start="random"))
    assert abs(solved["linear"]["mse"] / solved["ridge on frozen features"]["mse"] - 1) < 0.1
    assert random["linear"]["mse"] > 2 * solved["linear"]["mse"]
    assert solved["mean of training spots"]["pcc_median"] == 0


@pytest.mark.full
def test_published_weights_are_a_start(slides, parity, tmp_path, monkeypatch):
    stored = safetensors.torch.load_file(parity / "spafoundation_vit.safetensors")
    with safetensors.safe_open(parity / "spafoundation_vit.safetensors", "pt") as opened:
        config = json.loads(opened.metadata()["config"])
    config.pop("layer_norm_eps")
    state = {f"module.backbone.{key[6:]}": value for key, value in stored.items() if key.startswith("state.")}
    torch.save({"state_dict": state}, tmp_path / "published.pth")
    tiny = replace(RECIPES["spafoundation"], arguments=config, dim=48, patch_px=64)
    monkeypatch.setitem(registry.RECIPES, "spafoundation", tiny)
    name = f"spafoundation@{tmp_path / 'published.pth'}"
    assert set(rows(finetune(slides, tmp_path / "tuned", name))) >= {"all"}
    before, tuned = load_encoder(name), load_encoder(str(tmp_path / "tuned/folds/sim2/encoder"))
    # one epoch at 1e-5: other weights, nearly the same features, and pixels in 0...1 as before
    patches = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    difference = np.abs(tuned.encode(patches) - before.encode(patches)).max()
    assert 0 < difference < 0.05 and tuned.digest != before.digest


@pytest.mark.full
def test_folds(slides, tmp_path):
    loaded = {name: read_slide(slides, name) for name in ("sim0", "sim1", "sim2")}
    (tmp_path / "patients.csv").write_text("slide,patient\nsim0,a\nsim1,a\nsim2,b\n")
    groups = slide_groups(loaded, str(tmp_path / "patients.csv"))
    assert [(fold.name, fold.train, fold.test) for fold in make_folds(groups)] == [
        ("a", ("sim2",), ("sim0", "sim1")),
        ("b", ("sim0", "sim1"), ("sim2",)),
    ]
    assert [fold.name for fold in make_folds(groups, ["b"])] == ["b"]
    with pytest.raises(ConfigError, match="no group 'c' to hold out; choose from a, b"):
        make_folds(groups, ["c"])
    with pytest.raises(ConfigError, match=r"all slides \(sim0, sim1\) are in one group"):
        make_folds({"sim0": "a", "sim1": "a"})
    for slide in loaded.values():
        del slide.obs["patient"]
    with pytest.raises(DataError, match=r"sim0 has no obs\['patient'\]"):
        slide_groups(loaded, "patient")
    for name, slide in loaded.items():
        slide.obs["patient"] = name[-1]
    assert slide_groups(loaded, "patient") == {"sim0": "0", "sim1": "1", "sim2": "2"}
    (tmp_path / "few.csv").write_text("slide,patient\nsim0,a\n")
    with pytest.raises(DataError, match="has no group for slide sim1"):
        slide_groups(loaded, str(tmp_path / "few.csv"))
    with pytest.raises(ConfigError, match=r"--folds must be slide, patient, or a \.csv or \.tsv file, not 'random'"):
        slide_groups(loaded, "random")


@pytest.mark.parametrize(
    ("encoder", "tune", "says"),
    [
        ("stain-texture", "all", "has no weights and supports --tune linear only"),
        (f"stain-texture+{ENCODER}", "lora", "supports --tune linear only"),
        ("random:test_resnet", "lora", "has no layers named qkv, attn.proj, fc1, fc2 for adapters"),
    ],
)
def test_what_cannot_be_tuned(slides, tmp_path, encoder, tune, says):
    with pytest.raises(ConfigError, match=says):
        finetune(slides, tmp_path / "out", encoder, tune=tune)
    assert not (tmp_path / "out").exists()


def test_a_wrong_setting_is_named():
    with pytest.raises(ConfigError, match="fine-tuning cannot start: tune: input should be 'all', 'lora' or 'linear'"):
        finetune_config(tune="some")
    assert finetune_config(tune="lora").learning_rate == 2e-4


@pytest.mark.full
@pytest.mark.real
def test_her2st(her2st, tmp_path):
    arguments = [her2st, *[f"--sample={name}" for name in ("C3", "C4", "C5")], "--encoder=stain-texture"]
    settings = ["--tune=linear", "--hold-out=C5", "--genes=50", "--patch-um=224", f"--output={tmp_path}"]
    result = call_hinge("finetune-encoder", *map(str, arguments), *settings)
    assert result.code == 0, result.err
    found = rows(tmp_path / "scores.json")
    assert found["linear"]["pcc_median"] > 0.25
    assert found["linear"]["mse"] < 0.97 * found["mean of training spots"]["mse"]
    assert anndata.read_h5ad(tmp_path / "predictions" / "C5.h5ad").shape == (181, 50)
