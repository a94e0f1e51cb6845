"""Simulated tissue keeps its promises: a known truth, shared biology, an image that shows the cells."""

from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from PIL import Image
from skimage.color import rgb2hed
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from hinge.data import oracle_draws, read_slide, simulate_slides
from hinge.data.simulate.expected import expected_log_counts
from hinge.utils.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> list[ad.AnnData]:
    """Two slides of one seed, 12 x 12 spots, with images."""
    folder = tmp_path_factory.mktemp("pair")
    return [read_slide(path) for path in simulate_slides(folder, 2, grid=(12, 12), n_genes=120, seed=3)]


@pytest.fixture(scope="module")
def draws(pair) -> np.ndarray:
    return oracle_draws(pair[0], 150, seed=1)


def counts(slide: ad.AnnData) -> np.ndarray:
    return slide.X.toarray()


def gene_correlations(values: np.ndarray) -> np.ndarray:
    return np.corrcoef(values.T)[np.triu_indices(values.shape[1], 1)]


def mean_pcc(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.mean([np.corrcoef(x, y)[0, 1] for x, y in zip(a.T, b.T, strict=True)]))


def test_read_slide_takes_it(pair):
    for number, slide in enumerate(pair):
        facts = slide.uns["hinge"]
        assert facts["name"] == f"sim{number}"
        assert Path(facts["image_path"]).is_file()
        assert (facts["um_per_px"], facts["spot_pitch_um"], facts["spot_diameter_um"]) == (1.0, 200.0, 100.0)
        assert facts["source_format"] == "h5ad"
        assert slide.shape == (144, 120)
        assert not slide.var_names.str.upper().str.match("MT|RPS|RPL").any()
        assert slide.layers["expected"].dtype == np.float32
        assert (slide.layers["expected"] > 0).all()
        assert counts(slide).sum(1).min() > 0
        x, y = slide.obsm["spatial"].T
        assert np.diff(np.unique(x)).tolist() == np.diff(np.unique(y)).tolist() == [200.0] * 11


def test_counts_are_of_the_size_of_real_spots(pair):
    by_gene = counts(pair[0]).mean(0)
    assert 1 < np.median(by_gene) < 20
    per_spot = counts(pair[0]).sum(1)
    assert np.percentile(per_spot, 90) > 3 * np.percentile(per_spot, 10)


def test_same_seed_same_bytes(tmp_path):
    first, again = (simulate_slides(tmp_path / name, 1, (2, 2), 30, seed=5)[0] for name in "ab")
    other = simulate_slides(tmp_path / "c", 1, (2, 2), 30, seed=6)[0]
    assert first.with_suffix(".jpg").read_bytes() == again.with_suffix(".jpg").read_bytes()
    a, b, c = (ad.read_h5ad(path) for path in (first, again, other))
    assert counts(a).tobytes() == counts(b).tobytes()
    assert a.layers["expected"].tobytes() == b.layers["expected"].tobytes()
    assert (counts(a) != counts(c)).any()
    assert (a.varm["profile"] != c.varm["profile"]).any()


def test_a_slide_does_not_depend_on_the_others_nor_on_its_image(tmp_path):
    whole = simulate_slides(tmp_path / "a", 2, (2, 3), 20, um_per_px=4)[1]
    alone = simulate_slides(tmp_path / "b", 1, (2, 3), 20, first=1, with_image=False)[0]
    assert whole.name == alone.name == "sim1.h5ad"
    assert not alone.with_suffix(".jpg").exists()
    whole, alone = ad.read_h5ad(whole), read_slide(alone, require_image=False)
    assert (counts(whole) == counts(alone)).all()
    assert "image_path" not in alone.uns["hinge"]


def test_an_image_of_other_tissue_is_not_left_beside_a_slide_without(tmp_path):
    simulate_slides(tmp_path, 1, (1, 1), 5, seed=0, um_per_px=4)
    path = simulate_slides(tmp_path, 1, (1, 1), 5, seed=1, with_image=False)[0]
    with pytest.raises(DataError):
        read_slide(path)


def test_slides_share_biology_but_not_tissue(pair):
    a, b = pair
    for key in ("profile", "loadings"):
        assert (a.varm[key] == b.varm[key]).all()
    assert (a.var == b.var).all().all()
    assert (a.obsm["cells"] != b.obsm["cells"]).any(axis=1).mean() > 0.9
    assert a.obs["domain"].nunique() > 1


