"""Scores of predicted slides: one flat row for each slide and method."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hinge.evaluation.baselines import baseline_predictions
from hinge.evaluation.ceiling import CEILING, attained_shares, noise_ceiling
from hinge.evaluation.definitions import METRICS
from hinge.evaluation.kept import KeptPrediction, ScoreStore, truth_digest
from hinge.evaluation.metrics.accuracy import as_matrix, constant_genes, error_parts, mean_scores, summarise_pcc
from hinge.evaluation.metrics.calibration import check_draws, coverage, covered, crps_of_spots, pit_values
from hinge.evaluation.metrics.coexpression import coexpression_scores, correlation_matrix, matrix_scores
from hinge.evaluation.metrics.gene_sets import MARKERS, module_scores
from hinge.evaluation.metrics.multivariate import energy_score, variogram_score
from hinge.evaluation.metrics.spatial import moran_scores, spot_structure, ssim_of_maps
from hinge.evaluation.metrics.two_sample import round_to_counts, two_sample_auc
from hinge.evaluation.names import DEFAULT_BASELINES, DEFAULT_DRAWS, DEFAULT_RESAMPLES
from hinge.evaluation.predictions import Prediction
from hinge.evaluation.statistics import bootstrap_intervals
from hinge.utils.errors import DataError
from hinge.utils.threads import in_threads, limit_threads

if TYPE_CHECKING:
    from hinge.data.spots import SpotTable

_DRAWS_TESTED = 2  # draws in the two-sample tests, which take up to a second each
_DRAWS_MAPPED = 2  # draws whose maps are compared by SSIM, which takes a millisecond a map
_PIT_BINS = 10


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate_slide`.

    Attributes
    ----------
    rows
        One flat row of scores for each method.
    details
        One entry for each method that gives a mean or draws: `slide`, `method`, `genes`, `intervals` (score →
        [lower, upper], 90 % by bootstrap over spots), and for draws `coverage_50` and `coverage_90` (of each gene)
        and `pit_histogram` (share of measured values in each of 10 bins of the randomised PIT).
    attained
        Rows of `attained_shares`: `slide`, `method`, `transform`, `of`, and score → share of the way from the
        training mean to the attainable score, which is the oracle's on simulated tissue (`of` = oracle) and for
        correlations the noise ceiling elsewhere (`of` = noise-ceiling).
    """

    rows: list[dict[str, Any]]
    details: list[dict[str, Any]]
    attained: list[dict[str, Any]]


def score(
    measured: ArrayLike,
    prediction: Prediction,
    spots: "SpotTable | None" = None,
    gene_sets: Mapping[str, Sequence[str]] | None = None,
    *,
    seed: int = 0,
) -> dict[str, float]:
    """Return the scores of one prediction of one slide.

    Parameters
    ----------
    measured
        Values (n, G) in transform units.
    prediction
        Of the same spots and genes in the same order.
    spots
        Coordinates, library size and features of the spots. Without them the scores that need these are left out.
    gene_sets
        Name → genes, for the scores of modules; None for `MARKERS`. They need `spots`.
    seed
        Seed of the folds of the two-sample test.

    Returns
    -------
    dict
        Every metric of `METRICS`; NaN where the prediction lacks what it needs (no mean, no or too few draws), or the
        slide does (one spot, one gene, constant genes).

    Raises
    ------
    DataError
        If the prediction has other spots or genes than the slide, or a value is not finite.
    """
    return _score(measured, prediction, spots, gene_sets, seed)[0]


def _score(
    measured: ArrayLike,
    prediction: Prediction,
    spots: "SpotTable | None",
    gene_sets: Mapping[str, Sequence[str]] | None,
    seed: int,
) -> tuple[dict[str, float], dict[str, NDArray]]:
    """Return the scores and, for those that are means over spots, the value of each spot (n,)."""
    measured = as_matrix(measured, "the measured slide")
    result = dict.fromkeys(METRICS, float("nan"))
    of_spots: dict[str, Any] = {}
    try:
        if prediction.mean is not None:
            result |= _mean_scores(measured, prediction.mean, spots)
            error = np.asarray(prediction.mean, dtype=np.float64) - measured
            of_spots |= {"mse": (error**2).mean(axis=1), "mae": np.abs(error).mean(axis=1)}
        if prediction.draws is not None and len(prediction.draws):
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


def _mean_scores(measured: NDArray, mean: NDArray, spots: "SpotTable | None") -> dict[str, float]:
    """Return the scores of a predicted mean."""
    scores = {key: value for key, value in mean_scores(measured, mean).items() if key in METRICS}
    scores |= error_parts(measured, mean)
    coexpression = coexpression_scores(measured, mean)
    scores |= {f"coexpression_{key}_mean": value for key, value in coexpression.items()}
    if spots is not None:
        scores["ssim_mean"] = ssim_of_maps(measured, mean, spots.coords)
    return scores


