"""Error of masked genes: an expression backbone beside linear-Gaussian models of the same counts."""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from sklearn.covariance import ledoit_wolf

from hinge.evaluation.factors import fit_factor_analysis
from hinge.utils.threads import in_threads, limit_threads

Predictor = Callable[[NDArray[np.float32], NDArray[np.bool_]], NDArray[np.float32]]
"""Maps values (n, G) and which of them are visible (n, G) to predicted values (n, G)."""

MASKED_SHARES = (0.2, 0.5, 0.9)
MOST_GENES, MOST_SPOTS, MOST_TRAINING_SPOTS = 400, 400, 20_000
FACTORS = 32


def masked_gene_table(
    backbone: Predictor,
    training: NDArray[np.float32],
    held_out: Mapping[str, NDArray[np.float32]],
    seed: int = 0,
) -> list[dict[str, float | str]]:
    """Return the mean squared error of masked genes on held-out samples, of a backbone and of linear models.

    The linear models are fitted to the spots that the backbone was trained on: the mean of each gene; the conditional
    mean under a Gaussian with the covariance of Ledoit and Wolf (J. Multivariate Anal. 2004); and under a factor
    analysis with `FACTORS` factors. The masked genes of a spot are drawn from the seed and are the same for all.

    Parameters
    ----------
    backbone
        Its predictions on the same genes.
    training
        Values (n, G), NaN where a gene was not measured. At most `MOST_TRAINING_SPOTS` evenly spaced rows are used.
    held_out
        Values (n, G) of each held-out sample; the first `MOST_SPOTS` rows are used. Genes that a sample lacks are
        masked and are not scored.
    seed
        Seed of the masks.

    Returns
    -------
    list of dict
        One row per sample and share of masked genes: `sample`, `masked`, and the error of `backbone`, `mean`,
        `ledoit_wolf` and `factors`.
    """
    training = training[:: max(1, len(training) // MOST_TRAINING_SPOTS)]
    mean = np.nanmean(training, axis=0)
    filled = np.where(np.isfinite(training), training, mean).astype(np.float64)
    count = min(FACTORS, filled.shape[1] // 2, len(filled) // 10)
    predictors: dict[str, Predictor] = {
        "mean": lambda values, visible: np.broadcast_to(mean, values.shape),
        "ledoit_wolf": conditional_mean(mean, ledoit_wolf(filled)[0]),
    }
    if count:
        predictors["factors"] = conditional_mean(mean, fit_factor_analysis(filled, count).get_covariance())

    def errors(task: tuple[str, float], predictors: Mapping[str, Predictor]) -> dict[str, float]:
        values, share = held_out[task[0]][:MOST_SPOTS], task[1]
        known, masked = np.isfinite(values), draw_masks(len(values), values.shape[1], share, seed)
        shown, scored = np.nan_to_num(values).astype(np.float32), masked & known
        predicted = {name: predict(shown, known & ~masked) for name, predict in predictors.items()}
        return {
            name: float(((each - shown)[scored].astype(np.float64) ** 2).mean()) for name, each in predicted.items()
        }

    tasks = [(sample, share) for sample in held_out for share in MASKED_SHARES]
    of_backbone = [errors(task, {"backbone": backbone}) for task in tasks]
    with limit_threads():  # many small systems of equations
        of_linear = list(in_threads(lambda task: errors(task, predictors), tasks))
    return [
        {"sample": sample, "masked": share, **first, **others}
        for (sample, share), first, others in zip(tasks, of_backbone, of_linear, strict=True)
    ]


def draw_masks(num_spots: int, num_genes: int, share: float, seed: int) -> NDArray[np.bool_]:
    """Return which genes of each spot are masked, bool (n, G): the same number in every spot, at least one."""
    order = np.random.default_rng(seed).random((num_spots, num_genes)).argsort(axis=1).argsort(axis=1)
    return order < max(1, round(share * num_genes))


def conditional_mean(mean: NDArray[np.float64], covariance: NDArray[np.float64]) -> Predictor:
    """Return the conditional mean of a Gaussian given the visible genes, as a predictor.

    mean is (G,), covariance (G, G).
    """

    def predict(values: NDArray[np.float32], visible: NDArray[np.bool_]) -> NDArray[np.float32]:
        predicted = np.tile(mean, (len(values), 1))
        for row, seen in enumerate(visible):
            if seen.any():
                factor = cho_factor(covariance[np.ix_(seen, seen)])
                predicted[row] += covariance[:, seen] @ cho_solve(factor, values[row, seen] - mean[seen])
        return predicted.astype(np.float32)

    return predict


def lost_to(rows: list[dict[str, float | str]], method: str = "ledoit_wolf") -> bool:
    """Return whether the backbone's error, averaged over samples and shares in units of `method`'s, is above 1."""
    return float(np.mean([float(row["backbone"]) / float(row[method]) for row in rows])) > 1


def masked_gene_text(rows: list[dict[str, float | str]]) -> str:
    """Return a table of `masked_gene_table` as lines of text."""
    methods = [name for name in rows[0] if name not in ("sample", "masked")]
    width = max(len(str(row["sample"])) for row in rows)
    lines = [" ".join([f"{'sample':<{width}}", "masked", *(f"{name:>11}" for name in methods)])]
    for row in rows:
        cells = [f"{row['sample']!s:<{width}}", f"{float(row['masked']):>5.0%} "]
        lines.append(" ".join([*cells, *(f"{float(row[name]):>11.3f}" for name in methods)]))
    return "\n".join(lines)
