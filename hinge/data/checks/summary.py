"""One slide in a line, as JSON, and as a page: what it holds and what the checks found."""

import base64
import html
import io
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from hinge.data.checks.findings import Finding
from hinge.data.checks.placement import mask_of, share_on_tissue, spots_on_thumbnail, thumbnail_of
from hinge.data.checks.species import species_of_genes, stated_species
from hinge.data.resolution import SOURCES
from hinge.data.slide import slide_name

_TECHNOLOGIES = {"visium": "Visium", "visium_hd": "Visium HD", "her2st": "Spatial Transcriptomics", "image": "image"}
_PAGE_PX = 900
_MOST_DRAWN = 20_000


def summarise(slide: AnnData, novelty: NDArray | None = None) -> dict[str, Any]:
    """Return facts of a slide: numbers of spots and genes, species, technology, lengths and quantiles of counts.

    `um_per_px_from` names the source of the resolution, `on_tissue` is the share of spots on tissue (None without an
    image), `library_size` the quartiles, `mitochondrial` the share of counts (None without such genes), `novelty` the
    median of the given novelty (n,) of the spots, and `novel` the share of spots above 1 (None without it).
    """
    facts = slide.uns["hinge"]
    source = facts.get("source", {})
    mask = mask_of(slide)
    totals = np.asarray(slide.X.sum(axis=1), dtype=np.float64).ravel() if slide.n_vars else np.array([])
    mitochondrial = slide.var_names.str.upper().str.startswith("MT-")
    share = None
    if mitochondrial.any() and totals.sum() > 0:
        share = float(slide.X[:, np.flatnonzero(mitochondrial)].sum() / totals.sum())
    return {
        "slide": slide_name(slide),
        "spots": slide.n_obs,
        "genes": slide.n_vars,
        "species": stated_species(slide) or species_of_genes(slide.var_names) or None,
        "technology": source.get("technology") or _TECHNOLOGIES.get(facts.get("source_format", "")),
        "um_per_px": _finite(facts.get("um_per_px")),
        "um_per_px_from": SOURCES.get(str(source.get("um_per_px_from", ""))),
        "spot_pitch_um": _finite(facts.get("spot_pitch_um")),
        "on_tissue": None if mask is None else share_on_tissue(slide, mask),
        "library_size": [float(value) for value in np.quantile(totals, [0.25, 0.5, 0.75])] if len(totals) else None,
        "mitochondrial": share,
        "novelty": None if novelty is None else float(np.median(novelty)),
        "novel": None if novelty is None else float((novelty > 1).mean()),
        "left_out": {key: int(value) for key, value in source.get("left_out", {}).items()},
        "image": facts.get("image_path"),
    }


def line_of(summary: dict[str, Any]) -> str:
    """Return a summary as one line of text."""
    parts = [f"{summary['spots']:,} spots", f"{summary['genes']:,} genes"]
    parts += [str(summary[key]) for key in ("species", "technology") if summary[key]]
    if summary["um_per_px"] is None:
        parts.append("µm per pixel unknown")
    else:
        origin = f" ({summary['um_per_px_from']})" if summary["um_per_px_from"] else ""
        parts.append(f"{summary['um_per_px']:.4g} µm per pixel{origin}")
    if summary["spot_pitch_um"] is not None:
        parts.append(f"pitch {summary['spot_pitch_um']:.4g} µm")
    if summary["on_tissue"] is not None:
        parts.append(f"{summary['on_tissue']:.0%} of spots on tissue")
    if summary["library_size"]:
        parts.append("library size " + " / ".join(f"{value:,.0f}" for value in summary["library_size"]))
    if summary["mitochondrial"] is not None:
        parts.append(f"{summary['mitochondrial']:.1%} mitochondrial")
    if summary["novelty"] is not None:
        parts.append(f"novelty {summary['novelty']:.2f}, above 1 at {summary['novel']:.0%} of spots")
    left_out = ", ".join(f"{number} {reason.replace('_', ' ')}" for reason, number in summary["left_out"].items())
    parts += [f"left out: {left_out}"] if left_out else []
    return f"{summary['slide']}: {', '.join(parts)}"


def page_of(slides: Sequence[tuple[dict[str, Any], Sequence[Finding], bytes | None]]) -> str:
    """Return an HTML page of slides: summary, findings, and a PNG or JPEG of the spots on the image (see `picture`)."""
    parts = []
    for summary, findings, drawn in slides:
        items = "".join(
            f"<li class={each.level}><b>{each.level}</b> <code>{each.code}</code> {html.escape(each.message)}. "
            f"<i>{html.escape(each.action[:1].upper() + each.action[1:])}{'.' if each.action else ''}</i></li>"
            for each in findings
        )
        image = ""
        if drawn is not None:
            image = f"<img alt='spots on the image' src='data:image/jpeg;base64,{base64.b64encode(drawn).decode()}'>"
        parts.append(
            f"<section><h2>{html.escape(str(summary['slide']))}</h2><p>{html.escape(line_of(summary))}</p>"
            f"<ul>{items or '<li>no findings</li>'}</ul>{image}</section>"
            if "spots" in summary
            else f"<section><h2>{html.escape(str(summary['slide']))}</h2><ul>{items}</ul></section>"
        )
    return _PAGE.replace("{{slides}}", "\n".join(parts))


def picture(slide: AnnData) -> bytes | None:
    """Return the thumbnail with the spots drawn on it as a JPEG, None for a slide without an image."""
    small = thumbnail_of(slide)
    if small is None:
        return None
    image = Image.fromarray(small)
    factor = min(1.0, _PAGE_PX / max(image.size))
    image = image.resize([max(1, round(side * factor)) for side in image.size])
    x, y = spots_on_thumbnail(slide, small.shape)
    scales = next(iter(slide.uns["spatial"].values()))["scalefactors"]
    radius = float(scales.get("spot_diameter_fullres") or 0) * float(scales["tissue_hires_scalef"]) * factor / 2
    radius = max(radius, 1.0) if math.isfinite(radius) else 2.0
    draw = ImageDraw.Draw(image)
    every = max(1, slide.n_obs // _MOST_DRAWN)
    for column, row in zip(x[::every] * factor, y[::every] * factor, strict=True):
        draw.ellipse((column - radius, row - radius, column + radius, row + radius), outline=(0, 60, 255))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=85)
    return content.getvalue()


def as_json(summary: dict[str, Any], findings: Sequence[Finding]) -> dict[str, Any]:
    """Return summary and findings of a slide, ready to be written as JSON."""
    return {**summary, "findings": [asdict(finding) for finding in findings]}


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(float(value)) else None


_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>hinge check</title><style>
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1b1b1b;background:#fff}
img{max-width:100%;border:1px solid #ccc}ul{padding-left:1.2rem}.error b{color:#b00020}.warning b{color:#8a5a00}
section{border-bottom:1px solid #ddd;padding-bottom:1.5rem}
</style><h1>Findings</h1>
{{slides}}
</html>
"""
