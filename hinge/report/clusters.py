"""Maps of clusters over the H&E image: a PNG for each slide, and one HTML file with the scores."""

import base64
import html
import io
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from hinge.utils.files import atomic_path

PANEL_PX = 520
"""Long side of one map."""

# Okabe and Ito's colours, which most colour-blind readers tell apart, and lighter ones for more than eight
_COLOURS = [
    *((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167)),
    *((80, 80, 80), (255, 205, 120), (170, 215, 245), (120, 205, 180), (150, 170, 220), (240, 170, 130)),
]
_UNKNOWN = (225, 225, 225)
_TITLE_PX = 26


@dataclass(frozen=True)
class ClusterMap:
    """One slide's spots, coloured in several ways.

    Attributes
    ----------
    name
        Of the slide.
    image
        H&E (h, w, 3) uint8.
    coords
        (n, 2) spots in pixels of `image`.
    diameter
        Of a spot, in the same pixels.
    panels
        Title → number of each spot's colour (n,); below 0 where it has none.
    """

    name: str
    image: np.ndarray
    coords: np.ndarray
    diameter: float
    panels: dict[str, np.ndarray]


def draw_clusters(slide: ClusterMap) -> Image.Image:
    """The image and one map for each of the slide's panels, side by side."""
    margin = 2 * slide.diameter
    left, top = np.maximum(slide.coords.min(axis=0) - margin, 0).astype(int)
    right, bottom = np.ceil(slide.coords.max(axis=0) + margin).astype(int)
    tissue = Image.fromarray(slide.image[top:bottom, left:right])
    scale = PANEL_PX / max(tissue.size)
    tissue = tissue.resize([max(1, round(side * scale)) for side in tissue.size], Image.Resampling.LANCZOS)
    places = (slide.coords - [left, top]) * scale
    radius = max(1.5, slide.diameter * scale / 2)
    # colours are read against grey, whatever the stain
    ground = Image.blend(tissue.convert("L").convert("RGB"), Image.new("RGB", tissue.size, "white"), 0.5)
    width, height = tissue.size
    sheet = Image.new("RGB", ((width + 8) * (1 + len(slide.panels)), height + _TITLE_PX), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (title, colours) in enumerate([("H&E", None), *slide.panels.items()]):
        panel = tissue if colours is None else _spots(ground, places, radius, colours)
        sheet.paste(panel, (number * (width + 8), _TITLE_PX))
        pen.text((number * (width + 8) + 2, 4), f"{slide.name}: {title}", fill="black", font_size=15)
    return sheet


def _spots(ground: Image.Image, places: np.ndarray, radius: float, colours: np.ndarray) -> Image.Image:
    panel = ground.copy()
    pen = ImageDraw.Draw(panel)
    for (x, y), number in zip(places, colours, strict=True):
        colour = _COLOURS[number % len(_COLOURS)] if number >= 0 else _UNKNOWN
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    return panel


def write_cluster_report(
    folder: Path,
    slides: list[ClusterMap],
    rows: list[dict[str, Any]],
    definitions: dict[str, str],
    settings: dict[str, Any],
) -> Path:
    """Write `figures/<slide>.png` and `report.html`, which holds them and the scores and fetches nothing.

    Parameters
    ----------
    folder
        Where they go.
    slides
        To draw.
    rows
        Scores, one row an encoder and slide.
    definitions
        Of the scores.
    settings
        Shown below the heading.

    Returns
    -------
    Path
        The HTML file.
    """
    figures = []
    for slide in slides:
        memory = io.BytesIO()
        draw_clusters(slide).save(memory, "PNG", optimize=True)
        with atomic_path(folder / "figures" / f"{slide.name}.png") as temporary:
            temporary.write_bytes(memory.getvalue())
        data = base64.b64encode(memory.getvalue()).decode()
        figures.append(f'<figure><img alt="{html.escape(slide.name)}" src="data:image/png;base64,{data}"></figure>')
    keys = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f'<th title="{html.escape(definitions.get(key, ""))}">{html.escape(key)}</th>' for key in keys)
    body = "".join("<tr>" + "".join(f"<td>{_cell(row.get(key))}</td>" for key in keys) + "</tr>\n" for row in rows)
    said = ", ".join(f"{key} {value}" for key, value in settings.items() if value is not None)
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Clusters</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>body{{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:1500px;padding:0 1em;color:#222}}
table{{border-collapse:collapse;font-variant-numeric:tabular-nums}}td,th{{padding:.15em .8em;text-align:left;
border-bottom:1px solid #ddd}}img{{max-width:100%}}figure{{margin:1.5em 0}}</style></head>
<body><h1>Clusters of spots by histology</h1><p>{html.escape(said)} (hinge {html.escape(metadata.version("hinge"))})</p>
<table><thead><tr>{head}</tr></thead><tbody>
{body}</tbody></table>
<p>A cluster has the colour of the label with which it overlaps most.</p>
{"".join(figures)}</body></html>
"""
    with atomic_path(folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    return folder / "report.html"


def _cell(value: Any) -> str:
    if value is None or value != value:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else html.escape(str(value))
