"""The files of the viewer by path, each made on request.

    index.html, viewer.css, *.js, vendor/      the page
    run.json                                   title, slides, settings
    slides/<i>/slide.json                      genes and scores, image, scale, co-expression's genes
    slides/<i>/barcodes.json
    slides/<i>/spots.bin                       float32 x, y of each spot in image pixels
    slides/<i>/genes/<j>.bin                   one gene: measured, mean, deviation, draws; see `SlideContent.gene`
    slides/<i>/coexpression.bin                int8 matrices, measured and predicted
    slides/<i>/image.dzi, image_files/         deep-zoom tiles
    slides/<i>/labels.json, region…, compare…  regions; see `hinge.viewer.regions`

`hinge view` serves these paths, and `write_viewer` writes each to a file but the tables of regions, which depend on the
request. Files that end in .bin are little-endian and deflated (RFC 1950). No path contains a name from a file.
"""

import json
import logging
import math
import re
import struct
import threading
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray
from tqdm import tqdm

from hinge.data import get_transform, list_samples, slide_name
from hinge.data.draws import read_draws
from hinge.data.layers import draw_names
from hinge.data.regions import Region, read_regions
from hinge.evaluation import correlation_matrix, gene_pcc, matrix_scores
from hinge.evaluation.metrics.coexpression import gene_order
from hinge.run.run import Run
from hinge.utils.errors import DataError, HingeError
from hinge.utils.files import atomic_path
from hinge.utils.packages import VERSION
from hinge.viewer import regions
from hinge.viewer.tiles import OVERLAP_PX, TILE_PX, TiledImage

logger = logging.getLogger(__name__)

COEXPRESSION_GENES = 200  # maximum; of a larger panel, the genes with the largest variance
_BLOCK_GENES = 256
SLIDES_OPEN = 3  # number of slides whose draws are kept in memory

CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
    ".csv": "text/csv; charset=utf-8",
    ".svg": "image/svg+xml",
    ".dzi": "application/xml; charset=utf-8",
    ".jpeg": "image/jpeg",
    ".bin": "application/octet-stream",
}

_OF_SLIDE = re.compile(r"slides/(\d{1,6})/(.+)", re.ASCII)
_GENE = re.compile(r"genes/(\d{1,7})\.bin", re.ASCII)
_TILE = re.compile(r"image_files/(\d{1,3})/(\d{1,7})_(\d{1,7})\.jpeg", re.ASCII)


