"""Time of a draw and CRPS: hinge beside Gaussian diffusion, flow matching and the cost of Stem's network.

    python benchmarks/peers.py runs/her2st -o peers.json

The first three are the run's own, with several numbers of steps, on the spots of its first test slide; `hinge evaluate`
trains the peers in the same way. `StemCost` is not Stem: it is a plain network of the size that Stem's release has by
default, with random weights. It is timed for one step in float32 and multiplied by its 1,000 steps, and has no CRPS.
Times are those of drawing alone, without starting, reading or writing.
"""

import json
from pathlib import Path
from typing import Annotated

from hinge.utils.threads import prepare_cpu

prepare_cpu()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import typer  # noqa: E402
from benchmark import device, machine, summary, timed  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from hinge.config import load_config  # noqa: E402
from hinge.diffusion.gaussian import Denoiser, draw_gaussian  # noqa: E402
from hinge.diffusion.pipeline import HingePipeline  # noqa: E402
from hinge.evaluation.metrics.calibration import crps_of_spots  # noqa: E402
from hinge.evaluation.predictions import prediction_from_draws  # noqa: E402
from hinge.run.run import Run  # noqa: E402

PEERS = {"gaussian-diffusion": (2, 5, 10, 25), "flow-matching": (2, 5, 10, 25)}
HINGE_STEPS = (1, 2, 4, 8)
STEM_STEPS = 1000


class StemBlock(nn.Module):
    """Attention and MLP, each scaled, shifted and gated by the condition (adaLN-Zero; Peebles and Xie, ICCV 2023)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.condition = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (B, G, width), condition (B, width) → (B, G, width)."""
        batch, genes, width = x.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = self.condition(F.silu(condition))[:, None].chunk(6, dim=-1)
        normed = F.layer_norm(x, (width,), eps=1e-6) * (1 + scale1) + shift1
        q, k, v = self.qkv(normed).view(batch, genes, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + gate1 * self.out(attended)
        normed = F.layer_norm(x, (width,), eps=1e-6) * (1 + scale2) + shift2
        return x + gate2 * self.down(F.gelu(self.up(normed), approximate="tanh"))


class StemCost(nn.Module):
    """What a denoising step of Stem's default network costs (Zhu et al., ICLR 2025): 12 blocks of width 384, 6 heads.

    The condition is UNI's and CONCH's features, 1,536 numbers. 35.6 M parameters.
    """

    def __init__(self, genes: int, width: int = 384, depth: int = 12, heads: int = 6, features: int = 1536):
        super().__init__()
        self.names = nn.Parameter(torch.randn(genes, width))
        self.value = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.image = nn.Sequential(nn.Linear(features, features), nn.SiLU(), nn.Linear(features, width))
        self.blocks = nn.ModuleList(StemBlock(width, heads) for _ in range(depth))
        self.condition, self.head = nn.Linear(width, 2 * width), nn.Linear(width, 2)

    def forward(self, values: Tensor, time: Tensor, features: Tensor) -> Tensor:
        """values (B, G), time (B, 256), features (B, 1536) → noise and variance (B, 2, G)."""
        condition = self.time(time) + self.image(features)
        x = self.value(values[..., None]) + self.names
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.condition(F.silu(condition))[:, None].chunk(2, dim=-1)
        return self.head(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift).transpose(1, 2)


@torch.inference_mode()
def stem_cost(genes: int, batch: int, repeats: int) -> dict:
    """Seconds of a draw of one spot by 1,000 steps of `StemCost`."""
    network = StemCost(genes).to(device()).eval()
    values, time, features = (torch.randn(batch, size, device=device()) for size in (genes, 256, 1536))
    network(values, time, features)
    seconds = [STEM_STEPS / batch * timed(lambda: network(values, time, features)) for _ in range(repeats)]
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return {"method": "StemCost", "steps": STEM_STEPS, "parameters": parameters, **summary(seconds)}


def main(
    run: Annotated[Path, typer.Argument(help="Folder of a trained run.")],
    draws: Annotated[int, typer.Option(help="Draws of a spot.")] = 20,
    repeats: Annotated[int, typer.Option(help="Times of each.")] = 3,
    batch: Annotated[int, typer.Option(help="Spot-draws in a step of StemCost.")] = 64,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file.")] = None,
) -> None:
    """Print one row for each method and number of steps; the seconds are those of one draw of one spot."""
    config = load_config(run / "config.yaml", [f"evaluation.baselines=[{','.join(PEERS)}]", f"output={run}"])
    opened, name = Run(config), config.data.test[0]
    opened.fit_baselines([name])
    slide, test = opened.slide(name), opened.spots([name])
    slide.uns.setdefault("hinge", {})["patient"] = opened.patient(slide)
    features = opened.features(slide)
    pipe = HingePipeline.from_pretrained(run)

    def by_hinge(steps: int) -> np.ndarray:
        drawn = pipe(slide, num_draws=draws, num_inference_steps=steps, features=features, progress=False)
        return prediction_from_draws(drawn, test).draws

    functions = {("hinge", steps): (by_hinge, steps) for steps in HINGE_STEPS}
    condition = torch.from_numpy(np.asarray(test.features[:, 0], dtype=np.float32)).to(device())
    for method, numbers in PEERS.items():
        denoiser = Denoiser.from_pretrained(run / "baselines" / method / "model", opened.backbone())
        denoiser.model.backbone.to(pipe.dtype)
        denoiser = denoiser.to(device()).eval()

        def by_noise(steps: int, denoiser: Denoiser = denoiser) -> np.ndarray:
            x0 = draw_gaussian(
                denoiser, denoiser.schedule, condition, list(test.barcodes), len(test.genes), draws, steps
            )
            return denoiser.expression(torch.from_numpy(x0).to(device())).clamp_min(0).detach().cpu().numpy()

        functions |= {(method, steps): (by_noise, steps) for steps in numbers}
    rows = []
    for (method, steps), (function, argument) in functions.items():
        found: list[np.ndarray] = []
        seconds = [
            timed(lambda: found.append(function(argument))) / (draws * len(test))  # noqa: B023
            for _ in range(repeats)
        ]
        crps = float(crps_of_spots(test.values, found[-1]).mean())
        rows.append({"method": method, "steps": steps, "crps": crps, **summary(seconds)})
        print(json.dumps(rows[-1]), flush=True)
    rows.append(stem_cost(len(test.genes), batch, repeats))
    print(json.dumps(rows[-1]), flush=True)
    if output is not None:
        result = {**machine(), "run": run.name, "slide": name, "spots": len(test), "draws": draws, "rows": rows}
        output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
