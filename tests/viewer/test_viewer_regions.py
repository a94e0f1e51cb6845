"""Regions in the viewer: what the server answers, and drawing, comparing and saving them on the page."""

import json
import re
import urllib.parse

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from helpers.viewer import middle, pixels

from hinge.data.draws import read_draws
from hinge.data.regions import Region, read_regions, write_regions
from hinge.run.run import Run
from hinge.tasks.regions import compare_regions, region_area, region_table
from hinge.utils.errors import DataError
from hinge.viewer import Viewer
from hinge.viewer.regions import decode_spots, encode_spots, labels


@pytest.fixture(scope="module")
def draws(folder) -> AnnData:
    return read_draws(folder / "samples" / "sim0.h5ad")


def test_sets_of_spots_travel_in_requests():
    for n in (1, 8, 81, 1000):
        spots = np.random.default_rng(n).random(n) < 0.5
        np.testing.assert_array_equal(decode_spots(encode_spots(spots), n), spots)
    for text in ("", "!", "AAAA", encode_spots(np.ones(10**7, bool)), encode_spots(np.ones(8, bool))):
        with pytest.raises(DataError, match="holds no set of 81 spots"):
            decode_spots(text, 81)


def test_tables_are_those_of_the_package(viewer, draws):
    slide = viewer.run.slide("sim0", require_image=False)
    a, b = np.arange(81) < 30, np.arange(81) > 40
    query = {"first": encode_spots(a), "second": encode_spots(b), "threshold": "1.5"}
    expected = compare_regions(draws, a, b, measured=slide, threshold=1.5)
    found = json.loads(viewer.read("slides/0/compare.json", query))
    assert found["genes"] == list(draws.var_names) and found["spots"] == [30, 40]
    pd.testing.assert_frame_equal(
        pd.DataFrame(found["columns"], index=found["genes"]), expected, check_names=False, rtol=1e-12
    )
    lines = viewer.read("slides/0/compare.csv", query).decode().splitlines()
    assert lines[0].split(",")[:4] == ["gene", "first", "second", "difference"] and len(lines) == 25
    np.testing.assert_allclose(found["mm2"], [region_area(draws, a), region_area(draws, b)])
    one = json.loads(viewer.read("slides/0/region.json", {"spots": encode_spots(a)}))
    np.testing.assert_allclose(one["columns"]["mean"], region_table(draws, a)["mean"])
    assert "measured" not in json.loads(viewer.read("slides/1/region.json", {"spots": encode_spots(a)}))["columns"]
    for wrong in ({}, {"spots": "x"}, {"spots": encode_spots(a), "threshold": "nan"}):
        with pytest.raises(DataError):
            viewer.read("slides/0/region.json", wrong)


def test_labels_and_saved_regions_are_offered(folder, draws):
    slide = draws.copy()
    slide.obs["tissue"] = ["tumour"] * 40 + [None] + ["stroma"] * 40
    slide.obs["number"], slide.obs["same"] = np.linspace(0, 1, 81), "x"
    saved = {"R": Region("R", np.arange(81) < 5, [[np.array([[0, 0], [10, 0], [10, 20.0]])]])}
    found = labels(slide[::-1].copy(), draws, saved, 0.5)
    (column,) = found["columns"]
    assert column["labels"] == ["stroma", "tumour"] and column["codes"] == [1] * 40 + [-1] + [0] * 40
    (region,) = found["regions"]
    assert region["polygons"] == [[[[0, 0], [5, 0], [5, 10]]]] and decode_spots(region["spots"], 81).sum() == 5


def test_regions_saved_with_a_run_are_shown(folder, draws):
    path = Run.open(folder).paths.regions("sim0")
    write_regions(path, {"A": Region("A", np.arange(81) < 9)}, draws)
    try:
        found = json.loads(Viewer(Run.open(folder)).read("slides/0/labels.json"))["regions"]
        assert [region["name"] for region in found] == ["A"]
        path.write_text("damaged")
        viewer = Viewer(Run.open(folder))
        assert json.loads(viewer.read("slides/0/labels.json"))["regions"] == []
        assert "saved regions could not be read" in json.loads(viewer.read("slides/0/slide.json"))["note"]
    finally:
        path.unlink()


def drag(page, *places) -> None:
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=6)
    page.mouse.up()


def test_a_comparison_in_the_browser_equals_that_in_python(page, viewer, draws, tmp_path):
    """Two regions are drawn; table, CSV and GeoJSON hold what Python computes from the draws."""
    box = page.locator(".pane .view").nth(0).bounding_box()
    x = middle(page)[0]
    before = pixels(page, 0)
    page.click("#tab-regions")
    page.click("[data-tool=rectangle]")
    drag(page, (box["x"] + 8, box["y"] + 40), (x - 12, box["y"] + box["height"] - 40))
    page.locator("#region-text").wait_for()
    assert page.locator("#region-table thead th").all_inner_texts()[:2] == ["Gene", "Mean"]
    page.keyboard.press("r")
    right, bottom = box["x"] + box["width"] - 8, box["y"] + box["height"] - 60
    drag(
        page,
        (x + 12, box["y"] + 40),
        (right, box["y"] + 40),
        (right, bottom),
        (x + 12, bottom),
        (x + 12, box["y"] + 60),
    )
    page.locator("#region-table th", has_text="A − B").wait_for()
    page.mouse.move(5, 5)
    assert np.abs(pixels(page, 0) - before).max() > 60  # outlines
    page.fill("#region-threshold", "1.5")
    with page.expect_response("**/compare.json?*threshold=1.5*") as answered:
        page.keyboard.press("Enter")
    with page.expect_download() as saved:
        page.click("#region-save")
    saved.value.save_as(tmp_path / "regions.geojson")
    regions = read_regions(tmp_path / "regions.geojson", draws)
    assert list(regions) == ["Region 1", "Region 2"]
    first, second = (region.spots for region in regions.values())
    assert first.sum() > 10 and second.sum() > 10 and not (first & second).any()
    slide = viewer.run.slide("sim0", require_image=False)
    expected = compare_regions(draws, first, second, measured=slide, threshold=1.5)
    found = answered.value.json()
    for name, values in found["columns"].items():
        np.testing.assert_allclose(np.array(values, float), expected[name], atol=1e-6, rtol=0)
    with page.expect_download() as saved:
        page.click("#region-csv")
    saved.value.save_as(tmp_path / "regions.csv")
    table = pd.read_csv(tmp_path / "regions.csv", index_col="gene")
    pd.testing.assert_frame_equal(table, expected, check_names=False, check_dtype=False, rtol=0, atol=1e-6)
    # what is shown: largest difference first
    rows = [row.split("\t") for row in page.locator("#region-table tbody tr").all_inner_texts()]
    largest = expected["difference"].abs().idxmax()
    assert rows[0][0].strip() == largest
    assert float(rows[0][1].replace("−", "-")) == pytest.approx(expected.loc[largest, "difference"], abs=0.006)
    page.fill("#region-search", largest[:4])
    page.locator("#region-table tbody button").first.click()
    page.locator(f"body[data-gene='{largest}']").wait_for()


