"""Gaussian diffusion and flow matching: objectives that add noise to all genes at once, as baselines.

A `HingeModel` with every gene visible predicts the expression x₀ of a spot from a noisy version

    x_t = a(t) x₀ + b(t) ε,  t = 0 … 1,

in units of each gene's standard deviation over the training spots. There are two noise schedules:

- `"gaussian-diffusion"`: a² + b² = 1 with a² the product of the linear schedule's 1 − β over 1,000 steps (Ho et al.,
  NeurIPS 2020): Stem's objective. Errors of x₀ are weighted by the signal-to-noise ratio a²/b², kept between 1 and 5
  (Hang et al., ICCV 2023; Salimans and Ho, ICLR 2022).
- `"flow-matching"`: a = 1 − t, b = t (Lipman et al., ICLR 2023), with the endpoint x₀ predicted and all errors weighted
  alike: STFlow's objective.

Sampling computes the noise from the prediction, ε = (x_t − a x₀)/b, and adds it again with the coefficients of the next
time: DDIM (Song et al., ICLR 2021) for Gaussian diffusion, Euler's method for flow matching. x₀ is extrapolated from
its last two predictions (DPM-Solver++ of second order, Lu et al., 2022): the first-order rule loses up to a quarter of
a gene's standard deviation in 25 steps. A draw is a deterministic function of its first noise.

Only the objective differs from the model: backbone, conditioning, training spots, features, steps and seed are equal.
The networks of Stem (Zhu et al., ICLR 2025) and STFlow (Huang et al., ICML 2025) are not rebuilt.
"""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hinge.backbones import ExpressionBackbone
from hinge.diffusion.defaults import DEFAULT_BATCH_SIZE, DEFAULT_DRAWS, DEFAULT_GAUSSIAN_STEPS
from hinge.diffusion.randomness import spot_normals
from hinge.models.hinge import HingeModel
from hinge.utils.errors import WeightsError
from hinge.utils.files import atomic_path
from hinge.utils.weights import check_weights

NUM_TIMES = 1000
"""Number of times that training draws from, t = 1/1000 … 1; the denoiser takes t · 1000."""

NOISE_SCHEDULES = ("gaussian-diffusion", "flow-matching")

# β of the linear schedule, first and last
_BETAS = (1e-4, 0.02)
_SNR_RANGE = (1.0, 5.0)


