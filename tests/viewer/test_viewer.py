"""The viewer: what its files hold, what its server refuses, and the page in a browser."""

import contextlib
import http.client
import io
import json
import shutil
import socket
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import anndata as ad
import numpy as np
import pytest
from helpers import ROOT
from helpers.viewer import HOSTILE_GENE, HOSTILE_SPOT, N_DRAWS, middle, pixels, serving
from PIL import Image

from hinge.data import SlideImage
from hinge.evaluation import correlation_matrix
from hinge.run.run import Run
from hinge.utils.errors import ConfigError, DataError
from hinge.viewer import Viewer, serve, write_viewer
from hinge.viewer import server as server_module
from hinge.viewer.files import CONTENT_TYPES
from hinge.viewer.server import CONTENT_SECURITY_POLICY
from hinge.viewer.tiles import OVERLAP_PX, TILE_PX, TiledImage


def arrays(content: bytes, dtypes: list[tuple[str, tuple[int, ...]]]) -> list[np.ndarray]:
    content, found = zlib.decompress(content), []
    for dtype, shape in dtypes:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        found.append(np.frombuffer(content[:size], dtype).reshape(shape))
        content = content[size:]
    assert not content
    return found


# --- what the files hold -----------------------------------------------------------------------------


def test_slides_are_those_that_were_sampled_test_slides_first(viewer):
    assert json.loads(viewer.read("run.json"))["slides"] == ["sim0", "sim1"]
    with pytest.raises(DataError, match="no draws of sim7"):
        Viewer(viewer.run, ["sim7"])


def test_a_gene_holds_measured_mean_deviation_and_draws(folder, viewer):
    draws = ad.read_h5ad(folder / "samples" / "sim0.h5ad")
    facts = json.loads(viewer.read("slides/0/slide.json"))
    assert facts["genes"] == draws.var_names.tolist() and facts["draws"] == N_DRAWS
    n, gene = draws.n_obs, 5
    layout = [("<f4", (2,)), ("<f2", (n,)), ("<f2", (n,)), ("<f2", (n,)), ("u1", (N_DRAWS, n))]
    (low, high), measured, mean, std, steps = arrays(viewer.read(f"slides/0/genes/{gene}.bin"), layout)
    slide = viewer.run.slide("sim0", require_image=False)
    np.testing.assert_allclose(measured, np.log2(slide.X[:, gene].toarray().ravel() + 1), atol=5e-3)
    np.testing.assert_allclose(mean, draws.layers["expected"][:, gene], atol=5e-3)
    np.testing.assert_allclose(std, draws.layers["std"][:, gene], atol=5e-3)
    expected = np.stack([draws.layers[f"draw_{k:03d}"][:, gene] for k in range(N_DRAWS)])
    np.testing.assert_allclose(low + steps / 255 * (high - low), expected, atol=(high - low) / 500)
    np.testing.assert_allclose(facts["pcc"][gene], np.corrcoef(measured, mean)[0, 1], atol=1e-2)


def test_spots_lie_where_they_do_on_the_image(folder, viewer):
    draws = ad.read_h5ad(folder / "samples" / "sim0.h5ad")
    (places,) = arrays(viewer.read("slides/0/spots.bin"), [("<f4", draws.obsm["spatial"].shape)])
    np.testing.assert_allclose(places, draws.obsm["spatial"])
    assert json.loads(viewer.read("slides/0/barcodes.json")) == draws.obs_names.tolist()


def test_coexpression_is_that_of_the_measured_slide_and_the_mean_over_draws(folder, viewer):
    draws = ad.read_h5ad(folder / "samples" / "sim0.h5ad")
    about = json.loads(viewer.read("slides/0/slide.json"))["coexpression"]
    genes, size = about["genes"], draws.n_vars
    assert sorted(genes) == list(range(size)) and about["matrices"] == ["measured", "predicted"]
    (steps,) = arrays(viewer.read("slides/0/coexpression.bin"), [("i1", (2, size, size))])
    slide = viewer.run.slide("sim0", require_image=False)
    truth = correlation_matrix(np.log2(slide.X[:, genes].toarray() + 1))
    each = [correlation_matrix(draws.layers[f"draw_{k:03d}"][:, genes]) for k in range(N_DRAWS)]
    for found, expected in zip(steps, (truth, np.mean(each, axis=0)), strict=True):
        np.testing.assert_allclose(np.where(found == -128, np.nan, found / 127), expected, atol=5e-3)


