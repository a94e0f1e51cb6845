"""Predictions of one slide: the draws of a model, and files of other programs."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hinge.utils.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

    from hinge.data.spots import SpotTable

UNITS = ("counts", "log2p1", "log1p_cp10k")

_SEPARATORS = {".csv": ",", ".tsv": "\t", ".txt": "\t"}
# predictions may exceed the largest measured value, but not several times in the right units
_FAR = 3.0


@dataclass(frozen=True)
class Prediction:
    """Prediction of one slide by one method; what the method does not predict is None.

    Attributes
    ----------
    method
        Name in the rows of scores.
    mean
        Predicted mean (n, G), in transform units.
    draws
        Draws (K, n, G), in transform units.
    correlation
        Gene-gene correlation matrix (G, G) of a method that predicts no values.
    known
        What the draws were given of the slide as a whole: `patient`, `library_size`, `bulk`.
    """

    method: str
    mean: NDArray | None = None
    draws: NDArray | None = None
    correlation: NDArray | None = None
    known: dict[str, Any] = field(default_factory=dict)


def prediction_from_draws(draws: "AnnData", spots: "SpotTable", method: str = "hinge") -> Prediction:
    """Return draws that sampling wrote as a prediction of the spots and genes of a table, in the table's order.

    The mean is `layers["expected"]` if the file has it: the mean of the model's distributions, averaged over draws. It
    estimates the same quantity as `X`, the mean of the draws, with less noise.

    Parameters
    ----------
    draws
        Draws of one slide: `layers["draw_000"]`, `layers["draw_001"]` ... in the transform
        `uns["hinge"]["transform"]`. Spots and genes outside the table are ignored.
    spots
        Spots of that slide.
    method
        Name for the rows of scores.

    Raises
    ------
    DataError
        If a spot or gene of the table is missing, or the draws are of another slide or transform.
    """
    from hinge.data.layers import draw_names

    about = draws.uns.get("hinge", {})
    if about.get("transform") != spots.transform:
        raise DataError(f"the draws are in units of {about.get('transform')}, the measured values of {spots.transform}")
    slides = np.unique(spots.slide)
    if len(slides) != 1 or about.get("name") != slides[0]:
        raise DataError(
            f"the draws are of slide {about.get('name')}, the measured spots of {', '.join(slides) or 'no slide'}"
        )
    rows, columns = draws.obs_names.get_indexer(spots.barcodes), draws.var_names.get_indexer(spots.genes)
    for what, index, names in (("spots", rows, spots.barcodes), ("genes", columns, spots.genes)):
        missing = [str(name) for name, position in zip(names, index, strict=True) if position < 0]
        if missing:
            raise DataError(
                f"the draws lack {len(missing)} of the {len(names)} measured {what}: {', '.join(missing[:5])}"
                f"{', ...' if len(missing) > 5 else ''}"
            )
    chosen = np.ix_(rows, columns)
    names = draw_names(draws)
    mean = draws.layers.get("expected", draws.X)
    return Prediction(
        method,
        mean=np.asarray(mean)[chosen],
        draws=np.stack([np.asarray(draws.layers[name])[chosen] for name in names]) if names else None,
        known=_known(about),
    )


def _known(about: dict[str, Any]) -> dict[str, Any]:
    """Return what draws were given of their slide as a whole; {} for draws of a model without slide levels."""
    if "library_size" not in about:
        return {}
    size = about["library_size"]
    return {
        "patient": str(about["patient"]),
        "library_size": size if isinstance(size, str) else float(size),
        "bulk": bool(about.get("bulk")),
        "observed": bool(about.get("observed")),
    }


@dataclass(frozen=True)
class PredictionFiles:
    """Prediction files of one program: `NAME[:UNITS]=FILE[,FILE...]`.

    Attributes
    ----------
    method
        Name for the rows of scores.
    paths
        One file holds the predicted mean, or, as an h5ad, draws in its layers `draw_000`, ...; each of several files is
        one draw. `{slide}` in a path is replaced by the name of the slide.
    units
        One of `UNITS`; None for the units of the scores.
    """

    method: str
    paths: tuple[str, ...]
    units: str | None = None

    @classmethod
    def parse(cls, text: str) -> "PredictionFiles":
        """Parse `NAME[:UNITS]=FILE[,FILE...]`.

        Raises
        ------
        ConfigError
            If it is not of that form, or the units are none of `UNITS`.
        """
        match = re.fullmatch(r"([^=:,]+)(?::([^=:,]*))?=(.+)", text)
        paths = tuple(part for part in match[3].split(",") if part) if match else ()
        if not paths:
            raise ConfigError(f"{text!r} does not name predictions; write NAME=FILE, or NAME=FILE,FILE for draws")
        if match[2] is not None and match[2] not in UNITS:
            raise ConfigError(f"there are no units {match[2]!r}; write {match[1]}:UNITS= with {', '.join(UNITS)}")
        return cls(match[1], paths, match[2])


def read_prediction(files: PredictionFiles, spots: "SpotTable") -> Prediction:
    """Read a prediction of the spots and genes of a table, in the table's order.

    Parameters
    ----------
    files
        h5ad (spots in `obs`, genes in `var`), or CSV and TSV, also gzipped, with a header of gene symbols and the
        spots' barcodes in the first column. Spots and genes outside the table are ignored.
    spots
        Spots of the slide.

    Returns
    -------
    Prediction
        In the units of `spots`; the mean is that of the file, or the mean of the draws.

    Raises
    ------
    DataError
        A file is missing, damaged or transposed, lacks a spot or gene, holds values that are not finite, or seems to be
        in other units.
    """
    slides = np.unique(spots.slide)
    name = str(slides[0]) if len(slides) == 1 else ""
    means, draws = [], []
    for path in (Path(path.replace("{slide}", name)) for path in files.paths):
        mean, drawn, units = _read(path)
        if None not in (units, files.units) and units != files.units:
            raise DataError(f"{path} holds {units} by its uns['hinge'], not {files.units}")
        units = files.units or units or spots.transform
        means.append(_in_order(mean, spots, path, units))
        draws += [_in_order(table, spots, path, units) for table in drawn]
    if len(means) == 1:
        return Prediction(files.method, mean=means[0], draws=np.stack(draws) if draws else None)
    if draws:
        raise DataError(
            f"{files.method} has several files, each of which must be one draw, but some files hold several draws"
        )
    stacked = np.stack(means)
    return Prediction(files.method, mean=stacked.mean(axis=0, dtype=np.float64), draws=stacked)


def _read(path: Path) -> "tuple[pd.DataFrame, list[pd.DataFrame], str | None]":
    """Return the mean and the draws in a file, and the units that it names."""
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    if path.suffix == ".h5ad":
        return _read_h5ad(path)
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix not in _SEPARATORS:
        raise DataError(f"{path} is not a table of predictions; give .h5ad, .csv or .tsv, or a gzipped .csv or .tsv")
    import pandas as pd

    from hinge.utils.safe_hdf5 import check_gzip

    if path.suffix == ".gz":
        check_gzip(path)
    try:
        table = pd.read_csv(path, sep=_SEPARATORS[suffix], index_col=0)
        # barcodes such as 10 are names, not numbers
        table.index, table.columns = table.index.astype(str), table.columns.astype(str)
        return table.astype(np.float32), [], None
    except Exception as error:  # a damaged file can raise almost any exception
        raise DataError(f"{path} is not a table of numbers with a header: {error}") from error


def _read_h5ad(path: Path) -> "tuple[pd.DataFrame, list[pd.DataFrame], str | None]":
    from hinge.data.layers import draw_names
    from hinge.utils.safe_hdf5 import inside, read_h5ad

    content = read_h5ad(path)
    about = content.uns.get("hinge", {})
    units = about.get("transform") if isinstance(about, dict) else None
    if isinstance(about, dict) and "draws_store" in about:
        from hinge.data.writers import attach_draws

        attach_draws(content, inside(path.parent, str(about["draws_store"]), path))
    names = draw_names(content)
    drawn = [_frame(content, content.layers[name]) for name in names]
    if "expected" in content.layers:
        return _frame(content, content.layers["expected"]), drawn, units
    if content.X is not None:
        return _frame(content, content.X), drawn, units
    if not drawn:
        raise DataError(f"{path} holds no prediction: it has neither X nor layers draw_000, draw_001 ...")
    return sum(drawn) / len(drawn), drawn, units


def _frame(content: "AnnData", values) -> "pd.DataFrame":
    import pandas as pd

    dense = values.toarray() if hasattr(values, "toarray") else np.asarray(values)
    return pd.DataFrame(dense, index=content.obs_names.astype(str), columns=content.var_names.astype(str))


def _in_order(table: "pd.DataFrame", spots: "SpotTable", path: Path, units: str) -> NDArray[np.float32]:
    """Return values (n, G) in the order and units of `spots`."""
    barcodes, genes = [str(barcode) for barcode in spots.barcodes], list(spots.genes)
    if not table.index.isin(barcodes).any() and table.columns.isin(barcodes).any():
        raise DataError(f"{path} has spots as columns; it must have one row a spot and one column a gene")
    for what, axis, names in (("spots", table.index, barcodes), ("genes", table.columns, genes)):
        repeated = axis[axis.duplicated()]
        if len(repeated):
            raise DataError(f"{path} has {what[:-1]} {repeated[0]} more than once")
        missing = [name for name in names if name not in axis]
        if missing:
            shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise DataError(f"{path} lacks {len(missing)} of the {len(names)} measured {what}: {shown}")
    values = table.loc[barcodes, genes].to_numpy(dtype=np.float32)
    if not np.isfinite(values).all():
        spot, gene = np.argwhere(~np.isfinite(values))[0]
        raise DataError(f"{path} has no finite number for spot {barcodes[spot]}, gene {genes[gene]}")
    if units != spots.transform:
        from hinge.data.transforms import get_transform

        if units == "counts" and (values < 0).any():
            raise DataError(f"{path} does not hold counts, because some of its values are below 0")
        counts = values if units == "counts" else get_transform(units).inverse(values, spots.library_size)
        values = get_transform(spots.transform).forward(np.maximum(counts, 0.0), spots.library_size)
    largest, measured = float(np.abs(values).max()), float(np.abs(spots.values).max())
    if largest > _FAR * measured + 1:
        raise DataError(
            f"the values in {path} reach {largest:.4g}, the measured values {measured:.4g} ({spots.transform}); if the "
            f"file has other units, name them as in NAME:counts=FILE ({', '.join(UNITS)})"
        )
    return np.asarray(values, dtype=np.float32)
