"""Sampling: features of spots in, several draws of every spot's expression out.

A draw of a spot goes through the reverse steps of masked diffusion: in each step the model predicts the distribution of
every masked gene, and the scheduler reveals some genes, which take a value from it and keep it. Spot-draws are
independent of each other given their random numbers, and are computed in batches of any size.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hinge.diffusion.inputs import SamplingSettings, SlideInputs
from hinge.diffusion.passes import genes_with_tokens, given, graphed_tokens
from hinge.diffusion.randomness import DrawNoise, DrawNumbers
from hinge.diffusion.scheduler import MaskedDiffusionScheduler
from hinge.diffusion.slide_frame import SlideFrame
from hinge.models.distributions import ExpressionDistribution
from hinge.models.hinge import HingeModel
from hinge.models.library_size import LibrarySizeModel
from hinge.models.precision import with_float64
from hinge.models.subset import GeneSubset, spots_at_a_time
from hinge.utils.cuda_graphs import GraphedFunction
from hinge.utils.memory import with_less_memory
from hinge.utils.threads import in_torch_threads

REMASKING_SHARE = 0.1
"""Share of the drawn genes that a remasking pass masks and draws again."""

LIBRARY_SIZES = ((0.0, 2 / 3), (3**0.5, 1 / 6), (-(3**0.5), 1 / 6))
"""Library sizes of a spot, in standard deviations of their logarithm from the median, and weights: Gauss-Hermite
quadrature, which gives the mean over the normal distribution of the logarithm."""

BATCHES_IN_A_PART = 8
"""Batches in a part of a slide's draws: what is drawn again if sampling is killed."""


@dataclass
class Draws:
    """Draws of some spots.

    Attributes
    ----------
    values
        (K, n, G) float32 in the model's units, one slice a draw.
    expected
        (n, G) float32: mean of the predicted distribution in the first pass, in which only observed genes are visible,
        and over the library sizes that the spot may have. It is E[expression | features] without the Monte-Carlo error
        of a mean of draws.
    """

    values: np.ndarray
    expected: np.ndarray


def slide_parts(num_spots: int, settings: SamplingSettings) -> list[slice]:
    """Return the ranges of spots that are drawn together; draws of a slide are the same in any process."""
    size = spots_per_part(settings)
    return [slice(start, min(start + size, num_spots)) for start in range(0, num_spots, size)]


