"""Training a HingeModel: masked diffusion with a warm start, on the spots of some slides."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from pydantic import Field
from torch import Tensor, nn

from hinge.data.spots import SpotTable, spatial_groups
from hinge.diffusion.loss import draw_timesteps, loss_mask, spot_weights
from hinge.diffusion.scheduler import MaskedDiffusionScheduler
from hinge.models.hinge import HingeModel
from hinge.training.initialisation import fit_masked_mean, initialise_gene_factors, initialise_library_size
from hinge.training.loop import LoopConfig, LoopResult, make_accelerator, run_loop, step_generator
from hinge.utils.errors import DataError

# fixed times, evenly spread, at which every held-out spot is scored: one random time a spot would be too noisy
# to compare checkpoints by
VALIDATION_TIMES = 6


class TrainingConfig(LoopConfig):
    """Training of the conditioning path and the value head."""

    epochs: int | None = Field(40, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    warmup_steps: int = Field(50, ge=0)
    ema_decay: float | None = Field(0.999, gt=0, lt=1)
    warm_start_share: float = Field(0.125, ge=0, le=1, description="share of the run with lightly masked steps only")
    warm_start_masked_share: float = Field(0.2, gt=0, le=1)
    loss_on: Literal["masked", "revealed"] = "masked"
    weighting: Literal["spot", "gene"] = "spot"
    validation_share: float = Field(0.1, ge=0, lt=1)
    validation_groups: Literal["spot", "tile", "slide"] = "tile"
    initialisation: bool = Field(True, description="solve for the gene path before the first step")
    gradient_checkpointing: bool = False


def split_spots(spots: SpotTable, share: float, groups: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split spots into training and validation, whole groups on one side.

    Parameters
    ----------
    spots
        All training spots.
    share
        Of the spots that shall be in validation, at least roughly; 0 for none.
    groups
        `"spot"`; `"tile"`, squares of about 4 × 4 spots of one slide, so that neighbours do not tell each
        other's expression; `"slide"`.
    seed
        Of the choice.

    Returns
    -------
    tuple
        Indices of training spots and of validation spots, both sorted.
    """
    names = spatial_groups(spots, groups)
    unique, group, counts = np.unique(names, return_inverse=True, return_counts=True)
    order = torch.randperm(len(unique), generator=step_generator(seed, 20)).numpy()
    wanted = share * len(spots)
    held: list[int] = []
    taken = 0
    for index in order:
        if taken >= wanted or len(held) + 1 == len(unique):
            break
        held.append(index)
        taken += counts[index]
    is_held = np.isin(group, held)
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)


class _Denoising(nn.Module):
    """Losses of the denoiser, in a forward so that several processes share gradients."""

    def __init__(self, model: HingeModel):
        super().__init__()
        self.model = model

    def forward(self, target: Tensor, **inputs) -> Tensor:
        """target (B, G) and the arguments of HingeModel → loss of every gene (B, G)."""
        return self.model(**inputs).loss(target)


