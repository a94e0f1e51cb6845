"""The genes that a backbone knows, and their ids."""

import csv
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from hinge.backbones.gene_matching import GeneLookup, GeneMapping, listed
from hinge.backbones.hgnc import RULES, GeneNames, ensembl_id, error_reason, read_text_table
from hinge.utils.errors import ConfigError, DataError, WeightsError
from hinge.utils.files import write_json

OnMissing = Literal["drop", "error", "new"]
_SYMBOL_COLUMNS = {"symbol", "gene", "genes", "gene_symbol", "gene_name", "hgnc_symbol", "hgnc_gene"}
_ID_COLUMNS = {"id", "idx", "index", "token", "token_id"}
_ENSEMBL_COLUMNS = {"ensembl", "ensembl_id", "ensembl_gene_id", "ensembl gene id"}
_MAX_ID = 2**31 - 1


@dataclass(frozen=True)
class GeneVocabulary:
    """Gene symbols and their rows in the embedding table.

    Parameters
    ----------
    id_of
        Id of each symbol. Several symbols of one gene may share an id.
    ensembl
        Id of Ensembl gene ids without version, where known.
    first
        The smallest id that a gene may have: 1 for CellFM, whose row 0 is padding.
    last
        The last id in use, special tokens included; None: that of the last gene.

    Raises
    ------
    WeightsError
        There is no symbol, or an id is not a whole number of at least `first`.
    """

    id_of: dict[str, int]
    ensembl: dict[str, int] = field(default_factory=dict)
    first: int = 1
    last: int | None = None

    def __post_init__(self):
        if not self.id_of:
            raise WeightsError("a gene vocabulary must have at least one gene")
        for symbol, number in [*self.id_of.items(), *self.ensembl.items()]:
            if type(number) is not int or not self.first <= number <= _MAX_ID:
                raise WeightsError(
                    f"gene {symbol!r} needs a whole number from {self.first} to {_MAX_ID:,} as its id, not {number!r}"
                )

    @classmethod
    def from_genes(cls, genes: Iterable[str]) -> "GeneVocabulary":
        """Number the genes from 1 in the order given."""
        genes = list(genes)
        _refuse_repeats(genes, "the list of genes", WeightsError)
        return cls({gene: k for k, gene in enumerate(genes, 1)})

    @classmethod
    def from_tokens(cls, id_of: dict[str, int], num_rows: int) -> "GeneVocabulary":
        """Return the genes of a vocabulary with special tokens, `<...>`, for a table of `num_rows` embeddings."""
        genes = {token: number for token, number in id_of.items() if not is_special(token)}
        return cls(genes, first=0, last=num_rows - 1)

    @classmethod
    def load(cls, path: str | Path) -> "GeneVocabulary":
        """Read a vocabulary file.

        Parameters
        ----------
        path
            A `.json` file that `save` wrote, or a CSV or TSV table with one gene per row. The first row of a table
            names its columns: the symbol (`symbol`, `gene`, `gene_name`, `HGNC_gene` …, or no name) and
            optionally the id (`id`, `idx`, `index`, `token`) and `ensembl_gene_id`. Without an id column the ids
            are the row numbers from 1, as in CellFM's `expand_gene_info.csv`. A list of symbols only, and a table
            of symbols and ids only, need no header.

        Notes
        -----
        CellFM publishes several lists. Its weights with 27,856 embeddings use `expand_gene_info.csv`. `genemap.csv`
        needs the same number of embeddings, but its ids differ from GRAPLDR on.

        Raises
        ------
        WeightsError
            The file is missing, unreadable, names a gene twice, or has an id below 1.
        """
        path = Path(path)
        try:
            return cls._from_json(path) if path.suffix == ".json" else cls._from_table(path)
        except (OSError, ValueError, csv.Error, WeightsError) as error:
            raise WeightsError(f"cannot read the gene vocabulary {path}: {error_reason(error)}") from None

    @classmethod
    def _from_json(cls, path: Path) -> "GeneVocabulary":
        content = json.loads(path.read_text(encoding="utf-8"))
        parts = [content.get(key) for key in ("genes", "ensembl")] if isinstance(content, dict) else [None]
        if not all(isinstance(part, dict) for part in parts):
            raise ValueError('it must hold {"genes": {symbol: id}, "ensembl": {Ensembl id: id}}')
        return cls(*parts)

    @classmethod
    def _from_table(cls, path: Path) -> "GeneVocabulary":
        rows = read_text_table(path)
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
            raise ValueError("its first row must name the columns, and the column of gene symbols must be `symbol`")

        id_of: dict[str, int] = {}
        by_ensembl: dict[str, int] = {}
        for k, row in enumerate(rows, 1):
            if len(row) != len(names):
                raise ValueError(f"gene {k} has {len(row)} columns and the first row has {len(names)}")
            gene = row[symbol].strip()
            if not gene or _is_number(gene):
                raise ValueError(f"gene {k} needs a symbol, not {gene!r}")
            if gene in id_of:
                raise ValueError(f"it names gene {gene!r} twice")
            if number is not None and not _is_number(row[number]):
                raise ValueError(f"gene {gene!r} needs a whole number as its id, not {row[number]!r}")
            id_of[gene] = k if number is None else int(row[number])
            if ensembl is not None and ensembl_id(row[ensembl].strip()):
                by_ensembl.setdefault(ensembl_id(row[ensembl].strip()), id_of[gene])
        return cls(id_of, by_ensembl)

    def save(self, path: str | Path) -> Path:
        """Write the vocabulary as JSON."""
        return write_json(path, {"genes": self.id_of, "ensembl": self.ensembl})

    @property
    def n_genes(self) -> int:
        """The largest id."""
        return max(self.id_of.values())

    @property
    def last_id(self) -> int:
        """The last id in use; new genes are numbered after it."""
        return self.n_genes if self.last is None else self.last

    @property
    def n_embeddings(self) -> int:
        """Rows of the embedding table: one per gene and one for padding, rounded up to a multiple of 8."""
        return -(-(self.n_genes + 1) // 8) * 8

    @property
    def genes(self) -> list[str]:
        """The first symbol of each id, in the order of the ids."""
        symbols: dict[int, str] = {}
        for symbol, number in self.id_of.items():
            symbols.setdefault(number, symbol)
        return [symbols[number] for number in sorted(symbols)]

    def numbered(self) -> list[str]:
        """Return one symbol per id if the ids are 1, 2, 3 …, as the config of a backbone stores them.

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
        """Return the ids of genes that have exactly the symbols of the vocabulary.

        Returns
        -------
        ndarray
            int64 (G,), in the order of the genes.

        Raises
        ------
        DataError
            A gene is not in the vocabulary. `match` accepts such genes.
        """
        genes = list(genes)
        unknown = [gene for gene in genes if gene not in self.id_of]
        if unknown:
            raise DataError(f"{len(unknown):,} of {len(genes):,} genes are not in the vocabulary: {listed(unknown)}")
        return np.array([self.id_of[gene] for gene in genes], dtype=np.int64)

    def extended(self, genes: Iterable[str]) -> "GeneVocabulary":
        """Return this vocabulary with further genes after its last id, numbered as by `match(on_missing="new")`."""
        further = {gene: self.last_id + k for k, gene in enumerate(genes, 1)}
        known = [gene for gene in further if gene in self.id_of]
        if known:
            raise DataError(f"the vocabulary has {listed(known)} already")
        last = None if self.last is None else self.last + len(further)
        return GeneVocabulary({**self.id_of, **further}, self.ensembl, self.first, last)

    def match(
        self,
        genes: Iterable[str],
        on_missing: OnMissing = "drop",
        names: GeneNames | None = None,
    ) -> GeneMapping:
        """Find the genes of a slide or panel in the vocabulary, also under other names.

        The rules, from the most to the least reliable: the same symbol; the same Ensembl id without versions; the
        same symbol in other case, if only one gene has it; with `names`, a previous symbol (of the requested gene or
        of the gene in the vocabulary); with `names`, an alias. If several genes find the same id, the most reliable
        match keeps it, and among equals the first.

        Parameters
        ----------
        genes
            Gene symbols or Ensembl ids, each once.
        on_missing
            Treatment of genes without an id, or whose id belongs to a better match: `drop` omits them, `error`
            raises, `new` numbers them after the last id, in the order given.
        names
            HGNC's table of Ensembl ids, previous symbols and aliases.

        Returns
        -------
        GeneMapping
            `summary()` describes it in one line.

        Raises
        ------
        DataError
            A gene is requested twice; no gene has an id; with `on_missing="error"`, a gene is not found.
        """
        if on_missing not in ("drop", "error", "new"):
            raise ConfigError(f"on_missing must be drop, error or new, not {on_missing!r}")
        genes = list(genes)
        _refuse_repeats(genes, "the genes to match", DataError)
        lookup = GeneLookup(self.id_of, self.ensembl, names)
        found = {gene: match for gene in genes if (match := lookup(gene)) is not None}

        holder: dict[int, str] = {}
        duplicates: dict[str, str] = {}
        for gene in sorted(found, key=lambda gene: RULES.index(found[gene][1])):
            other = holder.setdefault(self.id_of[found[gene][0]], gene)
            if other != gene:
                duplicates[gene] = other
        kept = {gene: match for gene, match in found.items() if gene not in duplicates}
        duplicates = {gene: duplicates[gene] for gene in genes if gene in duplicates}
        missing = [gene for gene in genes if gene not in found]
        new = [gene for gene in genes if gene not in kept] if on_missing == "new" else []
        number_of = {gene: self.id_of[symbol] for gene, (symbol, _) in kept.items()}
        number_of |= {gene: self.last_id + k for k, gene in enumerate(new, 1)}
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


def is_special(token: str) -> bool:
    """Return whether an entry of a vocabulary is a special token, such as `<cls>`, and no gene."""
    return token.startswith("<") and token.endswith(">")


def _is_number(cell: str) -> bool:
    return re.fullmatch(r"\s*[+-]?[0-9]{1,18}\s*", cell) is not None


def _refuse_repeats(genes: list[str], what: str, error: type[Exception]) -> None:
    seen: set[str] = set()
    for gene in genes:
        if not isinstance(gene, str) or not gene.strip():
            raise error(f"{what} must be names, not {gene!r}")
        if gene in seen:
            raise error(f"{what} name {gene!r} twice")
        seen.add(gene)


def vocabulary_for(path: str | Path, num_embeddings: int) -> GeneVocabulary:
    """Read a vocabulary and check that the weights have the number of embeddings that it needs.

    Raises
    ------
    WeightsError
        They do not.
    """
    vocabulary = GeneVocabulary.load(path)
    if vocabulary.n_embeddings != num_embeddings:
        raise WeightsError(
            f"the vocabulary {path} does not belong to these weights: its {vocabulary.n_genes:,} genes need "
            f"{vocabulary.n_embeddings:,} embeddings and the weights have {num_embeddings:,}"
        )
    return vocabulary
