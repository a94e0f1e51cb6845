"""Tables of spot positions as Space Ranger writes them, and as they come back from R, pandas and spreadsheets."""

import csv
import io
from pathlib import Path

import pandas as pd

from hinge.data.readers.tenx import open_text
from hinge.utils.errors import DataError, HingeError, one_line
from hinge.utils.packages import require
from hinge.utils.safe_hdf5 import check_size

COLUMNS = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]
_OTHER_NAMES = dict(zip(["barcodes", "tissue", "row", "col", "imagerow", "imagecol"], COLUMNS, strict=True))
_TRUTH = {"true": "1", "false": "0"}


def read_positions(file: Path) -> pd.DataFrame:
    """Return array and pixel coordinates by barcode.

    A CSV file may have a header or none, quotes, a byte order mark, commas, semicolons or tabs, a column with the
    numbers of its rows, and be compressed.

    Raises
    ------
    DataError
        It is damaged, lacks a column, has a barcode twice, or values that are not numbers.
    """
    try:
        positions = _read_parquet(file) if file.suffix == ".parquet" else _read_text(file)
    except HingeError:
        raise
    except Exception as error:  # pandas and pyarrow raise a dozen kinds
        raise DataError(f"{file} is not a readable table of spot positions: {one_line(error)}") from error
    for column in COLUMNS:
        if column not in positions:
            raise DataError(f"{file} has no column {column}; it needs {', '.join(COLUMNS)}")
        if column != "barcode" and positions[column].dtype.kind not in "iuf":
            raise DataError(f"{file} has values in column {column} that are not numbers")
    positions.index = pd.Index(positions["barcode"].astype(str), name=None)
    if positions.index.has_duplicates:
        raise DataError(f"{file} has barcode {positions.index[positions.index.duplicated()][0]} more than once")
    return positions


def _read_parquet(file: Path) -> pd.DataFrame:
    facts = require("pyarrow.parquet", "visium-hd", f"reading {file}").read_metadata(file)
    check_size(file, file.stat().st_size, 8 * facts.num_rows * facts.num_columns)
    return pd.read_parquet(file)


def _read_text(file: Path) -> pd.DataFrame:
    with open_text(file) as raw:
        content = raw.read()
    text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    lines = text.splitlines()[:2]
    delimiter = max(",;\t", key=lines[0].count) if lines else ","
    first, second = ([cell.strip() for cell in row] for row in csv.reader([*lines, ""][:2], delimiter=delimiter))
    known = [_OTHER_NAMES.get(cell.lower(), cell.lower()) for cell in first]
    header = len(set(known) & set(COLUMNS)) >= 2
    names = known if header else _names_without_header(second or first)
    if header and len(second) == len(names) + 1:  # R's write.table names no column of row names
        names = ["", *names]
    table = pd.read_csv(
        io.StringIO(text),
        sep=delimiter,
        header=None,
        skiprows=1 if header else 0,
        names=range(len(names)),
        dtype=str,
        skipinitialspace=True,
    )
    if "barcode" not in names:  # R's row names
        unnamed = [number for number, name in enumerate(names) if name in ("", "unnamed: 0", "x", "rownames")]
        if unnamed and not table[unnamed[0]].str.fullmatch(r"\d+").all():
            names[unnamed[0]] = "barcode"
    table = table[[number for number, name in enumerate(names) if name in COLUMNS]]
    table.columns = pd.Index([name for name in names if name in COLUMNS])
    for column in table.columns:
        if column != "barcode":
            table[column] = _numbers(table[column])
        else:
            table[column] = table[column].str.strip()
    return table


def _names_without_header(row: list[str]) -> list[str]:
    """Return the columns of a table without a header; a first column of row numbers is left unnamed."""
    if len(row) == len(COLUMNS) + 1 and row[0].isdigit():
        return ["", *COLUMNS]
    if len(row) != len(COLUMNS):
        raise ValueError(f"{len(row)} columns, and {len(COLUMNS)} are needed: {', '.join(COLUMNS)}")
    return list(COLUMNS)


def _numbers(column: pd.Series) -> pd.Series:
    """Return a column as numbers, as it is where some are none."""
    text = column.str.strip().str.lower()
    try:
        return pd.to_numeric(text.replace(_TRUTH))
    except (ValueError, TypeError):
        return column
