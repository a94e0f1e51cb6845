"""The report: one file that loads nothing, shows what it was given, and lets no name from a file run."""

import base64
import hashlib
import io
import json
import re
import zlib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from anndata import AnnData
from PIL import Image
from scipy import sparse

from hinge.config import check_config, save_config
from hinge.data.draws import read_draws
from hinge.data.regions import Region, write_regions
from hinge.data.transforms import get_transform
from hinge.evaluation.metrics.accuracy import gene_pcc
from hinge.evaluation.metrics.coexpression import coexpression_scores, correlation_matrix
from hinge.report import ReportSlide, report_run, report_slide, write_report
from hinge.run.run import Run
from hinge.tasks.regions import compare_regions
from hinge.utils.errors import DataError

HOSTILE = [
    "<script>document.title='run'</script>",
    "</script><img src=x onerror=\"document.title='run'\">",
    "<!-- <script>",
    "$title &amp; \u2028'\"",
]


def make_slide(name="S1", n=60, n_genes=12, n_draws=20, seed=0, **changes) -> ReportSlide:
    """A slide whose genes share a gradient over the tissue, on a smooth image with some grain."""
    rng = np.random.default_rng(seed)
    coords = rng.uniform(1000, 9000, (n, 2))
    level = np.sin(coords[:, :1] / 2000) * rng.uniform(0.5, 2, n_genes) + 3
    draws = np.clip(level + rng.normal(size=(n_draws, n, n_genes)), 0, None).astype(np.float32)
    y, x = np.mgrid[:320, :400]
    image = np.stack([200 + 40 * np.sin(x / 20), 150 + 40 * np.sin(y / 15), 200 + 0 * x], axis=-1)
    image = np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)
    measured = np.clip(level + rng.normal(size=(n, n_genes)), 0, None).astype(np.float32)
    genes = [f"GENE{i}" for i in range(n_genes)]
    slide = ReportSlide(name, image, 0.04, coords, 150.0, genes, measured, draws, "log2p1")
    return replace(slide, **changes)


def make_scores(methods=("hinge", "ridge-cv", "noise-ceiling"), slides=("S1", "S2")) -> dict:
    definitions = {
        "pcc_mean": {"label": "PCC", "definition": "Mean over genes.", "unit": "", "better": "higher"},
        "coverage_90": {
            "label": "90 % coverage",
            "definition": "Held.",
            "unit": "",
            "better": "nearest 0.9",
        },
    }
    rows = [
        {"slide": slide, "method": method, "transform": "log2p1", "n_spots": 60, "n_genes": 12, "n_draws": 20}
        | {"pcc_mean": 0.5 + 0.1 * i, "coverage_90": float("nan") if i else 0.8}
        for slide in slides
        for i, method in enumerate(methods)
    ]
    return {"hinge_version": "0", "definitions": definitions, "rows": rows}


class Page(HTMLParser):
    """The elements of a page, with the text of its scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self._within = None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._within = {"script": self.scripts, "style": self.styles}.get(tag)
        if self._within is not None:
            self._within.append("")

    def handle_endtag(self, tag):
        self._within = None

    def handle_data(self, data):
        if self._within is not None:
            self._within[-1] += data

    @property
    def data(self) -> dict:
        return json.loads(self.scripts[0])


def unpack(packed: dict, *shape: int) -> np.ndarray:
    """What the page's own `unpack` does."""
    planes = np.frombuffer(zlib.decompress(base64.b64decode(packed["data"])), dtype=np.uint8).reshape(2, -1)
    steps = np.ascontiguousarray(planes.T).view("<i2").ravel()
    return np.where(steps == -32768, np.nan, steps * packed["quantum"]).reshape(shape)


@pytest.fixture(scope="module")
def two_slides(tmp_path_factory):
    slides = [make_slide("S1"), make_slide("S2", n=40, seed=1)]
    path = tmp_path_factory.mktemp("report") / "report.html"
    settings = {"seed": 3, "model": {"gate": "linear", "layers": [1, 2]}}
    assert write_report(path, make_scores(), slides, "A run", settings) == path
    return slides, Page(path), path


