"""The training objective: which genes the loss counts, their weights, and how timesteps are drawn."""

import numpy as np
import torch
from torch import Tensor

from hinge.diffusion.scheduler import MaskedDiffusionScheduler


def draw_timesteps(
    scheduler: MaskedDiffusionScheduler,
    batch_size: int,
    num_genes: int,
    generator: torch.Generator,
    max_masked_share: float = 1.0,
) -> Tensor:
    """Draw timesteps (B,) uniformly from 1 … T, or in the warm start from those with few masked genes.

    Parameters
    ----------
    max_masked_share
        Only timesteps whose masked share is at most this are drawn (the paper's warm start: 0.20 in the first
        five epochs). The first timestep is always among them.
    """
    steps = np.arange(1, scheduler.config.num_train_timesteps + 1)
    allowed = steps[scheduler.masked_share(steps, num_genes) <= max_masked_share]
    last = int(allowed[-1]) if len(allowed) else 1
    return torch.randint(1, last + 1, (batch_size,), generator=generator)


def loss_mask(
    scheduler: MaskedDiffusionScheduler, timesteps: Tensor, visible: Tensor, uniform: Tensor, on: str
) -> Tensor:
    """Return the genes (B, G) that the loss counts: all masked ones, or with `"revealed"` those of step t → t − 1.

    The formula in the paper has the first, its released code the second.
    """
    if on == "masked":
        return 1 - visible
    return scheduler.visible_at(timesteps - 1, uniform) - visible


def spot_weights(mask: Tensor, weighting: str) -> Tensor:
    """Return the weights (B, G) of the losses in `mask` (B, G); they sum to the number of spots with any such gene.

    `"gene"` gives each gene in the mask the same weight over the whole batch, as the released code does;
    `"spot"` gives each spot the same weight, independent of its share of masked genes: the likelihood bound of masked
    diffusion, in which a step with few masked genes counts no less.
    """
    per_spot = mask.sum(dim=1, keepdim=True)
    if weighting == "spot":
        return mask / per_spot.clamp_min(1)
    return mask * ((per_spot > 0).sum() / per_spot.sum().clamp_min(1))
