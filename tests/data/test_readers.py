import gzip
import logging
import math
import shutil

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from PIL import Image

from hinge.data import list_samples, read_slide, recognise_format, slide_name
from hinge.data.slide import require_slide
from hinge.utils.errors import DataError

# --- h5ad -----------------------------------------------------------------------------------------------


def test_a_slide_has_what_the_contract_says(tiny_slide):
    slide = read_slide(tiny_slide)
    assert slide.shape == (30, 30) and slide_name(slide) == "tiny"
    assert isinstance(slide.X, scipy.sparse.csr_matrix) and slide.X.dtype == np.float32
    assert slide.obsm["spatial"].shape == (30, 2) and slide.obsm["spatial"].dtype == np.float64
    facts = dict(slide.uns["hinge"])
    assert facts.pop("source")["resolutions"] == {"metadata": 2.5, "array": 2.5}
    assert facts == {
        "name": "tiny",
        "image_path": str(tiny_slide.with_suffix(".png")),
        "um_per_px": 2.5,
        "spot_pitch_um": 100.0,
        "spot_diameter_um": 55.0,
        "source_format": "h5ad",
    }
    library = slide.uns["spatial"]["tiny"]
    assert library["images"]["hires"].shape == (260, 220, 3) and library["images"]["hires"].dtype == np.uint8
    assert library["scalefactors"]["tissue_hires_scalef"] == 1
    assert library["scalefactors"]["spot_diameter_fullres"] == 22


def test_large_images_are_shown_small(write_slide):
    path = write_slide()
    Image.new("RGB", (4000, 1000), "pink").save(path.with_suffix(".png"))
    library = read_slide(path).uns["spatial"]["tiny"]
    assert library["images"]["hires"].shape == (500, 2000, 3)
    assert library["images"]["lowres"].shape == (150, 600, 3)
    assert library["scalefactors"]["tissue_hires_scalef"] == 0.5
    assert library["scalefactors"]["tissue_lowres_scalef"] == 0.15


def test_a_slide_written_is_a_slide_read(tiny_slide, tmp_path):
    slide = read_slide(tiny_slide)
    slide.layers["expected"] = slide.X.toarray() / 3
    slide.uns["hinge_truth"] = {"depth": 4.0}
    slide.write_h5ad(tmp_path / "tiny.h5ad")
    again = read_slide(tmp_path / "tiny.h5ad")  # the image is found by its absolute path
    np.testing.assert_array_equal(again.X.toarray(), slide.X.toarray())
    np.testing.assert_array_equal(again.layers["expected"], slide.layers["expected"])
    assert again.uns["hinge"] == slide.uns["hinge"] and again.uns["hinge_truth"] == {"depth": 4.0}


def test_a_folder_of_slides(write_slide):
    for name in ("b", "a"):
        folder = write_slide(name=name).parent
    assert recognise_format(folder) == "h5ad" == recognise_format(folder / "a.h5ad")
    assert list_samples(folder) == ["a", "b"] and list_samples(folder / "b.h5ad", "h5ad") == ["b"]
    assert slide_name(read_slide(folder, "b")) == "b"
    with pytest.raises(DataError, match=r"there is no sample 'c' in .*slides, which has a, b$"):
        read_slide(folder, "c")
    with pytest.raises(DataError, match=r"no sample was named in .*slides, which has a, b$"):
        read_slide(folder)
    with pytest.raises(DataError, match=r"no sample 'b' in .*a\.h5ad, which has a$"):
        read_slide(folder / "a.h5ad", "b")


def test_counts_may_lie_in_a_layer(write_slide):
    def normalise(slide):
        slide.layers["counts"] = slide.X.copy()
        slide.X = np.log1p(slide.X.toarray())

    expected = read_slide(write_slide()).X.toarray()
    slide = read_slide(write_slide(edit=normalise))
    np.testing.assert_array_equal(slide.X.toarray(), expected)
    assert "counts" not in slide.layers


def test_no_raw_counts_anywhere(write_slide):
    def spoil(slide):
        slide.X = slide.X * 0.5

    with pytest.raises(
        DataError, match=r"tiny\.h5ad has no raw counts: it holds X, and none of them holds whole numbers only; raw"
    ):
        read_slide(write_slide(edit=spoil))

    def drop(slide):
        slide.X = None

    with pytest.raises(DataError, match="no raw counts: it holds nothing, and"):
        read_slide(write_slide(edit=drop))


