"""Regions: reading and writing them, a region's table, and the comparison of two regions."""

import json

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

from hinge.data import get_transform
from hinge.data.regions import Region, read_regions, regions_of_labels, write_regions
from hinge.tasks.regions import compare_regions, region_area, region_table
from hinge.utils.errors import ConfigError, DataError

N, G, K = 30, 5, 20


@pytest.fixture
def draws() -> AnnData:
    """6 × 5 spots 40 px (100 µm) apart."""
    rng = np.random.default_rng(0)
    values = rng.normal(2, 1, (K, N, G)).astype(np.float32)
    result = AnnData(values.mean(axis=0))
    result.obs_names, result.var_names = [f"s{i}" for i in range(N)], [f"G{i}" for i in range(G)]
    y, x = np.mgrid[:6, :5]
    result.obsm["spatial"] = np.stack([x.ravel(), y.ravel()], axis=1) * 40.0 + 30
    result.uns["hinge"] = {
        **{"name": "s", "transform": "log2p1", "um_per_px": 2.5},
        **{"spot_diameter_um": 55.0, "spot_pitch_um": 100.0},
    }
    for number, draw in enumerate(values):
        result.layers[f"draw_{number:03d}"] = draw
    return result


def stacked(draws: AnnData) -> np.ndarray:
    return np.stack([draws.layers[f"draw_{k:03d}"] for k in range(K)]).astype(float)


def measured_of(draws: AnnData) -> AnnData:
    """Counts of the same spots in another order, one spot short, with one gene more and one gene less."""
    counts = np.random.default_rng(1).poisson(3.0, (N - 1, G)).astype(np.float32)
    slide = AnnData(sparse.csr_matrix(counts))
    slide.obs_names, slide.var_names = list(draws.obs_names[:0:-1]), ["G3", "G0", "X", "G1", "G2"]
    return slide


def test_a_table_of_a_region(draws):
    chosen = np.arange(N) % 3 == 0
    measured = measured_of(draws)
    table = region_table(draws, chosen, measured, threshold=2.5)
    means = stacked(draws)[:, chosen].mean(axis=1)
    np.testing.assert_allclose(table["mean"], means.mean(axis=0))
    np.testing.assert_allclose(table["sd"], means.std(axis=0))
    np.testing.assert_allclose(table["low"], np.quantile(means, 0.05, axis=0, method="weibull"))
    np.testing.assert_allclose(table["share_above"], (stacked(draws)[:, chosen] > 2.5).mean(axis=(0, 1)))
    known = [name for name in draws.obs_names[chosen] if name in measured.obs_names]
    expected = np.log2(measured[known, "G1"].X.toarray() + 1).mean()
    assert table.loc["G1", "measured"] == pytest.approx(expected)
    assert np.isnan(table.loc["G4", "measured"])
    by_name = region_table(draws, draws.obs_names[chosen], measured, threshold=2.5)
    pd.testing.assert_frame_equal(table, by_name)
    pd.testing.assert_frame_equal(table, region_table(draws, np.flatnonzero(chosen), measured, threshold=2.5))


def test_measured_values_of_a_region_use_the_library_size(draws):
    draws.uns["hinge"]["transform"] = "log1p_cp10k"
    measured = measured_of(draws)
    found = region_table(draws, ["s4", "s7"], measured)["measured"]
    rows = measured[["s4", "s7"]]
    values = get_transform("log1p_cp10k").forward(rows.X.toarray(), np.asarray(rows.X.sum(axis=1)).ravel())
    np.testing.assert_allclose(found["G3"], values[:, 0].mean(), rtol=1e-6)


def test_a_comparison_uses_the_draws_jointly(draws):
    a, b = np.arange(N) < 10, np.arange(N) >= 20
    # an error that both regions share does not widen the interval of their difference
    for number in range(K):
        draws.layers[f"draw_{number:03d}"] = draws.layers[f"draw_{number:03d}"] + 10 * number
    table = compare_regions(draws, a, b, threshold=3.0)
    difference = stacked(draws)[:, a].mean(axis=1) - stacked(draws)[:, b].mean(axis=1)
    np.testing.assert_allclose(table["difference"], difference.mean(axis=0))
    np.testing.assert_allclose(table["probability"], (difference > 0).mean(axis=0))
    assert (table["high"] - table["low"] < 3).all() and (table["low"] < table["high"]).all()
    np.testing.assert_allclose(table["first"] - table["second"], table["difference"])
    same = compare_regions(draws, a, a)
    assert (same["difference"] == 0).all() and (same["probability"] == 0.5).all()
    swapped = compare_regions(draws, b, a)
    np.testing.assert_allclose(swapped["low"], -table["high"])


def test_one_draw_has_no_interval(draws):
    for number in range(1, K):
        del draws.layers[f"draw_{number:03d}"]
    table = compare_regions(draws, [0, 1], [2, 3])
    assert table[["sd", "low", "high"]].isna().all(axis=None) and np.isfinite(table["difference"]).all()


@pytest.mark.parametrize(
    "spots, error, message",
    [
        (np.zeros(N, bool), DataError, "holds no spot"),
        ([], DataError, "holds no spot"),
        (["s0", "s99"], DataError, "lack the spot s99"),
        ([0, 99], ConfigError, "from 0 to 29"),
        (np.ones(4, bool), ConfigError, r"shape \(30,\)"),
    ],
)
def test_regions_that_do_not_fit_are_refused(draws, spots, error, message):
    with pytest.raises(error, match=message):
        region_table(draws, spots)


