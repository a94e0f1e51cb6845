"""One flat row of scores for each slide and method, and the file and table that hold them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData
from numpy.typing import ArrayLike, NDArray
from rich.table import Table
from tqdm import tqdm

from hinge.data.layers import draw_names
from hinge.data.spots import SpotTable
from hinge.evaluation.baselines import DEFAULT_BASELINES, Prediction, baseline_predictions
from hinge.evaluation.definitions import METRICS
from hinge.evaluation.metrics.accuracy import as_matrix, constant_genes, mean_scores, summarise_pcc
from hinge.evaluation.metrics.calibration import check_draws, coverage, covered, crps_of_spots, pit_values
from hinge.evaluation.metrics.coexpression import coexpression_scores, correlation_matrix, matrix_scores
from hinge.evaluation.metrics.gene_sets import MARKERS, module_scores
from hinge.evaluation.metrics.multivariate import energy_score, variogram_score
from hinge.evaluation.metrics.spatial import moran_scores, spot_structure, ssim_of_maps
from hinge.evaluation.metrics.two_sample import round_to_counts, two_sample_auc
from hinge.evaluation.noise_ceiling import CEILING, attained_shares, noise_ceiling
from hinge.evaluation.statistics import bootstrap_intervals, paired_wilcoxon, summarise_rows
from hinge.utils.errors import DataError
from hinge.utils.files import write_json
from hinge.utils.packages import VERSION

_DRAWS_TESTED = 2  # draws of the two-sample tests, which take a second each
_DRAWS_MAPPED = 2  # draws whose maps are compared by SSIM, which takes a millisecond a map


_PRINTED = (
    "pcc_50",
    "pcc_mean",
    "mse",
    "crps",
    "energy",
    "variogram",
    "coverage_50",
    "coverage_90",
    "c2st_auc",
    "coexpression_r",
    "coexpression_rmse",
    "moran_ratio",
    "ssc",
)

_PIT_BINS = 10


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate_slide` finds.

    Attributes
    ----------
    rows
        One flat row of scores for each method.
    details
        One entry for each method that gives a mean or draws: `slide`, `method`, `genes`, `intervals` (score →
        [lower, upper], 90 % by bootstrap over spots), and of draws `coverage_50` and `coverage_90` (of each gene),
        and `pit_histogram` (share of measured values in each of 10 bins of the randomised PIT).
    attained
        Rows like `rows`, `slide`, `method`, `transform`, `of` and scores → share of the way from the training
        mean to what is attainable: on simulated tissue the oracle (`of` = oracle), else, for correlations only,
        the noise ceiling (`of` = noise-ceiling).
    """

    rows: list[dict[str, Any]]
    details: list[dict[str, Any]]
    attained: list[dict[str, Any]]


def score(
    measured: ArrayLike,
    prediction: Prediction,
    spots: SpotTable | None = None,
    gene_sets: Mapping[str, Sequence[str]] | None = None,
    *,
    seed: int = 0,
) -> dict[str, float]:
    """Score one prediction of one slide.

    Parameters
    ----------
    measured
        Values (n, G) in transform units.
    prediction
        Of the same spots and genes in the same order.
    spots
        The slide's spots: where they lie, their library size and features. None leaves out what needs these.
    gene_sets
        Name → genes, for the scores of modules; None for `MARKERS`. They need `spots`.
    seed
        Of the folds of the two-sample test.

    Returns
    -------
    dict
        Every metric of `METRICS`; NaN where the prediction does not say (no mean, no or too few draws) or the
        slide does not allow (one spot, one gene, constant genes).

    Raises
    ------
    DataError
        If the prediction has other spots or genes than the slide, or a value is not finite.
    """
    return _score(measured, prediction, spots, gene_sets, seed)[0]


def _score(
    measured: ArrayLike,
    prediction: Prediction,
    spots: SpotTable | None,
    gene_sets: Mapping[str, Sequence[str]] | None,
    seed: int,
) -> tuple[dict[str, float], dict[str, NDArray]]:
    """The scores, and of those that are means over spots each spot's share (n,)."""
    measured = as_matrix(measured, "the measured slide")
    result = dict.fromkeys(METRICS, float("nan"))
    of_spots: dict[str, Any] = {}
    has_draws = prediction.draws is not None and len(prediction.draws) > 0
    try:
        if prediction.mean is not None:
            scores = mean_scores(measured, prediction.mean)
            result |= {key: value for key, value in scores.items() if key in METRICS}
            coexpression = coexpression_scores(measured, prediction.mean)
            result |= {f"coexpression_{key}_mean": value for key, value in coexpression.items()}
            error = np.asarray(prediction.mean, dtype=np.float64) - measured
            of_spots |= {"mse": (error**2).mean(axis=1), "mae": np.abs(error).mean(axis=1)}
            if spots is not None:
                result["ssim_mean"] = ssim_of_maps(measured, prediction.mean, spots.coords)
        if has_draws:
            of_spots |= _draws_of_spots(measured, prediction.draws)
            features = None if spots is None or spots.features is None else spots.features[:, 0]
            result |= _draw_scores(measured, prediction.draws, of_spots, spots, features, seed)
            if spots is not None:
                sets = MARKERS if gene_sets is None else gene_sets
                modules = module_scores(measured, prediction.draws, spots.genes, sets)
                result |= {f"modules_{key}": value for key, value in modules.items()}
        elif prediction.correlation is not None:
            coexpression = matrix_scores(correlation_matrix(measured), prediction.correlation)
            result |= {f"coexpression_{key}": value for key, value in coexpression.items()}
    except DataError as error:
        raise DataError(f"{prediction.method} cannot be scored: {error}") from error
    return result, of_spots