def test_expected_is_the_mean_of_oracle_draws(pair, draws):
    expected = pair[0].layers["expected"]
    z = (draws.mean(0) - expected) / (draws.std(0, ddof=1) / np.sqrt(len(draws)))
    assert 0.8 < np.sqrt((z**2).mean()) < 1.25
    assert abs(draws.mean() / expected.mean() - 1) < 0.02


def test_expected_log_counts_are_the_mean_of_oracle_draws(pair, draws):
    logs = np.log2(draws + 1)
    z = (logs.mean(0) - expected_log_counts(pair[0])) / (logs.std(0, ddof=1) / np.sqrt(len(logs)))
    assert 0.8 < np.sqrt((z**2).mean()) < 1.25
    assert abs(logs.mean() / expected_log_counts(pair[0]).mean() - 1) < 0.01


def test_oracle_draws_are_reproducible_and_new(pair, draws):
    assert draws.shape == (150, 144, 120)
    assert draws.dtype == np.float32
    assert (draws == np.round(draws)).all()
    assert (oracle_draws(pair[0], 2, seed=1) == draws[:2]).all()
    assert (oracle_draws(pair[0], 2, seed=2) != draws[:2]).any()
    assert not (draws == counts(pair[0])).all(axis=(1, 2)).any()


def test_measured_counts_are_as_one_of_the_draws(pair, draws):
    """The rank of each count among the draws is uniform: spread and shape fit, not only the mean."""
    ranks = []
    for slide, drawn in zip(pair, (draws, oracle_draws(pair[1], 150, seed=1)), strict=True):
        measured = counts(slide)
        ranks.append((drawn < measured).mean(0) + 0.5 * (drawn == measured).mean(0))
    share = np.histogram(ranks, 5, (0, 1))[0] / np.size(ranks)
    assert share == pytest.approx([0.2] * 5, abs=0.05)


def test_genes_vary_together_given_the_image(pair, draws):
    measured = gene_correlations(np.log2(counts(pair[0]) + 1))
    draw = np.log2(draws[0] + 1)
    # each spot and gene from a draw of its own: the same margins without the hidden programs
    mixed = np.random.default_rng(0).integers(len(draws), size=(1, *draw.shape))
    mixed = np.log2(np.take_along_axis(draws, mixed, 0)[0] + 1)
    errors = [np.sqrt(np.mean((gene_correlations(values) - measured) ** 2)) for values in (draw, mixed)]
    assert errors[0] < 0.85 * errors[1]

    residual = np.log1p(draws / draws.sum(2, keepdims=True) * 1e4)
    residual = residual[0] - residual.mean(0)
    assert np.abs(gene_correlations(residual)).mean() > 0.1


def test_hidden_variation_is_smooth_over_the_tissue(pair, draws):
    hidden = np.log(draws.sum(2) / pair[0].layers["expected"].sum(1)).reshape(-1, 12, 12)
    hidden = (hidden - hidden.mean(0)) / hidden.std(0)
    near = (hidden[:, :, 1:] * hidden[:, :, :-1]).mean()
    far = (hidden[:, :, 9:] * hidden[:, :, :-9]).mean()
    assert 0.2 < near < 0.5
    assert abs(far) < 0.12


def spot_statistics(slide: ad.AnnData) -> np.ndarray:
    picture = np.asarray(Image.open(slide.uns["hinge"]["image_path"]))
    rows = []
    for x, y in slide.obsm["spatial"].astype(int):
        patch = picture[y - 50 : y + 50, x - 50 : x + 50]
        channels = np.concatenate([patch / 255.0, rgb2hed(patch)], axis=2).reshape(-1, 6)
        rows.append(np.concatenate([channels.mean(0), channels.std(0), *np.percentile(channels, [10, 90], axis=0)]))
    return np.array(rows)


