"""The report of `hinge cluster`: maps of clusters over the H&E image as PNG, and one HTML file with the scores."""

import base64
import html
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
from anndata import AnnData
from PIL import Image, ImageDraw
from scipy.optimize import linear_sum_assignment

from hinge.tasks.cluster import cluster_column
from hinge.utils.files import atomic_path, read_json
from hinge.utils.packages import VERSION

PANEL_PX = 520
"""Long side of one map."""

# the palette of Okabe and Ito, suitable for colour-blind readers, and lighter colours after the first eight
_COLOURS = [
    *((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167)),
    *((80, 80, 80), (255, 205, 120), (170, 215, 245), (120, 205, 180), (150, 170, 220), (240, 170, 130)),
]
_UNKNOWN = (225, 225, 225)
_TITLE_PX = 26


@dataclass(frozen=True)
class ClusterMap:
    """The spots of one slide with one or more colourings.

    Attributes
    ----------
    name
        Name of the slide.
    image
        H&E image (h, w, 3), uint8.
    coords
        Spot centres (n, 2) in pixels of `image`.
    diameter
        Diameter of a spot in pixels of `image`.
    panels
        Title → index of each spot's colour (n,); below 0 for a spot without a label.
    """

    name: str
    image: np.ndarray
    coords: np.ndarray
    diameter: float
    panels: dict[str, np.ndarray]


def draw_clusters(slide: ClusterMap) -> Image.Image:
    """Return the image and one map for each panel of a slide, side by side."""
    margin = 2 * slide.diameter
    left, top = np.maximum(slide.coords.min(axis=0) - margin, 0).astype(int)
    right, bottom = np.ceil(slide.coords.max(axis=0) + margin).astype(int)
    tissue = Image.fromarray(slide.image[top:bottom, left:right])
    scale = PANEL_PX / max(tissue.size)
    tissue = tissue.resize([max(1, round(side * scale)) for side in tissue.size], Image.Resampling.LANCZOS)
    places = (slide.coords - [left, top]) * scale
    radius = max(1.5, slide.diameter * scale / 2)
    # the stain must not compete with the colours of the clusters
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


def report_clusters(folder: Path) -> Path:
    """Write `figures/<slide>.png` and `report.html`, which holds the figures and the scores and loads nothing else.

    Parameters
    ----------
    folder
        Output of `hinge.tasks.cluster.cluster_slides`.

    Returns
    -------
    Path
        The HTML file.
    """
    scores = read_json(folder / "scores.json")
    rows, definitions = scores["rows"], scores["definitions"]
    encoders = list(dict.fromkeys(row["encoder"] for row in rows))
    figures = []
    for name in dict.fromkeys(row["slide"] for row in rows if row["slide"] != "mean"):
        figure = io.BytesIO()
        draw_clusters(_cluster_map(anndata.read_h5ad(folder / f"{name}.h5ad"), encoders)).save(
            figure, "PNG", optimize=True
        )
        with atomic_path(folder / "figures" / f"{name}.png") as temporary:
            temporary.write_bytes(figure.getvalue())
        data = base64.b64encode(figure.getvalue()).decode()
        figures.append(f'<figure><img alt="{html.escape(name)}" src="data:image/png;base64,{data}"></figure>')
    settings = ", ".join(f"{key} {value}" for key, value in scores["settings"].items() if value is not None)
    with atomic_path(folder / "report.html") as temporary:
        temporary.write_text(_page(rows, definitions, settings, figures), encoding="utf-8")
    return folder / "report.html"


def _page(rows: list[dict[str, Any]], definitions: dict[str, str], settings: str, figures: list[str]) -> str:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f'<th title="{html.escape(definitions.get(key, ""))}">{html.escape(key)}</th>' for key in keys)
    body = "".join("<tr>" + "".join(f"<td>{_cell(row.get(key))}</td>" for key in keys) + "</tr>\n" for row in rows)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Clusters</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>body{{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:1500px;padding:0 1em;color:#222}}
table{{border-collapse:collapse;font-variant-numeric:tabular-nums}}td,th{{padding:.15em .8em;text-align:left;
border-bottom:1px solid #ddd}}img{{max-width:100%}}figure{{margin:1.5em 0}}</style></head>
<body><h1>Clusters of spots by histology</h1><p>{html.escape(settings)} (hinge {html.escape(VERSION)})</p>
<table><thead><tr>{head}</tr></thead><tbody>
{body}</tbody></table>
<p>A cluster has the colour of the label that it overlaps most.</p>
{"".join(figures)}</body></html>
"""


def _cluster_map(result: AnnData, encoders: list[str]) -> ClusterMap:
    """Return the map of a slide; clusters have the colour of the label that they overlap most."""
    panels: dict[str, Any] = {}
    if "label" in result.obs:
        panels["labels"] = result.obs["label"].cat.codes.to_numpy()
    for name in encoders:
        clusters = result.obs[cluster_column(name)].astype(int).to_numpy()
        panels[name] = _match_labels(clusters, panels["labels"]) if "labels" in panels else clusters
    library = next(iter(result.uns["spatial"].values()))
    scale = library["scalefactors"]["tissue_hires_scalef"]
    return ClusterMap(
        name=result.uns["hinge"]["name"],
        image=np.asarray(library["images"]["hires"]),
        coords=np.asarray(result.obsm["spatial"]) * scale,
        diameter=library["scalefactors"]["spot_diameter_fullres"] * scale,
        panels=panels,
    )


def _match_labels(clusters: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return clusters (n,) renumbered so that as many spots as possible have the number of their label."""
    n = max(clusters.max(), labels.max()) + 1
    overlap = np.zeros((n, n))
    known = labels >= 0
    np.add.at(overlap, (clusters[known], labels[known]), 1)
    return linear_sum_assignment(-overlap)[1][clusters]


def _cell(value: Any) -> str:
    if value is None or value != value:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else html.escape(str(value))