def _draws_of_spots(measured: NDArray, draws: ArrayLike) -> dict[str, NDArray]:
    measured, draws = check_draws(measured, draws)
    return {
        "crps": crps_of_spots(measured, draws),
        "energy": energy_score(measured, draws),
        "variogram": variogram_score(measured, draws),
        "coverage_50": covered(measured, draws, 0.5).mean(axis=1),
        "coverage_90": covered(measured, draws, 0.9).mean(axis=1),
    }


def _draw_scores(
    measured: NDArray,
    draws: NDArray,
    of_spots: Mapping[str, NDArray],
    spots: "SpotTable | _Place | None",
    features: NDArray | None,
    seed: int,
) -> dict[str, float]:
    """Scores of draws; `of_spots` are those of `_draws_of_spots`."""
    coexpression = coexpression_scores(measured, draws)
    scores = {f"coexpression_{key}": value for key, value in coexpression.items()}
    scores |= {key: float(of_spots[key].mean()) for key in ("crps", "energy", "variogram")}
    scores["coverage_50"], scores["coverage_90"] = coverage(measured, draws, (0.5, 0.9)).tolist()
    scores["coverage_90_genes"] = float(np.abs(covered(measured, draws, 0.9).mean(axis=0) - 0.9).mean())
    scores["c2st_auc"] = two_sample_auc(measured, draws, n_draws=_DRAWS_TESTED, seed=seed)
    scores["ssc"] = spot_structure(measured, draws)
    if features is not None:
        scores["c2st_features_auc"] = two_sample_auc(measured, draws, features, n_draws=_DRAWS_TESTED, seed=seed)
    if spots is not None and spots.library_size is not None:
        counts = round_to_counts(draws[:_DRAWS_TESTED], spots.library_size, spots.transform)
        scores["c2st_counts_auc"] = two_sample_auc(measured, counts, n_draws=_DRAWS_TESTED, seed=seed)
    if spots is not None and spots.coords is not None:
        moran = moran_scores(measured, draws, spots.coords)
        scores["moran"], scores["moran_ratio"] = moran["draw"], moran["ratio"]
        scores["ssim"] = ssim_of_maps(measured, draws[:_DRAWS_MAPPED], spots.coords)
    return scores


@dataclass(frozen=True)
class _Place:
    """What `_draw_scores` takes of a table of spots."""

    coords: ArrayLike | None
    library_size: ArrayLike | None
    transform: str | None