def test_um_per_px_in_order_of_precedence(write_slide):
    def without(*keys):
        def edit(slide):
            for key in keys:
                slide.uns["hinge"].pop(key)

        return edit

    assert read_slide(write_slide(), um_per_px=0.7).uns["hinge"]["um_per_px"] == 0.7
    path = write_slide(edit=without("um_per_px"))
    assert read_slide(path).uns["hinge"]["um_per_px"] == pytest.approx(100 / 40)

    path = write_slide(name="bare", edit=without("um_per_px", "spot_pitch_um", "spot_diameter_um"))
    with pytest.raises(DataError, match=r"neither .*bare\.h5ad nor its image contains the resolution: give"):
        read_slide(path)
    described = read_slide(path, um_per_px=0.5).uns
    assert described["hinge"]["spot_pitch_um"] == pytest.approx(20)
    assert math.isnan(described["hinge"]["spot_diameter_um"])
    assert described["spatial"]["bare"]["scalefactors"]["spot_diameter_fullres"] == pytest.approx(20)
    picture = Image.open(path.with_suffix(".png"))
    picture.save(path.with_suffix(".tif"), resolution_unit="cm", x_resolution=20_000, y_resolution=20_000)
    assert read_slide(path).uns["hinge"]["um_per_px"] == pytest.approx(0.5)
    for wrong in (0, -1, math.nan, math.inf):
        with pytest.raises(DataError, match="--um-per-px takes a positive number"):
            read_slide(path, um_per_px=wrong)


def test_spot_diameter_of_a_scanpy_file(write_slide):
    def scanpy_style(slide):
        slide.uns["hinge"] = {"um_per_px": 0.5}
        slide.uns["spatial"] = {"ST": {"images": {}, "scalefactors": {"spot_diameter_fullres": 110.0}}}

    slide = read_slide(write_slide(edit=scanpy_style))
    assert slide.uns["hinge"]["spot_diameter_um"] == 55 and list(slide.uns["spatial"]) == ["tiny"]


def test_which_image(write_slide, tmp_path):
    path = write_slide()
    moved = tmp_path / "elsewhere.png"
    shutil.move(path.with_suffix(".png"), moved)
    with pytest.raises(DataError, match=r"tiny\.h5ad has no image: there is no tiny\{\.svs,.*give --image"):
        read_slide(path)
    assert read_slide(path, image=moved).uns["hinge"]["image_path"] == str(moved)

    def name_it(slide):
        slide.uns["hinge"]["image_path"] = "../elsewhere.png"

    path = write_slide(name="other", edit=name_it)
    assert read_slide(path).uns["hinge"]["image_path"].endswith("elsewhere.png")
    moved.unlink()  # the file was copied here from another machine: the image beside it serves
    assert read_slide(path).uns["hinge"]["image_path"] == str(path.with_suffix(".png"))
    path.with_suffix(".png").unlink()
    with pytest.raises(DataError, match=r"image_path'\] \.\./elsewhere\.png does not exist and there is no other"):
        read_slide(path)
    with pytest.raises(DataError, match=r"there is no image file .*nowhere\.png"):
        read_slide(path, image=tmp_path / "nowhere.png")


def test_without_image(write_slide):
    path = write_slide(edit=lambda slide: slide.uns.pop("hinge"))
    path.with_suffix(".png").unlink()
    slide = read_slide(path, require_image=False)
    assert "image_path" not in slide.uns["hinge"] and "spatial" not in slide.uns
    assert math.isnan(slide.uns["hinge"]["um_per_px"])
    with pytest.raises(DataError, match="slide tiny has no image: give one with --image"):
        require_slide(slide)
    slide.write_h5ad(path)
    assert read_slide(path, require_image=False).shape == slide.shape


def test_a_spot_on_the_images_edge_is_fine(write_slide):
    def move(slide):
        slide.obsm["spatial"][0] = (0, 0)
        slide.obsm["spatial"][1] = (220, 260)

    assert read_slide(write_slide(edit=move)).n_obs == 30


def test_an_empty_spot_is_fine(write_slide):
    def empty(slide):
        slide.X = slide.X.toarray() * (np.arange(30) > 0)[:, None]

    assert read_slide(write_slide(edit=empty)).X[0].sum() == 0


