"""Each output is opened by the tool that it is for."""

import json
import os
import shutil
import subprocess

import anndata
import matplotlib
import numpy as np
import pandas as pd
import pytest
import scanpy
import zarr
from helpers.visium import write_visium
from PIL import Image

from hinge.data import draws as draws_module
from hinge.data import read_slide
from hinge.data.draws import draws_files, draws_of_slide, read_draws, write_draws
from hinge.data.layers import named_layers
from hinge.data.writers import (
    attach_draws,
    write_cellxgene,
    write_draws_zarr,
    write_geojson,
    write_spatialdata,
    write_vitessce,
)
from hinge.utils.errors import ConfigError, DataError

matplotlib.use("Agg")

ABOUT = {"transform": "log2p1", "seed": 0, "draws": 3, "steps": 4}
GENES = ["GENE3", "GENE0", "GENE7"]
TERMS = {
    "organism_ontology_term_id": "NCBITaxon:9606",
    "tissue_ontology_term_id": "UBERON:0000310",
    "disease_ontology_term_id": "MONDO:0007254",
    "assay_ontology_term_id": "EFO:0022857",
}


def draw(slide, path, genes=GENES, n_draws=3):
    values = np.random.default_rng(0).gamma(2, 1, (n_draws, slide.n_obs, len(genes))).astype(np.float32)
    write_draws(path, draws_of_slide(values, values.mean(axis=0), slide, genes, {**ABOUT, "draws": n_draws}))
    return values


@pytest.fixture
def drawn(tiny_slide, tmp_path):
    """Path of the draws' h5ad, and the draws (3, 30, 3)."""
    values = draw(read_slide(tiny_slide), tmp_path / "samples" / "tiny.h5ad")
    return tmp_path / "samples" / "tiny.h5ad", values


# --- h5ad -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_squidpy_plots_the_h5ad_as_it_is(drawn):
    squidpy = pytest.importorskip("squidpy")
    path, values = drawn
    draws = anndata.read_h5ad(path)
    figure, axes = matplotlib.pyplot.subplots()
    squidpy.pl.spatial_scatter(draws, color="GENE3", ax=axes)
    (picture,) = axes.images
    assert picture.get_array().shape[:2] == (260, 220)
    (spots,) = axes.collections
    np.testing.assert_allclose(spots.get_array(), values.mean(axis=0)[:, 0], rtol=1e-5)
    places = np.array([patch.vertices.mean(axis=0) for patch in spots.get_paths()])
    np.testing.assert_allclose(places, draws.obsm["spatial"], atol=6)
    squidpy.pl.spatial_scatter(draws, color="GENE3", layer="std", img_res_key="lowres", ax=axes)
    matplotlib.pyplot.close(figure)


@pytest.mark.filterwarnings("ignore")
def test_scanpy_plots_the_h5ad_as_it_is(drawn):
    path, values = drawn
    draws = anndata.read_h5ad(path)
    axes = scanpy.pl.spatial(draws, color=["GENE0", "GENE7"], layer="draw_001", sort_order=False, show=False)
    for column, each in zip((1, 2), axes, strict=True):
        np.testing.assert_allclose(each.collections[0].get_array(), values[1, :, column], rtol=1e-6)
    matplotlib.pyplot.close("all")


# --- GeoJSON --------------------------------------------------------------------------------------------


