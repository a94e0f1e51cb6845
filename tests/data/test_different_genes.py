"""Slides with different genes: panels, library sizes and spots."""

import numpy as np
import pytest
import scipy.sparse
from anndata import AnnData
from helpers.runs import tiny_settings

from hinge.config import check_config
from hinge.data import Panel, concatenate_spots, get_transform, load_spots, select_panel
from hinge.data.library_sizes import gene_shares, library_sizes
from hinge.utils.errors import ConfigError, DataError

NAMES = [f"G{number:02d}" for number in range(30)]
SHARES = np.random.default_rng(5).dirichlet(np.full(30, 2.0))
LACKING = {"b": slice(0, 12), "c": slice(10, 25)}


def make_slide(name, depth, genes=None, seed=0):
    """Counts of a composition that all slides have in common, without the genes that the slide lacks."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(depth * SHARES, (50, 30)).astype(np.float32)
    kept = np.ones(30, bool)
    kept[LACKING.get(name, slice(0, 0))] = False
    slide = AnnData(scipy.sparse.csr_matrix(counts[:, kept]))
    slide.obs_names, slide.var_names = [f"s{number}" for number in range(50)], np.array(NAMES)[kept]
    slide.obsm["spatial"] = rng.uniform(0, 100, (50, 2))
    slide.uns["hinge"] = {"name": name}
    return slide if genes is None else slide[:, genes].copy()


@pytest.fixture
def slides():
    return [
        make_slide(name, depth, seed=seed) for seed, (name, depth) in enumerate([("a", 400), ("b", 900), ("c", 200)])
    ]


def test_library_sizes_do_not_depend_on_which_genes_were_measured(slides):
    shares = gene_shares(slides)
    assert sum(shares.values()) == pytest.approx(1)
    np.testing.assert_allclose([shares[name] for name in NAMES], SHARES, atol=0.01)
    for slide, depth in zip(slides, (400, 900, 200), strict=True):
        assert library_sizes(slide, shares).mean() == pytest.approx(depth, rel=0.03)
    assert slides[2].X.sum(axis=1).mean() < 0.7 * 200
    # a slide with all genes keeps its own sums exactly, and genes that no training slide has do not count
    own = np.asarray(slides[0].X.sum(axis=1)).ravel()
    assert np.array_equal(library_sizes(slides[0], shares), own)
    more = AnnData(scipy.sparse.csr_matrix(np.hstack([slides[0].X.toarray(), np.full((50, 1), 1000.0)])))
    more.var_names = [*NAMES, "OTHER"]
    assert np.array_equal(library_sizes(more, shares), own)
    assert np.array_equal(library_sizes(slides[2], {}), np.asarray(slides[2].X.sum(axis=1)).ravel())


def test_a_union_has_genes_that_some_slides_lack(slides):
    panel = select_panel(slides, "union", None)
    assert set(panel.genes) == set(NAMES) and panel.method == "union" and panel.slides == ["a", "b", "c"]
    assert set(select_panel(slides, "union", None, 3).genes) == set(NAMES[25:])
    assert set(select_panel(slides, "union", None, 2).genes) == set(NAMES) - set(NAMES[10:12])
    few = select_panel(slides[::-1], "union", 5, 2)
    assert few.genes == select_panel(slides, "union", None, 2).genes[:5]
    # the gene with the largest share and spread comes first, whatever the depth of the slides that have it
    assert panel.shares.keys() == set(NAMES)


def test_a_saved_union_is_read_with_its_shares(slides, tmp_path):
    panel = select_panel(slides, "union", 20)
    assert Panel.load(panel.save(tmp_path / "panel.json")) == panel
    plain = select_panel(slides, "hmhvg", 3)
    assert "shares" not in plain.save(tmp_path / "plain.json").read_text()


def test_technical_genes_and_genes_without_counts_are_not_in_a_union(slides):
    for slide in slides:
        slide.var_names = (
            slide.var_names.str.replace("G29", "MT-CO1").str.replace("G28", "RPS3").str.replace("G27", "MTOR")
        )
    counts = slides[0].X.toarray()
    counts[:, 11] = 0
    slides[0].X = scipy.sparse.csr_matrix(counts)
    assert set(select_panel(slides, "union", None).genes) == {*NAMES[:27], "MTOR"} - {"G11"}


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("union", 40), "give a smaller --genes or --min-slides"),
        (("union", None, 4), "--min-slides takes a number from 1 to that of the slides, 3, not 4"),
        (("hmhvg", None), "method hmhvg takes a number of genes"),
    ],
)
def test_a_union_that_cannot_be(slides, arguments, error):
    with pytest.raises((ConfigError, DataError), match=error):
        select_panel(slides, *arguments)


def test_a_given_list_needs_as_many_slides_as_it_is_told(slides):
    panel = Panel.from_list(["G00", "G11", "G26"])
    assert panel.of_slides(slides, 1).shares
    with pytest.raises(DataError, match="1 of the panel's 3 genes are in fewer than 2 of the 3 slides: G11"):
        panel.of_slides(slides, 2)


@pytest.mark.parametrize("transform", ["log2p1", "log1p_cp10k"])
def test_spots_know_which_genes_were_measured(slides, transform):
    panel = select_panel(slides, "union", None)
    table = concatenate_spots([load_spots(slide, panel, transform, lacking="mask") for slide in slides])
    assert set(table.measured) == {"b", "c"}
    of_slides, slide_of = table.measured_slides()
    for slide, has in zip(slides, of_slides, strict=True):
        assert {gene for gene, known in zip(panel.genes, has, strict=True) if known} == set(slide.var_names)
    assert (table.counts[~of_slides[slide_of]] == 0).all() and (table.values[~of_slides[slide_of]] == 0).all()
    known = table.known_counts()
    assert np.array_equal(np.isnan(known), ~of_slides[slide_of])
    shares, column = panel.shares, panel.genes.index("G26")
    own = slides[2][:, "G26"].X.toarray()
    expected = get_transform(transform).forward(own, library_sizes(slides[2], shares))
    np.testing.assert_allclose(table.values[table.slide == "c"][:, [column]], expected, rtol=1e-6)
    part = table.on_genes(["G26", "G05"])
    assert part.genes == ["G26", "G05"] and set(part.measured) == {"b"}
    assert np.array_equal(part.values[:, 0], table.values[:, column])
    assert table.on_genes(table.genes) is table and table.subset(table.slide == "a").measured_slides() is None


def test_a_slide_is_scored_on_the_genes_that_it_has(slides):
    panel = select_panel(slides, "union", None)
    table = load_spots(slides[1], panel, "log2p1", lacking="drop")
    assert table.genes == [gene for gene in panel.genes if gene in slides[1].var_names] and not table.measured
    assert np.array_equal(table.counts, slides[1][:, table.genes].X.toarray())
    for lacking in ("error", "mask", "drop"):
        with pytest.raises(DataError, match="lacks 1 of the panel's 1 genes: X"):
            load_spots(slides[1], Panel.from_list(["X"]), "log2p1", lacking=lacking)


@pytest.mark.parametrize(
    ("panel", "error"),
    [
        ({"method": "hmhvg", "min_slides": 1}, "panel.min_slides is for panel.method union or file"),
        ({"method": "hvg", "genes": None}, "panel.method hvg needs a number as panel.genes"),
        ({"method": "union", "min_slides": 3}, "panel.min_slides 3 exceeds the 2 training slides"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path, panel, error):
    with pytest.raises(ConfigError, match=error):
        check_config(tiny_settings(tmp_path, tmp_path / "run", panel=panel), "config")
