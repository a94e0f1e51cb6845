"""Dense maps: do they agree with the spots, do blocks and files leave them alone?"""

import re

import anndata
import numpy as np
import pytest
import tifffile
import torch
import yaml
from helpers.commands import call_hinge
from helpers.runs import tiny_settings
from PIL import Image
from scipy.spatial import KDTree

from hinge.config import check_config, save_config
from hinge.data import read_slide
from hinge.data.slide import require_slide
from hinge.evaluation.baselines import baseline_predictions
from hinge.run.run import Run
from hinge.tasks.dense import RunPredictor, map_slide, open_predictor
from hinge.tasks.finetune import finetune_config, finetune_encoder
from hinge.tasks.lattice import neighbour_offsets, window_offsets
from hinge.tasks.regressor import load_regressor, predict_slide
from hinge.utils.errors import ConfigError


@pytest.fixture(scope="module")
def folder(tiny_slides, tmp_path_factory):
    """A small trained run on simulated tissue."""
    folder = tmp_path_factory.mktemp("dense")
    (folder / "slides").symlink_to(tiny_slides)
    changes = {
        "transform": "log1p_cp10k",
        "features": {"encoder": "stain-texture", "patch_um": 150.0},
        "sampling__steps": 3,
    }
    content = tiny_settings(tiny_slides, folder / "run", **changes)
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    assert call_hinge("train", "--config", str(folder / "run.yaml")).code == 0
    return folder


@pytest.fixture(scope="module")
def mapped(folder, tmp_path_factory):
    """Map and image of sim2 by regression, every 50 µm."""
    output = tmp_path_factory.mktemp("map")
    arguments = ["map", folder / "run", "--slide", "sim2", "--pitch-um", 50, "--output", output]
    result = call_hinge(*map(str, arguments))
    assert result.code == 0, result.err
    assert result.out == f"map: {output / 'sim2.50um.h5ad'}\nimage: {output / 'sim2.50um.ome.tif'}\n"
    return anndata.read_h5ad(output / "sim2.50um.h5ad"), output / "sim2.50um.ome.tif"


def over_spots(dense, values, slide, radius_um=50.0):
    """Mean of a map's values within each spot."""
    radius = radius_um / slide.uns["hinge"]["um_per_px"]
    inside = KDTree(dense.obsm["spatial"]).query_ball_point(slide.obsm["spatial"], radius)
    covered = np.array([len(points) > 0 for points in inside])
    return np.stack([values[points].mean(axis=0) for points in inside if points]), covered


def correlations(one, other):
    one, other = one - one.mean(axis=0), other - other.mean(axis=0)
    return (one * other).sum(axis=0) / np.linalg.norm(one, axis=0) / np.linalg.norm(other, axis=0)


@pytest.mark.full
def test_averaged_over_spots_it_is_what_is_predicted_for_them(folder, tmp_path):
    content = yaml.safe_load((folder / "run.yaml").read_text())
    content |= {"output": str(tmp_path / "run"), "data": {**content["data"], "path": str(folder / "slides")}}
    config = check_config({**content, "features": {**content["features"], "neighbourhood": False}}, "test")
    save_config(config, tmp_path / "run" / "config.yaml")  # never trained: the regression needs no more
    predictor = open_predictor(tmp_path / "run", "regression", None, None, None)
    slide = predictor.slide("sim2", None)
    dense = anndata.read_h5ad(map_slide(predictor, slide, tmp_path, 50.0)[0])
    run = predictor.run
    predicted = baseline_predictions(run.spots(["sim0", "sim1"]), run.spots(["sim2"]), ["ridge-cv"])[0].mean
    averaged, covered = over_spots(dense, dense.X, slide)
    assert covered.mean() > 0.9 and len(predicted) == slide.n_obs
    found = correlations(averaged, predicted[covered])
    assert found.mean() > 0.97 and found.min() > 0.9
    assert np.sqrt(np.mean((averaged - predicted[covered]) ** 2)) < 0.3 * predicted.std(axis=0).mean()
    agreement = dense.uns["hinge"]["agreement"]
    assert agreement["pcc"] == pytest.approx(found.mean(), abs=1e-3) and agreement["spots"] == covered.sum()


def test_the_neighbourhood_is_that_of_spots(folder, mapped):
    """Between spots, too, the features around are those one spot pitch away; only at the edge of the spots is more."""
    slide, dense = Run.open(folder / "run").slide("sim2"), mapped[0]
    assert dense.uns["hinge"]["agreement"]["pcc"] > 0.8
    inner = slide[KDTree(slide.obsm["spatial"]).query_ball_point(slide.obsm["spatial"], 150, return_length=True) == 9]
    assert inner.n_obs == 16
    run = Run.open(folder / "run")
    predicted = baseline_predictions(run.spots(["sim0", "sim1"]), run.spots(["sim2"]), ["ridge-cv"])[0].mean
    averaged, _ = over_spots(dense, dense.X, inner)
    rows = slide.obs_names.get_indexer(inner.obs_names)
    assert correlations(averaged, predicted[rows]).mean() > 0.95