def test_damaged_files(tiny_slide):
    data = tiny_slide.read_bytes()
    for damaged in (data[: len(data) // 2], b"", b"text"):
        tiny_slide.write_bytes(damaged)
        with pytest.raises(DataError, match=r"tiny\.h5ad is not a readable h5ad file"):
            read_slide(tiny_slide)
    tiny_slide.write_bytes(data)
    picture = tiny_slide.with_suffix(".png")
    picture.write_bytes(picture.read_bytes()[:20_000])
    with pytest.raises(DataError, match=r"tiny\.png is damaged"):
        read_slide(tiny_slide)


def test_h5ad_without_coordinates(write_slide):
    with pytest.raises(DataError, match=r"needs pixel x and y of each spot, shape \(30, 2\), in obsm\['spatial'\]"):
        read_slide(write_slide(edit=lambda slide: slide.obsm.pop("spatial")))


# --- validation -----------------------------------------------------------------------------------------


def set_count(value):
    def edit(slide):
        slide.X = slide.X.toarray()
        slide.X[3, 7] = value

    return edit


def set_coordinate(value):
    def edit(slide):
        slide.obsm["spatial"][4] = value

    return edit


def rename(axis, names):
    def edit(slide):
        setattr(slide, axis, names)

    return edit


GENES = [f"GENE{i}" for i in range(30)]
BARCODES = [f"{x}x{y}" for y in range(6) for x in range(5)]


@pytest.mark.filterwarnings("ignore:.*names are not unique")
@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (set_count(-2), r"slide tiny, spot 3x0, gene GENE7: count -2 is below 0 \(1 such counts\)"),
        (set_count(np.nan), r"slide tiny, spot 3x0, gene GENE7: count nan is not a finite number"),
        (set_count(np.inf), r"slide tiny, spot 3x0, gene GENE7: count inf is not a finite number"),
        (
            rename("var_names", [*GENES[:29], "GENE3"]),
            r"slide tiny has gene GENE3 more than once: every gene must",
        ),
        (
            rename("obs_names", [*BARCODES[:28], "0x0", "1x0"]),
            r"slide tiny has barcode 0x0 more than once \(and 1 others\)",
        ),
        (
            set_coordinate(np.nan),
            r"slide tiny, spot 4x0: its coordinates are not finite numbers \(1 such spots\)",
        ),
    ],
)
def test_what_validation_says(write_slide, edit, sentence):
    with pytest.raises(DataError, match=sentence) as error:
        read_slide(write_slide(edit=edit))
    assert "\n" not in str(error.value)


def test_no_spots_or_no_genes(tiny_slide):
    for part, sentence in ((np.s_[:0], "has no spots"), (np.s_[:, :0], "has no genes")):
        whole = read_slide(tiny_slide)
        whole[part].copy().write_h5ad(tiny_slide)
        with pytest.raises(DataError, match=f"slide tiny {sentence}"):
            read_slide(tiny_slide)
        whole.write_h5ad(tiny_slide)


def test_validation_of_slides_made_in_memory(tiny_slide):
    slide = read_slide(tiny_slide)
    slide.X[3, 7] = 0.5
    with pytest.raises(DataError, match=r"GENE7: count 0\.5 is not an integer, and raw counts are needed"):
        require_slide(slide)
    slide.X = slide.X.toarray()
    with pytest.raises(DataError, match=r"spot 3x0, gene GENE7: count 0\.5 is not an integer"):
        require_slide(slide)
    slide.X = None
    with pytest.raises(DataError, match="slide tiny has no counts in X"):
        require_slide(slide)
    slide = read_slide(tiny_slide)
    slide.uns["hinge"]["um_per_px"] = math.nan
    with pytest.raises(DataError, match="has nan µm per pixel, and a positive number is needed: give --um-per-px"):
        require_slide(slide)
    slide.obsm["spatial"] = slide.obsm["spatial"][:, :1]
    with pytest.raises(DataError, match=r"needs numbers of shape \(30, 2\), pixel x and y, .* not float64 \(30, 1\)"):
        require_slide(slide)
    del slide.obsm["spatial"]
    with pytest.raises(DataError, match="has no spot coordinates"):
        require_slide(slide)
    with pytest.raises(DataError, match="this AnnData is not a slide"):
        require_slide(anndata.AnnData(np.ones((2, 2))))


# --- her2st ---------------------------------------------------------------------------------------------