def test_loads_nothing_and_runs_only_its_own_script(two_slides):
    _, page, _ = two_slides
    for _, attributes in page.elements:
        for name in ("src", "href", "srcset", "data", "action"):
            assert attributes.get(name, "#").startswith("#"), attributes
        assert not [name for name in attributes if name.startswith("on")]
    assert {tag for tag, _ in page.elements}.isdisjoint({"link", "iframe", "img", "object", "embed", "base"})
    script = page.scripts[1].replace("http://www.w3.org/2000/svg", "")  # a name, not an address
    assert not re.search(r"@import|url\(", page.styles[0])
    assert not re.search(r"https?://|\bimport\b|\bfetch\(|XMLHttpRequest|WebSocket|innerHTML|\beval\(", script)
    metas = [attributes for tag, attributes in page.elements if tag == "meta"]
    assert [attributes["id"] for tag, attributes in page.elements if tag == "section"] == (
        ["slide", "calibration", "coexpression", "genes", "regions", "scores", "configuration"]
    )
    policy = next(meta["content"] for meta in metas if "http-equiv" in meta)
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy


def test_page_holds_what_it_was_given(two_slides):
    slides, page, path = two_slides
    assert [slide["name"] for slide in page.data["slides"]] == ["S1", "S2"]
    assert page.data["settings"] == {"seed": "3", "model.gate": "linear", "model.layers": "1, 2"}
    assert "<h1>A run</h1>" in path.read_text(encoding="utf-8")
    for slide, shown in zip(slides, page.data["slides"], strict=True):
        n, n_genes = slide.measured.shape
        assert shown["genes"] == slide.genes and len(shown["barcodes"]) == n
        for name, values in {
            "measured": slide.measured,
            "mean": slide.draws.mean(axis=0),
            "std": slide.draws.std(axis=0),
        }.items():
            np.testing.assert_allclose(unpack(shown[name], n_genes, n).T, values, atol=0.02)
        np.testing.assert_allclose(unpack(shown["draws"][2], n_genes, n).T, slide.draws[2], atol=0.02)
        np.testing.assert_allclose(
            shown["genewise"]["pcc"], gene_pcc(slide.measured, slide.draws.mean(axis=0)), rtol=1e-4
        )
        low, high = np.array(shown["scale"]).T
        assert (low < high).all() and shown["n_draws"] == 20


def test_page_opens_on_the_gene_with_the_median_pcc(two_slides):
    _, page, _ = two_slides
    for shown in page.data["slides"]:
        pcc = np.array(shown["genewise"]["pcc"])
        assert (pcc < pcc[shown["first_gene"]]).sum() == len(pcc) // 2


def test_spots_and_image_are_cut_alike(tmp_path):
    dot = np.full((400, 600, 3), 255, dtype=np.uint8)
    coords = np.array([[2000.0, 1000.0], [4000.0, 2500.0], [3000.0, 3000.0]])
    for x, y in (coords / 10).astype(int):
        dot[y - 4 : y + 5, x - 4 : x + 5] = 0
    slide = make_slide(n=3, image_scale=0.1, image=dot, coords=coords, spot_diameter_px=80.0)
    shown = Page(write_report(tmp_path / "r.html", {}, [slide])).data["slides"][0]
    file = io.BytesIO(base64.b64decode(shown["image"].removeprefix("data:image/webp;base64,")))
    image = np.asarray(Image.open(file).convert("RGB"))
    assert image.shape[:2] == (shown["height"], shown["width"]) and image.shape[0] < 400
    for x, y in zip(unpack(shown["x"], 3), unpack(shown["y"], 3), strict=True):
        assert image[round(y), round(x)].max() < 60
        assert image[round(y), round(x) + 8].min() > 200


