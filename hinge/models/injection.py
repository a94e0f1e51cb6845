"""Alternatives to SoftAdaLN for conditioning the frozen layers, for comparison.

Both treat the parts of the condition (timestep, features, visible genes) as tokens of the backbone's width, and do not
change the layers.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hinge.backbones.base import ExpressionBackbone
from hinge.models.soft_adaln import SoftAdaLN


class Concatenation(nn.Module):
    """Prepend the parts of the condition to the tokens of the genes, as keys in every layer.

    The initial token is the CLS token plus the part of the condition, not zero, because a layer norm follows every
    sublayer. At initialisation the model is therefore close to its backbone, but not equal to it.

    Parameters
    ----------
    hidden_size, num_parts
        D and C.
    """

    def __init__(self, hidden_size: int, num_parts: int):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(num_parts, hidden_size))

    def forward(
        self,
        backbone: ExpressionBackbone,
        h: Tensor,
        parts: Tensor,
        seen: Sequence[tuple],
        run: Callable[..., Tensor],
        first: int | None = None,
    ) -> Tensor:
        """Return the tokens after the layers.

        Parameters
        ----------
        backbone
            Its layers are computed.
        h
            (B, N, D) tokens, CLS first.
        parts
            (B, C, D) parts of the condition.
        seen
            Further arguments of each layer.
        run
            `run(function, *arguments)` computes a layer, with or without gradient checkpointing.
        first
            Number of tokens that are returned, from the first one; None: all.

        Returns
        -------
        Tensor
            (B, N, D).
        """
        tokens = h[:, :1] + (parts + self.position).to(h.dtype)
        h = torch.cat([tokens, h], dim=1)
        count = parts.shape[1]
        for block, inputs in zip(backbone.layers, seen, strict=True):
            h = run(block, h, *backbone.with_prefix(inputs, count))
        return backbone.finish(h[:, count:][:, :first])


class CrossAttention(nn.Module):
    """Add to every token, after every layer, its attention to the parts of the condition; zero at initialisation.

    Parameters
    ----------
    hidden_size, num_layers, num_parts
        D, L and C.
    dropout
        Dropout rate of the added term.
    """

    HEAD_WIDTH = 32

    def __init__(self, hidden_size: int, num_layers: int, num_parts: int, dropout: float):
        super().__init__()
        heads = next(n for n in range(max(1, hidden_size // self.HEAD_WIDTH), 0, -1) if hidden_size % n == 0)
        self.dropout = dropout
        self.position = nn.Parameter(0.02 * torch.randn(num_parts, hidden_size))
        self.norm = nn.LayerNorm(hidden_size)
        self.attention = nn.ModuleList(
            nn.MultiheadAttention(hidden_size, heads, batch_first=True) for _ in range(num_layers)
        )
        for layer in self.attention:
            nn.init.zeros_(layer.out_proj.weight)

    def forward(
        self,
        backbone: ExpressionBackbone,
        h: Tensor,
        parts: Tensor,
        seen: Sequence[tuple],
        run: Callable[..., Tensor],
        first: int | None = None,
    ) -> Tensor:
        """Return the tokens after the layers; arguments as of `Concatenation`."""
        context = self.norm(parts + self.position)

        def layer(block, attention, h, *inputs):
            h = block(h, *inputs)
            tokens = h.to(context.dtype)
            added, _ = attention(tokens, context, context, need_weights=False)
            return h + F.dropout(added, self.dropout, self.training).to(h.dtype)

        for block, attention, inputs in zip(backbone.layers, self.attention, seen, strict=True):
            h = run(layer, block, attention, h, *inputs)
        return backbone.finish(h[:, :first])


def make_injection(
    injection: str,
    sizes: tuple[int, int, int],
    modulation_rank: int | None,
    gate: str,
    norm: str,
    start: str,
    dropout: float,
) -> nn.Module:
    """Return the module through which a condition enters the backbone.

    Parameters
    ----------
    injection
        `"soft_adaln"`, `"adaln_zero"`, `"concatenation"` or `"cross_attention"`.
    sizes
        D, number of layers, and C, the parts of the condition.
    modulation_rank, gate, norm, start, dropout
        Of SoftAdaLN. AdaLN-Zero has its own gate, norm and start.
    """
    hidden_size, num_layers, num_parts = sizes
    if injection == "concatenation":
        return Concatenation(hidden_size, num_parts)
    if injection == "cross_attention":
        return CrossAttention(hidden_size, num_layers, num_parts, dropout)
    if injection == "adaln_zero":
        gate, norm, start = "linear", "layer", "closed"
    return SoftAdaLN(hidden_size, num_layers, modulation_rank, gate, norm, start, dropout)
