"""Rows of scores, the file they are written to, and how draws find their spots."""

import io
import json
import weakref
from dataclasses import replace

import numpy as np
import pytest
from anndata import AnnData
from rich.console import Console

from hinge.data.layers import draw_names
from hinge.data.spots import SpotTable
from hinge.data.transforms import get_transform
from hinge.evaluation import (
    METRICS,
    Prediction,
    coexpression_scores,
    correlation_matrix,
    coverage,
    crps,
    energy_score,
    evaluate_slide,
    mean_scores,
    module_scores,
    moran_scores,
    prediction_from_draws,
    round_to_counts,
    score,
    score_draws,
    scores_table,
    spot_structure,
    ssim_of_maps,
    two_sample_auc,
    variogram_score,
    write_scores,
)
from hinge.utils.errors import DataError

METHODS = ["mean", "ridge-hest", "ridge-cv", "ridge-cv+residual", "knn", "training-correlation", "noise-ceiling"]
ABOUT = {"slide", "method", "transform", "n_spots", "n_genes", "n_genes_constant", "n_draws"}
OF_MEAN = {"pcc_10", "pcc_50", "pcc_200", "pcc_mean", "pcc_hvg50", "mse", "mae", "rvd"}
OF_MEAN |= {"mse_level", "mse_slope", "mse_pattern"}
OF_MEAN |= {"coexpression_r_mean", "coexpression_rmse_mean"}
OF_MATRIX = {"coexpression_r", "coexpression_rmse"}
OF_ONE_DRAW = OF_MATRIX | {"coexpression_r_pooled", "coexpression_rmse_pooled", "c2st_auc", "ssc"}
OF_DRAWS = OF_ONE_DRAW | {"crps", "energy", "variogram", "coverage_50", "coverage_90", "coverage_90_genes"}
OF_PLACE = {"c2st_counts_auc", "c2st_features_auc", "moran", "moran_ratio", "ssim", "ssim_mean"}
OF_MODULES = {"modules_within_rmse", "modules_between_rmse"}
SETS = {"first": ("G0", "G1", "G2", "elsewhere"), "second": ("G3", "G4"), "third": ("G0", "G3")}
N_GENES = 8


def spots(slides=("a", "b"), n=60, transform="log2p1", seed=0) -> SpotTable:
    """Counts whose rate is log-linear in the features, the same way on every slide."""
    rng = np.random.default_rng(seed)
    weights = np.random.default_rng(99).normal(size=(5, N_GENES))
    features = rng.normal(size=(len(slides) * n, 1, 5)).astype(np.float32)
    counts = rng.poisson(20 * np.exp(0.4 * features[:, 0] @ weights)).astype(np.float32)
    total = counts.sum(axis=1) + rng.poisson(500, size=len(counts)).astype(np.float32)
    return SpotTable(
        slide=np.repeat(slides, n),
        barcodes=np.tile([f"s{i}" for i in range(n)], len(slides)),
        coords=np.tile(np.stack(np.divmod(np.arange(n), 8), axis=1) * 100.0, (len(slides), 1)),
        features=features,
        counts=counts,
        library_size=total,
        values=get_transform(transform).forward(counts, total),
        genes=[f"G{i}" for i in range(N_GENES)],
        transform=transform,
    )


@pytest.fixture
def slide():
    return spots(("t",), seed=1)


def prediction_of(table: SpotTable, n_draws=20) -> Prediction:
    draws = table.values + np.random.default_rng(2).normal(size=(n_draws, *table.values.shape))
    return Prediction("hinge", mean=draws.mean(axis=0), draws=draws.astype(np.float32))


def defined(row: dict) -> set[str]:
    return {name for name in METRICS if not np.isnan(row[name])}


