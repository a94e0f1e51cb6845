"""Feature files: what is written is read, and nothing else is believed."""

import h5py
import numpy as np
import pytest

from hinge.data.feature_writer import FeatureWriter
from hinge.data.features import read_feature_header, read_features, read_features_at
from hinge.utils.errors import DataError

N, VIEWS, DIM = 7, 2, 5
BARCODES = [f"spot-{i}" for i in range(N)]
VALUES = np.random.default_rng(0).normal(size=(N, VIEWS, DIM)).astype(np.float32)
COORDS = np.arange(2.0 * N).reshape(N, 2)
FACTS = {"encoder": "tiny", "digest": "d" * 64, "patch_um": 112.0, "patch_px": 224}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "folder" / "slide.h5"
    with FeatureWriter(path, BARCODES, COORDS, VIEWS, DIM, dtype="float32", **FACTS) as writer:
        for indices in ([5, 0, 3], [6], [4, 2, 1]):
            writer.write(np.array(indices), VALUES[indices])
    return path


def edit(path, name, data=None, **keywords):
    """Replace a dataset; no data: delete it."""
    with h5py.File(path, "r+") as file:
        del file[name]
        if data is not None or keywords:
            file.create_dataset(name, data=data, **keywords)


def test_written_is_read(path):
    found = read_features(path, digest=FACTS["digest"])
    np.testing.assert_array_equal(found.features, VALUES)
    np.testing.assert_array_equal(found.coords, COORDS)
    assert list(found.barcodes) == BARCODES and found.features.dtype == np.float32
    assert {name: getattr(found, name) for name in FACTS} == FACTS
    header = read_feature_header(path)
    assert (header.n_views, header.dim, list(header.barcodes)) == (VIEWS, DIM, BARCODES)
    with h5py.File(path) as file:
        assert file.attrs["hinge_version"] and file["features"].shape == (N, VIEWS, DIM)
    assert [p.name for p in path.parent.iterdir()] == ["slide.h5"]


def test_order_follows_the_barcodes(path):
    found = read_features(path, barcodes=["spot-6", "spot-1", "spot-4"])
    np.testing.assert_array_equal(found.features, VALUES[[6, 1, 4]])
    np.testing.assert_array_equal(found.coords, COORDS[[6, 1, 4]])
    assert list(found.barcodes) == ["spot-6", "spot-1", "spot-4"]


def test_half_precision(tmp_path):
    with FeatureWriter(tmp_path / "f.h5", BARCODES, COORDS, VIEWS, DIM, **FACTS) as writer:
        writer.write(np.arange(N), VALUES)
    found = read_features(tmp_path / "f.h5").features
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, VALUES.astype(np.float16).astype(np.float32))
    with h5py.File(tmp_path / "f.h5") as file:
        assert file["features"].dtype == np.float16


def test_other_digest_or_missing_spot(path):
    with pytest.raises(DataError, match=r"slide\.h5 was made by tiny \(digest dddddddddddd\)"):
        read_features(path, digest="e" * 64)
    with pytest.raises(DataError, match=r"slide\.h5 lacks 2 of 3 spots, the first of them other"):
        read_features(path, barcodes=["spot-1", "other", "more"])


@pytest.mark.parametrize("dim", [3, 1])
def test_layouts_of_other_programs(tmp_path, dim):
    """TRIDENT and CLAM: no views, no barcodes, no digest."""
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file["features"], file["coords"] = VALUES[:, 0, :dim], COORDS.astype(np.int64)
    found = read_features(tmp_path / "f.h5")
    np.testing.assert_array_equal(found.features, VALUES[:, :1, :dim])
    assert found.barcodes is None and found.encoder is None and found.coords.dtype == np.float64
    with pytest.raises(DataError, match="has no barcodes"):
        read_features(tmp_path / "f.h5", barcodes=BARCODES)
    with pytest.raises(DataError, match=r"unnamed encoder \(digest none\)"):
        read_features(tmp_path / "f.h5", digest="d")