def test_geojson_for_qupath(drawn, tmp_path):
    path, values = drawn
    written = json.loads(write_geojson(read_draws(path), tmp_path / "tiny.geojson", ["GENE7"]).read_text())
    assert written["type"] == "FeatureCollection" and len(written["features"]) == 30
    ids = {feature["id"] for feature in written["features"]}
    assert len(ids) == 30
    slide = read_draws(path)
    for number, feature in enumerate(written["features"]):
        ring = np.array(feature["geometry"]["coordinates"][0])
        assert feature["type"] == "Feature" and feature["geometry"]["type"] == "Polygon"
        assert ring.shape == (25, 2) and (ring[0] == ring[-1]).all()
        np.testing.assert_allclose(ring[:-1].mean(axis=0), slide.obsm["spatial"][number], atol=0.01)
        # 55 µm at 2.5 µm/px
        np.testing.assert_allclose(np.linalg.norm(ring - slide.obsm["spatial"][number], axis=1), 11, atol=0.01)
        facts = feature["properties"]
        assert facts["objectType"] == "detection" and facts["name"] == slide.obs_names[number]
        assert set(facts["measurements"]) == {"GENE7 mean", "GENE7 sd"}
        assert facts["measurements"]["GENE7 mean"] == pytest.approx(values[:, number, 2].mean(), rel=1e-4)
        assert facts["measurements"]["GENE7 sd"] == pytest.approx(values[:, number, 2].std(), rel=1e-4)
    again = write_geojson(read_draws(path), tmp_path / "again.geojson", ["GENE7"])
    assert again.read_bytes() == (tmp_path / "tiny.geojson").read_bytes()


def test_geojson_has_the_share_of_draws_above_a_threshold(drawn, tmp_path):
    draws = read_draws(drawn[0])
    content = json.loads(write_geojson(draws, tmp_path / "a.geojson", GENES[:1], threshold=1.5).read_text())
    shares = [feature["properties"]["measurements"][f"{GENES[0]} P(> 1.5)"] for feature in content["features"]]
    column = draws.var_names.get_loc(GENES[0])
    each = [np.asarray(draws.layers[f"draw_{k:03d}"])[:, column] > 1.5 for k in range(3)]
    np.testing.assert_allclose(shares, np.mean(each, axis=0), atol=1e-4)


def test_vitessce_has_the_draws_the_image_and_one_configuration(drawn, tmp_path):
    draws = read_draws(drawn[0])
    folder = write_vitessce(draws, tmp_path / "v", url="https://example.org/a/")
    config = json.loads((folder / "vitessce.json").read_text())
    files = config["datasets"][0]["files"]
    for file in files:
        assert (folder / file["url"].removeprefix("https://example.org/a/")).is_dir()
    table = anndata.read_zarr(folder / "draws.zarr")
    np.testing.assert_array_equal(table.X, draws.X)
    np.testing.assert_array_equal(table.layers["std"], draws.layers["std"])
    um_per_px = draws.uns["hinge"]["um_per_px"]
    np.testing.assert_allclose(table.obsm["spatial"], draws.obsm["spatial"] * um_per_px, rtol=1e-6)
    assert [file["options"]["obsFeatureMatrix"]["path"] for file in files[:2]] == ["X", "layers/std"]
    # the image lies in µm, as the spots do, by the transformation of all levels, the only one that Vitessce reads
    image = zarr.open_group(folder / "image.ome.zarr", mode="r")
    (multiscale,) = image.attrs["multiscales"]
    library = next(iter(draws.uns["spatial"].values()))
    hires, scale = library["images"]["hires"], library["scalefactors"]["tissue_hires_scalef"]
    np.testing.assert_array_equal(image["0"][:], np.moveaxis(hires, -1, 0))
    shared = np.array(multiscale["coordinateTransformations"][0]["scale"])
    np.testing.assert_allclose(shared, [1, um_per_px / scale, um_per_px / scale])
    assert multiscale["datasets"][0]["coordinateTransformations"][0]["scale"] == [1, 1, 1]
    for dataset in multiscale["datasets"]:
        factors = shared * dataset["coordinateTransformations"][0]["scale"]
        extent = np.array(image[dataset["path"]].shape[1:]) * factors[1:]
        np.testing.assert_allclose(extent, np.array(hires.shape[:2]) / scale * um_per_px, rtol=0.02)
    titles = [view["props"]["title"] for view in config["layout"] if "props" in view]
    assert titles == ["Mean of the draws", "Standard deviation of the draws"]
    # every scope of a view is in the coordination space, and values are those of the files
    space = config["coordinationSpace"]
    for view in config["layout"]:
        for scope, value in view["coordinationScopes"].items():
            for one in value if isinstance(value, list) else [value]:
                assert one in space[scope], (view["component"], scope)
    for layers in space["metaCoordinationScopesBy"].values():
        for scopes in layers.values():
            for scope, values in scopes.items():
                assert set(values.values()) <= set(space[scope])
    assert set(space["featureValueType"].values()) == {
        file["coordinationValues"]["featureValueType"] for file in files[:2]
    }
    assert space["featureSelection"]["A"][0] in draws.var_names
    assert not list(folder.rglob("zarr.json"))  # version 2 of the format
    one = write_vitessce(draws, tmp_path / "one", GENES[1:2])
    assert list(anndata.read_zarr(one / "draws.zarr").var_names) == GENES[1:2]
    with pytest.raises(DataError, match="lack NONE"):
        write_vitessce(draws, tmp_path / "w", ["NONE"])
    with pytest.raises(ConfigError, match="--url takes an address"):
        write_vitessce(draws, tmp_path / "w", url="file:///x")
    assert not (tmp_path / "w").exists()


