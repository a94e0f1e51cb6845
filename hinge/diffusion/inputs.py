"""What draws are made from: the spots of a slide and the settings."""

from dataclasses import dataclass, replace

import numpy as np
from anndata import AnnData

from hinge.data.neighbourhood import spot_positions
from hinge.data.slide import slide_name
from hinge.diffusion.defaults import DEFAULT_BATCH_SIZE, DEFAULT_DRAWS, DEFAULT_STEPS
from hinge.models.hinge import HingeModel
from hinge.models.slide_effects import slide_effect_posterior
from hinge.utils.errors import DataError


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
    slide_effect
        Posterior mean (R,) and root (R, R) of the slide effect, as `slide_effect_posterior` gives them. None: from the
        observed values of these spots.
    """

    slide: str
    barcodes: list[str]
    features: np.ndarray
    positions: np.ndarray | None = None
    observed: np.ndarray | None = None
    library_size: np.ndarray | None = None
    slide_effect: tuple[np.ndarray, np.ndarray] | None = None

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
    ) -> "SlideInputs":
        """Return the inputs of a whole slide, named and placed as the slide's spots are."""
        positions = spot_positions(slide.obsm["spatial"])
        return cls(slide_name(slide), list(slide.obs_names), features, positions, observed, library_size)

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

    def with_slide_effect(self, model: HingeModel) -> "SlideInputs":
        """The inputs with the posterior of the slide effect given all observed values, unless there is one already."""
        if self.observed is None or self.slide_effect is not None:
            return self
        effect = slide_effect_posterior(model, self.features, self.observed, self.library_size)
        return replace(self, slide_effect=effect)
