"""Approved symbols, previous symbols, aliases and Ensembl ids of human genes."""

import csv
import re
from pathlib import Path
from typing import Literal

from hinge.utils.errors import DataError

Rule = Literal["symbol", "Ensembl id", "case", "previous symbol", "alias"]
RULES: tuple[Rule, ...] = ("symbol", "Ensembl id", "case", "previous symbol", "alias")
_ENSEMBL = re.compile(r"(ENS[A-Z]*G\d{11})(\.\d+)?(_PAR_Y)?", re.IGNORECASE)
# columns of HGNC's complete set, and of its custom downloads (CellFM's `updated_hgcn.tsv` is one)
_HGNC_COLUMNS = {
    "symbol": ("symbol", "approved symbol"),
    "previous": ("prev_symbol", "previous symbols", "previous symbol"),
    "alias": ("alias_symbol", "alias symbols", "alias symbol"),
    "ensembl": ("ensembl_gene_id", "ensembl gene id", "ensembl id(supplied by ensembl)"),
    "status": ("status",),
}


class GeneNames:
    """Approved symbols of human genes, their previous symbols, aliases and Ensembl ids, as HGNC lists them.

    Parameters
    ----------
    path
        Tab-separated table: HGNC's complete set (`hgnc_complete_set.txt`; columns `symbol`, `prev_symbol`,
        `alias_symbol`, `ensembl_gene_id`, several names in one cell separated by `|`) or a custom download with
        `Approved symbol`, `Previous symbols`, `Alias symbols` (separated by commas). Only the symbol and one
        further column are needed.

    Raises
    ------
    DataError
        The file is missing, unreadable or lacks these columns.
    """

    def __init__(self, path: str | Path):
        try:
            rows = read_text_table(Path(path), "\t")
        except (OSError, ValueError, csv.Error) as error:
            raise DataError(f"cannot read the HGNC table {path}: {error_reason(error)}") from None
        header = [cell.strip().casefold() for cell in rows[0]] if rows else []
        column = {
            what: next((header.index(name) for name in names if name in header), None)
            for what, names in _HGNC_COLUMNS.items()
        }
        if column["symbol"] is None or all(column[what] is None for what in ("previous", "alias", "ensembl")):
            raise DataError(
                f"{path} is not a tab-separated HGNC table: its first row must name the column symbol and "
                "one of prev_symbol, alias_symbol and ensembl_gene_id"
            )

        def names(row: list[str], what: str) -> list[str]:
            k = column[what]
            cell = row[k] if k is not None and k < len(row) else ""
            return [name.strip() for name in re.split(r"[|,]", cell) if name.strip()]

        # for each upper-case name the approved symbols it may mean
        self._approved: dict[str, str] = {}
        self._by: dict[str, dict[str, set[str]]] = {"previous": {}, "alias": {}, "ensembl": {}}
        self._previous: dict[str, list[str]] = {}
        self._ensembl: dict[str, str] = {}
        for row in rows[1:]:
            symbol, status = names(row, "symbol"), names(row, "status")
            if len(symbol) != 1 or (status and status[0].casefold() != "approved"):
                continue
            self._approved[symbol[0].upper()] = symbol[0]
            self._previous[symbol[0]] = names(row, "previous")
            for ensembl in names(row, "ensembl")[:1]:
                self._ensembl[symbol[0]] = ensembl_id(ensembl) or ensembl
            for what, found in self._by.items():
                for name in names(row, what):
                    found.setdefault(name.upper(), set()).add(symbol[0])

    def approved(self, gene: str) -> tuple[str, Rule] | None:
        """Return the one approved symbol of a name and the rule that found it; None if it is unknown or ambiguous.

        An approved symbol refers to itself, even if another gene had it before.
        """
        ensembl = ensembl_id(gene)
        if ensembl:
            found = self._by["ensembl"].get(ensembl, set())
            return (next(iter(found)), "Ensembl id") if len(found) == 1 else None
        if gene.upper() in self._approved:
            symbol = self._approved[gene.upper()]
            return symbol, "symbol" if symbol == gene else "case"
        names: tuple[tuple[str, Rule], ...] = (("previous", "previous symbol"), ("alias", "alias"))
        for what, rule in names:
            found = self._by[what].get(gene.upper(), set())
            if found:
                return (next(iter(found)), rule) if len(found) == 1 else None
        return None

    def previous(self, symbol: str) -> list[str]:
        """Return the previous symbols of an approved symbol that no other gene has or had."""
        return [
            name
            for name in self._previous.get(symbol, [])
            if name.upper() not in self._approved and len(self._by["previous"][name.upper()]) == 1
        ]

    def ensembl(self, symbol: str) -> str | None:
        """Return the Ensembl id of an approved symbol, None if it has none."""
        return self._ensembl.get(symbol)


def ensembl_id(gene: str) -> str | None:
    """Return an Ensembl gene id in upper case without its version; None for any other name.

    The version of a clone-based name (AL109927.1) is part of the name: without it, the name is not unique.
    """
    found = _ENSEMBL.fullmatch(gene)
    return found[1].upper() if found and not found[3] else None


def error_reason(error: Exception) -> str:
    """Return the reason of an error without the file name that an OSError repeats."""
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def read_text_table(path: Path, delimiter: str | None = None) -> list[list[str]]:
    """Return the non-empty rows of a text table, separated by tabs if the first line has one and by commas if not."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        if delimiter is None:
            delimiter = "\t" if "\t" in file.readline() else ","
            file.seek(0)
        return [row for row in csv.reader(file, delimiter=delimiter) if any(cell.strip() for cell in row)]
