"""Novelty and the smooth map as layers, genes that only the backbone knows, and draws with genes outside the panel."""

import json
import shutil
import zlib
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from helpers.viewer import is_complaint, pixels, serving

from hinge.data.draws import read_draws
from hinge.run.run import Run
from hinge.utils.errors import DataError
from hinge.utils.files import write_json
from hinge.viewer import Viewer, write_viewer
from hinge.viewer import maps as maps_module
from hinge.viewer.maps import SlideMap, find_map


def write_map(path: Path, draws: ad.AnnData, pitch_px: float = 25.0, **about) -> np.ndarray:
    """Write a map as `hinge map` does, values i + 100 j + gene in row i and column j, and return its cells (n, 2)."""
    rows, columns = np.meshgrid(np.arange(12), np.arange(14), indexing="ij")
    cells = np.stack([columns.ravel(), rows.ravel()], axis=1)
    cells = cells[(cells != [3, 5]).any(axis=1)]  # one cell is off the tissue
    genes = draws.var_names[::-1][:20]
    values = cells[:, 1] / 10 + cells[:, 0] / 100 + np.arange(20)[:, None]
    dense = ad.AnnData(values.T.astype(np.float32), var=pd.DataFrame(index=genes))
    dense.obs["array_x"], dense.obs["array_y"] = cells.T
    dense.obsm["spatial"] = cells * pitch_px + [40.0, 60.0]
    facts = {"spot_pitch_um": 50.0, "um_per_px": 2.0, "method": "regression", "transform": "log2p1"}
    dense.uns["hinge"] = facts | about
    path.parent.mkdir(parents=True, exist_ok=True)
    dense.write_h5ad(path)
    return cells


@pytest.fixture(scope="module")
def run_folder(folder, tmp_path_factory) -> Path:
    """The run with novelty, a map, a backbone that knows genes outside the panel, and draws of one of them."""
    copy = tmp_path_factory.mktemp("layers") / "run"
    shutil.copytree(folder, copy)
    path = copy / "samples" / "sim0.h5ad"
    draws = read_draws(path)
    draws.obs["novelty"] = np.linspace(0, 2, draws.n_obs).astype(np.float32)
    draws.write_h5ad(path)
    write_map(copy / "maps" / "sim0.50um.h5ad", draws)
    (copy / "samples" / "sim1.h5ad").unlink()
    outside = draws.copy()
    outside.var["in_panel"] = np.arange(outside.n_vars) > 0
    outside.write_h5ad(copy / "samples" / "sim0.outside-panel.h5ad")
    (copy / "backbone").mkdir()
    names = [*draws.var_names, "ESR1", "ESRRA", "it's"]
    write_json(copy / "backbone" / "config.json", {"gene_names": names, "num_prior_factors": 4})
    return copy


@pytest.fixture(scope="module")
def rich(run_folder) -> Viewer:
    return Viewer(Run.open(run_folder))


def floats(content: bytes, kind: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(content), kind)


# --- files -------------------------------------------------------------------------------------------


def test_novelty_and_its_share(rich, viewer):
    facts = json.loads(rich.read("slides/0/slide.json"))
    novelty = np.linspace(0, 2, facts["spots"])
    assert facts["novel"] == pytest.approx((novelty > 1).mean())
    np.testing.assert_allclose(floats(rich.read("slides/0/novelty.bin"), "<f4"), novelty, rtol=1e-6)
    assert json.loads(viewer.read("slides/0/slide.json"))["novel"] is None
    assert viewer.read("slides/0/novelty.bin") is None


def test_the_map_lies_where_its_points_do(rich, run_folder):
    facts = json.loads(rich.read("slides/0/slide.json"))
    grid = facts["map"]
    assert (grid["rows"], grid["columns"], grid["cell_px"], grid["pitch_um"]) == (12, 14, 25, 50)
    assert [grid["left"], grid["top"]] == [40 - 12.5, 60 - 12.5]  # points are in the middle of cells
    dense = ad.read_h5ad(run_folder / "maps" / "sim0.50um.h5ad")
    assert [facts["genes"][gene] for gene in grid["genes"]] == [g for g in facts["genes"] if g in dense.var_names]
    values = floats(rich.read(f"slides/0/map/{grid['genes'][2]}.bin"), "<f2").reshape(12, 14)
    assert np.isnan(values[5, 3]) and np.isnan(values).sum() == 1
    column = dense[:, facts["genes"][grid["genes"][2]]].X.ravel()
    np.testing.assert_allclose(values[dense.obs["array_y"], dense.obs["array_x"]], column, rtol=1e-3)
    missing = next(gene for gene in range(24) if gene not in grid["genes"])
    assert rich.read(f"slides/0/map/{missing}.bin") is None and rich.read("slides/0/map/99.bin") is None


