"""Values of a slide in terms of the training slides: a model that was trained at one level draws at another."""

import numpy as np
import torch
from torch import Tensor

from hinge.models.hinge import HingeModel

SMALLEST_DEVIATION = 0.05
"""Of a gene on a slide; that of a gene without counts would be 0."""

FARTHEST = 4.0
"""Standard deviations from its mean, at most, of a value in terms of the training slides. A single count of a gene that
a slide hardly has would be a hundred, and what is predicted from it would grow from step to step."""


class SlideFrame:
    """The map between values of a slide and values that a training slide would have in their place.

    What the backbone and the gene factors know of the dependence between genes holds for values of training slides. A
    visible value is therefore replaced by the one that is as many standard deviations from its mean there, and the
    location that is predicted from it is moved, as far as it differs from that of a fully masked spot, in proportion
    to the scale. With no shift and no change of scale nothing changes.

    Parameters
    ----------
    model
        With a `GeneFactorModel`.
    condition
        (B, d) of the spots, as on a training slide.
    shift
        (B, G) of the locations.
    log_scale
        (G,) added to the log-scales.
    pattern
        Centre (G,) and factor (G,): the location of a fully masked spot differs from the centre by as many times what
        it does on a training slide. None: by as much.
    library_size
        (B,) on the slide, and (B,) in their place on a training slide; None for a model without library sizes.
    spots
        (B,) the same number for rows of the same condition, whose part is computed once; None: all may differ.

    Attributes
    ----------
    change_there
        (B, G) by which the library sizes on a training slide move the locations there, see `LibrarySizeModel.change`.
    """

    def __init__(
        self,
        model: HingeModel,
        condition: Tensor,
        shift: Tensor,
        log_scale: Tensor,
        pattern: tuple[Tensor, Tensor] | None,
        library_size: tuple[Tensor, Tensor] | None,
        spots: np.ndarray | None = None,
    ):
        factors = model.gene_factor_model
        assert factors is not None
        of_slide, of_training = (None, None) if library_size is None else library_size
        change_here = self.change_there = excess = shift.new_zeros(())
        if (sizes := model.library_size_model) is not None and of_slide is not None:
            change_here, self.change_there = sizes.change(of_slide), sizes.change(of_training)
            excess = sizes.excess(of_training)
        self.log_scale = log_scale
        if spots is None:
            self.masked, masked_scale = factors.masked(condition)
            there = self._moments(model, self.masked + self.change_there + excess, masked_scale, of_training)
        else:
            rows = np.unique(spots, return_index=True, return_inverse=True)[1:]
            first, back = (torch.from_numpy(each).to(condition.device) for each in rows)
            masked = factors.masked(condition[first])
            found = (*masked, *self._moments(model, *masked, of_training))
            self.masked, masked_scale, *there = (each[back] for each in found)
        self.mean_there, self.deviation_there = there
        if pattern is not None:
            centre, slope = pattern
            shift = shift + (slope - 1) * (self.masked - centre)
        self.shift = shift + change_here + excess
        here = self._moments(model, self.masked + self.shift, masked_scale + log_scale, of_slide)
        self.mean_here, self.deviation_here = here

    @staticmethod
    def _moments(model: HingeModel, location: Tensor, log_scale: Tensor, sizes: Tensor | None) -> list[Tensor]:
        """Return means and standard deviations (B, G) of fully masked genes."""
        nothing = location.new_zeros(*location.shape, model.config.hidden_size)
        found = model.distribution(location, nothing, log_scale, sizes)
        return [found.mean, found.variance.sqrt().clamp_min(SMALLEST_DEVIATION)]

    def visible(self, values: Tensor, visible: Tensor) -> Tensor:
        """Return values (B, G), the visible ones replaced by those that a training slide would have in their place."""
        standard = ((values - self.mean_here) / self.deviation_here).clamp(-FARTHEST, FARTHEST)
        there = (self.mean_there + standard * self.deviation_there).clamp_min(0)
        return torch.where(visible > 0, there, values)

    def location(self, location: Tensor) -> Tensor:
        """Return the location (B, G) on the slide of one that was predicted as on a training slide."""
        beyond = location - self.masked - self.change_there
        return self.masked + self.shift + beyond * torch.exp(self.log_scale)
