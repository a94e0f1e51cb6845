"""The rows that a model is trained on: views of spots in memory, or of spots in a store on disk."""

from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hinge.data.spot_store import BLOCK_SPOTS, PART_SPOTS, SpotStore
from hinge.data.spots import SpotTable, spot_groups
from hinge.models.hinge import HingeModel
from hinge.training.blocks import BLOCKS_OF_GROUP, GROUP_BYTES, BlockOrder, BlockReader
from hinge.training.loop import step_generator
from hinge.training.measured import MeasuredGenes
from hinge.training.settings import TrainingConfig
from hinge.utils.errors import DataError

TOKEN_DROPOUT = 0.15
"""Share of the training rows of whose slide a token is not known."""


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
    found = spots.measured_slides()
    if found is not None and is_held.any():
        # a gene that held-out spots alone have cannot be trained: these spots are not held out
        of_slides, slide_of = found
        lost = ~of_slides[np.unique(slide_of[~is_held])].any(axis=0)
        is_held &= ~np.asarray(of_slides[:, lost].any(axis=1))[slide_of]
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)


def spots_in_memory(spots: SpotTable | SpotStore, most: int, seed: int) -> tuple[SpotTable, NDArray[np.int64]]:
    """Return the spots that initialisation and validation use, and their numbers: all, or at most `most` of a store."""
    return (spots, np.arange(len(spots))) if isinstance(spots, SpotTable) else spots.some_spots(most, seed)


