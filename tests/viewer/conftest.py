"""A run with draws of two slides, its viewer, the server, and the page in a browser."""

from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from helpers.viewer import HOSTILE_GENE, HOSTILE_SPOT, N_DRAWS, is_complaint, serving

from hinge.config import check_config, save_config
from hinge.data import read_slide, simulate_slides
from hinge.data.count_table import read_counts
from hinge.data.draws import draws_of_slide, write_draws
from hinge.run.run import Run
from hinge.viewer import Viewer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run's folder with draws of two slides; of the second, the measured slide is not in the data set."""
    data = tmp_path_factory.mktemp("viewer")
    simulate_slides(data / "slides", n_slides=2, grid=(9, 9), n_genes=40, um_per_px=2.0)
    for name in ("sim0", "sim1"):
        slide = ad.read_h5ad(data / "slides" / f"{name}.h5ad")
        genes, spots = slide.var_names.tolist(), slide.obs_names.tolist()
        genes[3], spots[40] = HOSTILE_GENE, HOSTILE_SPOT
        slide.var_names, slide.obs_names = genes, spots
        slide.write_h5ad(data / "slides" / f"{name}.h5ad")
    config = {
        "output": str(data / "run"),
        "data": {"path": str(data / "slides"), "train": ["sim1"], "test": ["sim0"], "pretrain": ["other"]},
    }
    save_config(check_config(config, "test"), data / "run" / "config.yaml")
    rng = np.random.default_rng(0)
    for name in ("sim0", "sim1"):
        slide = read_slide(data / "slides", name)
        genes = slide.var_names[:24].tolist()
        values = read_counts([slide], genes).values("log2p1")
        draws = np.maximum(0, values + rng.normal(0, 0.7, (N_DRAWS, *values.shape))).astype(np.float32)
        path = data / "run" / "samples" / f"{name}.h5ad"
        write_draws(path, draws_of_slide(draws, values * 0.8, slide, genes, {"transform": "log2p1", "draws": N_DRAWS}))
    for file in (data / "slides").glob("sim1.*"):
        file.rename(data / file.name)
    return data / "run"


@pytest.fixture(scope="module")
def viewer(folder) -> Viewer:
    return Viewer(Run.open(folder))


@pytest.fixture(scope="module")
def server(viewer):
    with serving(viewer) as running:
        yield running


@pytest.fixture
def page(chromium, server):
    """The page, ready; whatever it complains of, or asks of other machines, fails the test."""
    context = chromium.new_context(viewport={"width": 1280, "height": 800}, color_scheme="light")
    page, complaints = context.new_page(), []
    page.on("console", lambda message: complaints.append(message.text) if is_complaint(message) else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: (complaints.append(f"dialog {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: None if request.url.startswith(server.url) else complaints.append(request.url))
    page.goto(server.url)
    page.wait_for_selector("body[data-gene]")
    page.wait_for_timeout(300)
    yield page
    assert not complaints
    context.close()
