"""Scores of predicted slides: accuracy, co-expression, calibration, and what they are compared with."""

from hinge.utils.lazy import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "baselines": (
            "baseline_predictions",
            "fit_baselines",
            "fit_mlp",
        ),
        "definitions": ("METRICS", "Metric"),
        "metrics.accuracy": ("gene_pcc", "mean_scores", "summarise_pcc"),
        "metrics.calibration": (
            "CURVE_LEVELS",
            "coverage",
            "covered",
            "crps",
            "crps_of_spots",
            "pit_distribution",
            "pit_values",
        ),
        "metrics.coexpression": ("coexpression_scores", "correlation_matrix", "matrix_scores"),
        "metrics.gene_sets": ("MARKERS", "module_scores", "read_gene_sets"),
        "metrics.multivariate": ("energy_score", "variogram_score"),
        "metrics.spatial": ("moran_scores", "morans_i", "neighbour_weights", "spot_structure", "ssim_of_maps"),
        "metrics.two_sample": ("round_to_counts", "two_sample_auc"),
        "ceiling": ("CEILING", "attained_shares", "noise_ceiling"),
        "names": ("BASELINES", "DEFAULT_BASELINES", "GENERATIVE_BASELINES"),
        "predictions": ("Prediction", "PredictionFiles", "prediction_from_draws", "read_prediction"),
        "scores": ("Evaluation", "evaluate_slide", "score", "score_draws"),
        "statistics": ("bootstrap_intervals", "paired_wilcoxon", "summarise_rows"),
        "tables": ("scores_table", "write_scores"),
    },
)