class TrainingRows:
    """What a run trains on: every view of every training spot is a row. The model's part in it is prepared.

    Parameters
    ----------
    model
        Its feature statistics are set from the training spots; it is in eval mode afterwards.
    spots, config, seed
        As in `train_hinge`.

    Attributes
    ----------
    training, held
        Indices of spots.
    features
        (n, V, d) of all spots.

    Raises
    ------
    DataError
        No spot, or spots without features.
    """

    def __init__(self, model: HingeModel, spots: SpotTable, config: TrainingConfig, seed: int):
        if len(spots) == 0 or spots.features is None:
            raise DataError("training needs spots with features")
        self.model = model
        self.training, self.held = split_spots(spots, config.validation_share, config.validation_groups, seed)
        self.features = torch.from_numpy(np.asarray(spots.features, dtype=np.float32))
        model.set_feature_statistics(self.features[self.training].flatten(0, 1))
        if config.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        model.eval()  # the start is without dropout: it would be another one each time that a run is resumed

    def __len__(self) -> int:
        return len(self.training) * self.features.shape[1]

    def draw(self, rows: np.ndarray, generator: torch.Generator) -> tuple[np.ndarray, Tensor, Tensor | None]:
        """The spots (B,) of rows, their features (B, d), and what these are multiplied with, if anything.

        Everything random is drawn for the global batch on every process; each then takes its rows.
        """
        config, num_views = self.model.config, self.features.shape[1]
        spot, view = self.training[rows // num_views], rows % num_views
        condition, mask = self.features[spot, view], None
        if config.feature_dropout:
            kept = torch.rand(condition.shape, generator=generator) >= config.feature_dropout
            mask = kept.float() / (1 - config.feature_dropout)
        return spot, condition, mask


def train_hinge(
    model: HingeModel,
    scheduler: MaskedDiffusionScheduler,
    gene_ids: Tensor,
    spots: SpotTable,
    config: TrainingConfig,
    folder: str | Path,
    seed: int = 0,
    accelerator: Accelerator | None = None,
    continue_with: str = "the same command",
) -> LoopResult:
    """Train what of `model` is trainable; on return it holds the best (or last) weights and is in eval mode.

    Parameters
    ----------
    model
        With its backbone attached. Its feature statistics are set from the training spots.
    scheduler
        Of the diffusion.
    gene_ids
        (G,) vocabulary ids of the panel.
    spots
        Training spots with their features (n, V, d): each view is one training row, view 0 also serves
        validation.
    config, folder, seed
        `folder` receives the log and the checkpoints.

    Raises
    ------
    DataError
        No spot, or spots without features.
    """
    data = TrainingRows(model, spots, config, seed)
    training, held, features, num_genes = data.training, data.held, data.features, spots.values.shape[1]
    accelerator = accelerator or make_accelerator(config, folder)
    device = accelerator.device
    values = torch.from_numpy(np.asarray(spots.values, dtype=np.float32))
    gene_ids = gene_ids.to(device)
    shifts = None
    if config.initialisation and model.gene_factor_model is not None:
        # also before a resumed run: the checkpoint then replaces the parameters, but not buffers and shifts
        model.to(device)
        of_training = initialise_gene_factors(model, scheduler, gene_ids, spots.subset(training), seed)
        # moving it along with residuals that are out of fold would undo the cross-validation of its penalty
        model.gene_factor_model.mean.requires_grad_(False)
        shifts = torch.zeros(len(spots), num_genes)
        for name in np.unique(spots.slide[training]):
            # a spot that is held out has its slide's shift, as its regression is out of fold already
            shifts[torch.from_numpy(spots.slide == name)] = of_training[spots.slide[training] == name].mean(dim=0)
        shifts[torch.from_numpy(training)] = of_training
    elif model.library_size_model is not None:
        initialise_library_size(model.to(device), spots.subset(training))
    library_size = (
        torch.from_numpy(np.asarray(spots.library_size, dtype=np.float32))
        if model.library_size_model is not None
        else None
    )
    warm_steps = round(config.warm_start_share * config.num_steps(len(data)))

    def inputs_at(
        spot: np.ndarray, timesteps: Tensor, uniform: Tensor, noise: Tensor, condition: Tensor
    ) -> dict[str, Tensor]:
        filled, visible = scheduler.add_mask(values[spot], timesteps, uniform=uniform, noise=noise)
        inputs = {
            "values": filled,
            "visible": visible,
            "timestep": timesteps,
            "features": condition,
            "next_visible": scheduler.visible_at(timesteps - 1, uniform),
        }
        if shifts is not None:
            inputs["slide_shift"] = shifts[spot]
        if library_size is not None:
            inputs["library_size"] = library_size[spot]
        return {name: tensor.to(device) for name, tensor in inputs.items()} | {"gene_ids": gene_ids}

    def batch_loss(module, step, rows, positions, generator) -> Tensor:
        size = len(rows)
        share = config.warm_start_masked_share if step < warm_steps else 1.0
        timesteps = draw_timesteps(scheduler, size, num_genes, generator, share)
        uniform = torch.rand(size, num_genes, generator=generator)
        noise = torch.randn(size, num_genes, generator=generator)
        visible = scheduler.visible_at(timesteps, uniform)
        weights = spot_weights(loss_mask(scheduler, timesteps, visible, uniform, config.loss_on), config.weighting)
        present = None
        if model.drops_masked:
            # what a step of any length would reveal
            ends = (torch.rand(size, generator=generator) * timesteps).long()
            present = scheduler.visible_at(ends, uniform)
        spot, condition, mask = data.draw(rows, generator)
        inputs = inputs_at(
            spot[positions], timesteps[positions], uniform[positions], noise[positions], condition[positions]
        )
        if present is not None:
            inputs["present"] = present[positions].to(device)
        if mask is not None:
            inputs["feature_mask"] = mask[positions].to(device)
        losses = module(values[spot][positions].to(device), **inputs)
        return (losses * weights[positions].to(device)).sum() / size

    times = np.linspace(1, scheduler.config.num_train_timesteps, VALIDATION_TIMES).round().astype(np.int64)

    def evaluate(module, rows) -> Tensor:
        sums = torch.zeros(2)
        for start in range(0, len(rows), config.batch_size):
            part = rows[start : start + config.batch_size]
            spot = held[part // len(times)]
            timesteps = torch.from_numpy(times[part % len(times)])
            # one generator a row: the noise of a held-out spot is the same on any number of processes
            draws = [step_generator(seed, 21, int(row)) for row in part]
            uniform = torch.stack([torch.rand(num_genes, generator=generator) for generator in draws])
            noise = torch.stack([torch.randn(num_genes, generator=generator) for generator in draws])
            visible = scheduler.visible_at(timesteps, uniform)
            mask = loss_mask(scheduler, timesteps, visible, uniform, config.loss_on)
            weights = mask / mask.sum(dim=1, keepdim=True).clamp_min(1)
            inputs = inputs_at(spot, timesteps, uniform, noise, features[spot, 0])
            losses = module(values[spot].to(device), **inputs).cpu()
            sums += torch.tensor([(losses * weights).sum().item(), float((mask.sum(dim=1) > 0).sum())])
        return sums

    result = run_loop(
        _Denoising(model),
        batch_loss,
        len(data),
        config,
        folder,
        seed,
        evaluate=evaluate if len(held) else None,
        num_evaluation_rows=len(held) * len(times),
        accelerator=accelerator,
        description="training",
        continue_with=continue_with,
    )
    if shifts is not None:
        fit_masked_mean(model, scheduler, gene_ids, features[training, 0])
    return result
