"""Which genes of a panel the slides of training spots measured."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hinge.data.spots import SpotTable
from hinge.diffusion.scheduler import MaskedDiffusionScheduler


class MeasuredGenes:
    """Which genes the slide of each spot measured.

    Parameters
    ----------
    of_slides
        (S, G) whether a slide measured a gene.
    slide_of
        (n,) number of each spot's slide.
    """

    def __init__(self, of_slides: NDArray[np.bool_], slide_of: NDArray[np.int64]):
        self.of_slides, self.slide_of = of_slides, slide_of
        self._tensor = torch.from_numpy(of_slides).float()

    @classmethod
    def of(cls, spots: SpotTable) -> "MeasuredGenes | None":
        """Return those of some spots; None where every slide has all genes."""
        found = spots.measured_slides()
        return None if found is None else cls(*found)

    def of_rows(self, rows: NDArray) -> "MeasuredGenes":
        """Return those of some of the spots."""
        return MeasuredGenes(self.of_slides, self.slide_of[rows])

    def of_genes(self, chosen: NDArray) -> "MeasuredGenes":
        """Return those of some of the genes."""
        return MeasuredGenes(self.of_slides[:, chosen], self.slide_of)

    def slides(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.bool_]]]:
        """Yield the numbers of the spots of each slide that has any, and the genes (G,) that it measured."""
        for number in range(len(self.of_slides)):
            on_slide = np.flatnonzero(self.slide_of == number)
            if len(on_slide):
                yield on_slide, self.of_slides[number]

    def count(self) -> NDArray[np.int64]:
        """Return the number (G,) of spots that have each gene."""
        counts = np.bincount(self.slide_of, minlength=len(self.of_slides))
        return counts @ self.of_slides.astype(np.int64)

    def values(self) -> NDArray[np.bool_]:
        """Return whether each value (n, G) was measured."""
        return self.of_slides[self.slide_of]

    def of_spots(self, spot: NDArray) -> Tensor:
        """Return (B, G), 1 = measured, of spots (B,)."""
        return self._tensor[torch.from_numpy(self.slide_of[spot])]

    def timesteps(
        self, scheduler: MaskedDiffusionScheduler, spot: NDArray, timesteps: Tensor, visible: Tensor
    ) -> Tensor:
        """Return the timesteps (B,) of spots (B,), see `fitting_timesteps`."""
        return fitting_timesteps(scheduler, self.of_spots(spot), timesteps, visible)


def fitting_timesteps(
    scheduler: MaskedDiffusionScheduler, measured: Tensor, timesteps: Tensor, visible: Tensor
) -> Tensor:
    """Return the timesteps (B,) of spots of which some lack genes: those that fit their visible genes (B, G).

    In sampling, too, the timestep says how many genes of the panel are visible. The timesteps (B,) of spots that have
    all genes stay as they are. measured (B, G) is 1 where a spot has a gene.
    """
    return torch.where(measured.bool().all(dim=1), timesteps, scheduler.timesteps_of(visible))


def variance_of(values: NDArray[np.float64], measured: MeasuredGenes | None) -> NDArray[np.float64]:
    """Return the variance (G,) of values (n, G), which are 0 where they were not measured."""
    if measured is None:
        return values.var(axis=0)
    count = np.maximum(measured.count(), 1)
    return np.maximum((values**2).sum(axis=0) / count - (values.sum(axis=0) / count) ** 2, 0.0)