def test_geojson_is_read_by_geopandas(drawn, tmp_path):
    geopandas = pytest.importorskip("geopandas")
    table = geopandas.read_file(write_geojson(read_draws(drawn[0]), tmp_path / "tiny.geojson")).set_crs(
        None, allow_override=True
    )
    assert len(table) == 30 and table.geometry.is_valid.all()
    np.testing.assert_allclose(table.geometry.area, np.pi * 11**2, rtol=0.02)


def test_bins_are_squares_and_missing_genes_are_named(drawn, tmp_path):
    draws = read_draws(drawn[0])
    draws.uns["hinge"]["source_format"] = "visium_hd"
    written = json.loads(write_geojson(draws, tmp_path / "hd.geojson").read_text())
    ring = np.array(written["features"][0]["geometry"]["coordinates"][0])
    assert (np.abs(ring - draws.obsm["spatial"][0]) == 11).all() and len(ring) == 5
    with pytest.raises(DataError, match="the draws of tiny lack ERBB2"):
        write_geojson(draws, tmp_path / "none.geojson", ["GENE0", "ERBB2"])
    draws.uns["hinge"].update(spot_diameter_um=np.nan, spot_pitch_um=np.nan)
    with pytest.raises(DataError, match="the draws of tiny lack the size of a spot"):
        write_geojson(draws, tmp_path / "none.geojson")
    assert not (tmp_path / "none.geojson").exists()


# --- Zarr -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_draws_as_a_chunked_array(drawn, tmp_path):
    path, values = drawn
    store = write_draws_zarr(read_draws(path), tmp_path / "tiny.zarr")
    array = zarr.open_group(store, mode="r")["obsm/draws"]
    assert array.shape == (30, 3, 3) and array.chunks == (30, 3, 3)
    np.testing.assert_array_equal(array[4:6, 1], values[:, 4:6, 1].T)
    whole = anndata.read_zarr(store)
    np.testing.assert_array_equal(whole.obsm["draws"], values.transpose(1, 2, 0))
    assert sorted(named_layers(whole)) == ["expected", "std"] and whole.uns["hinge"]["seed"] == 0
    assert list(whole.var_names) == GENES


@pytest.mark.filterwarnings("ignore")
def test_draws_come_back_as_layers(drawn, tmp_path):
    path, values = drawn
    store = write_draws_zarr(read_draws(path), tmp_path / "tiny.zarr")
    draws = read_draws(path)
    for number in range(3):
        del draws.layers[f"draw_{number:03d}"]
    attach_draws(draws, store)
    np.testing.assert_array_equal(draws.layers["draw_002"], values[2])
    with pytest.raises(DataError, match="there are no draws in the layers"):
        write_draws_zarr(anndata.AnnData(np.ones((2, 2))), tmp_path / "none.zarr")
    with pytest.raises(DataError, match=r"holds draws of \(30, 3\) spots and genes, not of \(29, 3\)"):
        attach_draws(draws[:29].copy(), store)
    with pytest.raises(DataError, match=r"nowhere\.zarr is not a readable store of draws"):
        attach_draws(draws, tmp_path / "nowhere.zarr")


