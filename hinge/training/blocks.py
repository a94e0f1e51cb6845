"""Training rows of a store in a random order that reads blocks of neighbouring spots."""

import math
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hinge.data.spot_store import BLOCK_SPOTS, SpotStore
from hinge.training.loop import step_generator

BLOCKS_OF_GROUP = 64
"""Blocks whose spots are mixed."""

GROUP_BYTES = 48 << 20
"""Bytes of these blocks, about, unless fewer than four blocks have that many; three groups are in memory."""


class BlockOrder:
    """The order in which the views of spots are trained on.

    Blocks of neighbouring spots are shuffled, and the rows of each `BLOCKS_OF_GROUP` successive blocks are shuffled
    among themselves. An epoch has every row once; its last batch may be short. The rows of a step are a function of the
    seed and the step alone, so that training can continue in the middle of an epoch.

    Parameters
    ----------
    offsets
        (S + 1,) number of the first spot of each slide, and of all spots. A block does not leave its slide.
    left_out
        Numbers of spots that are not trained on, sorted.
    num_views
        V; row r is view r % V of spot r // V.
    batch_size
        Rows of a step.
    seed
        Of the order.
    blocks_of_group
        Blocks whose rows are mixed.
    """

    def __init__(
        self,
        offsets: NDArray[np.int64],
        left_out: NDArray[np.int64],
        num_views: int,
        batch_size: int,
        seed: int,
        blocks_of_group: int = BLOCKS_OF_GROUP,
    ):
        starts = [np.arange(first, last, BLOCK_SPOTS) for first, last in pairwise(offsets.tolist())]
        ends = [np.minimum(of_slide + BLOCK_SPOTS, last) for of_slide, last in zip(starts, offsets[1:], strict=True)]
        self.starts, self.ends, self.left_out = np.concatenate(starts), np.concatenate(ends), left_out
        taken = np.searchsorted(left_out, self.ends) - np.searchsorted(left_out, self.starts)
        self.counts = (self.ends - self.starts - taken) * num_views
        some = self.counts > 0
        self.starts, self.ends, self.counts = self.starts[some], self.ends[some], self.counts[some]
        self.num_views, self.batch_size, self.seed, self.size = num_views, batch_size, seed, blocks_of_group
        self.num_groups = -(-len(self.starts) // blocks_of_group)
        self._epoch = lru_cache(maxsize=2)(self._order_of_epoch)
        self._rows = lru_cache(maxsize=3)(self._rows_of_group)

    def __len__(self) -> int:
        return int(self.counts.sum())

    def rows(self, step: int) -> NDArray[np.int64]:
        """Return the rows (B,) of a step."""
        return np.concatenate([self.rows_in(step, group) for group in self.groups(step)])

    def rows_in(self, step: int, group: int) -> NDArray[np.int64]:
        """Return the rows of a step that are in a group."""
        epoch, low, high = self._place(step)
        first = int(self._epoch(epoch)[1][group])
        return self._rows(epoch, group)[max(low - first, 0) : high - first]

    def groups(self, step: int) -> range:
        """Return the numbers of the groups, within the epoch of a step, that have its rows."""
        epoch, low, high = self._place(step)
        first, last = np.searchsorted(self._epoch(epoch)[1], [low, high - 1], side="right") - 1
        return range(int(first), int(last) + 1)

    def epoch_of(self, step: int) -> int:
        """Return the epoch of a step."""
        return self._place(step)[0]

    def blocks(self, epoch: int, group: int) -> list[tuple[int, int]]:
        """Return first spot and end of the blocks of a group."""
        chosen = self._epoch(epoch)[0][group * self.size : (group + 1) * self.size]
        return list(zip(self.starts[chosen].tolist(), self.ends[chosen].tolist(), strict=True))

    def _place(self, step: int) -> tuple[int, int, int]:
        """Return the epoch of a step, and where its rows start and end in it."""
        epoch, place = divmod(step, math.ceil(len(self) / self.batch_size))
        return epoch, place * self.batch_size, min((place + 1) * self.batch_size, len(self))

    def _order_of_epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the order of the blocks, and the number of the first row of each group."""
        order = torch.randperm(len(self.starts), generator=step_generator(self.seed, 25, epoch)).numpy()
        before = np.concatenate([[0], np.cumsum(self.counts[order])])
        return order, before[np.arange(self.num_groups) * self.size]

    def _rows_of_group(self, epoch: int, group: int) -> NDArray[np.int64]:
        spots = np.concatenate([np.arange(start, end) for start, end in self.blocks(epoch, group)])
        spots = spots[~np.isin(spots, self.left_out)]
        rows = (spots[:, None] * self.num_views + np.arange(self.num_views)).ravel()
        return rows[torch.randperm(len(rows), generator=step_generator(self.seed, 26, epoch, group)).numpy()]


class StoredRows(NamedTuple):
    """Rows of a step: features (B, d), values (B, G) and library sizes (B,), float32."""

    features: Tensor
    values: Tensor
    library_size: Tensor


class _Group(NamedTuple):
    spots: NDArray[np.int64]  # sorted
    place: NDArray[np.int64]  # of each of them in the arrays
    features: NDArray[np.float16]
    values: NDArray[np.float32]
    library_size: NDArray[np.float32]


class BlockReader:
    """Reads the rows of successive steps from a store; a thread reads the blocks of the next steps ahead.

    Use it as a context manager, which ends the thread.

    Parameters
    ----------
    store
        The spots.
    order
        Of the steps.
    """

    def __init__(self, store: SpotStore, order: BlockOrder):
        self.store, self.order = store, order
        self._groups: dict[tuple[int, int], Future[_Group]] = {}

    def __enter__(self) -> Self:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reading of spots")
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._groups.clear()

    def read(self, step: int) -> StoredRows:
        """Return the rows of a step, in the order of `BlockOrder.rows`.

        Raises
        ------
        DataError
            The store is damaged.
        """
        epoch, groups = self.order.epoch_of(step), self.order.groups(step)
        after = groups[-1] + 1
        following = (epoch, after) if after < self.order.num_groups else (epoch + 1, 0)
        wanted = [*((epoch, group) for group in groups), following]
        self._groups = {key: self._groups.get(key) or self._thread.submit(self._load, *key) for key in wanted}
        parts = []
        for group in groups:
            loaded = self._groups[epoch, group].result()
            spots, views = np.divmod(self.order.rows_in(step, group), self.order.num_views)
            place = loaded.place[np.searchsorted(loaded.spots, spots)]
            parts.append((loaded.features[place, views], loaded.values[place], loaded.library_size[place]))
        arrays = (np.concatenate(each).astype(np.float32) for each in zip(*parts, strict=True))
        return StoredRows(*map(torch.from_numpy, arrays))

    def _load(self, epoch: int, group: int) -> _Group:
        blocks = self.order.blocks(epoch, group)
        spots = np.concatenate([np.arange(start, end) for start, end in blocks])
        place = np.argsort(spots)
        arrays = zip(*(self.store.read(start, end) for start, end in blocks), strict=True)
        return _Group(spots[place], place, *map(np.concatenate, arrays))