class SpotBatch(NamedTuple):
    """What the objective takes of B spots.

    Attributes
    ----------
    values
        (B, G).
    condition
        (B, d) features of one view.
    library_size
        (B,).
    measured
        (B, G), 1 where the slide measured the gene; None where all slides have all genes.
    slide_shift, library_shift
        (B, G) and (B,) of the initialisation; None without.
    """

    values: Tensor
    condition: Tensor
    library_size: Tensor
    measured: Tensor | None
    slide_shift: Tensor | None
    library_shift: Tensor | None

    def at(self, positions: NDArray[np.int64]) -> Self:
        """Return some of the spots."""
        return type(self)(*(None if each is None else each[positions] for each in self))


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
    spots
        Those in memory: all, or a part of a store that initialisation and validation use.
    training, held
        Indices of them.
    features
        (n, V, d) of them.

    Raises
    ------
    DataError
        No spot, or spots without features.
    """

    def __init__(self, model: HingeModel, spots: SpotTable | SpotStore, config: TrainingConfig, seed: int):
        if len(spots) == 0 or (isinstance(spots, SpotTable) and spots.features is None):
            raise DataError("training needs spots with features")
        self.model, self.token_columns = model, spots.token_columns
        self.spots, self.numbers = spots_in_memory(spots, config.spots_in_memory, seed)
        self.training, self.held = split_spots(self.spots, config.validation_share, config.validation_groups, seed)
        self.features = torch.from_numpy(np.asarray(self.spots.features, dtype=np.float32))
        self._values = torch.from_numpy(np.asarray(self.spots.values, dtype=np.float32))
        self._sizes = torch.from_numpy(np.asarray(self.spots.library_size, dtype=np.float32))
        self._measured = MeasuredGenes.of(self.spots)
        self._slide_shift: Tensor | None = None
        self._library_shift: Tensor | None = None
        self.stored = _StoredRows(self, spots, config, seed) if isinstance(spots, SpotStore) else None
        if len(self.spots) == len(spots):
            model.set_feature_statistics(self.features[self.training].flatten(0, 1))
        else:
            assert isinstance(spots, SpotStore)
            mean, deviation = (torch.from_numpy(each) for each in spots.moments())
            model.feature_mean.copy_(mean)
            model.feature_std.copy_(torch.where(deviation > 1e-8, deviation, torch.ones_like(deviation)))
        if config.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        model.eval()  # the start is without dropout: it would be another one each time that a run is resumed

    def __len__(self) -> int:
        if self.stored is not None:
            return len(self.stored.order)
        return len(self.training) * self.features.shape[1]

    @property
    def num_genes(self) -> int:
        """G."""
        return self._values.shape[1]

    def set_shifts(self, slide_shift: Tensor | None, library_shift: Tensor | None) -> None:
        """Keep the shifts (n, G) and (n,) of the training spots in memory, see `Initialisation`; None for none.

        A spot that is held out has its slide's shift, because its regression is out of fold already.
        """
        shifts = (None if each is None else self._of_all_spots(each) for each in (slide_shift, library_shift))
        self._slide_shift, self._library_shift = shifts
        if self.stored is not None:
            self.stored.set_shifts(self._slide_shift, self._library_shift)

    def _of_all_spots(self, shift: Tensor) -> Tensor:
        """Return the shift (n, …) of all spots in memory: those that are not trained on have their slide's mean."""
        slide, training = self.spots.slide, self.training
        result = shift.new_zeros(len(slide), *shift.shape[1:])
        for name in np.unique(slide[training]):
            on_slide = torch.from_numpy(slide[training] == name)
            result[torch.from_numpy(slide == name)] = shift[on_slide].mean(dim=0)
        result[torch.from_numpy(training)] = shift
        return result

    def draw(self, rows: NDArray, generator: torch.Generator) -> tuple[NDArray, Tensor, Tensor | None]:
        """Return the spots (B,) of rows in memory, their features (B, d), and the factors of `feature_mask`."""
        num_views = self.features.shape[1]
        spot = self.training[rows // num_views]
        condition = self.features[spot, rows % num_views]
        return spot, condition, self.feature_mask(condition, generator)

    def feature_mask(self, condition: Tensor, generator: torch.Generator) -> Tensor | None:
        """Return the factors (B, d) of feature dropout and of unknown tokens, None if there are neither.

        Everything random is drawn for the global batch on every process; each then takes its rows.
        """
        dropout, mask = self.model.config.feature_dropout, None
        if dropout:
            kept = torch.rand(condition.shape, generator=generator) >= dropout
            mask = kept.float() / (1 - dropout)
        if self.token_columns:
            # a token whose columns are 0, their mean, is not known
            mask = torch.ones_like(condition) if mask is None else mask
            known = torch.rand(len(condition), len(self.token_columns), generator=generator) >= TOKEN_DROPOUT
            for number, columns in enumerate(self.token_columns):
                mask[:, columns] = known[:, [number]].float()
        return mask

    def batch(self, step: int, rows: NDArray, generator: torch.Generator) -> tuple[SpotBatch, Tensor | None]:
        """Return the rows of a step and the factors of `feature_mask`."""
        if self.stored is not None:
            batch = self.stored.batch(step)
            return batch, self.feature_mask(batch.condition, generator)
        spot, condition, mask = self.draw(rows, generator)
        return self._in_memory(spot, condition), mask

    def held_batch(self, index: NDArray) -> SpotBatch:
        """Return held-out spots, given the positions (B,) of their indices in `held`; the view is the plain one."""
        spot = self.held[index]
        return self._in_memory(spot, self.features[spot, 0])

    def _in_memory(self, spot: NDArray, condition: Tensor) -> SpotBatch:
        return SpotBatch(
            self._values[spot],
            condition,
            self._sizes[spot],
            None if self._measured is None else self._measured.of_spots(spot),
            *(None if each is None else each[spot] for each in (self._slide_shift, self._library_shift)),
        )


class _StoredRows:
    """The training rows of a store: all of its spots but those that are held out."""

    def __init__(self, data: TrainingRows, store: SpotStore, config: TrainingConfig, seed: int):
        self.data, self.store = data, store
        left_out = data.numbers[data.held]
        if config.validation_groups == "slide":  # its spots outside of memory are not trained on either
            slides = np.unique(store.slide_of(left_out))
            left_out = np.concatenate(
                [np.arange(store.offsets[each], store.offsets[each + 1]) for each in slides] or [left_out]
            )
        of_block = BLOCK_SPOTS * (2 * store.num_views * store.feature_dim + 4 * len(store.genes))
        blocks = min(BLOCKS_OF_GROUP, max(4, GROUP_BYTES // of_block))
        self.order = BlockOrder(store.offsets, left_out, store.num_views, config.batch_size, seed, blocks)
        self.reader = BlockReader(store, self.order)
        self._measured = None if store.of_slides is None else torch.from_numpy(store.of_slides).float()
        self._of_slides: list[Tensor | None] = [None, None]

    def set_shifts(self, *shifts: Tensor | None) -> None:
        """Keep the mean shifts of the slides, from those (n, …) of the spots in memory.

        Slides of which no spot is in memory have a shift of their own, see `shifts_of_slide`.
        """
        slides = self.store.slide_of(self.data.numbers)
        for place, shift in enumerate(shifts):
            if shift is None:
                continue
            mean = shift.new_zeros(len(self.store.names), *shift.shape[1:])
            for slide in np.unique(slides):
                mean[slide] = shift[torch.from_numpy(slides == slide)].mean(dim=0)
            self._of_slides[place] = mean
        for slide in np.setdiff1d(np.arange(len(self.store.names)), slides).tolist():
            found = shifts_of_slide(self.data.model, self.store, slide, *(each is not None for each in shifts))
            for mean, shift in zip(self._of_slides, found, strict=True):
                if mean is not None and shift is not None:
                    mean[slide] = shift

    def batch(self, step: int) -> SpotBatch:
        """Return the rows of a step."""
        found, spots = self.reader.read(step), self.order.rows(step) // self.store.num_views
        slide = torch.from_numpy(self.store.slide_of(spots))
        place = np.searchsorted(self.data.numbers, spots).clip(max=len(self.data.numbers) - 1)
        known = self.data.numbers[place] == spots
        shifts = []
        for of_slides, of_spots in zip(
            self._of_slides, (self.data._slide_shift, self.data._library_shift), strict=True
        ):
            shift = None
            if of_slides is not None and of_spots is not None:
                shift = of_slides[slide]
                shift[torch.from_numpy(known)] = of_spots[place[known]]
            shifts.append(shift)
        measured = None if self._measured is None else self._measured[slide]
        return SpotBatch(found.values, found.features, found.library_size, measured, *shifts)


@torch.no_grad()
def shifts_of_slide(
    model: HingeModel, store: SpotStore, slide: int, with_genes: bool, with_library: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the slide shift (G,) and the library shift () of a slide that the initialisation did not see.

    They are the mean residuals of some of its spots from the regressions, as for a spot that is held out.
    """
    size = int(store.offsets[slide + 1] - store.offsets[slide])
    spots = store.slide(slide, np.unique(np.linspace(0, size - 1, 2 * PART_SPOTS).astype(np.int64)))
    device = model.feature_mean.device
    condition = model.standardise(torch.from_numpy(np.ascontiguousarray(spots.features[:, 0])).to(device))
    shift = library_shift = None
    if with_library and model.library_size_model is not None:
        sizes = torch.from_numpy(spots.library_size).to(device)
        library_shift = (sizes.clamp_min(1).log() - model.library_size_model.mean(condition).squeeze(-1)).mean()
        condition = model.with_library_size(condition, sizes * (-library_shift).exp())
    if with_genes:
        factors = model.gene_factor_model
        left = torch.from_numpy(spots.values).to(device) - factors.offset - factors.mean(condition)
        if (library_size := model.library_size_model) is not None:
            left = left - library_size.change(torch.from_numpy(spots.library_size).to(device))
        shift = left.mean(dim=0).cpu()
        there = spots.measured.get(store.names[slide])
        if there is not None:
            shift[~torch.from_numpy(there)] = 0.0
    return shift, None if library_shift is None else library_shift.cpu()
