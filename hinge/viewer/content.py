"""The files of one slide in the viewer, each made on request; `hinge.viewer.files` lists their paths."""

import json
import math
import re
import struct
import zlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray

from hinge.data import get_transform, slide_name
from hinge.data.layers import draw_names
from hinge.data.regions import Region
from hinge.evaluation import correlation_matrix, gene_pcc, matrix_scores
from hinge.evaluation.metrics.coexpression import gene_order
from hinge.tasks.regions import region_area
from hinge.utils.errors import DataError
from hinge.viewer import regions
from hinge.viewer.maps import SlideMap
from hinge.viewer.tiles import OVERLAP_PX, TILE_PX, TiledImage

COEXPRESSION_GENES = 200  # maximum; of a larger panel, the genes with the largest variance
_BLOCK_GENES = 256

_GENE = re.compile(r"(genes|map)/(\d{1,7})\.bin", re.ASCII)
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
    smooth
        The map of `hinge map`; None if there is none.
    """

    def __init__(
        self,
        draws: AnnData,
        measured: AnnData | None = None,
        saved: Mapping[str, Region] | None = None,
        smooth: SlideMap | None = None,
    ):
        facts = draws.uns["hinge"]
        self._draws, self._measured, self._saved = draws, measured, saved or {}
        self._map = smooth
        self._layers = draw_names(draws)
        self._novelty = np.asarray(draws.obs["novelty"], "<f4") if "novelty" in draws.obs else None
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
    def _spot_mm2(self) -> float:
        return region_area(self._draws, [0])

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
            "novel": None if self._novelty is None else float((self._novelty > 1).mean()),
            "outside": np.flatnonzero(~self._draws.var["in_panel"]).tolist() if "in_panel" in self._draws.var else [],
            "map": None if self._map is None else self._map.index(self._scale),
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
            found = regions.table(path, query or {}, self._draws, counts, self._spot_mm2)
            return found.encode() if isinstance(found, str) else json_bytes(found)
        if path == "labels.json":
            return json_bytes(regions.labels(self._measured, self._draws, self._saved, self._scale))
        if path == "slide.json":
            return json_bytes(self.index())
        if path == "barcodes.json":
            return json_bytes(self._draws.obs_names.tolist())
        if path == "spots.bin":
            return zlib.compress((np.asarray(self._draws.obsm["spatial"]) * self._scale).astype("<f4").tobytes())
        if path == "coexpression.bin":
            return zlib.compress(self._coexpression["steps"].tobytes())
        if path == "image.dzi":
            return self.image.descriptor()
        if path == "novelty.bin" and self._novelty is not None:
            return zlib.compress(self._novelty.tobytes())
        if match := _GENE.fullmatch(path):
            return self._of_gene(match[1], int(match[2]))
        if match := _TILE.fullmatch(path):
            return self.image.tile(*map(int, match.groups()))
        return None

    def _of_gene(self, what: str, gene: int) -> bytes | None:
        if gene >= self._draws.n_vars:
            return None
        if what == "genes":
            return self.gene(gene)
        known = self._map is not None and self._map.genes[gene] >= 0
        return zlib.compress(self._map.gene(gene).astype("<f2").tobytes()) if known else None

    def paths(self) -> list[str]:
        """Return all paths that `read` serves."""
        paths = ["slide.json", "barcodes.json", "spots.bin", "coexpression.bin", "labels.json", "image.dzi"]
        paths += [f"genes/{gene}.bin" for gene in range(self._draws.n_vars)]
        paths += ["novelty.bin"] if self._novelty is not None else []
        paths += [f"map/{gene}.bin" for gene in np.flatnonzero(self._map.genes >= 0)] if self._map is not None else []
        for level, (columns, rows) in enumerate(self.image.level_tiles):
            paths += [f"image_files/{level}/{x}_{y}.jpeg" for x in range(columns) for y in range(rows)]
        return paths


def json_bytes(content: Any) -> bytes:
    """Return content as compact JSON; NaN is refused."""
    return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()
