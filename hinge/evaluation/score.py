"""One flat row of scores for each slide and method, and the file and table that hold them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData
from numpy.typing import ArrayLike
from rich.table import Table
from tqdm import tqdm

from hinge.data.spots import SpotTable
from hinge.errors import DataError
from hinge.evaluation.baselines import Prediction, baseline_predictions
from hinge.evaluation.calibration import check_draws, coverage, crps
from hinge.evaluation.ceiling import noise_ceiling
from hinge.evaluation.coexpression import coexpression_scores, correlation_matrix, matrix_scores
from hinge.evaluation.metrics import as_matrix, constant_genes, mean_scores, summarise_pcc
from hinge.evaluation.multivariate import energy_score, variogram_score
from hinge.evaluation.spatial import moran_scores, spot_structure, ssim_of_maps
from hinge.evaluation.two_sample import round_to_counts, two_sample_auc
from hinge.files import write_json

_DRAWS_TESTED = 2  # draws of the two-sample tests, which take a second each
_DRAWS_MAPPED = 2  # draws whose maps are compared by SSIM, which takes a millisecond a map


@dataclass(frozen=True)
class Metric:
    """What a score means. `better` is "higher", "lower" or "nearest <x>"."""

    label: str
    definition: str
    unit: str
    better: str


_OF_GENE = "Pearson correlation over spots between measured values and predicted mean,"
_BEST = (
    _OF_GENE + " mean of the {0} genes where it is highest (of all genes where there are fewer). Genes constant in "
    "the measured slide are left out; genes predicted constant count 0."
)
_PAIRS = (
    "over pairs of different genes that vary in the measured slide; pairs with a gene predicted constant "
    "count as correlation 0"
)
_EACH_DRAW = "scored for each draw by itself, mean over draws; for a method that gives only a matrix, of it"
_COVERED = (
    "Share of measured values within the central {0} % of the draws: by rank among the draws, with ties and "
    "the gaps between neighbouring draws split evenly, so that calibrated draws of any number get {1}. Null "
    "with fewer than {2} draws."
)

METRICS: dict[str, Metric] = {
    "pcc_10": Metric("PCC-10", _BEST.format(10), "correlation", "higher"),
    "pcc_50": Metric("PCC-50", _BEST.format(50), "correlation", "higher"),
    "pcc_200": Metric("PCC-200", _BEST.format(200), "correlation", "higher"),
    "pcc_mean": Metric(
        "mean PCC",
        f"{_OF_GENE} mean of all genes that vary in the measured slide.",
        "correlation",
        "higher",
    ),
    "pcc_hvg50": Metric(
        "PCC HVG-50",
        f"{_OF_GENE} mean of the 50 genes of largest measured variance.",
        "correlation",
        "higher",
    ),
    "mse": Metric(
        "MSE",
        "Squared difference of measured and predicted mean, mean over spots and genes.",
        "transform units²",
        "lower",
    ),
    "mae": Metric(
        "MAE",
        "Absolute difference of measured and predicted mean, mean over spots and genes.",
        "transform units",
        "lower",
    ),
    "rvd": Metric(
        "RVD",
        "((variance of the predicted mean - measured variance) / measured variance)², variances over spots, "
        "mean over genes that vary in the measured slide.",
        "ratio²",
        "lower",
    ),
    "coexpression_r_mean": Metric(
        "co-expr. r (mean)",
        f"Pearson correlation between the gene-gene correlations of measured and predicted mean, {_PAIRS}.",
        "correlation",
        "higher",
    ),
    "coexpression_rmse_mean": Metric(
        "co-expr. RMSE (mean)",
        f"Root mean squared difference of the gene-gene correlations of measured and predicted mean, {_PAIRS}.",
        "correlation",
        "lower",
    ),
    "coexpression_r": Metric(
        "co-expr. r",
        f"Pearson correlation between the measured and the drawn gene-gene correlations, {_PAIRS}; {_EACH_DRAW}.",
        "correlation",
        "higher",
    ),
    "coexpression_rmse": Metric(
        "co-expr. RMSE",
        f"Root mean squared difference of the measured and the drawn gene-gene correlations, {_PAIRS}; {_EACH_DRAW}.",
        "correlation",
        "lower",
    ),
    "crps": Metric(
        "CRPS",
        "Continuous ranked probability score of the draws, fair estimator (unbiased in their number), mean "
        "over spots and genes. Null with fewer than 2 draws.",
        "transform units",
        "lower",
    ),
    "coverage_50": Metric("coverage 50 %", _COVERED.format(50, 0.5, 3), "share", "nearest 0.5"),
    "coverage_90": Metric("coverage 90 %", _COVERED.format(90, 0.9, 19), "share", "nearest 0.9"),
}
"""What each score of a row means, in the order of the columns."""

_PRINTED = (
    "pcc_50",
    "pcc_mean",
    "pcc_hvg50",
    "mse",
    "rvd",
    "crps",
    "coverage_90",
    "coexpression_r",
    "coexpression_rmse",
)


def score(measured: ArrayLike, prediction: Prediction) -> dict[str, float]:
    """Score one prediction of one slide.

    Parameters
    ----------
    measured
        Values (n, G) in transform units.
    prediction
        Of the same spots and genes in the same order.

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
    measured = as_matrix(measured, "the measured slide")
    result = dict.fromkeys(METRICS, float("nan"))
    try:
        if prediction.mean is not None:
            scores = mean_scores(measured, prediction.mean)
            result |= {key: value for key, value in scores.items() if key in METRICS}
            coexpression = coexpression_scores(measured, prediction.mean)
            result |= {f"coexpression_{key}_mean": value for key, value in coexpression.items()}
        if prediction.draws is not None and len(prediction.draws):
            result["crps"] = crps(measured, prediction.draws)
            result["coverage_50"], result["coverage_90"] = coverage(measured, prediction.draws, (0.5, 0.9)).tolist()
            coexpression = coexpression_scores(measured, prediction.draws)
            result |= {f"coexpression_{key}": value for key, value in coexpression.items()}
        elif prediction.correlation is not None:
            coexpression = matrix_scores(correlation_matrix(measured), prediction.correlation)
            result |= {f"coexpression_{key}": value for key, value in coexpression.items()}
    except DataError as error:
        raise DataError(f"{prediction.method} cannot be scored: {error}") from error
    return result