class NoiseSchedule:
    """Coefficients a and b of expression and noise at every time, and the reverse steps.

    Parameters
    ----------
    name
        One of `NOISE_SCHEDULES`.
    """

    def __init__(self, name: str):
        if name not in NOISE_SCHEDULES:
            raise ValueError(f"noise schedule must be one of {', '.join(NOISE_SCHEDULES)}, not {name!r}")
        self.name = name
        if name == "gaussian-diffusion":
            signal = torch.cumprod(1 - torch.linspace(*_BETAS, NUM_TIMES, dtype=torch.float64), dim=0)
            signal = torch.cat([torch.ones(1, dtype=torch.float64), signal])
            self.a, self.b = signal.sqrt(), (1 - signal).sqrt()
        else:
            self.b = torch.linspace(0, 1, NUM_TIMES + 1, dtype=torch.float64)
            self.a = 1 - self.b

    def add_noise(self, x0: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """x0, noise (B, G), times (B,) whole numbers 0 … 1000 → x_t (B, G)."""
        a, b = self.at(times, x0)
        return a * x0 + b * noise

    def at(self, times: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """a and b (B, 1) at times (B,), on the device and in the type of `like`."""
        return tuple(coefficient[times.cpu()].to(like)[:, None] for coefficient in (self.a, self.b))

    def weights(self, times: Tensor) -> Tensor:
        """Return the weights (B,) float32 of squared errors of x₀ at times (B,), 1 … 1000."""
        if self.name == "flow-matching":
            return torch.ones(len(times))
        ratio = (self.a[times.cpu()] / self.b[times.cpu()]) ** 2
        return ratio.clamp(*_SNR_RANGE).float()

    def times(self, num_steps: int) -> list[int]:
        """Times of `num_steps` reverse steps, from 1000 to 0, at even angles between signal and noise."""
        if not 1 <= num_steps <= NUM_TIMES // 2:
            raise ValueError(f"steps must lie between 1 and {NUM_TIMES // 2}")
        angle = np.arctan2(self.b.numpy(), self.a.numpy())
        wanted = np.linspace(angle[-1], 0, num_steps + 1)
        return np.unique(np.abs(angle[:, None] - wanted).argmin(axis=0))[::-1].tolist()

    def ahead(self, predicted: Tensor, before: Tensor, times: tuple[int, int, int]) -> Tensor:
        """Return x₀ for the step between the last two of three times, from predictions at the second and the first."""
        log_ratio = torch.log(self.a[list(times)] / self.b[list(times)])
        last, coming = float(log_ratio[1] - log_ratio[0]), float(log_ratio[2] - log_ratio[1])
        if not np.isfinite([last, coming]).all():  # pure noise before, or no noise after
            return predicted
        return predicted + (predicted - before) * coming / (2 * last)

    def step(self, predicted: Tensor, time: int, end: int, xt: Tensor) -> Tensor:
        """One reverse step from `time` to `end` < `time`: predicted x₀ and x_t (B, G) → x_end (B, G)."""
        noise = (xt - float(self.a[time]) * predicted) / float(self.b[time])
        return float(self.a[end]) * predicted + float(self.b[end]) * noise


class Denoiser(nn.Module):
    """A HingeModel as denoiser of all genes at once.

    A backbone that was pre-trained to predict masked genes gives no information on visible ones, so the noisy value
    also enters the output directly: with the model's prediction P, the prediction is

        x₀ = P + k(t)(x_t − a P),  k = a s² / (a² s² + b²),

    which is the posterior mean if expression is Gaussian around P with the standard deviation s (a preconditioning, as
    in Karras et al., NeurIPS 2022). s is trained, one number per gene.

    Parameters
    ----------
    model
        With the head `point` and no library size.
    schedule
        Of the noise.
    gene_ids
        (G,) vocabulary ids.
    values
        (n, G) expression of the training spots: its mean and deviation are the scale of the noise.
    """

    WEIGHTS_NAME = "noise.safetensors"

    def __init__(self, model: HingeModel, schedule: NoiseSchedule, gene_ids: Tensor, values: Tensor):
        super().__init__()
        self.model, self.schedule = model, schedule
        deviation = values.std(dim=0, unbiased=False)
        # a constant gene has no scale
        deviation = torch.where(deviation > 1e-6, deviation, torch.ones_like(deviation))
        for name, tensor in (("gene_ids", gene_ids), ("mean", values.mean(dim=0)), ("deviation", deviation)):
            self.register_buffer(name, tensor)
        self.log_spread = nn.Parameter(torch.zeros_like(deviation))

    def standardise(self, values: Tensor) -> Tensor:
        """Expression (B, G) → x₀ (B, G)."""
        return (values - self.mean) / self.deviation

    def expression(self, x0: Tensor) -> Tensor:
        """x₀ (B, G) → expression (B, G)."""
        return self.mean + self.deviation * x0

    def forward(self, xt: Tensor, times: Tensor, features: Tensor, feature_mask: Tensor | None = None) -> Tensor:
        """x_t (B, G), times (B,), features (B, d) and what they are multiplied with → predicted x₀ (B, G).

        The backbone gets noisy expression in its own units, with every gene visible.
        """
        output = self.model(
            values=self.expression(xt),
            visible=torch.ones_like(xt),
            timestep=times,
            features=features,
            gene_ids=self.gene_ids,
            next_visible=torch.ones_like(xt),
            feature_mask=feature_mask,
        )
        predicted = self.standardise(output.mean)
        a, b = self.schedule.at(times, xt)
        variance = torch.exp(2 * self.log_spread)
        return predicted + a * variance / (a**2 * variance + b**2) * (xt - a * predicted)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model, and beside its weights what belongs to the noise."""
        with atomic_path(folder) as temporary:
            self.model.save_pretrained(temporary)
            own = {name: getattr(self, name).detach().cpu() for name in ("gene_ids", "mean", "deviation", "log_spread")}
            save_file(own, temporary / self.WEIGHTS_NAME, metadata={"schedule": self.schedule.name})

    @classmethod
    def from_pretrained(cls, folder: str | Path, backbone: ExpressionBackbone) -> "Denoiser":
        """Load what `save_pretrained` wrote; `backbone` as in `HingeModel.from_pretrained`."""
        model, file = HingeModel.from_pretrained(folder, backbone), Path(folder) / cls.WEIGHTS_NAME
        try:
            with safe_open(file, "pt") as opened:
                about = opened.metadata()
                name = about.get("schedule") or about["path"]  # the key of version 0.1
                own = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            denoiser = cls(model, NoiseSchedule(name), own["gene_ids"], own["mean"][None])
            check_weights({key: tensor for key, tensor in own.items() if key != "gene_ids"}, file)
            for key, tensor in own.items():
                getattr(denoiser, key).data.copy_(tensor)
        except Exception as error:
            raise WeightsError(f"the denoiser in {folder} is damaged: {error}") from error
        return denoiser


@torch.inference_mode()
def draw_gaussian(
    denoise: Callable[[Tensor, Tensor, Tensor], Tensor],
    schedule: NoiseSchedule,
    features: Tensor,
    spots: list[str],
    num_genes: int,
    num_draws: int = DEFAULT_DRAWS,
    num_inference_steps: int = DEFAULT_GAUSSIAN_STEPS,
    seed: int = 0,
    batch_size: int = DEFAULT_BATCH_SIZE,
) -> np.ndarray:
    """Draw expression by removing noise.

    Parameters
    ----------
    denoise
        x_t (B, G), times (B,) and features (B, d) → predicted x₀ (B, G).
    schedule
        As used in training.
    features
        (n, d).
    spots
        Names of the n spots; with `seed` and the number of the draw they fix the noise.
    num_genes
        G.
    num_draws, num_inference_steps, seed
        K, steps (at most 500) and any integer.
    batch_size
        Spot-draws in one forward pass; no effect on the result beyond rounding.

    Returns
    -------
    ndarray
        (K, n, G) float32, x₀.
    """
    times = schedule.times(num_inference_steps)
    result = np.zeros((num_draws, len(spots), num_genes), dtype=np.float32)
    for start in range(0, num_draws * len(spots), batch_size):
        flat = np.arange(start, min(start + batch_size, num_draws * len(spots)))
        draw, spot = flat // len(spots), flat % len(spots)
        noise = [spot_normals(seed, spots[s], int(d), num_genes) for s, d in zip(spot, draw, strict=True)]
        xt = torch.from_numpy(np.stack(noise)).float().to(features.device)
        condition = features[torch.from_numpy(spot).to(features.device)]
        before = None
        for number, (time, end) in enumerate(itertools.pairwise(times)):
            predicted = denoise(xt, torch.full((len(flat),), time, device=xt.device), condition)
            x0 = predicted if before is None else schedule.ahead(predicted, before, (times[number - 1], time, end))
            xt, before = schedule.step(x0, time, end, xt), predicted
        result[draw, spot] = xt.cpu().numpy()
    return result
