"""Random numbers of draws: a function of seed, slide, spot and draw number, and smooth over a slide where wanted.

A draw of a spot uses one uniform number per gene for the order of revealing, one for the value and one for the fill. If
every spot had independent numbers, maps of drawn genes would be rougher than tissue. The numbers for the values may
therefore have a part in common between neighbours: ε = √a·(random field) + √(1 − a)·(the spot's own), each a standard
normal, so that the distribution of every single spot does not change (a Gaussian copula between spots). The field is a
random Fourier expansion (Rahimi and Recht, NeurIPS 2007) of a Gaussian process with covariance exp(−distance/range). It
can be evaluated at any position without the other spots: a single spot can be drawn again.

All numbers are made in float64 on the CPU, on any device that the model computes on.
"""

import hashlib
import threading
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import ndtri

from hinge.models.hinge import HingeModel

if TYPE_CHECKING:
    from hinge.diffusion.slide_effect import Shift, SlideEffect

NUM_FREQUENCIES = 128

NUM_INDEPENDENT = 32
"""Draws of the slide effect that spots which are drawn independently choose from."""

# float64 numbers of a slide's fields that are kept between batches: half a gigabyte
MOST_NUMBERS_KEPT = 1 << 26


class Stream(Enum):
    """A stream of random numbers; the value is the first part of the key of its generator."""

    SPOT_UNIFORMS = ""
    SPOT_NORMALS = "normal"
    SLIDE = "slide"
    LIKELIHOOD_ORDER = "order of"
    OUTSIDE_PANEL = "outside the panel"
    SLIDE_EFFECT = "slide effect"


def random_generator(stream: Stream, seed: int, name: str, draw: int, remasking: int = 0) -> np.random.Generator:
    """Return the generator of a stream.

    Parameters
    ----------
    stream
        What the numbers are for.
    seed
        Of the draws.
    name
        Of the spot, or of the slide for `Stream.SLIDE`.
    draw
        Number of the draw.
    remasking
        Number of the remasking pass; 0 for the draw before any.

    Returns
    -------
    Generator
        Philox with the first 128 bits of the arguments' SHA-256 as key: the same in any process and batch.
    """
    seed_part = str(seed) if remasking == 0 else f"{seed} again {remasking}"
    if stream is Stream.LIKELIHOOD_ORDER:
        parts = [seed_part, f"{stream.value} {name}", str(draw)]
    else:
        parts = [*filter(None, [stream.value]), seed_part, name, str(draw)]
    key = hashlib.sha256("\x00".join(parts).encode()).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(key[:16], dtype=np.uint64)))


def _open_interval(uniform: np.ndarray) -> np.ndarray:
    # a quantile at 0 or 1 would be infinite
    return np.clip(uniform, 1e-12, 1 - 1e-12)


def spot_uniforms(
    seed: int, spot: str, draw: int, num_genes: int, remasking: int = 0, stream: Stream = Stream.SPOT_UNIFORMS
) -> np.ndarray:
    """Return the uniform numbers of one draw of one spot: order, value and fill, (3, G) in (0, 1), float64."""
    return _open_interval(random_generator(stream, seed, spot, draw, remasking).random((3, num_genes)))


def spot_normals(seed: int, spot: str, draw: int, count: int, remasking: int = 0) -> np.ndarray:
    """Return further standard normal numbers (count,) of one draw of one spot: for its library size and its factors."""
    return random_generator(Stream.SPOT_NORMALS, seed, spot, draw, remasking).standard_normal(count)


