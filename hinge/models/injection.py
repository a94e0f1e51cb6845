"""Other ways for a condition to reach the frozen layers, to compare SoftAdaLN with.

Both take the parts of the condition (timestep, features, visible genes) as tokens of the backbone's width, and leave
the layers themselves as they are.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hinge.backbones.base import ExpressionBackbone


class Concatenation(nn.Module):
    """The parts of the condition are further tokens before those of the genes, and give keys in every layer.

    Each starts as the CLS token plus its part of the condition: a layer norm follows every sublayer, so that no token
    can start at zero. The model therefore starts near its backbone, not equal to it.

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
    ) -> Tensor:
        """Take tokens through the layers.

        Parameters
        ----------
        backbone
            Its layers are computed.
        h
            (B, N, D) tokens, CLS in front.
        parts
            (B, C, D) of the condition.
        seen
            What each layer takes beside the tokens.
        run
            run(function, *arguments) computes a layer.

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
        return backbone.finish(h[:, count:])


class CrossAttention(nn.Module):
    """After every layer each token attends to the parts of the condition; the output starts at zero.

    Parameters
    ----------
    hidden_size, num_layers, num_parts
        D, L and C.
    dropout
        On what is added, in training.
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
    ) -> Tensor:
        """Arguments and result as those of `Concatenation`."""
        context = self.norm(parts + self.position)

        def layer(block, attention, h, *inputs):
            h = block(h, *inputs)
            tokens = h.to(context.dtype)
            added, _ = attention(tokens, context, context, need_weights=False)
            return h + F.dropout(added, self.dropout, self.training).to(h.dtype)

        for block, attention, inputs in zip(backbone.layers, self.attention, seen, strict=True):
            h = run(layer, block, attention, h, *inputs)
        return backbone.finish(h)
