"""Inputs as public bug reports describe them: each ends in the right values or in a finding that says what to do."""

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import tifffile
from helpers.sections import make_section, positions_table, write_h5ad, write_hest, write_outs, write_tiff
from helpers.visium import write_matrix

from hinge.data.checks import check_slide
from hinge.data.features import read_features_at
from hinge.data.panel import select_panel
from hinge.data.readers import build_slide, list_samples, read_slide
from hinge.data.slide_image import SlideImage
from hinge.utils.errors import DataError


@pytest.fixture(scope="module")
def section():
    return make_section()


def codes(path, sample=None, **options):
    """Level and code of every finding of a slide."""
    return [(finding.level, finding.code) for finding in check_slide(build_slide(path, sample, **options))]


def test_a_section_as_it_should_be_has_no_findings(section, tmp_path):
    write_outs(section, tmp_path)
    slide = build_slide(tmp_path)
    assert check_slide(slide) == [] and slide.n_obs == section.on_tissue.sum() and slide.uns["hinge"]["um_per_px"] == 1


# --- the image ------------------------------------------------------------------------------------------


def test_image_turned_by_half(section, tmp_path):
    write_outs(section, tmp_path)
    write_tiff(tmp_path / "image.tif", section.pixels[::-1, ::-1])
    assert codes(tmp_path)[0] == ("error", "image-orientation")


def test_fluorescence_channels_as_pages(section, tmp_path):
    write_outs(section, tmp_path)
    channels = np.stack([255 - section.pixels[..., 0]] * 5)
    tifffile.imwrite(tmp_path / "image.tif", channels, photometric="minisblack", compression="zlib")
    finding = check_slide(build_slide(tmp_path))[0]
    assert (
        finding.code == "image-channels" and "5 pages of one channel" in finding.message and "--image" in finding.action
    )


def test_12_bits_in_16(section, tmp_path):
    write_outs(section, tmp_path)
    write_tiff(tmp_path / "image.tif", section.pixels.astype(np.uint16) * 16)
    assert codes(tmp_path) == [("error", "image-bits")]


def test_alpha_zero(section, tmp_path):
    write_outs(section, tmp_path)
    transparent = np.dstack([section.pixels, np.zeros(section.pixels.shape[:2], np.uint8)])
    write_tiff(tmp_path / "image.tif", transparent, extrasamples=["unassalpha"])
    assert codes(tmp_path) == [("error", "image-blank")]


@pytest.mark.parametrize(
    "options", [{"tile": (256, 256)}, {"rowsperstrip": 64}, {"tile": (256, 256), "compression": None}]
)
@pytest.mark.parametrize("orientation", [3, 6])
def test_an_orientation_tag_turns_nothing(section, tmp_path, options, orientation):
    write_outs(section, tmp_path)
    tag = (274, "H", 1, orientation, True)
    write_tiff(tmp_path / "image.tif", section.pixels, extratags=[tag], **options)
    assert codes(tmp_path) == [("warning", "image-rotated-tag")]
    with SlideImage(tmp_path / "image.tif") as image:
        np.testing.assert_array_equal(image.read_pixels(100, 50, 900, 700), section.pixels[50:750, 100:1000])


def test_ome_tiff_with_the_macro_image_first(section, tmp_path):
    with tifffile.TiffWriter(tmp_path / "slide.ome.tif") as file:
        for pixels, um in ((section.pixels[::8, ::8], 8.0), (section.pixels, 0.25)):
            metadata = {"axes": "YXS", "PhysicalSizeX": um, "PhysicalSizeY": um}
            file.write(pixels, photometric="rgb", metadata=metadata)
    with SlideImage(tmp_path / "slide.ome.tif") as image:
        assert image.um_per_px == 0.25 and image.dimensions == (1600, 1300)


# --- positions ------------------------------------------------------------------------------------------


def test_spatial_of_another_section(section, tmp_path):
    outs = write_outs(section, tmp_path)
    table = positions_table(section)
    table["in_tissue"] = np.roll(table["in_tissue"].to_numpy(), 60)
    table.to_csv(outs / "spatial" / "tissue_positions.csv", index=False)
    assert ("error", "barcodes-off-tissue") in codes(tmp_path)


