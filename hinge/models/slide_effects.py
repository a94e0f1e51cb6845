"""The level of a whole slide: its composition and its library size, with a prior from all slides that have counts.

A slide is of a patient, and patients differ far more than the sections of one. The level of a slide is its composition
(G,), log2(1 + 10,000 · share of all counts), and the logarithm of its library size:

    composition = population mean + patient effect + section effect

The patient effect has a covariance of few directions plus a diagonal and the tails of Student's t, because it is known
from few patients; the section effect is of each gene alone. What is known of a new slide (its patient, a bulk profile,
its library size, some measured spots or genes) changes the prior to a posterior in closed form.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hinge.data.slide_levels import NUM_RATIOS
from hinge.models.regression_uncertainty import RegressionUncertainty

MOST_DIRECTIONS = 32
"""Directions of the differences between patients, at most."""

INDEPENDENT_GENES = 10
"""Number of independent genes that evidence on any number of genes counts for, where it changes the scale of the tails:
genes are correlated."""


@dataclass(frozen=True, eq=False)
class Level:
    """A distribution of the level of a slide: mean + √w·(L·a + √noise·e), a and e standard normal.

    The scale w is 1, or degrees / χ²(degrees), which makes the distribution a multivariate t.

    Attributes
    ----------
    mean
        (G + 1,): the composition, and log2 of the library size.
    loadings
        L (G + 1, R). The library size has its variance here: its noise is 0.
    noise
        (G + 1,) variances.
    degrees
        Of freedom; infinity for a Gaussian.
    """

    mean: NDArray[np.float64]
    loadings: NDArray[np.float64]
    noise: NDArray[np.float64]
    degrees: float = np.inf

    def observe(
        self,
        values: NDArray,
        noise: NDArray | float,
        loadings: NDArray | None = None,
        depth_unknown: bool = False,
    ) -> "Level":
        """Return the posterior given values = level + B·b + √noise·e', b and e' standard normal.

        The posterior of a factor model with one more observation of each gene (Bishop, Pattern Recognition and Machine
        Learning, 2006, section 2.3.3): given a and b, genes are independent.

        Parameters
        ----------
        values
            (G + 1,), NaN where nothing is known.
        noise
            (G + 1,) variances of the observation.
        loadings
            B (G + 1, Q) of an error that genes share; None for none.
        depth_unknown
            Whether the composition was computed with the mean library size of this level, because the library size of
            what was measured is not known: its error is then part of all values.
        """
        seen = np.flatnonzero(np.isfinite(values))
        if not len(seen):
            return self
        shared = np.zeros((len(self.mean), 0)) if loadings is None else loadings
        design = self.loadings.copy()
        if depth_unknown:
            design[:-1] += self.loadings[-1]
        design = np.concatenate([design, shared], axis=1)
        own = self.noise
        error = np.broadcast_to(np.asarray(noise, dtype=np.float64), self.mean.shape)
        total = np.maximum(own + error, 1e-12)
        residual = np.zeros(len(self.mean))
        residual[seen] = values[seen] - self.mean[seen]
        scaled = design[seen] / total[seen, None]
        precision = np.eye(design.shape[1]) + design[seen].T @ scaled
        covariance = np.linalg.inv(precision)
        right = scaled.T @ residual[seen]
        weights = covariance @ right
        gain = np.zeros(len(self.mean))
        gain[seen] = own[seen] / total[seen]
        mine = np.concatenate([self.loadings, np.zeros_like(shared)], axis=1)
        mean = self.mean + mine @ weights + gain * (residual - design @ weights)
        root = np.linalg.cholesky((covariance + covariance.T) / 2)
        result = Level(mean, (mine - gain[:, None] * design) @ root, own * (1 - gain), self.degrees)
        return result._rescaled(float(residual[seen] ** 2 @ (1 / total[seen]) - right @ weights), len(seen))

    def _rescaled(self, distance: float, count: int) -> "Level":
        """Return this posterior with the scale that a squared distance of `count` values from the prior suggests."""
        if np.isinf(self.degrees):
            return self
        independent = min(count, INDEPENDENT_GENES)
        degrees = self.degrees + independent
        scale = (self.degrees + distance * independent / count) / degrees
        return Level(self.mean, self.loadings * np.sqrt(scale), self.noise * scale, degrees)

    def with_noise(self, noise: NDArray, library_noise: float) -> "Level":
        """Return the level with independent variances (G,) added to its composition, and to its library size."""
        extra = np.zeros((len(self.mean), 1))
        extra[-1] = np.sqrt(library_noise)
        return replace(
            self, loadings=np.concatenate([self.loadings, extra], axis=1), noise=self.noise + np.append(noise, 0.0)
        )

    def with_library_size(self, mean: float, variance: float = 0.0) -> "Level":
        """Return the level with another distribution of log2 of the library size, independent of the composition."""
        loadings = np.concatenate([self.loadings, np.zeros((len(self.mean), 1))], axis=1)
        loadings[-1] = 0
        loadings[-1, -1] = np.sqrt(variance)
        return replace(self, mean=np.append(self.mean[:-1], mean), loadings=loadings)

    def draw(self, generator: np.random.Generator) -> NDArray[np.float64]:
        """Return one random level (G + 1,)."""
        moved = self.loadings @ generator.standard_normal(self.loadings.shape[1])
        moved = moved + np.sqrt(self.noise) * generator.standard_normal(len(self.noise))
        scale = generator.chisquare(min(self.degrees, 1e9)) / min(self.degrees, 1e9)
        return self.mean + (moved if np.isinf(self.degrees) else moved / np.sqrt(scale))


class SlidePrior(nn.Module):
    """What is known of slides before anything of a new one is measured; fitted by `hinge.training.slide_prior`.

    Parameters
    ----------
    num_genes
        G.
    patients
        Names of the P patients that it is fitted on.
    condition_dim
        d of the regression on the features.
    num_tokens
        T categories of condition tokens.
    """

    population: Tensor
    patient_loadings: Tensor
    patient_noise: Tensor
    section_noise: Tensor
    patient_means: Tensor
    patient_values: Tensor
    patient_sections: Tensor
    library: Tensor
    patient_library: Tensor
    training_library: Tensor
    degrees: Tensor
    dispersion: Tensor
    offset: Tensor
    training_values: Tensor
    training_variance: Tensor
    training_counting: Tensor
    ratios: Tensor
    measured_share: Tensor
    token_effects: Tensor
    token_shares: Tensor

    def __init__(self, num_genes: int, patients: Sequence[str], condition_dim: int, num_tokens: int = 0):
        super().__init__()
        self.regression = RegressionUncertainty(condition_dim)
        self.patients = list(patients)
        count, rank = len(self.patients), min(len(self.patients), MOST_DIRECTIONS)
        for name, shape in (
            ("population", (num_genes,)),
            ("patient_loadings", (num_genes, rank)),
            ("patient_noise", (num_genes,)),
            ("section_noise", (num_genes,)),
            # of every patient: means over its slides of the composition and of the values, the number of slides that
            # have each gene, and last the number of all; and the mean log2 of their library size
            ("patient_means", (count, num_genes)),
            ("patient_values", (count, num_genes)),
            ("patient_sections", (count, num_genes + 1)),
            ("patient_library", (count,)),
            # of log2 of the library size: mean, variance between patients, variance between slides of one
            ("library", (3,)),
            # the same of the training slides alone: mean, variance of a further slide
            ("training_library", (2,)),
            ("degrees", ()),
            # from composition to mean values, see `hinge.models.expected_values`; the values of the training slides
            ("dispersion", (num_genes,)),
            ("offset", (num_genes,)),
            ("training_values", (num_genes,)),
            ("training_variance", (num_genes,)),
            # the part of the variance that is of counting; 0 in models that do not tell it
            ("training_counting", (num_genes,)),
            ("ratios", (NUM_RATIOS,)),
            # effects of the categories on the level of a slide, and their shares of the slides
            ("token_effects", (num_tokens, num_genes + 1)),
            ("token_shares", (num_tokens,)),
        ):
            self.register_buffer(name, torch.zeros(shape))
        # the share of the training spots that the gene was measured in
        self.register_buffer("measured_share", torch.ones(num_genes))

    def array(self, name: str) -> NDArray[np.float64]:
        """Return a buffer as a float64 array."""
        # to the CPU before float64: not every accelerator has it
        return getattr(self, name).detach().cpu().double().numpy()

    def of_new_patient(self, tokens: NDArray | None = None) -> Level:
        """Return the level that the slides of a patient never seen have in common.

        tokens (T,) are the categories of the slide, NaN where they are not known: then the level may be that of any.
        """
        count = len(self.patients)
        mean, between, _ = self.array("library")
        # the population mean is that of a few patients
        more = 1 + 1 / count
        loadings = np.zeros((len(self.population) + 1, self.patient_loadings.shape[1] + 1))
        loadings[:-1, :-1] = self.array("patient_loadings") * np.sqrt(more)
        loadings[-1, -1] = np.sqrt(between * more)
        noise = np.append(self.array("patient_noise") * more, 0.0)
        level = Level(np.append(self.array("population"), mean), loadings, noise, float(self.degrees))
        effects = self.array("token_effects")
        if not len(effects):
            return level
        known = np.full(len(effects), np.nan) if tokens is None else tokens
        unknown, shares = np.isnan(known), self.array("token_shares")
        spread = effects[unknown].T * np.sqrt(shares[unknown])
        moved = level.mean + np.where(unknown, shares, known) @ effects
        return replace(level, mean=moved, loadings=np.concatenate([level.loadings, spread], axis=1))

    def training_library_size(self, tokens: NDArray | None = None) -> tuple[float, float]:
        """Return mean and variance of log2 of the library size of a further slide like those of training."""
        mean, variance = self.array("training_library")
        effects, shares = self.array("token_effects")[:, -1], self.array("token_shares")
        known = np.full(len(effects), np.nan) if tokens is None else tokens
        spread = np.where(np.isnan(known), shares * effects**2, 0.0).sum()
        return float(mean + np.where(np.isnan(known), shares, known) @ effects), float(variance + spread)

    def of_patient(self, patient: str | None, tokens: NDArray | None = None) -> Level:
        """Return the level that the slides of a patient have in common; None or a name that is not known: a new one.

        `tokens` as of `of_new_patient`.
        """
        level = self.of_new_patient(tokens)
        if patient not in self.patients:
            return level
        number = self.patients.index(patient)
        sections = self.array("patient_sections")[number]
        values = np.append(self.array("patient_means")[number], self.array("patient_library")[number])
        noise = np.append(self.array("section_noise"), self.array("library")[2]) / np.maximum(sections, 1)
        return level.observe(np.where(sections > 0, values, np.nan), noise)

    def values_of_patient(self, patient: str | None) -> NDArray[np.float64]:
        """Return the mean values (G,) of the slides of a patient, NaN where none is known."""
        if patient not in self.patients:
            return np.full(len(self.population), np.nan)
        number = self.patients.index(patient)
        known = self.array("patient_sections")[number, :-1] > 0
        return np.where(known, self.array("patient_values")[number], np.nan)

    def with_section(self, level: Level) -> Level:
        """Return the level of one slide of a patient from the level that the patient's slides have in common."""
        return level.with_noise(self.array("section_noise"), float(self.array("library")[2]))