class SlideContent:
    """The files of one sampled slide.

    Parameters
    ----------
    draws
        Result of `hinge.data.draws.read_draws`.
    measured
        The slide with raw counts; None if there are none.
    saved
        Regions saved with the run.
    """

    def __init__(self, draws: AnnData, measured: AnnData | None = None, saved: Mapping[str, Region] | None = None):
        facts = draws.uns["hinge"]
        self._draws, self._measured, self._saved = draws, measured, saved or {}
        self._layers = draw_names(draws)
        self._transform = facts["transform"]
        self._counts = self._rows = self._total = None
        if measured is not None and measured.n_vars:
            self._counts = measured.X.tocsc()
            self._total = np.asarray(measured.X.sum(axis=1, dtype=np.float64), dtype=np.float32).ravel()
            self._rows = measured.obs_names.get_indexer(draws.obs_names)
            self._columns = measured.var_names.get_indexer(draws.var_names)
        library: dict[str, Any] = next(iter(draws.uns.get("spatial", {}).values()), {})
        self._scale, self.note = 1.0, None
        path = facts.get("image_path")
        if path and Path(path).exists():
            self.image = TiledImage(path)
        elif "hires" in library.get("images", {}):
            self.image = TiledImage(np.asarray(library["images"]["hires"]))
            self._scale = float(library["scalefactors"]["tissue_hires_scalef"])
            self.note = "The full-resolution image was moved or deleted; this is the overview in the file of the draws."
        else:
            raise DataError(f"the draws of {slide_name(draws)} hold no image, and there is no image at {path}")
        diameter = library.get("scalefactors", {}).get("spot_diameter_fullres")
        if diameter is None:
            diameter = facts.get("spot_diameter_um", math.nan) / facts.get("um_per_px", math.nan)
        self._diameter = float(diameter)

    def measured(self, genes: NDArray[np.intp]) -> NDArray[np.float32] | None:
        """Return measured values (n, m) of genes in units of the transform, NaN where nothing was measured."""
        if self._counts is None:
            return None
        values = np.full((self._draws.n_obs, len(genes)), np.nan, np.float32)
        known, columns = self._rows >= 0, self._columns[genes]
        counts = self._counts[:, np.maximum(columns, 0)].toarray().astype(np.float32)
        values[known] = get_transform(self._transform).forward(counts, self._total)[self._rows[known]]
        values[:, columns < 0] = np.nan
        return values

    def mean(self, genes: NDArray[np.intp]) -> NDArray[np.float32]:
        """Return predicted means (n, m) of genes: the model's expectation if it was stored, as in the scores."""
        return np.asarray(self._draws.layers.get("expected", self._draws.X)[:, genes], np.float32)

    def draws(self, genes: NDArray[np.intp]) -> NDArray[np.float32]:
        """Return the draws (K, n, m) of genes."""
        return np.stack([np.asarray(self._draws.layers[name][:, genes], np.float32) for name in self._layers])

    @cached_property
    def _genewise(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Correlation over spots of measured and predicted mean (G,), and the variance that ranks the genes (G,)."""
        correlations, variances = (np.full(self._draws.n_vars, np.nan) for _ in range(2))
        for start in range(0, self._draws.n_vars, _BLOCK_GENES):
            genes = np.arange(start, min(start + _BLOCK_GENES, self._draws.n_vars))
            mean, measured = self.mean(genes), self.measured(genes)
            if measured is None:
                variances[genes] = mean.var(axis=0)
                continue
            known = self._rows >= 0
            if known.sum() > 1:
                variances[genes] = measured[known].var(axis=0)
                correlations[genes] = gene_pcc(measured[known], mean[known])
        return correlations, np.nan_to_num(variances)

    @cached_property
    def _coexpression(self) -> dict[str, Any]:
        """Correlations (m, m) of the genes with the largest variance: measured, and mean over the draws."""
        genes = np.sort(np.argsort(-self._genewise[1], kind="stable")[:COEXPRESSION_GENES])
        measured = self.measured(genes)
        if measured is not None:
            measured = measured[self._rows >= 0]
        each = self.draws(genes)
        each = np.stack([correlation_matrix(draw) for draw in each])
        known = np.isfinite(each).sum(axis=0)
        matrices = {"predicted": np.where(known, np.nansum(each, axis=0) / np.maximum(known, 1), np.nan)}
        scores = {}
        if measured is not None and len(measured) > 1:
            matrices = {"measured": correlation_matrix(measured), **matrices}
            every = [matrix_scores(matrices["measured"], matrix) for matrix in each]
            scores = {key: float(np.mean([score[key] for score in every])) for key in ("r", "rmse")}
        order = gene_order(next(iter(matrices.values()))) if len(genes) > 1 else np.arange(len(genes))
        ordered = [127 * matrix[np.ix_(order, order)] for matrix in matrices.values()]
        steps = np.nan_to_num(np.rint(np.stack(ordered)), nan=-128).astype("i1")
        return {"genes": genes[order].tolist(), "matrices": list(matrices), "scores": scores, "steps": steps}

    def index(self) -> dict[str, Any]:
        """Return the content of `slide.json`."""
        facts, (correlations, variances) = self._draws.uns["hinge"], self._genewise
        ranked = np.argsort(-np.nan_to_num(correlations), kind="stable")
        um_per_px = float(facts.get("um_per_px", math.nan)) / self._scale
        diameter = self._diameter * self._scale
        width, height = self.image.dimensions
        return {
            "name": slide_name(self._draws),
            "note": self.note,
            "transform": self._transform,
            "genes": self._draws.var_names.tolist(),
            "pcc": None
            if self._counts is None
            else [round(pcc, 4) if math.isfinite(pcc) else None for pcc in correlations],
            "first_gene": int(ranked[len(ranked) // 4] if self._counts is not None else variances.argmax()),
            "spots": self._draws.n_obs,
            "draws": len(self._layers),
            "measured": self._counts is not None,
            "scale": self._scale,
            "um_per_px": um_per_px if math.isfinite(um_per_px) else None,
            "spot_diameter_px": diameter if math.isfinite(diameter) and diameter > 0 else None,
            "image": {"width": width, "height": height, "tile": TILE_PX, "overlap": OVERLAP_PX},
            "coexpression": {key: self._coexpression[key] for key in ("genes", "matrices", "scores")},
        }

    def gene(self, gene: int) -> bytes:
        """Return one gene as the page reads it.

        Two float32 (lowest and highest draw), float16 (n,) measured if there are measured values, float16 (n,) mean,
        float16 (n,) standard deviation of the draws, uint8 (K, n) draws as 255 steps from lowest to highest.
        """
        genes = np.array([gene])
        draws, measured = self.draws(genes)[..., 0], self.measured(genes)
        low, high = float(draws.min()), float(draws.max())
        steps = np.rint((draws - low) * (255 / (high - low) if high > low else 0.0)).astype(np.uint8)
        arrays = [] if measured is None else [measured]
        arrays += [self.mean(genes), draws.std(axis=0, dtype=np.float64)]
        parts = [struct.pack("<2f", low, high), *(array.astype("<f2").tobytes() for array in arrays), steps.tobytes()]
        return zlib.compress(b"".join(parts))

    def read(self, path: str, query: Mapping[str, str] | None = None) -> bytes | None:
        """Return the file at a path below `slides/<i>/`, None if there is none."""
        if path in regions.TABLES:
            counts = self._measured if self._counts is not None else None
            found = regions.table(path, query or {}, self._draws, counts)
            return found.encode() if isinstance(found, str) else _json(found)
        if path == "labels.json":
            return _json(regions.labels(self._measured, self._draws, self._saved, self._scale))
        if path == "slide.json":
            return _json(self.index())
        if path == "barcodes.json":
            return _json(self._draws.obs_names.tolist())
        if path == "spots.bin":
            return zlib.compress((np.asarray(self._draws.obsm["spatial"]) * self._scale).astype("<f4").tobytes())
        if path == "coexpression.bin":
            return zlib.compress(self._coexpression["steps"].tobytes())
        if path == "image.dzi":
            return self.image.descriptor()
        if match := _GENE.fullmatch(path):
            return self.gene(int(match[1])) if int(match[1]) < self._draws.n_vars else None
        if match := _TILE.fullmatch(path):
            return self.image.tile(*map(int, match.groups()))
        return None

    def paths(self) -> list[str]:
        """Return all paths that `read` serves."""
        paths = ["slide.json", "barcodes.json", "spots.bin", "coexpression.bin", "labels.json", "image.dzi"]
        paths += [f"genes/{gene}.bin" for gene in range(self._draws.n_vars)]
        for level, (columns, rows) in enumerate(self.image.level_tiles):
            paths += [f"image_files/{level}/{x}_{y}.jpeg" for x in range(columns) for y in range(rows)]
        return paths


class Viewer:
    """All files of the viewer of a run, by path. Safe to use from several threads at once.

    Parameters
    ----------
    run
        A run with draws.
    slides
        Names of the slides to show; None for all that were sampled, the test slides first.

    Raises
    ------
    DataError
        There are no draws of one of the slides, or none at all.
    """

    def __init__(self, run: Run, slides: list[str] | None = None):
        self.run = run
        sampled = sorted(path.stem for path in (run.folder / "samples").glob("*.h5ad"))
        test = [name for name in run.config.data.test if name in sampled]
        self.slides = slides or [*test, *(name for name in sampled if name not in test)]
        for name in self.slides:
            if name not in sampled:
                raise DataError(f"there are no draws of {name} in {run.folder / 'samples'}; run hinge sample first")
        if not self.slides:
            raise DataError(f"there are no draws in {run.folder / 'samples'}; run hinge sample first")
        self._open: OrderedDict[int, SlideContent] = OrderedDict()
        self._lock = threading.Lock()
        self._page = {name: content for name, content in _files(resources.files("hinge.viewer") / "static")}

    def slide(self, number: int) -> SlideContent:
        """Return the content of a slide; the last `SLIDES_OPEN` are kept."""
        with self._lock:
            if number not in self._open:
                name = self.slides[number]
                logger.info("reading %s", self.run.paths.samples(name))
                measured, note = self._measured(name)
                draws = read_draws(self.run.paths.samples(name))
                saved, warning = self._regions(name, draws)
                content = SlideContent(draws, measured, saved)
                content.note = " ".join(filter(None, [content.note, note, warning])) or None
                self._open[number] = content
                if len(self._open) > SLIDES_OPEN:
                    # closed with its last reference: another thread may still be cutting a tile
                    self._open.popitem(last=False)
            self._open.move_to_end(number)
            return self._open[number]

    def read(self, path: str, query: Mapping[str, str] | None = None) -> bytes | None:
        """Return the file at a path, None if there is none; tables of regions depend on the query.

        Raises
        ------
        HingeError
            The slide's files are missing or damaged.
        """
        if path in self._page:
            return self._page[path]
        if path == "run.json":
            return _json(self.index())
        match = _OF_SLIDE.fullmatch(path)
        if match is None or int(match[1]) >= len(self.slides):
            return None
        return self.slide(int(match[1])).read(match[2], query)

    def index(self) -> dict[str, Any]:
        """Return the content of `run.json`."""
        return {
            "title": self.run.folder.name,
            "version": VERSION,
            "slides": self.slides,
        }

    def page_paths(self) -> list[str]:
        """Return the paths that do not belong to a slide."""
        return [*self._page, "run.json"]

    def _measured(self, name: str) -> tuple[AnnData | None, str | None]:
        data = self.run.config.data
        try:
            if name not in list_samples(data.path, data.format):
                return None, None
            return self.run.slide(name, require_image=False), None
        except HingeError as error:
            logger.warning("%s is shown without measured values: %s", name, error)
            return None, "The measured slide could not be read."

    def _regions(self, name: str, draws: AnnData) -> tuple[dict[str, Region], str | None]:
        path = self.run.paths.regions(name)
        if not path.exists():
            return {}, None
        try:
            return read_regions(path, draws), None
        except HingeError as error:
            logger.warning("%s is shown without its saved regions: %s", name, error)
            return {}, "The saved regions could not be read."


def write_viewer(run: Run, output: str | Path | None = None, slides: list[str] | None = None) -> Path:
    """Write the viewer as a folder that any static web server can serve.

    Parameters
    ----------
    run
        A run with draws.
    output
        The folder, by default `viewer` in the run's folder; an existing viewer is replaced.
    slides
        Names of the slides to show; None for all that were sampled.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    DataError
        There are no draws, or the folder holds something else.
    """
    viewer, output = Viewer(run, slides), Path(output or run.folder / "viewer")
    if output.exists() and not (output / "run.json").is_file() and (not output.is_dir() or any(output.iterdir())):
        raise DataError(f"{output} exists already and is not a viewer; choose another folder")
    with atomic_path(output) as temporary:
        for path in viewer.page_paths():
            _write(temporary / path, viewer.read(path))
        for number, name in enumerate(viewer.slides):
            content, folder = viewer.slide(number), temporary / "slides" / str(number)
            paths = content.paths()

            def write(path: str, content: SlideContent = content, folder: Path = folder) -> None:
                _write(folder / path, content.read(path))

            write(paths[0])  # computes the cached properties before several threads need them
            with ThreadPoolExecutor(4) as pool:
                # in batches: a map over all paths would continue after an error such as a full disk
                for start in tqdm(range(0, len(paths), 64), desc=name, unit="batch", disable=None):
                    list(pool.map(write, paths[start : start + 64]))
    return output


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _files(folder: Any, prefix: str = "") -> list[tuple[str, bytes]]:
    """Return path and content of the files below a folder of the package."""
    found = []
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            found += _files(entry, f"{prefix}{entry.name}/")
        elif Path(entry.name).suffix in CONTENT_TYPES:
            found.append((prefix + entry.name, entry.read_bytes()))
    return found


def _json(content: Any) -> bytes:
    return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()
