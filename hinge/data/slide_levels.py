"""The level of whole slides: composition over genes, library size and mean values, of slides with or without images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
from numpy.typing import NDArray

from hinge.data.transforms import get_transform

NUM_RATIOS = 7
"""Quantiles that describe how library sizes of the spots of a slide spread around their mean."""

COMPOSITION_TARGET = 1e4


@dataclass(frozen=True, eq=False)
class SlideLevels:
    """One row a slide.

    Attributes
    ----------
    sample, patient
        Names, str (S,).
    composition
        log2(1 + 10,000 · share), with the share of each gene in all counts of the slide (a pseudo-bulk), float64
        (S, G); NaN where the slide lacks the gene.
    values
        Mean over spots of the transformed counts, float64 (S, G); NaN likewise.
    library_size
        Mean over spots of the counts over all genes, float64 (S,).
    ratios
        Quantiles of the spots' library sizes, at the middle of `NUM_RATIOS` equal shares, divided by their mean;
        float64 (S, NUM_RATIOS).
    num_spots
        int (S,).
    tokens
        Which categories the slides have, float64 (S, T), see `hinge.data.condition_tokens.ConditionTokens.known`.
    """

    sample: NDArray[np.str_]
    patient: NDArray[np.str_]
    composition: NDArray[np.float64]
    values: NDArray[np.float64]
    library_size: NDArray[np.float64]
    ratios: NDArray[np.float64]
    num_spots: NDArray[np.int64]
    tokens: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.sample)

    @classmethod
    def of_spots(
        cls,
        counts: NDArray,
        library_size: NDArray,
        samples: NDArray,
        patients: NDArray,
        transform: str,
        tokens: Mapping[str, NDArray] | None = None,
    ) -> Self:
        """Return the levels of the slides that spots are on.

        Parameters
        ----------
        counts
            (n, G), NaN where a slide lacks a gene.
        library_size
            (n,) counts over all genes.
        samples, patients
            (n,) names of the slide and the patient of each spot.
        transform
            Name of the transform.
        tokens
            Sample → its categories (T,); None for no tokens.
        """
        names, first = np.unique(np.asarray(samples).astype(str), return_index=True)
        rows = [np.flatnonzero(samples == name) for name in names]
        sizes = [np.maximum(np.asarray(library_size, dtype=np.float64)[each], 1) for each in rows]
        of_slides = [np.asarray(counts)[each] for each in rows]
        forward = get_transform(transform).forward
        means = [
            forward(each, size).mean(axis=0, dtype=np.float64) for each, size in zip(of_slides, sizes, strict=True)
        ]
        shares = [each.sum(axis=0, dtype=np.float64) / size.sum() for each, size in zip(of_slides, sizes, strict=True)]
        return cls(
            names,
            np.asarray(patients).astype(str)[first],
            composition_of_shares(np.stack(shares)),
            np.stack(means),
            np.array([size.mean() for size in sizes]),
            np.stack([library_ratios(size) for size in sizes]),
            np.array([len(each) for each in rows]),
            np.stack([np.zeros(0) if tokens is None else tokens[name] for name in names.tolist()]),
        )

    def joined(self, other: "SlideLevels") -> "SlideLevels":
        """Return these slides and those of `other` that are not among them."""
        new = ~np.isin(other.sample, self.sample)
        of_new = SlideLevels(**{each.name: getattr(other, each.name)[new] for each in fields(self)})
        return SlideLevels.concatenated([self, of_new])

    @classmethod
    def concatenated(cls, parts: "Sequence[SlideLevels]") -> Self:
        """Return the levels of slides, no two of which are the same, in the order of their names."""
        arrays = {each.name: np.concatenate([getattr(part, each.name) for part in parts]) for each in fields(cls)}
        return cls(**arrays)


def composition_of_shares(shares: NDArray) -> NDArray[np.float64]:
    """Return log2(1 + 10,000 · share) of shares of all counts (…, G)."""
    return np.log1p(COMPOSITION_TARGET * np.asarray(shares, dtype=np.float64)) / np.log(2)


def shares_of_composition(composition: NDArray) -> NDArray[np.float64]:
    """Return the shares (…, G) of a composition (…, G); below 0 it is 0."""
    return np.expm1(np.maximum(composition, 0.0) * np.log(2)) / COMPOSITION_TARGET


def library_ratios(library_size: NDArray) -> NDArray[np.float64]:
    """Return the quantiles (`NUM_RATIOS`,) of library sizes (n,) in units of their mean."""
    size = np.asarray(library_size, dtype=np.float64)
    return np.quantile(size, (np.arange(NUM_RATIOS) + 0.5) / NUM_RATIOS) / max(size.mean(), 1e-12)