def test_coexpression_is_clustered_and_scored_draw_by_draw(tmp_path):
    slide = make_slide(n=300, n_genes=8)
    # two groups of genes, interleaved in the panel
    rng = np.random.default_rng(0)
    signal = rng.normal(size=(300, 2))
    values = (signal[:, np.arange(8) % 2] + 0.3 * rng.normal(size=(300, 8))).astype(np.float32)
    slide = replace(slide, measured=values)
    shown = Page(write_report(tmp_path / "r.html", {}, [slide])).data["slides"][0]
    order = np.array(shown["order"])
    assert sorted(order) == list(range(8))
    assert (np.diff(order % 2) != 0).sum() == 1, "each group stays together"
    measured = correlation_matrix(values)[np.ix_(order, order)]
    np.testing.assert_allclose(unpack(shown["coexpression"]["measured"], 8, 8), measured, atol=0.004)
    drawn = np.mean([correlation_matrix(draw) for draw in slide.draws], axis=0)[np.ix_(order, order)]
    np.testing.assert_allclose(unpack(shown["coexpression"]["draws"], 8, 8), drawn, atol=0.004)
    scores = shown["coexpression_scores"]
    expected = coexpression_scores(values, slide.draws)
    assert scores["draws"] == pytest.approx({key: expected[key] for key in ("r", "rmse")}, rel=1e-4)
    assert scores["mean"] == pytest.approx(coexpression_scores(values, slide.draws.mean(axis=0)), rel=1e-4)


def test_calibration_tells_good_draws_from_narrow_ones(tmp_path):
    good = make_slide(n=400)
    centre = good.draws.mean(axis=0)
    narrow = replace(good, name="narrow", draws=centre + 0.3 * (good.draws - centre))
    first, second = Page(write_report(tmp_path / "r.html", {}, [good, narrow])).data["slides"]
    np.testing.assert_allclose(first["calibration"]["empirical"], first["calibration"]["nominal"], atol=0.04)
    assert (np.array(second["calibration"]["empirical"]) < np.array(second["calibration"]["nominal"])).all()
    for shown in (first, second):
        assert sum(shown["calibration"]["ranks"]) == pytest.approx(1, abs=1e-4)
    assert second["calibration"]["ranks"][0] > 2 * first["calibration"]["ranks"][0]
    assert np.mean(second["genewise"]["coverage_90"]) < 0.6 < np.mean(first["genewise"]["coverage_90"])


def test_hostile_names_stay_text(tmp_path):
    slide = make_slide(HOSTILE[0], n_genes=4, genes=HOSTILE, barcodes=[HOSTILE[1]] * 60, transform=HOSTILE[2])
    scores = make_scores(methods=("hinge", HOSTILE[0]), slides=(HOSTILE[1],))
    scores["definitions"]["pcc_mean"]["definition"] = HOSTILE[1]
    path = write_report(tmp_path / "r.html", scores, [slide], HOSTILE[1], {HOSTILE[0]: HOSTILE[1]})
    page = Page(path)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 2 and "img" not in tags
    assert page.data["slides"][0]["genes"] == HOSTILE
    assert page.data["slides"][0]["name"] == HOSTILE[0]
    assert page.data["settings"] == {HOSTILE[0]: HOSTILE[1]}
    assert page.data["scores"]["rows"][0]["slide"] == HOSTILE[1]
    assert "<!--" not in path.read_text(encoding="utf-8")


def test_size_of_a_slide_of_200_genes_and_200_spots(tmp_path):
    rng = np.random.default_rng(0)
    grain = np.kron(rng.normal(0, 18, (350, 350, 3)), np.ones((4, 4, 1)))
    image = np.clip(np.array([200, 150, 200]) + grain, 0, 255).astype(np.uint8)
    slide = make_slide(n=200, n_genes=200, image=image, image_scale=0.14)
    assert write_report(tmp_path / "r.html", {}, [slide]).stat().st_size < 2e6


def test_fewer_draws_are_kept_of_a_large_slide(tmp_path, monkeypatch):
    monkeypatch.setattr("hinge.report.content.VALUES_SHOWN", 3 * 60 * 12 + 1)
    slide = make_slide(n_draws=6)
    shown = Page(write_report(tmp_path / "r.html", {}, [slide])).data["slides"][0]
    assert len(shown["draws"]) == 3 and shown["n_draws"] == 6
    np.testing.assert_allclose(unpack(shown["mean"], 12, 60).T, slide.draws.mean(axis=0), atol=0.02)


