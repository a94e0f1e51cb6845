"""Cells of Xenium, CosMx and segmented Visium HD as spots, and pooled in pseudo-spots."""

import json

import numpy as np
import pandas as pd
import pytest
from helpers.sections import GENES, make_section, write_thumbnails, write_tiff
from helpers.visium import write_matrix

from hinge.data.checks import check_slide
from hinge.data.panel import read_panel, select_panel
from hinge.data.pseudo_spots import pool_cells
from hinge.data.readers import build_slide, list_samples, read_slide, recognise_format
from hinge.run.run import Run
from hinge.utils.errors import ConfigError, DataError

PIXEL_UM = 0.2125
TURN = np.deg2rad(90)
# the H&E image of 1 µm per pixel is turned by a quarter and shifted against the morphology image
COS, SIN = np.cos(TURN) / PIXEL_UM, np.sin(TURN) / PIXEL_UM
ALIGNMENT = np.array([[COS, -SIN, 8000.0], [SIN, COS, 50.0], [0, 0, 1]])


@pytest.fixture(scope="module")
def section():
    return make_section()


@pytest.fixture(scope="module")
def cells(section):
    """Pixel x, y in the H&E image, counts, and names of 800 cells on tissue."""
    rng = np.random.default_rng(1)
    on_tissue = np.argwhere((section.pixels < 230).any(axis=2))
    places = on_tissue[rng.choice(len(on_tissue), 800, replace=False)][:, ::-1] + 0.5
    return places, rng.poisson(0.5, (800, len(GENES))), [f"aaaa{number:04d}-1" for number in range(800)]


def write_xenium(folder, section, cells, parquet=True, alignment=ALIGNMENT):
    """A Xenium bundle with 60 genes and 4 control features, and its H&E image with the alignment beside it."""
    places, counts, names = cells
    folder.mkdir()
    (folder / "experiment.xenium").write_text(json.dumps({"pixel_size": PIXEL_UM, "panel_name": "breast"}))
    controls = ["NegControlProbe_00042", "NegControlCodeword_0500", "UnassignedCodeword_0001", "DeprecatedCodeword_01"]
    kinds = (
        ["Gene Expression"] * 60 + ["Negative Control Probe", "Negative Control Codeword"] + ["Unassigned Codeword"] * 2
    )
    matrix = np.hstack([counts, np.ones((len(counts), 4), int)])
    write_matrix(folder / "cell_feature_matrix.h5", matrix, names, [*GENES, *controls], kinds)
    microns = (np.c_[places, np.ones(len(places))] @ ALIGNMENT.T)[:, :2] * PIXEL_UM
    table = pd.DataFrame(
        {"cell_id": names, "x_centroid": microns[:, 0], "y_centroid": microns[:, 1], "cell_area": 80.0}
    )
    if parquet:
        table.to_parquet(folder / "cells.parquet")
    else:
        table.to_csv(folder / "cells.csv.gz", index=False)
    write_tiff(folder / "sample_he.tif", section.pixels)
    (folder / "morphology.ome.tif").write_bytes(b"")
    if alignment is not None:
        pd.DataFrame(alignment).to_csv(folder / "sample_he_imagealignment.csv", header=False, index=False)
    return folder


@pytest.mark.parametrize("parquet", [True, False])
def test_cells_of_a_xenium_bundle(section, cells, tmp_path, parquet):
    folder = write_xenium(tmp_path / "X1", section, cells, parquet)
    assert recognise_format(folder) == recognise_format(tmp_path) == "xenium" and list_samples(tmp_path) == ["X1"]
    slide = build_slide(folder)
    np.testing.assert_allclose(slide.obsm["spatial"], cells[0], atol=1e-6)
    np.testing.assert_array_equal(slide.X.toarray(), cells[1])
    facts = slide.uns["hinge"]
    assert list(slide.var_names) == GENES and facts["um_per_px"] == pytest.approx(1)
    assert (
        facts["spot_diameter_um"] == pytest.approx(2 * np.sqrt(80 / np.pi))
        and facts["source"]["technology"] == "Xenium"
    )
    assert check_slide(slide) == []
    assert {each.code for each in check_slide(build_slide(folder, um_per_px=0.5))} == {"resolution-contradiction"}


