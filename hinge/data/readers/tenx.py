"""Counts as 10x Genomics' programs write them: HDF5 files and folders of matrix.mtx."""

import gzip
import warnings
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse
from anndata import AnnData

from hinge.utils.errors import DataError, one_line
from hinge.utils.safe_hdf5 import check_gzip, check_hdf5

_MOST_ENTRIES = 2_000_000_000


def read_10x(matrix: Path, prefix: str = "") -> AnnData:
    """Return the counts of all features, CSR float32 (n, G).

    Parameters
    ----------
    matrix
        An HDF5 file of version 2 or 3 of the format, or a folder with matrix.mtx, barcodes.tsv and features.tsv or
        genes.tsv, each of them compressed or not.
    prefix
        What the names of the files in the folder start with.

    Returns
    -------
    AnnData
        `var` has the columns gene_ids, feature_types, genome and symbol; symbols may be repeated.

    Raises
    ------
    DataError
        It is damaged, or has a barcode more than once.
    """
    if matrix.is_file():
        check_hdf5(matrix, "readable as Space Ranger's counts")
    try:
        with warnings.catch_warnings():  # on repeated symbols
            warnings.filterwarnings("ignore", "Variable names are not unique")
            slide = _read_hdf5(matrix) if matrix.is_file() else _read_folder(matrix, prefix)
    except DataError:
        raise
    except Exception as error:  # a damaged file ends in almost any exception
        raise DataError(f"{matrix} is not readable as Space Ranger's counts: {one_line(error)}") from error
    if not slide.obs_names.is_unique:
        twice = slide.obs_names[slide.obs_names.duplicated()][0]
        raise DataError(f"{matrix} has the barcode {twice!r} more than once")
    return slide


def _read_hdf5(file: Path) -> AnnData:
    with h5py.File(file, "r") as content:
        groups = [content["matrix"]] if "matrix" in content else [content[name] for name in content]
        parts = []
        for group in groups:
            # converted while read: a second copy of the counts would double the memory
            kinds = {"data": np.float32, "indices": np.int32, "indptr": np.int64}
            arrays = tuple(group[name].astype(kind)[:] for name, kind in kinds.items())
            # the file holds genes x barcodes by column, which is spots x genes by row
            counts = scipy.sparse.csr_matrix(arrays, shape=tuple(group["shape"][:])[::-1])
            counts.check_format(full_check=True)
            barcodes = group["barcodes"].asstr()[:]
            if "features" in group:
                features = group["features"]
                columns = {"symbol": "name", "gene_ids": "id", "feature_types": "feature_type", "genome": "genome"}
                var = {name: features[key].asstr()[:] for name, key in columns.items() if key in features}
            else:  # one group a genome, version 2
                var = {"symbol": group["gene_names"].asstr()[:], "gene_ids": group["genes"].asstr()[:]}
                var["genome"] = np.full(len(var["symbol"]), group.name.strip("/"))
            parts.append((counts, barcodes, pd.DataFrame(var)))
    counts = scipy.sparse.hstack([part[0] for part in parts], format="csr") if len(parts) > 1 else parts[0][0]
    return _as_slide(file, counts, parts[0][1], pd.concat([part[2] for part in parts], ignore_index=True))


def _read_folder(folder: Path, prefix: str) -> AnnData:
    file = find_file(folder, prefix, "matrix.mtx")
    barcodes, features = (
        find_file(folder, prefix, "barcodes.tsv"),
        find_file(folder, prefix, "features.tsv", "genes.tsv"),
    )
    for name, found in (("matrix.mtx", file), ("barcodes.tsv", barcodes), ("features.tsv", features)):
        if found is None:
            raise DataError(f"{folder} has no {prefix}{name}, compressed or not, which is needed beside the counts")
    assert file and barcodes and features
    with open_text(file) as lines:
        _check_header(lines, file)
    with open_text(file) as lines:
        counts = scipy.io.mmread(lines)
    table = _read_lines(features)
    var = pd.DataFrame({"symbol": table[1] if 1 in table else table[0], "gene_ids": table[0]})
    if 2 in table:
        var["feature_types"] = table[2]
    return _as_slide(file, scipy.sparse.csr_matrix(counts.T), _read_lines(barcodes)[0].to_numpy(), var)


def find_file(folder: Path, prefix: str, *names: str) -> Path | None:
    """Return the first file `<prefix><name>` or `<prefix><name>.gz` that exists in a folder."""
    paths = (folder / f"{prefix}{name}{ending}" for name in names for ending in ("", ".gz"))
    return next((path for path in paths if path.is_file()), None)


def open_text(file: Path) -> IO[Any] | gzip.GzipFile:
    """Open a text file, compressed by gzip or not."""
    if file.suffix != ".gz":
        return open(file, "rb")
    check_gzip(file)
    return gzip.open(file, "rb")


def _read_lines(file: Path) -> pd.DataFrame:
    with open_text(file) as lines:
        return pd.read_csv(lines, sep="\t", header=None, dtype=str, keep_default_na=False)


def _check_header(lines: IO[Any] | gzip.GzipFile, file: Path) -> None:
    for line in lines:
        if not line.startswith(b"%"):
            entries = int(line.split()[-1])
            if entries > _MOST_ENTRIES or entries > 100 * file.stat().st_size:
                raise DataError(
                    f"{file} declares {entries:,} counts, more than it can hold: it is damaged or malicious"
                )
            return


def _as_slide(file: Path, counts: scipy.sparse.csr_matrix, barcodes: np.ndarray, var: pd.DataFrame) -> AnnData:
    if counts.shape != (len(barcodes), len(var)):
        turned = counts.shape == (len(var), len(barcodes))
        why = "it is transposed: write features as rows and barcodes as columns" if turned else "files of two samples?"
        raise DataError(
            f"{file} has counts of {counts.shape[1]} features and {counts.shape[0]} barcodes, and there are names of "
            f"{len(var)} features and {len(barcodes)} barcodes ({why})"
        )
    var.index = pd.Index(var["symbol"].astype(str), name=None)
    obs = pd.DataFrame(index=pd.Index(np.asarray(barcodes, dtype=str)))
    return AnnData(X=counts.astype(np.float32, copy=False), obs=obs, var=var)