def spots_per_part(settings: SamplingSettings) -> int:
    """Return the number of spots in a part of a slide."""
    return max(1, BATCHES_IN_A_PART * settings.batch_size // settings.num_draws)


def draw_parts(
    model: HingeModel,
    scheduler: MaskedDiffusionScheduler,
    gene_ids: Tensor,
    inputs: SlideInputs,
    settings: SamplingSettings,
    parts: Iterable[slice] | None = None,
    progress: bool = True,
) -> Iterator[tuple[slice, Draws]]:
    """Draw a slide part by part, in smaller batches where memory runs out.

    Parameters
    ----------
    model, scheduler, gene_ids, inputs, settings
        As for `draw_spots`; `inputs` are of the whole slide.
    parts
        Ranges of spots; None: those of `slide_parts`.
    progress
        Whether to show a bar (only in a terminal).

    Yields
    ------
    tuple
        A range of spots and its draws.
    """
    parts = slide_parts(len(inputs), settings) if parts is None else list(parts)
    inputs = inputs.with_slide_effect(model, scheduler, gene_ids)
    passes = graphed_tokens(model)
    total, batch_size = sum(part.stop - part.start for part in parts), settings.batch_size
    with tqdm(total=total, desc=f"draws {inputs.slide}", unit="spot", disable=None if progress else True) as bar:
        for part in parts:

            def draw(size: int, part: slice, expected: int) -> Draws:
                if size != expected:  # memory ran out, and graphs of larger batches hold some of it
                    passes.clear()
                now = replace(settings, batch_size=size)
                return draw_spots(model, scheduler, gene_ids, inputs[part], now, passes=passes)

            draws, batch_size = with_less_memory(batch_size, partial(draw, part=part, expected=batch_size))
            yield part, draws
            bar.update(part.stop - part.start)


@torch.inference_mode()
def draw_spots(
    model: HingeModel,
    scheduler: MaskedDiffusionScheduler,
    gene_ids: Tensor,
    inputs: SlideInputs,
    settings: SamplingSettings,
    first_draw: int = 0,
    passes: GraphedFunction | None = None,
) -> Draws:
    """Draw the expression of spots.

    Parameters
    ----------
    model
        With its backbone, on the device that is to compute.
    scheduler
        As used in training.
    gene_ids
        (G,) vocabulary ids of the panel.
    inputs
        The spots, with the slide effect where they are only a part of their slide's.
    settings
        Number of draws and of steps, seed, and how they are made.
    first_draw
        Number of the first draw, to add draws to earlier ones.
    passes
        Of an earlier call with the same model: its CUDA graphs are used again.

    Returns
    -------
    Draws
        A deterministic function of model, features, seed, slide, spot and number of the draw; batch size, device and
        the other spots change it by rounding alone.

    Raises
    ------
    DataError
        Observed values of another shape, or infinite.
    ValueError
        Spatially correlated draws without positions, or more steps than the scheduler has.
    """
    num_spots, num_genes, num_draws = len(inputs), len(gene_ids), settings.num_draws
    inputs.check(num_genes, settings)
    inputs = inputs.with_slide_effect(model, scheduler, gene_ids)
    scheduler.set_timesteps(settings.num_inference_steps)
    sampler = _Sampler(model, scheduler, gene_ids, inputs, settings, passes or graphed_tokens(model))
    values, expected = np.zeros((num_draws, num_spots, num_genes), np.float32), np.zeros((num_spots, num_genes))
    # all draws of a spot are next to each other: the first pass is the same for them
    size = spots_at_a_time(settings.batch_size, num_genes, model.config.hidden_size, sampler.device)
    batches = [np.divmod(part.numpy(), num_draws) for part in torch.arange(num_spots * num_draws).split(size)]
    results = in_torch_threads(lambda at: sampler.draw(at[0], first_draw + at[1]), batches, sampler.device.type)
    for (spot_index, draw_index), (drawn, means) in zip(batches, results, strict=True):
        values[draw_index, spot_index] = drawn
        np.add.at(expected, spot_index, means / num_draws)
    return Draws(values, expected.astype(np.float32))


@dataclass
class _Batch:
    """Tensors of B spot-draws on the model's device, which do not change during the reverse steps.

    Attributes
    ----------
    known
        (B, G), 1 = measured.
    mask_times
        (B, G) of the scheduler.
    condition, library_sizes
        Standardised features (B, d), with the library size for a model that takes it, and library sizes (B,) or None.
    typical
        The same and a weight, for library sizes that stand for all that the spots may have, the median first.
    fill, shift
        (B, G) in place of masked values, and the slide effect.
    typical_shift
        (G,) the slide effect that gives the expected level.
    frame
        Of the slide effect; None for a model without a prior of slide levels.
    numbers
        The other random numbers, on the CPU.
    """

    known: Tensor
    mask_times: Tensor
    condition: Tensor
    library_sizes: Tensor | None
    typical: list[tuple[Tensor, Tensor | None, float]]
    fill: Tensor
    shift: Tensor
    typical_shift: Tensor
    frame: SlideFrame | None
    numbers: DrawNumbers


class _Sampler:
    """The reverse steps of any spot-draws of one call of `draw_spots`."""

    def __init__(
        self,
        model: HingeModel,
        scheduler: MaskedDiffusionScheduler,
        gene_ids: Tensor,
        inputs: SlideInputs,
        settings: SamplingSettings,
        passes: GraphedFunction,
    ) -> None:
        self.model, self.scheduler, self.settings, self.inputs, self.passes = model, scheduler, settings, inputs, passes
        self.device = model.feature_mean.device
        self.gene_ids = gene_ids.to(self.device)
        self.features = self._tensor(inputs.features)
        assert inputs.slide_effect is not None
        together = settings.spatially_correlated
        self.noise = DrawNoise(
            model,
            settings.seed,
            inputs.spots,
            inputs.slide if together else None,
            inputs.positions if together else None,
            len(gene_ids),
            settings.num_inference_steps,
            inputs.slide_effect,
            inputs.slide_effect.coefficients(inputs.features),
        )

    def _tensor(self, array: np.ndarray) -> Tensor:
        # float32 before the device: not every accelerator has float64
        return torch.from_numpy(np.asarray(array, dtype=np.float32)).to(self.device)

    @torch.inference_mode()  # is of a thread
    def draw(self, spot_index: np.ndarray, draw_index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return values and first-pass means (B, G) of spot-draws."""
        batch, values = self._prepare(spot_index, draw_index)
        h, means = self._first_pass(batch, values, spot_index)
        visible, subset = batch.known, None
        for number, timestep in enumerate(self.scheduler.timesteps.tolist()):
            following = self.scheduler.next_visible(timestep, visible, batch.mask_times)
            if number == 0:
                h, subset = self._conditioned_first_pass(batch, values, following, h)
            elif torch.equal(following, visible):
                continue
            else:
                subset = genes_with_tokens(self.model, following, visible)
                h = self._tokens(batch, values, visible, following, timestep, batch.condition, batch.frame, subset)
            sample = self._sample(batch, h, values, visible, batch.numbers, number, subset)
            step = self.scheduler.step(sample, timestep, values, visible, batch.mask_times)
            values, visible = step.prev_sample, step.visible
        for number in range(1, self.settings.remasking + 1):
            values = self._remask(batch, values, self.noise.numbers(spot_index, draw_index, number))
        return values.cpu().numpy(), means.cpu().numpy()

    def _prepare(self, spot_index: np.ndarray, draw_index: np.ndarray) -> tuple[_Batch, Tensor]:
        """Return the batch of spot-draws, and the values (B, G) that are measured, 0 elsewhere."""
        model, inputs, tensor = self.model, self.inputs, self._tensor
        order = (numbers := self.noise.numbers(spot_index, draw_index)).order
        values, known = torch.zeros(2, *order.shape, device=self.device)
        if inputs.observed is not None:
            measured = inputs.observed[spot_index]
            known, values = tensor(~np.isnan(measured)), tensor(np.nan_to_num(measured))
            # measured genes come first in the order: the schedule then counts them as revealed
            order = np.where(np.isnan(measured), order, order * 1e-9)
        standardised = model.standardise(self.features[torch.from_numpy(spot_index).to(self.device)])
        batch = _Batch(
            known=known,
            # the order keeps the precision of float64, on the CPU
            mask_times=self.scheduler.mask_times(torch.from_numpy(order)).to(self.device),
            condition=standardised,
            library_sizes=None,
            typical=[(standardised, None, 1.0)],
            fill=tensor(numbers.fill),
            shift=tensor(numbers.shift),
            typical_shift=tensor(self.noise.effect.typical.values),
            frame=None,
            numbers=numbers,
        )
        if model.library_size_model is not None:
            self._add_library_size(batch, spot_index, model.library_size_model)
        of_draws = (batch.library_sizes, tensor(numbers.library_shift))
        batch.frame = self.noise.effect.frame(batch.condition, batch.shift, *of_draws, spot_index)
        return batch, values

    def _add_library_size(self, batch: _Batch, spot_index: np.ndarray, library_size: LibrarySizeModel) -> None:
        """Put drawn and typical library sizes, or the known ones, into the batch and its conditions."""
        model, numbers, features = self.model, batch.numbers, batch.condition
        shift, typical_shift = self._tensor(numbers.library_shift), self.noise.effect.typical.library_size
        stretch, known = self.noise.effect.stretch, None
        if self.inputs.library_size is not None:
            known = self._tensor(self.inputs.library_size[spot_index])
        # runs of version 0.1, whose models have no prior of slides, keep their expected values
        several = model.slide_prior is not None and (known is None or bool(known.isnan().any()))

        def sizes(normal: Tensor, shift: Tensor | float) -> Tensor:
            drawn = library_size(features, normal, shift, stretch)
            return drawn if known is None else torch.where(known.isnan(), drawn, known)

        def condition(sizes: Tensor, shift: Tensor | float) -> Tensor:
            own = 0.0 if model.slide_prior is None else shift  # without it the condition is the same on all slides
            return model.with_library_size(features, library_size.of_slide(sizes, own, stretch))

        batch.library_sizes = sizes(self._tensor(numbers.library_size), shift)
        batch.condition, batch.typical = condition(batch.library_sizes, shift), []
        for normal, weight in LIBRARY_SIZES if several else ((0.0, 1.0),):
            size = sizes(features.new_full((len(features),), normal), typical_shift)
            batch.typical.append((condition(size, typical_shift), size, weight))

    def _first_pass(self, batch: _Batch, values: Tensor, spot_index: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return tokens (B, P + G, D) at the first timestep with the median library size, and means (B, G)."""
        scheduler, model, visible = self.scheduler, self.model, batch.known
        timestep = int(scheduler.timesteps[0])
        following = scheduler.next_visible(timestep, visible, batch.mask_times)
        # nothing that differs between a spot's draws enters this pass, but for noise in place of masked values and,
        # where the condition looks ahead, what the step reveals
        shared = scheduler.config.fill != "noise" and model.config.condition_on_visible != "next"
        _, first, back = np.unique(spot_index, return_index=True, return_inverse=True)
        rows = torch.from_numpy(first if shared else np.arange(len(spot_index))).to(self.device)
        shift, filled = batch.typical_shift.expand(len(rows), -1), scheduler.fill_masked(values, visible, batch.fill)
        h, means = None, torch.zeros_like(filled[rows])
        for condition, sizes, weight in batch.typical:
            condition, sizes = condition[rows], None if sizes is None else sizes[rows]
            frame = self.noise.effect.frame(condition, shift, sizes, self.noise.effect.typical.library_size)
            tokens = self._tokens(batch, values, visible, following, timestep, condition, frame, rows=rows)
            output, _ = self._read_out(tokens, filled[rows], visible[rows], condition, shift, sizes, frame)
            # some means are averages of quantiles, which need float64
            means += weight * with_float64(output).mean.float().to(self.device)
            h = tokens if h is None else h
        assert h is not None
        means = torch.where(visible[rows] > 0, values[rows], means)
        if shared:
            of_spot = torch.from_numpy(back).to(self.device)
            h, means = h[of_spot], means[of_spot]
        return h, means

    def _conditioned_first_pass(
        self, batch: _Batch, values: Tensor, following: Tensor, h: Tensor
    ) -> tuple[Tensor, GeneSubset | None]:
        """Return the tokens of the first step: those of the typical library size, or new ones where draws have others.

        Whether tokens are those of all genes must not depend on which spots are in the batch.
        """
        sizes, typical = batch.library_sizes, batch.typical[0][1]
        if sizes is None or typical is None or (not self.model.drops_masked and torch.equal(sizes, typical)):
            return h, None
        subset = genes_with_tokens(self.model, following, batch.known)
        inputs = (batch.known, following, int(self.scheduler.timesteps[0]), batch.condition, batch.frame, subset)
        return self._tokens(batch, values, *inputs), subset

    def _remask(self, batch: _Batch, values: Tensor, numbers: DrawNumbers) -> Tensor:
        """Return values (B, G) after a pass that masks some drawn genes and draws them again."""
        scheduler = self.scheduler
        again = self._tensor(numbers.order < REMASKING_SHARE) * (1 - batch.known)
        visible, everything = 1 - again, torch.ones_like(again)
        # the last step ends at timestep 0 and reveals all genes that are still masked
        last = int(scheduler.timesteps[-1])
        timesteps = scheduler.timesteps_of(visible)
        h = self._tokens(batch, values, visible, everything, timesteps, batch.condition, batch.frame)
        sample = self._sample(batch, h, values, visible, numbers, 0, None)
        return scheduler.step(sample, last, values, visible, batch.mask_times).prev_sample

    def _tokens(
        self,
        batch: _Batch,
        values: Tensor,
        visible: Tensor,
        following: Tensor,
        timestep: int | Tensor,
        condition: Tensor,
        frame: SlideFrame | None,
        subset: GeneSubset | None = None,
        rows: Tensor | slice = slice(None),
    ) -> Tensor:
        """Return the backbone's tokens (b, P + n, D) of some rows, at a timestep or at timesteps (B,).

        condition (b, d) and frame are of these rows.
        """
        if isinstance(timestep, int):
            # a spot with many measured genes is further than the schedule
            timestep = self.scheduler.timesteps_of(batch.known, timestep)
        filled, visible = self.scheduler.fill_masked(values, visible, batch.fill)[rows], visible[rows]
        return self.passes(
            filled if frame is None else frame.visible(filled, visible),
            visible,
            timestep.to(self.device)[rows],
            condition,
            self.gene_ids,
            following[rows],
            *given(subset),
        )

    def _read_out(
        self,
        h: Tensor,
        filled: Tensor,
        visible: Tensor,
        condition: Tensor,
        shift: Tensor,
        library_sizes: Tensor | None,
        frame: SlideFrame | None,
        subset: GeneSubset | None = None,
    ) -> tuple[ExpressionDistribution, Tensor | None]:
        """Return the distributions (B, G) on the slide, and W, from tokens."""
        model, gene_ids = self.model, self.gene_ids
        if frame is None:
            return model.read_out(h, filled, visible, condition, gene_ids, shift, library_sizes, subset)
        location, tokens, log_scale, left = model.locate(
            h, frame.visible(filled, visible), visible, condition, gene_ids, frame.change_there, subset
        )
        if log_scale is not None:
            log_scale = log_scale + frame.log_scale
        return model.distribution(frame.location(location), tokens, log_scale, library_sizes), left

    def _sample(
        self,
        batch: _Batch,
        h: Tensor,
        values: Tensor,
        visible: Tensor,
        numbers: DrawNumbers,
        number: int,
        subset: GeneSubset | None,
    ) -> Tensor:
        """Return the values (B, G) that genes take if they are revealed together in step `number`."""
        filled = self.scheduler.fill_masked(values, visible, batch.fill)
        output, left = self._read_out(
            h, filled, visible, batch.condition, batch.shift, batch.library_sizes, batch.frame, subset
        )
        normal = self._tensor(numbers.value)
        factors = self.model.gene_factor_model
        if factors is not None and left is not None:
            normal = factors.innovation(left, self._tensor(numbers.factors[:, number]), normal)
        uniform = torch.special.ndtr(with_float64(normal).double()).clamp(1e-12, 1 - 1e-12)
        return with_float64(output).icdf(uniform).float().to(self.device)