@pytest.mark.parametrize(
    "n_draws, has", [(0, []), (1, ["mean", "draws"]), (5, ["mean", "draws", "std", "calibration"])]
)
def test_few_draws(tmp_path, n_draws, has):
    shown = Page(write_report(tmp_path / "r.html", {}, [make_slide(n_draws=n_draws)])).data["slides"][0]
    assert [name for name in ("mean", "draws", "std", "calibration") if shown.get(name)] == has
    assert ("draws" in shown["coexpression"]) == (n_draws > 0)
    if n_draws == 5:
        assert shown["interval"] == "range of 5 draws"
        assert max(shown["calibration"]["nominal"]) < 0.7, "no level that 5 draws cannot resolve"
        assert shown["genewise"]["coverage_90"] == [None] * 12


def test_one_gene_one_spot_and_constant_genes(tmp_path):
    flat = make_slide("flat", n_genes=3)
    flat.measured[:, 1] = 0.0
    slides = [make_slide("one gene", n_genes=1), make_slide("one spot", n=1), flat]
    gene, spot, constant = Page(write_report(tmp_path / "r.html", {}, slides)).data["slides"]
    assert "coexpression" not in gene and gene["genewise"]["pcc"][0] is not None
    assert spot["genewise"]["pcc"] == [None] * 12 and spot["first_gene"] == 0
    assert constant["genewise"]["pcc"][1] is None
    at = constant["order"].index(1)
    assert np.isnan(unpack(constant["coexpression"]["measured"], 3, 3)[at]).all()


def test_scores_alone(tmp_path):
    data = Page(write_report(tmp_path / "r.html", make_scores(), [])).data
    assert data["slides"] == [] and len(data["scores"]["rows"]) == 6
    assert data["scores"]["rows"][1]["coverage_90"] is None
    assert Page(write_report(tmp_path / "empty.html", {}, [])).data["scores"]["rows"] == []


def test_given_mean_is_the_one_scored(tmp_path):
    slide = make_slide()
    slide = replace(slide, mean=slide.measured)
    shown = Page(write_report(tmp_path / "r.html", {}, [slide])).data["slides"][0]
    assert shown["genewise"]["pcc"] == pytest.approx([1.0] * 12)


def test_failure_leaves_the_old_report(tmp_path, monkeypatch):
    path = write_report(tmp_path / "r.html", {}, [], "old")
    before = path.read_bytes()
    real = Path.write_text

    def half(self, text, **options):
        real(self, text[:1000], **options)
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(DataError, match=r"cannot write .*r\.html: disk full"):
        write_report(path, make_scores(), [], "new")
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["r.html"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"genes": ["A"]}, r"slide S1: measured has shape \(60, 12\), the report needs \(60, 1\)"),
        ({"draws": np.zeros((2, 60, 5), np.float32)}, "draws has shape"),
        ({"mean": np.zeros((60, 5), np.float32)}, "mean has shape"),
        ({"measured": np.full((60, 12), np.nan, np.float32)}, "measured holds values that are not finite"),
        ({"image": np.zeros((5, 5), np.uint8)}, "the image is uint8"),
        ({"image": np.zeros((5, 5, 3))}, "the image is float64"),
        ({"image_scale": 0.0}, "must be positive"),
        ({"spot_diameter_px": float("nan")}, "must be positive"),
        ({"barcodes": ["a"]}, "1 barcodes for 60 spots"),
    ],
)
def test_slides_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(DataError, match=message):
        make_slide(**changes)