def score_draws(
    measured: ArrayLike,
    draws: ArrayLike,
    coordinates: ArrayLike | None = None,
    features: ArrayLike | None = None,
    *,
    total: ArrayLike | None = None,
    transform: str | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Score draws of one slide by everything that looks at more than a mean.

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
    total, transform
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
    coverage_50, coverage_90 = coverage(measured, draws, (0.5, 0.9)).tolist()
    coexpression = coexpression_scores(measured, draws)
    scores = {
        "coexpression_r": coexpression["r"],
        "coexpression_rmse": coexpression["rmse"],
        "crps": crps(measured, draws),
        "energy": float(energy_score(measured, draws).mean()),
        "variogram": float(variogram_score(measured, draws).mean()),
        "coverage_50": coverage_50,
        "coverage_90": coverage_90,
        "c2st_auc": two_sample_auc(measured, draws, n_draws=_DRAWS_TESTED, seed=seed),
        "ssc": spot_structure(measured, draws),
    }
    if features is not None:
        scores["c2st_features_auc"] = two_sample_auc(measured, draws, features, n_draws=_DRAWS_TESTED, seed=seed)
    if total is not None and transform is not None:
        counts = round_to_counts(draws[:_DRAWS_TESTED], total, transform)
        scores["c2st_counts_auc"] = two_sample_auc(measured, counts, n_draws=_DRAWS_TESTED, seed=seed)
    if coordinates is not None:
        moran = moran_scores(measured, draws, coordinates)
        scores["moran"], scores["moran_ratio"] = moran["draw"], moran["ratio"]
        scores["ssim"] = ssim_of_maps(measured, draws[:_DRAWS_MAPPED], coordinates)
    return scores


def evaluate_slide(
    train: SpotTable | None,
    test: SpotTable,
    predictions: Sequence[Prediction],
    *,
    n_draws: int = 20,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Score predictions of one slide beside the baselines and the noise ceiling.

    Parameters
    ----------
    train
        Spots that the baselines learn from; None leaves the baselines out.
    test
        Spots of one slide, which are predicted.
    predictions
        Predictions of the test spots, in their order.
    n_draws
        Draws of the baselines.
    seed
        Of the baselines' draws and of the noise ceiling.

    Returns
    -------
    list of dict
        One row for each prediction, each baseline of `baseline_predictions` and `noise-ceiling`: `slide`,
        `method`, `transform`, `n_spots`, `n_genes`, `n_genes_constant` (in the measured slide), `n_draws`,
        and the metrics of `METRICS`.

    Raises
    ------
    DataError
        If the test spots are not of one slide, or something does not fit them.
    """
    slides = np.unique(test.slide)
    if len(slides) != 1:
        raise DataError(f"one slide at a time can be scored, but the test spots are of {len(slides)}")
    measured = as_matrix(test.values, f"slide {slides[0]}")
    about = {
        "transform": test.transform,
        "n_spots": measured.shape[0],
        "n_genes": measured.shape[1],
        "n_genes_constant": int(constant_genes(measured).sum()),
    }
    baselines = [] if train is None else baseline_predictions(train, test, n_draws=n_draws, seed=seed)
    rows = []
    for prediction in tqdm([*predictions, *baselines], desc=f"scoring {slides[0]}", disable=None):
        rows.append(
            {
                "slide": str(slides[0]),
                "method": prediction.method,
                **about,
                "n_draws": 0 if prediction.draws is None else len(prediction.draws),
                **score(measured, prediction),
            }
        )
    ceiling = noise_ceiling(test.counts, test.total, test.transform, seed=seed)
    rows.append(
        {
            "slide": str(slides[0]),
            "method": "noise-ceiling",
            **about,
            "n_draws": 0,
            **dict.fromkeys(METRICS, float("nan")),
            **summarise_pcc(ceiling, measured.var(axis=0)),
        }
    )
    return rows


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
    names = sorted(name for name in draws.layers if name.startswith("draw_"))
    mean = draws.layers.get("expected", draws.X)
    return Prediction(
        method,
        mean=np.asarray(mean)[chosen],
        draws=np.stack([np.asarray(draws.layers[name])[chosen] for name in names]) if names else None,
    )


def write_scores(path: str | Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows of `evaluate_slide`, of one or several slides, as JSON with what each metric means.

    The file holds `hinge_version`, `definitions` (metric → label, definition, unit, better) and `rows`; a
    score that does not exist is null.
    """
    return write_json(
        path,
        {
            "hinge_version": version("hinge"),
            "definitions": {name: asdict(metric) for name, metric in METRICS.items()},
            "rows": list(rows),
        },
    )


def scores_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Lay the main scores out for a terminal: a block for each slide, then the mean over slides if several.

    Missing scores, NaN or None, are shown as a dash and left out of the means.
    """
    table = Table(title="scores", title_justify="left")
    for column in ("slide", "transform", "method"):
        table.add_column(column, no_wrap=True)
    for name in _PRINTED:
        sign = {"higher": "↑", "lower": "↓"}.get(METRICS[name].better, "")
        table.add_column(f"{METRICS[name].label} {sign}".strip(), justify="right")

    def add(slide: str, transform: str, method: str, values: dict[str, float]) -> None:
        cells = ["–" if np.isnan(values[name]) else f"{values[name]:.3f}" for name in _PRINTED]
        table.add_row(slide, transform, method, *cells)

    blocks: dict[tuple[str, str], list] = {}
    methods: dict[tuple[str, str], list] = {}
    for row in rows:
        values = {name: float("nan") if row.get(name) is None else row[name] for name in _PRINTED}
        blocks.setdefault((row["slide"], row["transform"]), []).append((row["method"], values))
        methods.setdefault((row["transform"], row["method"]), []).append(values)
    for (slide, transform), block in blocks.items():
        for method, values in block:
            add(slide, transform, method, values)
        table.add_section()
    if len({slide for slide, _ in blocks}) > 1:
        for (transform, method), several in methods.items():
            by_metric = {name: [v[name] for v in several if not np.isnan(v[name])] for name in _PRINTED}
            means = {name: float(np.mean(v)) if v else float("nan") for name, v in by_metric.items()}
            add(f"mean of {len(several)}", transform, method, means)
    return table
