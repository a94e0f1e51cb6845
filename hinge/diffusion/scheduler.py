"""Masked diffusion over genes: which genes are visible at a timestep, and how they are revealed.

At timestep t = 0 every gene of a spot is visible, at t = T none. Each gene has one uniform number u that determines the
timestep from which it is masked. The visible set at any t is therefore a deterministic function of u: the forward
process needs no loop, the reverse process reveals genes in the order of u, and a draw can be repeated.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor

from hinge.utils.errors import WeightsError, one_line
from hinge.utils.files import read_json

SCHEDULES = ("power", "linear", "cosine", "sqrt", "exp", "poly_auto")
MOST_TIMESTEPS = 1_000_000
REVEALS = ("budget", "bernoulli")
FILLS = ("zero", "noise", "mask_token")
EXP_RATE = 3.0
"""β of the schedule `"exp"`."""
POLY_AUTO_TAIL = 1
"""Genes that the schedule `"poly_auto"` leaves to the last step, about."""

# parameters in scheduler_config.json of earlier versions, with the only value still in use
_REMOVED = {"beta": EXP_RATE, "tail": POLY_AUTO_TAIL}


@dataclass
class MaskedDiffusionSchedulerOutput(BaseOutput):
    """Result of one reverse step.

    Attributes
    ----------
    prev_sample
        (B, G) values after the step, which is the sample of the previous timestep.
    visible
        (B, G), 1 for the genes that are visible after it.
    revealed
        (B, G), 1 for the genes that became visible in it.
    """

    prev_sample: Tensor
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
        (e^{3s} − 1)/(e^3 − 1); `"power"` 1 − (1 − s)^exponent; `"poly_auto"` the same with the exponent
        log(1/G)/log(1/T), clipped to [1.05, 4], so that about one gene is left to the last step.
    exponent
        Of `"power"`: ζ in the paper's ᾱ_t = (1 − t/T)^ζ.
    reveal
        `"budget"`: the ⌊γ(t)·G⌋ genes with the largest u are masked, as in the released code. `"bernoulli"`:
        each gene is masked on its own with probability γ(t), as in the paper; in reverse a masked gene is then
        revealed with probability (ᾱ_{t−1} − ᾱ_t)/(1 − ᾱ_t).
    fill
        What replaces masked values: `"zero"`, `"noise"` (standard normal) or `"mask_token"` (the backbone's own
        token; the value itself is then 0).
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 50,
        schedule: str = "poly_auto",
        exponent: float = 1.0,
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
        self.num_inference_steps: int | None = None

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """Split a configuration for diffusers, which calls this from `from_config` and `from_pretrained`.

        Raises
        ------
        ValueError
            A parameter that this version has not, with another value than the one in use.
        """
        # diffusers counts positional arguments as defaults, and would not keep their values
        config_dict = {name: value for name, value in config_dict.items() if name != "_use_default_values"}
        for name, value in _REMOVED.items():
            found = config_dict.pop(name, value)
            if found != value:
                raise ValueError(f"{name} {found!r} is no longer supported: {name} is always {value:g}")
        return super().extract_init_dict(config_dict, **kwargs)

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
            return np.expm1(EXP_RATE * s) / math.expm1(EXP_RATE)
        exponent = config.exponent
        if config.schedule == "poly_auto":
            # with T = 1 there is nothing to solve for
            slope = math.log(POLY_AUTO_TAIL / num_genes) / math.log(1 / total) if total > 1 else 1.05
            exponent = min(max(slope, 1.05), 4.0)
        return 1 - (1 - s) ** exponent

    def num_masked(self, timesteps: Tensor | np.ndarray | int, num_genes: int) -> np.ndarray:
        """⌊γ(t)·G⌋: genes masked at each timestep under the budget rule."""
        # the margin keeps products that are whole numbers whole: 29/50 · 200 is 115.99999999999999 in float64
        return np.floor(self.masked_share(timesteps, num_genes) * num_genes + 1e-9).astype(np.int64)

    def mask_times(self, uniform: Tensor) -> Tensor:
        """Return the timestep from which each gene is masked.

        Parameters
        ----------
        uniform
            (B, G) a number in (0, 1) for each gene: the larger, the earlier the forward process masks the gene.

        Returns
        -------
        Tensor
            (B, G) int64, 1 … T. The visible genes at timestep t are those with a mask time above t.
        """
        num_genes = uniform.shape[1]
        steps = np.arange(self.config.num_train_timesteps + 1)
        if self.config.reveal == "budget":
            rank = uniform.argsort(dim=1).argsort(dim=1)
            num_masked = torch.from_numpy(self.num_masked(steps, num_genes)).to(uniform.device)
            return torch.searchsorted(num_masked, num_genes - rank)
        kept = torch.from_numpy(1 - self.masked_share(steps, num_genes)).to(uniform.dtype).to(uniform.device)
        first = torch.searchsorted(-kept, -uniform.contiguous())
        # a share of 1 keeps every gene, also one with u = 1
        return first.clamp_min(int((kept >= 1).sum()))

    def visible_at(self, timesteps: Tensor, uniform: Tensor) -> Tensor:
        """Return the visible genes (B, G) float32 at timesteps (B,), 0 … T; `uniform` as for `mask_times`."""
        return (self.mask_times(uniform) > timesteps.to(uniform.device)[:, None]).float()

    def fill_masked(self, values: Tensor, visible: Tensor, noise: Tensor | None = None) -> Tensor:
        """Replace masked values (B, G) by the fill; `noise` (B, G) is needed with `fill="noise"`."""
        if self.config.fill == "noise":
            if noise is None:
                raise ValueError("the fill noise needs noise in place of masked values")
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

        Afterwards `timesteps` holds the start of each step; the last step ends at 0.

        Raises
        ------
        ValueError
            More steps than T, or none.
        """
        total = self.config.num_train_timesteps
        if not 1 <= num_inference_steps <= total:
            raise ValueError(f"steps must lie between 1 and the {total} the model was trained with")
        ends = np.round(np.linspace(total, 0, num_inference_steps + 1)).astype(np.int64)
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.from_numpy(ends[:-1]).to(device)

    def previous_timestep(self, timestep: int) -> int:
        """Return the timestep at which the step that starts at `timestep` ends."""
        steps = self.timesteps.tolist()
        place = steps.index(int(timestep))
        return steps[place + 1] if place + 1 < len(steps) else 0

    def timesteps_of(self, visible: Tensor, latest: int | None = None) -> Tensor:
        """Return the timestep (B,) that fits the number of visible genes of each row.

        Parameters
        ----------
        visible
            (B, G). A spot with measured genes has more visible genes than the schedule has at a timestep.
        latest
            Upper limit; None for T.

        Returns
        -------
        Tensor
            (B,) int64 on the CPU: the first timestep at which the budget rule masks as many genes, 1 … T.
        """
        total, num_genes = self.config.num_train_timesteps, visible.shape[1]
        masked = num_genes - visible.sum(dim=1).cpu().numpy()
        fitting = np.searchsorted(self.num_masked(np.arange(total + 1), num_genes), masked)
        return torch.from_numpy(fitting).clamp(1, total if latest is None else latest)

    def next_visible(self, timestep: int, visible: Tensor, mask_times: Tensor) -> Tensor:
        """Return the genes (B, G) that are visible after the step that starts at `timestep`; as for `step`."""
        return torch.maximum(visible, (mask_times > self.previous_timestep(timestep)).to(visible.dtype))

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        values: Tensor,
        visible: Tensor,
        mask_times: Tensor,
        return_dict: bool = True,
    ) -> Any:
        """Take one reverse step: newly visible genes take their predicted value and keep it.

        Parameters
        ----------
        model_output
            (B, G) the value that each gene takes if it is revealed now.
        timestep
            Start of the step: one of `timesteps`.
        values, visible
            (B, G) before the step.
        mask_times
            (B, G) as `mask_times` returns them.
        return_dict
            Whether to return an output with names; else a plain tuple.

        Returns
        -------
        MaskedDiffusionSchedulerOutput or tuple
            Genes that were visible before keep their value exactly.
        """
        following = self.next_visible(timestep, visible, mask_times)
        revealed = following - visible
        values = torch.where(revealed > 0, model_output.to(values.dtype), values)
        if not return_dict:
            return values, following, revealed
        return MaskedDiffusionSchedulerOutput(prev_sample=values, visible=following, revealed=revealed)


def load_scheduler(folder: Path) -> MaskedDiffusionScheduler:
    """Return the scheduler of a run, beside its model, or of a saved pipeline; a WeightsError if there is none."""
    places = [folder / "scheduler", folder / "model"]
    path = next((place for place in places if (place / "scheduler_config.json").is_file()), places[-1])
    path = path / "scheduler_config.json"
    try:
        return MaskedDiffusionScheduler.from_config(read_json(path))
    except (TypeError, ValueError, AttributeError, OSError) as error:
        raise WeightsError(f"{path} describes no scheduler: {one_line(error)}") from error
