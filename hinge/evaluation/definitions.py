"""Definitions of the scores: the columns of a table of scores."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """Definition of a score. `better` is "higher", "lower" or "nearest <x>"."""

    label: str
    definition: str
    unit: str
    better: str


_GENE_PCC = "Pearson correlation over spots between measured values and predicted mean,"
_TOP_GENES = (
    _GENE_PCC + " mean of the {0} genes where it is highest (of all genes where there are fewer). Genes constant in "
    "the measured slide are left out; genes predicted constant count 0."
)
_PAIRS = (
    "over pairs of different genes that vary in the measured slide; pairs with a gene predicted constant "
    "count as correlation 0"
)
_EACH_DRAW = "mean over the scores of the single draws; for a method that gives only a matrix, the score of the matrix"
_COVERED = (
    "Share of measured values within the central {0} % of the draws: by rank among the draws, with ties and "
    "the gaps between neighbouring draws split evenly, so that calibrated draws of any number get {1}. Null "
    "with fewer than {2} draws."
)
_CLASSIFIER = (
    "Area under the ROC curve of gradient boosting that classifies spots as drawn or measured by {0} in five-fold "
    "cross-validation, both versions of a spot in the same fold; mean over the first two draws. Of more than 1,000 "
    "spots a random 1,000 and the first draw are used. Null with fewer than 10 spots."
)

METRICS: dict[str, Metric] = {
    "pcc_10": Metric("PCC-10", _TOP_GENES.format(10), "correlation", "higher"),
    "pcc_50": Metric("PCC-50", _TOP_GENES.format(50), "correlation", "higher"),
    "pcc_200": Metric("PCC-200", _TOP_GENES.format(200), "correlation", "higher"),
    "pcc_mean": Metric(
        "mean PCC",
        f"{_GENE_PCC} mean of all genes that vary in the measured slide.",
        "correlation",
        "higher",
    ),
    "pcc_hvg50": Metric(
        "PCC HVG-50",
        f"{_GENE_PCC} mean of the 50 genes of largest measured variance.",
        "correlation",
        "higher",
    ),
    "mse": Metric(
        "MSE",
        "Squared difference of measured and predicted mean, mean over spots and genes.",
        "transform units²",
        "lower",
    ),
    "mse_level": Metric(
        "MSE, level",
        "The part of the MSE that is due to the mean of each gene over the slide: squared difference of measured and "
        "predicted mean over spots, mean over genes.",
        "transform units²",
        "lower",
    ),
    "mse_slope": Metric(
        "MSE, slope",
        "The part of the MSE that a factor for each gene would remove, after its mean over spots is subtracted: a "
        "pattern that is predicted too strong or too weak. MSE = level + slope + pattern.",
        "transform units²",
        "lower",
    ),
    "mse_pattern": Metric(
        "MSE, pattern",
        "The rest of the MSE: variance of the measured values around the line that fits them best to the predicted "
        "ones, mean over genes.",
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
    "coexpression_r_pooled": Metric(
        "co-expr. r (pooled)",
        f"As co-expr. r, for the mean over draws of the drawn gene-gene correlations, {_PAIRS}.",
        "correlation",
        "higher",
    ),
    "coexpression_rmse_pooled": Metric(
        "co-expr. RMSE (pooled)",
        f"As co-expr. RMSE, for the mean over draws of the drawn gene-gene correlations, {_PAIRS}.",
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
    "energy": Metric(
        "energy",
        "Energy score of each spot's gene vector, fair estimator, genes in transform units and not standardised, "
        "mean over spots. Null with fewer than 2 draws.",
        "transform units",
        "lower",
    ),
    "variogram": Metric(
        "variogram",
        "Variogram score of order 0.5 of each spot's gene vector, fair estimator, mean over pairs of different "
        "genes, all weighted alike and not standardised, and over spots. Null with fewer than 2 draws.",
        "transform units",
        "lower",
    ),
    "coverage_50": Metric("coverage 50 %", _COVERED.format(50, 0.5, 3), "share", "nearest 0.5"),
    "coverage_90": Metric("coverage 90 %", _COVERED.format(90, 0.9, 19), "share", "nearest 0.9"),
    "coverage_90_genes": Metric(
        "coverage 90 % by gene",
        "Absolute difference of a gene's coverage by the central 90 % of the draws from 0.9, mean over genes. Null "
        "with fewer than 19 draws.",
        "share",
        "lower",
    ),
    "c2st_auc": Metric("C2ST AUC", _CLASSIFIER.format("expression"), "AUC", "nearest 0.5"),
    "c2st_counts_auc": Metric(
        "C2ST AUC (counts)",
        _CLASSIFIER.format(
            "expression, drawn values rounded to the nearest whole count at the spot's measured library size,"
        ),
        "AUC",
        "nearest 0.5",
    ),
    "c2st_features_auc": Metric(
        "C2ST AUC (features)", _CLASSIFIER.format("expression and histology features"), "AUC", "nearest 0.5"
    ),
    "modules_within_rmse": Metric(
        "modules within",
        "Root mean squared difference of measured and drawn gene-gene correlations over pairs that share a gene "
        "set; scored for each draw by itself, mean over draws.",
        "correlation",
        "lower",
    ),
    "modules_between_rmse": Metric(
        "modules between",
        "The same over pairs of genes that are in different gene sets only.",
        "correlation",
        "lower",
    ),
    "ssc": Metric(
        "SSC",
        "Pearson correlation between the spot-spot correlations (over genes, each centred over spots) of measured "
        "slide and draw, mean over draws.",
        "correlation",
        "higher",
    ),
    "moran": Metric(
        "Moran's I",
        "Moran's I of drawn maps, neighbours on the spot lattice weighted alike, mean over genes that vary in the "
        "measured slide and over draws; the measured slide's own is this divided by the ratio.",
        "correlation",
        "higher",
    ),
    "moran_ratio": Metric(
        "Moran ratio",
        "Mean Moran's I of drawn maps divided by that of the measured ones.",
        "ratio",
        "nearest 1",
    ),
    "ssim_mean": Metric(
        "SSIM (mean)",
        "Structural similarity of measured and predicted mean map, window of 3.5 spots, mean over genes.",
        "similarity",
        "higher",
    ),
    "ssim": Metric(
        "SSIM",
        "Structural similarity of measured and drawn map, window of 3.5 spots, mean over genes and the first two "
        "draws.",
        "similarity",
        "higher",
    ),
}
"""Definition of each score of a row, in the order of the columns."""