class SlideNoise:
    """Random numbers that all spots of a slide have in common in one draw.

    Parameters
    ----------
    seed, slide, draw, remasking
        The numbers depend on these alone; see `random_generator`.
    num_columns
        C, the number of independent fields.
    spatial_range
        Distance at which the fields' correlation is 1/e, in units of the positions.

    Attributes
    ----------
    order
        (C,) uniform numbers: one order of revealing for all spots. If every spot had its own order, genes that
        are revealed first here would be revealed last at a neighbour, and neighbours could not agree.
    normal
        (C,) standard normal numbers for the slide as a whole, see `LoadingsEffect`.
    """

    def __init__(
        self, seed: int, slide: str, draw: int, num_columns: int, spatial_range: float, remasking: int = 0
    ) -> None:
        generator = random_generator(Stream.SLIDE, seed, slide, draw, remasking)
        self.order = _open_interval(generator.random(num_columns))
        self.normal = generator.standard_normal(num_columns)
        self._generator, self._range, self._num_columns = generator, spatial_range, num_columns

    @cached_property
    def _waves(self) -> tuple[np.ndarray, np.ndarray]:
        """Frequencies (F, 2) and weights (2F, C), by far the most numbers: made when a field is first evaluated."""
        generator, shape = self._generator, (2 * NUM_FREQUENCIES, self._num_columns)
        # the spectrum of exp(−r/ℓ) in the plane is a Cauchy distribution of scale 1/ℓ
        frequencies = generator.standard_normal((NUM_FREQUENCIES, 2))
        frequencies = frequencies / (self._range * np.abs(generator.standard_normal((NUM_FREQUENCIES, 1))))
        return frequencies, generator.standard_normal(shape) / np.sqrt(NUM_FREQUENCIES)

    def field(self, positions: np.ndarray) -> np.ndarray:
        """Evaluate the fields at positions (n, 2) → standard normal numbers (n, C)."""
        frequencies, weights = self._waves
        phase = np.asarray(positions, dtype=np.float64) @ frequencies.T
        return np.concatenate([np.cos(phase), np.sin(phase)], axis=1) @ weights


@dataclass
class DrawNumbers:
    """Random numbers of B spot-draws, float64; all standard normal but `order` and the shifts.

    Attributes
    ----------
    order
        (B, G) uniform numbers: the order of revealing.
    value
        (B, G) behind the values.
    factors
        (B, steps, K) behind the gene factors of each step.
    fill
        (B, G) in place of masked values.
    shift
        (B, G) the effect of the slide, in units of the values.
    library_size
        (B,) behind the library size.
    library_shift
        (B,) the effect of the slide on the logarithm of the library size.
    """

    order: np.ndarray
    value: np.ndarray
    factors: np.ndarray
    fill: np.ndarray
    shift: np.ndarray
    library_size: np.ndarray
    library_shift: np.ndarray