def test_area(draws):
    assert region_area(draws, np.arange(10)) == pytest.approx(10 * 0.1**2)
    hexagons = draws.copy()
    y, x = np.mgrid[:6, :5]
    hexagons.obsm["spatial"] = np.stack([(x + y % 2 / 2).ravel() * 40, y.ravel() * 40 * np.sqrt(3) / 2], axis=1)
    assert region_area(hexagons, np.arange(10)) == pytest.approx(10 * 0.1**2 * np.sqrt(3) / 2)


def feature(rings, **properties) -> dict:
    kind = "Polygon" if np.ndim(rings[0][0]) == 1 else "MultiPolygon"
    return {"type": "Feature", "geometry": {"type": kind, "coordinates": rings}, "properties": properties}


def square(left, top, right, bottom) -> list:
    return [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]


def test_annotations_of_qupath(draws, tmp_path):
    path = tmp_path / "a.geojson"
    whole, hole = square(0, 0, 300, 300), square(60, 60, 160, 160)
    features = [
        feature([whole, hole], classification={"name": "Tumour"}, objectType="annotation"),
        feature([[square(60, 60, 80, 80)]], classification={"names": ["Immune", "T"]}),
        feature([square(20, 20, 40, 40)], name="mine"),
        feature([square(100, 100, 120, 120)], classification={"name": "Tumour"}),
        {"type": "Feature", "geometry": {"type": "Point", "coordinates": [1, 2]}, "properties": {}},
    ]
    for content in ({"type": "FeatureCollection", "features": features}, features):
        path.write_text(json.dumps(content))
        regions = read_regions(path, draws)
        assert list(regions) == ["Tumour", "Immune: T", "mine"]
        x, y = np.asarray(draws.obsm["spatial"]).T
        in_hole = (x > 60) & (x < 160) & (y > 60) & (y < 160)
        expected = ~in_hole | ((x == 110) & (y == 110))
        np.testing.assert_array_equal(regions["Tumour"].spots, expected)
        assert regions["mine"].spots.sum() == 1 and regions["Immune: T"].spots.sum() == 1


def test_regions_survive_writing_and_reading(draws, tmp_path):
    rng = np.random.default_rng(0)
    regions = {
        "by spots": Region("by spots", rng.random(N) < 0.4),
        "drawn": Region("drawn", np.arange(N) < 5, [[np.array(square(0, 0, 300, 40), float)]]),
    }
    written = read_regions(write_regions(tmp_path / "r.geojson", regions, draws), draws)
    for name, region in regions.items():
        np.testing.assert_array_equal(written[name].spots, region.spots)


def test_a_table_of_labels(draws, tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("x,barcode,label\n1,s3,A\n1,s0,B\n")
    assert read_regions(path, draws)["A"].spots.tolist().index(True) == 3
    path.write_text("x,barcode,mine\n1,s3,A\n1,s0,B\n")
    with pytest.raises(DataError, match="2 columns beside 'barcode'"):
        read_regions(path, draws)
    with pytest.raises(DataError, match="no region"):
        path.with_name("none.csv").write_text("barcode,label\nelsewhere,A\n")
        read_regions(path.with_name("none.csv"), draws)
    name = draws.uns["hinge"]["name"]
    path.write_text(f"slide,spot,cluster\nother,s3,A\n{name},s3,B\n{name},s0,B\nother,s1,A\n")
    assert np.flatnonzero(read_regions(path, draws)["B"].spots).tolist() == [0, 3]
    path.write_text("origin,spot,cluster\nother,s3,A\nthis,s3,B\n")
    with pytest.raises(DataError, match=r"several labels for spot s3.* a column 'slide'"):
        read_regions(path, draws)
    path.write_text("barcode,label\ns3,A\ns0,B\nelsewhere,A\ns4,\n")
    regions = read_regions(path, draws)
    assert {name: np.flatnonzero(region.spots).tolist() for name, region in regions.items()} == {"B": [0], "A": [3]}
    labels = pd.Series(["x", None, "y"])
    assert regions_of_labels(labels)["x"].spots.tolist() == [True, False, False]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"no json", "not readable GeoJSON"),
        (b"[" * 100_000, "not readable GeoJSON"),
        (b"{}", "holds no polygon"),
        (b"3", "no list of GeoJSON features"),
        (b"[3]", "feature 1 of .* is not a GeoJSON polygon"),
        (b'[{"geometry": {"type": "Polygon", "coordinates": [[[0, 1]]]}}]', "at least 3 corners"),
        (b'[{"geometry": {"type": "Polygon", "coordinates": [[[0, "x"], [1, 1], [2, 2]]]}}]', "feature 1 of"),
        (
            b'[{"geometry": {"type": "Polygon", "coordinates": [[[0, 0], [1, 0], [1, 1]]]}}]',
            "no region .* holds a spot",
        ),
    ],
)
def test_damaged_files_are_one_sentence(draws, tmp_path, content, message):
    (tmp_path / "a.geojson").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_regions(tmp_path / "a.geojson", draws)
