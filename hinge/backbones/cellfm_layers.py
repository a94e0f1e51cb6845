"""The layers of CellFM."""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hinge.backbones.base import ResidualBlock
from hinge.backbones.cellfm_config import CellFMConfig


class ValueEncoder(nn.Module):
    """Embed a value as a soft mixture of learned embeddings (CellFM's auto-discretisation)."""

    def __init__(self, hidden_size: int, num_bins: int, negative_slope: float):
        super().__init__()
        self.negative_slope = negative_slope
        self.to_bins = nn.Linear(1, num_bins, bias=False)
        self.mix_bins = nn.Linear(num_bins, num_bins, bias=False)
        self.table = nn.Linear(num_bins, hidden_size, bias=False)
        self.skip = nn.Parameter(torch.zeros(1, 1))

    def forward(self, values: Tensor) -> Tensor:
        """values (B, G) → embeddings (B, G, D)."""
        bins = F.leaky_relu(self.to_bins(values.unsqueeze(-1)), self.negative_slope)
        return self.table(torch.softmax(self.mix_bins(bins) + bins * self.skip, dim=-1))


class Retention(nn.Module):
    """Multi-head linear attention: O = Q(KᵀV), normalised per head and gated."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        # query, key, value and gate in one product; the published weights hold them separately
        self.qkvu = nn.Linear(hidden_size, 4 * hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor, key_mask: Tensor | None, value_scale: Tensor | float) -> Tensor:
        """x (B, N, D) → (B, N, D); key_mask (B, N) is 0 for tokens without a key, value_scale a number or (B, 1, 1)."""
        query, key, value, gate = self.qkvu(x).chunk(4, dim=-1)
        root = (x.shape[-1] // self.num_heads) ** 0.5
        query = F.relu(query) / root
        key = F.relu(key) / root
        if key_mask is not None:
            key = key * key_mask.unsqueeze(-1).to(key.dtype)
        value = value * value_scale
        query, key, value = (rearrange(y, "b n (h d) -> b h n d", h=self.num_heads) for y in (query, key, value))
        mixed = query @ (key.transpose(-2, -1) @ value)
        # root-mean-square norm without a learned scale, in at least float32: its square overflows half precision
        mixed = mixed.to(torch.promote_types(mixed.dtype, torch.float32))
        rms = mixed.norm(dim=-1, keepdim=True) * (1 / root)
        mixed = (mixed / rms.clamp_min(1e-12)).to(x.dtype)
        return self.out(rearrange(mixed, "b h n d -> b n (h d)") * (gate * gate.sigmoid()))


class GatedLinearUnit(nn.Module):
    """o(u(x) ⊙ v(x)), no biases."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.uv = nn.Linear(hidden_size, 2 * hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.uv(x).chunk(2, dim=-1)
        return self.out(u * v)


class RetentionBlock(ResidualBlock):
    """One layer: LN(λh + retention(h)), LN(λh + glu(h)), λ = (2L)^¼."""

    fused = True

    def __init__(self, config: CellFMConfig):
        super().__init__()
        self.retention = Retention(config.hidden_size, config.num_attention_heads)
        self.feed_forward = GatedLinearUnit(config.hidden_size)
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.residual_scale = (2 * config.num_hidden_layers) ** 0.25

    def enter(self, number: int, h: Tensor) -> Tensor:
        """Return the tokens as they are: norms follow the residuals."""
        return h

    def sublayer(self, number: int, x: Tensor, *seen: Any) -> Tensor:
        """Return retention (0) or the gated linear unit (1) of x (B, N, D); `seen` as of `forward`."""
        return self.retention(x, *seen) if number == 0 else self.feed_forward(x)

    def leave(self, number: int, h: Tensor, update: Tensor) -> Tensor:
        """Return LN(λh + update)."""
        return (self.norm1, self.norm2)[number](torch.add(update, h, alpha=self.residual_scale))

    def forward(self, h: Tensor, key_mask: Tensor | None, value_scale: Tensor | float) -> Tensor:
        """h (B, N, D) → (B, N, D)."""
        # as the published code computes it, bit for bit; `leave` fuses the product and the sum
        h = self.norm1(h * self.residual_scale + self.retention(h, key_mask, value_scale))
        return self.norm2(h * self.residual_scale + self.feed_forward(h))


class GeneDecoder(nn.Module):
    """Decode each token to a value: w₂(leaky(w₁h))."""

    def __init__(self, hidden_size: int, negative_slope: float):
        super().__init__()
        self.negative_slope = negative_slope
        self.hidden = nn.Linear(hidden_size, hidden_size, bias=False)
        self.output = nn.Linear(hidden_size, 1, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, G, D) → values (B, G)."""
        return self.output(F.leaky_relu(self.hidden(tokens), self.negative_slope)).squeeze(-1)
