"""What draws are made from: the spots of a slide and the settings."""

import logging
from dataclasses import dataclass, field, replace

import numpy as np
from anndata import AnnData
from torch import Tensor

from hinge.data.checks.novelty import check_novelty
from hinge.data.neighbourhood import spot_positions
from hinge.data.slide import slide_name
from hinge.diffusion.defaults import DEFAULT_BATCH_SIZE, DEFAULT_DRAWS, DEFAULT_STEPS
from hinge.diffusion.scheduler import MaskedDiffusionScheduler
from hinge.diffusion.slide_effect import LevelEffect, LoadingsEffect, SlideEffect, SlideEvidence
from hinge.models.hinge import HingeModel
from hinge.models.slide_loadings import slide_effect_posterior
from hinge.utils.errors import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SamplingSettings:
    """How draws are made.

    Attributes
    ----------
    num_draws
        K draws of every spot.
    num_inference_steps
        Reverse steps, at most the scheduler's T.
    seed
        Of all random numbers.
    batch_size
        Spot-draws in one forward pass; it does not change the result beyond rounding.
    spatially_correlated
        Whether the spots of a draw agree: one order of revealing, one slide effect, and random numbers that are smooth
        over the slide as far as expression of training slides was. Else every spot is drawn independently.
    remasking
        Passes at the end that each mask a random tenth of the drawn genes and draw them again given all others.
    """

    num_draws: int = DEFAULT_DRAWS
    num_inference_steps: int = DEFAULT_STEPS
    seed: int = 0
    batch_size: int = DEFAULT_BATCH_SIZE
    spatially_correlated: bool = True
    remasking: int = 0


@dataclass
class SlideInputs:
    """What is known of spots of one slide before they are drawn.

    Attributes
    ----------
    slide, barcodes
        Names of the slide and of its n spots; with the seed and the number of the draw they fix the random numbers.
    features
        (n, d) features as the model takes them: of the unaugmented patch, `hinge.data.neighbourhood.slide_features`.
    positions
        (n, 2) in units of the spot pitch, `hinge.data.neighbourhood.spot_positions`; needed where draws are spatially
        correlated.
    observed
        (n, G) measured values in the model's units, NaN where nothing was measured. They are kept exactly, and the rest
        is drawn given them.
    library_size
        (n,) counts over all genes, NaN where not known; unknown ones are drawn.
    evidence
        What is known of the slide as a whole.
    slide_effect
        Of the whole slide, where these are only some of its spots; None: from what is known of these spots.
    """

    slide: str
    barcodes: list[str]
    features: np.ndarray
    positions: np.ndarray | None = None
    observed: np.ndarray | None = None
    library_size: np.ndarray | None = None
    evidence: SlideEvidence = field(default_factory=SlideEvidence)
    slide_effect: SlideEffect | None = None

    def __post_init__(self) -> None:
        if self.observed is not None:
            self.observed = np.asarray(self.observed, dtype=np.float32)

    @classmethod
    def of_slide(
        cls,
        slide: AnnData,
        features: np.ndarray,
        observed: np.ndarray | None = None,
        library_size: np.ndarray | None = None,
        evidence: SlideEvidence | None = None,
    ) -> "SlideInputs":
        """Return the inputs of a whole slide, named and placed as the slide's spots are."""
        positions = spot_positions(slide.obsm["spatial"])
        evidence = evidence or SlideEvidence()
        return cls(slide_name(slide), list(slide.obs_names), features, positions, observed, library_size, evidence)

    @property
    def spots(self) -> list[str]:
        """Names of the spots over all slides, which the random numbers depend on."""
        return [f"{self.slide}/{barcode}" for barcode in self.barcodes]

    def __len__(self) -> int:
        return len(self.barcodes)

    def __getitem__(self, part: slice) -> "SlideInputs":
        """The inputs of some of the spots, with the slide effect as it is."""

        def of_part(array: np.ndarray | None) -> np.ndarray | None:
            return None if array is None else array[part]

        return replace(
            self,
            barcodes=self.barcodes[part],
            features=self.features[part],
            positions=of_part(self.positions),
            observed=of_part(self.observed),
            library_size=of_part(self.library_size),
        )

    def check(self, num_genes: int, settings: SamplingSettings) -> None:
        """Raise a DataError or ValueError unless G genes can be drawn from this with these settings."""
        if settings.spatially_correlated and self.positions is None:
            raise ValueError("spatially correlated draws need the positions of the spots")
        shape = (len(self), num_genes)
        if self.observed is not None and (self.observed.shape != shape or np.isinf(self.observed).any()):
            raise DataError(
                f"observed values must be finite or NaN and of shape {shape}, these are of shape {self.observed.shape}"
            )

    def with_slide_effect(
        self, model: HingeModel, scheduler: MaskedDiffusionScheduler, gene_ids: Tensor
    ) -> "SlideInputs":
        """The inputs with the slide effect given all that is known of the slide, unless there is one already."""
        if self.slide_effect is not None:
            return self
        effect: SlideEffect
        if model.slide_prior is not None:
            effect = LevelEffect(
                model, scheduler, gene_ids, self.features, self.evidence, self.observed, self.library_size
            )
        else:
            posterior = None
            if self.observed is not None:
                posterior = slide_effect_posterior(model, self.features, self.observed, self.library_size)
            effect = LoadingsEffect(model, len(gene_ids), posterior)
        return replace(self, slide_effect=effect)

    def levels(self, settings: SamplingSettings) -> np.ndarray | None:
        """Return the expected level of the slide and those of its draws, (1 + K, G); None where they are not known."""
        if not isinstance(self.slide_effect, LevelEffect) or not settings.spatially_correlated:
            return None
        effect = self.slide_effect
        drawn = [effect.draw(settings.seed, self.slide, number).level for number in range(settings.num_draws)]
        return np.stack([effect.typical.level, *drawn])

    def novelty(self) -> np.ndarray | None:
        """Return how far the features of each spot are from those of training (n,), 1 for the 99th percentile there.

        None where the model does not know. A warning names a slide where many spots are farther.
        """
        if not isinstance(self.slide_effect, LevelEffect):
            return None
        novelty = self.slide_effect.novelty(self.features)
        for finding in check_novelty(novelty):
            logger.warning("%s: slide %s: %s", finding.level, self.slide, finding)
        return novelty
