"""A forward pass over some of a panel's genes.

CellFM was pre-trained on changing sets of genes, and a token affects the others only through its key. A gene that is
neither visible nor predicted can therefore be left out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# on CPUs the C library keeps freed tensors up to 256 MB for the next ones (`hinge.utils.threads`); to clear the memory
# of larger ones takes longer than to compute them. The largest tensor of a layer is four times that of the tokens
MOST_NUMBERS = {"cpu": 2**23, "other": 2**25}
"""Numbers in the tokens of a forward pass on a type of device, at most, unless a single spot has more."""


def spots_at_a_time(most: int, num_genes: int, hidden_size: int, device: torch.device) -> int:
    """Return the number of spots in a forward pass over G genes with tokens of D numbers, at most `most`."""
    numbers = MOST_NUMBERS["cpu" if device.type == "cpu" else "other"]
    return max(1, min(most, numbers // (num_genes * hidden_size)))


@dataclass
class GeneSubset:
    """The genes of a panel that have tokens, and those of them whose tokens give keys.

    Attributes
    ----------
    index
        (B, n) numbers of the genes in the panel; None for all, in their order.
    present
        (B, n), 0 = the token gives no key: the others are as they would be without it. None where all give one.
    wanted
        m: only the first m genes of the index are predicted, and the last layer computes no others. None: all.
    """

    index: Tensor | None
    present: Tensor | None
    wanted: int | None = None

    @classmethod
    def of(cls, present: Tensor, multiple: int = 1, known: Tensor | None = None) -> "GeneSubset | None":
        """Return the subset of the genes present (B, G), 1 = present, padded to equal rows; None if it is all genes.

        The number of genes n is rounded up to a multiple: then few shapes occur, as CUDA graphs need it. Genes that are
        `known` (B, G; 1 = known) need no prediction: they come last, and the subset has an index if it is all genes.
        """
        counts = present.sum(dim=1)
        # read back together: each reading makes the host wait for the device
        least, most = (int(count) for count in torch.stack([counts.min(), counts.max()]).tolist())
        most = min(max(1, -(-most // multiple) * multiple), present.shape[1])
        ragged = multiple > 1 or least < most
        order, wanted = present, None
        if known is not None:
            asked = present * (1 - known)
            order, wanted = present + asked, max(1, int(asked.sum(dim=1).max()))
        if most == present.shape[1] and wanted in (None, most):
            return cls(None, present) if least < most else None
        index = order.argsort(dim=1, descending=True, stable=True)[:, :most]
        return cls(index, present.gather(1, index) if ragged else None, wanted)

    @classmethod
    def chosen(cls, present: Tensor | None, index: Tensor | None, num_spots: int) -> "GeneSubset | None":
        """Return the subset of genes (n,) for all spots, with those present (B, G); None if it is all genes."""
        if index is None:
            return None if present is None else cls(None, present)
        index = index.expand(num_spots, -1)
        return cls(index, None if present is None else present.gather(1, index))

    @property
    def predicted(self) -> "GeneSubset":
        """The subset without the genes that are not wanted."""
        if self.wanted is None or self.index is None:
            return self
        return GeneSubset(self.index[:, : self.wanted], None)

    def gather(self, values: Tensor) -> Tensor:
        """Return the values (B, n) of the subset from those (B, G) of the panel."""
        return values if self.index is None else values.gather(1, self.index)

    def scatter(self, values: Tensor, into: Tensor) -> Tensor:
        """Return `into` (B, G, …) with `values` (B, n, …) in the places of their genes; only with an index."""
        assert self.index is not None
        index = self.index.view(*self.index.shape, *[1] * (values.dim() - 2)).expand_as(values)
        return into.scatter(1, index, values)
