import json

import numpy as np
import pytest
import scipy.sparse
from anndata import AnnData

from hinge.data import Panel, read_slide, select_panel
from hinge.utils.errors import ConfigError, DataError


def make_slide(name, genes, seed=0, spots=40):
    """Overdispersed counts; a gene's rate and spread follow from its name's place in the list."""
    rng = np.random.default_rng(seed)
    rate = np.exp(np.random.default_rng(len(genes)).normal(0.5, 1.2, len(genes)))
    spread = rng.gamma(1.0, 1.0, (spots, len(genes)))
    slide = AnnData(scipy.sparse.csr_matrix(rng.poisson(rate * spread).astype(np.float32)))
    slide.obs_names = [f"s{i}" for i in range(spots)]
    slide.var_names = genes
    slide.obsm["spatial"] = rng.uniform(0, 100, (spots, 2))
    slide.uns["hinge"] = {"name": name}
    return slide


GENES = [f"G{i:03d}" for i in range(120)]


def test_hmhvg_is_the_smallest_intersection_of_the_two_top_lists():
    slides = [make_slide("a", GENES, 1), make_slide("b", GENES, 2)]
    panel = select_panel(slides, n_genes=25)
    pooled = np.concatenate([slide.X.toarray() for slide in slides])
    by_mean = [GENES[i] for i in np.argsort(-pooled.mean(axis=0), kind="stable")]
    by_std = [GENES[i] for i in np.argsort(-pooled.std(axis=0), kind="stable")]
    k = next(k for k in range(len(GENES)) if len({*by_mean[:k]} & {*by_std[:k]}) >= 25)
    assert {*by_mean[: k - 1]} & {*by_std[: k - 1]} <= {*panel.genes} <= {*by_mean[:k]} & {*by_std[:k]}
    assert len(panel.genes) == 25
    assert panel.method == "hmhvg" and panel.slides == ["a", "b"] and panel.hinge_version


def test_a_smaller_panel_is_the_start_of_a_larger_one():
    slides = [make_slide("a", GENES, 1)]
    large = select_panel(slides, n_genes=60).genes
    for n_genes in range(1, 60):
        assert select_panel(slides, n_genes=n_genes).genes == large[:n_genes]


def test_technical_genes_and_genes_that_a_slide_lacks_are_left_out():
    names = ["MT-CO1", "mt-nd1", "MT2A", "RPS3", "RPL5", "Rpl7", "MRPL3", "RPA1", *GENES[8:]]
    one, two = make_slide("a", names, 1), make_slide("b", names, 2)[:, 10:].copy()
    assert {"MRPL3", "RPA1"} <= {*select_panel([one], n_genes=114).genes}
    assert sorted(select_panel([one], n_genes=114).genes) == sorted(names[6:])
    assert sorted(select_panel([one, two], n_genes=110).genes) == sorted(names[10:])


@pytest.mark.parametrize("method", ["hmhvg", "hvg"])
def test_the_order_of_slides_and_genes_does_not_matter(method):
    slides = [make_slide(name, GENES, seed) for seed, name in enumerate("abc")]
    panel = select_panel(slides, method, 30)
    turned = [slide[:, ::-1].copy() for slide in reversed(slides)]
    again = select_panel(turned, method, 30)
    assert again.genes == panel.genes and again.slides == ["c", "b", "a"]


@pytest.mark.parametrize("method", ["hmhvg", "hvg"])
def test_ties_go_by_name(method):
    slide = make_slide("a", GENES, 1)
    twins = np.arange(120) % 60
    slide.X = slide.X[:, twins]
    slide = slide[:, ::-1].copy()
    genes = select_panel([slide], method, 31).genes
    twice = [gene for gene in genes if int(gene[1:]) >= 60]
    assert len(twice) >= 10
    for gene in twice:
        assert genes.index(f"G{int(gene[1:]) - 60:03d}") < genes.index(gene)


@pytest.mark.parametrize("method", ["hmhvg", "hvg"])
def test_slides_are_read_only_and_others_have_no_say(method):
    train, test = make_slide("a", GENES, 1), make_slide("b", GENES, 2)
    before = train.copy()
    panel = select_panel([train], method, 20)
    np.testing.assert_array_equal(train.X.toarray(), before.X.toarray())
    assert list(train.var.columns) == [] and set(train.uns) == {"hinge"}
    # what the held-out slide would change, had it been asked
    assert select_panel([train, test[:, 60:].copy()], method, 20).genes != panel.genes
    assert select_panel([train], method, 20) == panel


