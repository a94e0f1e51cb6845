"""Training of a HingeModel by masked diffusion, on the spots of some slides."""

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hinge.data.slide_levels import SlideLevels
from hinge.data.spots import SpotTable, spot_groups
from hinge.diffusion.loss import draw_timesteps, loss_mask, spot_weights
from hinge.diffusion.scheduler import MaskedDiffusionScheduler
from hinge.models.hinge import HingeModel
from hinge.models.slide_effects import SlidePrior
from hinge.models.value_bins import fit_to_panel
from hinge.training.initialisation import Initialisation, initialise_gene_factors, initialise_library_size
from hinge.training.loop import LoopResult, make_accelerator, run_loop, step_generator
from hinge.training.masked_mean import fit_masked_mean
from hinge.training.measured import MeasuredGenes
from hinge.training.settings import TrainingConfig
from hinge.training.slide_prior import fit_slide_prior
from hinge.utils.errors import DataError

# fixed times, evenly spread, at which every held-out spot is scored: one random time a spot would be too noisy
# to compare checkpoints by
VALIDATION_TIMES = 6


# share of the training rows of whose slide a token is not known
TOKEN_DROPOUT = 0.15


# the masked share of genes, at most, in the lightly masked steps that training starts with, as in HINGE's paper
WARM_START_MASKED_SHARE = 0.2