def test_the_map_is_a_slide_of_its_grid(folder, mapped):
    dense, _ = mapped
    facts = dense.uns["hinge"]
    assert (facts["name"], facts["spot_pitch_um"], facts["um_per_px"]) == ("sim2", 50.0, 2.0)
    assert (facts["transform"], facts["method"]) == ("log1p_cp10k", "regression")
    assert list(dense.var_names) == Run.open(folder / "run").panel().genes and np.isfinite(dense.X).all()
    distance = KDTree(dense.obsm["spatial"]).query(dense.obsm["spatial"], k=2)[0][:, 1]
    np.testing.assert_allclose(distance, 25.0)
    counts = dense.copy()
    counts.X = np.zeros(dense.shape, np.float32)  # values are no counts; all the rest is a slide's
    require_slide(counts)
    assert "hires" in dense.uns["spatial"]["sim2"]["images"]


@pytest.mark.full
def test_blocks_do_not_matter(folder, mapped, tmp_path):
    predictor = open_predictor(folder / "run", "regression", None, None, None)
    seen, predict = [], predictor.predict
    predictor.predict = lambda conditions, *rest: seen.append(len(conditions)) or predict(conditions, *rest)
    path, _ = map_slide(predictor, predictor.slide("sim2", None), tmp_path, 50.0, block_points=40)
    np.testing.assert_allclose(anndata.read_h5ad(path).X, mapped[0].X, atol=1e-5)
    width = int(mapped[0].obs["array_x"].max()) + 1
    assert max(seen[1:]) <= 40 + width and sum(seen[1:]) == mapped[0].n_obs  # the first are the spots
    written = path.stat().st_mtime_ns
    map_slide(predictor, predictor.slide("sim2", None), tmp_path, 50.0)
    assert path.stat().st_mtime_ns == written and sorted(file.suffix for file in tmp_path.iterdir()) == [
        ".h5ad",
        ".tif",
    ]


