"""Counts of many samples on one list of genes, for models of expression alone."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from anndata import AnnData

from hinge.data.library_sizes import library_sizes
from hinge.data.slide import slide_name
from hinge.data.transforms import get_transform
from hinge.utils.errors import DataError


@dataclass(frozen=True, eq=False)
class CountTable:
    """Spots or cells of several samples.

    Attributes
    ----------
    counts
        Float32 (n, G); NaN where a sample lacks a gene.
    library_size
        Counts over all genes of the file, float32 (n,).
    sample, patient
        Names, str (n,).
    genes
        G symbols.
    """

    counts: np.ndarray
    library_size: np.ndarray
    sample: np.ndarray
    patient: np.ndarray
    genes: list[str]

    def __len__(self) -> int:
        return len(self.counts)

    def values(self, transform: str, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Return transformed counts, float32 (n, G), of some rows; NaN where a sample lacks a gene."""
        return get_transform(transform).forward(self.counts[rows], self.library_size[rows])


def read_counts(
    slides: Iterable[AnnData],
    genes: list[str],
    patient_of: Callable[[str], str] = str,
    shares: Mapping[str, float] | None = None,
    most: int | None = None,
) -> CountTable:
    """Return the counts of slides on a list of genes. Spots without a count in these genes are left out.

    Parameters
    ----------
    slides
        Slides with counts, images or not.
    genes
        G symbols.
    patient_of
        The patient of a sample's name; each sample is a patient of its own by default.
    shares
        For `hinge.data.library_sizes.library_sizes`.
    most
        Spots of a slide, at most, evenly spread over its order; None: all.

    Raises
    ------
    DataError
        No slide has one of the genes.
    """
    counts, sizes, names = [], [], []
    for slide in slides:
        found, library_size = panel_counts(slide, genes, shares)
        kept = np.flatnonzero(np.nansum(found, axis=1) > 0)
        if most is not None and len(kept) > most:
            kept = kept[np.linspace(0, len(kept) - 1, max(1, most)).astype(int)]
        counts.append(found[kept])
        sizes.append(library_size[kept])
        names.append(np.full(len(kept), slide_name(slide)))
    table = np.concatenate(counts)
    missing = [gene for gene, known in zip(genes, np.isfinite(table).any(axis=0), strict=True) if not known]
    if missing:
        raise DataError(
            f"{len(missing)} genes of the panel are in none of the files to pre-train on: {', '.join(missing[:5])}"
        )
    sample = np.concatenate(names)
    patients = {name: patient_of(name) for name in np.unique(sample).tolist()}
    patient = np.array([patients[name] for name in sample.tolist()], dtype=str)
    return CountTable(table, np.concatenate(sizes), sample, patient, list(genes))


def panel_counts(
    slide: AnnData, genes: list[str], shares: Mapping[str, float] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return counts (n, G) of a slide on a list of genes, NaN where it lacks one, and library sizes (n,)."""
    columns = slide.var_names.get_indexer(genes)
    counts = slide.X[:, np.maximum(columns, 0)].toarray().astype(np.float32)
    counts[:, columns < 0] = np.nan
    sizes = library_sizes(slide, shares) if shares else np.asarray(slide.X.sum(axis=1)).ravel()
    return counts, sizes.astype(np.float32)