def make_anndata(name="S1", n=6, genes=("A", "B", "C", "D")):
    """A measured slide, and draws of two of its genes for four of its spots in another order."""
    rng = np.random.default_rng(0)
    slide = AnnData(sparse.csr_matrix(rng.poisson(3.0, (n, len(genes))).astype(np.float32)))
    slide.obs_names, slide.var_names = [f"spot{i}" for i in range(n)], list(genes)
    slide.obsm["spatial"] = rng.uniform(100, 900, (n, 2))
    slide.uns["hinge"] = {"name": name}
    draws = slide[[4, 0, 2, 1], ["C", "A"]].copy()
    draws.X = rng.normal(size=draws.shape).astype(np.float32)
    draws.layers["std"] = np.ones(draws.shape, np.float32)
    for i in (10, 2, 0):
        draws.layers[f"draw_{i:03d}"] = np.full(draws.shape, i, np.float32)
    draws.uns["hinge"] = {"name": name, "transform": "log1p_cp10k"}
    images = {"hires": np.zeros((50, 60, 3), np.uint8), "lowres": np.zeros((5, 6, 3), np.uint8)}
    scales = {"tissue_hires_scalef": 0.05, "tissue_lowres_scalef": 0.005, "spot_diameter_fullres": 30.0}
    draws.uns["spatial"] = {name: {"images": images, "scalefactors": scales}}
    return draws, slide


def test_report_slide_aligns_spots_and_genes():
    draws, slide = make_anndata()
    shown = report_slide(draws, slide)
    total = np.asarray(slide.X.sum(axis=1)).ravel()
    expected = get_transform("log1p_cp10k").forward(slide.X.toarray(), total)[[4, 0, 2, 1]][:, [2, 0]]
    np.testing.assert_allclose(shown.measured, expected)
    assert shown.barcodes == ["spot4", "spot0", "spot2", "spot1"] and shown.genes == ["C", "A"]
    assert shown.draws[:, 0, 0].tolist() == [0, 2, 10]
    np.testing.assert_array_equal(shown.mean, draws.X)
    draws.layers["expected"] = draws.X + 1
    np.testing.assert_array_equal(report_slide(draws, slide).mean, draws.X + 1)
    assert shown.image.shape == (50, 60, 3) and shown.image_scale == 0.05 and shown.spot_diameter_px == 30
    del draws.uns["spatial"]["S1"]["images"]["hires"]
    assert report_slide(draws, slide).image_scale == 0.005


def test_report_slide_refuses_what_does_not_belong_together():
    draws, slide = make_anndata()
    with pytest.raises(DataError, match="the draws are of slide S1, the measured spots of S2"):
        report_slide(draws, make_anndata("S2")[1])
    with pytest.raises(DataError, match="slide S1 lacks 1 of the draws' spots: spot4"):
        report_slide(draws, slide[:4].copy())
    assert report_slide(draws, slide[:, ["A", "B"]].copy()).genes == ["A"]
    with pytest.raises(DataError, match="lacks 2 of the panel's 2 genes: C, A"):
        report_slide(draws, slide[:, ["B"]].copy())
    del draws.uns["spatial"]
    with pytest.raises(DataError, match="no image"):
        report_slide(draws, slide)
    del draws.uns["hinge"]["transform"]
    with pytest.raises(DataError, match="transform"):
        report_slide(draws, slide)