class DrawNoise:
    """Source of the random numbers of any draws of some spots.

    Parameters
    ----------
    model
        Its gene factors and library size model determine the correlation of neighbours.
    seed
        Of the draws.
    spots
        n names.
    slide, positions
        Name of the slide and positions (n, 2) of the spots, in units of the spot pitch; None: spots are independent.
    num_genes, num_steps
        G and the number of reverse steps.
    slide_effect
        Of the slide; a spot that is drawn independently takes one of `NUM_INDEPENDENT` of its draws at random.
    coefficients
        (n, R + 1) of the error of the regression at each spot, see `LevelEffect.coefficients`; None for no error.
    """

    def __init__(
        self,
        model: HingeModel,
        seed: int,
        spots: list[str],
        slide: str | None,
        positions: np.ndarray | None,
        num_genes: int,
        num_steps: int,
        slide_effect: "SlideEffect",
        coefficients: np.ndarray | None = None,
    ) -> None:
        self.seed, self.spots, self.slide, self.num_genes, self.num_steps = seed, spots, slide, num_genes, num_steps
        self.positions = None if positions is None else np.asarray(positions, dtype=np.float64)
        factors, library_size = model.gene_factor_model, model.library_size_model
        self.num_factors, self.range, self.scale = 0, 1.0, 1.0
        self.effect, self.coefficients = slide_effect, coefficients
        # columns: genes, library size, then the factors of every step
        share = np.zeros(num_genes + 1)
        if factors is not None:
            self.num_factors = factors.loadings.shape[1]
            self.range, self.scale = float(factors.spatial_range), float(factors.spatial_scale)
            share[:num_genes] = _float64(factors.spatial_share)
            share = np.concatenate([share, np.tile(_float64(factors.factor_spatial_share), num_steps)])
        if library_size is not None:
            share[num_genes] = float(library_size.spatial_share)
        self.share = share if positions is not None else np.zeros_like(share)
        self._slides: dict[tuple[int, int], SlideNoise] = {}
        self._lock = threading.Lock()

    def _slide(self, spot: int, draw: int, remasking: int) -> SlideNoise:
        if self.slide is None:  # a spot alone is a slide of one spot
            return SlideNoise(self.seed, self.spots[spot], draw, len(self.share), self.range, remasking)
        if (draw, remasking) not in self._slides:
            if len(self._slides) * 2 * NUM_FREQUENCIES * len(self.share) > MOST_NUMBERS_KEPT:
                self._slides.clear()
            noise = SlideNoise(self.seed, self.slide, draw, len(self.share), self.range, remasking)
            self._slides[draw, remasking] = noise
        return self._slides[draw, remasking]

    def _effect(self, spot: int, draw: int, normal: np.ndarray) -> "Shift":
        if self.slide is not None:
            return self.effect.draw(self.seed, self.slide, draw, normal)
        generator = random_generator(Stream.SLIDE_EFFECT, self.seed, self.spots[spot], draw)
        return self.effect.draw(self.seed, "", int(generator.integers(NUM_INDEPENDENT)), normal)

    def numbers(self, spot_index: np.ndarray, draw_index: np.ndarray, remasking: int = 0) -> DrawNumbers:
        """Return the numbers of spot-draws: spots (B,), draws (B,), and the number of a remasking pass or 0."""
        with self._lock:  # the generator of a slide's fields must not be used by two threads at once
            return self._numbers(spot_index, draw_index, remasking)

    def _numbers(self, spot_index: np.ndarray, draw_index: np.ndarray, remasking: int) -> DrawNumbers:
        genes = self.num_genes
        pairs = [(self.spots[spot], int(draw)) for spot, draw in zip(spot_index, draw_index, strict=True)]
        own = np.stack([spot_uniforms(self.seed, spot, draw, genes, remasking) for spot, draw in pairs])
        further = 1 + self.num_factors * self.num_steps
        normals = [spot_normals(self.seed, spot, draw, further, remasking) for spot, draw in pairs]
        normal = np.hstack([ndtri(own[:, 1]), normals])
        order, shift, library_shift = own[:, 0].copy(), np.zeros((len(own), genes)), np.zeros(len(own))
        for draw in np.unique(draw_index):
            rows = np.flatnonzero(draw_index == draw)
            groups = [rows] if self.slide is not None else [[row] for row in rows]
            for group in groups:
                slide = self._slide(int(spot_index[group[0]]), int(draw), remasking)
                effect = self._effect(int(spot_index[group[0]]), int(draw), slide.normal)
                shift[group], library_shift[group] = effect.values, effect.library_size
                if self.coefficients is not None and effect.weights is not None:
                    shift[group] += self.coefficients[spot_index[group]] @ effect.weights
                if self.slide is not None:
                    order[group] = slide.order[:genes]
                if self.positions is not None and self.share.any():
                    field = self.scale * slide.field(self.positions[spot_index[group]])
                    normal[group] = np.sqrt(self.share) * field + np.sqrt(1 - self.share) * normal[group]
        factors = normal[:, genes + 1 :].reshape(len(own), self.num_steps, self.num_factors)
        return DrawNumbers(order, normal[:, :genes], factors, ndtri(own[:, 2]), shift, normal[:, genes], library_shift)


def _float64(tensor) -> np.ndarray:
    # to the CPU before float64: not every accelerator has it
    return tensor.detach().cpu().double().numpy()
