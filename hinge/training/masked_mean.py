"""Correction of the mean that a trained model predicts where no gene is visible."""

import numpy as np
import torch
from torch import Tensor

from hinge.diffusion.scheduler import MaskedDiffusionScheduler
from hinge.models.hinge import HingeModel
from hinge.models.subset import spots_at_a_time

# spots and numbers in their tokens at most, rounds, step of the derivative and its least value, bounds of the slope
MEAN_SPOTS, MEAN_NUMBERS = 1000, 10**8
MEAN_ROUNDS, MEAN_STEP, SLOWEST_MEAN, MEAN_SLOPES = 5, 0.05, 0.02, (-0.5, 1.0)


@torch.no_grad()
def fit_masked_mean(
    model: HingeModel, scheduler: MaskedDiffusionScheduler, gene_ids: Tensor, features: Tensor, batch_size: int = 256
) -> None:
    """Make the mean of a trained model's distribution equal its location where no gene is visible.

    The mean of a Gaussian that is rounded to counts and cannot be below zero differs from its location. Along the
    regression, the mean then rises too steeply for some genes and too little for others. A bias and a slope of each
    gene's location (`masked_bias` and `masked_slope` of `GeneFactorModel`) correct that. They are the Gauss–Newton
    least squares fit of the mean to the uncorrected location, clipped at zero.

    Parameters
    ----------
    model
        Trained, with a `GeneFactorModel`. Nothing else of it is changed.
    scheduler, gene_ids
        Of the diffusion and the panel.
    features
        (n, d) of training spots. At most `MEAN_SPOTS` of them are used, fewer where their tokens would hold more than
        `MEAN_NUMBERS` numbers.
    batch_size
        Spots of one forward pass.
    """
    if model.config.head in ("point", "gaussian"):
        return  # their mean is their location
    factors = model.gene_factor_model
    spots = _MaskedSpots(model, scheduler, gene_ids, features, batch_size)
    regression = factors.mean(spots.condition).double()
    centre = regression.mean(dim=0)
    along = regression - centre
    bias, slope = torch.zeros_like(centre), torch.zeros_like(centre)
    factors.masked_bias.zero_()
    factors.masked_slope.zero_()
    wanted = spots.predicted(torch.zeros_like(regression), "location")
    if model.library_size_model is not None:
        wanted -= model.library_size_model.excess(spots.library_size).double()
    wanted = wanted.clamp_min(0)
    # a weak penalty on the correction, as strong as one spot in a hundred
    weight = 0.01 * len(along)
    for _ in range(MEAN_ROUNDS):
        moved = bias + slope * along
        mean = spots.predicted(moved, "mean")
        rate = ((spots.predicted(moved + MEAN_STEP, "mean") - mean) / MEAN_STEP).clamp_min(SLOWEST_MEAN)
        missing = wanted - mean
        first, both = (rate**2).sum(dim=0) + weight, (rate**2 * along).sum(dim=0)
        second = (rate**2 * along**2).sum(dim=0) + weight * along.var(dim=0).clamp_min(1e-12)
        right, right_along = (rate * missing).sum(dim=0), (rate * along * missing).sum(dim=0)
        determinant = first * second - both**2
        bias = bias + (second * right - both * right_along) / determinant
        slope = (slope + (first * right_along - both * right) / determinant).clamp(*MEAN_SLOPES)
    factors.masked_slope.copy_(slope)
    factors.masked_bias.copy_(bias - slope * centre)


class _MaskedSpots:
    """Training spots without any visible gene, and the tokens that the backbone makes of them."""

    def __init__(self, model, scheduler, gene_ids: Tensor, features: Tensor, batch_size: int):
        self.model, self.gene_ids, device = model, gene_ids, model.feature_mean.device
        enough = min(MEAN_SPOTS, max(32, MEAN_NUMBERS // (len(gene_ids) * model.config.hidden_size)))
        chosen = np.linspace(0, len(features) - 1, min(len(features), enough)).astype(int)
        self.condition = model.standardise(features[torch.from_numpy(chosen)].to(device))
        self.library_size = None
        if model.library_size_model is not None:
            self.library_size = model.library_size_model.typical(self.condition)
            self.condition = model.with_library_size(self.condition, self.library_size)
        size = len(self.condition)
        self.nothing = torch.zeros(size, len(gene_ids), device=device)
        self.filled = scheduler.fill_masked(self.nothing, self.nothing, self.nothing)
        batch_size = spots_at_a_time(batch_size, len(gene_ids), model.config.hidden_size, device)
        self.batches = [slice(start, start + batch_size) for start in range(0, size, batch_size)]
        timesteps = torch.full((size,), scheduler.config.num_train_timesteps, device=device)
        self.tokens = []
        for rows in self.batches:
            inputs = (self.filled[rows], self.nothing[rows], timesteps[rows], self.condition[rows], gene_ids)
            self.tokens.append(model.tokens(*inputs, next_visible=self.nothing[rows]))

    def predicted(self, shift: Tensor, part: str) -> Tensor:
        """Return the location or the mean (n, G) of the head's distributions whose locations are shifted by (n, G)."""
        parts = []
        for rows, tokens in zip(self.batches, self.tokens, strict=True):
            inputs = (tokens, self.filled[rows], self.nothing[rows], self.condition[rows], self.gene_ids)
            known = None if self.library_size is None else self.library_size[rows]
            output, _ = self.model.read_out(*inputs, shift[rows].float(), known)
            parts.append(getattr(output, part).double())
        return torch.cat(parts)
