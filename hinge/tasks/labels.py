"""Labels of spots: from a column of the slides, or from tables."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData

from hinge.utils.errors import ConfigError, DataError
from hinge.utils.safe_hdf5 import check_gzip


def read_labels(slides: Mapping[str, AnnData], column: str, table: str | None = None) -> dict[str, pd.Series]:
    """Return the labels of the spots of some slides, NaN for a spot without a label.

    Parameters
    ----------
    slides
        Slides by name.
    column
        Column of `obs` or of the table.
    table
        CSV or TSV file, also gzipped, with one row per spot; `{slide}` is replaced by the slide's name. The first
        column names the spots; if it names none of them, the columns `x` and `y` hold array coordinates, which are
        rounded (as in the annotations of HER2ST). None for the slides' `obs`.

    Returns
    -------
    dict
        Series in the order of each slide's spots: numbers, or strings.

    Raises
    ------
    DataError
        A file or column is missing, or a table names no spot or repeats one.
    """
    if table is not None and "{slide}" not in table and len(slides) > 1:
        raise ConfigError(
            f"--labels {table} is one table for {len(slides)} slides: write {{slide}} for the slide's name"
        )
    found = {}
    for name, slide in slides.items():
        if table is None:
            if column not in slide.obs:
                known = ", ".join(slide.obs.columns) or "no columns"
                raise DataError(f"slide {name} has no column {column!r} in obs, which has {known}; give --labels")
            labels = slide.obs[column]
        else:
            labels = _of_table(Path(table.replace("{slide}", name)), column, slide, name)
        if not pd.api.types.is_numeric_dtype(labels):
            labels = labels.astype(object).where(labels.isna(), labels.astype(str))
        found[name] = labels
    if all(labels.isna().all() for labels in found.values()):
        raise DataError(f"no spot of {', '.join(slides)} has a label in {column!r}")
    return found


def binary_labels(
    labels: Mapping[str, pd.Series], positive: Sequence[str] | None = None, above: str | None = None
) -> tuple[dict[str, np.ndarray], str]:
    """Return labels as 1 (positive), 0 (negative) and NaN (no label).

    Parameters
    ----------
    labels
        Result of `read_labels`.
    positive
        Labels that count as 1.
    above
        A number, or `median` (over the labelled spots of all slides): larger labels count as 1.

    Returns
    -------
    tuple
        Float (n,) of each slide; and a description of label 1.

    Raises
    ------
    ConfigError
        Neither or both of `positive` and `above` are given, or they do not fit the labels.
    DataError
        All labelled spots are of one kind.
    """
    if (positive is None or not len(positive)) == (above is None):
        raise ConfigError(
            "give the positive labels by one option: --positive LABEL (repeat for several), or --above NUMBER or median"
        )
    together = pd.concat(labels.values())
    if above is None:
        kinds = [_text(label) for label in together.dropna().unique()]
        unknown = [label for label in positive if label not in kinds]
        if unknown:
            raise ConfigError(f"no spot is labelled {unknown[0]!r}; the labels are {', '.join(sorted(kinds)[:20])}")
        meaning = " or ".join(positive)
        result = {
            name: np.where(series.isna(), np.nan, series.map(_text, na_action="ignore").isin(positive).astype(float))
            for name, series in labels.items()
        }
    else:
        if not pd.api.types.is_numeric_dtype(together):
            raise ConfigError("--above needs labels that are numbers; use --positive")
        try:
            threshold = float(together.median()) if above == "median" else float(above)
        except ValueError as error:
            raise ConfigError(f"--above takes a number or median, not {above!r}") from error
        meaning = f"above {threshold:.4g}"
        result = {
            name: np.where(series.isna(), np.nan, (series > threshold).astype(float)) for name, series in labels.items()
        }
    values = np.concatenate(list(result.values()))
    values = values[~np.isnan(values)]
    if len(np.unique(values)) < 2:
        raise DataError(f"all {len(values)} labelled spots are {'' if values.max(initial=0) else 'not '}{meaning}")
    return result, meaning


def _text(label: object) -> str:
    """Return a label as text: 5 for 5.0."""
    return f"{label:g}" if isinstance(label, float | np.floating) else str(label)


def _of_table(path: Path, column: str, slide: AnnData, name: str) -> pd.Series:
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    if path.suffix == ".gz":
        check_gzip(path)
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    try:
        table = pd.read_csv(path, sep="," if suffix == ".csv" else "\t", index_col=0)
    except Exception as error:  # a damaged file can raise almost any exception
        raise DataError(f"{path} is not a readable table: {error}") from error
    if column not in table:
        raise DataError(f"{path} has no column {column!r}; it has {', '.join(map(str, table.columns))}")
    table.index = table.index.astype(str)
    if not table.index.isin(slide.obs_names).any() and {"x", "y"} <= set(table.columns):
        placed = table.dropna(subset=["x", "y"])
        table = placed.set_index(pd.Index([f"{x:.0f}x{y:.0f}" for x, y in zip(placed["x"], placed["y"], strict=True)]))
    if not table.index.isin(slide.obs_names).any():
        raise DataError(f"{path} names none of the {slide.n_obs} spots of slide {name}")
    table = table[table.index.isin(slide.obs_names)]
    repeated = table.index[table.index.duplicated()]
    if len(repeated):
        raise DataError(f"{path} names spot {repeated[0]} more than once")
    return table[column].reindex(slide.obs_names)
