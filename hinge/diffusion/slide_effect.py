"""The slide effect of draws: by how much all spots of a new slide are shifted, given what is known of the slide."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hinge.data.slide_levels import shares_of_composition
from hinge.data.transforms import get_transform
from hinge.diffusion.masked_slide import LEAST_VALUE, MaskedSlide, regression_condition, spot_novelty
from hinge.diffusion.randomness import Stream, random_generator
from hinge.diffusion.scheduler import MaskedDiffusionScheduler
from hinge.diffusion.slide_frame import SlideFrame
from hinge.models.expected_values import composition_of_values, counting_variance, expected_values, moments
from hinge.models.hinge import HingeModel
from hinge.models.regression_uncertainty import NUM_DIRECTIONS
from hinge.models.slide_effects import Level

# largest shift in units of values, rounds of bisection
LARGEST_SHIFT, ROUNDS = 15.0, 14
# bounds of a draw's shift around the expected one
NEAR_SHIFT = 4.0
# draws of the level whose mean is the expected level
NUM_EXPECTED = 64
# below this derivative of the value by the composition, a value says nothing of the composition
LEAST_SLOPE = 0.05
# least variance that is compared, rounds in which the scale follows it, largest change of a log-scale
LEAST_VARIANCE, SCALE_ROUNDS, LARGEST_CHANGE = 1e-3, 4, 1.5
# least share of the variance that a model predicts on training slides that is not of counting
LEAST_EXPRESSION = 0.1

BULK_SD = 0.5
"""Standard deviation of log2 between a bulk profile and spots of the same tissue, for reasons of the platform."""


@dataclass(frozen=True, eq=False)
class LibrarySpread:
    """How the library sizes of a slide spread over its spots.

    Attributes
    ----------
    ratios
        (Q,) quantiles in units of the mean, see `hinge.data.slide_levels.library_ratios`.
    log_sd
        Standard deviation of the logarithm.
    """

    ratios: NDArray[np.float64]
    log_sd: float


@dataclass(frozen=True, eq=False)
class SlideEvidence:
    """What is known of a slide as a whole before it is drawn.

    Attributes
    ----------
    patient
        Name of its patient; None, or a name that no training slide has: a new one.
    bulk
        Composition (G,) of a bulk profile, see `hinge.data.slide_levels`, NaN where it lacks a gene; None for none.
    bulk_sd
        Standard deviation of the platform effect of each gene, log2.
    library_size
        Mean over spots of the counts over all genes. `"training"`: that of the training slides; `"unknown"`: drawn from
        the library sizes of all patients; None: of the patient if it is known, else that of the training slides.
    library_spread
        How library sizes spread over the spots; None: as on the training slides.
    tokens
        Categories of the slide (T,), NaN where they are not known; None: none is known.
    """

    patient: str | None = None
    bulk: NDArray[np.float64] | None = None
    bulk_sd: float = BULK_SD
    library_size: float | str | None = None
    library_spread: LibrarySpread | None = None
    tokens: NDArray[np.float64] | None = None


@dataclass(frozen=True, eq=False)
class Shift:
    """The effect of one draw.

    Attributes
    ----------
    values
        (G,) to add to the location of every spot.
    library_size
        To add to the logarithm of every library size.
    level
        (G,) mean of the values over the slide's spots that the shift leads to; None where it is not known.
    weights
        (R + 1, G) error of the regression's weights, for the coefficients of each spot; None for none.
    """

    values: NDArray[np.float64]
    library_size: float = 0.0
    level: NDArray[np.float64] | None = None
    weights: NDArray[np.float64] | None = None


class LoadingsEffect:
    """The effect of a model without a `SlidePrior`: U·a of its slide loadings, a standard normal or with a posterior.

    Parameters
    ----------
    model
        Any.
    num_genes
        G.
    posterior
        Mean (R,) and root (R, R), of `slide_effect_posterior`; None for the prior.
    """

    def __init__(self, model: HingeModel, num_genes: int, posterior: tuple[NDArray, NDArray] | None):
        factors, sizes = model.gene_factor_model, model.library_size_model
        self.loadings = np.zeros((num_genes, 0))
        if factors is not None:
            self.loadings = factors.slide_loadings.detach().cpu().double().numpy()
        rank = self.loadings.shape[1]
        self.mean: NDArray[np.float64]
        self.root: NDArray[np.float64]
        self.mean, self.root = (np.zeros(rank), np.eye(rank)) if posterior is None else posterior
        self.scale = 0.0 if sizes is None else float(sizes.slide_scale)
        self.log_scale, self.stretch = None, 1.0
        self.typical = Shift(self.loadings @ self.mean)

    def coefficients(self, features: NDArray) -> None:
        """Return None: such a model does not know how uncertain its regression is."""

    def frame(self, *arguments: Any) -> None:
        """Return None: such a model sees values of all slides alike."""

    def draw(self, seed: int, slide: str, draw: int, normal: NDArray) -> Shift:
        """Return the effect of one draw of a slide, from the normal numbers of its `SlideNoise`."""
        shift = self.loadings @ (self.mean + self.root @ normal[: len(self.mean)])
        return Shift(shift, self.scale * float(normal[len(self.loadings)]))


class LevelEffect:
    """The effect that gives a slide's draws a level from the posterior of its `SlidePrior`.

    The shift of a gene is such that the mean of the model's distributions over the slide's spots, where no gene is
    visible, is the expected value of the level (`hinge.models.expected_values`). Counts of a slide that was sequenced
    less deeply vary more: the scales change as the expected variance does between the training slides and this one.

    Attributes
    ----------
    typical
        The effect that gives the expected level.
    log_scale
        (G,) to add to the log-scales.
    pattern
        How much more the regression tells spots apart, see `SlideFrame`.
    stretch
        Factor of the logarithm of the library sizes, see `LibrarySizeModel`.

    Parameters
    ----------
    model, scheduler, gene_ids
        As of `draw_spots`.
    features
        (n, d) of all spots of the slide.
    evidence
        What is known of the slide.
    observed, library_size
        (n, G) and (n,) as of `SlideInputs`.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: HingeModel,
        scheduler: MaskedDiffusionScheduler,
        gene_ids: Tensor,
        features: NDArray,
        evidence: SlideEvidence,
        observed: NDArray | None = None,
        library_size: NDArray | None = None,
    ):
        assert model.slide_prior is not None
        self.prior, self.transform = model.slide_prior, model.config.transform
        self.dispersion, self.offset = self.prior.array("dispersion"), self.prior.array("offset")
        self.ratios, self.stretch = self.prior.array("ratios"), 1.0
        self.slide = MaskedSlide(model, scheduler, gene_ids, features)
        nothing = np.zeros(len(self.dispersion))
        self._near: tuple[NDArray, NDArray] = (nothing - LARGEST_SHIFT, nothing + LARGEST_SHIFT)
        # features that are not standardised within slides say how a slide differs from those of training
        self.of_image = np.zeros(len(self.dispersion))
        if not model.config.standardise_features:
            unshifted = self.slide.mean(nothing, 0.0)
            self.of_image = unshifted - self.prior.array("training_values")
        self._use_values_of_patient(evidence)
        # what a new patient's images tell less than those of the training slides is not learned from these
        new = evidence.patient not in self.prior.patients
        variance = self.slide.regression_variance() if new else self.slide.variance(nothing, 0.0)
        if evidence.library_spread is not None:
            self.ratios = evidence.library_spread.ratios
            self.stretch = self.slide.set_log_sd(evidence.library_spread.log_sd)
        self.level = self._posterior(evidence, observed, library_size)
        self._kept: dict[tuple[int, str, int], Shift] = {}
        draws = _draws(self.level)
        size = float(np.mean([draw[-1] for draw in draws]))
        self.typical = self._shift(np.mean([self._values(draw) for draw in draws], axis=0), size)
        self._scale(variance, 2.0**size)
        self.log_scale, self.pattern = self.slide.log_scale, self.slide.pattern
        self._near = (self.typical.values - NEAR_SHIFT, self.typical.values + NEAR_SHIFT)

    @torch.inference_mode()
    def draw(self, seed: int, slide: str, draw: int, normal: NDArray | None = None) -> Shift:
        """Return the effect of one draw of a slide; `normal` is not used."""
        key = (seed, slide, draw)
        if key not in self._kept:
            generator = random_generator(Stream.SLIDE_EFFECT, seed, slide, draw)
            level = self.level.draw(generator)
            # the weights of a gene that few spots measured are known less well
            weights = self.slide.residuals(generator, NUM_DIRECTIONS + 1)
            weights = weights / np.sqrt(self.prior.array("measured_share"))
            self._kept[key] = replace(self._shift(self._values(level), level[-1]), weights=weights)
        return self._kept[key]

    def coefficients(self, features: NDArray) -> NDArray[np.float64]:
        """Return the coefficients (n, R + 1) of the error of the regression at spots with features (n, d)."""
        return self.prior.regression.excess(regression_condition(self.slide.model, features).cpu())

    def frame(
        self,
        condition: Tensor,
        shift: Tensor,
        library_size: Tensor | None,
        library_shift: Tensor | float,
        spots: NDArray | None = None,
    ) -> SlideFrame:
        """Return the frame of conditions (B, d), shifts (B, G), library sizes (B,) and their shifts, spots (B,)."""
        sizes, model = None, self.slide.model
        if library_size is not None and model.library_size_model is not None:
            sizes = library_size, model.library_size_model.of_slide(library_size, library_shift, self.stretch)
            spots = None  # draws of a spot have conditions of their own
        log_scale = torch.as_tensor(self.log_scale, dtype=torch.float32, device=condition.device)
        return SlideFrame(model, condition, shift, log_scale, self.pattern, sizes, spots)

    def novelty(self, features: NDArray) -> NDArray[np.float64]:
        """Return how far the features (n, d) of spots are from those of training, see `RegressionUncertainty`."""
        return spot_novelty(self.slide.model, features)

    def _use_values_of_patient(self, evidence: SlideEvidence) -> None:
        """Make the level that is expected of a further slide of a known patient have the values of his other slides."""
        if evidence.patient in self.prior.patients:
            level = self.prior.with_section(self.prior.of_patient(evidence.patient, evidence.tokens))
            expected = np.mean([self._values(draw) for draw in _draws(level)], axis=0) - self.of_image
            of_patient = self.prior.values_of_patient(evidence.patient)
            if self.slide.model.config.standardise_features:
                # the values are those of the training spots, which may be a part of a slide, with other features
                of_patient = of_patient + self.slide.regression_difference()
            self.offset = np.where(np.isfinite(of_patient), self.offset + of_patient - expected, self.offset)

    def _posterior(self, evidence: SlideEvidence, observed: NDArray | None, library_size: NDArray | None) -> Level:
        prior = self.prior
        level = prior.of_patient(evidence.patient, evidence.tokens)
        if evidence.bulk is not None:
            # the bulk profile is of another piece of the patient's tissue
            noise = np.append(prior.array("section_noise") + evidence.bulk_sd**2, 1.0)
            level = level.observe(np.append(evidence.bulk, np.nan), noise)
        level = prior.with_section(level)
        given = evidence.library_size
        if given == "training" or (given is None and evidence.patient not in prior.patients):
            level = level.with_library_size(*prior.training_library_size(evidence.tokens))
        elif isinstance(given, int | float):
            level = level.with_library_size(np.log2(given))
        if observed is not None and np.isfinite(observed).any():
            level = self._with_measured(level, observed, library_size)
        return level

    def _with_measured(self, level: Level, observed: NDArray, library_size: NDArray | None) -> Level:
        """Return the level given measured values of some genes or spots, against what is predicted of these spots."""
        known = np.isfinite(observed)
        count = known.sum(axis=0)
        spots = np.flatnonzero(known.any(axis=1))
        size_known = library_size is not None and bool(np.isfinite(library_size[spots]).all())
        if size_known and library_size is not None:
            sizes, share = library_size[spots].astype(np.float64), 1 - len(spots) / len(observed)
            variance = share * (sizes.std() / sizes.mean() / np.log(2)) ** 2 / len(spots)
            value = np.append(np.full(len(count), np.nan), np.log2(sizes.mean()))
            level = level.observe(value, np.maximum(variance, 1e-6))
        predicted = self.slide.predicted()
        residual = np.where(known, observed - predicted, 0.0).sum(axis=0) / np.maximum(count, 1)
        values = np.where(count > 0, np.maximum(predicted.mean(axis=0) + residual, LEAST_VALUE), np.nan)
        composition, slope = composition_of_values(
            np.nan_to_num(values),
            2.0 ** level.mean[-1],
            self.ratios,
            self.dispersion,
            self.offset + self.of_image,
            self.transform,
        )
        slope = np.maximum(slope, LEAST_SLOPE)
        loadings, noise = self.slide.within(count)
        return level.observe(
            np.append(np.where(count > 0, composition, np.nan), np.nan),
            np.append(noise / slope**2, 1.0),
            np.vstack([loadings / slope[:, None], np.zeros(loadings.shape[1])]),
            depth_unknown=not size_known,
        )

    def _values(self, level: NDArray) -> NDArray[np.float64]:
        """Return the mean value (G,) over the spots of a slide of a level (G + 1,)."""
        shares, size = shares_of_composition(level[:-1]), 2.0 ** level[-1]
        expected = expected_values(shares, size, self.ratios, self.dispersion, self.transform)
        return np.maximum(expected + self.offset + self.of_image, 0.0)

    def _scale(self, variance: NDArray, library_size: float) -> None:
        """Change the log-scales such that the variance (G,) of training becomes that of the slide.

        An image tells nothing of the variance of counting: the slide has its own, and only what is left of that of
        training changes in proportion to the variance of expression. What the regression tells spots apart by changes
        as the scale does. The typical shift is set anew, because the mean depends on both.
        """
        arguments = (library_size, self.ratios, self.dispersion, self.transform)
        shares, there = shares_of_composition(self.level.mean[:-1]), self.prior.array("training_counting")
        here = counting_variance(shares, *arguments) if there.any() else there
        expression = np.maximum(moments(shares, *arguments)[1] - here, LEAST_VARIANCE)
        known = np.maximum(self.prior.array("training_variance") - there, LEAST_VARIANCE)
        wanted = here + np.maximum(variance - there, LEAST_EXPRESSION * variance) * expression / known
        typical = self.typical
        assert typical.level is not None
        for _ in range(SCALE_ROUNDS):
            found = self.slide.variance(typical.values, typical.library_size)
            change = 0.5 * np.log(np.maximum(wanted, LEAST_VARIANCE) / np.maximum(found, LEAST_VARIANCE))
            log_scale = np.clip(self.slide.log_scale + change, -LARGEST_CHANGE, LARGEST_CHANGE)
            # where values do not contain the library size, a larger scale is that of counting, not of expression
            contained = get_transform(self.transform).contains_library_size
            self.slide.set_scale(log_scale, np.exp(log_scale if contained else np.minimum(log_scale, 0.0)))
            typical = self._shift(typical.level, np.log2(library_size))
        self.typical = typical

    def _shift(self, values: NDArray, log2_library_size: float) -> Shift:
        """Return the shift with which the mean of the slide's distributions is `values` (G,), by bisection."""
        library = self.slide.library_shift(2.0**log2_library_size)
        low, high = self._near
        for _ in range(ROUNDS):
            middle = (low + high) / 2
            less = self.slide.mean(middle, library) < values
            low, high = np.where(less, middle, low), np.where(less, high, middle)
        return Shift((low + high) / 2, library, values)


def _draws(level: Level) -> list[NDArray[np.float64]]:
    return [level.draw(np.random.default_rng([7, number])) for number in range(NUM_EXPECTED)]


SlideEffect = LevelEffect | LoadingsEffect