def test_a_large_panel_shows_the_coexpression_of_the_genes_that_vary_most(folder, monkeypatch):
    monkeypatch.setattr("hinge.viewer.content.COEXPRESSION_GENES", 6)
    content = Viewer(Run.open(folder)).slide(1)
    variances = content.mean(np.arange(24)).var(axis=0)
    assert set(content.index()["coexpression"]["genes"]) == set(np.argsort(-variances)[:6])


def test_a_slide_without_measured_values(viewer):
    facts = json.loads(viewer.read("slides/1/slide.json"))
    assert (facts["measured"], facts["pcc"], facts["coexpression"]["matrices"]) == (False, None, ["predicted"])
    n = facts["spots"]
    arrays(viewer.read("slides/1/genes/0.bin"), [("<f4", (2,)), ("<f2", (2, n)), ("u1", (N_DRAWS, n))])
    # its image was moved away too: the overview in the draws stands in
    assert "overview" in facts["note"]


@pytest.mark.parametrize("overview_px", [4096, 200])
def test_tiles_are_the_image(folder, monkeypatch, overview_px):
    monkeypatch.setattr("hinge.viewer.tiles.OVERVIEW_PX", overview_px)
    path = folder.parent / "slides" / "sim0.jpg"
    with SlideImage(path) as image:
        whole, small = image.read_pixels(0, 0, *image.dimensions).astype(float), image.thumbnail(100).astype(float)
    tiled = TiledImage(path)
    assert tiled.level_tiles[-1][0] > 1 and tiled.dimensions == whole.shape[1::-1]
    tile = np.asarray(Image.open(io.BytesIO(tiled.tile(len(tiled.level_tiles) - 1, 1, 0))), float)
    left = TILE_PX - OVERLAP_PX
    expected = whole[: TILE_PX + OVERLAP_PX, left : left + TILE_PX + 2 * OVERLAP_PX]
    assert tile.shape == expected.shape and np.abs(tile - expected).mean() < 8
    level = next(i for i, size in enumerate(tiled._tiles.level_dimensions) if max(size) > 64)
    coarse = Image.open(io.BytesIO(tiled.tile(level, 0, 0)))
    shown = np.asarray(Image.fromarray(small.astype(np.uint8)).resize(coarse.size), float)
    assert np.abs(np.asarray(coarse, float) - shown).mean() < 10
    assert tiled.tile(len(tiled.level_tiles), 0, 0) is None and tiled.tile(0, 1, 0) is None


def test_images_without_tiles_are_not_all_kept_decoded(folder, monkeypatch):
    """Of slides that are looked at in turn, only so many decoded images are kept as have room; tiles stay the same."""
    viewer = Viewer(Run.open(folder))
    slides = [viewer.slide(0), viewer.slide(1)]
    slides[1].image = TiledImage(folder.parent / "sim1.jpg")
    top = len(slides[0].image.level_tiles) - 1
    path = f"image_files/{top}/0_0.jpeg"
    expected = [slide.image._cut(top, 0, 0) for slide in slides]

    def decoded() -> list[bool]:
        return [slide.image._slide.image._decoded for slide in slides]

    assert decoded() == [True, True]
    for room, kept in ((1 << 30, [True, True]), (0, [False, True])):
        monkeypatch.setattr("hinge.viewer.files.MOST_DECODED", room)
        for number, slide in enumerate(slides):
            slide.image._cut_once.cache_clear()
            assert viewer.read(f"slides/{number}/{path}") == expected[number]
        assert decoded() == kept


# --- the folder --------------------------------------------------------------------------------------


def test_the_folder_holds_what_the_server_serves(folder, viewer, tmp_path):
    output = write_viewer(Run.open(folder), tmp_path / "site")
    names = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    assert {"index.html", "vendor/openseadragon.min.js", "vendor/openseadragon.LICENSE.txt", "run.json"} <= names
    assert sum(name.startswith("slides/0/image_files/") for name in names) > 4
    for name in names:
        assert (output / name).read_bytes() == viewer.read(name), name
    assert write_viewer(Run.open(folder), tmp_path / "site") == output  # again, over itself


