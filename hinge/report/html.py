"""The report as one HTML file: scores and baselines, genes on the slide, co-expression, calibration.

The page is `page.html` with `page.js` and the data as JSON. It opens from disk and loads nothing else; a content
security policy allows its own script only. Names from files reach the page as data and are set as text, never as
markup.
"""

import base64
import datetime
import hashlib
import html
import io
import json
import math
import zlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from hinge.data import Panel, load_spots, slide_name
from hinge.evaluation import (
    correlation_matrix,
    coverage,
    gene_pcc,
    matrix_scores,
    pit_distribution,
    prediction_from_draws,
)
from hinge.evaluation.metrics.coexpression import gene_order
from hinge.utils.errors import DataError
from hinge.utils.files import atomic_path
from hinge.utils.packages import VERSION

IMAGE_PX = 1400  # long side of the image in the page
DRAWS_SHOWN = 8  # maximum number of single draws in the page
VALUES_SHOWN = 1_600_000  # maximum number of values of these draws per slide
LEVELS = np.arange(1, 20) / 20
RANK_BINS = 20  # maximum; with few draws, the number of draws + 1

METHODS = {
    "hinge": "The model of this run.",
    "mean": "Each gene's mean over the training spots, the same for every spot.",
    "ridge-hest": "Linear regression as in HEST-Benchmark: 256 principal components of the features, a small "
    "fixed penalty.",
    "ridge-cv": "Linear regression on standardised features, its penalty chosen by cross-validation.",
    "ridge-cv+residual": "The mean of ridge-cv; its draws add Gaussian noise, correlated between genes as "
    "the cross-validated residuals are.",
    "knn": "The mean of the training spots with the most similar features; its draws are their measured expressions.",
    "mlp": "A network of one hidden layer on the features, trained by squared error.",
    "gaussian-diffusion": "The run's denoiser trained to remove Gaussian noise from all genes at once.",
    "flow-matching": "The run's denoiser trained to follow straight lines from noise to expression.",
    "training-correlation": "The gene-gene correlations of the training slides.",
    "oracle": "Draws from the distribution of the simulated tissue, given its image.",
    "noise-ceiling": "The score of a prediction without error, given the noise of the measured counts.",
}
"""Descriptions of the methods in the page."""


@dataclass
class ReportSlide:
    """The data of one slide in the report.

    Parameters
    ----------
    name
        Shown above the figures and in the slide menu.
    image
        Histology image (h, w, 3), uint8, at most about 2,000 px on its long side.
    image_scale
        Pixels of `image` per full-resolution pixel.
    coords
        Spot centres (n, 2) as x, y in full-resolution pixels.
    spot_diameter_px
        Diameter of a spot in full-resolution pixels.
    genes
        The panel's G gene names.
    measured
        Measured values (n, G) in transform units.
    draws
        Draws (K, n, G) in transform units; K may be 0 (the measured slide alone is shown) or 1 (no spread).
    transform
        Name of the transform, as the page prints it.
    barcodes
        Name of each spot (n,); numbers if not given.
    mean
        Predicted mean (n, G), the value that is scored; the mean of the draws if not given.
    """

    name: str
    image: NDArray[np.uint8]
    image_scale: float
    coords: NDArray[np.floating]
    spot_diameter_px: float
    genes: list[str]
    measured: NDArray[np.float32]
    draws: NDArray[np.float32]
    transform: str
    barcodes: list[str] | None = None
    mean: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        n, n_genes = len(self.coords), len(self.genes)
        expected = {"coords": (n, 2), "measured": (n, n_genes), "draws": (len(self.draws), n, n_genes)}
        if self.mean is not None:
            expected["mean"] = (n, n_genes)
        for field, shape in expected.items():
            found = np.shape(getattr(self, field))
            if found != shape:
                raise DataError(f"slide {self.name}: {field} has shape {found}, the report needs {shape}")
            if not np.isfinite(getattr(self, field)).all():
                raise DataError(f"slide {self.name}: {field} holds values that are not finite")
        if not n or not n_genes:
            raise DataError(f"slide {self.name} has {n} spots and {n_genes} genes, the report needs one of each")
        if self.image.ndim != 3 or self.image.shape[2] != 3 or self.image.dtype != np.uint8:
            raise DataError(
                f"slide {self.name}: the image is {self.image.dtype} {self.image.shape}, "
                "the report needs uint8 (h, w, 3)"
            )
        if not (self.image_scale > 0 and self.spot_diameter_px > 0):
            raise DataError(f"slide {self.name}: image scale and spot diameter must be positive")
        if self.barcodes is not None and len(self.barcodes) != n:
            raise DataError(f"slide {self.name}: {len(self.barcodes)} barcodes for {n} spots")


