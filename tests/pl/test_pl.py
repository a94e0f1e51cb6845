"""Figures with matplotlib: what they show, and what they refuse."""

import matplotlib
import numpy as np
import pytest
from anndata import AnnData
from scipy import sparse

import hinge
from hinge.data.draws import draws_of_slide
from hinge.evaluation import correlation_matrix
from hinge.utils.errors import ConfigError, DataError

N, K = 30, 4
GENES = [f"G{i}" for i in range(6)]


@pytest.fixture(scope="module", autouse=True)
def no_window():
    before = matplotlib.get_backend()
    matplotlib.use("agg")
    yield
    matplotlib.use(before)


@pytest.fixture
def slide() -> AnnData:
    rng = np.random.default_rng(0)
    slide = AnnData(sparse.csr_matrix(rng.poisson(4.0, (N, 8)).astype(np.float32)))
    slide.var_names, slide.obs_names = [*GENES, "X", "Y"], [f"s{i}" for i in range(N)]
    y, x = np.mgrid[:6, :5]
    slide.obsm["spatial"] = np.stack([x.ravel(), y.ravel()], axis=1) * 40.0 + 30
    slide.uns["hinge"] = {"name": "s", "um_per_px": 2.5, "spot_diameter_um": 55.0}
    library = {
        "images": {"hires": np.full((130, 110, 3), 200, np.uint8)},
        "scalefactors": {"tissue_hires_scalef": 0.5, "spot_diameter_fullres": 22.0},
    }
    slide.uns["spatial"] = {"s": library}
    return slide


@pytest.fixture
def draws(slide) -> AnnData:
    values = np.random.default_rng(1).normal(2, 1, (K, N, len(GENES))).astype(np.float32)
    return draws_of_slide(values, values.mean(axis=0) + 0.1, slide, GENES, {"transform": "log2p1", "draws": K})


def maps(figure) -> list:
    return [ax for ax in figure.axes if ax.get_title()]


def test_draws_say_what_they_are(draws):
    assert draws.uns["hinge"]["summary"].startswith(
        f"{K} draws of {len(GENES)} genes at {N} spots of slide s, in units of log2p1"
    )


def test_maps_of_a_gene(draws, slide):
    figure = hinge.pl.gene(draws, "G2", measured=slide)
    assert [ax.get_title() for ax in maps(figure)] == ["measured", "mean of the draws", "standard deviation", "draw 0"]
    shown = {ax.get_title(): ax.collections[0] for ax in maps(figure)}
    np.testing.assert_allclose(shown["measured"].get_array(), np.log2(slide[:, "G2"].X.toarray()[:, 0] + 1), rtol=1e-6)
    np.testing.assert_allclose(shown["mean of the draws"].get_array(), draws.layers["expected"][:, 2])
    np.testing.assert_allclose(shown["draw 0"].get_array(), draws.layers["draw_000"][:, 2])
    assert shown["measured"].get_clim() == shown["draw 0"].get_clim() != shown["standard deviation"].get_clim()
    np.testing.assert_array_equal(shown["measured"].get_offsets(), draws.obsm["spatial"])
    assert "G2" in figure.get_suptitle() and maps(figure)[0].images


def test_layers_without_image_and_unmeasured_spots(draws, slide, tmp_path):
    figure = hinge.pl.gene(draws, "G0", layers=["draw_003", "measured"], measured=slide[3:].copy(), image=False)
    assert [ax.get_title() for ax in maps(figure)] == ["draw 3", "measured"]
    assert maps(figure)[1].collections[0].get_array().mask.sum() == 3 and not maps(figure)[0].images
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_coexpression_is_the_mean_over_the_draws(draws, slide):
    figure = hinge.pl.coexpression(draws, measured=slide, genes=GENES[:4])
    first, second = maps(figure)
    labels = [text.get_text() for text in first.get_xticklabels()]
    columns = [GENES.index(name) for name in labels]
    each = [correlation_matrix(draws.layers[f"draw_{k:03d}"][:, columns]) for k in range(K)]
    np.testing.assert_allclose(second.images[0].get_array(), np.mean(each, axis=0), atol=1e-6)
    truth = correlation_matrix(np.log2(slide[:, labels].X.toarray() + 1))
    np.testing.assert_allclose(first.images[0].get_array(), truth, atol=1e-6)
    assert "r = " in second.get_title() and len(maps(hinge.pl.coexpression(draws))) == 1


def test_what_cannot_be_drawn_is_one_sentence(draws, slide):
    with pytest.raises(DataError, match="lack the gene 'nothing'"):
        hinge.pl.gene(draws, "nothing")
    with pytest.raises(ConfigError, match="there is no layer 'measured'"):
        hinge.pl.gene(draws, "G0", layers=["measured"])
    with pytest.raises(DataError, match="does not measure the gene 'G0'"):
        hinge.pl.gene(draws, "G0", measured=slide[:, ["X"]].copy())
    with pytest.raises(DataError, match="at least 2 genes"):
        hinge.pl.coexpression(draws, genes=["G0"])
    with pytest.raises(DataError, match="lack nothing"):
        hinge.pl.coexpression(draws, genes=["G0", "nothing"])
