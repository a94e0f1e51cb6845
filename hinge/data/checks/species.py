"""The species of a slide, by its genes and by its metadata."""

import re
from collections.abc import Iterable

import numpy as np
from anndata import AnnData

_MOSTLY = 0.7
_NAMES = {
    "human": ("homo sapiens", "human", "grch37", "grch38", "hg19", "hg38"),
    "mouse": ("mus musculus", "mouse", "grcm38", "grcm39", "mm9", "mm10", "mm39"),
}


def species_of_genes(genes: Iterable[str]) -> str:
    """Return "human" for symbols in capitals, "mouse" for capitalised ones (rats' too), "" where neither is clear."""
    words = [gene for gene in genes if re.match(r"[A-Za-z]{3}", gene) and not gene.startswith("ENS")]
    ensembl = [match[1] for gene in genes if (match := re.match(r"ENS(MUS|)G\d{8,}", gene))]
    if len(ensembl) > len(words):
        return "mouse" if np.mean([species == "MUS" for species in ensembl]) > _MOSTLY else "human"
    if len(words) < 10:
        return ""
    if np.mean([word[:3].isupper() for word in words]) > _MOSTLY:
        return "human"
    return "mouse" if np.mean([word[0].isupper() and word[1:3].islower() for word in words]) > _MOSTLY else ""


def stated_species(slide: AnnData) -> str:
    """Return the species in the metadata or in the column genome, "human" or "mouse"; "" for others."""
    told = str(slide.uns["hinge"].get("source", {}).get("species", "")).lower()
    if not told and "genome" in slide.var and slide.n_vars:
        told = str(slide.var["genome"].iloc[0]).lower()
    return next((species for species, names in _NAMES.items() if any(name in told for name in names)), "")
