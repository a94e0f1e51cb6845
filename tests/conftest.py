"""Fixtures that several test files share."""

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from helpers import ROOT

from hinge.utils.threads import prepare_cpu

prepare_cpu()  # threads that spin make boosting a hundred times slower where another process wants the core

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import scipy.sparse  # noqa: E402
from anndata import AnnData  # noqa: E402
from helpers.commands import Called, call_hinge  # noqa: E402
from helpers.runs import tiny_settings  # noqa: E402
from PIL import Image  # noqa: E402

PRELOADED = [
    "hinge.run.run",
    "hinge.experiments.ablation",
    "hinge.cli.app",
    "hinge.tasks.pretrain_encoder",
    "hinge.tasks.dense",
    "lightly.loss",
    "lightly.models.utils",
]
SHARED = ROOT.parent / "shared"


def _folder(variable: str, beside: str) -> Path:
    folder = Path(os.environ.get(variable, SHARED / beside))
    if not folder.is_dir():
        pytest.skip(f"no {folder}; set {variable}")
    return folder


@pytest.fixture(scope="module")
def server():
    """Starts processes that have imported everything: server.Process(target=…, args=…)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        # the server forks: it must have no threads of OpenMP
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("OPENBLAS_NUM_THREADS", "1")
        yield context


@pytest.fixture(scope="session")
def her2st() -> Path:
    """The real HER2ST data; mark tests that use it with `real`."""
    return _folder("HINGE_HER2ST", "her2st")


@pytest.fixture(scope="session")
def parity() -> Path:
    """Inputs and outputs recorded from the published implementations."""
    return _folder("HINGE_PARITY", "parity")


@pytest.fixture(scope="session")
def backbones() -> Path:
    """Recordings of scGPT, scGPT-spatial and Tahoe-x1, and their files at tiny dimensions."""
    return _folder("HINGE_BACKBONES", "backbones")


@pytest.fixture(scope="session")
def visium_tiny() -> Path:
    """A small Space Ranger folder."""
    return _folder("HINGE_VISIUM_TINY", "visium_tiny")


@pytest.fixture(scope="session")
def hest() -> Path:
    """HEST-1k's table of samples."""
    return _folder("HINGE_HEST", "hest")


@pytest.fixture
def write_slide(tmp_path: Path) -> Callable[..., Path]:
    """Write `<tmp_path>/slides/<name>.h5ad` and `<name>.png`, give the h5ad's path.

    The slide is a grid of spots 40 px (100 µm at 2.5 µm/px) apart on an image whose red channel follows the
    first half of the genes and whose blue channel follows the second. Keyword arguments: name, rows, columns,
    genes, depth, seed, and `edit`, a function that may change the AnnData before it is written.
    """

    def write(
        name: str = "tiny",
        rows: int = 6,
        columns: int = 5,
        genes: int = 30,
        depth: float = 4.0,
        seed: int = 0,
        edit: Callable[[AnnData], None] | None = None,
    ) -> Path:
        rng = np.random.default_rng(seed)
        pitch, margin = 40, 30
        y, x = (grid.ravel() for grid in np.mgrid[:rows, :columns])
        width, height = (columns - 1) * pitch + 2 * margin, (rows - 1) * pitch + 2 * margin
        across = np.linspace(0, 1, width)[None, :].repeat(height, axis=0)
        pixels = np.stack([60 + 180 * across, np.full_like(across, 120), 240 - 180 * across], axis=-1)
        pixels += rng.normal(0, 4, pixels.shape)
        folder = tmp_path / "slides"
        folder.mkdir(exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{name}.png")

        share = (x * pitch + margin) / width
        level = np.where(np.arange(genes) < genes // 2, share[:, None], 1 - share[:, None])
        rate = depth * level * np.exp(rng.normal(0, 1, genes)) * rng.gamma(4, 0.25, len(x))[:, None]
        slide = AnnData(scipy.sparse.csr_matrix(rng.poisson(rate).astype(np.float32)))
        slide.obs_names = [f"{i}x{j}" for i, j in zip(x, y, strict=True)]
        slide.var_names = [f"GENE{i}" for i in range(genes)]
        slide.obsm["spatial"] = np.stack([x, y], axis=1) * float(pitch) + margin
        slide.uns["hinge"] = {"um_per_px": 2.5, "spot_pitch_um": 100.0, "spot_diameter_um": 55.0}
        if edit is not None:
            edit(slide)
        slide.write_h5ad(folder / f"{name}.h5ad")
        return folder / f"{name}.h5ad"

    return write


@pytest.fixture
def tiny_slide(write_slide: Callable[..., Path]) -> Path:
    """A small slide with its image beside it: 30 spots, 30 genes."""
    return write_slide()


@pytest.fixture(scope="module")
def chromium():
    """A headless browser."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if found is None:
        pytest.skip("no chromium on the PATH: install Debian's package chromium, or Chrome")
    playwright = pytest.importorskip("playwright.sync_api", reason='needs playwright: pip install -e ".[test]"')
    arguments = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    arguments += " --disable-component-update --disable-sync"
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=found, args=arguments.split())
        yield browser
        browser.close()


@pytest.fixture
def call_cli() -> Callable[..., Called]:
    """Call the command line in this process: `call_cli("sample", run)` gives exit code, stdout and stderr."""
    return call_hinge


@pytest.fixture(scope="session")
def tiny_slides(tmp_path_factory) -> Path:
    """Simulated tissue, not to be written to: sim0 to sim2 with images, sim10 and sim11 without; 36 spots, 40 genes."""
    from hinge.data import simulate_slides

    folder = tmp_path_factory.mktemp("tiny") / "slides"
    simulate_slides(folder, n_slides=3, grid=(6, 6), n_genes=40, um_per_px=2.0)
    simulate_slides(folder, n_slides=2, grid=(6, 6), n_genes=40, um_per_px=2.0, first=10, with_image=False)
    return folder


@pytest.fixture(scope="session")
def tiny_run(tiny_slides: Path):
    """A run on `tiny_slides` through all stages, not to be written to."""
    from hinge.run.run import Run

    folder = tiny_slides.parent
    # JSON is YAML
    (folder / "run.yaml").write_text(json.dumps(tiny_settings(tiny_slides, folder / "run")))
    done = call_hinge("run", "--config", folder / "run.yaml")
    assert done.code == 0, done.err
    return Run.open(folder / "run")


@pytest.fixture
def copied_tiny_run(tiny_run, tmp_path: Path):
    """The run of `tiny_run` in a folder of the test's own, to write to."""
    from hinge.run.run import Run

    return Run.open(Path(shutil.copytree(tiny_run.folder, tmp_path / "copied")))