def test_the_folder_is_no_other_one(folder, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="is not a viewer"):
        write_viewer(Run.open(folder), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


# --- the server --------------------------------------------------------------------------------------


def ask(server, path: str, host: str | None = None, method: str = "GET"):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", host or f"127.0.0.1:{server.server_port}")
    connection.endheaders()
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer, content


def test_the_server_listens_on_this_machine_only(server):
    assert server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize(
    "path",
    ["/", "/index.html", "/viewer.js", "/run.json?x=1", "/slides/0/slide.json", "/slides/0/image_files/8/0_0.jpeg"],
)
def test_every_answer_has_the_policy(server, viewer, path):
    answer, content = ask(server, path)
    assert answer.status == 200 and content
    assert answer.headers["Content-Security-Policy"] == CONTENT_SECURITY_POLICY
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "Access-Control-Allow-Origin" not in answer.headers
    head, nothing = ask(server, path, method="HEAD")
    assert (head.status, nothing) == (200, b"") and head.headers["Content-Length"] == str(len(content))


def test_the_page_carries_the_policy_itself():
    page = (ROOT / "hinge" / "viewer" / "static" / "index.html").read_text()
    # only a header can forbid frames
    assert f'content="{CONTENT_SECURITY_POLICY.partition("; frame-ancestors")[0]}"' in page
    assert "http://" not in page and "https://" not in page


@pytest.mark.parametrize(
    "path",
    [
        "/../config.yaml",
        "/../../../../../../../etc/passwd",
        "/vendor/../../server.py",
        "/%2e%2e/config.yaml",
        "/..%2f..%2fetc/passwd",
        "//etc/passwd",
        "/slides/0/../../run.json",
        "/slides/0/genes/../slide.json",
        "/slides/0/genes/99.bin",
        "/slides/0/genes/+3.bin",
        "/slides/-1/slide.json",
        "/slides/2/slide.json",
        "/slides/0/image_files/99/0_0.jpeg",
        "/slides/0/image_files/0/0_0.jpeg/x",
        "/slides/0/genes/000000000000000000003.bin",
        "/samples/sim0.h5ad",
        "/config.yaml",
        "/static/index.html",
        "/\\..\\config.yaml",
        "/run.json%00.html",
    ],
)
def test_nothing_else_is_served(server, path):
    answer, content = ask(server, path)
    assert answer.status == 404 and content == b"not found\n"
    assert answer.headers["Content-Security-Policy"] == CONTENT_SECURITY_POLICY


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "localhost:1", "", "127.0.0.1.evil.example:{port}"]
)
def test_another_host_name_is_refused(server, host):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.putrequest("GET", "/run.json", skip_host=True)
    connection.putheader("Host", host.format(port=server.server_port))
    connection.endheaders()
    answer = connection.getresponse()
    assert answer.status == 421 and b"slides" not in answer.read()
    for name in ("localhost", "LOCALHOST"):
        assert ask(server, "/run.json", f"{name}:{server.server_port}")[0].status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_nothing_can_be_sent(server, method):
    assert ask(server, "/run.json", method=method)[0].status == 405


def test_many_requests_at_once_are_answered(server):
    def tile(number: int) -> tuple[int, int]:
        answer, content = ask(server, "/slides/0/image_files/0/0_0.jpeg")
        return answer.status, len(content)

    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(tile, range(200)))
    assert len(set(answers)) == 1 and answers[0][0] == 200


def test_slow_connections_are_closed(viewer, monkeypatch):
    monkeypatch.setattr(server_module, "SECONDS", 0.5)
    with serving(viewer) as server:
        slow = [socket.create_connection(("127.0.0.1", server.server_port)) for _ in range(100)]
        for number, each in enumerate(slow):
            each.settimeout(30)
            each.sendall(b"GET / HTTP/1.1\r\nHost: x"[: number % 20])
        assert threading.active_count() < 100
        assert ask(server, "/run.json")[0].status == 200
        assert {each.recv(100) for each in slow} == {b""}
        for each in slow:
            each.close()


@pytest.mark.parametrize(
    "line", [b"GET http://[x HTTP/1.1", b"GET", b"\xff\xfe", b"GET /\0 HTTP/1.1", b"GET / HTTP/9.9", b"G" * 100_000]
)
def test_a_malformed_request_is_refused_without_a_traceback(server, line, caplog):
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(line + f"\r\nHost: 127.0.0.1:{server.server_port}\r\nConnection: close\r\n\r\n".encode())
        received = b""
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(1000):
                received += part
    assert not received or received.split()[1] in (b"400", b"404"), received
    assert "Traceback" not in caplog.text
    assert ask(server, "/run.json")[0].status == 200


def test_a_port_in_use_is_one_sentence(server, viewer):
    with pytest.raises(ConfigError, match=f"port {server.server_port} cannot be used"):
        serve(viewer, server.server_port, browser=False)


