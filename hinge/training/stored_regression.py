"""Ridge regression on all training spots of a store, from sums over them: memory does not grow with the spots."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from hinge.data.gene_parts import slide_sets
from hinge.data.spot_store import SpotStore
from hinge.data.spots import spot_groups
from hinge.evaluation import ridge
from hinge.models.hinge import HingeModel
from hinge.training.rows import shifts_of_slide
from hinge.utils.errors import DataError

logger = logging.getLogger(__name__)

_READ_SPOTS = 1024


@dataclass
class _Sums:
    """Sums over spots of features x (d,) and values y (C,), and of their products."""

    count: int
    x: NDArray
    y: NDArray
    xx: NDArray
    xy: NDArray
    yy: NDArray

    @classmethod
    def zeros(cls, num_features: int, num_values: int) -> "_Sums":
        shapes = (num_features,), (num_values,), (num_features, num_features), (num_features, num_values), (num_values,)
        return cls(0, *map(np.zeros, shapes))

    def add(self, x: NDArray, y: NDArray) -> None:
        """Add spots with features (m, d) and values (m, C)."""
        self.count += len(x)
        self.x += x.sum(axis=0)
        self.y += y.sum(axis=0)
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.yy += (y**2).sum(axis=0)

    def plus(self, other: "_Sums", sign: int = 1) -> "_Sums":
        """Return the sums with those of other spots, or without them (sign -1)."""
        return _Sums(*(own + sign * each for own, each in zip(vars(self).values(), vars(other).values(), strict=True)))

    def standardised(self, by: "_Sums") -> tuple[NDArray, NDArray, NDArray]:
        """Return the sums of the products xxᵀ, xyᵀ and y² with x standardised and y centred as the spots `by` are."""
        mean, level = by.x / by.count, by.y / by.count
        width = _widths(by)
        xx = self.xx - np.outer(mean, self.x) - np.outer(self.x, mean) + self.count * np.outer(mean, mean)
        xy = self.xy - np.outer(mean, self.y) - np.outer(self.x, level) + self.count * np.outer(mean, level)
        return xx / width / width[:, None], xy / width[:, None], self.yy - 2 * level * self.y + self.count * level**2


def _widths(sums: _Sums) -> NDArray:
    """Return the standard deviation (d,) of the features; 1 for constant ones."""
    variance = np.diag(sums.xx) / sums.count - (sums.x / sums.count) ** 2
    return np.sqrt(np.where(variance > 1e-12 * np.diag(sums.xx) / sums.count, variance, 1.0))


class StoredRegression:
    """Fits `hinge.evaluation.ridge.fit_ridge_of_parts` to all training spots of a store.

    Each set of genes that the same slides measured takes one pass over these slides for the penalty and one for the
    weights; with a single set one pass is enough.

    Parameters
    ----------
    store
        The spots.
    left_out
        Numbers of the spots that are not trained on, sorted.
    numbers
        (n,) numbers of the training spots in memory.
    """

    def __init__(self, store: SpotStore, left_out: NDArray[np.int64], numbers: NDArray[np.int64]):
        self.store, self.left_out, self.numbers = store, left_out, numbers
        every = np.ones((len(store.names), len(store.genes)), dtype=bool)
        self.sets = slide_sets(every if store.of_slides is None else store.of_slides)

    def __len__(self) -> int:
        return len(self.store) - len(self.left_out)

    def fit(self, model: HingeModel, x: NDArray, offset: NDArray, library_shift: Tensor | None) -> ridge.RidgeFit:
        """Return the regression of values without `offset` (G,) on the conditions of view 0.

        Parameters
        ----------
        model
            With feature statistics, and a fitted `LibrarySizeModel` if it has one.
        x
            (n, d) conditions of the spots in memory, of which `held_out` is.
        offset
            (G,) what the backbone decodes where no gene is visible.
        library_shift
            (n,) of the spots in memory; None for a model without library sizes.

        Raises
        ------
        DataError
            There is only one group to hold out; or the store is damaged.
        """
        self._model, self._offset, self._width = model, offset, x.shape[1]
        self._shifts = self._library_shifts(library_shift)
        sizes = [len(columns) * self._folds(slides)[0].size for columns, slides in self.sets]
        errors, kept = np.zeros(len(ridge.PENALTIES)), None
        for number in np.argsort([-size for size in sizes], kind="stable")[: ridge.MOST_SEARCHED]:
            kept = self._sums(*self.sets[number])
            errors += sizes[number] * _errors(kept)
        penalty = float(ridge.PENALTIES[int(np.argmin(errors))])
        weight, bias = np.zeros((len(offset), self._width)), np.zeros(len(offset))
        held_out = np.zeros((len(x), len(offset)))
        for columns, slides in self.sets:
            parts = kept if kept is not None and len(self.sets) == 1 else self._sums(columns, slides)
            weight[columns], bias[columns] = _fitted(parts, None, penalty)
            held_out[:, columns] = x @ weight[columns].T + bias[columns]
            rows, folds = self._folds(slides)
            place = np.searchsorted(rows, self.numbers).clip(max=len(rows) - 1)
            fold = np.where(rows[place] == self.numbers, folds[place], -1)
            for each in range(len(parts)):
                own = fold == each
                if own.any():
                    slope, level = _fitted(parts, each, penalty)
                    held_out[np.ix_(own, columns)] = x[own] @ slope.T + level
        logger.info("the regression on the features is fitted to all %d training spots", len(self))
        return ridge.RidgeFit(weight, bias, held_out, penalty)

    def _library_shifts(self, of_spots: Tensor | None) -> NDArray | None:
        """Return the library shift (S,) of each slide; None for a model without library sizes."""
        if of_spots is None:
            return None
        slide_of, known = self.store.slide_of(self.numbers), of_spots.double().numpy()
        shifts = np.zeros(len(self.store.names))
        for slide in range(len(shifts)):
            own = slide_of == slide
            if own.any():
                shifts[slide] = known[own].mean()
            else:
                shifts[slide] = float(shifts_of_slide(self._model, self.store, slide, False, True)[1])
        return shifts

    def _rows(self, slides: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Return the numbers of the training spots of some slides, sorted."""
        offsets = self.store.offsets
        ranges = [np.arange(offsets[each], offsets[each + 1]) for each in np.flatnonzero(slides)]
        return np.setdiff1d(np.concatenate(ranges), self.left_out, assume_unique=True)

    def _folds(self, slides: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
        """Return the training spots of some slides and their folds, as `fit_ridge_of_parts` chooses them."""
        from sklearn.model_selection import GroupKFold

        rows = self._rows(slides)
        of_slide = self.store.slide_of(rows)
        if len(np.unique(of_slide)) == 1:
            slide = self.store.slide(int(of_slide[0]), rows - self.store.offsets[of_slide[0]], features=False)
            groups = spot_groups(slide.slide, slide.coords, "fold")
        else:
            groups = np.argsort(np.argsort(self.store.names))[of_slide]  # numbers in the order of the names
        count = len(np.unique(groups))
        if count < 2:
            raise DataError("cross-validation of ridge regression takes training spots of at least two groups")
        folds = np.zeros(len(rows), dtype=np.int8)
        for number, (_, held) in enumerate(GroupKFold(min(count, ridge.MAX_FOLDS)).split(rows, groups=groups)):
            folds[held] = number
        return rows, folds

    def _sums(self, columns: NDArray[np.int64], slides: NDArray[np.bool_]) -> list[_Sums]:
        """Return the sums of each fold over the spots of some slides, for some genes."""
        rows, folds = self._folds(slides)
        found = [_Sums.zeros(self._width, len(columns)) for _ in range(int(folds.max()) + 1)]
        for start, features, values, sizes in self._blocks(slides):
            first, last = np.searchsorted(rows, [start, start + len(features)])
            own, fold = rows[first:last] - start, folds[first:last]
            if len(own) == 0:
                continue
            slide = int(self.store.slide_of(rows[[first]])[0])
            x = self._condition(features[own], sizes[own], slide)
            y = values[np.ix_(own, columns)].astype(np.float64) - self._offset[columns]
            if (library_size := self._model.library_size_model) is not None:
                with torch.no_grad():
                    change = library_size.change(torch.from_numpy(sizes[own]).to(self._model.feature_mean.device))
                y -= change.cpu().numpy()[:, columns]
            for number in np.unique(fold).tolist():
                found[number].add(x[fold == number], y[fold == number])
        return found

    def _blocks(self, slides: NDArray[np.bool_]) -> Iterator[tuple[int, NDArray, NDArray, NDArray]]:
        """Yield the first spot, the features (m, d), the values and the library sizes of blocks of some slides."""
        offsets, chosen = self.store.offsets.tolist(), np.flatnonzero(slides).tolist()
        for slide in tqdm(chosen, desc="regression", unit="slide", leave=False, disable=None, dynamic_ncols=True):
            for start in range(offsets[slide], offsets[slide + 1], _READ_SPOTS):
                features, values, sizes = self.store.read(start, min(start + _READ_SPOTS, offsets[slide + 1]))
                yield start, features[:, 0], values, sizes

    @torch.no_grad()
    def _condition(self, features: NDArray, sizes: NDArray, slide: int) -> NDArray:
        """Return the condition (m, d) of spots of a slide."""
        model, device = self._model, self._model.feature_mean.device
        condition = model.standardise(torch.from_numpy(features.astype(np.float32)).to(device))
        if self._shifts is not None:
            # as of the spots in memory
            relative = torch.from_numpy(sizes) * torch.tensor(-self._shifts[slide], dtype=torch.float32).exp()
            condition = model.with_library_size(condition, relative.to(device))
        return condition.cpu().numpy().astype(np.float64)


def _errors(folds: list[_Sums]) -> NDArray:
    """Return the mean squared error of held-out folds for each of `ridge.PENALTIES`, averaged over folds."""
    everything, errors = _total(folds), np.zeros(len(ridge.PENALTIES))
    for held in folds:
        rest = everything.plus(held, -1)
        xx, xy, _ = rest.standardised(rest)
        sizes, vectors = np.linalg.eigh(xx)
        along = vectors.T @ xy
        xx, xy, yy = held.standardised(rest)
        spread, common = vectors.T @ xx @ vectors, vectors.T @ xy
        for number, penalty in enumerate(ridge.PENALTIES):
            weight = along / (sizes + penalty)[:, None]
            explained = (weight * (2 * common - spread @ weight)).sum()
            errors[number] += (yy.sum() - explained) / (held.count * len(held.y))
    return errors / len(folds)


def _fitted(folds: list[_Sums], without: int | None, penalty: float) -> tuple[NDArray, NDArray]:
    """Return weights (C, d) and biases (C,) of a fit to all folds, or to all but one."""
    from scipy.linalg import solve

    sums = _total(folds) if without is None else _total(folds).plus(folds[without], -1)
    xx, xy, _ = sums.standardised(sums)
    xx[np.diag_indices_from(xx)] += penalty
    weight = solve(xx, xy, assume_a="pos").T / _widths(sums)
    return weight, (sums.y - weight @ sums.x) / sums.count


def _total(folds: list[_Sums]) -> _Sums:
    total = folds[0]
    for each in folds[1:]:
        total = total.plus(each)
    return total
