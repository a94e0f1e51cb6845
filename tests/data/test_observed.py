"""Draws given measured genes: read, laid over the slide, kept to the bit, refused where they do not fit."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from helpers.runs import tiny_settings
from scipy.sparse import csr_matrix

from hinge.config import check_config
from hinge.data.draws import read_draws
from hinge.data.observed import read_observed
from hinge.run.run import Run
from hinge.utils.errors import DataError


@pytest.fixture(scope="module")
def run(tiny_slides, tmp_path_factory) -> Run:
    settings = tiny_settings(tiny_slides, tmp_path_factory.mktemp("observed") / "run", transform="log1p_cp10k")
    run = Run(check_config(settings, "test"))
    run.train()
    return run


def panel_file(run, path, genes=8, spots=20, totals=True, edit=None):
    slide, panel = run.slide("sim2"), run.panel().genes
    part = slide[:spots, panel[:genes]]
    obs = pd.DataFrame(index=part.obs_names)
    if totals:
        obs["total_counts"] = np.asarray(slide.X.sum(axis=1)).ravel()[:spots]
    measured = AnnData(csr_matrix(part.X), obs=obs, var=pd.DataFrame(index=part.var_names))
    if edit is not None:
        measured = edit(measured) or measured
    measured.write_h5ad(path)
    return path


def test_measured_values_stay_and_the_rest_is_drawn(run, tmp_path):
    path = panel_file(run, tmp_path / "panel.h5ad")
    drawn = read_draws(run.sample("sim2", output=tmp_path / "draws.h5ad", observed=path))
    values, library_size = read_observed(path, run.slide("sim2"), run.panel().genes, "log1p_cp10k")
    known = ~np.isnan(values)
    assert known.sum() == 8 * 20
    assert np.isnan(library_size[20:]).all() and (library_size[:20] > 0).all()
    for number in range(3):
        assert np.array_equal(drawn.layers[f"draw_{number:03d}"][known], values[known])
    assert (drawn.layers["std"][~known] > 0).mean() > 0.3
    free = read_draws(run.sample("sim2", output=tmp_path / "free.h5ad"))
    assert not np.array_equal(drawn.layers["draw_000"][:20, 8:], free.layers["draw_000"][:20, 8:])
    # the same file again is recognised, another one is not
    before = (tmp_path / "draws.h5ad").stat().st_mtime_ns
    run.sample("sim2", output=tmp_path / "draws.h5ad", observed=path)
    assert (tmp_path / "draws.h5ad").stat().st_mtime_ns == before
    run.sample("sim2", output=tmp_path / "draws.h5ad", observed=panel_file(run, tmp_path / "other.h5ad", genes=5))
    assert (tmp_path / "draws.h5ad").stat().st_mtime_ns != before


def test_the_log2_transform_needs_no_totals(run, tmp_path):
    path = panel_file(run, tmp_path / "panel.h5ad", totals=False)
    values, library_size = read_observed(path, run.slide("sim2"), run.panel().genes, "log2p1")
    assert library_size is None
    np.testing.assert_allclose(
        np.exp2(values[:20, :8]) - 1, run.slide("sim2")[:20, run.panel().genes[:8]].X.toarray(), atol=1e-3
    )


def rename_spots(measured):
    measured.obs_names = [f"x{i}" for i in range(len(measured))]


def rename_genes(measured):
    measured.var_names = [f"x{i}" for i in range(measured.n_vars)]


def negative(measured):
    measured.X = measured.X.toarray() - 5.0


def fractions(measured):
    measured.X = measured.X.toarray() + 0.5


def twice(measured):
    return ad.concat([measured, measured])


def empty_total(measured):
    measured.obs["total_counts"] = 0


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (rename_spots, "shares no barcode with slide sim2"),
        (rename_genes, "holds no gene of the panel"),
        (negative, "raw counts"),
        (fractions, "raw counts"),
        (twice, "more than once"),
        (empty_total, "must be above 0"),
    ],
)
def test_what_does_not_fit_is_refused(run, tmp_path, edit, message):
    path = panel_file(run, tmp_path / "panel.h5ad", edit=edit)
    with pytest.raises(DataError, match=message):
        run.sample("sim2", output=tmp_path / "draws.h5ad", observed=path)
    assert not (tmp_path / "draws.h5ad").exists()


def test_a_missing_total_and_a_file_of_another_kind_are_named(run, tmp_path):
    slide, genes = run.slide("sim2"), run.panel().genes
    with pytest.raises(DataError, match="total_counts"):
        read_observed(panel_file(run, tmp_path / "p.h5ad", totals=False), slide, genes, "log1p_cp10k")
    (tmp_path / "text.h5ad").write_text("no")
    with pytest.raises(DataError, match="not a readable h5ad"):
        read_observed(tmp_path / "text.h5ad", slide, genes, "log2p1")