def score_draws(
    measured: ArrayLike,
    draws: ArrayLike,
    coordinates: ArrayLike | None = None,
    features: ArrayLike | None = None,
    *,
    library_size: ArrayLike | None = None,
    transform: str | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Score draws of one slide by everything that looks at more than a mean; arrays in, numbers out.

    Parameters
    ----------
    measured
        Values (n, G) in transform units.
    draws
        Values (K, n, G) in transform units.
    coordinates
        Position of each spot (n, 2), in any unit; None leaves out what looks at maps.
    features
        Histology features (n, d); None leaves out `c2st_features_auc`.
    library_size, transform
        Measured counts (n,) over all genes and the transform's name; without them `c2st_counts_auc` is left out.
    seed
        Of the folds of the two-sample test.

    Returns
    -------
    dict
        The metrics of `METRICS` that draws have, NaN where their number or the slide does not allow.

    Raises
    ------
    DataError
        If something does not fit, or a value is not finite.
    """
    measured, draws = check_draws(measured, draws)
    place = _Place(coordinates, None if transform is None else np.asarray(library_size), transform)
    of_spots = _draws_of_spots(measured, draws)
    return _draw_scores(measured, draws, of_spots, place, features if features is None else np.asarray(features), seed)


def evaluate_slide(
    train: SpotTable | None,
    test: SpotTable,
    predictions: Sequence[Prediction],
    *,
    baselines: Sequence[str] = DEFAULT_BASELINES,
    gene_sets: Mapping[str, Sequence[str]] | None = None,
    n_draws: int = 20,
    n_resamples: int = 300,
    seed: int = 0,
) -> Evaluation:
    """Score predictions of one slide beside the baselines and the noise ceiling.

    Parameters
    ----------
    train
        Spots that the baselines learn from; None leaves the baselines out.
    test
        Spots of one slide, which are predicted.
    predictions
        Predictions of the test spots, in their order. One whose method is `oracle` is what is attainable.
    baselines
        Which of `BASELINES` to fit.
    gene_sets
        Name → genes, for the scores of modules; None for `MARKERS`.
    n_draws
        Draws of the baselines.
    n_resamples
        Of the bootstrap over spots; 0 for no intervals.
    seed
        Of the baselines' draws, the noise ceiling, folds and resamples.

    Returns
    -------
    Evaluation
        With a row for each prediction, each baseline and `noise-ceiling`: `slide`, `method`, `transform`,
        `n_spots`, `n_genes`, `n_genes_constant` (in the measured slide), `n_draws`, and the metrics of `METRICS`.

    Raises
    ------
    DataError
        If the test spots are not of one slide, two predictions have the same name, or something does not fit.
    """
    slides = np.unique(test.slide)
    if len(slides) != 1:
        raise DataError(f"one slide at a time can be scored, but the test spots are of {len(slides)}")
    name, measured = str(slides[0]), as_matrix(test.values, f"slide {slides[0]}")
    simple = [] if train is None else baseline_predictions(train, test, baselines, n_draws=n_draws, seed=seed)
    everything = [*predictions, *simple]
    methods = [prediction.method for prediction in everything]
    repeated = sorted({method for method in methods if methods.count(method) > 1} | ({CEILING} & set(methods)))
    if repeated:
        raise DataError(f"{repeated[0]} names more than one prediction of slide {name}; give each a name of its own")
    about = {
        "transform": test.transform,
        "n_spots": measured.shape[0],
        "n_genes": measured.shape[1],
        "n_genes_constant": int(constant_genes(measured).sum()),
    }
    rows, details = [], []
    for prediction in tqdm(everything, desc=f"scoring {name}", disable=None):
        scores, of_spots = _score(measured, prediction, test, gene_sets, seed)
        drawn = 0 if prediction.draws is None else len(prediction.draws)
        rows.append({"slide": name, "method": prediction.method, **about, "n_draws": drawn, **scores})
        if of_spots:
            intervals = {}
            if n_resamples:
                intervals = bootstrap_intervals(measured, prediction.mean, of_spots, n_resamples=n_resamples, seed=seed)
            detail = {"slide": name, "method": prediction.method, "genes": test.genes, "intervals": intervals}
            if drawn:
                for level in (50, 90):
                    of_genes = covered(measured, prediction.draws, level / 100).mean(axis=0)
                    detail[f"coverage_{level}"] = np.round(of_genes, 4).tolist()
                ranks = pit_values(measured, prediction.draws, seed)
                histogram = np.histogram(ranks, bins=_PIT_BINS, range=(0, 1))[0] / ranks.size
                detail["pit_histogram"] = histogram.tolist()
            details.append(detail)
    ceiling = noise_ceiling(test.counts, test.library_size, test.transform, seed=seed)
    rows.append(
        {
            "slide": name,
            "method": CEILING,
            **about,
            "n_draws": 0,
            **dict.fromkeys(METRICS, float("nan")),
            **summarise_pcc(ceiling, measured.var(axis=0)),
        }
    )
    return Evaluation(rows, details, attained_shares(rows, _of_training_mean(measured, everything)))


def _of_training_mean(measured: NDArray, predictions: Sequence[Prediction]) -> dict[str, float]:
    """Scores of the training mean, as draws too: all the same; empty if it is not among the predictions."""
    for prediction in predictions:
        if prediction.method == "mean":
            draws = np.stack([prediction.mean] * 2)
            drawn = {key: float(values.mean()) for key, values in _draws_of_spots(measured, draws).items()}
            return mean_scores(measured, prediction.mean) | {key: drawn[key] for key in ("crps", "energy", "variogram")}
    return {}


def prediction_from_draws(draws: AnnData, spots: SpotTable, method: str = "hinge") -> Prediction:
    """Take what sampling wrote, for the spots and genes of a table and in their order.

    The mean is `layers["expected"]` where there is one, the head's own expectation averaged over draws: it
    has the same mean as `X`, the average of the draws, and less noise.

    Parameters
    ----------
    draws
        One slide's draws: `layers["draw_000"]`, `layers["draw_001"]` ... in the transform that
        `uns["hinge"]["transform"]` names. Spots and genes that the table lacks are left aside.
    spots
        Spots of that slide.
    method
        Name for the rows of scores.

    Raises
    ------
    DataError
        If a spot or gene of the table is missing, or the draws are of another slide or transform.
    """
    about = draws.uns.get("hinge", {})
    if about.get("transform") != spots.transform:
        raise DataError(f"the draws are in units of {about.get('transform')}, the measured values of {spots.transform}")
    slides = np.unique(spots.slide)
    if len(slides) != 1 or about.get("name") != slides[0]:
        raise DataError(
            f"the draws are of slide {about.get('name')}, the measured spots of {', '.join(slides) or 'no slide'}"
        )
    rows, columns = draws.obs_names.get_indexer(spots.barcodes), draws.var_names.get_indexer(spots.genes)
    for what, index, names in (("spots", rows, spots.barcodes), ("genes", columns, spots.genes)):
        missing = [str(name) for name, position in zip(names, index, strict=True) if position < 0]
        if missing:
            raise DataError(
                f"the draws lack {len(missing)} of the {len(names)} measured {what}: {', '.join(missing[:5])}"
                f"{', ...' if len(missing) > 5 else ''}"
            )
    chosen = np.ix_(rows, columns)
    names = draw_names(draws)
    mean = draws.layers.get("expected", draws.X)
    return Prediction(
        method,
        mean=np.asarray(mean)[chosen],
        draws=np.stack([np.asarray(draws.layers[name])[chosen] for name in names]) if names else None,
    )


def write_scores(path: str | Path, evaluations: Sequence[Evaluation], reference: str = "hinge") -> Path:
    """Write evaluations, of one or several slides, as JSON with what each metric means.

    The file holds `hinge_version`, `definitions` (metric → label, definition, unit, better), `rows`, `attained`
    and `details` of the evaluations, `summary` (mean and standard deviation over slides, see `summarise_rows`) and
    `comparisons` (paired Wilcoxon tests over slides of `reference` with each other method, see `paired_wilcoxon`).
    A score that does not exist is null.
    """
    together = {
        part: [entry for evaluation in evaluations for entry in getattr(evaluation, part)]
        for part in ("rows", "attained", "details")
    }
    return write_json(
        path,
        {
            "hinge_version": VERSION,
            "definitions": {name: asdict(metric) for name, metric in METRICS.items()},
            "rows": together["rows"],
            "attained": together["attained"],
            "summary": summarise_rows(together["rows"], list(METRICS)),
            "comparisons": paired_wilcoxon(together["rows"], list(METRICS), reference),
            "details": together["details"],
        },
    )


def scores_table(rows: Sequence[dict[str, Any]], attained: Sequence[dict[str, Any]] = ()) -> Table:
    """Lay the main scores out for a terminal.

    A block for each slide, then mean ± standard deviation over slides if several, then what share each method
    has of what is attainable.

    Parameters
    ----------
    rows, attained
        Of `Evaluation`s or of a file of scores. Missing scores, NaN or None, are shown as a dash and left out of
        the means; columns without any score are left out.
    """
    known = [name for name in _PRINTED if any(_number(row.get(name)) is not None for row in rows)]
    printed = known or list(_PRINTED)
    table = Table(title="scores", title_justify="left")
    for column in ("slide", "transform", "method"):
        table.add_column(column, no_wrap=True)
    for name in printed:
        sign = {"higher": "↑", "lower": "↓"}.get(METRICS[name].better, "")
        table.add_column(f"{METRICS[name].label} {sign}".strip(), justify="right")

    blocks: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        blocks.setdefault((row["slide"], row["transform"]), []).append(row)
    for (slide, transform), block in blocks.items():
        for row in block:
            numbers = [_number(row.get(name)) for name in printed]
            table.add_row(slide, transform, row["method"], *("–" if x is None else f"{x:.3f}" for x in numbers))
        table.add_section()
    if len({slide for slide, _ in blocks}) > 1:
        for entry in summarise_rows(rows, printed):
            cells = []
            for name in printed:
                cell = f"{entry['mean'][name]:.3f}" if name in entry["mean"] else "–"
                cells.append(f"{cell} ± {entry['sd'][name]:.3f}" if name in entry["sd"] else cell)
            table.add_row(f"mean of {entry['n']}", entry["transform"], entry["method"], *cells)
        table.add_section()
    for row in attained:
        shares = [_number(row.get(name)) for name in printed]
        if row["of"] != row["method"] and any(share is not None for share in shares):
            cells = ("–" if share is None else f"{share:.0%}" for share in shares)
            table.add_row(row["slide"], f"of {row['of']}", row["method"], *cells)
    return table


def _number(value: Any) -> float | None:
    return None if value is None or np.isnan(value) else float(value)