def test_positions_with_a_quoted_header_or_an_index(section, tmp_path):
    outs = write_outs(section, tmp_path)
    file, table = outs / "spatial" / "tissue_positions.csv", positions_table(section)
    expected = build_slide(tmp_path).obsm["spatial"]
    for write in (
        lambda: table.to_csv(file, index=True),
        lambda: table.to_csv(file, index=False, quoting=1),
        lambda: table.to_csv(file, index=False, encoding="utf-8-sig"),
        lambda: table.to_csv(file, index=False, sep=";"),
        lambda: table.set_index("barcode").to_csv(file, index_label=""),
        lambda: table.to_csv(file, index=True, header=False),
        lambda: table.rename(columns=str.upper).to_csv(file, index=False),
        lambda: file.write_text('"' + '","'.join(table.columns) + '"\n' + table.to_csv(index=False, header=False)),
    ):
        write()
        np.testing.assert_array_equal(build_slide(tmp_path).obsm["spatial"], expected)
        assert codes(tmp_path) == []


def test_hest_spots_outside(section, tmp_path):
    def shift(slide):
        slide.obsm["spatial"][:8, 0] = -5.0

    write_hest(section, tmp_path, shift)
    slide = build_slide(tmp_path)
    assert slide.n_obs == section.on_tissue.sum() - 8 and codes(tmp_path) == [("warning", "spots-outside")]


def test_h5ad_of_the_raw_matrix(section, tmp_path):
    file = write_h5ad(section, tmp_path, spots="all")
    slide = build_slide(file)
    assert slide.n_obs == section.on_tissue.sum() and codes(file) == [("warning", "spots-off-tissue")]


# --- the resolution -------------------------------------------------------------------------------------


def test_a_tag_against_the_array(section, tmp_path):
    options = {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}
    file = write_h5ad(section, tmp_path, **options)
    slide = build_slide(file)
    assert slide.uns["hinge"]["um_per_px"] == pytest.approx(1)
    (finding,) = check_slide(slide)
    assert finding.code == "resolution-contradiction" and "0.5" in finding.message and "tag" in finding.message
    # a value that the spots confirm goes on, and the tag is still told of
    assert codes(file, um_per_px=1.0) == [("warning", "resolution-contradiction")]
    assert codes(file, um_per_px=0.5) == [("error", "resolution-contradiction")]


def test_hest_metadata_against_the_pitch(section, tmp_path):
    write_hest(section, tmp_path, pixel_size_um_estimated=0.584)
    assert codes(tmp_path) == [("error", "resolution-contradiction")]
    assert codes(tmp_path, um_per_px=1.0) == [("warning", "resolution-contradiction")]


# --- counts and genes -----------------------------------------------------------------------------------


def test_counts_in_raw(section, tmp_path):
    def normalise(slide):
        slide.raw = slide.copy()
        slide.X = slide.X.log1p()

    file = write_h5ad(section, tmp_path, normalise)
    slide = build_slide(file)
    np.testing.assert_array_equal(slide.X.toarray(), section.counts[section.on_tissue])
    assert codes(file) == [("warning", "counts-elsewhere")]


def test_control_features_of_xenium(section, tmp_path):
    names = [
        "NegControlProbe_00042",
        "NegControlCodeword_0500",
        "BLANK_0069",
        "antisense_ERBB2",
        "UnassignedCodeword_1",
    ]

    def rename(slide):
        slide.var_names = [*slide.var_names[:-5], *names]

    write_hest(section, tmp_path, rename, st_technology="Xenium")
    slide = build_slide(tmp_path)
    assert not set(names) & set(slide.var_names) and slide.n_vars == 55
    np.testing.assert_array_equal(slide.X.sum(axis=1).A1, section.counts[section.on_tissue, :-5].sum(axis=1))
    assert codes(tmp_path) == [("warning", "genes-controls")]


