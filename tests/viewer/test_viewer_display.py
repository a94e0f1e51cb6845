"""What the viewer shows besides a gene's values, and what it lets out: layers, filters, links, files."""

import base64
import io
import xml.etree.ElementTree as ET

import numpy as np
import pandas as pd
import pytest
from helpers.viewer import N_DRAWS, middle, pixels
from PIL import Image


def gene_of(page, viewer) -> tuple[int, object]:
    content = viewer.slide(0)
    return content.index()["genes"].index(page.locator("body").get_attribute("data-gene")), content


def saved(page, button: str, path):
    with page.expect_download() as file:
        page.click(button)
    file.value.save_as(path)
    return path


@pytest.mark.full
def test_the_probability_above_a_threshold(page, viewer, tmp_path):
    gene, content = gene_of(page, viewer)
    draws = content.draws(np.array([gene]))[..., 0]
    page.locator(".pane select").nth(0).select_option("above")
    page.click("#tab-display")
    threshold = float(np.round(np.median(draws), 2)) + 0.003
    page.fill("#threshold", str(threshold))
    page.keyboard.press("Enter")
    table = pd.read_csv(saved(page, "#save-csv", tmp_path / "shown.csv"))
    column = next(name for name in table if name.startswith("P(above"))
    # draws reach the page in 255 steps, so that one next to the threshold may fall on its other side
    away = np.abs(draws - threshold).min(axis=0) > np.ptp(draws) / 400
    np.testing.assert_allclose(table[column][away], (draws > threshold).mean(axis=0)[away], atol=1e-6)
    assert away.sum() > 40 and "threshold=" in page.url


@pytest.mark.full
def test_a_filter_hides_spots_and_the_csv_holds_what_is_shown(page, viewer, tmp_path):
    gene, content = gene_of(page, viewer)
    mean = content.mean(np.array([gene]))[:, 0]
    page.click("#tab-display")
    before = pixels(page, 1)
    ordered = np.sort(mean)[20:60]
    gap = np.diff(ordered).argmax()  # values reach the page in half precision
    middle_value = float(ordered[gap : gap + 2].mean())
    page.fill("#filter-low", f"{middle_value:.3f}")
    page.keyboard.press("Enter")
    page.wait_for_timeout(200)
    assert np.abs(pixels(page, 1) - before).max() > 30
    table = pd.read_csv(saved(page, "#save-csv", tmp_path / "shown.csv"), index_col="barcode")
    wanted = [name for name, value in zip(content._draws.obs_names, mean, strict=True) if value >= middle_value]
    assert sorted(table.index) == sorted(wanted)
    places = pd.DataFrame(np.asarray(content._draws.obsm["spatial"]), index=content._draws.obs_names)
    np.testing.assert_allclose(table[["x", "y"]], places.loc[table.index], atol=0.01)


@pytest.mark.full
def test_genes_in_channels_and_gene_sets(page, viewer, tmp_path):
    content = viewer.slide(0)
    names = [name for name in content.index()["genes"] if " " not in name][:4]
    page.click("#tab-display")
    for channel, name in zip(("red", "green", "blue"), names, strict=False):
        page.fill(f"#channel-{channel}", name)
        page.keyboard.press("Enter")
    page.locator(".legend .unit", has_text="".join(names[:3])).wait_for()
    title = f"red {names[0]} · green {names[1]} · blue {names[2]}"
    assert page.locator(f".legend[title='{title}']").count() == 1
    page.fill("#channel-red", "NOTHERE")
    page.keyboard.press("Enter")
    page.locator("#status", has_text="NOTHERE is not among the 24 genes").wait_for()
    gmt = "MINE\tabout\t" + "\t".join([*names, "ELSEWHERE"]) + "\nEMPTY\tx\tNOTHING\n"
    page.set_input_files("#gmt-file", files=[{"name": "a.gmt", "mimeType": "", "buffer": gmt.encode()}])
    page.locator("body[data-gene=MINE]").wait_for()
    page.locator("#status", has_text="mean of 4 of its 5 genes").wait_for()
    page.locator(".pane select").nth(0).select_option("mean")
    table = pd.read_csv(saved(page, "#save-csv", tmp_path / "set.csv"))
    mean = content.mean(np.array([content.index()["genes"].index(name) for name in names])).astype(float)
    expected = ((mean - mean.mean(axis=0)) / mean.std(axis=0)).mean(axis=1)
    np.testing.assert_allclose(table["Predicted mean of MINE (scaled)"], expected, atol=0.01)
    page.select_option("#gene-sets", "EMPTY")
    page.locator("#status", has_text="none of the 1 genes of EMPTY").wait_for()


