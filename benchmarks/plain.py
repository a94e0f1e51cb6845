"""HINGE as its formulas read: every operation by itself, in float32. What `hinge.models` is checked and timed against.

Separate projections for queries, keys, values and gates, one modulation per layer, no operation fused with another and
no factor left out; frozen weights get no gradient. Weights are those of a `HingeModel` with a point head, SoftAdaLN of
full rank and no gene factors: the configuration of the paper.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hinge.diffusion import MaskedDiffusionScheduler
from hinge.models import HingeModel


def sinusoidal(timestep: Tensor, width: int) -> Tensor:
    """timestep (B,) → (B, width): cosines, then sines."""
    rates = torch.exp(-math.log(10000) * torch.arange(width // 2) / (width // 2)).to(timestep.device)
    angles = timestep.float()[:, None] * rates[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class PlainLayer(nn.Module):
    """One modulated layer."""

    def __init__(self, block: nn.Module, modulation: Tensor, bias: Tensor, mix: Tensor, width: int):
        super().__init__()
        self.heads, self.scale = block.retention.num_heads, block.residual_scale
        for name, weight in zip("qkvu", block.retention.qkvu.weight.chunk(4), strict=True):
            setattr(self, name, _frozen(weight))
        self.out = _frozen(block.retention.out.weight)
        self.ff_u, self.ff_v = (_frozen(weight) for weight in block.feed_forward.uv.weight.chunk(2))
        self.ff_out = _frozen(block.feed_forward.out.weight)
        self.norm1, self.norm2 = (_frozen_norm(norm, width) for norm in (block.norm1, block.norm2))
        self.modulation = nn.Linear(width, 6 * width)
        with torch.no_grad():
            self.modulation.weight.copy_(modulation)
            self.modulation.bias.copy_(bias)
        self.mix = nn.Parameter(mix.clone())

    def forward(self, h: Tensor, z: Tensor, key_mask: Tensor | None, value_scale: float) -> Tensor:
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = self.modulation(F.silu(z)).unsqueeze(1).chunk(6, dim=-1)
        x = soft_norm(h, self.mix[0]) * (1 + scale_a) + shift_a
        h = self.norm1(self.scale * h + torch.sigmoid(gate_a) * self.retain(x, key_mask, value_scale))
        x = soft_norm(h, self.mix[1]) * (1 + scale_f) + shift_f
        return self.norm2(self.scale * h + torch.sigmoid(gate_f) * self.ff_out(self.ff_u(x) * self.ff_v(x)))

    def retain(self, x: Tensor, key_mask: Tensor | None, value_scale: float) -> Tensor:
        batch, tokens, width = x.shape
        head = width // self.heads

        def split(y: Tensor) -> Tensor:
            return y.view(batch, tokens, self.heads, head).transpose(1, 2)

        query, key = split(F.relu(self.q(x))) / head**0.5, split(F.relu(self.k(x))) / head**0.5
        if key_mask is not None:
            key = key * key_mask[:, None, :, None]
        value = split(self.v(x)) * value_scale
        mixed = query @ (key.transpose(-2, -1) @ value)
        rms = mixed.norm(dim=-1, keepdim=True) / head**0.5
        mixed = (mixed / rms.clamp_min(1e-12)).transpose(1, 2).reshape(batch, tokens, width)
        return self.out(mixed * F.silu(self.u(x)))


class PlainHinge(nn.Module):
    """The denoiser.

    Parameters
    ----------
    model
        Whose weights are copied.
    """

    def __init__(self, model: HingeModel):
        super().__init__()
        config, backbone = model.config, model.backbone
        if config.head != "point" or config.gene_factors or config.modulation_rank is not None:
            raise ValueError("plain HINGE has a point head, full modulation and no gene factors")
        width, layers = config.hidden_size, config.num_layers
        self.model_embed, self.model_decode, self.key_masks = backbone.embed, backbone.decode, backbone.key_masks
        self.value_scale = backbone.value_scale
        self.mean, self.std = model.feature_mean, model.feature_std
        self.time, self.features, self.visible = (
            _copied(mlp) for mlp in (model.condition.time, model.condition.features, model.condition.visible)
        )
        weight, bias = model.modulation.weight.detach(), model.modulation.bias.detach()
        per_layer = 6 * width
        self.layers = nn.ModuleList(
            PlainLayer(
                block,
                weight[number * per_layer : (number + 1) * per_layer],
                bias[number * per_layer : (number + 1) * per_layer],
                model.modulation.norm_mix.detach()[number],
                width,
            )
            for number, block in enumerate(backbone.layers)
        )
        self.last = nn.Linear(width, 2 * width)
        with torch.no_grad():
            self.last.weight.copy_(weight[layers * per_layer :])
            self.last.bias.copy_(bias[layers * per_layer :])
        self.mix = nn.Parameter(model.modulation.norm_mix_decoder.detach().clone())

    def forward(self, values: Tensor, visible: Tensor, timestep: Tensor, features: Tensor, gene_ids: Tensor) -> Tensor:
        """Arguments as those of HingeModel → predicted values (B, G)."""
        features = ((features - self.mean) / self.std).clamp(-8, 8)
        z = self.time(sinusoidal(timestep, 256)) + self.features(features) + self.visible(visible)
        h = self.model_embed(values, visible, gene_ids)
        early, late = self.key_masks(visible)
        for number, layer in enumerate(self.layers):
            h = layer(h, z, early if number < len(self.layers) // 2 else late, self.value_scale(values.shape[1]))
        shift, scale = self.last(F.silu(z)).unsqueeze(1).chunk(2, dim=-1)
        return self.model_decode(soft_norm(h, self.mix) * (1 + scale) + shift)


def soft_norm(h: Tensor, mix: Tensor) -> Tensor:
    """(1 − η)h + η·LayerNorm(h), η = sigmoid(mix)."""
    eta = torch.sigmoid(mix)
    return (1 - eta) * h + eta * F.layer_norm(h, h.shape[-1:], eps=1e-6)


@torch.no_grad()
def plain_draws(
    model: PlainHinge,
    scheduler: MaskedDiffusionScheduler,
    features: Tensor,
    gene_ids: Tensor,
    num_draws: int,
    generator: torch.Generator,
    batch_size: int = 64,
) -> Tensor:
    """Draws (K, n, G): all T reverse steps, each a pass over all genes of every spot-draw."""
    genes, draws = len(gene_ids), []
    for _ in range(num_draws):
        parts = []
        for part in features.split(batch_size):
            uniform = torch.rand(len(part), genes, generator=generator)
            values = torch.zeros_like(uniform, device=part.device)
            total = scheduler.config.num_train_timesteps
            scheduler.set_timesteps(total)
            visible, mask_times = torch.zeros_like(values), scheduler.mask_times(uniform).to(part.device)
            for step in range(total, 0, -1):
                predicted = model(values, visible, torch.full((len(part),), step).to(part.device), part, gene_ids)
                result = scheduler.step(predicted, step, values, visible, mask_times)
                values, visible = result.prev_sample, result.visible
            parts.append(values)
        draws.append(torch.cat(parts))
    return torch.stack(draws)


def _frozen(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False).requires_grad_(False)
    linear.weight.copy_(weight)
    return linear


def _frozen_norm(norm: nn.LayerNorm, width: int) -> nn.LayerNorm:
    copy = nn.LayerNorm(width, eps=norm.eps).requires_grad_(False)
    copy.load_state_dict(norm.state_dict())
    return copy


def _copied(mlp: nn.Sequential) -> nn.Sequential:
    copy = nn.Sequential(*(nn.Linear(m.in_features, m.out_features) if isinstance(m, nn.Linear) else m for m in mlp))
    copy.load_state_dict(mlp.state_dict())
    return copy