def test_score_gathers_every_metric(slide):
    prediction = prediction_of(slide)
    scores = score(slide.values, prediction, slide, SETS)
    assert defined(scores) == set(METRICS)
    assert list(scores) == list(METRICS)
    assert all(type(value) is float for value in scores.values())
    means = mean_scores(slide.values, prediction.mean)
    for name in means.keys() & METRICS:
        assert scores[name] == means[name]
    measured, draws = slide.values, prediction.draws
    assert scores["crps"] == crps(measured, draws)
    assert scores["energy"] == pytest.approx(energy_score(measured, draws).mean())
    assert scores["variogram"] == pytest.approx(variogram_score(measured, draws).mean())
    by_gene = [coverage(measured[:, [gene]], draws[:, :, [gene]], [0.9])[0] for gene in range(N_GENES)]
    assert scores["coverage_90_genes"] == pytest.approx(np.abs(np.array(by_gene) - 0.9).mean())
    assert scores["ssc"] == spot_structure(measured, draws)
    moran = moran_scores(measured, draws, slide.coords)
    assert (scores["moran"], scores["moran_ratio"]) == (moran["draw"], moran["ratio"])
    assert scores["ssim"] == ssim_of_maps(measured, draws[:2], slide.coords)
    assert scores["c2st_auc"] == two_sample_auc(measured, draws)
    assert scores["c2st_features_auc"] == two_sample_auc(measured, draws, slide.features[:, 0])
    counts = round_to_counts(draws, slide.library_size, "log2p1")
    assert scores["c2st_counts_auc"] == two_sample_auc(measured, counts)
    modules = module_scores(measured, draws, slide.genes, SETS)
    assert scores["modules_within_rmse"] == modules["within_rmse"]
    np.testing.assert_array_equal(
        [scores["coverage_50"], scores["coverage_90"]], coverage(slide.values, prediction.draws, [0.5, 0.9])
    )
    for predicted, suffix in ((prediction.mean, "_mean"), (prediction.draws, "")):
        expected = coexpression_scores(slide.values, predicted)
        assert scores["coexpression_r" + suffix] == expected["r"]
        assert scores["coexpression_rmse" + suffix] == expected["rmse"]


@pytest.mark.full
def test_arrays_alone_are_scored_alike(slide):
    draws = prediction_of(slide).draws
    full = score(slide.values, Prediction("x", draws=draws), slide, SETS)
    scores = score_draws(
        slide.values,
        draws,
        slide.coords,
        slide.features[:, 0],
        library_size=slide.library_size,
        transform=slide.transform,
    )
    assert set(scores) == OF_DRAWS | OF_PLACE - {"ssim_mean"}
    assert scores == {name: full[name] for name in scores}
    assert set(score_draws(slide.values, draws)) == OF_DRAWS
    with pytest.raises(DataError, match="not \\(0, 60, 8\\)"):
        score_draws(slide.values, draws[:0])


def test_scores_are_nan_where_a_prediction_does_not_say(slide):
    full = prediction_of(slide)
    assert defined(score(slide.values, full)) == OF_MEAN | OF_DRAWS
    assert defined(score(slide.values, full, slide)) == OF_MEAN | OF_DRAWS | OF_PLACE
    assert defined(score(slide.values, replace(full, draws=None))) == OF_MEAN
    assert defined(score(slide.values, replace(full, draws=full.draws[:0]))) == OF_MEAN
    assert defined(score(slide.values, replace(full, mean=None))) == OF_DRAWS
    one_draw = score(slide.values, replace(full, draws=full.draws[:1]))
    assert defined(one_draw) == OF_MEAN | OF_ONE_DRAW
    matrix = correlation_matrix(slide.values)
    perfect = score(slide.values, Prediction("training-correlation", correlation=matrix))
    assert defined(perfect) == OF_MATRIX
    assert perfect["coexpression_r"] == pytest.approx(1)
    assert perfect["coexpression_rmse"] == 0


