"""Scores of predicted slides: accuracy, co-expression, calibration, and what to read them beside."""

from hinge.evaluation.baselines import Prediction, baseline_predictions, fit_baselines, spot_groups
from hinge.evaluation.calibration import CURVE_LEVELS, coverage, crps, pit_distribution
from hinge.evaluation.ceiling import noise_ceiling
from hinge.evaluation.coexpression import coexpression_scores, correlation_matrix, matrix_scores
from hinge.evaluation.metrics import gene_pcc, mean_scores, summarise_pcc
from hinge.evaluation.score import (
    METRICS,
    Metric,
    evaluate_slide,
    prediction_from_draws,
    score,
    scores_table,
    write_scores,
)

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
    "evaluate_slide",
    "fit_baselines",
    "gene_pcc",
    "matrix_scores",
    "mean_scores",
    "noise_ceiling",
    "pit_distribution",
    "prediction_from_draws",
    "score",
    "scores_table",
    "spot_groups",
    "summarise_pcc",
    "write_scores",
]