def test_unfinished_file_never_appears(tmp_path):
    path = tmp_path / "f.h5"
    with (
        pytest.raises(DataError, match=r"f\.h5 was not written: 4 of 7 spots are missing"),
        FeatureWriter(path, BARCODES, COORDS, VIEWS, DIM, **FACTS) as writer,
    ):
        writer.write(np.arange(3), VALUES[:3])
    with (
        pytest.raises(KeyboardInterrupt),
        FeatureWriter(path, BARCODES, COORDS, VIEWS, DIM, **FACTS) as writer,
    ):
        writer.write(np.arange(N), VALUES)
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("value", "dtype"), [(np.nan, "float32"), (np.inf, "float32"), (1e6, "float16")])
def test_no_feature_that_is_not_finite_is_written(tmp_path, value, dtype):
    values = VALUES.copy()
    values[4, 1, 2] = value
    with (
        pytest.raises(DataError, match=f"tiny gives spot spot-4 a feature that is not a finite {dtype}"),
        FeatureWriter(tmp_path / "f.h5", BARCODES, COORDS, VIEWS, DIM, dtype=dtype, **FACTS) as writer,
    ):
        writer.write(np.arange(N)[::-1], values[::-1])
    assert list(tmp_path.iterdir()) == []


def test_a_failed_rewrite_keeps_the_old_file(path):
    with pytest.raises(DataError), FeatureWriter(path, BARCODES, COORDS, 1, 1, **FACTS):
        pass
    np.testing.assert_array_equal(read_features(path).features, VALUES)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("features", None, "no dataset 'features'; it holds barcodes, coords"),
        ("coords", None, "no dataset 'coords'"),
        ("features", VALUES[0, 0], r"\(n, views, d\) or \(n, d\), not \(5,\)"),
        ("features", VALUES[:0], r"not \(0, 2, 5\)"),
        ("features", VALUES.astype(int), "'features' must hold plain numbers, not int64"),
        (
            "features",
            np.array([b"cos\nsystem"], dtype=object),
            "'features' must hold plain numbers, not object",
        ),
        ("coords", COORDS[:3], r"'coords' must have shape \(7, 2\)"),
        ("coords", COORDS * np.nan, "'coords' holds values that are not finite"),
        ("barcodes", BARCODES[:3], r"'barcodes' must have shape \(7,\)"),
        ("barcodes", np.arange(N), "'barcodes' must hold strings, not int64"),
        ("barcodes", ["a"] * N, "barcode a more than once"),
        (
            "features",
            np.where(np.arange(N)[:, None, None] == 3, np.nan, VALUES),
            "spot spot-3: a feature is not a",
        ),
    ],
)
def test_wrong_content(path, name, data, message):
    edit(path, name, data)
    with pytest.raises(DataError, match=message) as error:
        read_features(path)
    assert "slide.h5" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["features", "coords", "barcodes"])
def test_nothing_outside_the_file_is_read(path, tmp_path, name):
    secret = tmp_path / "secret.h5"
    with h5py.File(secret, "w") as file:
        file["features"], file["coords"], file["barcodes"] = VALUES, COORDS, BARCODES
    with h5py.File(path, "r+") as file:
        del file[name]
        file[name] = h5py.ExternalLink(str(secret), name)
    with pytest.raises(DataError, match=f"'{name}' must be a dataset in the file itself"):
        read_features(path)
    with h5py.File(path, "r+") as file:  # a link to nothing is no missing dataset
        del file[name]
        file[name] = h5py.ExternalLink(str(tmp_path / "nowhere.h5"), name)
    with pytest.raises(DataError, match=f"'{name}' must be a dataset in the file itself"):
        read_features(path)


