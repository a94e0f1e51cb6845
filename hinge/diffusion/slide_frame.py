"""Values of a slide in terms of the training slides: a model that was trained at one level draws at another."""

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
    library_size
        (B,) on the slide; None for a model without library sizes.
    """

    def __init__(
        self,
        model: HingeModel,
        condition: Tensor,
        shift: Tensor,
        log_scale: Tensor,
        library_size: Tensor | None,
    ):
        factors, sizes, of_training = model.gene_factor_model, model.library_size_model, None
        if sizes is not None:
            # the last feature is how unusual a spot's library size is on its slide
            of_training = sizes(condition[:, :-1], condition[:, -1])
        assert factors is not None
        self.shift, self.log_scale = shift, log_scale
        self.masked, masked_scale = factors.masked(condition)
        nothing = self.masked.new_zeros(*self.masked.shape, model.config.hidden_size)
        there = model.distribution(self.masked, nothing, masked_scale, of_training)
        here = model.distribution(self.masked + shift, nothing, masked_scale + log_scale, library_size)
        self.mean_there, self.mean_here = there.mean, here.mean
        self.deviation_there, self.deviation_here = (
            each.variance.sqrt().clamp_min(SMALLEST_DEVIATION) for each in (there, here)
        )

    def visible(self, values: Tensor, visible: Tensor) -> Tensor:
        """Return values (B, G), the visible ones replaced by those that a training slide would have in their place."""
        standard = ((values - self.mean_here) / self.deviation_here).clamp(-FARTHEST, FARTHEST)
        there = (self.mean_there + standard * self.deviation_there).clamp_min(0)
        return torch.where(visible > 0, there, values)

    def location(self, location: Tensor) -> Tensor:
        """Return the location (B, G) on the slide of one that was predicted as on a training slide."""
        return self.masked + self.shift + (location - self.masked) * torch.exp(self.log_scale)
