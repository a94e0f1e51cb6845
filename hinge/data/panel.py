"""Gene panels: the genes of a model, the method of their selection and its slides."""

import logging
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from anndata import AnnData
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from hinge.data.library_sizes import gene_shares
from hinge.data.slide import slide_name
from hinge.utils.errors import ConfigError, DataError
from hinge.utils.files import read_json, write_json
from hinge.utils.notices import tell_once
from hinge.utils.packages import VERSION

# As the paper prints them and taken literally, so that its panels can be made again: MT* is meant for the
# mitochondrial genes MT-*, but also drops nuclear ones such as MT2A, MTDH or MTOR.
EXCLUDED_PREFIXES = ("MT", "RPS", "RPL")

_VARIABLE_GENES_PER_SLIDE = 2000
_MITOCHONDRIAL = re.compile(r"MT[-.]", re.IGNORECASE).match
_logger = logging.getLogger(__name__)


class Panel(BaseModel):
    """A list of genes and its origin.

    Attributes
    ----------
    genes
        Gene symbols, unique; a selected panel has its best genes first.
    method
        `hmhvg`, `hvg`, `union`, or `list` for a given list of genes.
    slides
        Names of the slides of the selection.
    shares
        Share in all counts of every gene of these slides, see `hinge.data.library_sizes.gene_shares`, of a panel whose
        genes some slides lack; empty: every slide has all genes of the panel.
    hinge_version
        Version of this package.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    genes: list[str] = Field(min_length=1)
    method: str
    slides: list[str] = []
    shares: dict[str, float] = {}
    hinge_version: str = VERSION

    @field_validator("genes")
    @classmethod
    def _unique(cls, genes: list[str]) -> list[str]:
        index = pd.Index(genes)
        if index.has_duplicates:
            raise ValueError(f"gene {index[index.duplicated()][0]} occurs more than once")
        if "" in genes:
            raise ValueError("a gene has an empty name")
        return genes

    @classmethod
    def from_list(cls, genes: Sequence[str]) -> "Panel":
        """Return a panel of given genes in the given order.

        Raises
        ------
        DataError
            The list is empty, or a gene is repeated.
        """
        return _checked(cls, {"genes": list(genes), "method": "list"}, "the list of genes is not a valid panel")

    @classmethod
    def load(cls, path: str | Path) -> "Panel":
        """Read a panel that `save` wrote.

        Raises
        ------
        DataError
            If the file is missing, damaged, or not a panel.
        """
        return _checked(cls, read_json(path), f"{path} is not a panel")

    def save(self, path: str | Path) -> Path:
        """Write the panel as JSON."""
        return write_json(path, self.model_dump(exclude=None if self.shares else {"shares"}))

    def of_slides(self, slides: Sequence[AnnData], min_slides: int) -> "Panel":
        """Return this panel for slides that may lack some of its genes, which are then unknown and not zero.

        Raises
        ------
        DataError
            A gene is in fewer than `min_slides` of the slides.
        """
        counts = _slides_with(slides)
        rare = [gene for gene in self.genes if counts.get(gene, 0) < min_slides]
        if rare:
            raise DataError(
                f"{len(rare)} of the panel's {len(self.genes)} genes are in fewer than {min_slides} of the "
                f"{len(slides)} slides: {', '.join(rare[:5])}; leave them out, or give a smaller --min-slides "
                "(panel.min_slides)"
            )
        names = [slide_name(slide) for slide in slides]
        return self.model_copy(update={"slides": names, "shares": gene_shares(slides)})


def select_panel(
    slides: Sequence[AnnData], method: str = "hmhvg", n_genes: int | None = 200, min_slides: int = 1
) -> Panel:
    """Select a panel from the training slides.

    `hmhvg` (highly expressed and highly variable; HINGE, Fang et al. 2026, after Stem, Zhu et al. 2025): the
    union over slides of the 2,000 most variable genes of each slide (variance of log-normalised counts), without MT*,
    RPS* and RPL* and without genes that some slide lacks, is ranked by mean and by standard deviation of
    the raw counts of all spots together. The panel is the intersection of the two top-k lists for the smallest k that
    gives `n_genes`. Each k can add two genes, so the last may be one too many: genes are taken by the worse of their
    two ranks, then by the better one, then by name.

    `hvg`: the most variable genes of scanpy (flavour seurat) with the slides as batches: first those that are
    variable in most slides, then by normalised dispersion, then by name. Only genes that some slide lacks are
    left out.

    `union`: genes that at least `min_slides` slides have, without MT-*, RPS* and RPL* and without genes that have no
    count, ranked as those of `hmhvg`, by mean and standard deviation over the spots of the slides that have the gene.
    The slides may lack genes of this panel: these are unknown there, and not zero.

    All depend on the slides but not on their order.

    Parameters
    ----------
    slides
        Slides with raw counts.
    method
        `hmhvg`, `hvg` or `union`.
    n_genes
        Size of the panel; None: all genes that `union` finds.
    min_slides
        Of `union`: the smallest number of slides that have a gene.

    Returns
    -------
    Panel
        Best genes first.

    Raises
    ------
    ConfigError
        The method is unknown, a number is out of range, or `n_genes` is None and the method is not `union`.
    DataError
        No slides are given, or the method finds fewer than `n_genes` genes.
    """
    if method not in (*_METHODS, "union"):
        raise ConfigError(f"there is no panel method {method!r}; choose one of {', '.join([*_METHODS, 'union'])}")
    if n_genes is None and method != "union":
        raise ConfigError(f"method {method} takes a number of genes; give --genes, or take the method union")
    if n_genes is not None and n_genes < 1:
        raise ConfigError(f"a panel needs at least one gene, not {n_genes}")
    if not slides:
        raise DataError("a panel cannot be selected from no slides")
    names = [slide_name(slide) for slide in slides]
    if len(set(names)) < len(names):
        raise DataError(f"a panel needs each slide once, not {', '.join(names)}")
    if not 1 <= min_slides <= len(slides):
        raise ConfigError(f"--min-slides takes a number from 1 to that of the slides, {len(slides)}, not {min_slides}")
    if method == "union":
        genes = _union(slides, min_slides, n_genes)
        if genes and (n_genes is None or len(genes) == n_genes):
            return Panel(genes=genes, method=method).of_slides(slides, min_slides)
        raise DataError(
            f"a panel of {n_genes or 'some'} genes is needed, and {len(genes)} are in at least {min_slides} of "
            f"{', '.join(names)}; give a smaller --genes or --min-slides"
        )
    assert n_genes is not None
    shared = sorted(set.intersection(*(set(slide.var_names) for slide in slides)))
    genes = _METHODS[method](slides, shared, n_genes)
    if len(genes) < n_genes:
        raise DataError(
            f"a panel of {n_genes} genes is needed, and method {method} finds {len(genes)} in "
            f"{', '.join(names)} ({len(shared)} genes are in all of them); give a smaller --genes"
        )
    return Panel(genes=genes, method=method, slides=names)


def read_panel(path: Path) -> Panel:
    """Read a panel from panel.json, or from a text file with one gene symbol a line."""
    if path.suffix == ".json":
        return Panel.load(path)
    try:
        lines = path.read_text("utf-8").splitlines()
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the genes in {path}: {error}") from error
    return Panel.from_list([line.strip() for line in lines if line.strip()])


def _hmhvg(slides: Sequence[AnnData], shared: list[str], n_genes: int) -> list[str]:
    variable = set().union(*(_variable_genes(slide) for slide in slides))
    genes = [gene for gene in shared if gene in variable and not gene.upper().startswith(EXCLUDED_PREFIXES)]
    nuclear = [
        gene for gene in sorted(variable & set(shared)) if gene.upper().startswith("MT") and not _MITOCHONDRIAL(gene)
    ]
    if nuclear:
        tell_once(
            _logger,
            f"panel: left out {len(nuclear)} nuclear genes whose names start with MT ({', '.join(nuclear[:5])}), as "
            "the published method does; hinge panel --list takes a list with them",
        )
    n_spots, total, squares = 0, np.zeros(len(genes)), np.zeros(len(genes))
    for slide in slides:
        # sums of integers are exact in float64: ranks depend on neither the order of slides nor the machine
        counts = slide[:, genes].X.astype(np.float64)
        n_spots += counts.shape[0]
        total += np.asarray(counts.sum(axis=0)).ravel()
        squares += np.asarray(counts.power(2).sum(axis=0)).ravel()
    # n² times the variance, in integers
    spread = n_spots * squares - total**2
    ranks = np.stack([_ranks(total), _ranks(spread)])
    order = np.lexsort((ranks.min(axis=0), ranks.max(axis=0)))
    return [genes[i] for i in order[:n_genes]]


def _union(slides: Sequence[AnnData], min_slides: int, n_genes: int | None) -> list[str]:
    """Return the genes of a union, best first; at most `n_genes`."""
    genes = sorted(
        gene
        for gene, count in _slides_with(slides).items()
        if count >= min_slides and not gene.upper().startswith(("RPS", "RPL")) and not _MITOCHONDRIAL(gene)
    )
    n_spots, total, squares = np.zeros((3, len(genes)))
    column_of = pd.Index(genes)
    for slide in slides:
        columns = column_of.get_indexer(slide.var_names)
        counts = slide[:, columns >= 0].X.astype(np.float64)
        own = columns[columns >= 0]
        n_spots[own] += counts.shape[0]
        total[own] += np.asarray(counts.sum(axis=0)).ravel()
        squares[own] += np.asarray(counts.power(2).sum(axis=0)).ravel()
    mean = total / np.maximum(n_spots, 1)
    ranks = np.stack([_ranks(mean), _ranks(squares / np.maximum(n_spots, 1) - mean**2)])
    order = [each for each in np.lexsort((ranks.min(axis=0), ranks.max(axis=0))) if total[each] > 0]
    return [genes[each] for each in order[:n_genes]]


def _slides_with(slides: Sequence[AnnData]) -> dict[str, int]:
    """Return how many slides have each gene."""
    return dict(Counter(gene for slide in slides for gene in slide.var_names))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return the rank of each value, 0 for the largest; ties in the given order (genes are sorted by name)."""
    ranks = np.empty(len(values), dtype=int)
    ranks[np.argsort(-values, kind="stable")] = np.arange(len(values))
    return ranks