def test_more_than_2000_genes_are_narrowed_to_the_variable_ones():
    genes = [f"G{i:04d}" for i in range(2400)]
    slide = make_slide("a", genes, 1, spots=60)
    # constant, however highly expressed: it has a high mean, and no variability
    counts = slide.X.toarray()
    counts[:, 7] = 50
    slide.X = scipy.sparse.csr_matrix(counts)
    scanpy = pytest.importorskip("scanpy")
    reference = slide.copy()
    scanpy.pp.normalize_total(reference)
    scanpy.pp.log1p(reference)
    variance = reference.X.toarray().astype(np.float64).var(axis=0)
    variable = set(reference.var_names[np.argsort(-variance, kind="stable")[:2000]])
    chosen = select_panel([slide], n_genes=2000).genes
    assert set(chosen) == variable


def test_hvg_agrees_with_scanpy_on_one_slide():
    scanpy = pytest.importorskip("scanpy")
    slide = make_slide("a", GENES, 3)
    reference = slide.copy()
    scanpy.pp.normalize_total(reference)
    scanpy.pp.log1p(reference)
    scanpy.pp.highly_variable_genes(reference, n_top_genes=15)
    expected = reference.var.query("highly_variable").sort_values("dispersions_norm", ascending=False)
    assert select_panel([slide], "hvg", 15).genes == list(expected.index)
    assert sorted(select_panel([slide], "hvg", 120).genes) == GENES


@pytest.mark.parametrize("method", ["hmhvg", "hvg"])
def test_too_few_genes(method):
    slides = [make_slide("a", GENES, 1), make_slide("b", GENES[100:], 2)]
    with pytest.raises(DataError, match=rf"panel of 50 genes .* method {method} finds 20 in a, b \(20 genes are in"):
        select_panel(slides, method, 50)


def test_a_slide_without_any_count():
    slide = make_slide("blank", GENES, 1)
    slide.X = slide.X * 0
    with pytest.raises(DataError, match="slide blank has no count above 0"):
        select_panel([slide], "hvg", 5)


def test_what_cannot_be_asked_for():
    slide = make_slide("a", GENES, 1)
    with pytest.raises(ConfigError, match="no panel method 'best'; choose one of hmhvg, hvg"):
        select_panel([slide], "best")
    with pytest.raises(ConfigError, match="at least one gene, not 0"):
        select_panel([slide], n_genes=0)
    with pytest.raises(DataError, match="from no slides"):
        select_panel([])
    with pytest.raises(DataError, match="each slide once, not a, a"):
        select_panel([slide, slide], n_genes=5)


def test_a_panel_file_comes_back(tmp_path):
    panel = select_panel([make_slide("a", GENES, 1)], n_genes=20)
    assert Panel.load(panel.save(tmp_path / "panel.json")) == panel
    content = json.loads((tmp_path / "panel.json").read_text())
    assert content["method"] == "hmhvg" and content["slides"] == ["a"] and content["hinge_version"]


def test_a_list_of_genes():
    panel = Panel.from_list(["B", "A"])
    assert panel.genes == ["B", "A"] and panel.method == "list" and panel.slides == []
    with pytest.raises(DataError, match="gene A occurs more than once"):
        Panel.from_list(["A", "B", "A"])
    with pytest.raises(DataError, match="at least 1 item"):
        Panel.from_list([])
    with pytest.raises(DataError, match="a gene has an empty name"):
        Panel.from_list(["A", ""])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is not a readable JSON file"),
        ("[1, 2]", "is not a panel"),
        ('{"genes": ["A"]}', "method: Field required"),
        ('{"genes": [], "method": "list"}', "genes: List should have at least 1 item"),
        ('{"genes": ["A", 3], "method": "list"}', "genes.1: Input should be a valid string"),
        ('{"genes": ["A"], "method": "list", "gens": []}', "gens: Extra inputs"),
    ],
)
def test_a_damaged_panel_file(tmp_path, content, sentence):
    (tmp_path / "panel.json").write_text(content)
    with pytest.raises(DataError, match=sentence) as error:
        Panel.load(tmp_path / "panel.json")
    assert "panel.json" in str(error.value) and "\n" not in str(error.value)


def test_a_missing_panel_file(tmp_path):
    with pytest.raises(DataError, match=r"there is no file .*panel\.json"):
        Panel.load(tmp_path / "panel.json")


@pytest.mark.full
@pytest.mark.real
def test_real_panel(her2st):
    slides = [read_slide(her2st, name, require_image=False) for name in ("C2", "C3")]
    panel = select_panel(slides)
    assert len(set(panel.genes)) == 200
    assert {"ERBB2", "CD74", "IGHG1"} & set(panel.genes)
    assert all(gene in slide.var_names for gene in panel.genes for slide in slides)
