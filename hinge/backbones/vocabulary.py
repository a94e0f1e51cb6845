"""The genes a backbone knows, and how the genes of a slide or panel find their place among them.

Gene symbols change: what one table calls C1orf109 another calls AIRIM. A gene that is matched wrongly gets
the embedding of another gene without any error, so every match names the rule it was made by, the rules are
tried from the surest to the weakest, an ambiguous name matches nothing, and no two genes share an id.
"""

import csv
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from hinge.utils.errors import ConfigError, DataError, WeightsError
from hinge.utils.files import write_json

OnMissing = Literal["drop", "error", "new"]
Rule = Literal["symbol", "Ensembl id", "case", "previous symbol", "alias"]
_RULES: tuple[Rule, ...] = ("symbol", "Ensembl id", "case", "previous symbol", "alias")

_SYMBOL_COLUMNS = {"symbol", "gene", "genes", "gene_symbol", "gene_name", "hgnc_symbol", "hgnc_gene"}
_ID_COLUMNS = {"id", "idx", "index", "token", "token_id"}
_ENSEMBL_COLUMNS = {"ensembl", "ensembl_id", "ensembl_gene_id", "ensembl gene id"}
_MAX_ID = 2**31 - 1

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
        `alias_symbol`, `ensembl_gene_id`, several names in one cell divided by `|`) or a custom download with
        `Approved symbol`, `Previous symbols`, `Alias symbols` (divided by commas). Only the symbol and one
        further column are needed.

    Raises
    ------
    DataError
        The file is missing, unreadable or lacks these columns.
    """

    def __init__(self, path: str | Path):
        try:
            rows = _read_table(Path(path), "\t")
        except (OSError, ValueError, csv.Error) as error:
            raise DataError(f"cannot read the HGNC table {path}: {_reason(error)}") from None
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
                self._ensembl[symbol[0]] = _without_version(ensembl) or ensembl
            for what, found in self._by.items():
                for name in names(row, what):
                    found.setdefault(name.upper(), set()).add(symbol[0])

    def approved(self, gene: str) -> tuple[str, Rule] | None:
        """The one approved symbol that a name means, and by which rule; None if unknown or ambiguous.

        An approved symbol means itself, whatever other gene once had it.
        """
        ensembl = _without_version(gene)
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
        """Previous symbols of an approved symbol that no other gene has or had."""
        return [
            name
            for name in self._previous.get(symbol, [])
            if name.upper() not in self._approved and len(self._by["previous"][name.upper()]) == 1
        ]

    def ensembl(self, symbol: str) -> str | None:
        """Ensembl id of an approved symbol."""
        return self._ensembl.get(symbol)


@dataclass(frozen=True)
class GeneMapping:
    """Where the genes asked for lie in a vocabulary.

    Attributes
    ----------
    genes
        The k genes that have an id, under the names and in the order they were asked for.
    ids
        Their ids, int64 (k,), no two the same.
    index
        Their positions in the list asked for, int64 (k,): `values[:, mapping.index]` keeps their columns.
    rules
        For each gene that the vocabulary knows, by which rule.
    harmonised
        Genes found under another name than their own: asked for → in the vocabulary.
    missing
        Genes the vocabulary does not know.
    duplicates
        Genes whose id a better match holds: this one → that one.
    new
        Genes that got an id after the last of the vocabulary (with `on_missing="new"`: all the missing and
        duplicate ones), whose embeddings are not trained yet.
    """

    genes: list[str]
    ids: np.ndarray
    index: np.ndarray
    rules: dict[str, Rule]
    harmonised: dict[str, str]
    missing: list[str]
    duplicates: dict[str, str]
    new: list[str]

    def summary(self) -> str:
        """One line: how many genes map, by which rules, and what becomes of the others."""
        n = len(self.rules) + len(self.missing) + len(self.duplicates)
        counts = [(rule, sum(found == rule for found in self.rules.values())) for rule in _RULES]
        text = f"{len(self.rules):,} of {n:,} genes map"
        if self.rules:
            text += ": " + ", ".join(f"{count:,} by {rule}" for rule, count in counts if count)
        if self.missing:
            text += f"; {len(self.missing):,} not in the vocabulary: {_some(self.missing)}"
        if self.duplicates:
            pairs = [f"{gene} (as {other})" for gene, other in self.duplicates.items()]
            text += f"; {len(pairs):,} under two names: {_some(pairs)}"
        if self.new:
            text += f"; {len(self.new):,} get new embeddings"
        return text


@dataclass(frozen=True)
class GeneVocabulary:
    """Gene symbols and the rows of the embedding table that belong to them; row 0 is padding.

    Parameters
    ----------
    id_of
        Id of each symbol, from 1 on. Several symbols of one gene may share an id.
    ensembl
        Id of Ensembl gene ids without version, where known.

    Raises
    ------
    WeightsError
        There is no symbol, or an id is not a whole number from 1 on.
    """

    id_of: dict[str, int]
    ensembl: dict[str, int] = field(default_factory=dict)

    def __post_init__(self):
        if not self.id_of:
            raise WeightsError("a gene vocabulary must have at least one gene")
        for symbol, number in [*self.id_of.items(), *self.ensembl.items()]:
            if type(number) is not int or not 1 <= number <= _MAX_ID:
                raise WeightsError(f"gene {symbol!r} must have a whole number from 1 on, not {number!r}")

    @classmethod
    def from_genes(cls, genes: Iterable[str]) -> "GeneVocabulary":
        """Number the genes from 1 in the order given."""
        genes = list(genes)
        _refuse_repeats(genes, "the list of genes", WeightsError)
        return cls({gene: k for k, gene in enumerate(genes, 1)})

    @classmethod
    def load(cls, path: str | Path) -> "GeneVocabulary":
        """Read a vocabulary file.

        Parameters
        ----------
        path
            What `save` wrote (`.json`); or a CSV or TSV table, one gene a row, whose first row names
            the columns: that of the symbol (`symbol`, `gene`, `gene_name`, `HGNC_gene` …, or no name) and,
            where there is one, of the id (`id`, `idx`, `index`, `token`) and `ensembl_gene_id`. Without an
            id column the ids are the row numbers from 1, as in CellFM's `expand_gene_info.csv`. A list of
            symbols alone, and a table of symbol and id alone, need no first row of names.

        Notes
        -----
        CellFM publishes several lists. Its weights with 27,856 embeddings go with `expand_gene_info.csv`.
        `genemap.csv` needs as many embeddings, but from GRAPLDR on its ids are others.

        Raises
        ------
        WeightsError
            The file is missing, unreadable, names a gene twice, or has an id below 1.
        """
        path = Path(path)
        try:
            return cls._from_json(path) if path.suffix == ".json" else cls._from_table(path)
        except (OSError, ValueError, csv.Error, WeightsError) as error:
            raise WeightsError(f"cannot read the gene vocabulary {path}: {_reason(error)}") from None

    @classmethod
    def _from_json(cls, path: Path) -> "GeneVocabulary":
        content = json.loads(path.read_text(encoding="utf-8"))
        parts = [content.get(key) for key in ("genes", "ensembl")] if isinstance(content, dict) else [None]
        if not all(isinstance(part, dict) for part in parts):
            raise ValueError('it must hold {"genes": {symbol: id}, "ensembl": {Ensembl id: id}}')
        return cls(*parts)

    @classmethod
    def _from_table(cls, path: Path) -> "GeneVocabulary":
        rows = _read_table(path)
        if not rows:
            raise ValueError("it has no rows")
        names = [cell.strip().casefold() for cell in rows[0]]
        symbol, number, ensembl = (
            next((k for k, name in enumerate(names) if name in known), None)
            for known in (_SYMBOL_COLUMNS, _ID_COLUMNS, _ENSEMBL_COLUMNS)
        )
        if symbol is None and names[0] == "":  # as pandas writes an index
            symbol = 0
        if symbol is not None:
            rows = rows[1:]
        elif len(names) == 1:
            symbol, number = 0, None
        elif len(names) == 2 and _is_number(rows[-1][-1]):
            symbol, number = 0, 1
            rows = rows if _is_number(rows[0][1]) else rows[1:]
        else:
            raise ValueError("its first row must name the columns, that of the gene symbols `symbol`")

        id_of: dict[str, int] = {}
        by_ensembl: dict[str, int] = {}
        for k, row in enumerate(rows, 1):
            if len(row) != len(names):
                raise ValueError(f"gene {k} has {len(row)} columns where the first row has {len(names)}")
            gene = row[symbol].strip()
            if not gene or _is_number(gene):
                raise ValueError(f"gene {k} has no symbol but {gene!r}")
            if gene in id_of:
                raise ValueError(f"it names gene {gene!r} twice")
            if number is not None and not _is_number(row[number]):
                raise ValueError(f"gene {gene!r} must have a whole number, not {row[number]!r}")
            id_of[gene] = k if number is None else int(row[number])
            if ensembl is not None and _without_version(row[ensembl].strip()):
                by_ensembl.setdefault(_without_version(row[ensembl].strip()), id_of[gene])
        return cls(id_of, by_ensembl)

    def save(self, path: str | Path) -> Path:
        """Write the vocabulary as JSON, to lie beside the weights."""
        return write_json(path, {"genes": self.id_of, "ensembl": self.ensembl})

    @property
    def n_genes(self) -> int:
        """The last id."""
        return max(self.id_of.values())

    @property
    def n_embeddings(self) -> int:
        """Rows of the embedding table: one a gene and one for padding, rounded up to a multiple of 8."""
        return -(-(self.n_genes + 1) // 8) * 8

    @property
    def genes(self) -> list[str]:
        """One symbol an id (the first given), in the order of the ids."""
        symbols: dict[int, str] = {}
        for symbol, number in self.id_of.items():
            symbols.setdefault(number, symbol)
        return [symbols[number] for number in sorted(symbols)]

    def numbered(self) -> list[str]:
        """One symbol an id where the ids are 1, 2, 3 …, as a backbone's config holds them.

        Raises
        ------
        WeightsError
            The ids have gaps.
        """
        genes = self.genes
        if len(genes) != self.n_genes:
            raise WeightsError(
                f"the vocabulary has gaps ({len(genes):,} ids up to {self.n_genes:,}), so it cannot be stored with the "
                "weights; name its file as backbone.vocabulary of a run"
            )
        return genes

    def ids(self, genes: Iterable[str]) -> np.ndarray:
        """Ids of genes under exactly the symbols of the vocabulary.

        Returns
        -------
        ndarray
            int64 (G,), in the order of the genes.

        Raises
        ------
        DataError
            A gene is not in the vocabulary; `match` is for genes that may not be.
        """
        genes = list(genes)
        unknown = [gene for gene in genes if gene not in self.id_of]
        if unknown:
            raise DataError(f"{len(unknown):,} of {len(genes):,} genes are not in the vocabulary: {_some(unknown)}")
        return np.array([self.id_of[gene] for gene in genes], dtype=np.int64)

    def extended(self, genes: Iterable[str]) -> "GeneVocabulary":
        """This vocabulary with further genes after its last id, as `match(on_missing="new")` numbers them."""
        further = {gene: self.n_genes + k for k, gene in enumerate(genes, 1)}
        known = [gene for gene in further if gene in self.id_of]
        if known:
            raise DataError(f"the vocabulary has {_some(known)} already")
        return GeneVocabulary({**self.id_of, **further}, self.ensembl)

    def match(
        self,
        genes: Iterable[str],
        on_missing: OnMissing = "drop",
        names: GeneNames | None = None,
    ) -> GeneMapping:
        """Find the genes of a slide or panel in the vocabulary, under whatever name they have there.

        The rules, surest first: the same symbol; the same Ensembl id, versions aside; the same symbol in
        other case, where one gene alone has it; with `names`, a previous symbol (the gene asked for may have
        the older or the newer one); with `names`, an alias. Where several genes find the same id, the surest
        match keeps it, among equals the first.

        Parameters
        ----------
        genes
            Gene symbols or Ensembl ids, each once.
        on_missing
            What becomes of genes that find no id, or one that a better match holds: `drop` leaves them out,
            `error` refuses, `new` numbers them after the last id, in the order given.
        names
            HGNC's table, for Ensembl ids, previous symbols and aliases.

        Returns
        -------
        GeneMapping
            Its `summary()` is a line to print.

        Raises
        ------
        DataError
            A gene is asked for twice; none gets an id; with `on_missing="error"`, any is not found.
        """
        if on_missing not in ("drop", "error", "new"):
            raise ConfigError(f"on_missing must be drop, error or new, not {on_missing!r}")
        genes = list(genes)
        _refuse_repeats(genes, "the genes to match", DataError)
        lookup = _Lookup(self, names)
        found = {gene: match for gene in genes if (match := lookup(gene)) is not None}

        holder: dict[int, str] = {}
        duplicates: dict[str, str] = {}
        for gene in sorted(found, key=lambda gene: _RULES.index(found[gene][1])):
            other = holder.setdefault(self.id_of[found[gene][0]], gene)
            if other != gene:
                duplicates[gene] = other
        kept = {gene: match for gene, match in found.items() if gene not in duplicates}
        duplicates = {gene: duplicates[gene] for gene in genes if gene in duplicates}
        missing = [gene for gene in genes if gene not in found]
        new = [gene for gene in genes if gene not in kept] if on_missing == "new" else []
        number_of = {gene: self.id_of[symbol] for gene, (symbol, _) in kept.items()}
        number_of |= {gene: self.n_genes + k for k, gene in enumerate(new, 1)}
        index = [k for k, gene in enumerate(genes) if gene in number_of]
        mapping = GeneMapping(
            genes=[genes[k] for k in index],
            ids=np.array([number_of[genes[k]] for k in index], dtype=np.int64),
            index=np.array(index, dtype=np.int64),
            rules={gene: rule for gene, (_, rule) in kept.items()},
            harmonised={gene: symbol for gene, (symbol, _) in kept.items() if symbol != gene},
            missing=missing,
            duplicates=duplicates,
            new=new,
        )
        if on_missing == "error" and len(kept) < len(genes):
            raise DataError(f"not all genes are in the vocabulary: {mapping.summary()}")
        if not number_of:
            raise DataError(f"no gene is in the vocabulary: {mapping.summary()}")
        return mapping


class _Lookup:
    """Finds the symbol of a vocabulary that a gene means, and by which rule."""

    def __init__(self, vocabulary: GeneVocabulary, names: GeneNames | None):
        self.id_of, self.names = vocabulary.id_of, names
        self.by_case: dict[str, list[str]] = {}
        symbol_of: dict[int, str] = {}
        self.by_ensembl: dict[str, str] = {}
        for symbol, number in self.id_of.items():
            self.by_case.setdefault(symbol.upper(), []).append(symbol)
            symbol_of.setdefault(number, symbol)
            if _without_version(symbol):
                self.by_ensembl.setdefault(_without_version(symbol), symbol)
        for ensembl, number in vocabulary.ensembl.items():
            if number in symbol_of:
                self.by_ensembl.setdefault(ensembl, symbol_of[number])

    def __call__(self, gene: str) -> tuple[str, Rule] | None:
        if gene in self.id_of:
            return gene, "symbol"
        ensembl = _without_version(gene)
        if ensembl in self.by_ensembl:
            return self.by_ensembl[ensembl], "Ensembl id"
        same = self.by_case.get(gene.upper(), [])
        if len({self.id_of[symbol] for symbol in same}) == 1:
            return same[0], "case"
        if self.names is None or (approved := self.names.approved(gene)) is None:
            return None
        symbol, rule = approved
        if symbol in self.id_of:
            return symbol, rule
        if self.names.ensembl(symbol) in self.by_ensembl:
            return self.by_ensembl[self.names.ensembl(symbol)], rule
        earlier = {name for name in self.names.previous(symbol) if name in self.id_of}
        if len({self.id_of[name] for name in earlier}) == 1:
            return min(earlier), "alias" if rule == "alias" else "previous symbol"
        return None


def _without_version(gene: str) -> str | None:
    """An Ensembl gene id in upper case without its version; None for anything else.

    The version of a clone-based name (AL109927.1) is part of the name: without it, other genes have it too.
    """
    found = _ENSEMBL.fullmatch(gene)
    return found[1].upper() if found and not found[3] else None


def _is_number(cell: str) -> bool:
    return re.fullmatch(r"\s*[+-]?[0-9]{1,18}\s*", cell) is not None


def _some(genes: list[str], n: int = 5) -> str:
    text = ", ".join(str(gene)[:60] for gene in genes[:n])
    return text if len(genes) <= n else f"{text} and {len(genes) - n:,} more"


def _refuse_repeats(genes: list[str], what: str, error: type[Exception]) -> None:
    seen: set[str] = set()
    for gene in genes:
        if not isinstance(gene, str) or not gene.strip():
            raise error(f"{what} must be names, not {gene!r}")
        if gene in seen:
            raise error(f"{what} name {gene!r} twice")
        seen.add(gene)


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def _read_table(path: Path, delimiter: str | None = None) -> list[list[str]]:
    """Rows of a text table that are not empty; tabs divide if the first line has one, else commas."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        if delimiter is None:
            delimiter = "\t" if "\t" in file.readline() else ","
            file.seek(0)
        return [row for row in csv.reader(file, delimiter=delimiter) if any(cell.strip() for cell in row)]
