"""A forward pass over some of a panel's genes.

CellFM was pre-trained on changing sets of genes, and a token affects the others only through its key. A gene that is
neither visible nor predicted can therefore be left out.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class GeneSubset:
    """The genes of a panel that have tokens, and those of them whose tokens give keys.

    Attributes
    ----------
    index
        (B, n) numbers of the genes in the panel; None for all, in their order.
    present
        (B, n), 0 = the token gives no key: the others are as they would be without it. None where all give one.
    """

    index: Tensor | None
    present: Tensor | None

    @classmethod
    def of(cls, present: Tensor) -> "GeneSubset | None":
        """Return the subset of the genes present (B, G), 1 = present, padded to equal rows; None if it is all genes."""
        counts = present.sum(dim=1)
        most = max(1, int(counts.max()))
        ragged = int(counts.min()) < most
        if most == present.shape[1]:
            return cls(None, present) if ragged else None
        index = present.argsort(dim=1, descending=True, stable=True)[:, :most]
        return cls(index, present.gather(1, index) if ragged else None)

    def gather(self, values: Tensor) -> Tensor:
        """Return the values (B, n) of the subset from those (B, G) of the panel."""
        return values if self.index is None else values.gather(1, self.index)

    def scatter(self, values: Tensor, into: Tensor) -> Tensor:
        """Return `into` (B, G, …) with `values` (B, n, …) in the places of their genes; only with an index."""
        assert self.index is not None
        index = self.index.view(*self.index.shape, *[1] * (values.dim() - 2)).expand_as(values)
        return into.scatter(1, index, values)
