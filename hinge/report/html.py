"""The report as one HTML file: what was predicted, verdict, maps, calibration, co-expression, genes, scores, settings.

The page is the files of the folder `page` and the data as JSON. It opens from disk and loads nothing else; a content
security policy allows its own script only. Names from files reach the page as data and are set as text, never as
markup, and no path of the machine reaches it.
"""

import base64
import datetime
import hashlib
import html
import json
import math
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from tqdm import tqdm

from hinge.report.content import slide_content
from hinge.report.settings import flat_settings
from hinge.report.slides import ReportSlide
from hinge.report.verdict import RULE, verdict
from hinge.utils.files import atomic_path
from hinge.utils.packages import VERSION

_SCRIPTS = ("core", "scores", "genes", "maps", "coexpression", "calibration", "regions", "main")
_SLIDES_NAMED = 6  # in the first sentence

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
        Settings of the run, shown at the end; nested ones are named `outer.inner`. Of a path the last part is shown.

    Returns
    -------
    Path
        `path`.
    """
    rows = scores.get("rows", [])
    content = {
        "settings": flat_settings(settings or {}),
        "scores": {
            "definitions": scores.get("definitions", {}),
            "methods": METHODS,
            "rows": rows,
        },
        "slides": [
            {**slide_content(slide), "verdict": verdict(scores, slide.name) if rows else []}
            for slide in tqdm(slides, desc="report", unit="slide", disable=None)
        ],
    }
    page = resources.files("hinge.report") / "page"
    script = "\n".join(page.joinpath(f"{name}.js").read_text(encoding="utf-8") for name in _SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    document = Template(page.joinpath("index.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(title),
        version=html.escape(VERSION),
        date=datetime.date.today().isoformat(),
        predicted=html.escape(_predicted(slides, settings or {})),
        verdict=html.escape(" ".join(verdict(scores)) if rows else "This report was written without scores."),
        rule=html.escape(RULE),
        style=page.joinpath("page.css").read_text(encoding="utf-8"),
        script_digest=f"sha256-{digest}",
        script=script,
        data=_json_in_html(content),
    )
    with atomic_path(path) as temporary:
        temporary.write_text(document, encoding="utf-8")
    return Path(path)


def _predicted(slides: list[ReportSlide], settings: dict[str, Any]) -> str:
    """Return one sentence on what was predicted for which slides, and from which slides the model has learned."""
    if not slides:
        return "The report holds the scores of the slides below; no draws are shown."
    names = [slide.name for slide in slides[:_SLIDES_NAMED]]
    more = f" and {len(slides) - len(names)} more slides" if len(slides) > len(names) else ""
    spots, genes = sum(len(slide.coords) for slide in slides), max(len(slide.genes) for slide in slides)
    n_draws = max(len(slide.draws) for slide in slides)
    where = f"{'slide' if len(slides) == 1 else 'slides'} {', '.join(names)}{more}"
    if not n_draws:
        return f"Measured expression of {_of(genes, 'gene')} at {_of(spots, 'spot')} of {where}."
    text = (
        f"Expression of {_of(genes, 'gene')} at {_of(spots, 'spot')} of {where}, predicted from the H&E image: "
        f"{_of(n_draws, 'draw')} for each spot, in units of {slides[0].transform}."
    )
    train = settings.get("data", {}).get("train") if isinstance(settings.get("data"), dict) else None
    if train:
        shown = ", ".join(map(str, train[:_SLIDES_NAMED]))
        rest = f" and {len(train) - _SLIDES_NAMED} more" if len(train) > _SLIDES_NAMED else ""
        text += f" The model was trained on {_of(len(train), 'slide')}: {shown}{rest}."
    return text


def _of(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


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