def test_one_spot_and_one_gene_and_constant_genes(slide):
    full = prediction_of(slide)
    spot = score(slide.values[:1], Prediction("x", mean=full.mean[:1], draws=full.draws[:, :1]))
    of_spot = {
        "mse",
        "mse_level",
        "mse_slope",
        "mse_pattern",
        "mae",
        "crps",
        "energy",
        "variogram",
        "coverage_50",
        "coverage_90",
        "coverage_90_genes",
    }
    assert defined(spot) == of_spot
    gene = score(slide.values[:, :1], Prediction("x", mean=full.mean[:, :1], draws=full.draws[:, :, :1]))
    pairs = {name for name in OF_MEAN | OF_DRAWS if name.startswith("coexpr")} | {"variogram", "ssc"}
    assert {name for name in OF_MEAN | OF_DRAWS if np.isnan(gene[name])} == pairs
    measured = slide.values.copy()
    measured[:, :3] = 0
    constant = replace(slide, values=measured)
    assert defined(score(measured, full, constant)) == OF_MEAN | OF_DRAWS | OF_PLACE


def test_predictions_that_do_not_fit_name_the_method(slide):
    full = prediction_of(slide)
    holed = full.mean.copy()
    holed[4, 2] = np.nan
    for wrong in (
        replace(full, mean=full.mean[1:]),
        replace(full, mean=holed),
        replace(full, draws=full.draws[:, :, 1:]),
        replace(full, draws=np.where(np.isnan(holed), np.nan, full.draws)),
        Prediction("hinge", correlation=np.eye(N_GENES + 1)),
    ):
        with pytest.raises(DataError, match=r"^hinge cannot be scored: "):
            score(slide.values, wrong)
    with pytest.raises(DataError, match="the measured slide"):
        score(holed, full)


@pytest.mark.parametrize("transform", ["log2p1", "log1p_cp10k"])
def test_a_slide_is_scored_beside_baselines_and_ceiling(transform):
    train, slide = spots(transform=transform), spots(("t",), transform=transform, seed=1)
    rows = evaluate_slide(train, slide, [prediction_of(slide)], gene_sets=SETS, n_draws=19, seed=0).rows
    by_method = {row["method"]: row for row in rows}
    assert list(by_method) == ["hinge", *METHODS]
    for row in rows:
        assert set(row) == ABOUT | set(METRICS)
        assert (row["slide"], row["transform"], row["n_spots"], row["n_genes"]) == (
            "t",
            transform,
            60,
            N_GENES,
        )
    assert defined(by_method["hinge"]) == set(METRICS)
    assert defined(by_method["ridge-cv"]) == OF_MEAN | {"ssim_mean"}
    assert defined(by_method["ridge-cv+residual"]) == set(METRICS)
    assert defined(by_method["training-correlation"]) == OF_MATRIX
    assert defined(by_method["noise-ceiling"]) == {name for name in METRICS if name.startswith("pcc")}
    assert [by_method[name]["n_draws"] for name in ("hinge", "ridge-cv", "ridge-cv+residual")] == [20, 0, 19]
    assert 0 == by_method["mean"]["pcc_mean"] < by_method["ridge-cv"]["pcc_mean"]
    assert by_method["ridge-cv"]["pcc_mean"] <= by_method["noise-ceiling"]["pcc_mean"] + 0.02
    assert by_method["ridge-cv+residual"]["crps"] < by_method["mean"]["mae"]


