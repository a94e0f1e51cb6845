"""Checks of counts and genes."""

import re
from collections.abc import Callable, Iterator

import numpy as np
from anndata import AnnData

from hinge.data.checks.findings import Context, Finding
from hinge.data.checks.species import species_of_genes, stated_species
from hinge.data.counts_source import no_counts

_ENSEMBL = re.compile(r"ENS[A-Z]*G\d{8,}")


def counts(slide: AnnData, context: Context) -> Iterator[Finding]:
    """Find whole numbers that are no counts, counts from elsewhere than X, and empty spots."""
    if not slide.n_vars:
        return
    where = str(slide.uns["hinge"].get("source", {}).get("counts", "X"))
    if where == "raw" or (where.startswith("layers") and where != "layers['counts']"):
        yield Finding(
            "warning",
            "counts-elsewhere",
            f"raw counts are taken from {where}, because X does not hold counts",
            "put raw counts into X or layers['counts'] if these are others",
        )
    if wrong := no_counts(slide.X):
        yield Finding(
            "error" if "above 1" not in wrong else "warning",
            "counts-not-raw",
            f"the values are whole numbers but no counts of molecules: {wrong}",
            "give the counts as they were measured, neither normalised nor made binary",
        )
    empty = int((np.asarray(slide.X.sum(axis=1)).ravel() == 0).sum())
    if empty > slide.n_obs / 2:
        yield Finding(
            "warning",
            "counts-empty",
            f"{empty} of {slide.n_obs} spots have no counts",
            "take spots on tissue, or larger bins with --sample",
        )


def genes(slide: AnnData, context: Context) -> Iterator[Finding]:
    """Find control features, genes of two genomes, and Ensembl names without symbols."""
    source = slide.uns["hinge"].get("source", {})
    if controls := int(source.get("left_out", {}).get("control_features", 0)):
        yield Finding(
            "warning",
            "genes-controls",
            f"{controls} control features with {source.get('control_share', 0):.2%} of the counts are left out",
            "nothing, unless genes have such names: rename them",
        )
    shares = source.get("genomes", {})
    if len(shares) > 1:
        told = ", ".join(f"{name} {share:.0%}" for name, share in sorted(shares.items(), key=lambda item: -item[1]))
        yield Finding(
            "warning",
            "genes-two-genomes",
            f"the genes are of {len(shares)} genomes ({told} of the counts), and those of the first are kept",
            "leave spots of the other species out of the file",
        )
    named = sum(bool(_ENSEMBL.match(name)) for name in slide.var_names)
    if slide.n_vars and named > slide.n_vars / 2:
        yield Finding(
            "warning",
            "genes-ensembl",
            f"{named} of {slide.n_vars} genes have Ensembl names, such as {slide.var_names[0]}, and no column has "
            "symbols",
            "add a column gene_symbols to var",
        )


def species(slide: AnnData, context: Context) -> Iterator[Finding]:
    """Find genes of another species than the slide's metadata or the panel say, and a panel that the slide lacks."""
    found, stated = species_of_genes(slide.var_names), stated_species(slide)
    if found and stated and found != stated:
        yield Finding(
            "warning",
            "genes-species",
            f"the metadata say {stated}, and the genes are those of {found}, such as {slide.var_names[0]}",
            "take counts and metadata of the same sample",
        )
    if not context.panel or not slide.n_vars:
        return
    missing = [gene for gene in context.panel if gene not in slide.var_names]
    wanted = species_of_genes(context.panel)
    if found and wanted and found != wanted and len(missing) > len(context.panel) / 2:
        yield Finding(
            "error",
            "genes-species",
            f"the genes are those of {found}, such as {slide.var_names[0]}, and the panel is of {wanted}, such as "
            f"{context.panel[0]}",
            "take slides of one species, or give a panel of this species (panel.file)",
        )
    elif missing:
        yield Finding(
            "error",
            "genes-panel",
            f"the slide lacks {len(missing)} of the panel's {len(context.panel)} genes: {', '.join(missing[:5])}",
            "leave them out of the panel",
        )


EXPRESSION_CHECKS: tuple[Callable[[AnnData, Context], Iterator[Finding]], ...] = (counts, genes, species)
