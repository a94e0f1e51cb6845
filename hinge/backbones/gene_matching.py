"""Match the genes of a slide or panel to the genes of a backbone.

Gene symbols change: what one table calls C1orf109 another calls AIRIM. A gene that is matched wrongly gets the
embedding of another gene without any error. Every match therefore names its rule, the rules are tried from the most to
the least reliable, an ambiguous name matches nothing, and no two genes share an id.
"""

from dataclasses import dataclass

import numpy as np

from hinge.backbones.hgnc import RULES, GeneNames, Rule, ensembl_id


@dataclass(frozen=True)
class GeneMapping:
    """The positions of requested genes in a vocabulary.

    Attributes
    ----------
    genes
        The k genes that have an id, with the requested names and in the requested order.
    ids
        Their ids, int64 (k,), all different.
    index
        Their positions in the requested list, int64 (k,): `values[:, mapping.index]` keeps their columns.
    rules
        The rule that found each gene of the vocabulary.
    harmonised
        Genes found under another name: requested name → name in the vocabulary.
    missing
        Genes that are not in the vocabulary.
    duplicates
        Genes whose id belongs to a better match: this gene → the better match.
    new
        Genes with a new id after the last one of the vocabulary (with `on_missing="new"`: all missing and
        duplicate genes). Their embeddings are not trained.
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
        """Return one line: the number of genes found by each rule, and the genes that were not found."""
        n = len(self.rules) + len(self.missing) + len(self.duplicates)
        counts = [(rule, sum(found == rule for found in self.rules.values())) for rule in RULES]
        text = f"{len(self.rules):,} of {n:,} genes map"
        if self.rules:
            text += ": " + ", ".join(f"{count:,} by {rule}" for rule, count in counts if count)
        if self.missing:
            text += f"; {len(self.missing):,} not in the vocabulary: {listed(self.missing)}"
        if self.duplicates:
            pairs = [f"{gene} (as {other})" for gene, other in self.duplicates.items()]
            text += f"; {len(pairs):,} under two names: {listed(pairs)}"
        if self.new:
            text += f"; {len(self.new):,} get new embeddings"
        return text


class GeneLookup:
    """Find the symbol of a vocabulary that a gene name refers to, and the rule that found it.

    Parameters
    ----------
    id_of
        Id of each symbol of the vocabulary.
    ensembl
        Id of each Ensembl gene id of the vocabulary.
    names
        HGNC's table; None: only the vocabulary's own symbols and Ensembl ids are known.
    """

    def __init__(self, id_of: dict[str, int], ensembl: dict[str, int], names: GeneNames | None):
        self.id_of, self.names = id_of, names
        self.by_case: dict[str, list[str]] = {}
        symbol_of: dict[int, str] = {}
        self.by_ensembl: dict[str, str] = {}
        for symbol, number in self.id_of.items():
            self.by_case.setdefault(symbol.upper(), []).append(symbol)
            symbol_of.setdefault(number, symbol)
            if ensembl_id(symbol):
                self.by_ensembl.setdefault(ensembl_id(symbol), symbol)
        for gene_id, number in ensembl.items():
            if number in symbol_of:
                self.by_ensembl.setdefault(gene_id, symbol_of[number])

    def __call__(self, gene: str) -> tuple[str, Rule] | None:
        if gene in self.id_of:
            return gene, "symbol"
        ensembl = ensembl_id(gene)
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


def listed(genes: list[str], n: int = 5) -> str:
    """Return the first genes separated by commas, and the number of the others."""
    text = ", ".join(str(gene)[:60] for gene in genes[:n])
    return text if len(genes) <= n else f"{text} and {len(genes) - n:,} more"