def test_damaged_draws_are_told(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "samples" / "sim0.h5ad").write_bytes(b"no draws")
    with serving(Viewer(Run.open(tmp_path / "run"))) as server:
        answer, content = ask(server, "/slides/0/slide.json")
    assert answer.status == 500 and "not a readable h5ad file" in json.loads(content)["error"]


def test_static_files_have_a_type_and_the_package_stays_small():
    files = [path for path in (ROOT / "hinge" / "viewer" / "static").rglob("*") if path.is_file()]
    assert all(path.suffix in CONTENT_TYPES for path in files)
    assert sum(path.stat().st_size for path in files) < 600_000


# --- the page in a browser ---------------------------------------------------------------------------


def test_the_page_loads_with_slide_and_spots(page):
    assert [page.locator(".pane select").nth(i).input_value() for i in (0, 1)] == ["measured", "mean"]
    assert page.locator("#genes [role=option]").count() == 24
    with_spots = pixels(page, 0)
    page.keyboard.press("h")
    page.wait_for_timeout(100)
    without = pixels(page, 0)
    assert (np.abs(with_spots - without).max(axis=-1) > 30).mean() > 0.02
    assert without.std() > 10  # the tissue is there


def test_a_gene_is_found_by_typing(page):
    wanted = page.locator("#genes .name").nth(7).inner_text()
    before = pixels(page, 0)
    page.keyboard.press("/")
    page.keyboard.type(wanted[-3:].lower())
    assert page.locator("#genes .name").first.inner_text() == wanted
    assert page.locator("#gene-count").inner_text().endswith("of 24 genes")
    page.keyboard.press("Enter")
    page.wait_for_selector(f"body[data-gene='{wanted}']")
    assert page.locator("#panel-gene .heading").inner_text() == wanted
    page.wait_for_timeout(200)
    assert np.abs(pixels(page, 0) - before).max() > 30
    page.reload()  # the address keeps what is looked at
    page.wait_for_selector(f"body[data-gene='{wanted}']")


@pytest.mark.full
def test_zoom_and_pan_are_linked(page):
    page.keyboard.press("h")
    page.wait_for_timeout(200)
    before = pixels(page, 0)
    page.mouse.move(*middle(page, 1))
    page.mouse.wheel(0, -600)
    page.wait_for_timeout(1200)
    page.mouse.move(5, 5)  # takes the tooltip along
    page.wait_for_timeout(100)
    after = [pixels(page, pane) for pane in (0, 1)]
    assert np.abs(after[0] - before).mean() > 5
    # the frame of the pane last used aside, both show the same
    inner = [image[10:-60, 10:-10] for image in after]
    assert np.abs(inner[0] - inner[1]).mean() < 2
    page.keyboard.press("0")
    page.wait_for_timeout(1200)
    assert np.abs(pixels(page, 0)[10:-60, 10:-10] - before[10:-60, 10:-10]).mean() < 2


def test_layers_panes_and_draws(page):
    page.keyboard.press("4")
    page.wait_for_timeout(500)
    layers = page.locator(".pane select")
    assert [layers.nth(i).input_value() for i in range(4)] == ["measured", "mean", "std", "draw"]
    before = pixels(page, 3)
    page.keyboard.press("]")
    assert page.locator(".stepper").nth(3).inner_text().replace("\n", "") == "‹2 / 20›"
    page.wait_for_timeout(100)
    assert np.abs(pixels(page, 3) - before).max() > 30
    shown = pixels(page, 0)
    layers.nth(0).select_option("std")
    page.wait_for_timeout(100)
    assert np.abs(pixels(page, 0) - shown).max() > 30
    page.select_option("#colours", "cividis")
    assert "colours=cividis" in page.url and "std" in page.url
    page.keyboard.press("1")
    assert layers.count() == 1


def test_the_tooltip_of_a_spot(page, viewer):
    content = viewer.slide(0)
    gene = [content.index()["genes"].index(page.locator("body").get_attribute("data-gene"))]
    page.mouse.move(*middle(page))  # 9 × 9 spots: one is in the middle
    tip = page.locator("#tip")
    tip.wait_for()
    assert tip.locator(".head span").nth(1).inner_text() == HOSTILE_SPOT
    spot = content._draws.obs_names.tolist().index(HOSTILE_SPOT)
    values = tip.locator("dd").all_inner_texts()
    assert values[0] == f"{content.measured(gene)[spot, 0]:.2f}"
    draws = content.draws(gene)[:, spot, 0]
    assert values[1] == f"{content.mean(gene)[spot, 0]:.2f} ± {draws.std():.2f}"
    low, high = (float(text) for text in values[2].split(" – "))
    np.testing.assert_allclose([low, high], np.quantile(draws, [0.05, 0.95]), atol=0.02)
    page.mouse.click(*middle(page))
    assert page.locator("#panel-spot .heading").inner_text() == HOSTILE_SPOT
    assert page.locator("#panel-spot .uplot").count() == 1