@pytest.mark.filterwarnings("ignore")
def test_many_draws_lie_beside_the_h5ad(tiny_slide, tmp_path, monkeypatch):
    monkeypatch.setattr(draws_module, "MOST_BYTES_IN_LAYERS", 1000)
    path = tmp_path / "tiny.h5ad"
    values = draw(read_slide(tiny_slide), path)
    assert sorted(named_layers(anndata.read_h5ad(path))) == ["expected", "std"]
    draws = read_draws(path)
    np.testing.assert_array_equal(np.stack([draws.layers[f"draw_{i:03d}"] for i in range(3)]), values)
    assert draws_files(path) == [path, tmp_path / "tiny.draws.zarr"]
    shutil.rmtree(tmp_path / "tiny.draws.zarr")
    with pytest.raises(DataError, match=r"tiny\.draws\.zarr is not a readable store of draws"):
        read_draws(path)


# --- SpatialData ----------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("full_image", [False, True])
def test_spatialdata_store(write_slide, tmp_path, full_image):
    spatialdata = pytest.importorskip("spatialdata")
    path = write_slide()
    Image.effect_noise((4000, 3000), 60).convert("RGB").save(path.with_suffix(".png"))
    values = draw(read_slide(path), tmp_path / "tiny.h5ad")
    store = write_spatialdata(read_draws(tmp_path / "tiny.h5ad"), tmp_path / "tiny.zarr", full_image)
    data = spatialdata.read_zarr(store)
    table, circles = data.tables["table"], data.shapes["tiny"]
    np.testing.assert_array_equal(table.layers["draw_001"], values[1])
    places = np.stack([circles.geometry.x, circles.geometry.y], axis=1)
    np.testing.assert_array_equal(places, table.obsm["spatial"])
    assert (circles["radius"] == 11).all()
    pixels = np.moveaxis(np.asarray(Image.open(path.with_suffix(".png"))), -1, 0)
    if full_image:
        image = data.images["tiny_full_image"]
        np.testing.assert_array_equal(image["scale0"]["image"].to_numpy(), pixels)
        assert [image[level]["image"].shape[2] for level in image] == [4000, 2000]
    else:
        # the thumbnail lies over the spots in the common coordinate system
        extent = spatialdata.get_extent(data.images["tiny_hires_image"])
        assert extent["x"] == pytest.approx((0, 4000)) and extent["y"] == pytest.approx((0, 3000))
    joined = spatialdata.get_element_annotators(data, "tiny")
    assert joined == {"table"}


# --- CELLxGENE ------------------------------------------------------------------------------------------


# of twenty well-known human genes
ENSEMBL = [
    *("ENSG00000012048", "ENSG00000139618", "ENSG00000141736.14", "ENSG00000091831", "ENSG00000146648"),
    *("ENSG00000136997", "ENSG00000133703", "ENSG00000111640", "ENSG00000075624", "ENSG00000019582"),
    *("ENSG00000115414", "ENSG00000108821", "ENSG00000171862", "ENSG00000139687", "ENSG00000010610"),
    *("ENSG00000153563", "ENSG00000148773", "ENSG00000026025", "ENSG00000119888", "ENSG00000141510"),
]


@pytest.fixture
def visium_drawn(tmp_path):
    """A Visium slide with human genes, and draws of three of them."""
    write_visium(tmp_path / "V1" / "outs", depth=2.0)
    slide = read_slide(tmp_path / "V1")
    slide.var["gene_ids"] = ENSEMBL
    draw(slide, tmp_path / "V1.h5ad")
    return slide, read_draws(tmp_path / "V1.h5ad")


