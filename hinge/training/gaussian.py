"""Training a denoiser of all genes at once, by the objectives of Gaussian diffusion and flow matching."""

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from hinge.data.spots import SpotTable, spot_groups
from hinge.diffusion.gaussian import NUM_TIMES, Denoiser
from hinge.evaluation.ridge import fit_ridge
from hinge.training.hinge import VALIDATION_TIMES
from hinge.training.initialisation import write
from hinge.training.loop import LoopResult, make_accelerator, run_loop, step_generator
from hinge.training.rows import TrainingRows
from hinge.training.settings import TrainingConfig


def train_denoiser(
    denoiser: Denoiser,
    spots: SpotTable,
    config: TrainingConfig,
    folder: str | Path,
    seed: int = 0,
    accelerator: Accelerator | None = None,
) -> LoopResult:
    """Train a denoiser as `train_hinge` trains the model, with noise in place of masks.

    It starts from ridge regression on the features and the deviation of its residuals, as the model does. Settings that
    concern masks (warm start, `loss_on`, `weighting`) have no effect.

    Parameters
    ----------
    denoiser
        On return it holds the best (or last) weights and is in eval mode.
    spots
        Training spots with features (n, V, d).
    config, folder, seed
        As in `train_hinge`.

    Raises
    ------
    DataError
        No spot, or spots without features.
    """
    model, schedule = denoiser.model, denoiser.schedule
    data = TrainingRows(model, spots, config, seed)
    held, num_genes = data.held, spots.values.shape[1]
    accelerator = accelerator or make_accelerator(config, folder)
    device = accelerator.device
    denoiser.to(device).eval()
    x0 = denoiser.standardise(torch.from_numpy(np.asarray(spots.values, dtype=np.float32)).to(device)).cpu()
    if config.initialisation and model.gene_factor_model is not None:
        _start_from_ridge(denoiser, spots.subset(data.training), seed)

    def losses(module, spot, times, noise, condition, feature_mask=None) -> Tensor:
        """Weighted squared error of each spot, (B,)."""
        target = x0[spot]
        inputs = (schedule.add_noise(target, noise, times), times, condition, feature_mask)
        predicted = module(*(None if tensor is None else tensor.to(device) for tensor in inputs))
        return schedule.weights(times).to(device) * ((predicted - target.to(device)) ** 2).mean(dim=1)

    def batch_loss(module, step, rows, positions, generator) -> Tensor:
        times = torch.randint(1, NUM_TIMES + 1, (len(rows),), generator=generator)
        noise = torch.randn(len(rows), num_genes, generator=generator)
        spot, condition, mask = data.draw(rows, generator)
        mask = None if mask is None else mask[positions]
        of_spots = losses(module, spot[positions], times[positions], noise[positions], condition[positions], mask)
        return of_spots.sum() / len(rows)

    # the last time but not the first, at which there is nothing to predict
    grid = np.linspace(NUM_TIMES / VALIDATION_TIMES, NUM_TIMES, VALIDATION_TIMES).round().astype(np.int64)

    def evaluate(module, rows) -> Tensor:
        sums = torch.zeros(2)
        for start in range(0, len(rows), config.batch_size):
            part = rows[start : start + config.batch_size]
            spot, times = held[part // len(grid)], torch.from_numpy(grid[part % len(grid)])
            # one generator a row: the noise of a held-out spot is the same on any number of processes
            noise = torch.stack([torch.randn(num_genes, generator=step_generator(seed, 31, int(row))) for row in part])
            sums += torch.tensor([losses(module, spot, times, noise, data.features[spot, 0]).sum().item(), len(part)])
        return sums

    return run_loop(
        denoiser,
        batch_loss,
        len(data),
        config,
        folder,
        seed,
        evaluate=evaluate if len(held) else None,
        num_evaluation_rows=len(held) * len(grid),
        accelerator=accelerator,
        description=f"training {schedule.name}",
    )


@torch.no_grad()
def _start_from_ridge(denoiser: Denoiser, spots: SpotTable, seed: int) -> None:
    """Set the regression on the features to what the denoiser leaves unexplained in pure noise, and its deviation."""
    model, device = denoiser.model, denoiser.mean.device
    features = torch.from_numpy(np.asarray(spots.features[:, 0], dtype=np.float32)).to(device)
    noise = torch.randn(spots.values.shape, generator=step_generator(seed, 30)).to(device)
    times = torch.full((len(noise),), NUM_TIMES, device=device)
    batches = zip(noise.split(256), times.split(256), features.split(256), strict=True)
    predicted = denoiser.expression(torch.cat([denoiser(*batch) for batch in batches])).double().cpu().numpy()
    standardised = model.standardise(features).double().cpu().numpy()
    left = spots.values - predicted
    ridge = fit_ridge(standardised, left, spot_groups(spots.slide, spots.coords, "fold"))
    spread = torch.from_numpy((left - ridge.held_out).std(axis=0)).to(denoiser.deviation) / denoiser.deviation
    denoiser.log_spread.copy_(spread.clamp(0.01, 2.0).log())
    write(model.gene_factor_model.mean.weight, ridge.weight)
    write(model.gene_factor_model.mean.bias, ridge.bias)