def test_a_fine_map_is_averaged_over_blocks(rich, run_folder, monkeypatch):
    monkeypatch.setattr(maps_module, "MOST_CELLS", 7)
    draws = read_draws(run_folder / "samples" / "sim0.h5ad")
    smooth = SlideMap(run_folder / "maps" / "sim0.50um.h5ad", draws)
    gene = int(np.flatnonzero(smooth.genes == 0)[0])
    assert smooth.shape == (6, 7) and smooth.index(1.0)["cell_px"] == 50
    values = smooth.gene(gene)
    assert values[0, 0] == pytest.approx(np.mean([0, 0.1, 0.01, 0.11]))
    assert values[2, 1] == pytest.approx(np.mean([0.42, 0.43, 0.52]))  # without the cell off the tissue


def test_the_finest_map_of_the_slide_itself_is_taken(tmp_path):
    for name in ("a.100um", "a.25um", "a.12.5um", "a.b.5um", "ab.5um", "a.xum"):
        (tmp_path / f"{name}.h5ad").touch()
    assert find_map(tmp_path, "a").name == "a.12.5um.h5ad"
    assert find_map(tmp_path, "a.b").name == "a.b.5um.h5ad"
    assert find_map(tmp_path, "c") is None and find_map(tmp_path / "none", "a") is None


def test_a_map_of_something_else_is_refused(run_folder, tmp_path):
    draws = read_draws(run_folder / "samples" / "sim0.h5ad")
    path = tmp_path / "sim0.50um.h5ad"
    for about, reason in (
        ({"transform": "log1p_cp10k"}, "units other"),
        ({"model_digest": "other"}, "a model other"),
        ({"um_per_px": 0.0}, "not a map"),
        ({"spot_pitch_um": "x"}, "not a map"),
    ):
        write_map(path, draws, **about)
        with pytest.raises(DataError, match=reason):
            SlideMap(path, draws)
    path.write_bytes(b"damaged")
    with pytest.raises(DataError):
        SlideMap(path, draws)


def test_a_damaged_map_is_left_out_with_a_note(run_folder, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run_folder, copy)
    (copy / "maps" / "sim0.50um.h5ad").write_bytes(b"damaged")
    facts = json.loads(Viewer(Run.open(copy)).read("slides/0/slide.json"))
    assert facts["map"] is None and "sim0.50um.h5ad is damaged" in facts["note"]


def test_the_vocabulary_is_what_can_be_drawn(rich, viewer, run_folder, tmp_path):
    assert json.loads(rich.read("vocabulary.json"))["genes"][-3:] == ["ESR1", "ESRRA", "it's"]
    assert json.loads(viewer.read("vocabulary.json")) == {"genes": []}
    copy = tmp_path / "run"
    shutil.copytree(run_folder, copy)
    for content in ({"gene_names": ["A"]}, {"gene_names": 3, "num_prior_factors": 4}, ["A"]):
        write_json(copy / "backbone" / "config.json", content)
        assert json.loads(Viewer(Run.open(copy)).read("vocabulary.json")) == {"genes": []}


def test_draws_with_genes_outside_the_panel_are_of_the_same_slide(rich):
    assert rich.slides == ["sim0", "sim0.outside-panel"]
    facts = json.loads(rich.read("slides/1/slide.json"))
    assert facts["measured"] and facts["map"] and facts["outside"] == [0]


def test_all_of_it_is_written_to_files(rich, run_folder, tmp_path):
    output = write_viewer(rich.run, tmp_path / "viewer", ["sim0"])
    gene = json.loads((output / "slides/0/slide.json").read_text())["map"]["genes"][0]
    for path in ("vocabulary.json", "slides/0/novelty.bin", f"slides/0/map/{gene}.bin"):
        assert (output / path).read_bytes() == rich.read(path)


# --- the page ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rich_server(rich):
    with serving(rich) as running:
        yield running


