"""Labels of spots, probes of them, and clusters: what is known of them by construction, and real tissue."""

import random
import sys

import anndata
import numpy as np
import pandas as pd
import pytest
from helpers.commands import call_hinge
from PIL import Image

from hinge.data import read_slide, simulate_slides
from hinge.report.clusters import ClusterMap, draw_clusters
from hinge.tasks.cluster import agreement, cluster, cluster_slides, smooth_features
from hinge.tasks.embeddings import read_slides
from hinge.tasks.labels import binary_labels, read_labels
from hinge.tasks.probe import (
    few_shot_scores,
    linear_probe,
    neighbour_probe,
    probe_labels,
    probe_scores,
    prototype_probe,
)
from hinge.utils.errors import ConfigError, DataError
from hinge.utils.files import read_json


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three simulated slides, whose obs says where tumour cells prevail."""
    folder = tmp_path_factory.mktemp("tissue")
    for path in simulate_slides(folder, n_slides=3, grid=(8, 8), n_genes=20, um_per_px=2.0):
        slide = anndata.read_h5ad(path)
        cells = np.asarray(slide.obsm["cells"], dtype=float)
        share = cells[:, 0] / np.maximum(cells.sum(axis=1), 1)
        slide.obs["tumour_share"] = share
        slide.obs["region"] = np.where(share > 0.4, "tumour", "other")
        slide.write_h5ad(path)
    return folder


def blobs(n=60, d=5, apart=4.0, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    # centred, as features in units of their slide's deviation are
    return rng.normal(size=(n, d)) + apart * (labels[:, None] - 0.5) * np.eye(d)[0], labels


# --- labels ------------------------------------------------------------------------------------------


def test_labels_of_tables_and_slides(data, tmp_path):
    slides = read_slides(data, ["sim0", "sim1"])
    own = read_labels(slides, "region")
    assert list(own) == ["sim0", "sim1"] and set(own["sim0"]) <= {"tumour", "other"}
    for name, slide in slides.items():
        table = pd.DataFrame({"kind": np.arange(slide.n_obs) % 3}, index=slide.obs_names)
        table.iloc[1:].sample(frac=1, random_state=0).to_csv(tmp_path / f"{name}.csv")
    found = read_labels(slides, "kind", str(tmp_path / "{slide}.csv"))
    assert np.isnan(found["sim1"].iloc[0])
    assert found["sim1"].iloc[1:].tolist() == [k % 3 for k in range(1, slides["sim1"].n_obs)]
    # by array coordinates, as HER2ST's annotations name spots; gzipped and by tabs
    slide = slides["sim0"]
    slide.obs_names = [f"{k}x7" for k in range(slide.n_obs)]
    table = pd.DataFrame({"x": np.arange(slide.n_obs) + 0.3, "y": 6.8, "label": "invasive cancer"})
    table.loc[3, "x"] = np.nan
    table.to_csv(tmp_path / "placed.tsv.gz", sep="\t")
    placed = read_labels({"sim0": slide}, "label", str(tmp_path / "placed.tsv.gz"))["sim0"]
    assert placed.notna().sum() == slide.n_obs - 1 and placed.isna().iloc[3]


def test_labels_that_are_not_there(data, tmp_path):
    slides = read_slides(data, ["sim0", "sim1"])
    with pytest.raises(DataError, match=r"slide sim0 has no column 'grade' in obs, which has .*; give --labels"):
        read_labels(slides, "grade")
    with pytest.raises(ConfigError, match=r"one.csv is one table for 2 slides: write \{slide\} for"):
        read_labels(slides, "kind", "one.csv")
    with pytest.raises(DataError, match=r"there is no file .*sim0.csv"):
        read_labels(slides, "kind", str(tmp_path / "{slide}.csv"))
    one = {"sim0": slides["sim0"]}
    names = slides["sim0"].obs_names
    for index, says in ((["a", "b"], "names none of the 64 spots"), ([names[0]] * 2, "more than once")):
        pd.DataFrame({"kind": [1, 2]}, index=index).to_csv(tmp_path / "t.csv")
        with pytest.raises(DataError, match=says):
            read_labels(one, "kind", str(tmp_path / "t.csv"))
    with pytest.raises(DataError, match="has no column 'grade'; it has kind"):
        read_labels(one, "grade", str(tmp_path / "t.csv"))


def test_binary_labels():
    labels = {"a": pd.Series([1.0, 2.0, np.nan]), "b": pd.Series([3.0, 4.0])}
    found, meaning = binary_labels(labels, above="median")
    assert meaning == "above 2.5"
    np.testing.assert_array_equal(found["a"], [0, 0, np.nan])
    np.testing.assert_array_equal(found["b"], [1, 1])
    found, meaning = binary_labels(labels, positive=["2", "4"])
    assert meaning == "2 or 4"
    np.testing.assert_array_equal(np.concatenate(list(found.values())), [0, 1, np.nan, 0, 1])
    assert binary_labels(labels, above="3.5")[0]["b"].tolist() == [0, 1]
    words = {"a": pd.Series(["x", "y"])}
    for given, says in (
        ({}, "give the positive labels by one option"),
        ({"positive": ["x"], "above": "1"}, "give the positive labels by one option"),
        ({"positive": ["z"]}, "no spot is labelled 'z'; the labels are x, y"),
        ({"above": "median"}, "needs labels that are numbers"),
    ):
        with pytest.raises(ConfigError, match=says):
            binary_labels(words, **given)
    with pytest.raises(DataError, match="all 4 labelled spots are not above 9"):
        binary_labels(labels, above="9")


# --- probes ------------------------------------------------------------------------------------------


def test_probes_tell_what_can_be_told():
    x, y = blobs(seed=0)
    test_x, test_y = blobs(seed=1)
    groups = np.arange(60) // 20
    for probe in (linear_probe(x, y, groups, test_x), neighbour_probe(x, y, test_x), prototype_probe(x, y, test_x)):
        scores = probe_scores(test_y, *probe)
        assert scores["auroc"] > 0.9 and scores["auprc"] > 0.9 and scores["balanced_accuracy"] > 0.7
        assert (scores["positive"], scores["n"]) == (0.5, 60)
    noise, other = np.random.default_rng(2).normal(size=(2, 60, 5))
    assert abs(probe_scores(test_y, *linear_probe(noise, y, groups, other))["auroc"] - 0.5) < 0.3
    few = few_shot_scores(test_x, test_y, 0)
    assert few["auroc"] > 0.9 and few == few_shot_scores(test_x, test_y, 0)
    assert few_shot_scores(test_x[:8], test_y[:8], 0) is None
    # slides of which one has a single class cannot choose the penalty, and need not
    assert linear_probe(x, y, np.where(y == 1, "a", "b"), test_x)[0].shape == (60,)


def test_few_spots_are_not_scored_where_they_were_shown():
    """Of six spots a class, five are shown: two are left, whatever they score."""
    x, y = blobs(12, apart=0.0)
    assert few_shot_scores(x, y, 0)["positive"] == 0.5
    seen = np.repeat(
        np.eye(12), 1, axis=0
    )  # every spot is like itself only: labelled spots carry no information on others
    assert abs(few_shot_scores(seen, y, 0)["auroc"] - 0.5) < 0.01


@pytest.mark.full
def test_probe_of_simulated_tumour(data, tmp_path):
    arguments = ["probe", "tumour", data, "--column", "region", "--positive", "tumour", "--output", tmp_path]
    encoders = ["--encoder", "stain-texture", "--encoder", "random:test_vit"]
    result = call_hinge(*map(str, arguments), *encoders)
    assert result.code == 0, result.err
    scores = read_json(tmp_path / "scores.json")
    assert scores["positive"] == "region tumour"
    table = pd.DataFrame(scores["rows"])
    means = table[table["slide"] == "mean"].set_index(["encoder", "method"])
    assert means.loc[("stain-texture", "linear"), "auroc"] > 0.8
    assert means.loc[("stain-texture", "linear"), "auroc"] > means.loc[("random:test_vit", "linear"), "auroc"] - 0.1
    called = pd.read_csv(tmp_path / "probabilities.csv")
    one = called[(called["encoder"] == "stain-texture") & (called["method"] == "linear") & (called["slide"] == "sim1")]
    row = table[(table["encoder"] == "stain-texture") & (table["method"] == "linear") & (table["slide"] == "sim1")]
    slide = read_slide(data, "sim1")
    assert one["spot"].tolist() == list(slide.obs_names)
    assert one["label"].tolist() == (slide.obs["region"] == "tumour").astype(int).tolist()
    positive = one["label"] == 1
    recall = (one["called"][positive].mean() + (1 - one["called"][~positive]).mean()) / 2
    assert recall == pytest.approx(row["balanced_accuracy"].item())


def test_what_cannot_be_probed(data, tmp_path):
    slides = read_slides(data, ["sim0", "sim1"])
    first = {"sim0": slides["sim0"]}
    with pytest.raises(ConfigError, match="at least two slides are needed, because each is held out"):
        probe_labels(first, {"sim0": np.zeros(64)}, ["stain-texture"], tmp_path)
    labels = {"sim0": np.arange(64) % 2.0, "sim1": np.zeros(64)}
    with pytest.raises(DataError, match="with slide sim0 held out, all labelled spots are of one class"):
        probe_labels(slides, labels, ["stain-texture"], tmp_path)
    assert not (tmp_path / "scores.json").exists()


# --- clusters ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["kmeans", "gmm", "leiden"])
def test_clusters_that_are_there_are_found(method):
    rng = np.random.default_rng(0)
    truth = np.repeat([0, 1, 2], [50, 30, 20])
    points = rng.normal(size=(100, 4)) + 8 * np.eye(4)[truth]
    found = cluster(points, method, 3, 1.0, 0)
    assert agreement(found, pd.Series(truth)) == {"ari": 1.0, "nmi": 1.0}
    assert np.bincount(found).tolist() == [50, 30, 20]  # numbered by size
    state = random.getstate()
    np.testing.assert_array_equal(cluster(points, method, 3, 1.0, 0), found)
    assert random.getstate() == state
    if method != "leiden":
        with pytest.raises(DataError, match="2 spots cannot form 3 clusters"):
            cluster(points[:2], method, 3, 1.0, 0)


def test_leiden_by_resolution():
    points = np.random.default_rng(0).normal(size=(120, 3))
    coarse, fine = (cluster(points, "leiden", None, resolution, 0).max() for resolution in (0.1, 4.0))
    assert fine > coarse


@pytest.mark.full
def test_smoothing_is_over_squidpys_neighbours():
    squidpy = pytest.importorskip("squidpy")
    rng = np.random.default_rng(0)
    y, x = (axis.ravel() for axis in np.mgrid[:6, :7])
    coords = (np.stack([x, y], axis=1) + rng.uniform(-0.05, 0.05, (42, 2))) * 200
    features = rng.normal(size=(42, 3)).astype(np.float32)
    slide = anndata.AnnData(features, obsm={"spatial": coords})
    squidpy.gr.spatial_neighbors(slide, coord_type="generic", radius=(0.0, 1.25 * 200))
    graph = slide.obsp["spatial_connectivities"].toarray() + np.eye(42)
    expected = graph @ features / graph.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(smooth_features(features, coords, 1), expected, atol=1e-5)
    np.testing.assert_array_equal(smooth_features(features, coords, 0), features)
    assert smooth_features(features, coords, 20).std() < 0.3 * features.std()


def test_agreement_leaves_unlabelled_spots_out():
    labels = pd.Series([np.nan, "a", "a", "b", "b"])
    assert agreement(np.array([5, 1, 1, 0, 0]), labels)["ari"] == 1
    assert np.isnan(agreement(np.zeros(5), pd.Series([np.nan] * 5))["nmi"])


def test_clusters_of_simulated_tissue(data, tmp_path):
    call = ["cluster", data, "--sample", "sim0", "--sample", "sim1", "--column", "region", "--output", tmp_path]
    result = call_hinge(*map(str, call), "--encoder", "stain-texture", "--joint")
    assert result.code == 0, result.err
    assert result.out.endswith(f"scores: {tmp_path / 'scores.json'}\nreport: {tmp_path / 'report.html'}\n")
    rows = read_json(tmp_path / "scores.json")["rows"]
    assert [row["slide"] for row in rows] == ["sim0", "sim1", "mean"] and rows[2]["ari"] > 0.1
    written = anndata.read_h5ad(tmp_path / "sim0.h5ad")
    slide = read_slide(data, "sim0")
    assert list(written.obs_names) == list(slide.obs_names)
    assert written.obs["label"].tolist() == slide.obs["region"].tolist()
    assert written.obs["cluster stain-texture"].nunique() == 2 and written.obsm["X_stain-texture"].shape == (64, 20)
    table = pd.read_csv(tmp_path / "clusters.csv")
    assert table["slide"].tolist() == ["sim0"] * 64 + ["sim1"] * 64
    np.testing.assert_allclose(table[["x", "y"]].to_numpy()[:64], slide.obsm["spatial"])
    assert table["cluster stain-texture"][:64].astype(str).tolist() == written.obs["cluster stain-texture"].tolist()
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "http" not in page.replace("http-equiv", "")
    assert Image.open(tmp_path / "figures" / "sim1.png").width > 1000


@pytest.mark.full
def test_the_figure_shows_every_spot():
    panels = {"labels": np.array([0, -1]), "<b>": np.array([1, 0])}
    coords = np.array([[30.0, 30.0], [70.0, 40.0]])
    sheet = np.asarray(draw_clusters(ClusterMap("s", np.full((80, 100, 3), 250, np.uint8), coords, 10.0, panels)))
    seen = {tuple(colour) for colour in sheet.reshape(-1, 3).tolist()}
    assert {(230, 159, 0), (86, 180, 233), (225, 225, 225)} <= seen


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"method": "ward"}, ConfigError, "there is no method 'ward'; choose one of kmeans, leiden, gmm"),
        ({}, ConfigError, "kmeans needs the number of clusters: --clusters, or --labels"),
        ({"n_clusters": 2, "smooth": -1}, ConfigError, "can be smoothed 0 times or more, not -1"),
        ({"n_clusters": 99}, DataError, "64 spots cannot form 99 clusters"),
    ],
)
def test_what_cannot_be_clustered(data, tmp_path, settings, error, says):
    slides = read_slides(data, ["sim0"])
    with pytest.raises(error, match=says):
        cluster_slides(slides, ["stain-texture"], tmp_path, **settings)
    shares = {"sim0": slides["sim0"].obs["tumour_share"] + np.arange(64)}
    with pytest.raises(DataError, match="slide sim0 has 64 different labels; at most 50 can be"):
        cluster_slides(slides, ["stain-texture"], tmp_path, labels=shares)
    assert not (tmp_path / "scores.json").exists()


def test_leiden_without_igraph(monkeypatch):
    monkeypatch.setitem(sys.modules, "igraph", None)
    with pytest.raises(
        ConfigError, match=r'Leiden .*kmeans and gmm.* igraph: pip install "hinge-histology\[cluster\]"'
    ):
        cluster(np.eye(9), "leiden", None, 1.0, 0)


@pytest.mark.full
@pytest.mark.real
def test_her2st(her2st, tmp_path):
    """Epithelial cells and expression clusters are in the stain: sane, not best."""
    samples = [f"--sample={name}" for name in ("C4", "C5")]
    common = [str(her2st), *samples, "--encoder=stain-texture", "--patch-um=224", f"--features={tmp_path / 'features'}"]
    shares = f"--labels={her2st}/res/ST-deconv/props/major/{{slide}}-proportion.tsv"
    settings = [shares, "--column=Epithelial", "--above=median", f"--output={tmp_path / 'probe'}"]
    result = call_hinge("probe", "tumour", *common, *settings)
    assert result.code == 0, result.err
    rows = {row["method"]: row for row in read_json(tmp_path / "probe/scores.json")["rows"] if row["slide"] == "mean"}
    assert rows["linear"]["auroc"] > 0.75 and rows["linear"]["balanced_accuracy"] > 0.65
    assert rows["prototypes"]["auroc"] > 0.6

    regions = f"--labels={her2st}/res/ST-cluster/lbl/{{slide}}-cluster-annotation.tsv.gz"
    settings = [regions, "--column=label", f"--output={tmp_path / 'cluster'}"]
    result = call_hinge("cluster", *common, *settings)
    assert result.code == 0, result.err
    mean = read_json(tmp_path / "cluster/scores.json")["rows"][-1]
    assert mean["slide"] == "mean" and mean["clusters"] == 7 and mean["ari"] > 0.08 and mean["nmi"] > 0.2