def _draws_of_spots(measured: NDArray, draws: ArrayLike) -> dict[str, NDArray]:
    """Return the scores of draws that are means over spots, as one value a spot (n,)."""
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
    """Return the scores of draws; `of_spots` are those of `_draws_of_spots`."""
    coexpression = coexpression_scores(measured, draws)
    scores = {f"coexpression_{key}": value for key, value in coexpression.items()}
    scores |= {key: float(of_spots[key].mean()) for key in ("crps", "energy", "variogram")}
    scores["coverage_50"], scores["coverage_90"] = coverage(measured, draws, (0.5, 0.9)).tolist()
    scores["coverage_90_genes"] = float(np.abs(covered(measured, draws, 0.9).mean(axis=0) - 0.9).mean())
    scores["ssc"] = spot_structure(measured, draws)
    tested = draws[:_DRAWS_TESTED]
    scores["c2st_auc"] = two_sample_auc(measured, tested, n_draws=_DRAWS_TESTED, seed=seed)
    if features is not None:
        scores["c2st_features_auc"] = two_sample_auc(measured, tested, features, n_draws=_DRAWS_TESTED, seed=seed)
    if spots is not None and spots.library_size is not None:
        counts = round_to_counts(tested, spots.library_size, spots.transform)
        # draws of whole counts need no second test
        same = np.array_equal(counts, np.asarray(tested, dtype=np.float32))
        scores["c2st_counts_auc"] = (
            scores["c2st_auc"] if same else two_sample_auc(measured, counts, n_draws=_DRAWS_TESTED, seed=seed)
        )
    if spots is not None and spots.coords is not None:
        moran = moran_scores(measured, draws, spots.coords)
        scores["moran"], scores["moran_ratio"] = moran["draw"], moran["ratio"]
        scores["ssim"] = ssim_of_maps(measured, draws[:_DRAWS_MAPPED], spots.coords)
    return scores


@dataclass(frozen=True)
class _Place:
    """The columns of a `SpotTable` that `_draw_scores` reads."""

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
    """Return all scores of draws of one slide, from arrays.

    Parameters
    ----------
    measured
        Values (n, G) in transform units.
    draws
        Values (K, n, G) in transform units.
    coordinates
        Position of each spot (n, 2), in any unit. Without them the scores of maps are left out.
    features
        Histology features (n, d). Without them `c2st_features_auc` is left out.
    library_size, transform
        Measured counts (n,) over all genes and the transform's name. Without them `c2st_counts_auc` is left out.
    seed
        Seed of the folds of the two-sample test.

    Returns
    -------
    dict
        The metrics of `METRICS` that draws have, NaN where there are too few of them or the slide does not allow.

    Raises
    ------
    DataError
        If shapes do not match, or a value is not finite.
    """
    measured, draws = check_draws(measured, draws)
    place = _Place(coordinates, None if transform is None else np.asarray(library_size), transform)
    of_spots = _draws_of_spots(measured, draws)
    return _draw_scores(measured, draws, of_spots, place, features if features is None else np.asarray(features), seed)


