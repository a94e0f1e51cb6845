"""Genes that the same slides measured, which are fitted together to the spots of these slides."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hinge.data.spots import SpotTable, spot_groups

MOST_PARTS = 24
"""Sets of slides that are told apart; the genes of others are fitted to a part of their slides."""


@dataclass(frozen=True, eq=False)
class GenePart:
    """Some genes, and spots that all have them.

    Attributes
    ----------
    rows
        Numbers of the spots.
    columns
        Numbers of the genes.
    groups
        (rows,) groups that stay together in cross-validation, see `spot_groups`.
    """

    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    groups: NDArray[np.str_]


def gene_parts(spots: SpotTable) -> list[GenePart]:
    """Return the genes of a panel in parts, those that most genes are in first; a single one if all slides have all.

    Raises
    ------
    ValueError
        No slide has one of the genes.
    """
    found = spots.measured_slides()
    if found is None:
        every = np.arange(len(spots)), np.arange(len(spots.genes))
        return [GenePart(*every, spot_groups(spots.slide, spots.coords, "fold"))]
    of_slides, slide_of = found
    if not of_slides.any(axis=0).all():
        raise ValueError(f"no slide has the gene {spots.genes[int(of_slides.any(axis=0).argmin())]}")
    parts = []
    for columns, slides in slide_sets(of_slides):
        rows = np.flatnonzero(slides[slide_of])
        parts.append(GenePart(rows, columns, spot_groups(spots.slide[rows], spots.coords[rows], "fold")))
    return parts


def slide_sets(of_slides: NDArray[np.bool_]) -> list[tuple[NDArray[np.int64], NDArray[np.bool_]]]:
    """Return sets of genes, and slides (S,) that have all genes of a set; sets with most genes first.

    of_slides is (S, G), whether a slide measured a gene.
    """
    sets, of_genes = np.unique(of_slides.T, axis=0, return_inverse=True)
    of_genes, slides_of_set = _merged(sets, of_genes.ravel())
    found = [(np.flatnonzero(of_genes == number), slides_of_set[number]) for number in np.unique(of_genes)]
    return sorted(found, key=lambda each: -len(each[0]))


def _merged(sets: NDArray[np.bool_], of_genes: NDArray) -> tuple[NDArray, NDArray[np.bool_]]:
    """Return the set (G,) of each gene and the slides (N, S) of each set, after rare sets have joined common ones.

    A rare set joins the common one that has most of its slides and no other, or has one of its slides alone.
    """
    counts = np.bincount(of_genes, minlength=len(sets))
    if len(sets) <= MOST_PARTS:
        return of_genes, sets
    common = np.argsort(-counts, kind="stable")[:MOST_PARTS]
    alone = np.eye(sets.shape[1], dtype=bool)
    kept = np.unique(np.concatenate([sets[common], alone]), axis=0)
    others = (~sets).astype(np.float32) @ kept.T.astype(np.float32)  # slides of a kept set that a set lacks
    within = others == 0
    chosen = np.where(within, kept.sum(axis=1), 0).argmax(axis=1)
    return chosen[of_genes], kept
