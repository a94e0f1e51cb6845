import shutil

import numpy as np
import pandas as pd
import pytest
from helpers.visium import write_matrix, write_visium, write_visium_hd
from PIL import Image

from hinge.data import list_samples, read_slide, recognise_format
from hinge.data.patches import PatchReader
from hinge.utils.errors import DataError


@pytest.mark.parametrize("header", [True, False])
def test_visium_folder(tmp_path, header):
    positions, counts = write_visium(tmp_path / "V1" / "outs", header=header)
    for path in (tmp_path, tmp_path / "V1", tmp_path / "V1" / "outs"):
        assert recognise_format(path) == "visium" and list_samples(path) == ["V1"]
        slide = read_slide(path, "V1")
        np.testing.assert_array_equal(slide.X.toarray(), counts.toarray())
        assert list(slide.obs_names) == list(positions.index)
        np.testing.assert_array_equal(slide.obsm["spatial"], positions[["pxl_col_in_fullres", "pxl_row_in_fullres"]])
        np.testing.assert_array_equal(slide.obs[["array_row", "array_col"]], positions[["array_row", "array_col"]])
        facts = slide.uns["hinge"]
        assert facts["um_per_px"] == pytest.approx(1.0, rel=0.005)  # 100 µm are 100 px, rounded to whole pixels
        assert (facts["spot_pitch_um"], facts["spot_diameter_um"], facts["source_format"]) == (100, 55, "visium")
        assert facts["image_path"] == str(tmp_path / "V1" / "full.tif")
        assert slide.var["gene_ids"].iloc[0] == "ENSG00000000000"


def test_headers_are_known_by_what_they_say_not_by_the_files_name(tmp_path):
    write_visium(tmp_path / "V1")
    spatial = tmp_path / "V1" / "spatial"
    (spatial / "tissue_positions.csv").rename(spatial / "tissue_positions_list.csv")
    assert read_slide(tmp_path / "V1", image=tmp_path / "full.tif").n_obs == 38


def test_other_features_and_repeated_symbols(tmp_path):
    positions, _ = write_visium(tmp_path / "V1")
    counts = np.arange(38 * 4).reshape(38, 4)
    kinds = ["Gene Expression", "Gene Expression", "Antibody Capture", "Gene Expression"]
    write_matrix(
        tmp_path / "V1" / "V1_filtered_feature_bc_matrix.h5", counts, positions.index, ["A", "B", "CD3", "A"], kinds
    )
    (tmp_path / "V1" / "filtered_feature_bc_matrix.h5").unlink()
    slide = read_slide(tmp_path / "V1", image=tmp_path / "full.tif")
    assert list(slide.var_names) == ["A", "B", "A-1"] and list(slide.var["symbol"]) == ["A", "B", "A"]
    np.testing.assert_array_equal(slide.X.toarray(), counts[:, [0, 1, 3]])


def test_without_the_full_image_thumbnails_are_kept(tmp_path):
    write_visium(tmp_path / "V1" / "outs", image=False)
    slide = read_slide(tmp_path, require_image=False)
    library = slide.uns["spatial"]["V1"]
    assert "image_path" not in slide.uns["hinge"] and library["images"]["lowres"].shape == (600, 600, 3)
    assert library["scalefactors"]["spot_diameter_fullres"] == pytest.approx(55, rel=0.005)


def test_an_image_beside_several_samples_serves_none(tmp_path):
    for name in ("A", "B"):
        write_visium(tmp_path / name / "outs", image=False)
    Image.new("RGB", (900, 900)).save(tmp_path / "he.tif")
    with pytest.raises(DataError, match=r"A has no full-resolution image in .*A \(.*give the input image of Space"):
        read_slide(tmp_path, "A")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (
            lambda outs: (outs / "spatial" / "tissue_positions.csv").unlink(),
            r"spatial has no spot positions: one of tissue_positions\.parquet, tissue_positions\.csv, tissue_pos",
        ),
        (
            lambda outs: (outs / "spatial" / "scalefactors_json.json").unlink(),
            r"spatial has no scalefactors_json\.json",
        ),
        (
            lambda outs: (outs / "spatial" / "scalefactors_json.json").write_text("{"),
            r"scalefactors_json\.json is not a readable table of scale factors",
        ),
        (lambda outs: (outs / "filtered_feature_bc_matrix.h5").unlink(), r"outs has no counts: filtered_feature_bc"),
        (
            lambda outs: (outs / "filtered_feature_bc_matrix.h5").write_bytes(b"text"),
            r"filtered_feature_bc_matrix\.h5 is not readable as Space Ranger's counts",
        ),
        (
            lambda outs: write_matrix(
                outs / "filtered_feature_bc_matrix.h5", np.ones((2, 2)), ["A-1", "B-1"], ["X", "Y"]
            ),
            r"outs: the counts and spatial/ share no barcode",
        ),
        (lambda outs: (outs.parent / "full.tif").unlink(), r"V1 has no full-resolution image in .*V1 \("),
        (
            lambda outs: shutil.copy(outs.parent / "full.tif", outs.parent / "second.tif"),
            r"V1 has 2 images, not one: give the image with --image",
        ),
        (lambda outs: rewrite(outs, lambda table: table.drop(columns="array_row")), r"csv has no column array_row"),
        (
            lambda outs: rewrite(outs, lambda table: table.assign(pxl_row_in_fullres="left")),
            r"values in column pxl_row_in_fullres that are not numbers",
        ),
        (
            lambda outs: rewrite(outs, lambda table: pd.concat([table, table[:1]])),
            r"tissue_positions\.csv has barcode \w+-1 more than once",
        ),
        (
            lambda outs: rewrite(outs, lambda table: table.assign(pxl_row_in_fullres=table["pxl_row_in_fullres"] * 9)),
            r"38 of 38 spots lie outside the image",
        ),
        (lambda outs: rewrite(outs, lambda table: table.assign(in_tissue=0)), r"slide V1 has no spots"),
    ],
)
def test_visium_folders_that_are_wrong(tmp_path, spoil, sentence):
    outs = tmp_path / "V1" / "outs"
    write_visium(outs)
    spoil(outs)
    with pytest.raises(DataError, match=sentence) as error:
        read_slide(tmp_path)
    assert "\n" not in str(error.value)