@pytest.fixture
def rich_page(chromium, rich_server):
    context = chromium.new_context(viewport={"width": 1440, "height": 900}, color_scheme="light")
    page, complaints = context.new_page(), []
    page.on("console", lambda message: complaints.append(message.text) if is_complaint(message) else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(rich_server.url)
    page.wait_for_selector("body[data-gene]")
    yield page
    context.close()
    assert not complaints


def open_gene(page, facts: dict, gene: int) -> None:
    page.fill("#gene-search", facts["genes"][gene])
    page.keyboard.press("Enter")
    page.locator(f'body[data-gene="{facts["genes"][gene]}"]').wait_for()


@pytest.mark.full
def test_novelty_as_a_layer(rich_page, rich, tmp_path):
    page = rich_page
    page.locator(".pane select").nth(1).select_option("novelty")
    assert page.locator(".pane .unit").nth(1).inner_text() == "above 1: unlike training"
    page.click("#tab-display")
    with page.expect_download() as file:
        page.click("#save-csv")
    file.value.save_as(tmp_path / "shown.csv")
    table = pd.read_csv(tmp_path / "shown.csv")
    np.testing.assert_allclose(table["Novelty (above 1: unlike training)"], np.linspace(0, 2, 81), rtol=1e-6)
    page.locator(".pane .view").nth(0).click()
    page.keyboard.press("Escape")
    page.keyboard.press("Shift+ArrowRight")
    page.locator("#panel-spot .facts", has_text="Novelty").wait_for()


@pytest.mark.full
def test_the_map_as_a_layer(rich_page, rich, tmp_path):
    page, facts = rich_page, json.loads(rich.read("slides/0/slide.json"))
    open_gene(page, facts, facts["map"]["genes"][0])
    before = pixels(page, 1)
    page.locator(".pane select").nth(1).select_option("map")
    page.locator(".pane .unit", has_text="log2p1, 50 µm").wait_for()
    assert np.abs(pixels(page, 1) - before).max() > 30
    assert "map" in page.url
    page.click("#tab-display")
    with page.expect_download() as file:
        page.click("#save-svg")
    file.value.save_as(tmp_path / "map.svg")
    assert 'href="data:image/png' in (tmp_path / "map.svg").read_text()
    missing = next(gene for gene in range(24) if gene not in facts["map"]["genes"])
    open_gene(page, facts, missing)
    page.locator(".pane .unit", has_text="the map lacks this gene").wait_for()


@pytest.mark.full
def test_a_gene_outside_the_panel_says_so_and_offers_the_command(rich_page):
    page = rich_page
    page.fill("#gene-search", "esr")
    page.locator("#genes .outside").nth(1).wait_for()
    assert page.locator("#genes .outside .name").all_inner_texts() == ["ESR1", "ESRRA"]
    assert "The backbone can draw" in page.locator("#genes .more").inner_text()
    page.keyboard.press("Enter")
    command = page.locator("#outside-command")
    assert command.inner_text() == "hinge sample run --slide sim0 --genes genes.txt"
    page.keyboard.press("Escape")
    page.fill("#gene-search", "it's")
    page.locator("#genes .outside").first.click()
    with page.expect_download() as file:
        page.click("#outside-file")
    assert file.value.path().read_text() == "ESR1\nit's\n"
    page.click("#outside-clear")
    page.fill("#gene-search", "NOTHERE")
    page.locator("#genes .more", has_text="Neither the draws nor the backbone").wait_for()


@pytest.mark.full
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [900, 1440])
def test_layers_and_search_have_no_serious_fault_of_accessibility(chromium, rich_server, scheme, width):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")
    context = chromium.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, bypass_csp=True)
    page = context.new_page()
    page.goto(rich_server.url)
    page.wait_for_selector("body[data-gene]")
    for pane, layer in enumerate(("map", "novelty")):
        page.locator(".pane select").nth(pane).select_option(layer)
    page.fill("#gene-search", "ESR")
    page.locator("#genes .outside").first.wait_for()
    faults = axe.Axe().run(page).response["violations"]
    page.locator("#genes .outside").first.click()
    page.locator("#outside-dialog[open]").wait_for()
    faults += axe.Axe().run(page).response["violations"]
    assert [fault["id"] for fault in faults if fault["impact"] in ("serious", "critical")] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    context.close()


@pytest.mark.full
def test_a_gene_outside_the_panel_is_marked_once_drawn(rich_page, rich):
    page, facts = rich_page, json.loads(rich.read("slides/1/slide.json"))
    page.select_option("#slide", "1")
    page.locator("body[data-slide='sim0.outside-panel']").wait_for()
    open_gene(page, facts, 0)
    page.locator("#panel-gene .caption", has_text="outside the panel").wait_for()
    assert "slide=sim0.outside-panel" in page.url


@pytest.mark.full
def test_the_overview_gives_way_while_all_is_in_sight(rich_page):
    navigator = rich_page.locator(".navigator")
    navigator.wait_for(state="hidden")
    for _ in range(3):
        rich_page.keyboard.press("+")
    navigator.wait_for(state="visible")