def test_names_from_files_are_text(page):
    page.fill("#gene-search", "<img")
    page.keyboard.press("Enter")
    page.wait_for_selector("body[data-gene^='<img']")
    assert page.locator("#panel-gene .heading").inner_text() == HOSTILE_GENE
    assert page.locator("img[src=x], body script").count() == 0


def test_by_keyboard_alone(page):
    first = page.locator("body").get_attribute("data-gene")
    page.keyboard.press("j")
    page.wait_for_selector(f"body:not([data-gene='{first}'])")
    page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("Shift+ArrowRight")
    assert page.locator("#spoken").inner_text().startswith("Spot ")
    spot = page.locator("#panel-spot .heading").inner_text()
    page.keyboard.press("Shift+ArrowUp")
    assert page.locator("#panel-spot .heading").inner_text() != spot
    page.locator("#tab-spot").focus()
    page.keyboard.press("Shift+ArrowRight")
    assert page.locator("#tab-spot").get_attribute("aria-selected") == "true"
    page.keyboard.press("ArrowRight")
    assert page.locator("#tab-pairs").get_attribute("aria-selected") == "true"
    page.locator("#pairs").focus()
    page.keyboard.press("ArrowDown")  # nothing yet to move over, and no complaint
    # by a locator: the page's policy forbids evaluating a condition again and again
    page.locator("#pairs-scores", has_text="genes").wait_for()
    page.keyboard.press("ArrowDown")
    assert ": measured " in page.locator("#pairs-text").inner_text()
    page.keyboard.press("?")
    assert page.locator("#help-dialog").get_attribute("open") is not None
    page.keyboard.press("Escape")
    # every control has a name
    for control in page.locator("button:visible, select:visible, input:visible").all():
        assert control.evaluate("node => node.ariaLabel || node.innerText || node.labels?.[0]?.innerText || ''").strip()


def test_light_and_dark(page):
    def lightness():
        return np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("L"), float)[:, -300:].mean()

    assert lightness() > 200
    page.click("#theme")
    page.wait_for_timeout(300)
    assert lightness() < 60
    page.reload()
    page.wait_for_selector("body[data-gene]")
    assert lightness() < 60  # it is remembered


def test_dark_where_the_system_is(chromium, server):
    page = chromium.new_page(color_scheme="dark")
    page.goto(server.url)
    assert page.locator("html").get_attribute("data-theme") == "dark"
    page.close()


def test_coexpression_side_by_side(page):
    page.click("#tab-pairs")
    page.click("#pairs-enlarge")
    box = page.locator("#pairs-predicted").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.8, box["y"] + box["height"] * 0.1)
    assert "predicted" in page.locator("#pairs-large-text").inner_text()
    page.mouse.click(box["x"] + box["width"] * 0.8, box["y"] + box["height"] * 0.1)
    page.wait_for_timeout(200)


@pytest.mark.parametrize("size", [(1280, 800), (1920, 1080)])
def test_nothing_overlaps(page, size):
    page.set_viewport_size({"width": size[0], "height": size[1]})
    page.keyboard.press("3")
    page.wait_for_timeout(300)
    parts = [".bar > *", ".pane", "aside > *:not([hidden])"]
    for part in parts:
        boxes = [box for node in page.locator(part).all() if (box := node.bounding_box()) and box["width"]]
        for i, one in enumerate(boxes):
            assert one["x"] + one["width"] <= size[0] + 1 and one["y"] + one["height"] <= size[1] + 1, part
            for other in boxes[i + 1 :]:
                apart_x = one["x"] + one["width"] <= other["x"] + 1 or other["x"] + other["width"] <= one["x"] + 1
                apart_y = one["y"] + one["height"] <= other["y"] + 1 or other["y"] + other["height"] <= one["y"] + 1
                assert apart_x or apart_y, part


def test_a_slide_without_measured_values_in_the_browser(page):
    page.select_option("#slide", "1")
    page.wait_for_selector("#status.note:not(:empty)")
    page.wait_for_timeout(500)
    assert "measured" not in [page.locator(".pane select").nth(i).input_value() for i in (0, 1)]
    page.keyboard.press("Shift+ArrowRight")
    assert page.locator("#tip dd").first.inner_text() == "–"