def report_slide(draws: AnnData, slide: AnnData) -> ReportSlide:
    """Return the data that the report shows of one slide.

    Parameters
    ----------
    draws
        Result of sampling, as `hinge.evaluation.prediction_from_draws` takes it, with the slide's image in
        `uns["spatial"]`.
    slide
        The measured slide, with raw counts of at least the draws' genes and spots.

    Raises
    ------
    DataError
        If the draws are of another slide, of spots or genes that the slide lacks, or hold no image.
    """
    name, transform = slide_name(slide), draws.uns.get("hinge", {}).get("transform")
    if transform is None:
        raise DataError(f"the draws for slide {name} lack uns['hinge']['transform'], which sampling writes")
    spots = load_spots(slide, Panel.from_list(list(draws.var_names)), transform, drop_empty=False)
    rows = pd.Index(spots.barcodes).get_indexer(draws.obs_names)
    if (rows < 0).any():
        missing = draws.obs_names[rows < 0]
        raise DataError(f"slide {name} lacks {len(missing)} of the draws' spots: {', '.join(missing[:5])}")
    spots = spots.subset(rows)
    prediction = prediction_from_draws(draws, spots)
    library: dict[str, Any] = next(iter(draws.uns.get("spatial", {}).values()), {})
    size = next((size for size in ("hires", "lowres") if size in library.get("images", {})), None)
    if size is None:
        raise DataError(f"the draws of slide {name} hold no image in uns['spatial']")
    scales = library["scalefactors"]
    return ReportSlide(
        name=name,
        image=np.asarray(library["images"][size]),
        image_scale=float(scales[f"tissue_{size}_scalef"]),
        coords=spots.coords,
        spot_diameter_px=float(scales["spot_diameter_fullres"]),
        genes=spots.genes,
        measured=spots.values,
        draws=np.zeros((0, *spots.values.shape)) if prediction.draws is None else prediction.draws,
        transform=transform,
        barcodes=spots.barcodes.tolist(),
        mean=prediction.mean,
    )


def write_report(
    path: str | Path,
    scores: dict[str, Any],
    slides: list[ReportSlide],
    title: str = "hinge report",
    settings: dict[str, Any] | None = None,
) -> Path:
    """Write the report as one HTML file that loads nothing else.

    Parameters
    ----------
    path
        The file; it appears when it is complete.
    scores
        Content of `scores.json`: `definitions` of the metrics and one of `rows` per slide and method; may be empty.
    slides
        Slides to show; with none, the page holds the scores alone.
    title
        Heading of the page.
    settings
        Settings of the run, shown below the heading; nested ones are named `outer.inner`.

    Returns
    -------
    Path
        `path`.
    """
    content = {
        "settings": {key: _plain(value) for key, value in _flatten(settings or {})},
        "scores": {
            "definitions": scores.get("definitions", {}),
            "methods": METHODS,
            "rows": scores.get("rows", []),
        },
        "slides": [_slide_content(slide) for slide in tqdm(slides, desc="report", unit="slide", disable=None)],
    }
    page = resources.files("hinge.report")
    script = page.joinpath("page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    document = Template(page.joinpath("page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(title),
        version=html.escape(VERSION),
        date=datetime.date.today().isoformat(),
        script_digest=f"sha256-{digest}",
        script=script,
        data=_json_in_html(content),
    )
    with atomic_path(path) as temporary:
        temporary.write_text(document, encoding="utf-8")
    return Path(path)


def _json_in_html(content: Any) -> str:
    """Return `content` as JSON that is safe inside HTML: without `<`, `>` and `&`, NaN as null."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): clean(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [clean(item) for item in value]
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, float):
            return float(f"{value:.6g}") if math.isfinite(value) else None
        return value

    text = json.dumps(clean(content), separators=(",", ":"), allow_nan=False)
    return text.translate({ord(character): f"\\u{ord(character):04x}" for character in "<>&"})


def _flatten(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return nested settings as a list of (`outer.inner`, value)."""
    flat = []
    for key, value in settings.items():
        nested = isinstance(value, dict)
        flat += _flatten(value, f"{prefix}{key}.") if nested else [(f"{prefix}{key}", value)]
    return flat


def _plain(value: Any) -> str:
    """Return a setting as text."""
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return "–" if value is None else str(value)


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


def _slide_content(slide: ReportSlide) -> dict[str, Any]:
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
        "genewise": {"variance": variance.tolist()},
        "first_gene": int(variance.argmax()),
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
