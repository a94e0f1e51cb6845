"""The spots of one or several slides on a panel, as arrays."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pandas as pd
from anndata import AnnData

from hinge.data.library_sizes import library_sizes
from hinge.data.panel import Panel
from hinge.data.slide import slide_name
from hinge.data.transforms import get_transform
from hinge.utils.errors import DataError

# Features and slide may round coordinates differently; spots of another section are farther away.
_SAME_PLACE_PX = 2.0

Lacking = Literal["error", "mask", "drop"]
"""What happens with genes of the panel that a slide lacks."""

NUM_BANDS = 5
"""Bands that a single slide is divided into for cross-validation."""


@dataclass(frozen=True, eq=False)
class SpotTable:
    """Spots x genes, one row per spot in all arrays.

    Attributes
    ----------
    slide
        Name of each spot's slide, str (n,).
    barcodes
        Barcode of each spot, unique within its slide, str (n,).
    coords
        Full-resolution pixel x, y, float64 (n, 2).
    features
        Histology features, view 0 the unaugmented patch, float32 (n, V, d); None where none were loaded.
    counts
        Raw counts of the panel, float32 (n, G).
    library_size
        Counts over all genes, float32 (n,), see `hinge.data.library_sizes`.
    values
        Transformed counts, float32 (n, G).
    genes
        The panel, G gene symbols.
    transform
        Name of the transform that made `values`.
    measured
        Slide → bool (G,), whether it measured each gene, of the slides that lack genes of the panel. Counts and values
        of genes that a slide lacks are 0 and mean nothing.
    token_columns
        Numbers of the columns of `features` of each condition token, see `hinge.data.condition_tokens`.
    """

    slide: np.ndarray
    barcodes: np.ndarray
    coords: np.ndarray
    features: np.ndarray | None
    counts: np.ndarray
    library_size: np.ndarray
    values: np.ndarray
    genes: list[str]
    transform: str
    measured: dict[str, np.ndarray] = field(default_factory=dict)
    token_columns: tuple[np.ndarray, ...] = ()

    def __len__(self) -> int:
        return len(self.barcodes)

    @property
    def feature_dim(self) -> int:
        """Width d of the features."""
        return 0 if self.features is None else self.features.shape[2]

    def measured_slides(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Return which genes the S slides measured, bool (S, G), and each spot's slide (n,); None where all are."""
        names, slide_of = np.unique(self.slide, return_inverse=True)
        everything = np.ones(len(self.genes), dtype=bool)
        of_slides = np.stack([self.measured.get(name, everything) for name in names]) if len(names) else everything
        return None if of_slides.all() else (of_slides, slide_of)

    def on_genes(self, genes: Sequence[str]) -> Self:
        """Return the spots on some of the genes, in the given order."""
        if list(genes) == self.genes:
            return self
        columns = pd.Index(self.genes).get_indexer(list(genes))
        measured = {name: there[columns] for name, there in self.measured.items() if not there[columns].all()}
        return replace(
            self,
            counts=self.counts[:, columns],
            values=self.values[:, columns],
            genes=list(genes),
            measured=measured,
        )

    def known_counts(self) -> np.ndarray:
        """Return the counts (n, G), NaN where a slide lacks the gene."""
        found = self.measured_slides()
        return self.counts if found is None else np.where(found[0][found[1]], self.counts, np.float32(np.nan))

    def subset(self, index: np.ndarray | Sequence[int] | slice) -> Self:
        """Return the spots of a boolean mask, indices or a slice, in that order."""
        if not isinstance(index, slice):
            index = np.asarray(index)
            index = index.astype(np.intp) if index.size == 0 else index
        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        chosen: dict[str, Any] = {name: array[index] for name, array in arrays.items() if isinstance(array, np.ndarray)}
        return replace(self, **chosen)


def load_spots(
    slide: AnnData,
    panel: Panel,
    transform_name: str,
    features_path: str | Path | None = None,
    drop_empty: bool = True,
    lacking: Lacking = "error",
) -> SpotTable:
    """Return the spots of one slide on a panel.

    Parameters
    ----------
    slide
        Result of `read_slide`.
    panel
        Genes of the columns, in their order.
    transform_name
        Name for `get_transform`.
    features_path
        Feature file of this slide; without it the table has no features. If the file has no barcodes (TRIDENT,
        CLAM), each spot gets the patch that contains it.
    drop_empty
        Leave out spots that have no count in the panel.
    lacking
        What to do with genes that the slide lacks: `"error"`; `"mask"`, keep them as not measured; `"drop"`, leave them
        out of the genes of the table.

    Raises
    ------
    DataError
        The slide lacks a gene of the panel and that is an error, or lacks all of them, no spot is left, or the features
        lack a spot or have other coordinates.
    """
    name = slide_name(slide)
    columns = slide.var_names.get_indexer(panel.genes)
    missing = [gene for gene, column in zip(panel.genes, columns, strict=True) if column < 0]
    if missing and (lacking == "error" or len(missing) == len(panel.genes)):
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise DataError(f"slide {name} lacks {len(missing)} of the panel's {len(panel.genes)} genes: {shown}")
    there = columns >= 0
    genes = list(panel.genes)
    if lacking == "drop":
        genes, columns, there = [genes[index] for index in np.flatnonzero(there)], columns[there], there[there]
    counts = slide.X[:, np.maximum(columns, 0)].toarray().astype(np.float32)
    counts[:, ~there] = 0
    rows = np.flatnonzero(counts.any(axis=1)) if drop_empty else np.arange(slide.n_obs)
    if not len(rows):
        raise DataError(f"slide {name} has no spot with a count in the panel's {len(panel.genes)} genes")
    counts = counts[rows]
    library_size = library_sizes(slide, panel.shares).astype(np.float32)[rows]
    barcodes = slide.obs_names.to_numpy(dtype=str)[rows]
    coords = np.asarray(slide.obsm["spatial"], dtype=np.float64)[rows]
    return SpotTable(
        slide=np.full(len(rows), name),
        barcodes=barcodes,
        coords=coords,
        features=None if features_path is None else _features(features_path, name, barcodes, coords),
        counts=counts,
        library_size=library_size,
        values=get_transform(transform_name).forward(counts, library_size),
        genes=genes,
        transform=transform_name,
        measured={} if there.all() else {name: there},
    )


