import json
import shutil

import numpy as np
import pytest
import zarr
from helpers.visium import write_visium, write_visium_hd

from hinge.data import list_samples, read_slide, recognise_format
from hinge.data.patches import PatchReader
from hinge.utils.errors import DataError

spatialdata = pytest.importorskip("spatialdata")
spatialdata_io = pytest.importorskip("spatialdata_io")

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def visium_store(tmp_path):
    """A Space Ranger folder, and the store that spatialdata-io makes of it."""
    outs = tmp_path / "V1" / "outs"
    write_visium(outs)
    data = spatialdata_io.visium(outs, dataset_id="V1", fullres_image_file=tmp_path / "V1" / "full.tif")
    data.write(tmp_path / "V1.zarr")
    return outs, tmp_path / "V1.zarr"


def test_a_store_gives_the_slide_it_was_made_of(visium_store, tmp_path):
    outs, store = visium_store
    expected = read_slide(outs)
    assert recognise_format(store) == "spatialdata" and list_samples(store) == ["V1"]
    slide = read_slide(store)
    assert list(slide.var_names) == list(expected.var_names)
    slide = slide[expected.obs_names]
    np.testing.assert_array_equal(slide.X.toarray(), expected.X.toarray())
    np.testing.assert_allclose(slide.obsm["spatial"], expected.obsm["spatial"])
    for key in ("um_per_px", "spot_pitch_um", "spot_diameter_um"):
        assert slide.uns["hinge"][key] == pytest.approx(expected.uns["hinge"][key])
    assert slide.uns["hinge"]["image_path"] == str(store / "images" / "V1_full_image")
    (tmp_path / "stores").mkdir()
    store.rename(tmp_path / "stores" / "V1.zarr")
    assert recognise_format(tmp_path / "stores") == "spatialdata" and list_samples(tmp_path / "stores") == ["V1"]


def test_patches_come_out_of_the_store(visium_store):
    outs, store = visium_store
    patches = {}
    for path in (outs, store):
        slide = read_slide(path)
        order, pixels = next(iter(PatchReader(slide, patch_um=80, patch_px=64, batch_size=len(slide))))
        patches[path] = {slide.obs_names[i]: patch for i, patch in zip(order, pixels, strict=True)}
    for barcode, patch in patches[outs].items():
        np.testing.assert_allclose(patches[store][barcode], patch, atol=2)


def test_without_the_full_image_the_largest_one_is_used(tmp_path):
    write_visium(tmp_path / "V1", pitch_px=600.0, image=False)
    spatialdata_io.visium(tmp_path / "V1", dataset_id="V1").write(tmp_path / "V1.zarr")
    expected = read_slide(tmp_path / "V1", require_image=False)
    slide = read_slide(tmp_path / "V1.zarr")
    scale = expected.uns["spatial"]["V1"]["scalefactors"]["tissue_hires_scalef"]
    assert scale < 0.5 and slide.uns["hinge"]["image_path"].endswith("V1_hires_image")
    places = slide[expected.obs_names].obsm["spatial"]
    np.testing.assert_allclose(places, expected.obsm["spatial"] * scale, rtol=1e-3)
    assert slide.uns["hinge"]["um_per_px"] == pytest.approx(expected.uns["hinge"]["um_per_px"] / scale, rel=1e-3)


def test_visium_hd_store(tmp_path):
    write_visium_hd(tmp_path / "HD1" / "outs")
    from spatialdata.models import Image2DModel, ShapesModel, TableModel

    slide = read_slide(tmp_path / "HD1", "HD1_square_008um")
    name = "HD1_square_008um"
    slide.obs["region"], slide.obs["location_id"] = name, np.arange(slide.n_obs)
    slide.obs["region"] = slide.obs["region"].astype("category")
    attributes = {"region": name, "region_key": "region", "instance_key": "location_id"}
    slide.uns.clear()
    spatialdata.SpatialData(
        images={"HD1_full_image": Image2DModel.parse(np.full((3, 400, 400), 200, np.uint8), dims=("c", "y", "x"))},
        shapes={name: ShapesModel.parse(slide.obsm["spatial"], geometry=0, radius=8.0)},
        tables={"square_008um": TableModel.parse(slide, **attributes)},
    ).write(tmp_path / "HD1.zarr")
    again = read_slide(tmp_path / "HD1.zarr")
    assert again.uns["hinge"]["um_per_px"] == pytest.approx(0.5) and again.uns["hinge"]["spot_pitch_um"] == 8
    np.testing.assert_array_equal(again.obsm["spatial"], slide.obsm["spatial"])


