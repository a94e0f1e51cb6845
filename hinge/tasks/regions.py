"""Expression in regions of a slide: a region's table, and the comparison of two regions by the draws."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import ArrayLike, NDArray

from hinge.data import get_transform, slide_name
from hinge.data.layers import draw_names
from hinge.utils.errors import ConfigError, DataError


def region_table(
    draws: AnnData,
    spots: ArrayLike,
    measured: AnnData | None = None,
    threshold: float | None = None,
    level: float = 0.9,
) -> pd.DataFrame:
    """Return the expression of each gene in a region: mean with posterior interval, measured mean, share above.

    Every draw gives one mean over the spots of the region; the interval is that of these means. It holds what the
    draws hold: without spatially correlated draws (`sampling.spatially_correlated`) the errors of neighbouring spots
    are independent, and the interval of a large region is too narrow.

    Parameters
    ----------
    draws
        Result of sampling, with K draws.
    spots
        The region: bool (n,), indices, or barcodes.
    measured
        The measured slide with raw counts; None for no measured means.
    threshold
        Value in units of the transform; None for no shares.
    level
        Nominal level of the interval.

    Returns
    -------
    DataFrame
        Indexed by gene: `mean` (of the draws), `sd`, `low`, `high` (of the draws' means over the region; NaN for one
        draw), with `measured` the `measured` mean, and with `threshold` `share_above` (of draws and spots).

    Raises
    ------
    DataError
        There are no draws, or the region holds no spot.
    """
    rows = _rows(draws, spots)
    means, above = _of_draws(draws, rows, threshold)
    table = _summary(means, level, draws.var_names)
    if measured is not None:
        table["measured"] = measured_mean(draws, measured, rows)
    if threshold is not None:
        table["share_above"] = above
    return table


def compare_regions(
    draws: AnnData,
    first: ArrayLike,
    second: ArrayLike,
    measured: AnnData | None = None,
    threshold: float | None = None,
    level: float = 0.9,
) -> pd.DataFrame:
    """Return the difference of each gene between two regions, with its posterior interval and probability.

    Every draw gives one difference of the means over both regions, so that errors which the regions share, such as
    the slide effect, cancel. `region_table` says what the interval leaves out.

    Parameters
    ----------
    draws
        Result of sampling, with K draws.
    first, second
        The regions: bool (n,), indices, or barcodes; they may overlap.
    measured, threshold, level
        As of `region_table`.

    Returns
    -------
    DataFrame
        Indexed by gene: `first` and `second` (means), `difference` (first - second), its `sd`, `low` and `high`,
        `probability` (share of draws in which the first region is higher, ties counted half), with `measured` the
        `measured_difference`, and with `threshold` `share_above_first` and `share_above_second`.

    Raises
    ------
    DataError
        There are no draws, or a region holds no spot.
    """
    rows = [_rows(draws, spots) for spots in (first, second)]
    (ours, above_first), (theirs, above_second) = (_of_draws(draws, each, threshold) for each in rows)
    differences = ours - theirs
    table = pd.DataFrame({"first": ours.mean(axis=0), "second": theirs.mean(axis=0)}, index=draws.var_names)
    table = table.join(_summary(differences, level, draws.var_names).rename(columns={"mean": "difference"}))
    table["probability"] = ((differences > 0) + 0.5 * (differences == 0)).mean(axis=0)
    if measured is not None:
        one, other = (measured_mean(draws, measured, each) for each in rows)
        table["measured_difference"] = one - other
    if threshold is not None:
        table["share_above_first"], table["share_above_second"] = above_first, above_second
    return table


def region_area(draws: AnnData, spots: ArrayLike) -> float:
    """Return the area of a region in mm²: its spots times the area of tissue for each, NaN without a resolution.

    The area for each spot is twice the median area of the triangles between neighbouring spots, which holds for
    square and hexagonal lattices.
    """
    from scipy.spatial import Delaunay, QhullError

    places = np.asarray(draws.obsm["spatial"], dtype=np.float64)
    um_per_px = float(draws.uns["hinge"].get("um_per_px", np.nan))
    try:
        corners = places[Delaunay(places).simplices] if len(places) > 3 else None
    except QhullError:  # all spots on a line
        corners = None
    if corners is None:
        return float("nan")
    a, b = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    triangle = float(np.median(np.abs(a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]) / 2))
    return len(_rows(draws, spots)) * 2 * triangle * (um_per_px / 1000) ** 2


def _rows(draws: AnnData, spots: ArrayLike) -> NDArray[np.intp]:
    """Return the indices of the spots of a region."""
    given = np.asarray(spots)
    if given.dtype == bool:
        if given.shape != (draws.n_obs,):
            raise ConfigError(f"a region given as bool needs shape ({draws.n_obs},), not {given.shape}")
        rows = np.flatnonzero(given)
    elif given.size and not np.issubdtype(given.dtype, np.number):
        rows = draws.obs_names.get_indexer(given.astype(str))
        if (rows < 0).any():
            raise DataError(f"the draws of {slide_name(draws)} lack the spot {given[rows < 0][0]}")
    else:
        rows = np.unique(given.astype(np.intp))
        if rows.size and (rows[0] < 0 or rows[-1] >= draws.n_obs):
            raise ConfigError(f"a region's indices must be from 0 to {draws.n_obs - 1}")
    if not rows.size:
        raise DataError("the region holds no spot")
    return rows


def _of_draws(draws: AnnData, rows: NDArray, threshold: float | None) -> tuple[NDArray, NDArray | None]:
    """Return the mean over the spots of each draw (K, G), and the share of draws and spots above a threshold (G,)."""
    names: Sequence[str] = draw_names(draws)
    if not names:
        raise DataError(f"the draws of {slide_name(draws)} have no layers draw_000, draw_001, …; run hinge sample")
    means, above = [], np.zeros(draws.n_vars)
    for name in names:
        values = np.asarray(draws.layers[name][rows], dtype=np.float64)
        means.append(values.mean(axis=0))
        if threshold is not None:
            above += (values > threshold).mean(axis=0)
    return np.stack(means), None if threshold is None else above / len(names)


def _summary(values: NDArray, level: float, genes: pd.Index) -> pd.DataFrame:
    """Return mean, standard deviation and interval of values (K, G) over the draws."""
    if not 0 < level < 1:
        raise ConfigError(f"the level of an interval must lie between 0 and 1, not {level}")
    spread = {"sd": np.nan, "low": np.nan, "high": np.nan}
    if len(values) > 1:
        # another draw lies between these quantiles with the probability `level`, as in the report
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0, method="weibull")
        spread = {"sd": values.std(axis=0), "low": low, "high": high}
    return pd.DataFrame({"mean": values.mean(axis=0), **spread}, index=genes)


def measured_mean(draws: AnnData, measured: AnnData, rows: NDArray) -> NDArray[np.float64]:
    """Return the mean measured value of each gene of the draws over some of their spots, NaN where not measured."""
    ours = measured.obs_names.get_indexer(draws.obs_names[rows])
    columns = measured.var_names.get_indexer(draws.var_names)
    means = np.full(draws.n_vars, np.nan)
    if not (ours >= 0).any() or not (columns >= 0).any():
        return means
    counts = measured.X[ours[ours >= 0]]
    total = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
    counts = counts[:, columns[columns >= 0]]
    counts = np.asarray(counts.toarray() if hasattr(counts, "toarray") else counts, dtype=np.float64)
    values = get_transform(draws.uns["hinge"]["transform"]).forward(counts, total)
    means[columns >= 0] = np.asarray(values, dtype=np.float64).mean(axis=0)
    return means