@pytest.mark.full
def test_the_link_keeps_what_is_shown(page):
    page.click("#tab-display")
    page.select_option("#clip", "5")
    page.check("#own-range")
    page.fill("#threshold", "2.5")
    page.keyboard.press("Enter")
    page.click("#tab-regions")
    page.keyboard.press("+")
    page.wait_for_timeout(1200)
    page.click("[data-tool=rectangle]")
    x, y = middle(page)
    page.mouse.move(x - 90, y - 90)
    page.mouse.down()
    page.mouse.move(x + 90, y + 90, steps=4)
    page.mouse.up()
    page.locator("#region-text", has_text="Region 1 (").wait_for()
    page.wait_for_timeout(300)
    text, address = page.locator("#region-text").inner_text(), page.url
    assert "range=5own" in address and "threshold=2.5" in address and "view=" in address and "&a=" in address
    before = pixels(page, 1)
    page.reload()
    page.locator("#region-text", has_text="Region 1 (").wait_for(state="attached")
    page.wait_for_timeout(1200)
    assert page.locator("#region-text").text_content() == text
    assert page.locator("#clip").input_value() == "5" and page.locator("#own-range").is_checked()
    view = [float(number) for number in address.split("view=")[1].split("&")[0].split("%2C")]
    again = [float(number) for number in page.url.split("view=")[1].split("&")[0].split("%2C")]
    np.testing.assert_allclose(again, view, rtol=1e-3)
    assert np.abs(pixels(page, 1) - before).mean() < 12  # a region from the address is drawn as its spots


@pytest.mark.full
def test_pictures_are_saved(page, tmp_path):
    page.click("#tab-display")
    picture = np.asarray(Image.open(saved(page, "#save-png", tmp_path / "a.png")).convert("RGB"), float)
    assert picture.std() > 20 and picture.shape[1] > 1500
    root = ET.parse(saved(page, "#save-svg", tmp_path / "a.svg")).getroot()
    space = "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f".//{space}circle")) == 2 * 81 and len(root.findall(f".//{space}image")) == 2
    texts = [text.text for text in root.iter(f"{space}text")]
    assert any(text.startswith("Predicted mean of") for text in texts) and any("µm" in text for text in texts)


@pytest.mark.full
def test_a_picture_has_regions_and_the_colours_of_channels(page, viewer, tmp_path):
    names = [name for name in viewer.slide(0).index()["genes"] if " " not in name][:2]
    page.click("#tab-regions")
    x, y = middle(page)
    page.click("[data-tool=rectangle]")
    page.mouse.move(x - 60, y - 60)
    page.mouse.down()
    page.mouse.move(x + 60, y + 60, steps=4)
    page.mouse.up()
    page.locator("#region-table td").first.wait_for()
    page.click("#tab-display")
    for channel, name in zip(("red", "blue"), names, strict=True):
        page.fill(f"#channel-{channel}", name)
        page.keyboard.press("Enter")
    page.locator(".legend .unit i").nth(1).wait_for()
    root = ET.parse(saved(page, "#save-svg", tmp_path / "a.svg")).getroot()
    space = "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f".//{space}path[@stroke='#1d4ed8']")) == 2
    keys = [(key.get("fill"), key.text) for key in root.iter(f"{space}tspan")]
    assert [text for _, text in keys] == ["■ ", names[0], "■ ", names[1]] and keys[0][0] == "#e5383b"
    assert np.asarray(Image.open(saved(page, "#save-png", tmp_path / "a.png")).convert("RGB"), float).std() > 20


@pytest.mark.full
def test_a_gene_on_all_slides(page):
    page.click("#tab-display")
    page.click("#all-slides")
    page.locator("#cohort button").nth(1).wait_for()
    page.locator("#cohort-text", has_text="One range").wait_for()
    drawn = np.asarray(Image.open(io.BytesIO(page.locator("#cohort canvas").nth(0).screenshot())).convert("L"), float)
    assert drawn.std() > 10
    page.locator("#cohort button").nth(1).click()
    page.locator("#slide").evaluate("node => node.value")
    page.locator("#status.note:not(:empty)").wait_for()
    assert page.locator("#slide").input_value() == "1"


@pytest.mark.full
def test_place_magnification_brightness_and_first_gene(page, viewer):
    page.mouse.move(*middle(page))
    assert "px · " in page.locator(".where").first.inner_text()
    assert "µm/px" in page.locator(".magnification").first.inner_text()
    assert page.locator(".navigator").count() == 1
    assert "upper quartile" in page.locator("#panel-gene .caption").inner_text()
    page.keyboard.press("h")
    page.wait_for_timeout(300)
    before = pixels(page, 1).mean()
    page.click("#tab-display")
    page.locator("#brightness").fill("60")
    page.wait_for_timeout(300)
    assert pixels(page, 1).mean() < before - 20
    page.fill("#gene-search", "NOTHERE")
    page.locator("#genes .more", has_text="draws no genes outside the panel").wait_for()
    assert viewer.slide(0).index()["draws"] == N_DRAWS


