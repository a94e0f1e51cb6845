"""Training of a HingeModel by masked diffusion, on the spots of some slides."""

import contextlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hinge.data.slide_levels import SlideLevels
from hinge.data.spot_store import SpotStore
from hinge.data.spots import SpotTable
from hinge.diffusion.loss import draw_timesteps, loss_mask, spot_weights
from hinge.diffusion.scheduler import MaskedDiffusionScheduler
from hinge.models.hinge import HingeModel
from hinge.models.slide_effects import SlidePrior
from hinge.models.value_bins import fit_to_panel
from hinge.training.halves import Part, halves
from hinge.training.initialisation import Initialisation, initialise_gene_factors, initialise_library_size
from hinge.training.loop import LoopResult, make_accelerator, run_loop, step_generator
from hinge.training.masked_mean import fit_masked_mean
from hinge.training.measured import fitting_timesteps
from hinge.training.rows import SpotBatch, TrainingRows
from hinge.training.settings import TrainingConfig
from hinge.training.slide_prior import fit_slide_prior
from hinge.training.stored_regression import StoredRegression

# fixed times, evenly spread, at which every held-out spot is scored: one random time a spot would be too noisy
# to compare checkpoints by
VALIDATION_TIMES = 6


# the masked share of genes, at most, in the lightly masked steps that training starts with, as in HINGE's paper
WARM_START_MASKED_SHARE = 0.2


class _Denoising(nn.Module):
    """Losses of the denoiser, in a forward so that several processes share gradients."""

    def __init__(self, model: HingeModel):
        super().__init__()
        self.model = model

    def forward(self, target: Tensor, **inputs) -> Tensor:
        """target (B, G) and the arguments of HingeModel → loss of every gene (B, G)."""
        return self.model(**inputs).loss(target)


