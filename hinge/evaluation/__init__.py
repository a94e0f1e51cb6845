"""Scores of predicted slides: accuracy, co-expression, calibration, and what to read them beside."""

from hinge.evaluation.baselines import (
    BASELINES,
    DEFAULT_BASELINES,
    Prediction,
    baseline_predictions,
    fit_baselines,
    fit_mlp,
)
from hinge.evaluation.definitions import METRICS, Metric
from hinge.evaluation.metrics.accuracy import gene_pcc, mean_scores, summarise_pcc
from hinge.evaluation.metrics.calibration import (
    CURVE_LEVELS,
    coverage,
    covered,
    crps,
    crps_of_spots,
    pit_distribution,
    pit_values,
)
from hinge.evaluation.metrics.coexpression import coexpression_scores, correlation_matrix, matrix_scores
from hinge.evaluation.metrics.gene_sets import MARKERS, module_scores, read_gene_sets
from hinge.evaluation.metrics.multivariate import energy_score, variogram_score
from hinge.evaluation.metrics.spatial import moran_scores, morans_i, neighbour_weights, spot_structure, ssim_of_maps
from hinge.evaluation.metrics.two_sample import round_to_counts, two_sample_auc
from hinge.evaluation.noise_ceiling import CEILING, attained_shares, noise_ceiling
from hinge.evaluation.predictions import PredictionFiles, read_prediction
from hinge.evaluation.scores import (
    Evaluation,
    evaluate_slide,
    prediction_from_draws,
    score,
    score_draws,
    scores_table,
    write_scores,
)
from hinge.evaluation.statistics import bootstrap_intervals, paired_wilcoxon, summarise_rows

__all__ = [
    "BASELINES",
    "CEILING",
    "CURVE_LEVELS",
    "DEFAULT_BASELINES",
    "MARKERS",
    "METRICS",
    "Evaluation",
    "Metric",
    "Prediction",
    "PredictionFiles",
    "attained_shares",
    "baseline_predictions",
    "bootstrap_intervals",
    "coexpression_scores",
    "correlation_matrix",
    "coverage",
    "covered",
    "crps",
    "crps_of_spots",
    "energy_score",
    "evaluate_slide",
    "fit_baselines",
    "fit_mlp",
    "gene_pcc",
    "matrix_scores",
    "mean_scores",
    "module_scores",
    "moran_scores",
    "morans_i",
    "neighbour_weights",
    "noise_ceiling",
    "paired_wilcoxon",
    "pit_distribution",
    "pit_values",
    "prediction_from_draws",
    "read_gene_sets",
    "read_prediction",
    "round_to_counts",
    "score",
    "score_draws",
    "scores_table",
    "spot_structure",
    "ssim_of_maps",
    "summarise_pcc",
    "summarise_rows",
    "two_sample_auc",
    "variogram_score",
    "write_scores",
]