@pytest.mark.full
def test_scoring_twice_gives_the_same_file(slide, tmp_path):
    files = [write_scores(tmp_path / name, [evaluate_slide(spots(), slide, [], n_draws=3, seed=4)]) for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()
    rows, other = (evaluate_slide(spots(), slide, [], n_draws=3, seed=seed).rows for seed in (4, 5))
    for number, metric in ((3, "crps"), (4, "crps"), (6, "pcc_50")):
        assert rows[number][metric] != other[number][metric]


def test_without_training_spots_there_are_no_baselines(slide):
    rows = evaluate_slide(None, slide, [prediction_of(slide)]).rows
    assert [row["method"] for row in rows] == ["hinge", "noise-ceiling"]


def test_one_slide_at_a_time(slide):
    with pytest.raises(DataError, match="are of 2"):
        evaluate_slide(None, spots(), [])


def test_written_scores_explain_themselves_and_are_strict_json(slide, tmp_path):
    evaluation = evaluate_slide(None, slide, [prediction_of(slide, n_draws=2)])
    rows = evaluation.rows
    path = write_scores(tmp_path / "new" / "scores.json", [evaluation])
    content = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    parts = {"hinge_version", "definitions", "rows", "attained", "summary", "comparisons", "details"}
    assert set(content) == parts
    assert set(content["rows"][0]) == ABOUT | set(content["definitions"])
    assert content["rows"][0]["coverage_90"] is None
    assert content["rows"][0]["mse"] == rows[0]["mse"]
    for definition in content["definitions"].values():
        assert set(definition) == {"label", "definition", "unit", "better"}
        assert all(definition.values())
        better = definition["better"]
        assert better in ("higher", "lower") or 0 < float(better.removeprefix("nearest ")) <= 1


def printed(rows) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(scores_table(rows))
    return console.export_text()


def test_the_table_shows_rows_dashes_and_means_over_slides(slide):
    rows = evaluate_slide(None, slide, [prediction_of(slide)]).rows
    text = printed(rows)
    assert f"{rows[0]['pcc_50']:.3f}" in text and f"{rows[0]['crps']:.3f}" in text
    assert "–" in text and "nan" not in text and "mean of" not in text
    two = [
        {
            "slide": slide,
            "transform": "log2p1",
            "method": "m",
            **dict.fromkeys(METRICS),
            "mse": mse,
            "crps": crps,
        }
        for slide, mse, crps in (("a", 1.0, None), ("b", 2.0, 0.25))
    ]
    mean = printed(two).split("mean of 2")[1]
    assert "1.500 ± 0.707" in mean and "0.250" in mean


@pytest.mark.full
def test_details_of_genes_and_intervals_over_spots(slide):
    evaluation = evaluate_slide(spots(), slide, [prediction_of(slide)], baselines=["mean", "ridge-cv+residual"])
    details = {entry["method"]: entry for entry in evaluation.details}
    assert list(details) == ["hinge", "mean", "ridge-cv+residual"]
    rows = {row["method"]: row for row in evaluation.rows}
    for method, entry in details.items():
        for metric, (lower, upper) in entry["intervals"].items():
            assert lower <= rows[method][metric] <= upper
    assert set(details["mean"]["intervals"]) == {"mse", "mae", "pcc_50", "pcc_mean"}
    residual = details["ridge-cv+residual"]
    assert set(residual["intervals"]) >= {"crps", "energy", "variogram", "coverage_90", "pcc_50"}
    assert residual["genes"] == slide.genes
    assert np.mean(residual["coverage_90"]) == pytest.approx(rows["ridge-cv+residual"]["coverage_90"], abs=1e-3)
    assert sum(residual["pit_histogram"]) == pytest.approx(1) and len(residual["pit_histogram"]) == 10
    assert "coverage_90" not in details["mean"]
    without = evaluate_slide(None, slide, [prediction_of(slide)], n_resamples=0)
    assert without.details[0]["intervals"] == {}


@pytest.mark.full
def test_shares_of_what_is_attainable(slide):
    train = spots()
    best = Prediction("oracle", mean=slide.values, draws=np.stack([slide.values] * 3))
    half = Prediction("half", mean=(slide.values + train.values.mean(axis=0)) / 2)
    evaluation = evaluate_slide(train, slide, [best, half], baselines=["mean", "ridge-cv+residual"])
    attained = {row["method"]: row for row in evaluation.attained}
    assert attained["oracle"] == {
        **{key: attained["oracle"][key] for key in ("slide", "method", "transform", "of")},
        **dict.fromkeys(("pcc_10", "pcc_50", "pcc_200", "pcc_mean", "pcc_hvg50"), 1.0),
        **dict.fromkeys(("mse", "mae", "crps", "energy", "variogram"), 1.0),
    }
    assert attained["mean"]["mse"] == 0 == attained["mean"]["pcc_mean"]
    assert attained["half"]["mse"] == pytest.approx(0.75)
    assert attained["half"]["mae"] == pytest.approx(0.5)
    residual = attained["ridge-cv+residual"]
    row = next(row for row in evaluation.rows if row["method"] == "ridge-cv+residual")
    mae = next(row["mae"] for row in evaluation.rows if row["method"] == "mean")
    assert residual["crps"] == pytest.approx((mae - row["crps"]) / mae) and 0 < residual["crps"] < 1
    # without an oracle, correlations have the noise ceiling
    real = evaluate_slide(train, slide, [half], baselines=["mean"])
    ceiling = real.rows[-1]
    shares = real.attained[0]
    assert (shares["of"], shares["method"]) == ("noise-ceiling", "half")
    assert shares["pcc_50"] == pytest.approx(real.rows[0]["pcc_50"] / ceiling["pcc_50"])
    assert "mse" not in shares


def test_names_are_not_used_twice(slide):
    with pytest.raises(DataError, match="ridge-cv names more than one prediction of slide t"):
        evaluate_slide(spots(), slide, [replace(prediction_of(slide), method="ridge-cv")])
    with pytest.raises(DataError, match="noise-ceiling names more than one"):
        evaluate_slide(None, slide, [replace(prediction_of(slide), method="noise-ceiling")])


def sampled(table: SpotTable, **changes) -> AnnData:
    """What sampling writes, its spots and genes in another order and with one more of each."""
    draws = np.stack([table.values + number for number in range(12)])
    wide = np.pad(draws, ((0, 0), (0, 1), (0, 1)))
    names = {"obs": [*table.barcodes, "more"], "var": [*table.genes, "MORE"]}
    result = AnnData(wide.mean(axis=0))
    result.obs_names, result.var_names = names["obs"], names["var"]
    for number, draw in enumerate(wide):
        result.layers[f"draw_{number:03d}"] = draw
    result.layers["std"] = wide.std(axis=0)
    result.uns["hinge"] = {"name": str(table.slide[0]), "transform": table.transform} | changes
    rng = np.random.default_rng(0)
    return result[rng.permutation(result.n_obs), rng.permutation(result.n_vars)].copy()


def test_draws_find_their_spots_and_genes(slide):
    draws = sampled(slide)
    prediction = prediction_from_draws(draws, slide, "mine")
    assert prediction.method == "mine"
    np.testing.assert_allclose(prediction.draws, np.stack([slide.values + number for number in range(12)]))
    np.testing.assert_allclose(prediction.mean, slide.values + 5.5, rtol=1e-6)
    draws.layers["expected"] = draws.X + 1
    np.testing.assert_allclose(prediction_from_draws(draws, slide).mean, slide.values + 6.5, rtol=1e-6)
    for name in draw_names(draws):
        del draws.layers[name]
    assert prediction_from_draws(draws, slide).draws is None


def test_draws_of_something_else_are_errors(slide):
    draws = sampled(slide)
    with pytest.raises(DataError, match="lack 1 of the 60 measured spots: s7"):
        prediction_from_draws(draws[draws.obs_names != "s7"], slide)
    with pytest.raises(DataError, match="lack 1 of the 8 measured genes: G3"):
        prediction_from_draws(draws[:, draws.var_names != "G3"], slide)
    with pytest.raises(DataError, match="units of log1p_cp10k, the measured values of log2p1"):
        prediction_from_draws(sampled(slide, transform="log1p_cp10k"), slide)
    with pytest.raises(DataError, match="of slide u, the measured spots of t"):
        prediction_from_draws(sampled(slide, name="u"), slide)
    del draws.uns["hinge"]
    with pytest.raises(DataError, match="units of None"):
        prediction_from_draws(draws, slide)


def test_draws_are_let_go_once_they_are_scored(monkeypatch):
    from hinge.evaluation import scores

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    test, original = spots(("a",), n=20), scores._scores_and_detail

    def predictions():
        return [Prediction(name, mean=test.values, draws=np.stack([test.values] * 3)) for name in "xyz"]

    alive, those = [], []

    def counting(*arguments):
        alive.append(sum(reference() is not None for reference in those))
        return original(*arguments)

    def noted():
        made = predictions()
        those.extend(weakref.ref(each) for each in made)
        return made

    monkeypatch.setattr(scores, "_scores_and_detail", counting)
    evaluate_slide(None, test, noted(), n_resamples=0)
    assert alive == [3, 2, 1]
