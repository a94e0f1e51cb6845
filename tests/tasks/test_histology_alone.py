"""From an image without counts to draws that other tools open: what `hinge sample` and `hinge export` do with it."""

import json
import shutil

import anndata
import numpy as np
import pytest
import yaml
from helpers.commands import call_hinge
from helpers.runs import tiny_settings
from PIL import Image

from hinge.data.layers import named_layers
from hinge.run.run import Run
from hinge.sharing.export import export_draws
from hinge.utils.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def trained(tiny_slides, tmp_path_factory):
    """A small run on simulated tissue, and an image of other tissue on a glass slide."""
    folder = tmp_path_factory.mktemp("alone")
    data = {"path": str(tiny_slides), "train": ["sim0"], "pretrain": ["sim10"]}
    content = tiny_settings(tiny_slides, folder / "run", data=data, sampling={"draws": 2, "steps": 3})
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    result = call_hinge("train", "--config", str(folder / "run.yaml"))
    assert result.code == 0, result.err
    tissue = Image.open(tiny_slides / "sim1.jpg")
    glass = Image.new("RGB", (tissue.width + 800, tissue.height + 600), (242, 240, 243))
    glass.paste(tissue, (500, 300))
    glass.save(folder / "biopsy.png")
    return folder, tissue.size


def test_an_image_is_sampled_at_the_training_pitch(trained, tmp_path):
    folder, (width, height) = trained
    arguments = ["sample", str(folder / "run"), "--slide", str(folder / "biopsy.png"), "--um-per-px", "2.0"]
    result = call_hinge(*arguments)
    assert result.code == 0, result.err
    draws = anndata.read_h5ad(folder / "run" / "samples" / "biopsy.h5ad")
    facts = draws.uns["hinge"]
    assert (facts["spot_pitch_um"], facts["spot_diameter_um"]) == (200, 100) and draws.n_vars == 20
    assert np.isfinite(draws.X).all() and {"draw_000", "draw_001", "std", "expected"} == set(named_layers(draws))
    # spots every 100 px, on the pasted tissue and not on glass
    x, y = draws.obsm["spatial"].T
    assert ((x > 460) & (x < 540 + width) & (y > 260) & (y < 340 + height)).all()
    assert draws.n_obs > 0.5 * width * height / 100**2
    # a spot is identified by its position in the grid, on which alone its draws depend
    path = folder / "run" / "samples" / "biopsy.h5ad"
    written = path.stat().st_mtime_ns
    assert call_hinge(*arguments).code == 0 and path.stat().st_mtime_ns == written


def test_the_pitch_of_an_old_run_is_that_of_its_slides(trained, tmp_path):
    folder, _ = trained
    shutil.copytree(folder / "run", tmp_path / "run")
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    assert split.pop("spot_pitch_um") == 200 and split.pop("spot_diameter_um") == 100
    (tmp_path / "run" / "split.json").write_text(json.dumps(split))
    (tmp_path / "run" / "checksums.json").unlink(missing_ok=True)  # an old run has none
    assert Run.open(tmp_path / "run").spot_grid() == (200, 100)


def test_an_image_without_resolution_is_refused(trained):
    folder, _ = trained
    with pytest.raises(DataError, match=r"biopsy\.png has no resolution in its metadata: give --um-per-px"):
        Run.open(folder / "run").slide_at(folder / "biopsy.png")


@pytest.mark.filterwarnings("ignore")
def test_exports_of_a_run(trained):
    folder, _ = trained
    run = Run.open(folder / "run")
    run.sample("sim1")
    result = call_hinge("export", str(folder / "run"), "--slide", "sim1", "--format", "geojson")
    assert result.code == 0, result.err
    features = json.loads((folder / "run" / "exports" / "sim1.geojson").read_text())["features"]
    assert len(features) == 36 and len(features[0]["properties"]["measurements"]) == 40
    assert anndata.read_zarr(export_draws(run, "sim1", "zarr")).obsm["draws"].shape == (36, 20, 2)
    with pytest.raises(
        ConfigError, match="there is no format 'svg' to export to; choose one of geojson, spatialdata, c"
    ):
        export_draws(run, "sim1", "svg")
    with pytest.raises(DataError, match=r"there are no draws of sim7 in .*samples; run hinge sample first"):
        export_draws(run, "sim7", "geojson")
    with pytest.raises(
        ConfigError, match="CELLxGENE's schema needs organism_ontology_term_id, tissue_ontology_term_id"
    ):
        export_draws(run, "sim1", "cellxgene")
