"""Arrays, figures and numbers of one slide as the page of the report reads them."""

import base64
import io
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hinge.evaluation import correlation_matrix, coverage, gene_pcc, matrix_scores, pit_distribution
from hinge.evaluation.metrics.coexpression import gene_order
from hinge.report.slides import ReportSlide

IMAGE_PX = 1400  # long side of the image in the page
DRAWS_SHOWN = 8  # maximum number of single draws in the page
VALUES_SHOWN = 1_600_000  # maximum number of values of these draws per slide
LEVELS = np.arange(1, 20) / 20
RANK_BINS = 20  # maximum; with few draws, the number of draws + 1


def _pack(values: NDArray) -> dict[str, Any]:
    """Return an array as int16 steps of about 0.01, low bytes before high bytes, deflated, in base64.

    The nearly constant high bytes compress well when they are separate; NaN becomes -32768.
    """
    values = np.asarray(values, dtype=np.float64)
    peak = float(np.nanmax(np.abs(values), initial=0.0))
    quantum = min(max(0.01, peak / 32_000), peak / 250) or 1.0
    steps = np.where(np.isnan(values), -32_768, np.rint(values / quantum)).astype("<i2")
    planes = steps.reshape(-1, 1).view(np.uint8).T
    data = base64.b64encode(zlib.compress(planes.tobytes())).decode()
    return {"quantum": quantum, "data": data}


def slide_content(slide: ReportSlide) -> dict[str, Any]:
    """Return the data of one slide as the page reads it; arrays over spots are gene-major (G, n)."""
    measured = np.asarray(slide.measured, dtype=np.float32)
    draws = np.asarray(slide.draws, dtype=np.float32)
    mean = draws.mean(axis=0) if slide.mean is None and len(draws) else slide.mean
    shown = max(1, min(DRAWS_SHOWN, VALUES_SHOWN // measured.size))
    low, high = np.quantile(np.concatenate([measured[None], draws]), [0.01, 0.99], axis=(0, 1))
    variance = measured.var(axis=0)
    content: dict[str, Any] = {
        "name": slide.name,
        "transform": slide.transform,
        "genes": slide.genes,
        "barcodes": slide.barcodes or [f"spot {i + 1}" for i in range(len(measured))],
        "scale": np.stack([low, np.where(high > low, high, low + 1)], axis=1).tolist(),
        "measured": _pack(measured.T),
        "n_draws": len(draws),
        "draws": [_pack(draw.T) for draw in draws[:shown]],
        # the numbers beside each gene's name
        "genewise": {"variance": variance.tolist(), "measured": measured.mean(axis=0, dtype=np.float64).tolist()},
        "first_gene": int(variance.argmax()),
        "comparison": _comparison(slide),
    }
    content |= _image(slide)
    if mean is not None:
        pcc = gene_pcc(measured, mean)
        content["mean"] = _pack(np.asarray(mean).T)
        content["genewise"]["pcc"] = pcc.tolist()
        content["genewise"]["rmse"] = np.sqrt(np.mean((mean - measured) ** 2, axis=0)).tolist()
        known = np.flatnonzero(np.isfinite(pcc))
        if len(known):
            content["first_gene"] = int(known[np.argsort(pcc[known], kind="stable")[len(known) // 2]])
    if len(draws) > 1:
        spread = draws.std(axis=0)
        widest = np.quantile(spread, 0.99, axis=0)
        # another draw is between these quantiles with probability 90 %; that needs at least 19 draws
        lower, upper = np.quantile(draws, [0.05, 0.95], axis=0, method="weibull")
        content |= {"std": _pack(spread.T), "low": _pack(lower.T), "high": _pack(upper.T)}
        content["interval"] = "90 % interval" if len(draws) >= 19 else f"range of {len(draws)} draws"
        content["spread_scale"] = np.where(widest > 0, widest, 1.0).tolist()
        content["genewise"]["coverage_90"] = [
            coverage(measured[:, [gene]], draws[:, :, [gene]], [0.9])[0] for gene in range(len(slide.genes))
        ]
        content["calibration"] = _calibration(measured, draws)
    if len(slide.genes) > 1:
        content |= _coexpression(measured, draws, mean)
    return content


def _comparison(slide: ReportSlide) -> dict[str, Any] | None:
    """Return the comparison of two regions with its table as columns."""
    if slide.comparison is None:
        return None
    table = slide.comparison["table"]
    columns = {name: table[name].tolist() for name in table.columns}
    return {**slide.comparison, "table": {"gene": table.index.tolist(), **columns}}


def _image(slide: ReportSlide) -> dict[str, Any]:
    """Return the image around the spots, at most `IMAGE_PX` long, and the positions of the spots on it."""
    last = np.array([slide.image.shape[1], slide.image.shape[0]])
    spots = np.asarray(slide.coords, dtype=np.float64) * slide.image_scale
    radius = slide.spot_diameter_px * slide.image_scale / 2
    margin = 2 * radius + 0.04 * np.ptp(spots, axis=0).max()
    left, top = np.clip(np.floor(spots.min(axis=0) - margin), 0, last - 1).astype(int)
    right, bottom = np.clip(np.ceil(spots.max(axis=0) + margin), [left + 1, top + 1], last).astype(int)
    image = Image.fromarray(slide.image[top:bottom, left:right])
    shrink = min(1.0, IMAGE_PX / max(image.size))
    if shrink < 1:
        image = image.resize([max(1, round(side * shrink)) for side in image.size], Image.Resampling.LANCZOS)
    spots = (spots - [left, top]) * shrink
    file = io.BytesIO()
    image.save(file, "WEBP", quality=82)
    return {
        "image": "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode(),
        "width": image.width,
        "height": image.height,
        "x": _pack(spots[:, 0]),
        "y": _pack(spots[:, 1]),
        "radius": radius * shrink,
    }


def _coexpression(measured: NDArray, draws: NDArray, mean: NDArray | None) -> dict[str, Any]:
    """Return the correlation matrices in the gene order of the measured one, and their scores against it."""
    truth = correlation_matrix(measured)
    matrices, scores = {"measured": truth}, {}
    if len(draws):
        each = np.stack([correlation_matrix(draw) for draw in draws])
        every = [matrix_scores(truth, matrix) for matrix in each]
        scores["draws"] = {key: float(np.mean([score[key] for score in every])) for key in ("r", "rmse")}
        # the average over the draws in which both genes vary
        known = np.isfinite(each).sum(axis=0)
        matrices["draws"] = np.where(known, np.nansum(each, axis=0) / np.maximum(known, 1), np.nan)
    if mean is not None:
        matrices["mean"] = correlation_matrix(mean)
        scores["mean"] = matrix_scores(truth, matrices["mean"])
    order = gene_order(truth)
    return {
        "order": order.tolist(),
        "coexpression": {name: _pack(matrix[np.ix_(order, order)]) for name, matrix in matrices.items()},
        "coexpression_scores": scores,
    }


def _calibration(measured: NDArray, draws: NDArray) -> dict[str, Any]:
    """Return the coverage at the levels that the number of draws resolves, and the PIT histogram, over all values."""
    covered = coverage(measured, draws, LEVELS)
    resolved = np.isfinite(covered)
    bins = np.linspace(0, 1, min(len(draws) + 1, RANK_BINS) + 1)
    return {
        "nominal": LEVELS[resolved].tolist(),
        "empirical": covered[resolved].tolist(),
        "ranks": np.diff(pit_distribution(measured, draws, bins)).tolist(),
    }
