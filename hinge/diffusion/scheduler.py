"""Masked diffusion over genes: which genes are visible at a timestep, and how they are revealed.

At timestep t = 0 every gene of a spot is visible, at t = T none. Each gene carries one uniform number u that
decides when it is masked, so the visible set at any t is a deterministic function of u: the forward process
needs no loop, the reverse process reveals genes in the order of u, and a draw can be repeated gene by gene.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

SCHEDULES = ("power", "linear", "cosine", "sqrt", "exp", "poly_auto")
MOST_TIMESTEPS = 1_000_000
REVEALS = ("budget", "bernoulli")
FILLS = ("zero", "noise", "mask_token")


@dataclass
class MaskedDiffusionStep:
    """What one reverse step gives.

    Attributes
    ----------
    values, visible
        (B, G) after the step.
    revealed
        (B, G), 1 for the genes that became visible in it.
    """

    values: Tensor
    visible: Tensor
    revealed: Tensor


class MaskedDiffusionScheduler(SchedulerMixin, ConfigMixin):
    """Schedules, forward masking and reverse steps of masked diffusion (Fang et al., HINGE, CVPR 2026).

    Parameters
    ----------
    num_train_timesteps
        T.
    schedule
        Masked share γ(t), s = t/T: `"linear"` s; `"cosine"` ½(1 − cos πs); `"sqrt"` √s; `"exp"`
        (e^{βs} − 1)/(e^β − 1); `"power"` 1 − (1 − s)^exponent; `"poly_auto"` the same with the exponent
        log(tail/G)/log(1/T), clipped to [1.05, 4], so that about `tail` genes are left to the last step.
    exponent
        Of `"power"`: ζ in the paper's ᾱ_t = (1 − t/T)^ζ.
    beta
        Of `"exp"`.
    tail
        Genes left to the last step by `"poly_auto"`.
    reveal
        `"budget"`: the ⌊γ(t)·G⌋ genes with the largest u are masked, as in the released code. `"bernoulli"`:
        each gene is masked on its own with probability γ(t), as in the paper; in reverse a masked gene is then
        revealed with probability (ᾱ_{t−1} − ᾱ_t)/(1 − ᾱ_t).
    fill
        What stands in the place of masked values: `"zero"`, `"noise"` (standard normal) or `"mask_token"`
        (the backbone's own; the place itself then holds 0).
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 50,
        schedule: str = "poly_auto",
        exponent: float = 1.0,
        beta: float = 3.0,
        tail: int = 1,
        reveal: str = "budget",
        fill: str = "mask_token",
    ):
        for name, value, allowed in (
            ("schedule", schedule, SCHEDULES),
            ("reveal", reveal, REVEALS),
            ("fill", fill, FILLS),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
        if not isinstance(num_train_timesteps, int) or not 1 <= num_train_timesteps <= MOST_TIMESTEPS:
            raise ValueError(f"num_train_timesteps must be a whole number from 1 to {MOST_TIMESTEPS:,}")
        self.timesteps = torch.arange(num_train_timesteps, 0, -1)

    def masked_share(self, timesteps: Tensor | np.ndarray | int, num_genes: int) -> np.ndarray:
        """γ(t) of timesteps 0 … T, float64, the shape of `timesteps`; num_genes matters to `"poly_auto"` only."""
        config = self.config
        total = config.num_train_timesteps
        steps = np.asarray(timesteps)
        s = steps.astype(np.float64) / total
        if config.schedule == "linear":
            return s
        if config.schedule == "cosine":
            return 0.5 * (1 - np.cos(math.pi * s))
        if config.schedule == "sqrt":
            return np.sqrt(s)
        if config.schedule == "exp":
            return np.expm1(config.beta * s) / math.expm1(config.beta)
        exponent = config.exponent
        if config.schedule == "poly_auto":
            # T = 1 or a tail of all genes leave nothing to solve for
            slope = math.log(config.tail / num_genes) / math.log(1 / total) if total > 1 else 1.05
            exponent = min(max(slope, 1.05), 4.0)
        return 1 - (1 - s) ** exponent

    def num_masked(self, timesteps: Tensor | np.ndarray | int, num_genes: int) -> np.ndarray:
        """⌊γ(t)·G⌋: genes masked at each timestep under the budget rule."""
        # the margin keeps products that are whole numbers whole: 29/50 · 200 is 115.99999999999999 in float64
        return np.floor(self.masked_share(timesteps, num_genes) * num_genes + 1e-9).astype(np.int64)

    def visible_at(self, timesteps: Tensor, uniform: Tensor) -> Tensor:
        """The visible genes at given timesteps.

        Parameters
        ----------
        timesteps
            (B,) 0 … T.
        uniform
            (B, G) each gene's number in (0, 1): the larger, the earlier it is masked in the forward process.

        Returns
        -------
        Tensor
            (B, G) float32, 1 = visible.
        """
        num_genes = uniform.shape[1]
        steps = timesteps.detach().cpu().numpy()
        if self.config.reveal == "budget":
            kept = torch.from_numpy(num_genes - self.num_masked(steps, num_genes)).to(uniform.device)
            rank = uniform.argsort(dim=1).argsort(dim=1)
            return (rank < kept[:, None]).float()
        kept = torch.from_numpy(1 - self.masked_share(steps, num_genes)).to(uniform.device, uniform.dtype)
        # γ(T) = 1 masks everything and γ(0) = 0 nothing, also for u at the ends of the interval
        return ((uniform < kept[:, None]) | (kept[:, None] >= 1)).float()

    def fill_masked(self, values: Tensor, visible: Tensor, noise: Tensor | None = None) -> Tensor:
        """Replace masked values (B, G) by the fill; `noise` (B, G) is needed with `fill="noise"`."""
        if self.config.fill == "noise":
            return torch.where(visible > 0, values, noise.to(values.dtype))
        return values * visible

    def add_mask(
        self,
        x0: Tensor,
        timesteps: Tensor,
        generator: torch.Generator | None = None,
        uniform: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Forward process: x0 (B, G) at timesteps (B,) → values (B, G) with the fill in, visible (B, G).

        `uniform` and `noise` (B, G) are drawn from `generator` where they are not given.
        """
        if uniform is None:
            uniform = torch.rand(x0.shape, generator=generator).to(x0.device)
        if noise is None and self.config.fill == "noise":
            noise = torch.randn(x0.shape, generator=generator).to(x0.device)
        visible = self.visible_at(timesteps, uniform)
        return self.fill_masked(x0, visible, noise), visible

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Spread `num_inference_steps` reverse steps evenly over T … 0.

        Afterwards `timesteps` holds where each step starts; the last one ends at 0. More steps than T are
        not possible and are a ValueError.
        """
        total = self.config.num_train_timesteps
        if not 1 <= num_inference_steps <= total:
            raise ValueError(f"steps must lie between 1 and the {total} the model was trained with")
        ends = np.round(np.linspace(total, 0, num_inference_steps + 1)).astype(np.int64)
        self.timesteps = torch.from_numpy(ends[:-1]).to(device)

    def previous_timestep(self, timestep: int) -> int:
        """Where the step that starts at `timestep` ends."""
        steps = self.timesteps.tolist()
        place = steps.index(int(timestep))
        return steps[place + 1] if place + 1 < len(steps) else 0

    def step(
        self, model_output: Tensor, timestep: int, values: Tensor, visible: Tensor, uniform: Tensor
    ) -> MaskedDiffusionStep:
        """One reverse step: genes whose turn has come take their predicted value and keep it.

        Parameters
        ----------
        model_output
            (B, G) value each gene takes if it is revealed now.
        timestep
            Where the step starts: one of `timesteps`.
        values, visible
            (B, G) before the step.
        uniform
            (B, G) the numbers that order the genes (see `visible_at`).

        Returns
        -------
        MaskedDiffusionStep
            Genes visible before keep their value to the bit.
        """
        end = torch.full((len(values),), self.previous_timestep(timestep), dtype=torch.int64)
        now = torch.maximum(visible, self.visible_at(end, uniform).to(visible.dtype))
        revealed = now - visible
        return MaskedDiffusionStep(torch.where(revealed > 0, model_output.to(values.dtype), values), now, revealed)