def test_report_in_a_browser(chromium, tmp_path):
    """Figures appear, hostile names stay text, hovering shows values, the noise ceiling never wins."""
    genes = [*HOSTILE, *(f"GENE{i}" for i in range(8))]
    slides = [make_slide("S1", genes=genes), make_slide("S2", seed=1, n_draws=0)]
    path = write_report(tmp_path / "r.html", make_scores(), slides, "A run")
    page = chromium.new_page(viewport={"width": 1200, "height": 900})
    problems, requests = [], []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_selector("body[data-slide=S1]")
    assert page.title() == "A run"
    assert page.locator("#gene-list li").count() == 12
    assert page.locator("#panels canvas").count() == 8 and page.locator("#matrices canvas").count() == 3
    assert page.locator("#charts svg").count() == 2

    page.fill("#gene-search", "<script>document")
    assert page.locator("#gene-list li").count() == 1
    page.locator("#gene-list li").click()
    assert page.inner_text("#gene-line strong") == HOSTILE[0]

    spot = page.evaluate(
        "() => { const p = state.panels[1], s = baseScale(p), b = p.canvas.getBoundingClientRect();"
        " scrollBy(0, b.top - 200); return [b.left + state.slide.x[7] * s, 200 + state.slide.y[7] * s]; }"
    )
    page.wait_for_timeout(100)
    page.mouse.move(*spot)
    tip = page.inner_text("#tip")
    assert HOSTILE[0] in tip and "spot 8" in tip and "90 % interval" in tip
    shown = float(re.search(r"measured\s+([\d.]+)", tip)[1])
    assert shown == pytest.approx(slides[0].measured[7, 0], abs=0.02)

    assert page.locator("#scores-table thead th").count() <= 5
    page.fill("#genes-search", "GENE3")
    assert page.locator("#genes-table tbody tr").count() == 1
    page.locator("#genes-table tbody button").click()
    assert page.inner_text("#gene-line strong") == "GENE3"
    page.locator("#panels .view canvas").nth(1).focus()
    page.keyboard.press("ArrowRight")
    assert "GENE3 · spot " in page.locator("#spoken").text_content()

    # noise-ceiling has the highest PCC of all, ridge-cv the highest of those that compete
    best = page.locator("#scores-table td.best")
    assert best.count() == 1 and best.first.locator("xpath=..").inner_text().startswith("ridge-cv")

    page.select_option("#slide-select", "1")
    page.wait_for_selector("body[data-slide=S2]")
    assert page.locator("#panels .panel").count() == 1 and not page.locator("#calibration").is_visible()
    assert problems == []
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []
    assert page.title() == "A run"
    page.close()


@pytest.mark.full
@pytest.mark.parametrize("scheme, width", [("light", 1440), ("dark", 900)])
def test_the_report_has_no_serious_fault_of_accessibility(chromium, tmp_path, scheme, width):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")
    slides = [replace(make_slide("S1"), comparison=make_comparison()), make_slide("S2", seed=1)]
    path = write_report(tmp_path / "r.html", make_scores(), slides, "A run", {"seed": 1})
    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, bypass_csp=True)
    page = context.new_page()
    page.goto(path.as_uri())
    page.wait_for_selector("body[data-slide=S1]")
    for fold in page.locator("summary:visible").all():
        fold.click()
    found = axe.Axe().run(page).response["violations"]
    assert [
        (fault["id"], fault["nodes"][0]["html"]) for fault in found if fault["impact"] in ("serious", "critical")
    ] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    context.close()


def make_comparison() -> dict:
    table = compare_regions(make_draws(), np.arange(60) < 20, np.arange(60) >= 40)
    return {
        "first": {"name": HOSTILE[0], "spots": 20, "mm2": 0.5},
        "second": {"name": "B", "spots": 20, "mm2": float("nan")},
        "table": table,
    }


def make_draws() -> AnnData:
    slide = make_slide()
    draws = AnnData(slide.draws.mean(axis=0))
    draws.var_names, draws.uns["hinge"] = slide.genes, {"name": "S1", "transform": "log2p1"}
    for number, draw in enumerate(slide.draws):
        draws.layers[f"draw_{number:03d}"] = draw
    return draws


@pytest.mark.full
def test_a_comparison_of_regions_is_shown_and_printed(chromium, tmp_path):
    comparison = make_comparison()
    path = write_report(tmp_path / "r.html", {}, [replace(make_slide(), comparison=comparison)])
    page = chromium.new_page(viewport={"width": 1200, "height": 900})
    page.goto(path.as_uri())
    page.wait_for_selector("body[data-slide=S1]")
    largest = comparison["table"]["difference"].abs().idxmax()
    row = page.locator("#regions-table tbody tr").first.inner_text().split("\t")
    assert row[0].strip() == largest
    shown = float(row[1].replace("−", "-"))
    assert shown == pytest.approx(comparison["table"].loc[largest, "difference"], abs=0.006)
    assert HOSTILE[0] in page.inner_text("#regions-text")
    printed = page.pdf(path=tmp_path / "r.pdf", prefer_css_page_size=True)
    assert re.search(rb"/MediaBox ?\[0 0 59[45][.\d]* 84[12]", printed)  # A4
    page.close()