def concatenate_spots(tables: Sequence[SpotTable]) -> SpotTable:
    """Concatenate the spots of several slides.

    Raises
    ------
    DataError
        There are no tables, two of them share a spot, or they differ in genes, transform or shape of features.
    """
    if not tables:
        raise DataError("no slides were given to concatenate")
    first = tables[0]
    for table in tables[1:]:
        names = f"spots of {_slides(first)} and {_slides(table)} cannot be concatenated:"
        if table.genes != first.genes:
            raise DataError(f"{names} they are on different panels")
        if table.transform != first.transform:
            raise DataError(f"{names} their values are {first.transform} and {table.transform}")
        if (table.features is None) != (first.features is None):
            raise DataError(f"{names} only one of them has features")
        if table.features is not None and table.features.shape[1:] != first.features.shape[1:]:
            shapes = ("{} views x {}".format(*each.features.shape[1:]) for each in (first, table))
            raise DataError(f"{names} they have features of {' and '.join(shapes)}")
    arrays: dict[str, Any] = {
        field.name: np.concatenate([getattr(table, field.name) for table in tables])
        for field in fields(SpotTable)
        if isinstance(getattr(first, field.name), np.ndarray)
    }
    spots = pd.MultiIndex.from_arrays([arrays["slide"], arrays["barcodes"]])
    if spots.has_duplicates:
        slide, barcode = spots[spots.duplicated()][0]
        raise DataError(f"spot {barcode} of slide {slide} occurs more than once")
    measured = {name: there for table in tables for name, there in table.measured.items()}
    return replace(first, **arrays, measured=measured)


def spot_groups(slides: np.ndarray, coords: np.ndarray, groups: str) -> np.ndarray:
    """Divide spots into groups that stay together where spots are held out.

    Parameters
    ----------
    slides
        Slide of each spot (n,).
    coords
        Position of each spot (n, 2), in pixels.
    groups
        `"slide"`; `"fold"`, the slides, or where there is only one five bands of as many spots each across its longer
        side, because neighbouring spots resemble each other; `"tile"`, squares of about 4 × 4 spots of one slide;
        `"spot"`, each spot alone.

    Returns
    -------
    numpy.ndarray
        (n,) names, str.
    """
    slides, coords = np.asarray(slides).astype(str), np.asarray(coords, dtype=np.float64)
    if groups == "spot":
        return np.arange(len(slides)).astype(str)
    if groups == "tile":
        names = np.empty(len(slides), dtype=object)
        for slide in np.unique(slides):
            members = np.flatnonzero(slides == slide)
            own = coords[members]
            side = 4 * np.sqrt(max(float(np.prod(np.ptp(own, axis=0))), 1.0) / len(members))
            tile = np.floor((own - own.min(axis=0)) / side).astype(int)
            names[members] = [f"{slide}/{x}/{y}" for x, y in tile]
        return names.astype(str)
    if groups == "fold" and len(np.unique(slides)) == 1:
        along = coords[:, np.argmax(np.ptp(coords, axis=0))]
        return (np.argsort(np.argsort(along, kind="stable"), kind="stable") * NUM_BANDS // len(along)).astype(str)
    return slides


def _slides(table: SpotTable) -> str:
    return ", ".join(np.unique(table.slide)) or "no slide"


def _features(path: str | Path, name: str, barcodes: np.ndarray, coords: np.ndarray) -> np.ndarray:
    from hinge.data.features import read_feature_header, read_features, read_features_at

    if read_feature_header(path).barcodes is None:
        return read_features_at(path, coords).features
    stored = read_features(path, barcodes=list(barcodes))
    # sections of one study share their barcodes: only the coordinates distinguish their files
    away = np.abs(np.asarray(stored.coords, dtype=np.float64) - coords).max(axis=1)
    if away.max() > _SAME_PLACE_PX:
        worst = int(away.argmax())
        raise DataError(
            f"features {path} belong to another slide than {name}: in them, spot {barcodes[worst]} is "
            f"{away[worst]:.0f} px from its coordinates on the slide"
        )
    return stored.features