@pytest.mark.full
def test_files_of_regions_are_opened(page, draws, tmp_path):
    page.click("#tab-regions")
    spots = np.arange(81) % 9 < 3
    write_regions(tmp_path / "a.geojson", {"Tumour": Region("Tumour", spots), "Rest": Region("Rest", ~spots)}, draws)
    page.set_input_files("#region-file", tmp_path / "a.geojson")
    page.locator("#region-text", has_text="A Tumour (27 spots").wait_for()
    page.set_input_files("#region-file", files=[{"name": "x.geojson", "mimeType": "", "buffer": b"{"}])
    page.locator("#status", has_text="x.geojson cannot be read").wait_for()
    rows = [
        f'"{barcode.replace(chr(34), chr(34) * 2)}",{"A" if i < 4 else "B"}'
        for i, barcode in enumerate(draws.obs_names)
    ]
    table = "\r\n".join(["barcode,label", *rows]).encode()
    page.set_input_files("#region-file", files=[{"name": "x.csv", "mimeType": "text/csv", "buffer": table}])
    page.locator("#regions-list li").nth(3).wait_for()
    assert page.locator("#regions-list .soft").all_inner_texts() == ["27 spots", "54 spots", "4 spots", "77 spots"]
    page.locator("#regions-list li").nth(0).locator("[aria-label^=Remove]").click()
    page.locator("#region-text", has_text=re.compile("^Rest")).wait_for()


@pytest.mark.full
def test_labels_of_several_slides(page, draws):
    """Of a table of several slides, such as that of `hinge cluster`, the rows of this one are used."""
    page.click("#tab-regions")
    spots = [barcode for barcode in draws.obs_names if '"' not in barcode]
    rows = [f"other,{spot},X" for spot in spots] + [
        f"sim0,{spot},{'A' if i < 5 else 'B'}" for i, spot in enumerate(spots)
    ]
    for name, column, text in (
        ("a", "slide", "A A (5 spots"),
        ("b", "origin", "b.csv cannot be read: it has several labels"),
    ):
        table = "\n".join([f"{column},spot,cluster", *rows]).encode()
        page.set_input_files("#region-file", files=[{"name": f"{name}.csv", "mimeType": "text/csv", "buffer": table}])
        page.locator("#region-text, #status", has_text=text).wait_for()
    assert page.locator("#regions-list .soft").all_inner_texts() == ["5 spots", "75 spots"]


@pytest.mark.full
def test_the_table_is_enlarged(page, draws):
    page.click("#tab-regions")
    box = page.locator(".pane .view").nth(0).bounding_box()
    page.click("[data-tool=rectangle]")
    drag(page, (box["x"] + 8, box["y"] + 40), (middle(page)[0], box["y"] + box["height"] - 40))
    page.locator("#region-table td").first.wait_for()
    page.fill("#region-threshold", "1.5")
    page.keyboard.press("Enter")
    page.locator("#region-table th", has_text="Share above").wait_for()
    page.click("#region-enlarge")
    box, table = (page.locator(part).bounding_box() for part in ("#region-dialog", "#region-table"))
    assert table["x"] >= box["x"] and table["x"] + table["width"] <= box["x"] + box["width"]
    page.keyboard.press("Escape")
    page.locator("#panel-regions #region-table td").first.wait_for()


@pytest.mark.full
def test_a_polygon_is_closed_and_cancelled(page):
    page.click("#tab-regions")
    x, y = middle(page)
    page.click("[data-tool=polygon]")
    for place in ((x - 80, y - 80), (x + 80, y - 80), (x, y + 80)):
        page.mouse.click(*place)
    page.keyboard.press("Enter")
    page.locator("#regions-list li").wait_for()
    page.click("[data-tool=lasso]")
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 50, y + 50, steps=3)
    page.keyboard.press("Escape")
    page.mouse.up()
    assert page.locator("#regions-list li").count() == 1
    assert page.locator("[data-tool=lasso]").get_attribute("aria-pressed") == "false"


def test_requests_of_regions_fit_for_a_large_slide(server):
    from test_viewer import ask

    spots = encode_spots(np.random.default_rng(0).random(100_000) < 0.5)
    query = urllib.parse.urlencode({"first": spots, "second": spots})
    answer, content = ask(server, f"/slides/0/compare.json?{query}")
    assert answer.status == 500 and b"holds no set of 81 spots" in content