@pytest.mark.full
def test_a_page_of_paper_holds_the_width_of_all_tables(chromium, tmp_path):
    """All scores of nine methods: a column for each method, not for each of the thirty scores."""
    names = [*(f"ridge-cv+residual+level{i}" for i in range(7)), "hinge", "noise-ceiling"]
    scores = make_scores(names, ["S1"])
    for number in range(30):
        scores["definitions"][f"m{number}"] = scores["definitions"]["pcc_mean"] | {
            "label": f"Score of the pooled {number}"
        }
        for row in scores["rows"]:
            row[f"m{number}"] = 0.123 + number
    path = write_report(tmp_path / "r.html", scores, [make_slide()])
    width = round((210 - 2 * 12) / 25.4 * 96)  # A4 without its margins
    page = chromium.new_page(viewport={"width": width, "height": 1000})
    page.goto(path.as_uri())
    page.wait_for_selector("body[data-slide=S1]")
    page.locator("#all-scores summary").click()
    assert page.locator("#all-scores-table tbody tr").count() == 32
    assert page.locator("#all-scores-table thead th").count() == 1 + len(names)
    page.emulate_media(media="print")
    for table in page.locator("table:visible").all():
        assert table.bounding_box()["width"] <= width
    page.close()


def test_no_path_of_the_machine_is_in_the_report(tmp_path):
    settings = {
        "data": {"path": tmp_path / "my slides", "images": {"C2": tmp_path / "C2.tif"}, "train": ["C2"]},
        "features": {"encoder": f"stain-texture+{tmp_path}/enc.safetensors", "folder": r"C:\Users\me\features"},
        "backbone": {"path": "~/weights/cellfm", "names": [f"{tmp_path}/a.csv", "hf-hub:owner/name"]},
    }
    path = write_report(tmp_path / "r.html", {}, [make_slide()], settings=settings)
    shown, text = Page(path).data["settings"], path.read_text(encoding="utf-8")
    assert shown == {
        "data.path": "my slides",
        "data.images.C2": "C2.tif",
        "data.train": "C2",
        "features.encoder": "stain-texture+enc.safetensors",
        "features.folder": "features",
        "backbone.path": "cellfm",
        "backbone.names": "a.csv, hf-hub:owner/name",
    }
    assert str(tmp_path) not in text and tmp_path.parent.name not in text and "Users" not in text
    assert "trained on 1 slide: C2" in text


def test_the_report_of_a_run_has_verdict_regions_and_no_path(copied_tiny_run):
    draws = read_draws(copied_tiny_run.paths.samples("sim2"))
    left = np.asarray(draws.obsm["spatial"])[:, 0] < np.median(draws.obsm["spatial"][:, 0])
    regions = {"left": Region("left", left), "right": Region("right", ~left)}
    write_regions(copied_tiny_run.paths.regions("sim2"), regions, draws)
    path = report_run(copied_tiny_run)
    text, data = path.read_text(encoding="utf-8"), Page(path).data
    for folder in (copied_tiny_run.folder, Path(copied_tiny_run.config.data.path), Path.home()):
        assert str(folder) not in text
    assert "On this slide the predicted mean is " in text and "36 spots of slide sim2" in text
    found, expected = data["slides"][0]["comparison"], compare_regions(draws, left, ~left)
    assert (found["first"]["name"], found["first"]["spots"]) == ("left", int(left.sum()))
    np.testing.assert_allclose(found["table"]["difference"], expected["difference"], rtol=1e-4, atol=1e-5)


def test_a_run_without_scores_has_no_report(tmp_path):
    save_config(
        check_config({"output": str(tmp_path), "data": {"path": "slides", "train": ["a"]}}, "test"),
        tmp_path / "config.yaml",
    )
    with pytest.raises(DataError, match=r"there are no scores in .*; run hinge evaluate first"):
        report_run(Run.open(tmp_path))
    for text in ("[]", '{"rows": null}', '{"definitions": {}, "rows": [{}]}', '{"rows": []}'):
        (tmp_path / "scores.json").write_text(text)
        with pytest.raises(DataError, match=r"scores\.json holds no scores: definitions, and rows"):
            report_run(Run.open(tmp_path))
