"""SoftAdaLN: shifts, scales and gates of every layer of a frozen backbone from one condition vector."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from hinge.backbones.base import ExpressionBackbone, ResidualBlock
from hinge.models import kernels

TIME_WIDTH = 256
SOFT_NORM_EPS = 1e-6


class ConditionEmbedding(nn.Module):
    """The condition vector z = MLP(sinusoidal(t)) + MLP(features) [+ MLP(visible genes)].

    Parameters
    ----------
    feature_dim, num_genes, hidden_size
        d, G and D.
    with_mask
        Whether the visible genes are part of the condition.
    """

    def __init__(self, feature_dim: int, num_genes: int, hidden_size: int, with_mask: bool):
        super().__init__()

        def mlp(width: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(width, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

        self.time = mlp(TIME_WIDTH)
        self.features = mlp(feature_dim)
        self.visible = mlp(num_genes) if with_mask else None
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, timestep: Tensor, features: Tensor, visible: Tensor) -> Tensor:
        """Return the C terms of z, (B, C, D), for timestep (B,), features (B, d) and visible (B, G)."""
        dtype = self.time[0].weight.dtype
        wave = get_timestep_embedding(timestep, TIME_WIDTH, flip_sin_to_cos=True, downscale_freq_shift=0)
        parts = [self.time(wave.to(dtype)), self.features(features.to(dtype))]
        if self.visible is not None:
            parts.append(self.visible(visible.to(dtype)))
        return torch.stack(parts, dim=1)


class SoftAdaLN(nn.Module):
    """Shifts, scales and gates of all layers and of the decoder from one condition vector.

    One matrix product gives (shift_a, scale_a, gate_a, shift_f, scale_f, gate_f) for each layer and (shift, scale)
    before the decoder. The weight starts at zero, and so does the bias except that of the gates: 6 where a sigmoid
    follows (σ(6) = 0.9975), 1 elsewhere. The layers therefore start as those of the backbone.

    Parameters
    ----------
    hidden_size, num_layers
        D and L of the backbone.
    rank
        None for a full matrix (L·6D² weights), or the rank of a factorisation per layer.
    gate
        `"sigmoid"` or `"linear"`.
    norm
        Norm of the tokens before shift and scale: `"soft"`, SoftNorm; `"layer"`, LayerNorm without affine parameters;
        `"none"`.
    start
        `"identity"` as above; `"random"`: weights N(0, 0.02) and every bias at zero; `"closed"`: weights and biases
        at zero, so that with the linear gate no sublayer contributes (AdaLN-Zero: Peebles and Xie, ICCV 2023).
    dropout
        On the output of every sublayer, in training.

    References
    ----------
    Fang et al., HINGE, CVPR 2026 (arXiv 2603.19766).
    """

    def __init__(
        self,
        hidden_size: int,
        num_layers: int,
        rank: int | None,
        gate: str,
        norm: str = "soft",
        start: str = "identity",
        dropout: float = 0.0,
    ):
        super().__init__()
        self.hidden_size, self.num_layers, self.rank, self.gate, self.norm = hidden_size, num_layers, rank, gate, norm
        self.dropout, self.fused = dropout, True
        outputs = (6 * num_layers + 2) * hidden_size
        if rank is None:
            self.weight = nn.Parameter(torch.zeros(outputs, hidden_size))
        else:
            # one group of `rank` inner units for each layer and one for the decoder
            self.down = nn.Linear(hidden_size, (num_layers + 1) * rank, bias=False)
            self.up = nn.Parameter(torch.zeros(num_layers, 6 * hidden_size, rank))
            self.up_decoder = nn.Parameter(torch.zeros(2 * hidden_size, rank))
        bias = torch.zeros(6 * num_layers + 2, hidden_size)
        if start == "identity":
            open_gate = 6.0 if gate == "sigmoid" else 1.0
            bias[2 : 6 * num_layers : 6] = open_gate
            bias[5 : 6 * num_layers : 6] = open_gate
        elif start == "random":
            for weight in [self.weight] if rank is None else [self.up, self.up_decoder]:
                nn.init.normal_(weight, std=0.02)
        self.bias = nn.Parameter(bias.flatten())
        if norm == "soft":
            # η = sigmoid(scalar): how much of the LayerNorm enters; starts at 6e-6
            self.norm_mix = nn.Parameter(torch.full((num_layers, 2), -12.0))
            self.norm_mix_decoder = nn.Parameter(torch.tensor(-12.0))

    def forward(
        self,
        backbone: ExpressionBackbone,
        h: Tensor,
        parts: Tensor,
        seen: Sequence[tuple],
        run: Callable[..., Tensor],
        first: int | None = None,
    ) -> Tensor:
        """Take tokens through the modulated layers, up to the decoder.

        Parameters
        ----------
        backbone
            Its layers are modulated.
        h
            (B, N, D) tokens.
        parts
            (B, C, D) terms of the condition, of which z is the sum.
        seen
            What each layer takes beside the tokens.
        run
            run(function, *arguments) computes a layer.
        first
            Number of tokens that are returned, from the first one; the last layer computes no others where it is fused.
            None: all.

        Returns
        -------
        Tensor
            (B, N, D).
        """
        layers, decoder = self.vectors(sum(parts.unbind(dim=1)))  # (L, 6, B, 1, D), (2, B, 1, D)
        for number, (block, vectors) in enumerate(zip(backbone.layers, layers.to(h.dtype), strict=True)):
            last = first if number == self.num_layers - 1 else None
            h = run(self._layer, number, block, h, vectors, last, *seen[number])
        return self.modulate(backbone.finish(h), *decoder.to(h.dtype))

    def vectors(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the vectors of the layers (L, 6, B, 1, D), gates activated, and of the decoder (2, B, 1, D).

        z is (B, D).
        """
        z = F.silu(z)
        batch, layers, width = z.shape[0], self.num_layers, self.hidden_size
        if self.rank is None:
            vectors = F.linear(z, self.weight, self.bias)
        else:
            inner = self.down(z)
            split = layers * self.rank
            per_layer = inner[:, :split].view(batch, layers, self.rank)
            vectors = torch.cat(
                [
                    torch.einsum("blr,lor->blo", per_layer, self.up.to(inner.dtype)).flatten(1),
                    F.linear(inner[:, split:], self.up_decoder),
                ],
                dim=1,
            )
            vectors = vectors + self.bias
        vectors = vectors.view(batch, 6 * layers + 2, 1, width).transpose(0, 1)
        per_layer = vectors[: 6 * layers].view(layers, 6, batch, 1, width)
        if self.gate == "sigmoid":
            gates = per_layer[:, 2::3].sigmoid()
            per_layer = torch.cat([per_layer[:, :2], gates[:, :1], per_layer[:, 3:5], gates[:, 1:]], dim=1)
        return per_layer, vectors[6 * layers :]

    def modulate(self, h: Tensor, shift: Tensor, scale: Tensor, place: tuple[int, int] | None = None) -> Tensor:
        """Return shift + (1 + scale) ⊙ norm(h), (B, N, D).

        Parameters
        ----------
        h
            (B, N, D).
        shift, scale
            (B, 1, D).
        place
            (layer, sublayer), or None before the decoder.
        """
        if self.norm == "soft":
            h = soft_norm(h, self.norm_mix_decoder if place is None else self.norm_mix[place])
        elif self.norm == "layer":
            h = F.layer_norm(h, h.shape[-1:], eps=SOFT_NORM_EPS)
        return torch.addcmul(shift, h, 1 + scale)

    def _layer(
        self, number: int, block: ResidualBlock, h: Tensor, vectors: Tensor, first: int | None, *seen: Any
    ) -> Tensor:
        """Return the first tokens after layer `number` (B, first, D); None: all N.

        `vectors` are the layer's shifts, scales and gates (6, B, 1, D).
        """
        if self._may_fuse(block, h):
            return self._fused_layer(number, block, h, vectors, first, *seen)
        for part, (shift, scale, gate) in enumerate((vectors[:3], vectors[3:])):
            x = self.modulate(block.enter(part, h), shift, scale, (number, part))
            h = block.leave(part, h, gate * self._dropout(block.sublayer(part, x, *seen)))
        return h[:, :first]

    def _fused_layer(self, number, block, h, vectors, first, key_mask, value_scale) -> Tensor:
        """Return the same of a layer of CellFM by `hinge.models.kernels`."""
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = vectors
        mix, scale = self.norm_mix[number], block.residual_scale
        x = kernels.modulate(h, shift_a, scale_a, mix[0], SOFT_NORM_EPS)
        mixed = kernels.retention(block.retention, x, key_mask, value_scale, first)
        h = kernels.join(h[:, :first], self._dropout(mixed), gate_a, block.norm1, scale)
        x = kernels.modulate(h, shift_f, scale_f, mix[1], SOFT_NORM_EPS)
        fed = kernels.feed_forward(block.feed_forward, x)
        return kernels.join(h, self._dropout(fed), gate_f, block.norm2, scale)

    def _may_fuse(self, block: ResidualBlock, h: Tensor) -> bool:
        """Return whether a layer is computed by `hinge.models.kernels`.

        Not in float32 inference, where the order of operations is that of the published code, bit for bit; not in
        float16, which unscaled products overflow; not where the backbone's norms need gradients.
        """
        if not (self.fused and block.fused) or self.norm != "soft" or block.norm1.weight.requires_grad:
            return False
        return h.dtype == torch.bfloat16 or (h.dtype == torch.float32 and torch.is_grad_enabled())

    def _dropout(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


def soft_norm(h: Tensor, mix: Tensor) -> Tensor:
    """Return (1 − η)h + η·LayerNorm(h), without affine parameters, η = sigmoid(mix); h is (B, N, D)."""
    eta = mix.sigmoid().to(h.dtype)
    return (1 - eta) * h + eta * F.layer_norm(h, h.shape[-1:], eps=SOFT_NORM_EPS)