def test_no_raw_or_virtual_storage_elsewhere(path, tmp_path):
    (tmp_path / "raw").write_bytes(VALUES.tobytes())
    raw = [(str(tmp_path / "raw"), 0, VALUES.nbytes)]
    edit(path, "features", shape=VALUES.shape, dtype="f4", external=raw)
    with pytest.raises(DataError, match="'features' must be a dataset in the file itself"):
        read_features(path)
    with h5py.File(tmp_path / "source.h5", "w") as file:
        file["features"] = VALUES
    layout = h5py.VirtualLayout(VALUES.shape, "f4")
    layout[:] = h5py.VirtualSource(str(tmp_path / "source.h5"), "features", VALUES.shape)
    with h5py.File(path, "r+") as file:
        del file["features"]
        file.create_virtual_dataset("features", layout)
    with pytest.raises(DataError, match="'features' must be a dataset in the file itself"):
        read_features(path)


def test_no_file_or_damaged(path, tmp_path):
    with pytest.raises(DataError, match="there is no feature file"):
        read_features(tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("features")
    with pytest.raises(DataError, match=r"text\.h5 is not a readable feature file"):
        read_features(tmp_path / "text.h5")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"slide\.h5 is not a readable feature file"):
        read_features(path)


@pytest.mark.parametrize(("name", "value"), [("patch_um", "wide"), ("patch_px", [1, 2]), ("encoder", 3.0)])
def test_attributes_of_another_kind(path, name, value):
    with h5py.File(path, "r+") as file:
        file.attrs[name] = value
    with pytest.raises(DataError, match=f"attribute '{name}' must be one"):
        read_features(path)


# --- files without barcodes -------------------------------------------------------------------------------


def write_trident(path, corners, side=None, clam=False):
    """Features that say which patch they are of."""
    with h5py.File(path, "w") as file:
        file["features"] = np.arange(len(corners), dtype=np.float32)[:, None].repeat(4, axis=1)
        file["coords"] = np.asarray(corners)
        if clam:
            file["coords"].attrs.update({"patch_size": side, "patch_level": 0, "name": "slide"})
        elif side:
            file["coords"].attrs.update({"patch_size": 256, "patch_size_level0": side, "level0_magnification": 40})
    return path


GRID = np.array([(x, y) for y in (100, 612, 1124) for x in (50, 562, 1074)])


@pytest.mark.parametrize("options", [{"side": 512}, {"side": 512, "clam": True}, {}])
def test_spots_find_the_patch_that_they_lie_in(tmp_path, options):
    path = write_trident(tmp_path / "slide.h5", GRID, **options)
    found = read_features_at(path, [(60, 110), (800, 900), (1585, 1635), (563, 611)])
    assert found.features[:, 0, 0].tolist() == [0, 4, 8, 1]
    assert found.coords[0].tolist() == [50 + 256, 100 + 256] and found.barcodes is None


def test_spots_outside_all_patches(tmp_path):
    path = write_trident(tmp_path / "slide.h5", GRID, side=512)
    with pytest.raises(
        DataError, match=r"no patch at pixel \(20, 300\): 1 of 2 spots lie outside its patches of 512 px"
    ):
        read_features_at(path, [(300, 300), (20, 300)])
    path = write_trident(tmp_path / "single.h5", GRID[:1])
    with pytest.raises(DataError, match=r"single\.h5 has no patch size: 'coords' needs the attribute"):
        read_features_at(path, [(300, 300)])
    path = write_trident(tmp_path / "wrong.h5", GRID, side=-512)
    with pytest.raises(DataError, match=r"wrong\.h5: the patches' side must be above 0, not -512 px"):
        read_features_at(path, [(300, 300)])


def test_features_that_do_not_differ_between_spots_are_told_once(tmp_path, caplog):
    """A blank image, or a file whose rows were all overwritten: nothing can be predicted from it."""
    path, names = tmp_path / "equal.h5", [f"s{number}" for number in range(5)]
    with FeatureWriter(
        path, names, np.zeros((5, 2)), 1, 3, encoder="e", digest="d", patch_um=112.0, patch_px=224
    ) as writer:
        writer.write(np.arange(5), np.tile(np.array([[[1.0, -2.0, 0.5]]]), (5, 1, 1)))
    for _ in range(2):
        assert read_features(path, barcodes=names).features.shape == (5, 1, 3)
    told = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == 1 and "the features of all 5 spots are equal" in told[0] and "hinge check" in told[0]