@pytest.fixture
def array_section(tmp_path):
    """Section Z1 in the layout of her2st: 50 px between spots, the array turned by 2°, one spot misplaced."""
    rng = np.random.default_rng(0)
    x, y = (grid.ravel() for grid in np.meshgrid(np.arange(3, 10), np.arange(5, 11)))
    turn = np.deg2rad(2)
    pixels = 50 * np.stack([x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)], axis=1)
    pixels += rng.normal(0, 2, pixels.shape)
    pixels[20] += 200
    table = pd.DataFrame({"x": x, "y": y, "new_x": x, "new_y": y, "pixel_x": pixels[:, 0], "pixel_y": pixels[:, 1]})
    table["selected"] = 1
    counts = pd.DataFrame(
        rng.poisson(2, (42, 6)), index=[f"{i}x{j}" for i, j in zip(x, y, strict=True)], columns=list("ABCDEF")
    )
    root = tmp_path / "her2st"
    for folder in ("ST-cnts", "ST-spotfiles", "ST-imgs/Z/Z1"):
        (root / "data" / folder).mkdir(parents=True)
    tissue = np.random.default_rng(0).integers(100, 255, (900, 900, 3), dtype=np.uint8)
    Image.fromarray(tissue).save(root / "data/ST-imgs/Z/Z1/section.jpg")

    def write(counts=counts, table=table):
        counts.to_csv(root / "data/ST-cnts/Z1.tsv.gz", sep="\t")
        table.to_csv(root / "data/ST-spotfiles/Z1_selection.tsv", sep="\t", index=False)
        return root

    return write, counts, table


def test_her2st_section(array_section):
    write, counts, table = array_section
    root = write(counts=counts[::-1])
    for path in (root, root / "data"):
        assert recognise_format(path) == "her2st" and list_samples(path) == ["Z1"]
        slide = read_slide(path)
        assert list(slide.obs_names) == list(counts.index[::-1]) and list(slide.var_names) == list("ABCDEF")
        np.testing.assert_array_equal(slide.X.toarray(), counts[::-1])
        np.testing.assert_allclose(slide.obsm["spatial"], table[["pixel_x", "pixel_y"]][::-1])
        assert slide.obs["array_x"].tolist() == table["x"][::-1].tolist()
        facts = slide.uns["hinge"]
        assert facts["um_per_px"] == pytest.approx(200 / 50, rel=0.005)
        assert (facts["spot_pitch_um"], facts["spot_diameter_um"]) == (200, 100)
        assert facts["image_path"].endswith("section.jpg") and facts["source_format"] == "her2st"


def test_her2st_keeps_selected_spots_with_counts(array_section, caplog):
    write, counts, table = array_section
    table.loc[[0, 1], "selected"] = 0
    with caplog.at_level(logging.INFO, logger="hinge"):
        slide = read_slide(write(counts=counts.drop(index="5x5"), table=table))
    assert list(slide.obs_names) == [name for name in counts.index[2:] if name != "5x5"]
    assert "Z1: left out 1 selected spots without counts and 2 spots with counts that are not sel" in caplog.text


def test_her2st_without_image(array_section):
    write, *_ = array_section
    root = write()
    picture = root / "data/ST-imgs/Z/Z1/section.jpg"
    shutil.copy(picture, picture.with_name("second.jpg"))
    with pytest.raises(DataError, match=r"Z1 has 2 images, not one: give the image with --image"):
        read_slide(root)
    assert read_slide(root, image=picture).n_obs == 42
    shutil.rmtree(picture.parent)
    with pytest.raises(DataError, match=r"there is no image in .*Z1: give --image"):
        read_slide(root)
    slide = read_slide(root, require_image=False)
    assert "image_path" not in slide.uns["hinge"] and slide.uns["hinge"]["um_per_px"] == pytest.approx(4, rel=0.01)


def test_her2st_spots_of_another_section(array_section):
    write, _, table = array_section
    with pytest.raises(DataError, match="slide Z1 has no spots"):
        read_slide(write(table=table.assign(x=table["x"] + 100)))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda counts: counts.rename(columns={"B": "A"}), "slide Z1 has gene A more than once"),
        (lambda counts: counts.rename(index={"4x5": "3x5"}), r"Z1\.tsv\.gz has spot 3x5 more than once"),
        (lambda counts: counts.assign(C="many"), r"Z1\.tsv\.gz has counts of gene C that are not numbers"),
        (lambda counts: counts - 1, r"slide Z1, spot \dx\d, gene [A-F]: count -1 is below 0"),
        (lambda counts: counts / 3, r"slide Z1, spot \dx\d, gene [A-F]: count \d\.\d+ is not an integer"),
        (
            lambda counts: counts.where(counts < 4),
            r"slide Z1, spot \d+x\d, gene [A-F]: count nan is not a finite",
        ),
    ],
)
def test_her2st_counts_that_are_wrong(array_section, change, sentence):
    write, counts, _ = array_section
    with pytest.raises(DataError, match=sentence):
        read_slide(write(counts=change(counts)))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda table: table.drop(columns="pixel_x"),
            r"Z1_selection\.tsv has no column pixel_x; it needs x, y",
        ),
        (lambda table: table.assign(pixel_x="left"), "values in column pixel_x that are not numbers"),
        (lambda table: table.assign(x=np.nan), "a spot without array coordinates"),
        (lambda table: pd.concat([table, table[:1]]), "Z1_selection.tsv has spot 3x5 more than once"),
        (lambda table: table.assign(pixel_y=np.nan), "slide Z1, spot 3x5: its coordinates are not finite"),
        (
            lambda table: table.assign(pixel_y=table["pixel_y"] * 9),
            r"of \d+ spots lie outside the image",
        ),
    ],
)
def test_her2st_positions_that_are_wrong(array_section, change, sentence):
    write, _, table = array_section
    with pytest.raises(DataError, match=sentence):
        read_slide(write(table=change(table)))