def test_cellxgene_fields(visium_drawn, tmp_path):
    slide, draws = visium_drawn
    result = anndata.read_h5ad(write_cellxgene(draws, slide, tmp_path / "out.h5ad", {**TERMS, "donor_id": "P1"}))
    assert list(result.var_names) == [name.split(".")[0] for name in ENSEMBL] == list(result.raw.var_names)
    np.testing.assert_array_equal(result.raw.X.toarray(), slide.X.toarray())
    assert set(np.flatnonzero(~result.var["feature_is_filtered"])) == {0, 3, 7}
    np.testing.assert_array_equal(result.X[:, [3, 0, 7]].toarray(), draws.X)
    np.testing.assert_array_equal(result.layers["std"][:, [3, 0, 7]].toarray(), draws.layers["std"])
    assert result.X.nnz == draws.X.size
    assert result.uns["organism_ontology_term_id"] == "NCBITaxon:9606" and not result.uns["spatial"]["is_single"]
    assert (result.obs["donor_id"] == "P1").all() and not result.obs["is_primary_data"].any()
    assert (result.obs["self_reported_ethnicity_ontology_term_id"] == "unknown").all()
    np.testing.assert_array_equal(result.obsm["spatial"], draws.obsm["spatial"])


@pytest.mark.parametrize("assay", ["EFO:0022857", "EFO:0008994"])
def test_cellxgene_schema_finds_nothing_wrong(visium_drawn, tmp_path, assay):
    """With CELLxGENE's own program: on the path, or named by HINGE_CELLXGENE_SCHEMA."""
    program = os.environ.get("HINGE_CELLXGENE_SCHEMA") or shutil.which("cellxgene-schema")
    if program is None:
        pytest.skip("no cellxgene-schema")
    slide, draws = visium_drawn
    path = write_cellxgene(draws, slide, tmp_path / "out.h5ad", {**TERMS, "assay_ontology_term_id": assay})
    result = subprocess.run([program, "validate", str(path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_gene_ids_from_a_table(visium_drawn, tmp_path):
    slide, draws = visium_drawn
    del slide.var["gene_ids"]
    with pytest.raises(ConfigError, match=r"slide V1 has no Ensembl ids in var\['gene_ids'\]: give a table of symbols"):
        write_cellxgene(draws, slide, tmp_path / "out.h5ad", TERMS)
    rows = [("ENSG00000141736", "GENE3", "Gene Expression"), ("ENSG00000012048", "GENE0", "Gene Expression")]
    pd.DataFrame(rows).to_csv(tmp_path / "features.tsv.gz", sep="\t", header=False, index=False)
    pd.DataFrame({"symbol": ["GENE3", "GENE0"], "id": [row[0] for row in rows]}).to_csv(tmp_path / "t.csv", index=False)
    for table in ("features.tsv.gz", "t.csv"):
        result = anndata.read_h5ad(write_cellxgene(draws, slide, tmp_path / "out.h5ad", TERMS, tmp_path / table))
        assert list(result.var_names) == ["ENSG00000012048", "ENSG00000141736"]  # other genes have no id
    (tmp_path / "t.csv").write_text("a,b\nc,d\n")
    with pytest.raises(DataError, match=r"t\.csv needs a column of Ensembl ids and one of symbols"):
        write_cellxgene(draws, slide, tmp_path / "out.h5ad", TERMS, tmp_path / "t.csv")


def test_what_cellxgene_lacks_is_told(visium_drawn, tmp_path):
    slide, draws = visium_drawn
    with pytest.raises(ConfigError, match=r"needs disease_ontology_term_id, assay_ontology_term_id of the slide: give"):
        write_cellxgene(draws, slide, tmp_path / "out.h5ad", dict(list(TERMS.items())[:2]))
    with pytest.raises(ConfigError, match=r"have no field 'organ'; the fields are assay_ontology_term_id"):
        write_cellxgene(draws, slide, tmp_path / "out.h5ad", {**TERMS, "organ": "breast"})
    with pytest.raises(DataError, match="slide V1 has no measured counts, and CELLxGENE's schema needs raw counts"):
        write_cellxgene(draws, slide[:, :0], tmp_path / "out.h5ad", TERMS)
    with pytest.raises(DataError, match="slide V1 lacks 1 genes of its draws, for example GENE3"):
        write_cellxgene(draws, slide[:, slide.var_names != "GENE3"].copy(), tmp_path / "out.h5ad", TERMS)
    assert not (tmp_path / "out.h5ad").exists()