def test_two_genomes(section, tmp_path):
    outs = write_outs(section, tmp_path)
    kept = section.on_tissue
    mouse = [f"mm10___Gene{number}" for number in range(60)]
    counts = np.hstack([section.counts[kept], section.counts[kept] // 2])
    names = [f"GRCh38_{gene}" for gene in section.genes] + mouse
    write_matrix(outs / "filtered_feature_bc_matrix.h5", counts, np.array(section.barcodes)[kept], names)
    slide = build_slide(tmp_path)
    assert list(slide.var_names) == section.genes and codes(tmp_path) == [("warning", "genes-two-genomes")]
    panel = select_panel([slide], n_genes=40)
    assert not {"MT-ND1", "RPS3"} & set(panel.genes)


# --- other layouts --------------------------------------------------------------------------------------


def test_segmented_cells_without_outlines(section, tmp_path):
    folder = tmp_path / "outs" / "segmented_outputs"
    folder.mkdir(parents=True)
    names = [f"cellid_{number:09d}-1" for number in range(50)]
    write_matrix(folder / "filtered_feature_cell_matrix.h5", section.counts[:50], names, section.genes)
    (folder / "cell_segmentations.geojson").write_text('{"type":"FeatureCollection","features":[]}')
    write_tiff(tmp_path / "image.tif", section.pixels)
    with pytest.raises(
        DataError, match="has the outlines of 0 cells, and none of them is one of the 50 cells with counts"
    ):
        read_slide(tmp_path)


@pytest.mark.parametrize("head", ["slide,counts,age", "slide;counts;age", "Slide,COUNTS,age", "slide\tcounts\tage"])
def test_cohort_tables_of_other_programs(section, tmp_path, head):
    write_outs(section, tmp_path / "S")
    separator = next(each for each in ",;\t" if each in head)
    (tmp_path / "cohort.csv").write_text(f"{head}\n{separator.join(['A', 'S', '61'])}\n")
    assert list_samples(tmp_path / "cohort.csv") == ["A"] and codes(tmp_path / "cohort.csv") == []


def test_clam_features_without_attributes(tmp_path, caplog):
    with h5py.File(tmp_path / "slide.h5", "w") as file:
        x, y = (grid.ravel() for grid in np.meshgrid(np.arange(25) * 56, np.arange(25) * 56))
        file["coords"], file["features"] = np.stack([x, y], axis=1), np.random.default_rng(0).random((625, 8))
    read_features_at(tmp_path / "slide.h5", np.array([[150.0, 120.0]]))
    assert "no patch size" in caplog.text and "overlap" in caplog.text


@pytest.mark.filterwarnings("ignore")
def test_spatialdata_of_labels_and_of_thumbnails(section, tmp_path):
    spatialdata = pytest.importorskip("spatialdata")
    from spatialdata.models import Image2DModel, Labels2DModel, TableModel

    slide = section.adata()
    labels = np.zeros(section.pixels.shape[:2], np.int32)
    for number, (x, y) in enumerate(slide.obsm["spatial"], 1):
        labels[round(y) - 20 : round(y) + 21, round(x) - 20 : round(x) + 21] = number
    table = anndata.AnnData(
        scipy.sparse.csr_matrix(slide.X), obs=pd.DataFrame(index=slide.obs_names), var=slide.var[[]]
    )
    table.obs["region"] = pd.Categorical(["cell_labels"] * slide.n_obs)
    table.obs["instance"] = np.arange(1, slide.n_obs + 1)
    spatialdata.SpatialData(
        images={"he": Image2DModel.parse(section.pixels, dims=("y", "x", "c"))},
        labels={"cell_labels": Labels2DModel.parse(labels, dims=("y", "x"))},
        tables={"table": TableModel.parse(table, region="cell_labels", region_key="region", instance_key="instance")},
    ).write(tmp_path / "labels.zarr")
    with pytest.raises(DataError, match="does not contain the resolution: give --um-per-px"):
        read_slide(tmp_path / "labels.zarr")
    again = build_slide(tmp_path / "labels.zarr", um_per_px=1.0)
    np.testing.assert_allclose(again.obsm["spatial"], slide.obsm["spatial"].round() + 0.5)
    assert codes(tmp_path / "labels.zarr", um_per_px=1.0) == []


@pytest.mark.filterwarnings("ignore")
def test_spatialdata_without_the_full_image(section, tmp_path):
    pytest.importorskip("spatialdata")
    spatialdata_io = pytest.importorskip("spatialdata_io")
    outs = write_outs(section, tmp_path / "V1", image=False)
    spatialdata_io.visium(outs, dataset_id="V1").write(tmp_path / "V1.zarr")
    found = codes(tmp_path / "V1.zarr")
    assert ("warning", "image-thumbnail") in found and ("warning", "image-coarse") in found