def rewrite(outs, change):
    file = outs / "spatial" / "tissue_positions.csv"
    change(pd.read_csv(file)).to_csv(file, index=False)


@pytest.mark.full
def test_visium_of_full_size(tmp_path):
    """4,992 spots, 18,085 genes, an image of 8,900 x 8,900: what a 6.5 mm capture area gives."""
    write_visium(tmp_path / "V1" / "outs", rows=78, columns=128, genes=18_085, pitch_px=130.0, depth=0.08)
    slide = read_slide(tmp_path)
    assert slide.shape == (3993, 18_085) and slide.uns["hinge"]["um_per_px"] == pytest.approx(100 / 130, rel=1e-3)
    _, patches = next(iter(PatchReader(slide, patch_um=112, patch_px=224, batch_size=4)))
    assert patches.shape == (4, 224, 224, 3) and (patches == 200).all()


# --- Visium HD ------------------------------------------------------------------------------------------


def test_visium_hd_has_a_sample_for_each_bin_size(tmp_path):
    write_visium_hd(tmp_path / "HD1" / "outs")
    for path in (tmp_path, tmp_path / "HD1", tmp_path / "HD1" / "outs", tmp_path / "HD1" / "outs" / "binned_outputs"):
        assert recognise_format(path) == "visium"
        assert list_samples(path) == ["HD1_square_008um", "HD1_square_016um"]
        slide = read_slide(path, "HD1_square_008um")
        assert slide.shape == (390, 12)
        facts = slide.uns["hinge"]
        assert (facts["um_per_px"], facts["spot_pitch_um"], facts["spot_diameter_um"]) == (0.5, 8, 8)
        assert facts["source_format"] == "visium_hd" and facts["image_path"].endswith("he.tif")
        where = slide.obs_names.get_loc("s_008um_00002_00005-1")
        assert slide.obsm["spatial"][where].tolist() == [20 + 5.5 * 16, 30 + 2.5 * 16]
    with pytest.raises(DataError, match=r"no sample was named in .* which has HD1_square_008um, HD1_square_016um"):
        read_slide(tmp_path)


@pytest.mark.slow
def test_visium_hd_of_full_size(tmp_path):
    """A 6.5 mm capture area in 8 µm bins: 659,344 of them, 18,085 genes."""
    write_visium_hd(tmp_path / "HD1" / "outs", bins=(8,), area_um=6500, genes=18_085, per_spot=40)
    slide = read_slide(tmp_path)
    assert slide.n_obs == 812**2 - 10 and slide.uns["hinge"]["um_per_px"] == 0.5


# --- Space Ranger's own ---------------------------------------------------------------------------------


def test_a_folder_of_space_ranger_1(visium_tiny):
    """Without image, so neither pixels per µm nor the orientation come from our own generator."""
    assert recognise_format(visium_tiny) == "visium"
    slide = read_slide(visium_tiny, require_image=False)
    assert slide.shape == (100, 100) and slide.X.sum() > 0
    facts, library = slide.uns["hinge"], slide.uns["spatial"]["visium_tiny"]
    # Space Ranger says that 65 µm are 89.43 px
    assert facts["um_per_px"] == pytest.approx(65 / 89.42751063343188, rel=0.005)
    hires = library["images"]["hires"]
    assert hires.shape == (2000, 2000, 3)
    assert (slide.obsm["spatial"] * library["scalefactors"]["tissue_hires_scalef"] < 2000).all()
    with pytest.raises(DataError, match="visium_tiny has no full-resolution image"):
        read_slide(visium_tiny)
