"""Co-expression within and between sets of genes that belong together."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from hinge.evaluation.metrics.coexpression import correlation_matrix
from hinge.utils.errors import DataError
from hinge.utils.files import read_json

MARKERS: dict[str, tuple[str, ...]] = {
    "luminal epithelium": ("EPCAM", "KRT8", "KRT18", "KRT19", "KRT7", "CDH1", "MUC1", "ESR1", "GATA3", "AGR2", "XBP1"),
    "basal epithelium": ("KRT5", "KRT14", "KRT17", "TP63", "ACTA2", "MYH11", "OXTR"),
    "HER2 amplicon": ("ERBB2", "GRB7", "STARD3", "PGAP3", "MIEN1", "TCAP", "PNMT", "CDK12"),
    "proliferation": ("MKI67", "TOP2A", "PCNA", "CCNB1", "CDK1", "UBE2C", "TYMS", "BIRC5"),
    "fibroblasts": ("COL1A1", "COL1A2", "COL3A1", "COL6A1", "COL6A2", "COL6A3", "DCN", "LUM", "FN1", "SPARC", "POSTN"),
    "endothelium": ("PECAM1", "VWF", "CDH5", "KDR", "PLVAP", "ENG", "CLDN5"),
    "T cells": ("CD3D", "CD3E", "CD2", "CD8A", "CD4", "TRAC", "TRBC1", "TRBC2", "IL7R", "CCL5", "NKG7", "GZMA"),
    "B and plasma cells": ("MS4A1", "CD79A", "CD79B", "CD19", "MZB1", "JCHAIN", "IGKC", "IGHG1", "IGHA1", "IGLC2"),
    "macrophages": ("CD68", "CD163", "CD14", "LYZ", "C1QA", "C1QB", "C1QC", "FCER1G", "TYROBP", "AIF1", "APOE"),
    "antigen presentation": ("CD74", "HLA-DRA", "HLA-DRB1", "HLA-DPA1", "HLA-DPB1", "HLA-A", "HLA-B", "HLA-C", "B2M"),
    "interferon response": ("ISG15", "IFI6", "IFI27", "IFIT1", "IFIT3", "MX1", "STAT1", "OAS1"),
    "adipocytes": ("ADIPOQ", "PLIN1", "PLIN4", "FABP4", "LPL", "CIDEC", "LEP"),
}
"""Well-known markers of what a breast tumour is made of: used where no gene sets are given."""


def read_gene_sets(path: str | Path) -> dict[str, tuple[str, ...]]:
    """Read gene sets.

    Parameters
    ----------
    path
        GMT (a line a set: name, description, genes, separated by tabs) or JSON (name → list of genes).

    Raises
    ------
    DataError
        If the file is missing or damaged, or holds no set.
    """
    path = Path(path)
    if path.suffix == ".json":
        content = read_json(path)
        if not isinstance(content, dict) or not all(
            isinstance(genes, list) and all(isinstance(gene, str) for gene in genes) for genes in content.values()
        ):
            raise DataError(f"{path} holds no gene sets: a JSON file maps each set's name to a list of genes")
        sets = {str(name): tuple(dict.fromkeys(genes)) for name, genes in content.items()}
    else:
        try:
            lines = path.read_text("utf-8").splitlines()
        except FileNotFoundError as error:
            raise DataError(f"there is no file {path}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read the gene sets in {path}: {error}") from error
        sets = {}
        for number, line in enumerate(lines, start=1):
            name, *rest = line.split("\t")
            if not line.strip():
                continue
            if len(rest) < 2:
                raise DataError(f"line {number} of {path} is no gene set: GMT has a name, a description and genes")
            sets[name] = tuple(dict.fromkeys(gene.strip() for gene in rest[1:] if gene.strip()))
    if not any(sets.values()):
        raise DataError(f"{path} holds no gene sets")
    return sets


def module_scores(
    measured: ArrayLike, predicted: ArrayLike, genes: Sequence[str], gene_sets: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """Compare co-expression within gene sets, and between them, with the measured slide's.

    Over a whole panel most pairs of genes are of little interest; sets of genes that are known to act together
    ask whether a draw keeps tissue's own programs together and apart.

    Parameters
    ----------
    measured
        Values (n, G) in transform units.
    predicted
        One prediction (n, G), or draws (K, n, G), each scored by itself.
    genes
        G gene symbols.
    gene_sets
        Name → genes; those that are not in the panel or constant in the measured slide are left aside.

    Returns
    -------
    dict
        `within_rmse`, root mean squared difference of the correlations of the pairs that share a set; and
        `between_rmse`, of the pairs whose genes are both in some set but in none together. NaN where there is
        no such pair.
    """
    truth = correlation_matrix(measured)
    predicted = np.asarray(predicted)
    draws = predicted[None] if predicted.ndim == 2 else predicted
    if not len(draws):
        raise DataError("co-expression cannot be scored without any draw")
    member = np.array([[gene in set(members) for gene in genes] for members in gene_sets.values()], dtype=float)
    member = member.reshape(len(gene_sets), len(genes))
    together, known = member.T @ member > 0, member.any(axis=0)
    upper = np.triu(np.isfinite(truth), k=1)
    pairs = {"within": upper & together, "between": upper & ~together & np.outer(known, known)}
    scores = {"within_rmse": float("nan"), "between_rmse": float("nan")}
    errors = [np.nan_to_num(correlation_matrix(draw), nan=0.0) - truth for draw in draws]
    for name, chosen in pairs.items():
        if chosen.any():
            scores[f"{name}_rmse"] = float(np.mean([np.sqrt(np.mean(error[chosen] ** 2)) for error in errors]))
    return scores