def test_the_image_shows_the_map(mapped):
    dense, path = mapped
    x, y = dense.obs[["array_x", "array_y"]].to_numpy().T
    with tifffile.TiffFile(path) as file:
        pixels = tifffile.xml2dict(file.ome_metadata)["OME"]["Image"]["Pixels"]
        assert len(file.series) == 1 and len(file.series[0].levels) >= 2
        planes, half = (level.asarray() for level in file.series[0].levels[:2])
    assert [channel["Name"] for channel in pixels["Channel"]] == ["tissue", *dense.var_names[:10]]
    assert (pixels["PhysicalSizeX"], pixels["PhysicalSizeXUnit"], pixels["PhysicalSizeY"]) == (50, "µm", 50)
    place = pixels["Plane"][0]
    first = dense.obsm["spatial"][0] * 2.0 - np.array([x[0], y[0]]) * 50
    np.testing.assert_allclose([place["PositionX"], place["PositionY"]], first)
    assert planes[0].sum() == dense.n_obs
    np.testing.assert_array_equal(planes[1:, y, x].T, dense.X[:, :10])
    assert not planes[:, planes[0] == 0].any()
    for row, column in ((1, 1), (2, 3)):
        block = planes[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        on_tissue = block[0] > 0
        if on_tissue.any():
            np.testing.assert_allclose(half[1:, row, column], block[1:, on_tissue].mean(axis=1), rtol=1e-5)


@pytest.mark.full
def test_draws_on_a_grid(folder, tmp_path):
    predictor = open_predictor(folder / "run", "draws", 2, 2, 5)
    slide = predictor.slide("sim2", None)
    path, _ = map_slide(predictor, slide, tmp_path, 50.0, [predictor.genes[3]], block_points=200)
    dense = anndata.read_h5ad(path)
    assert set(dense.layers) == {"std", "expected"} and (dense.layers["std"] >= 0).all()
    assert (dense.uns["hinge"]["draws"], dense.uns["hinge"]["seed"]) == (2, 5)
    assert 0 < np.abs(dense.X - dense.layers["expected"]).mean() < 5
    # the expectation at the spots is that of the run's own draws
    run = Run.open(folder / "run")
    expected = anndata.read_h5ad(run.sample("sim2", draws=2, steps=2, seed=5)).layers["expected"]
    averaged, covered = over_spots(dense, dense.layers["expected"], slide)
    assert correlations(averaged, expected[covered]).mean() > 0.8


@pytest.mark.full
def test_draws_on_a_grid_use_the_precision_of_the_run(folder):
    run = Run.open(folder / "run")
    sampling = run.config.sampling.model_copy(update={"precision": "bf16"})
    predictor = RunPredictor(Run(run.config.model_copy(update={"sampling": sampling})), "draws", draws=2, steps=2)
    assert {parameter.dtype for parameter in predictor.pipeline.model.backbone.parameters()} == {torch.bfloat16}
    assert predictor.about["precision"] == "bf16"


@pytest.mark.full
def test_an_image_alone_and_a_tuned_encoder(folder, tmp_path):
    """A fold of finetune-encoder maps a biopsy that is an image on glass."""
    config = finetune_config(tune="all", epochs=1, batch_size=32)
    settings = {"hold_out": ["sim2"], "n_genes": 8}
    finetune_encoder(folder / "slides", ["sim0", "sim2"], "random:test_vit", tmp_path / "tuned", config, **settings)
    fold = tmp_path / "tuned" / "folds" / "sim2"
    tissue = Image.open(folder / "slides" / "sim1.jpg")
    glass = Image.new("RGB", (tissue.width + 400, tissue.height + 300), (242, 240, 243))
    glass.paste(tissue, (250, 150))
    glass.save(tmp_path / "biopsy.png")
    arguments = ["map", fold, "--slide", tmp_path / "biopsy.png", "--um-per-px", 2, "--pitch-um", 100]
    result = call_hinge(*map(str, arguments), "--output", str(tmp_path / "maps"))
    assert result.code == 0, result.err
    dense = anndata.read_h5ad(tmp_path / "maps" / "biopsy.100um.h5ad")
    x, y = dense.obsm["spatial"].T
    assert ((x > 200) & (x < 300 + tissue.width) & (y > 100) & (y < 200 + tissue.height)).all()
    assert dense.n_obs > 0.7 * tissue.width * tissue.height / 50**2
    # 100 µm apart no other disc's middle lies within a spot's radius: the map is the prediction itself
    model, encoder, about = load_regressor(fold)
    few = dense[:40].copy()
    np.testing.assert_allclose(dense.X[:40], predict_slide(model, few, encoder, about["patch_um"]), atol=1e-3)
    with pytest.raises(ConfigError, match="is a fine-tuned encoder with a regression, which has no draws"):
        open_predictor(fold, "draws", None, None, None)


def test_windows_and_neighbours():
    offsets, weights = window_offsets(2.0)
    assert offsets[0].tolist() == [0, 0] and weights[0] == 1 and len(offsets) == 9
    np.testing.assert_allclose(weights[1:5], 0.5)
    assert window_offsets(0.4)[0].tolist() == [[0, 0]]
    square = np.stack(np.meshgrid(np.arange(8), np.arange(8)), axis=-1).reshape(-1, 2) * 40.0
    assert sorted(map(tuple, neighbour_offsets(square, 8.0).tolist())) == [
        (x, y) for x in (-8, 0, 8) for y in (-8, 0, 8)
    ]
    hexagonal = np.array([(x + 0.5 * (y % 2), y * np.sqrt(0.75)) for x in range(8) for y in range(8)])
    found = neighbour_offsets(hexagonal, 4.0)
    assert len(found) == 7 and np.abs(np.hypot(*found[1:].T) - 4).max() < 0.5


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--pitch-um", "300"], r"must be above 0 and at most the spots' 200, not 300"),
        (["--gene", "NONE"], "the panel lacks NONE: give --gene"),
        (["--method", "guess"], "there is no method 'guess'; choose regression or draws"),
    ],
)
def test_what_cannot_be_mapped(folder, tmp_path, arguments, says):
    call = ["map", str(folder / "run"), "--slide", "sim2", *arguments, "--output", str(tmp_path / "maps")]
    result = call_hinge(*call)
    assert result.code == 2 and re.search(says, result.err), result.err
    assert not (tmp_path / "maps").exists()


@pytest.mark.full
@pytest.mark.real
def test_her2st(her2st, tmp_path):
    data = {"path": str(her2st), "train": ["C4"], "test": ["C5"], "pretrain": ["C3"]}
    content = {"output": str(tmp_path / "run"), "transform": "log1p_cp10k", "data": data, "panel": {"genes": 20}}
    config = check_config({**content, "features": {"patch_um": 224.0}}, "test")
    save_config(config, tmp_path / "run" / "config.yaml")
    predictor = open_predictor(tmp_path / "run", "regression", None, None, None)
    path, _ = map_slide(predictor, read_slide(her2st, "C5"), tmp_path, 100.0, predictor.genes[:1])
    dense = anndata.read_h5ad(path)
    assert 500 < dense.n_obs < 1000
    assert dense.uns["hinge"]["agreement"]["pcc"] > 0.93