def test_stores_that_are_wrong(visium_store, tmp_path):
    _, store = visium_store
    data = spatialdata.read_zarr(store)
    del data.images["V1_full_image"], data.images["V1_hires_image"], data.images["V1_lowres_image"]
    data.write(tmp_path / "bare.zarr")
    with pytest.raises(DataError, match=r"bare\.zarr has no RGB image in a coordinate system with 'V1': give --image"):
        read_slide(tmp_path / "bare.zarr")
    assert "image_path" not in read_slide(tmp_path / "bare.zarr", require_image=False).uns["hinge"]
    slide = read_slide(tmp_path / "bare.zarr", image=tmp_path / "V1" / "full.tif")
    assert slide.uns["hinge"]["um_per_px"] == pytest.approx(1.0, rel=0.005)
    del data.shapes["V1"]
    data.write(tmp_path / "shapeless.zarr")
    with pytest.raises(
        DataError, match=r"shapeless\.zarr has no shapes or labels 'V1', and the positions of spots are read"
    ):
        read_slide(tmp_path / "shapeless.zarr")
    table = spatialdata.read_zarr(store).tables["table"]
    table.X = table.X * 0.5
    spatialdata.SpatialData(shapes=spatialdata.read_zarr(store).shapes, tables={"table": table}).write(
        tmp_path / "halves.zarr"
    )
    with pytest.raises(DataError, match=r"halves\.zarr has no raw counts: it holds X, and none"):
        read_slide(tmp_path / "halves.zarr", require_image=False)
    (store / "shapes" / "V1" / "shapes.parquet").write_bytes(b"text")
    with pytest.raises(DataError, match=r"V1\.zarr is not a readable SpatialData store") as error:
        read_slide(store)
    assert "\n" not in str(error.value)


def test_a_store_of_version_0_1(visium_store, tmp_path):
    """Zarr of format 2, one table in the folder `table`, and shapes as ragged arrays in place of Parquet."""
    from spatialdata._io import format as formats

    outs, store = visium_store
    old = tmp_path / "old.zarr"
    kinds = ("SpatialDataContainer", "Raster", "Shapes", "Points", "Tables")
    data = spatialdata.read_zarr(store)
    data.write(old, sdata_formats=[getattr(formats, f"{kind}FormatV01")() for kind in kinds])
    (old / "tables").rename(old / "table")
    (old / ".zmetadata").unlink(missing_ok=True)
    folder, shapes = old / "shapes" / "V1", data.shapes["V1"]
    attributes = json.loads((folder / ".zattrs").read_text())
    shutil.rmtree(folder)
    group = zarr.open_group(folder, mode="w", zarr_format=2)
    places = np.stack([shapes.geometry.x, shapes.geometry.y], axis=1)
    for name, content in (("coords", places), ("Index", shapes.index), ("radius", shapes.radius)):
        group.create_array(name, data=np.asarray(content))
    group.attrs.update(attributes | {"spatialdata_attrs": {"version": "0.1", "geos": {"name": "POINT", "type": 0}}})
    assert not list(old.rglob("zarr.json")) and not list(old.rglob("*.parquet"))
    assert recognise_format(old) == "spatialdata" and list_samples(old) == ["old"]
    expected = read_slide(outs)
    slide = read_slide(old)[expected.obs_names]
    np.testing.assert_array_equal(slide.X.toarray(), expected.X.toarray())
    np.testing.assert_allclose(slide.obsm["spatial"], expected.obsm["spatial"])
    assert slide.uns["hinge"]["um_per_px"] == pytest.approx(expected.uns["hinge"]["um_per_px"])
    assert slide.uns["hinge"]["image_path"] == str(old / "images" / "V1_full_image")
