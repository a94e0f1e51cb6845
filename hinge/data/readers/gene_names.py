"""The genes of a table of counts: symbols in place of Ensembl names, one genome, no control features."""

import re
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

CONTROLS = re.compile(
    r"(neg_?control|negprb|negative_?(control|probe|prb)?[-_ ]?\d|blank[-_]?\d|antisense_|unassigned"
    r"|deprecated_?codeword|falsecode|systemcontrol|intergenic_|genomic_?control|ercc-\d|custom_blank)",
    re.IGNORECASE,
)
"""Names of features that measure no gene: negative probes and codewords of Xenium, CosMx and MERSCOPE, spike-ins."""

ENSEMBL = re.compile(r"ENS[A-Z]*G\d{8,}(\.\d+)?$")
_GENOME = re.compile(
    r"(GRCh3[78]|GRCm3[89]|GRCr8|mRatBN7\.2|hg19|hg38|mm9|mm10|mm39|rn[67])(?:[_-]and[_-]\w+?)?[_-]+(?=.)",
    re.IGNORECASE,
)
_ENSEMBL_SPECIES = re.compile(r"(ENS[A-Z]*)G\d{8,}(\.\d+)?$")
_SYMBOL_COLUMNS = (
    *("feature_name", "gene_symbols", "gene_symbol", "symbol", "symbols", "gene_name", "gene_names", "hgnc_symbol"),
    *("genesymbol", "gene", "name", "features", "gene_short_name", "mgi_symbol"),
)
_MOSTLY = 0.5  # share of names from which on a table is said to have Ensembl names


def tidy_genes(slide: AnnData, notes: dict[str, Any]) -> AnnData:
    """Return a slide with symbols as gene names, the genes of one genome, and no control features.

    Parameters
    ----------
    slide
        Counts in `X`.
    notes
        What was done is added: `symbols_from`, `genomes` (share of the counts by genome), `left_out` (number of
        features by reason), `control_share` (of the counts).
    """
    slide = _without(slide, ~_gene_expression(slide), "other_features", notes)
    if slide.n_vars == 0:
        return slide
    names = pd.Index(slide.var_names.astype(str))
    names = _symbols(slide, names, notes)
    matches = [_GENOME.match(name) for name in names]
    genomes = np.array([match[1] if match else "" for match in matches], dtype=object)
    names = pd.Index([name[match.end() :] if match else name for name, match in zip(names, matches, strict=True)])
    if not (genomes != "").any() and "genome" in slide.var:
        genomes = slide.var["genome"].astype(str).to_numpy(dtype=object)
    if not (genomes != "").any():
        genomes = _genomes_of_ids(slide)
    if not names.equals(pd.Index(slide.var_names.astype(str))):
        slide.var_names = names.astype(str)
    keep = _largest_genome(slide, genomes, notes)
    slide = _without(slide, ~keep, "other_genome", notes)
    controls = np.array([bool(CONTROLS.match(name)) for name in slide.var_names])
    if controls.any() and not controls.all():
        totals = np.asarray(slide.X.sum(axis=0)).ravel()
        notes["control_share"] = float(totals[controls].sum() / max(totals.sum(), 1))
        slide = _without(slide, controls, "control_features", notes)
    if {"symbols_from", "genomes"} & set(notes):
        slide.var_names_make_unique()
    return slide


def _without(slide: AnnData, drop: np.ndarray, reason: str, notes: dict[str, Any]) -> AnnData:
    if not drop.any() or drop.all():
        return slide
    notes.setdefault("left_out", {})[reason] = int(drop.sum())
    return slide[:, ~drop].copy()


def _gene_expression(slide: AnnData) -> np.ndarray:
    """Return which features are genes, by the column that Space Ranger writes; all where there is none."""
    for column in ("feature_types", "feature_type"):
        if column in slide.var:
            kinds = slide.var[column].astype(str).to_numpy()
            genes = kinds == "Gene Expression"
            return genes if genes.any() else np.ones(slide.n_vars, dtype=bool)
    return np.ones(slide.n_vars, dtype=bool)


def _symbols(slide: AnnData, names: pd.Index, notes: dict[str, Any]) -> pd.Index:
    """Return symbols where the names are Ensembl's and a column has symbols; the former names go to `gene_ids`."""
    if np.mean([bool(ENSEMBL.match(_GENOME.sub("", name))) for name in names]) < _MOSTLY:
        return names
    columns = {str(column).lower(): column for column in slide.var}
    for wanted in _SYMBOL_COLUMNS:
        if wanted not in columns:
            continue
        found = slide.var[columns[wanted]].astype(object)
        found = found.where(found.notna() & (found.astype(str).str.strip() != ""), names.to_numpy()).astype(str)
        if np.mean([bool(ENSEMBL.match(name)) for name in found]) < _MOSTLY:
            notes["symbols_from"] = str(columns[wanted])
            slide.var["gene_ids"] = names.to_numpy()
            return pd.Index(found.to_numpy(), dtype=object)
    return names


def _genomes_of_ids(slide: AnnData) -> np.ndarray:
    """Return the species' prefix of Ensembl ids, which are the names or in the column gene_ids; "" for other names."""
    ids = slide.var.get("gene_ids", slide.var_names)
    matches = [_ENSEMBL_SPECIES.match(str(name)) for name in ids]
    return np.array([match[1] if match else "" for match in matches], dtype=object)


def _largest_genome(slide: AnnData, genomes: np.ndarray, notes: dict[str, Any]) -> np.ndarray:
    """Return which genes belong to the genome with the most counts."""
    kinds = sorted(set(genomes) - {"", "nan"})
    if len(kinds) < 2:
        return np.ones(slide.n_vars, dtype=bool)
    totals = np.asarray(slide.X.sum(axis=0)).ravel()
    shares = {kind: float(totals[genomes == kind].sum() / max(totals.sum(), 1)) for kind in kinds}
    notes["genomes"] = shares
    return genomes == max(kinds, key=lambda kind: shares[kind])