class _MaskedExpression:
    """The objective of masked diffusion: the losses of training and of validation.

    Parameters
    ----------
    data
        Spots and their split.
    scheduler, gene_ids, config, seed
        As of `train_hinge`.
    device
        Where the model is.
    """

    def __init__(
        self,
        data: TrainingRows,
        scheduler: MaskedDiffusionScheduler,
        gene_ids: Tensor,
        config: TrainingConfig,
        seed: int,
        device: torch.device,
    ):
        self.data, self.scheduler, self.config, self.seed, self.device = data, scheduler, config, seed, device
        self.gene_ids, self.num_genes = gene_ids.to(device), data.num_genes
        # a compiled step is called by one thread; random numbers of dropout inside the model are of the whole batch
        self.halved = not config.compile and not data.model.config.dropout
        self.warm_steps = round(config.warm_start_share * config.num_steps(len(data)))
        # of validation, evenly spread
        times = np.linspace(1, scheduler.config.num_train_timesteps, VALIDATION_TIMES)
        self.times = times.round().astype(np.int64)

    def inputs_at(
        self,
        batch: SpotBatch,
        timesteps: Tensor,
        uniform: Tensor,
        noise: Tensor,
        end: Tensor | None,
        feature_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return what the model is given for B spots at timesteps (B,).

        uniform and noise (B, G) decide which genes are masked and what fills them; feature_mask is (B, d). end (B,) in
        [0, 1) decides at which timestep the step ends that is practised, see `drops_masked`.
        """
        visible = self.visible_at(batch, timesteps, uniform)
        inputs = {
            "values": self.scheduler.fill_masked(batch.values, visible, noise),
            "visible": visible,
            "timestep": timesteps,
            "features": batch.condition,
            "next_visible": self.visible_at(batch, timesteps - 1, uniform),
        }
        if batch.measured is not None:
            inputs["timestep"] = fitting_timesteps(self.scheduler, batch.measured, timesteps, visible)
        if end is not None:
            # as in sampling, where a step of any length has tokens of the genes that it reveals
            inputs["present"] = self.visible_at(batch, (end * timesteps).long(), uniform)
        if batch.slide_shift is not None:
            inputs["slide_shift"] = batch.slide_shift
        if self.data.model.library_size_model is not None:
            inputs["library_size"] = batch.library_size
        if batch.library_shift is not None:
            inputs["library_shift"] = batch.library_shift
        if feature_mask is not None:
            inputs["feature_mask"] = feature_mask
        return {name: tensor.to(self.device) for name, tensor in inputs.items()} | {"gene_ids": self.gene_ids}

    def visible_at(self, batch: SpotBatch, timesteps: Tensor, uniform: Tensor) -> Tensor:
        """Return which genes (B, G) of spots are visible at timesteps (B,); never one that was not measured."""
        visible = self.scheduler.visible_at(timesteps, uniform)
        return visible if batch.measured is None else visible * batch.measured

    def loss_mask(self, batch: SpotBatch, timesteps: Tensor, uniform: Tensor, genes: Tensor | None) -> Tensor:
        """Return which genes of spots count (B, G): none that was not measured or has no token."""
        visible = self.scheduler.visible_at(timesteps, uniform)
        mask = loss_mask(self.scheduler, timesteps, visible, uniform, self.config.loss_on)
        if genes is not None:
            mask = mask * torch.zeros(mask.shape[1]).index_fill(0, genes, 1.0)
        return mask if batch.measured is None else mask * batch.measured

    def some_genes(self, generator: torch.Generator) -> Tensor | None:
        """Return the numbers (n,) of the genes that have tokens in a step; None for all.

        The gene factors see all visible genes, and the backbone a random part of them: as many as memory allows.
        """
        count, num_genes = self.config.genes_per_step, self.num_genes
        if count is None or count >= num_genes:
            return None
        return torch.randperm(num_genes, generator=generator)[:count].sort().values

    def index_of(self, genes: Tensor | None) -> dict[str, Tensor]:
        """Return the argument of the model that says which genes (n,) have tokens."""
        return {} if genes is None else {"index": genes.to(self.device)}

    def batch_loss(self, module, step, rows, positions, generator) -> Tensor | list[Part]:
        """Return the loss of this process's rows, or of each half; see `BatchLoss`."""
        size, num_genes = len(rows), self.num_genes
        share = WARM_START_MASKED_SHARE if step < self.warm_steps else 1.0
        timesteps = draw_timesteps(self.scheduler, size, num_genes, generator, share)
        uniform = torch.rand(size, num_genes, generator=generator)
        noise = torch.randn(size, num_genes, generator=generator)
        end = torch.rand(size, generator=generator) if self.data.model.drops_masked else None
        batch, feature_mask = self.data.batch(step, rows, generator)
        genes = self.some_genes(generator)
        weights = spot_weights(self.loss_mask(batch, timesteps, uniform, genes), self.config.weighting)
        drawn = (timesteps, uniform, noise, end, feature_mask)

        def loss(places: np.ndarray) -> Tensor:
            own = batch.at(places)
            inputs = self.inputs_at(own, *(None if each is None else each[places] for each in drawn))
            losses = module(own.values.to(self.device), **inputs, **self.index_of(genes))
            return (losses * weights[places].to(self.device)).sum() / size

        parts = halves(positions, size, self.device) if self.halved else [positions]
        return loss(positions) if len(parts) == 1 else [partial(loss, part) for part in parts]

    def evaluate(self, module, rows) -> Tensor:
        """Return the sum of the losses of validation rows, and their number; a row is a held-out spot at one time."""
        sums, num_genes = torch.zeros(2), self.num_genes
        genes = self.some_genes(step_generator(self.seed, 23))  # the same in every evaluation
        for start in range(0, len(rows), self.config.batch_size):
            part = rows[start : start + self.config.batch_size]
            batch = self.data.held_batch(part // len(self.times))
            timesteps = torch.from_numpy(self.times[part % len(self.times)])
            # one generator a row: the noise of a held-out spot is the same on any number of processes
            generators = [step_generator(self.seed, 21, int(row)) for row in part]
            uniform = torch.stack([torch.rand(num_genes, generator=generator) for generator in generators])
            noise = torch.stack([torch.randn(num_genes, generator=generator) for generator in generators])
            end = None
            if self.data.model.drops_masked:
                end = torch.cat([torch.rand(1, generator=generator) for generator in generators])
            mask = self.loss_mask(batch, timesteps, uniform, genes)
            weights = mask / mask.sum(dim=1, keepdim=True).clamp_min(1)
            inputs = self.inputs_at(batch, timesteps, uniform, noise, end)
            inputs |= self.index_of(genes)
            losses = module(batch.values.to(self.device), **inputs).cpu()
            sums += torch.tensor([(losses * weights).sum().item(), float((mask.sum(dim=1) > 0).sum())])
        return sums


def train_hinge(
    model: HingeModel,
    scheduler: MaskedDiffusionScheduler,
    gene_ids: Tensor,
    spots: SpotTable | SpotStore,
    config: TrainingConfig,
    folder: str | Path,
    seed: int = 0,
    accelerator: Accelerator | None = None,
    continue_with: str = "the same command",
    levels: SlideLevels | None = None,
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
        validation. Of a store, blocks of spots are read while the model trains, see `hinge.training.blocks`; a bounded
        part of its spots serves initialisation and validation, see `spots_in_memory`.
    config, folder, seed
        `folder` receives the log and the checkpoints.
    accelerator
        Of `accelerate`; one is made where it is not given.
    continue_with
        Description for the message of an interrupted run.
    levels
        Of all slides with counts, the training slides among them, from which the prior of a new slide's level is
        fitted. None: of the training slides, each of a patient of its own.

    Raises
    ------
    DataError
        No spot, or spots without features.
    """
    data = TrainingRows(model, spots, config, seed)
    training = data.spots.subset(data.training)
    if model.value_bins is not None and not model.value_bins.fitted:
        fit_to_panel(model, gene_ids, training.counts, training.values)
    accelerator = accelerator or make_accelerator(config, folder)
    gene_ids = gene_ids.to(accelerator.device)
    slide_shift = library_shift = None
    # beside a store, memory is short; spots that are all in memory give the same bits from there and from a store
    at_a_time = 256 if len(data.spots) == len(spots) else 32
    # also before a resumed run: the checkpoint then replaces the parameters, but not buffers and shifts
    model.to(accelerator.device)
    if config.initialisation and model.gene_factor_model is not None:
        stored = None
        if isinstance(spots, SpotStore) and data.stored is not None and len(data.spots) < len(spots):
            stored = StoredRegression(spots, data.stored.order.left_out, data.numbers[data.training])
        start = _initialise(model, scheduler, gene_ids, training, seed, at_a_time, stored)
        fit_slide_levels(model, spots, levels).regression.load_state_dict(start.regression.state_dict())
        slide_shift, library_shift = start.slide_shift, start.library_shift
    elif model.library_size_model is not None:
        library_shift = initialise_library_size(model, training)
    del training
    data.set_shifts(slide_shift, library_shift)
    objective = _MaskedExpression(data, scheduler, gene_ids, config, seed, accelerator.device)
    with contextlib.nullcontext() if data.stored is None else data.stored.reader:
        result = run_loop(
            _Denoising(model),
            objective.batch_loss,
            len(data),
            config,
            folder,
            seed,
            evaluate=objective.evaluate if len(data.held) else None,
            num_evaluation_rows=len(data.held) * VALIDATION_TIMES,
            accelerator=accelerator,
            continue_with=continue_with,
            rows_of=None if data.stored is None else data.stored.order.rows,
            compiled=config.compile,
        )
    if slide_shift is not None:
        fit_masked_mean(model, scheduler, gene_ids, data.features[data.training, 0], at_a_time)
    return result


def fit_slide_levels(model: HingeModel, spots: SpotTable | SpotStore, levels: SlideLevels | None = None) -> SlidePrior:
    """Give a model the prior of slide levels, and return it; arguments as of `train_hinge`."""
    if isinstance(spots, SpotStore):
        names, levels = spots.names, spots.levels() if levels is None else levels
    else:
        known = (spots.known_counts(), spots.library_size, spots.slide, spots.slide, spots.transform)
        names, levels = np.unique(spots.slide), SlideLevels.of_spots(*known) if levels is None else levels
    prior = model.add_slide_prior(sorted(set(levels.patient.tolist())), levels.tokens.shape[1])
    fit_slide_prior(prior, levels, np.isin(levels.sample, names), spots.transform)
    return prior


def _initialise(
    model: HingeModel,
    scheduler: MaskedDiffusionScheduler,
    gene_ids: Tensor,
    training: SpotTable,
    seed: int,
    batch_size: int,
    stored: StoredRegression | None,
) -> Initialisation:
    """Initialise the gene factors from the training spots; what is fitted in closed form is not trained further."""
    start = initialise_gene_factors(model, scheduler, gene_ids, training, seed, batch_size, stored)
    # moving it along with residuals that are out of fold would undo the cross-validation of its penalty
    model.gene_factor_model.mean.requires_grad_(False)
    model.gene_factor_model.log_scale.weight.requires_grad_(False)
    return start
