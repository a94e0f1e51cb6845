"""Inputs at the edge of what is possible: each gives the right result or one sentence."""

import shutil

import anndata
import numpy as np
import pytest
import scipy.sparse
import yaml
from helpers.runs import finish, tiny_settings

from hinge.config import check_config
from hinge.data.readers import read_slide
from hinge.data.slide import LARGEST_COUNT
from hinge.evaluation import noise_ceiling
from hinge.run.run import Run
from hinge.utils import checksums
from hinge.utils.errors import DataError
from hinge.utils.files import read_json


@pytest.mark.parametrize("make", [np.asarray, scipy.sparse.csr_matrix], ids=["dense", "sparse"])
@pytest.mark.parametrize(
    "value, dtype, says",
    [
        (3e38, np.float32, "is larger than"),
        (2**63 + 5, np.uint64, "is larger than"),
        (2**62, np.int64, "is larger than"),
        (-1, np.int64, "is below 0"),
        (LARGEST_COUNT // 2, np.float64, None),
    ],
)
def test_counts_that_no_slide_has(tiny_slide, value, dtype, make, says):
    slide = anndata.read_h5ad(tiny_slide)
    counts = slide.X.toarray().astype(dtype)
    counts[0, 0] = value
    slide.X = make(counts)
    slide.write_h5ad(tiny_slide)
    if says is None:
        read_slide(tiny_slide)
        return
    with pytest.raises(DataError, match=f"spot 0x0, gene GENE0: count .* {says}"):
        read_slide(tiny_slide)


def test_the_noise_ceiling_of_more_counts_than_float32_sums_exactly():
    counts = np.random.default_rng(0).integers(1e6, 4e6, (20, 40)).astype(np.float32)
    library_size = counts.sum(axis=1, dtype=np.float64).astype(np.float32)
    assert (library_size < counts.sum(axis=1, dtype=np.float64)).any()
    assert (noise_ceiling(counts, library_size, "log2p1") > 0.99).all()
    with pytest.raises(DataError, match="more counts in the panel than over all genes"):
        noise_ceiling(counts, 0.99 * library_size // 1, "log2p1")


@pytest.mark.full
def test_a_panel_of_one_gene(tiny_slides, tmp_path):
    run = Run(check_config(tiny_settings(tiny_slides, tmp_path / "run", panel__genes=1), "test"))
    finish(run)
    rows = {row["method"]: row for row in read_json(run.paths.scores)["rows"]}
    assert rows["hinge"]["n_genes"] == 1 and np.isfinite(rows["hinge"]["crps"])


@pytest.mark.parametrize("section", ["training", "sampling"])
def test_a_plain_no_of_yaml_is_a_precision(section):
    content = {"output": "o", "data": {"path": "d", "train": ["a"]}, section: yaml.safe_load("precision: no")}
    assert getattr(check_config(content, "test"), section).precision == "no"


def test_a_run_from_elsewhere_writes_into_its_folder_alone(copied_tiny_run, tmp_path, caplog):
    foreign = tmp_path / "foreign"
    shutil.move(copied_tiny_run.folder / "features", foreign)
    text = copied_tiny_run.paths.config.read_text()
    copied_tiny_run.paths.config.write_text(text.replace("  folder: null\n", f"  folder: {foreign}\n"))
    checksums.accept(copied_tiny_run.folder)
    run = Run.open(copied_tiny_run.folder)
    assert run.features(run.slide("sim2")).parent == foreign  # it is read there
    for path in foreign.iterdir():
        path.unlink()
    caplog.set_level("INFO", logger="hinge")
    assert run.features(run.slide("sim2")) == run.folder / "features" / "sim2.stain-texture.h5"
    assert not list(foreign.iterdir()) and f"features.folder {foreign} is outside of" in caplog.text
