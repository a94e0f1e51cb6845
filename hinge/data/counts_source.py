"""The raw counts of an AnnData, wherever it keeps them."""

from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
from anndata import AnnData

from hinge.data.layers import named_layers
from hinge.utils.errors import DataError

_COUNTS_NAMES = ("counts", "raw_counts", "raw", "count", "umi", "umis", "spatial_counts")
_LEAST_SPOTS = 10  # equal sums of fewer spots may be chance
_EQUAL = 0.03  # deviation of the sums over their mean; rounding of normalised values leaves up to this


def take_counts(slide: AnnData, file: Path) -> tuple[AnnData, str]:
    """Return a slide with raw counts in X, CSR float32, and where they were.

    X is used if it holds counts and no layer is named after counts; else such a layer, else the only other layer or
    `.raw` that holds counts; X of whole numbers that are no counts (see `no_counts`) is used last.

    Raises
    ------
    DataError
        Nothing holds whole numbers, or several layers do and none is named after counts.
    """
    held: dict[str, Any] = {"X": slide.X} if slide.X is not None else {}
    held |= {f"layers['{name}']": layer for name, layer in named_layers(slide).items()}
    if slide.raw is not None and slide.raw.X is not None:
        held["raw"] = slide.raw.X
    whole = {where: values for where, values in held.items() if is_integral(values)}
    good = {where: values for where, values in whole.items() if not no_counts(values)}
    where = _choose(good or whole, file, held)
    if where == "raw":
        slide = _with_raw(slide)
    elif where != "X":
        slide.X = slide.layers.pop(where.removeprefix("layers['").removesuffix("']"))
    slide.X = scipy.sparse.csr_matrix(slide.X, dtype=np.float32)
    return slide, where


def is_integral(matrix: Any) -> bool:
    """Return whether values are numbers without fractions; NaN and infinities are left for `require_slide` to name."""
    values = np.asarray(matrix.data if scipy.sparse.issparse(matrix) else matrix)
    if values.dtype.kind not in "iubf":
        return False
    return values.dtype.kind in "iub" or bool((np.isnan(values) | (values == np.round(values))).all())


def no_counts(matrix: Any) -> str:
    """Return what shows that whole numbers are no counts of molecules, "" if nothing does."""
    sums = np.asarray(matrix.sum(axis=1), dtype=np.float64).ravel()
    values = np.asarray(matrix.data if scipy.sparse.issparse(matrix) else matrix)
    sums = sums[sums > 0]
    if len(sums) < _LEAST_SPOTS:
        return ""
    if values.size and np.nanmax(values) <= 1:
        return f"no value is above 1, in spots of {np.median(sums):.0f} in the median"
    if values.size and np.nanmin(values) < 0:
        return "values below 0"
    if sums.std() < _EQUAL * sums.mean():
        return f"all spots have nearly the same sum, {np.median(sums):.0f}"
    positive = values[values > 0]
    if positive.size and (step := float(np.gcd.reduce(positive.astype(np.int64)))) > 1:
        return f"all values are multiples of {step:.0f}"
    return ""


def _choose(found: dict[str, Any], file: Path, held: dict[str, Any]) -> str:
    named = [where for where in found if where.removeprefix("layers['").removesuffix("']").lower() in _COUNTS_NAMES]
    layers = [where for where in named if where != "raw"]
    if layers:
        return "X" if "X" in found and _same(found["X"], found[layers[0]]) else layers[0]
    if "X" in found:
        return "X"
    if len(found) == 1:
        return next(iter(found))
    if not found:
        there = ", ".join(held) or "nothing"
        raise DataError(
            f"{file} has no raw counts: it holds {there}, and none of them holds whole numbers only; raw counts are "
            "needed in X, layers['counts'] or raw"
        )
    raise DataError(
        f"{file} has whole numbers in {', '.join(found)}, and X has none: name the layer with raw counts 'counts'"
    )


def _same(one: Any, other: Any) -> bool:
    return one.shape == other.shape and not (abs(scipy.sparse.csr_matrix(one) - scipy.sparse.csr_matrix(other))).nnz


def _with_raw(slide: AnnData) -> AnnData:
    """Return a slide with the genes and counts of `.raw`."""
    raw = slide.raw.to_adata()
    return AnnData(X=raw.X, obs=slide.obs, var=raw.var, obsm=dict(slide.obsm), uns=dict(slide.uns))
