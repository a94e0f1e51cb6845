"""Bulk profiles: counts or TPM of each gene, of the tissue a slide is from."""

import csv
import logging
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from hinge.data.slide_levels import composition_of_shares
from hinge.utils.errors import DataError, one_line
from hinge.utils.files import arrays_digest, file_digest
from hinge.utils.safe_hdf5 import read_h5ad

logger = logging.getLogger(__name__)

Bulk: TypeAlias = AnnData | pd.Series | str | Path


def read_bulk(bulk: Bulk, genes: list[str]) -> NDArray[np.float64]:
    """Return the composition (G,) of a bulk profile on a panel, NaN for genes that it lacks.

    Parameters
    ----------
    bulk
        A table (CSV or TSV, with a header) with gene symbols in the first column and counts or TPM in another one: the
        first that holds numbers. Or an h5ad file, whose observations are summed. Or a Series or an AnnData. All genes
        that were measured, not the panel alone: the share of a gene is that of the sum over the file.
    genes
        G symbols.

    Returns
    -------
    ndarray
        log2(1 + 10,000 · share), see `hinge.data.slide_levels`.

    Raises
    ------
    DataError
        The file is unreadable, has no gene of the panel, a gene twice, or values that are negative or not finite.
    """
    name = "the bulk profile" if isinstance(bulk, AnnData | pd.Series) else f"the bulk profile {bulk}"
    profile = _profile(bulk, name)
    profile.index = profile.index.astype(str).str.strip()
    values = profile.to_numpy(dtype=np.float64)
    if not np.isfinite(values).all() or (values < 0).any() or not values.sum() > 0:
        raise DataError(f"{name} must hold finite counts or TPM of at least 0, and not zeros alone")
    if profile.index.has_duplicates:
        twice = profile.index[profile.index.duplicated()][0]
        raise DataError(f"{name} holds the gene {twice} more than once; sum or remove its rows")
    found = profile.index.get_indexer(genes)
    if (found < 0).all():
        raise DataError(
            f"{name} holds no gene of the panel, which begins {', '.join(genes[:3])}; its genes begin "
            f"{', '.join(profile.index[:3])}"
        )
    shares = np.where(found >= 0, values[found] / values.sum(), np.nan)
    logger.info("%s: %d of %d panel genes, of %d genes in all", name, (found >= 0).sum(), len(genes), len(values))
    return composition_of_shares(shares)


def bulk_digest(bulk: Bulk) -> str:
    """Return the SHA-256 of a file of a bulk profile, or of its content."""
    if isinstance(bulk, str | Path):
        return file_digest(Path(bulk))
    profile = _profile(bulk, "the bulk profile")
    return arrays_digest({"genes": np.array(profile.index, dtype=str), "values": profile.to_numpy(dtype=np.float64)})


def _profile(bulk: Bulk, name: str) -> pd.Series:
    if isinstance(bulk, pd.Series):
        return bulk.copy()
    if isinstance(bulk, AnnData) or Path(bulk).suffix.lower() == ".h5ad":
        content = bulk if isinstance(bulk, AnnData) else read_h5ad(bulk)
        return pd.Series(np.asarray(content.X.sum(axis=0), dtype=np.float64).ravel(), index=content.var_names)
    try:
        table = pd.read_csv(bulk, sep=None, engine="python", index_col=0, comment="#", encoding="utf-8-sig")
    except (OSError, ValueError, csv.Error, pd.errors.ParserError) as error:
        raise DataError(f"{name} cannot be read as a table of genes and values: {one_line(error)}") from error
    numeric = table.select_dtypes("number")
    if numeric.shape[1] == 0:
        raise DataError(f"{name} has no column of numbers beside its first column, the gene symbols")
    if numeric.shape[1] > 1:
        logger.warning("%s has %d columns of numbers; %s is taken", name, numeric.shape[1], numeric.columns[0])
    return numeric.iloc[:, 0]