def test_pseudo_spots(section, cells, tmp_path):
    folder = write_xenium(tmp_path / "X1", section, cells)
    for side in (55, 100):
        slide = read_slide(folder, spot_um=side)
        assert slide.X.sum() == cells[1].sum() and slide.obs["cells"].sum() == 800
        facts = slide.uns["hinge"]
        assert facts["spot_pitch_um"] == facts["spot_diameter_um"] == side
        one = slide.obs_names[0]
        column, row = (int(part) for part in one.split("x"))
        inside = (cells[0] // side == (column, row)).all(axis=1)
        np.testing.assert_array_equal(slide[one].X.toarray()[0], cells[1][inside].sum(axis=0))
        np.testing.assert_array_equal(slide[one].obsm["spatial"][0], [(column + 0.5) * side, (row + 0.5) * side])
        assert check_slide(slide) == []
    with pytest.raises(ConfigError, match="--spot-um takes a number above 0"):
        read_slide(folder, spot_um=-1)


def test_pseudo_spots_need_a_resolution(section, cells, tmp_path):
    slide = build_slide(write_xenium(tmp_path / "X1", section, cells))
    slide.uns["hinge"]["um_per_px"] = float("nan")
    with pytest.raises(ConfigError, match="--spot-um needs the resolution of slide X1, which has none"):
        pool_cells(slide, 55)


def test_panel_and_sample_take_pseudo_spots(section, cells, tmp_path, tiny_run, call_cli):
    """Counts of most genes are 0 in most cells: the panel of squares is that of the pooled slide."""
    folder = write_xenium(tmp_path / "X1", section, cells)
    panels = {}
    for side in (None, 100):
        option = [] if side is None else ["--spot-um", side]
        done = call_cli("panel", folder, "--genes", 20, "--output", tmp_path / "panel.json", *option)
        assert done.code == 0, done.err
        panels[side] = read_panel(tmp_path / "panel.json").genes
        assert panels[side] == select_panel([read_slide(folder, spot_um=side)], "hmhvg", 20).genes
    assert panels[None] != panels[100]
    # as the slides that a run was trained on, or as asked
    settings = tiny_run.config.model_copy(update={"data": tiny_run.config.data.model_copy(update={"spot_um": 100.0})})
    run = Run(settings, opened=True)
    assert run.slide_at(folder).uns["hinge"]["spot_pitch_um"] == 100
    assert run.slide_at(folder, spot_um=55).uns["hinge"]["spot_pitch_um"] == 55
    assert tiny_run.slide_at(folder).n_obs == 800
    assert "--spot-um" in call_cli("sample", "--help").out


def test_pseudo_spots_of_spots_are_refused(tiny_slide):
    with pytest.raises(ConfigError, match="--spot-um pools cells, and slide tiny has spots of its own"):
        read_slide(tiny_slide, spot_um=55)


def test_bundles_that_lack_something(section, cells, tmp_path):
    folder = write_xenium(tmp_path / "X1", section, cells, alignment=None)
    with pytest.raises(DataError, match=r"needs the matrix that aligns it with the cells: export sample_he_image"):
        read_slide(folder)
    assert build_slide(folder, require_image=False).n_obs == 800
    (folder / "sample_he_imagealignment.csv").write_text("1,0,0\n0,1,0\n")
    with pytest.raises(DataError, match="is no alignment matrix of 3 x 3 numbers"):
        read_slide(folder)
    (folder / "cells.parquet").unlink()
    with pytest.raises(DataError, match=r"cells\.parquet or cells\.csv\.gz is missing"):
        read_slide(folder)
    (folder / "cell_feature_matrix.h5").unlink()
    with pytest.raises(DataError, match=r"cell_feature_matrix\.h5 is missing"):
        read_slide(folder)


def test_cells_of_cosmx(section, cells, tmp_path):
    places, counts, _ = cells
    alignment = np.array([[1 / 0.12028, 0, 300.0], [0, 1 / 0.12028, -40.0], [0, 0, 1]])
    pixels = (np.c_[places, np.ones(800)] @ alignment.T)[:, :2]
    names = pd.DataFrame({"fov": np.arange(800) % 4 + 1, "cell_ID": np.arange(800) + 1})
    outside = pd.DataFrame({"fov": [1], "cell_ID": [0]})
    table = pd.concat([names, pd.DataFrame(counts, columns=[*GENES[:-2], "NegPrb3", "SystemControl12"])], axis=1)
    pd.concat([outside, table]).fillna(7).to_csv(tmp_path / "run_exprMat_file.csv", index=False)
    places_of_cells = {"CenterX_global_px": pixels[:, 0], "CenterY_global_px": pixels[:, 1], "Area": 5000}
    names.assign(**places_of_cells).to_csv(tmp_path / "run_metadata_file.csv.gz", index=False)
    write_tiff(tmp_path / "he.tif", section.pixels)
    pd.DataFrame(alignment).to_csv(tmp_path / "he_alignment.csv", header=False, index=False)
    slide = build_slide(tmp_path)
    np.testing.assert_allclose(slide.obsm["spatial"], places, atol=1e-6)
    np.testing.assert_array_equal(slide.X.toarray(), counts[:, :-2])
    assert slide.uns["hinge"]["um_per_px"] == pytest.approx(1)
    assert [finding.code for finding in check_slide(slide)] == ["genes-controls"]


def test_segmented_cells_of_visium_hd(section, cells, tmp_path):
    places, counts, _ = cells
    folder = tmp_path / "HD" / "outs" / "segmented_outputs"
    (folder / "spatial").mkdir(parents=True)
    names = [f"cellid_{number:09d}-1" for number in range(1, 801)]
    write_matrix(folder / "filtered_feature_cell_matrix.h5", counts[::-1], names[::-1], GENES)
    rings = [[[x - 4, y - 4], [x + 4, y - 4], [x + 4, y + 4], [x - 4, y + 4], [x - 4, y - 4]] for x, y in places]
    features = [
        {"geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": {"cell_id": number}}
        for number, ring in enumerate(rings[:-1], 1)
    ]
    (folder / "cell_segmentations.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    write_thumbnails(folder / "spatial", section.pixels, microns_per_pixel=1.0)
    write_tiff(tmp_path / "HD" / "image.tif", section.pixels)
    assert list_samples(tmp_path / "HD") == ["HD_segmented"]
    slide = build_slide(tmp_path / "HD")
    assert slide.n_obs == 799 and slide.uns["hinge"]["source"]["left_out"] == {"without_outline": 1}
    np.testing.assert_allclose(slide[names[:799]].obsm["spatial"], places[:-1])
    np.testing.assert_array_equal(slide[names[:799]].X.toarray(), counts[:-1])
    assert slide.uns["hinge"]["um_per_px"] == 1 and check_slide(slide) == []
    assert read_slide(tmp_path / "HD", spot_um=55).X.sum() == counts[:-1].sum()
