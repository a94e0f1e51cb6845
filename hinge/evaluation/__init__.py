"""Scores of predicted slides: accuracy, co-expression, calibration, and what to read them beside."""

from hinge.evaluation.baselines import Prediction, baseline_predictions, fit_baselines, spot_groups
from hinge.evaluation.calibration import CURVE_LEVELS, coverage, crps, pit_distribution
from hinge.evaluation.ceiling import noise_ceiling
from hinge.evaluation.coexpression import coexpression_scores, correlation_matrix, matrix_scores
from hinge.evaluation.metrics import gene_pcc, mean_scores, summarise_pcc
from hinge.evaluation.multivariate import energy_score, variogram_score
from hinge.evaluation.score import (
    METRICS,
    Metric,
    evaluate_slide,
    prediction_from_draws,
    score,
    score_draws,
    scores_table,
    write_scores,
)
from hinge.evaluation.spatial import moran_scores, morans_i, neighbour_weights, spot_structure, ssim_of_maps
from hinge.evaluation.two_sample import round_to_counts, two_sample_auc

__all__ = [
    "CURVE_LEVELS",
    "METRICS",
    "Metric",
    "Prediction",
    "baseline_predictions",
    "coexpression_scores",
    "correlation_matrix",
    "coverage",
    "crps",
    "energy_score",
    "evaluate_slide",
    "fit_baselines",
    "gene_pcc",
    "matrix_scores",
    "mean_scores",
    "moran_scores",
    "morans_i",
    "neighbour_weights",
    "noise_ceiling",
    "pit_distribution",
    "prediction_from_draws",
    "round_to_counts",
    "score",
    "score_draws",
    "scores_table",
    "spot_groups",
    "spot_structure",
    "ssim_of_maps",
    "summarise_pcc",
    "two_sample_auc",
    "variogram_score",
    "write_scores",
]
