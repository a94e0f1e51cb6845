"""Measured counts that draws are conditioned on, for example of an imaging panel."""

import logging
from pathlib import Path

import numpy as np
from anndata import AnnData
from scipy.sparse import issparse

from hinge.data.slide import slide_name
from hinge.data.transforms import get_transform
from hinge.utils.errors import DataError
from hinge.utils.files import arrays_digest, file_digest
from hinge.utils.safe_hdf5 import read_h5ad

logger = logging.getLogger(__name__)


def read_observed(
    observed: AnnData | str | Path, slide: AnnData, genes: list[str], transform: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """Read measured counts and align them with the spots of a slide and the genes of a panel.

    Parameters
    ----------
    observed
        h5ad file, or its content, with raw counts: barcodes of the slide (all or some), genes (those outside the
        panel are left out). A NaN is a value that was not measured. `obs["total_counts"]` is each spot's count over
        all genes; without it, log1p_cp10k cannot be computed, since the sum of a panel is not the library size.
    slide
        Slide whose spots are drawn.
    genes
        The panel, G symbols.
    transform
        Name of the transform of the values.

    Returns
    -------
    tuple
        Values (n, G), NaN where nothing was measured, and library sizes (n,), NaN where unknown; None instead of
        library sizes if all are unknown.

    Raises
    ------
    DataError
        The file is unreadable, shares no spot or no gene with slide and panel, holds negative or infinite counts or
        repeated names, or lacks a library size that is needed.
    """
    path = "the observed AnnData" if isinstance(observed, AnnData) else observed
    measured = observed if isinstance(observed, AnnData) else read_h5ad(observed)
    for names, what in ((measured.obs_names, "barcode"), (measured.var_names, "gene")):
        if not names.is_unique:
            raise DataError(f"{path} holds the {what} {names[names.duplicated()][0]} more than once")
    rows, columns = slide.obs_names.get_indexer(measured.obs_names), measured.var_names.get_indexer(genes)
    name = slide_name(slide)
    if (rows < 0).all():
        raise DataError(f"{path} shares no barcode with slide {name}, whose first is {slide.obs_names[0]}")
    if (columns < 0).all():
        raise DataError(f"{path} holds no gene of the panel, which begins {', '.join(genes[:3])}")
    here, there = np.flatnonzero(rows >= 0), np.flatnonzero(columns >= 0)
    counts = measured.X[here][:, columns[there]]
    counts = np.asarray(counts.toarray() if issparse(counts) else counts, dtype=np.float64)
    if (counts < 0).any() or np.isinf(counts).any() or (np.nan_to_num(counts) % 1 != 0).any():
        raise DataError(f"{path} must hold raw counts: whole numbers from 0 on, or NaN")
    library_size = None
    if "total_counts" in measured.obs:
        try:
            given = measured.obs["total_counts"].to_numpy(dtype=np.float64)[here]
        except ValueError as error:
            raise DataError(f"obs['total_counts'] of {path} is not numeric") from error
        if not (given > 0).all():
            raise DataError(f"obs['total_counts'] of {path} must be above 0")
        library_size = np.full(slide.n_obs, np.nan)
        library_size[rows[here]] = given
    elif transform == "log1p_cp10k":
        raise DataError(f"{path} lacks obs['total_counts'], each spot's count over all genes, which log1p_cp10k needs")
    values = np.full((slide.n_obs, len(genes)), np.nan, dtype=np.float32)
    laid = np.full((len(here), len(genes)), np.nan)
    laid[:, there] = counts
    of_measured = np.ones(len(here)) if library_size is None else library_size[rows[here]]
    values[rows[here]] = get_transform(transform).forward(laid, of_measured)
    logger.info(
        "%s: %d of %d panel genes measured in %d of %d spots", path, len(there), len(genes), len(here), slide.n_obs
    )
    return values, library_size


def observed_digest(observed: AnnData | str | Path) -> str:
    """Return the SHA-256 of a file of measured genes, or of the counts and names in its content."""
    if not isinstance(observed, AnnData):
        return file_digest(observed)
    counts = observed.X.toarray() if issparse(observed.X) else observed.X
    arrays = {
        "counts": np.asarray(counts, dtype=np.float64),
        "spots": np.array(observed.obs_names, dtype=str),
        "genes": np.array(observed.var_names, dtype=str),
    }
    if "total_counts" in observed.obs:
        arrays["library_size"] = observed.obs["total_counts"].to_numpy(dtype=np.float64)
    return arrays_digest(arrays)