DRAW_POINTS = """async () => {
  const { Points } = await import("/points.js");
  const slide = { barcodes: ["a", "b", "c", "d"], places: new Float32Array([10, 10, 30, 10, 10, 30, 30, 30]) };
  const points = Points.of(slide);
  if (!points) return null;
  points.setColours({ codes: [0, 1, 0, 2], css: ["rgb(255,0,0)", "#00ff00", null], order: [0, 1, 3] });
  points.draw(80, 80, 2, 0, 0, 8);
  return points.canvas.toDataURL("image/png");
}"""


@pytest.mark.full
def test_many_spots_are_drawn_by_webgl(page):
    """Places, colours, a ring for a spot without a value, nothing for a hidden spot."""
    picture = page.evaluate(DRAW_POINTS)
    if picture is None:
        pytest.skip("this browser has no WebGL")
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture.split(",")[1]))).convert("RGBA"))
    assert pixels.shape == (80, 80, 4)
    assert pixels[20, 20].tolist() == [255, 0, 0, 255] and pixels[20, 60].tolist() == [0, 255, 0, 255]
    assert pixels[60, 20, 3] == 0 and pixels[40, 40, 3] == 0
    assert pixels[60, 60, 3] == 0 and pixels[60, 60 + 7].tolist() == [138, 141, 146, 255]


RANGE = """async () => {
  const { ends } = await import("/page.js");
  return ends(new Float32Array(150000).fill(2), [NaN, 1], new Float32Array(150000).fill(3));
}"""


@pytest.mark.full
def test_the_range_of_more_values_than_a_call_takes_as_arguments(page):
    assert page.evaluate(RANGE) == [1, 3]


OUTLINE = """async () => {
  const { outlineOf } = await import("/regions.js");
  const places = [0, 1, 2, 3].flatMap((row) => [0, 1, 2, 3].flatMap((column) => [30 * column, 30 * row]));
  const slide = { places, pitch: 20, box: { left: 0, top: 0, width: 90, height: 90 } }; // squares of 30
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [140, 140];
  const context = canvas.getContext("2d");
  context.translate(10, 10);
  // the lower right four of sixteen spots, at the rim, and the first one
  context.stroke(outlineOf(slide, Uint8Array.from({ length: 16 }, (_, i) => Number(i === 0 || (i % 4 > 1 && i > 7)))));
  return canvas.toDataURL("image/png");
}"""


@pytest.mark.full
def test_the_outline_of_many_spots_goes_around_them(page):
    picture = page.evaluate(OUTLINE)
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture.split(",")[1]))).convert("RGBA"))[..., 3] > 0
    assert drawn[10:40, 10].all() and drawn[10, 10:40].all() and drawn[10:40, 40].all() and drawn[40, 10:40].all()
    for side in (drawn[70:130, 70], drawn[70:130, 130], drawn[70, 70:130], drawn[130, 70:130]):
        assert side.all()
    drawn[8:43, 8:43] = drawn[68:133, 68:73] = drawn[68:133, 128:133] = drawn[68:73, 68:133] = drawn[
        128:133, 68:133
    ] = 0
    assert not drawn.any()


@pytest.mark.full
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [900, 1440])
def test_no_serious_fault_of_accessibility_and_nothing_cut(chromium, server, scheme, width):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")
    context = chromium.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, bypass_csp=True)
    page = context.new_page()
    page.goto(server.url)
    page.wait_for_selector("body[data-gene]")
    page.click("#tab-regions")
    page.click("[data-tool=rectangle]")
    x, y = middle(page)
    page.mouse.move(x - 60, y - 60)
    page.mouse.down()
    page.mouse.move(x + 60, y + 60, steps=4)
    page.mouse.up()
    page.locator("#region-table td").first.wait_for()
    for tab in ("gene", "spot", "pairs", "regions", "display"):
        page.click(f"#tab-{tab}")
        found = [
            fault for fault in axe.Axe().run(page).response["violations"] if fault["impact"] in ("serious", "critical")
        ]
        assert [(fault["id"], fault["nodes"][0]["html"][:200]) for fault in found] == [], tab
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        parts = page.locator(".bar > *, .pane > header > select, .tabs button, .form > *").all()
        boxes = [box for part in parts if (box := part.bounding_box())]
        assert all(box["x"] >= 0 and box["x"] + box["width"] <= width for box in boxes), tab
    context.close()
