"""The layers of transformers over genes: scGPT, scGPT-spatial and Tahoe-x1."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hinge.backbones.base import ResidualBlock

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,  # the exact one
    "leaky_relu": F.leaky_relu,  # slope 0.01
}


class ContinuousValueEncoder(nn.Module):
    """Embed a real number by a network of two layers and a layer norm.

    Parameters
    ----------
    hidden_size
        D.
    activation
        Name in `ACTIVATIONS`.
    max_value
        Larger values are clamped to it.
    eps
        Of the layer norm.
    """

    def __init__(self, hidden_size: int, activation: str, max_value: float, eps: float):
        super().__init__()
        self.activation, self.max_value = activation, max_value
        self.linear1 = nn.Linear(1, hidden_size)
        self.linear2 = nn.Linear(hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=eps)

    def forward(self, values: Tensor) -> Tensor:
        """values (B, N) → embeddings (B, N, D)."""
        x = values.clamp(max=self.max_value).unsqueeze(-1)
        return self.norm(self.linear2(ACTIVATIONS[self.activation](self.linear1(x))))


class SelfAttention(nn.Module):
    """Multi-head softmax attention, with query, key and value in one product."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, allowed: Tensor | None, without_out: Tensor | None) -> Tensor:
        """x (B, N, D) → (B, N, D).

        `allowed` (B, 1, N, N) is True where a query, in rows, sees a key; None: everywhere. Rows of `without_out`
        (B, N, 1) skip the output product; None: no row does.
        """
        query, key, value = rearrange(self.qkv(x), "b n (part h d) -> part b h n d", part=3, h=self.num_heads)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
        mixed = rearrange(mixed, "b h n d -> b n (h d)")
        out = self.out(mixed)
        return out if without_out is None else torch.where(without_out, mixed, out)


class FeedForward(nn.Module):
    """down(act(up(x)))."""

    def __init__(self, hidden_size: int, inner_size: int, activation: str):
        super().__init__()
        self.activation = activation
        self.up = nn.Linear(hidden_size, inner_size)
        self.down = nn.Linear(inner_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, D) → (B, N, D)."""
        return self.down(ACTIVATIONS[self.activation](self.up(x)))


class TransformerBlock(ResidualBlock):
    """One layer: attention and a feed-forward network.

    Post-norm: h = LN₁(h + attention(h)), h = LN₂(h + feed-forward(h)). Pre-norm: h = h + attention(LN₁(h)),
    h = h + feed-forward(LN₂(h)).
    """

    def __init__(self, hidden_size: int, num_heads: int, inner_size: int, activation: str, eps: float, pre_norm: bool):
        super().__init__()
        self.pre_norm = pre_norm
        self.attention = SelfAttention(hidden_size, num_heads)
        self.feed_forward = FeedForward(hidden_size, inner_size, activation)
        self.norm1 = nn.LayerNorm(hidden_size, eps=eps)
        self.norm2 = nn.LayerNorm(hidden_size, eps=eps)

    def _norm(self, number: int, h: Tensor) -> Tensor:
        return (self.norm1, self.norm2)[number](h)

    def enter(self, number: int, h: Tensor) -> Tensor:
        """Return the tokens as sublayer `number` takes them, see `ResidualBlock`."""
        return self._norm(number, h) if self.pre_norm else h

    def sublayer(self, number: int, x: Tensor, *seen: Tensor | None) -> Tensor:
        """Return attention (0) or feed-forward (1) of x (B, N, D)."""
        return self.attention(x, *seen) if number == 0 else self.feed_forward(x)

    def leave(self, number: int, h: Tensor, update: Tensor) -> Tensor:
        """Return the sum of tokens and update, see `ResidualBlock`."""
        h = h + update
        return h if self.pre_norm else self._norm(number, h)


class ValueDecoder(nn.Module):
    """Decode each token to a number by a network with some hidden layers of the same width."""

    def __init__(self, hidden_size: int, num_hidden: int, activation: str):
        super().__init__()
        self.activation = activation
        self.hidden = nn.ModuleList(nn.Linear(hidden_size, hidden_size) for _ in range(num_hidden))
        self.output = nn.Linear(hidden_size, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, N, D) → values (B, N)."""
        for layer in self.hidden:
            tokens = ACTIVATIONS[self.activation](layer(tokens))
        return self.output(tokens).squeeze(-1)


class ExpertDecoder(nn.Module):
    """Decode each token by the experts with the largest gates, whose softmax is divided by its sum over them."""

    def __init__(self, hidden_size: int, num_experts: int, num_chosen: int, num_hidden: int, activation: str):
        super().__init__()
        self.num_chosen = num_chosen
        self.gate = nn.Linear(hidden_size, num_experts)
        self.experts = nn.ModuleList(ValueDecoder(hidden_size, num_hidden, activation) for _ in range(num_experts))

    def gates(self, tokens: Tensor) -> Tensor:
        """tokens (B, N, D) → softmax of the gate (B, N, E)."""
        return self.gate(tokens).softmax(dim=-1)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, N, D) → values (B, N)."""
        gates = self.gates(tokens)
        largest, index = gates.topk(self.num_chosen, dim=-1)
        kept = torch.zeros_like(gates).scatter(-1, index, largest / largest.sum(dim=-1, keepdim=True))
        return (kept * torch.stack([expert(tokens) for expert in self.experts], dim=-1)).sum(dim=-1)


class CellDecoder(nn.Module):
    """Decode the genes' embeddings g and the cell's embedding c to values: W·sigmoid(query(g)) · c, times a scale."""

    def __init__(self, hidden_size: int, scale: float):
        super().__init__()
        self.scale = scale
        self.query = nn.Linear(hidden_size, hidden_size)
        self.product = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, cell: Tensor, genes: Tensor) -> Tensor:
        """cell (B, D), genes (B, N, D) → values (B, N)."""
        return (self.product(self.query(genes).sigmoid()) @ cell.unsqueeze(-1)).squeeze(-1) * self.scale


class DrugEncoder(nn.Module):
    """Embed a drug by its chemical fingerprint."""

    def __init__(self, num_drugs: int, fingerprint_size: int, hidden_size: int, activation: str, eps: float):
        super().__init__()
        self.activation = activation
        self.fingerprints = nn.Embedding(num_drugs, fingerprint_size)
        self.linear1 = nn.Linear(fingerprint_size, hidden_size)
        self.linear2 = nn.Linear(hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=eps)

    def forward(self, drug_ids: Tensor) -> Tensor:
        """drug_ids (B,) → embeddings (B, D)."""
        inner = ACTIVATIONS[self.activation](self.linear1(self.fingerprints(drug_ids)))
        return self.norm(self.linear2(inner))