def test_the_image_tells_the_expression_in_part(pair, draws):
    """Ridge on colour statistics of the other slide's patches is far above nothing and below the oracle."""
    test, train = pair
    features, values = (
        [spot_statistics(slide) for slide in (test, train)],
        [np.log2(counts(s) + 1) for s in pair],
    )
    scale = StandardScaler().fit(features[1])
    predicted = Ridge(30).fit(scale.transform(features[1]), values[1]).predict(scale.transform(features[0]))
    best = mean_pcc(np.log2(draws + 1).mean(0), values[0])
    ridge = mean_pcc(predicted, values[0])
    assert 0.3 < ridge < best - 0.03
    assert 0.6 < best < 0.9


def test_the_image_looks_stained(pair):
    picture = np.asarray(Image.open(pair[0].uns["hinge"]["image_path"])).astype(float)
    assert picture.shape == (2600, 2600, 3)
    assert picture[:5].min() > 200  # glass around the tissue
    red, green, blue = picture[300:-300, 300:-300].mean((0, 1))
    assert red > green + 20
    assert blue > green + 20
    hematoxylin = [
        -np.log(picture[y - 50 : y + 50, x - 50 : x + 50, 0] / 255).mean()
        for x, y in pair[0].obsm["spatial"].astype(int)
    ]
    assert np.corrcoef(hematoxylin, pair[0].obsm["cells"].sum(1))[0, 1] > 0.7


@pytest.mark.parametrize(
    "arguments",
    [
        {"grid": (1, 1)},
        {"grid": (1, 3), "n_genes": 1, "n_cell_types": 1},
        {"grid": [3, 1], "n_genes": 4, "n_cell_types": 6, "um_per_px": 4.0},
        {"grid": (1, 2), "n_genes": 4, "um_per_px": 0.7},
    ],
)
def test_small_tissue(tmp_path, arguments):
    (path,) = simulate_slides(tmp_path, 1, **arguments)
    slide = read_slide(path)
    rows, columns = arguments["grid"]
    um_per_px = arguments.get("um_per_px", 1.0)
    assert slide.shape == (rows * columns, arguments.get("n_genes", 300))
    assert slide.obsm["cells"].shape[1] == arguments.get("n_cell_types", 5)
    size = Image.open(slide.uns["hinge"]["image_path"]).size
    assert size == tuple(round((200 * side + 200) / um_per_px) for side in (columns, rows))
    assert oracle_draws(slide, 3).shape == (3, *slide.shape)


def test_oracle_of_some_spots_and_genes(pair, draws):
    part = pair[0][5:9, [7, 3]].copy()
    some = oracle_draws(part, 400)
    spread = draws.std(0)[5:9][:, [7, 3]]
    assert (np.abs(some.mean(0) - part.layers["expected"]) < 5 * spread / np.sqrt(400)).all()


@pytest.mark.parametrize("field", ["uns", "obsm", "varm", "var"])
def test_oracle_needs_the_truth(pair, field):
    slide = pair[0].copy()
    if field == "var":
        del slide.var["ambient"]
    else:
        del getattr(slide, field)[{"uns": "hinge_truth", "obsm": "cells", "varm": "profile"}[field]]
    with pytest.raises(DataError, match="simulate_slides"):
        oracle_draws(slide, 1)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"n_slides": 0}, "n_slides"),
        ({"n_slides": 1.5}, "n_slides"),
        ({"grid": 16}, "grid"),
        ({"grid": (16,)}, "grid"),
        ({"grid": (0, 4)}, "grid"),
        ({"grid": (4, 65)}, "grid"),
        ({"n_genes": 0}, "n_genes"),
        ({"n_cell_types": 7}, "n_cell_types"),
        ({"n_cell_types": True}, "n_cell_types"),
        ({"seed": -1}, "seed"),
        ({"first": -1}, "first"),
        ({"um_per_px": 0}, "um_per_px"),
        ({"um_per_px": float("nan")}, "um_per_px"),
        ({"um_per_px": "1"}, "um_per_px"),
        ({"grid": (64, 64), "um_per_px": 0.2}, "megapixels"),
    ],
)
def test_arguments_out_of_range(tmp_path, arguments, named):
    with pytest.raises(ConfigError, match=named) as caught:
        simulate_slides(tmp_path, **arguments)
    assert "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [{"n_draws": 0}, {"n_draws": 2, "seed": -3}])
def test_oracle_arguments_out_of_range(pair, arguments):
    with pytest.raises(ConfigError):
        oracle_draws(pair[0], **arguments)