def test_her2st_damaged_files(array_section):
    write, *_ = array_section
    root = write()
    file = root / "data/ST-cnts/Z1.tsv.gz"
    data = file.read_bytes()
    ragged = gzip.compress(gzip.decompress(data) + b"9x9\t1\t2\t3\t4\t5\t6\t7\n")
    for damaged in (data[: len(data) // 2], b"text", b"", gzip.compress(b""), ragged):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=r"Z1\.tsv\.gz is not a readable table of counts"):
            read_slide(root)
    file.write_bytes(data)
    (root / "data/ST-spotfiles/Z1_selection.tsv").unlink()
    with pytest.raises(DataError, match=r"Z1_selection\.tsv is not a readable table of spot positions"):
        read_slide(root)


# --- which format ---------------------------------------------------------------------------------------


def test_unknown_formats_list_what_there_is(tmp_path):
    with pytest.raises(DataError, match=r"there is no file or folder .*nowhere"):
        read_slide(tmp_path / "nowhere", format="h5ad")
    with pytest.raises(
        DataError, match=r"no slides in a known format: it has no files\. Known formats are her2st, hest"
    ):
        read_slide(tmp_path)
    (tmp_path / "spatial").mkdir()
    (tmp_path / "notes.txt").write_text("")
    nearest = r"it has notes\.txt, spatial/\. The nearest layout is Visium, which lacks filtered_feature_bc_matrix\.h5"
    with pytest.raises(DataError, match=nearest):
        read_slide(tmp_path)
    (tmp_path / "V1.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"holds no slides in a known format\. .* lacks unpacking: tar -xf\.$"):
        read_slide(tmp_path / "V1.tar.gz")
    with pytest.raises(DataError, match="there is no format 'merfish'; choose one of her2st, hest, "):
        read_slide(tmp_path, format="merfish")
    with pytest.raises(DataError, match=r"no sample was named in .* which has none"):
        read_slide(tmp_path, format="h5ad")


# --- real data ------------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.parametrize("samples", [["A1", "C1", "D5", "F3"], pytest.param(None, id="all", marks=pytest.mark.slow)])
def test_real_sections_read(her2st, samples):
    counts = {file.name.split(".")[0] for file in (her2st / "data" / "ST-cnts").glob("*.tsv.gz")}
    assert set(list_samples(her2st)) == counts >= {"A1", "C1", "D5", "F3"}
    for sample in samples or counts:
        slide = read_slide(her2st, sample, require_image=False)
        assert 170 < slide.n_obs < 720 and 14_800 < slide.n_vars < 15_900
        pitch_px = 200 / slide.uns["hinge"]["um_per_px"]
        assert pitch_px == pytest.approx(218.0 if sample.startswith("A") else 291.0, rel=0.01)


@pytest.mark.full
@pytest.mark.real
def test_real_section_with_image(her2st):
    slide = read_slide(her2st, "C2")
    assert slide.shape == (187, 15706) and int(slide.X.max()) == 368
    images = slide.uns["spatial"]["C2"]["images"]
    assert max(images["hires"].shape) == 2000 and max(images["lowres"].shape) == 600
    # spots lie on tissue: stained there, bright glass elsewhere
    scale = slide.uns["spatial"]["C2"]["scalefactors"]["tissue_hires_scalef"]
    x, y = (slide.obsm["spatial"] * scale).astype(int).T
    assert images["hires"][y, x, 1].mean() < 0.75 * np.median(images["hires"][..., 1])
    with pytest.raises(DataError, match=r"there is no image in .*ST-imgs/A/A1"):
        read_slide(her2st, "A1")