def evaluate_slide(
    train: "SpotTable | None",
    test: "SpotTable",
    predictions: Sequence[Prediction | KeptPrediction],
    *,
    baselines: Sequence[str] = DEFAULT_BASELINES,
    gene_sets: Mapping[str, Sequence[str]] | None = None,
    n_draws: int = DEFAULT_DRAWS,
    n_resamples: int = DEFAULT_RESAMPLES,
    seed: int = 0,
    kept: Path | None = None,
) -> Evaluation:
    """Score predictions of one slide together with the baselines and the noise ceiling.

    Parameters
    ----------
    train
        Spots that the baselines are fitted on. Without them there are no baselines.
    test
        Spots of one slide, which are predicted.
    predictions
        Predictions of the test spots, in their order. One whose method is `oracle` gives the attainable scores.
    baselines
        Which of `BASELINES` to fit.
    gene_sets
        Name → genes, for the scores of modules; None for `MARKERS`.
    n_draws
        Draws of the baselines.
    n_resamples
        Resamples of the bootstrap over spots; 0 for no intervals.
    seed
        Seed of the baselines' draws, the noise ceiling, folds and resamples.
    kept
        A file with scores of an earlier call: what has not changed since is taken from it, and it is written anew.

    Returns
    -------
    Evaluation
        With a row for each prediction, each baseline and `noise-ceiling`: `slide`, `method`, `transform`,
        `n_spots`, `n_genes`, `n_genes_constant` (in the measured slide), `n_draws`, and the metrics of `METRICS`;
        for draws also what they were given of the slide as a whole (`Prediction.known`).

    Raises
    ------
    DataError
        If the test spots are not of one slide, two predictions have the same name, or shapes do not match.
    """
    from tqdm import tqdm

    slides = np.unique(test.slide)
    if len(slides) != 1:
        raise DataError(f"one slide at a time can be scored, but the test spots are of {len(slides)}")
    name, measured = str(slides[0]), as_matrix(test.values, f"slide {slides[0]}")
    fitted = [] if train is None else baseline_predictions(train, test, baselines, n_draws=n_draws, seed=seed)
    everything: list[Prediction | KeptPrediction] = [*predictions, *fitted]
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
    sets = MARKERS if gene_sets is None else gene_sets
    store = ScoreStore(kept, truth_digest(test, sets, n_resamples, seed))

    def scored(each: Prediction | KeptPrediction) -> tuple[dict[str, Any], dict[str, Any]]:
        prediction = _loaded(each)
        scores, detail = store.get(prediction, partial(_scores_and_detail, test, prediction, sets, n_resamples, seed))
        drawn = 0 if prediction.draws is None else len(prediction.draws)
        row = {"slide": name, "method": prediction.method, **about, **prediction.known, "n_draws": drawn, **scores}
        return row, {"slide": name, "method": prediction.method, "genes": test.genes, **detail} if detail else {}

    training_mean = _of_training_mean(measured, everything)
    # draws of a large slide take much memory: those in memory are let go as soon as they are scored
    remaining = deque(everything)
    del everything, predictions
    each_once = (remaining.popleft() for _ in methods)
    with limit_threads():
        results = in_threads(scored, each_once)
        both = list(tqdm(results, desc=f"scoring {name}", total=len(methods), disable=None))
    rows, details = [row for row, _ in both], [detail for _, detail in both if detail]
    store.save()
    # whole numbers but for a slide that lacks genes, whose library sizes are estimates
    ceiling = noise_ceiling(test.counts, np.round(test.library_size), test.transform, seed=seed)
    missing = dict.fromkeys(METRICS, float("nan"))
    pcc = summarise_pcc(ceiling, measured.var(axis=0))
    rows.append({"slide": name, "method": CEILING, **about, "n_draws": 0, **missing, **pcc})
    return Evaluation(rows, details, attained_shares(rows, training_mean))


def _scores_and_detail(
    test: "SpotTable",
    prediction: Prediction,
    gene_sets: Mapping[str, Sequence[str]],
    n_resamples: int,
    seed: int,
) -> tuple[dict[str, float], dict[str, Any]]:
    """Return the scores of a prediction and its entry of `Evaluation.details` without names, {} if it has none."""
    measured = as_matrix(test.values, "the measured slide")
    scores, of_spots = _score(measured, prediction, test, gene_sets, seed)
    if not of_spots:
        return scores, {}
    detail: dict[str, Any] = {"intervals": {}}
    if n_resamples:
        detail["intervals"] = bootstrap_intervals(
            measured, prediction.mean, of_spots, n_resamples=n_resamples, seed=seed
        )
    if prediction.draws is not None and len(prediction.draws):
        for level in (50, 90):
            of_genes = covered(measured, prediction.draws, level / 100).mean(axis=0)
            detail[f"coverage_{level}"] = np.round(of_genes, 4).tolist()
        ranks = pit_values(measured, prediction.draws, seed)
        histogram = np.histogram(ranks, bins=_PIT_BINS, range=(0, 1))[0] / ranks.size
        detail["pit_histogram"] = histogram.tolist()
    return scores, detail


def _loaded(prediction: Prediction | KeptPrediction) -> Prediction:
    return prediction.load() if isinstance(prediction, KeptPrediction) else prediction


def _of_training_mean(measured: NDArray, predictions: Sequence[Prediction | KeptPrediction]) -> dict[str, float]:
    """Return the scores of the training mean, also as a forecast without spread; empty if it was not predicted."""
    for each in predictions:
        if each.method == "mean":
            prediction = _loaded(each)
            scores = mean_scores(measured, prediction.mean)
            # without spread, the energy score is the norm of the error and the CRPS its absolute value
            energy = np.linalg.norm(np.asarray(prediction.mean, dtype=np.float64) - measured, axis=1).mean()
            variogram = variogram_score(measured, np.stack([prediction.mean] * 2)).mean()
            return scores | {"crps": scores["mae"], "energy": float(energy), "variogram": float(variogram)}
    return {}