def split_spots(spots: SpotTable, share: float, groups: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split spots into training and validation, whole groups on one side.

    Parameters
    ----------
    spots
        All training spots.
    share
        Share of the spots that goes to validation, at least, in whole groups; 0 for none.
    groups
        `"spot"`; `"tile"`, squares of about 4 × 4 spots of one slide, because neighbouring spots resemble each other;
        `"slide"`.
    seed
        Of the choice.

    Returns
    -------
    tuple
        Indices of training spots and of validation spots, both sorted.
    """
    names = spot_groups(spots.slide, spots.coords, groups)
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
    """The rows that a run trains on: every view of every training spot is one. Prepares the model for them.

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
        self.token_columns = spots.token_columns
        if config.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        model.eval()  # the start is without dropout: it would be another one each time that a run is resumed

    def __len__(self) -> int:
        return len(self.training) * self.features.shape[1]

    def draw(self, rows: np.ndarray, generator: torch.Generator) -> tuple[np.ndarray, Tensor, Tensor | None]:
        """Return the spots (B,) of rows, their features (B, d), and the factors of feature dropout, if there is any.

        Everything random is drawn for the global batch on every process; each then takes its rows.
        """
        num_views, dropout = self.features.shape[1], self.model.config.feature_dropout
        spot, view = self.training[rows // num_views], rows % num_views
        condition, mask = self.features[spot, view], None
        if dropout:
            kept = torch.rand(condition.shape, generator=generator) >= dropout
            mask = kept.float() / (1 - dropout)
        if self.token_columns:
            # a token whose columns are 0, their mean, is not known
            mask = torch.ones_like(condition) if mask is None else mask
            known = torch.rand(len(condition), len(self.token_columns), generator=generator) >= TOKEN_DROPOUT
            for number, columns in enumerate(self.token_columns):
                mask[:, columns] = known[:, [number]].float()
        return spot, condition, mask


class _MaskedExpression:
    """The objective of masked diffusion: the losses of training and of validation.

    Parameters
    ----------
    data
        Spots and their split.
    spots, scheduler, gene_ids, config, seed
        As of `train_hinge`.
    slide_shift
        (n, G) of all spots; None without initialisation.
    library_shift
        (n,) of all spots, see `initialise_library_size`; None for a model without library sizes.
    device
        Where the model is.
    """

    def __init__(
        self,
        data: TrainingRows,
        spots: SpotTable,
        scheduler: MaskedDiffusionScheduler,
        gene_ids: Tensor,
        config: TrainingConfig,
        seed: int,
        slide_shift: Tensor | None,
        library_shift: Tensor | None,
        device: torch.device,
    ):
        self.data, self.scheduler, self.config, self.seed, self.device = data, scheduler, config, seed, device
        self.gene_ids, self.slide_shift, self.library_shift = gene_ids.to(device), slide_shift, library_shift
        self.values = torch.from_numpy(np.asarray(spots.values, dtype=np.float32))
        self.measured = MeasuredGenes.of(spots)
        self.library_size = None
        if data.model.library_size_model is not None:
            self.library_size = torch.from_numpy(np.asarray(spots.library_size, dtype=np.float32))
        self.warm_steps = round(config.warm_start_share * config.num_steps(len(data)))
        # of validation, evenly spread
        times = np.linspace(1, scheduler.config.num_train_timesteps, VALIDATION_TIMES)
        self.times = times.round().astype(np.int64)

    def inputs_at(
        self,
        spot: np.ndarray,
        timesteps: Tensor,
        uniform: Tensor,
        noise: Tensor,
        condition: Tensor,
        end: Tensor | None,
        feature_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return what the model is given for spots (B,) at timesteps (B,).

        uniform and noise (B, G) decide which genes are masked and what fills them; condition and feature_mask are
        (B, d). end (B,) in [0, 1) decides at which timestep the step ends that is practised, see `drops_masked`.
        """
        visible = self.visible_at(spot, timesteps, uniform)
        inputs = {
            "values": self.scheduler.fill_masked(self.values[spot], visible, noise),
            "visible": visible,
            "timestep": timesteps,
            "features": condition,
            "next_visible": self.visible_at(spot, timesteps - 1, uniform),
        }
        if self.measured is not None:
            inputs["timestep"] = self.measured.timesteps(self.scheduler, spot, timesteps, visible)
        if end is not None:
            # as in sampling, where a step of any length has tokens of the genes that it reveals
            inputs["present"] = self.visible_at(spot, (end * timesteps).long(), uniform)
        if self.slide_shift is not None:
            inputs["slide_shift"] = self.slide_shift[spot]
        if self.library_size is not None:
            inputs["library_size"] = self.library_size[spot]
        if self.library_shift is not None:
            inputs["library_shift"] = self.library_shift[spot]
        if feature_mask is not None:
            inputs["feature_mask"] = feature_mask
        return {name: tensor.to(self.device) for name, tensor in inputs.items()} | {"gene_ids": self.gene_ids}

    def visible_at(self, spot: np.ndarray, timesteps: Tensor, uniform: Tensor) -> Tensor:
        """Return which genes (B, G) of spots (B,) are visible at timesteps (B,); never one that was not measured."""
        visible = self.scheduler.visible_at(timesteps, uniform)
        return visible if self.measured is None else visible * self.measured.of_spots(spot)

    def loss_mask(self, spot: np.ndarray, timesteps: Tensor, uniform: Tensor, genes: Tensor | None) -> Tensor:
        """Return which genes of spots (B,) count (B, G): none that was not measured or has no token."""
        visible = self.scheduler.visible_at(timesteps, uniform)
        mask = loss_mask(self.scheduler, timesteps, visible, uniform, self.config.loss_on)
        if genes is not None:
            mask = mask * torch.zeros(mask.shape[1]).index_fill(0, genes, 1.0)
        return mask if self.measured is None else mask * self.measured.of_spots(spot)

    def some_genes(self, generator: torch.Generator) -> Tensor | None:
        """Return the numbers (n,) of the genes that have tokens in a step; None for all.

        The gene factors see all visible genes, and the backbone a random part of them: as many as memory allows.
        """
        count, num_genes = self.config.genes_per_step, self.values.shape[1]
        if count is None or count >= num_genes:
            return None
        return torch.randperm(num_genes, generator=generator)[:count].sort().values

    def index_of(self, genes: Tensor | None) -> dict[str, Tensor]:
        """Return the argument of the model that says which genes (n,) have tokens."""
        return {} if genes is None else {"index": genes.to(self.device)}

    def batch_loss(self, module, step, rows, positions, generator) -> Tensor:
        """Return the loss of this process's rows; see `BatchLoss`."""
        size, num_genes = len(rows), self.values.shape[1]
        share = WARM_START_MASKED_SHARE if step < self.warm_steps else 1.0
        timesteps = draw_timesteps(self.scheduler, size, num_genes, generator, share)
        uniform = torch.rand(size, num_genes, generator=generator)
        noise = torch.randn(size, num_genes, generator=generator)
        end = torch.rand(size, generator=generator) if self.data.model.drops_masked else None
        spot, condition, feature_mask = self.data.draw(rows, generator)
        genes = self.some_genes(generator)
        weights = spot_weights(self.loss_mask(spot, timesteps, uniform, genes), self.config.weighting)
        drawn = (spot, timesteps, uniform, noise, condition, end, feature_mask)
        inputs = self.inputs_at(*(None if each is None else each[positions] for each in drawn))
        inputs |= self.index_of(genes)
        losses = module(self.values[spot[positions]].to(self.device), **inputs)
        return (losses * weights[positions].to(self.device)).sum() / size

    def evaluate(self, module, rows) -> Tensor:
        """Return the sum of the losses of validation rows, and their number; a row is a held-out spot at one time."""
        sums, num_genes = torch.zeros(2), self.values.shape[1]
        genes = self.some_genes(step_generator(self.seed, 23))  # the same in every evaluation
        for start in range(0, len(rows), self.config.batch_size):
            part = rows[start : start + self.config.batch_size]
            spot = self.data.held[part // len(self.times)]
            timesteps = torch.from_numpy(self.times[part % len(self.times)])
            # one generator a row: the noise of a held-out spot is the same on any number of processes
            generators = [step_generator(self.seed, 21, int(row)) for row in part]
            uniform = torch.stack([torch.rand(num_genes, generator=generator) for generator in generators])
            noise = torch.stack([torch.randn(num_genes, generator=generator) for generator in generators])
            end = None
            if self.data.model.drops_masked:
                end = torch.cat([torch.rand(1, generator=generator) for generator in generators])
            mask = self.loss_mask(spot, timesteps, uniform, genes)
            weights = mask / mask.sum(dim=1, keepdim=True).clamp_min(1)
            inputs = self.inputs_at(spot, timesteps, uniform, noise, self.data.features[spot, 0], end)
            inputs |= self.index_of(genes)
            losses = module(self.values[spot].to(self.device), **inputs).cpu()
            sums += torch.tensor([(losses * weights).sum().item(), float((mask.sum(dim=1) > 0).sum())])
        return sums


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
        validation.
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
    if model.value_bins is not None and not model.value_bins.fitted:
        fit_to_panel(model, gene_ids, spots.counts[data.training], spots.values[data.training])
    accelerator = accelerator or make_accelerator(config, folder)
    gene_ids = gene_ids.to(accelerator.device)
    slide_shift = library_shift = None
    # also before a resumed run: the checkpoint then replaces the parameters, but not buffers and shifts
    model.to(accelerator.device)
    training = spots.subset(data.training)
    if config.initialisation and model.gene_factor_model is not None:
        start = _initialise(model, scheduler, gene_ids, training, seed)
        fit_slide_levels(model, spots, levels).regression.load_state_dict(start.regression.state_dict())
        slide_shift, library_shift = start.slide_shift, start.library_shift
    elif model.library_size_model is not None:
        library_shift = initialise_library_size(model, training)
    # a spot that is held out has its slide's shift, because its regression is out of fold already
    slide_shift, library_shift = (
        None if each is None else _of_all_spots(each, spots, data.training) for each in (slide_shift, library_shift)
    )
    objective = _MaskedExpression(
        data, spots, scheduler, gene_ids, config, seed, slide_shift, library_shift, accelerator.device
    )
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
    )
    if slide_shift is not None:
        fit_masked_mean(model, scheduler, gene_ids, data.features[data.training, 0])
    return result


def fit_slide_levels(model: HingeModel, spots: SpotTable, levels: SlideLevels | None = None) -> SlidePrior:
    """Give a model the prior of slide levels, and return it; arguments as of `train_hinge`."""
    of_spots = SlideLevels.of_spots(spots.known_counts(), spots.library_size, spots.slide, spots.slide, spots.transform)
    levels = of_spots if levels is None else levels
    prior = model.add_slide_prior(sorted(set(levels.patient.tolist())), levels.tokens.shape[1])
    fit_slide_prior(prior, levels, np.isin(levels.sample, of_spots.sample), spots.transform)
    return prior


def _of_all_spots(shift: Tensor, spots: SpotTable, training: np.ndarray) -> Tensor:
    """Return the shift (n, …) of all spots, given those of the training spots; the others have their slide's mean."""
    result = shift.new_zeros(len(spots), *shift.shape[1:])
    for name in np.unique(spots.slide[training]):
        on_slide = torch.from_numpy(spots.slide[training] == name)
        result[torch.from_numpy(spots.slide == name)] = shift[on_slide].mean(dim=0)
    result[torch.from_numpy(training)] = shift
    return result


def _initialise(
    model: HingeModel, scheduler: MaskedDiffusionScheduler, gene_ids: Tensor, training: SpotTable, seed: int
) -> Initialisation:
    """Initialise the gene factors from the training spots; what is fitted in closed form is not trained further."""
    start = initialise_gene_factors(model, scheduler, gene_ids, training, seed)
    # moving it along with residuals that are out of fold would undo the cross-validation of its penalty
    model.gene_factor_model.mean.requires_grad_(False)
    model.gene_factor_model.log_scale.weight.requires_grad_(False)
    return start
