"""Sampling: a slide's features in, several draws of every spot's expression out."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm import tqdm

from hinge.diffusion.scheduler import MaskedDiffusionScheduler
from hinge.models.hinge import HingeModel


def spot_uniforms(seed: int, spot: str, draw: int, num_genes: int) -> np.ndarray:
    """The random numbers of one draw of one spot: order, value and fill, (3, G) in (0, 1), float64.

    They depend on nothing but the arguments, so a draw is the same in any batch, on any device count.
    """
    key = hashlib.sha256(f"{seed}\x00{spot}\x00{draw}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=np.frombuffer(key[:16], dtype=np.uint64)))
    # the open interval: a quantile at 0 or 1 would be infinite
    return np.clip(generator.random((3, num_genes)), 1e-12, 1 - 1e-12)


@dataclass
class Draws:
    """Draws of some spots.

    Attributes
    ----------
    values
        (K, n, G) float32, one slice a draw.
    expected
        (n, G) float32: the value head's mean in the first, fully masked pass, which is E[expression | features]
        without the Monte-Carlo error of a mean of draws (averaged over draws where the fill is noise).
    """

    values: np.ndarray
    expected: np.ndarray


class HingePipeline(DiffusionPipeline):
    """A denoiser and a scheduler that sample together.

    Parameters
    ----------
    model
        With its backbone attached.
    scheduler
        As used in training.
    """

    def __init__(self, model: HingeModel, scheduler: MaskedDiffusionScheduler):
        super().__init__()
        self.register_modules(model=model, scheduler=scheduler)

    @torch.inference_mode()
    def __call__(
        self,
        features: Tensor | np.ndarray,
        gene_ids: Tensor,
        spots: list[str],
        num_draws: int = 20,
        num_inference_steps: int = 20,
        seed: int = 0,
        batch_size: int = 256,
        first_draw: int = 0,
        progress: bool = True,
    ) -> Draws:
        """Draw expression profiles.

        Parameters
        ----------
        features
            (n, d) features of the unaugmented patch of each spot.
        gene_ids
            (G,) vocabulary ids of the panel.
        spots
            Names of the n spots; with `seed` and the number of the draw they fix the randomness.
        num_draws
            K.
        num_inference_steps
            Reverse steps, at most the scheduler's T.
        seed
            Any integer.
        batch_size
            Spot-draws in one forward pass; it does not change the result beyond rounding.
        first_draw
            Number of the first draw, to add draws to earlier ones.
        progress
            Show a bar over spot-draws (only in a terminal).

        Returns
        -------
        Draws
            In the units the model was trained in.
        """
        device = self.model.feature_mean.device
        features = torch.as_tensor(np.asarray(features), dtype=torch.float32, device=device)
        gene_ids = gene_ids.to(device)
        num_spots, num_genes = len(features), len(gene_ids)
        values = np.zeros((num_draws, num_spots, num_genes), dtype=np.float32)
        expected = np.zeros((num_spots, num_genes), dtype=np.float64)
        bar = tqdm(total=num_spots * num_draws, desc="draws", unit="draw", disable=None if progress else True)
        with bar:
            for spot_index, draw_index in _batches(num_spots, num_draws, batch_size):
                uniforms = np.stack(
                    [
                        spot_uniforms(seed, spots[spot], first_draw + draw, num_genes)
                        for spot, draw in zip(spot_index, draw_index, strict=True)
                    ]
                )
                sampled, means = self._reverse(
                    features[torch.from_numpy(spot_index).to(device)],
                    gene_ids,
                    torch.from_numpy(uniforms).to(device),
                    num_inference_steps,
                )
                values[draw_index, spot_index] = sampled
                np.add.at(expected, spot_index, means.astype(np.float64) / num_draws)
                bar.update(len(spot_index))
        return Draws(values, expected.astype(np.float32))

    def _reverse(
        self, features: Tensor, gene_ids: Tensor, uniforms: Tensor, num_inference_steps: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Features (B, d), uniforms (B, 3, G) → sampled values and the head's means of the first pass, (B, G) each."""
        scheduler, model = self.scheduler, self.model
        scheduler.set_timesteps(num_inference_steps)
        order, quantile, fill = uniforms.unbind(dim=1)
        noise = torch.special.ndtri(fill).float()
        values = torch.zeros_like(noise)
        visible = torch.zeros_like(noise)
        means = None
        for timestep in scheduler.timesteps.tolist():
            end = torch.full((len(values),), scheduler.previous_timestep(timestep), dtype=torch.int64)
            next_visible = scheduler.visible_at(end, order)
            # the first pass also gives the expectation; later ones in which nothing is revealed are not needed
            if means is not None and torch.equal(next_visible, visible):
                continue
            output = model(
                scheduler.fill_masked(values, visible, noise),
                visible,
                torch.full((len(values),), timestep, device=values.device),
                features,
                gene_ids,
                next_visible=next_visible,
            )
            step = scheduler.step(output.sample(quantile).float(), timestep, values, visible, order)
            if means is None:
                means = output.mean.float()
            values, visible = step.values, step.visible
        return values.cpu().numpy(), means.cpu().numpy()


def _batches(num_spots: int, num_draws: int, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Spot and draw numbers, all draws of a spot next to each other, cut into batches."""
    for start in range(0, num_spots * num_draws, batch_size):
        flat = np.arange(start, min(start + batch_size, num_spots * num_draws))
        yield flat // num_draws, flat % num_draws