def _variable_genes(slide: AnnData) -> list[str]:
    """Return the 2,000 most variable genes of a slide, or all if it has fewer."""
    if slide.n_vars <= _VARIABLE_GENES_PER_SLIDE:
        return list(slide.var_names)
    values = _log_normalised(slide)
    # the variance and not scanpy's dispersion, which is normalised by the mean and ranks highly expressed genes low
    # (ERBB2 in HER2-positive tumours)
    matrix = values.X.astype(np.float64)
    mean = np.asarray(matrix.mean(axis=0)).ravel()
    variance = np.asarray(matrix.power(2).mean(axis=0)).ravel() - mean**2
    return list(values.var_names[np.argsort(-variance, kind="stable")[:_VARIABLE_GENES_PER_SLIDE]])


def _hvg(slides: Sequence[AnnData], shared: list[str], n_genes: int) -> list[str]:
    if len(shared) <= n_genes:
        return shared
    import scanpy

    # scanpy averages over batches: sorted by name, so that rounding does not depend on the given order
    values = {slide_name(slide): _log_normalised(slide)[:, shared] for slide in sorted(slides, key=slide_name)}
    together = anndata.concat(values, label="slide", index_unique="/")
    table = scanpy.pp.highly_variable_genes(together, n_top_genes=n_genes, batch_key="slide", inplace=False)
    table.index = together.var_names
    columns = ["highly_variable_nbatches", "dispersions_norm"]
    return list(table[table["highly_variable"]].sort_values(columns, ascending=False, kind="stable").index)


def _log_normalised(slide: AnnData) -> AnnData:
    import scanpy

    if not slide.X.count_nonzero():
        raise DataError(f"slide {slide_name(slide)} has no count above 0")
    values = AnnData(X=slide.X.astype(np.float32), obs=slide.obs[[]], var=slide.var[[]])
    scanpy.pp.normalize_total(values)
    scanpy.pp.log1p(values)
    return values


def _checked(cls: type[Panel], content: object, otherwise: str) -> Panel:
    try:
        return cls.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{otherwise}: {f'{where}: ' if where else ''}{first['msg']}") from error


_METHODS = {"hmhvg": _hmhvg, "hvg": _hvg}
