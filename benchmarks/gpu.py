"""All checks and timings of a GPU in one call of at most ten minutes, and one table of them.

    python benchmarks/gpu.py -o gpu.json
    python benchmarks/gpu.py --tiny      # the same at tiny sizes, also on a CPU

What is compiled comes last, because compiling takes longer than all the rest.

Weights are random, sizes are those of published models. Results are first compared with those of the CPU in float32.
Every timing stands beside a plain one of the same run: `benchmarks/plain.py` for CellFM, for other backbones the same
model in float32 with every operation by itself. A case that fails is a row with its error. Matrix rates are
multiplications and additions of the plain model's matrix products, counted by `torch.utils.flop_counter`, per second.
"""

import gc
import json
import platform
import statistics
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

from hinge.utils.threads import prepare_cpu

prepare_cpu()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import typer  # noqa: E402
from benchmark import device, summary, timed  # noqa: E402
from plain import PlainHinge, plain_draws  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from hinge.backbones import CellFMConfig, CellFMModel, ScGPTConfig, ScGPTModel, TahoeConfig, TahoeModel  # noqa: E402
from hinge.diffusion import MaskedDiffusionScheduler, SamplingSettings, SlideInputs, draw_spots  # noqa: E402
from hinge.models import HingeModel  # noqa: E402
from hinge.utils import cuda_graphs  # noqa: E402

PARTS = ("checks", "sampling", "features", "training", "compiled")
FEATURES, GENES, TIMESTEPS = 128, 200, 50
# width, layers, heads, inner width where it is not the model's own
SIZES = {
    "default": (64, 4, 4, 0),
    "cellfm-80m": (1536, 2, 48, 0),
    "cellfm-800m": (1536, 40, 48, 0),
    "scgpt": (512, 12, 8, 512),
    "tahoe-70m": (512, 12, 8, 2048),
}
TINY = {"default": (16, 2, 2, 0), "cellfm-80m": (32, 2, 4, 0), "scgpt": (16, 2, 2, 16), "tahoe-70m": (16, 2, 2, 32)}


@dataclass
class Plan:
    """Sizes of all that is run.

    Attributes
    ----------
    sizes
        (width, layers, heads, inner width) of each model.
    batch, sampling_batch, spots, plain_spots, draws
        Spots in a training step, spot-draws in a batch and spots of a slide; spots that the plain sampler draws, once
        each; draws of each spot.
    vit, patches
        Encoder of timm, and patches in a batch.
    seconds
        That a timing may take.
    """

    sizes: dict[str, tuple[int, int, int, int]]
    batch: int
    sampling_batch: int
    spots: dict[str, int]
    plain_spots: int
    draws: int
    vit: str
    patches: int
    seconds: float


FULL = Plan(
    SIZES, 64, 1024, {"default": 500, "cellfm-80m": 500, "cellfm-800m": 60, "scgpt": 200}, 64, 20,
    "vit_large_patch16_224", 64, 3.0,
)  # fmt: skip
SMALL = Plan(TINY, 4, 16, {"default": 6, "cellfm-80m": 3, "scgpt": 3}, 2, 2, "vit_tiny_patch16_224", 2, 0.0)


def repeated(function: Callable[[], object], seconds: float, most: int = 30, warm: int = 2) -> list[float]:
    """Seconds of each of three to `most` calls after some that do not count."""
    for _ in range(warm):
        function()
    found: list[float] = []
    while len(found) < 3 or (sum(found) < seconds and len(found) < most):
        found.append(timed(function))
    return found


def rates() -> dict[str, float]:
    """TFLOP/s of a large matrix product, and TB/s of a copy (bytes read and written)."""
    side = 8192 if torch.cuda.is_available() else 256
    found = {}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        a, b = (torch.randn(side, side, device=device()).to(dtype) for _ in range(2))
        found[f"{name}_tflop_per_s"] = 2 * side**3 / statistics.median(repeated(lambda: a @ b, 0.5)) / 1e12  # noqa: B023
    source = torch.randn(side, side, device=device())
    target = torch.empty_like(source)
    found["copy_tb_per_s"] = 2 * source.nbytes / statistics.median(repeated(lambda: target.copy_(source), 0.3)) / 1e12
    return found


def make_backbone(name: str, sizes: tuple[int, int, int, int]) -> torch.nn.Module:
    width, layers, heads, inner = sizes
    shared = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    tokens = ["<pad>", "<cls>", "<eoc>", *[f"gene{number}" for number in range(GENES)]]
    with torch.device(device()):
        if name == "scgpt":
            return ScGPTModel(ScGPTConfig(vocab_size=len(tokens), tokens=tokens, intermediate_size=inner, **shared))
        if name == "tahoe-70m":
            return TahoeModel(TahoeConfig(vocab_size=len(tokens), tokens=tokens, intermediate_size=inner, **shared))
        return CellFMModel(CellFMConfig(num_genes=GENES, num_value_bins=64, **shared))


def make_model(name: str, plan: Plan, rank: int | None, paper: bool, dtype: torch.dtype) -> HingeModel:
    """A model on the device, its backbone in `dtype`; `paper`: the released configuration, else the default one."""
    torch.manual_seed(0)
    backbone = make_backbone(name, plan.sizes[name])
    options = {"head": "point", "gene_factors": False, "drop_masked": True} if paper else {}
    with torch.device(device()):
        model = HingeModel.from_backbone(backbone, FEATURES, GENES, modulation_rank=rank, **options)
    model.to(device())
    model.backbone.to(dtype)
    return model


def batch_of(size: int) -> tuple[list[Tensor], Tensor]:
    """Arguments of a forward pass, and values to predict."""
    generator = torch.Generator().manual_seed(1)
    values, target = (5 * torch.rand(size, GENES, generator=generator) for _ in range(2))
    visible = (torch.rand(size, GENES, generator=generator) < 0.5).float()
    timestep = torch.randint(1, TIMESTEPS + 1, (size,), generator=generator)
    features = torch.randn(size, FEATURES, generator=generator)
    arguments = [values * visible, visible, timestep, features, torch.arange(1, GENES + 1)]
    return [each.to(device()) for each in arguments], target.to(device())


def training_step(model: torch.nn.Module, size: int, autocast: bool) -> Callable[[], None]:
    """A step of the paper's objective: mean squared error of masked genes, AdamW."""
    arguments, target = batch_of(size)
    masked = 1 - arguments[1]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-4, fused=True)

    def step() -> None:
        with torch.autocast(device().type, torch.bfloat16, enabled=autocast):
            predicted = model(*arguments)
        predicted = predicted if isinstance(predicted, Tensor) else predicted.mean
        (((predicted.float() - target) ** 2 * masked).sum() / masked.sum()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def operations(function: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def peak_gb() -> float | None:
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None


def forget() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# --- checks -------------------------------------------------------------------------------------------------------


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double().cpu() - expected.double()).norm() / expected.double().norm())


def check(plan: Plan) -> list[dict]:
    """Compare predictions, gradients and draws with those of the CPU in float32."""
    # the layers of cellfm-800m are those of cellfm-80m
    cases: dict[str, Callable[[], list[dict]]] = {
        name: partial(_check_step, name, plan) for name in plan.sizes if name != "cellfm-800m"
    }
    cases["draws"] = partial(_check_draws, plan)
    rows = []
    for name, case in cases.items():
        try:
            rows += case()
        except Exception as error:
            rows.append({"case": name, "ok": False, "error": reason(error)})
        forget()
    return rows


def _check_step(name: str, plan: Plan) -> list[dict]:
    """Predictions and gradients of one step, in float32 and in bfloat16."""
    found: dict[str, list[Tensor]] = {}
    for kind, dtype in (("cpu", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        model = make_model(name, plan, 32, True, torch.float32)
        _perturb(model)
        model.backbone.to(dtype)
        arguments, target = batch_of(4)
        if kind == "cpu":
            model, arguments, target = model.cpu(), [each.cpu() for each in arguments], target.cpu()
        with torch.autocast(target.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            predicted = model(*arguments).mean.float()
        ((predicted - target) ** 2).mean().backward()
        gradient = torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None])
        found[kind] = [predicted.detach().cpu(), gradient.cpu()]
    rows = []
    for kind, limit in (("float32", 1e-3), ("bfloat16", 5e-2)):
        errors = [relative(ours, theirs) for ours, theirs in zip(found[kind], found["cpu"], strict=True)]
        row = {"case": f"{name} {kind}", "prediction": errors[0], "gradient": errors[1], "ok": max(errors) < limit}
        rows.append(row)
    return rows


def _perturb(model: HingeModel) -> None:
    """Move the modulation from the identity, where gradients of half of its weights are zero."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(parameter))


def _check_draws(plan: Plan) -> list[dict]:
    """Draws of the default model: with graphs, without, and on the CPU."""
    model = make_model("default", plan, 4, False, torch.float32).eval()
    _perturb(model)
    settings = SamplingSettings(num_draws=plan.draws, batch_size=plan.sampling_batch // 8)
    found = {}
    for kind in ("graphs", "eager", "cpu"):
        model = model.cpu() if kind == "cpu" else model
        with nullcontext() if kind == "graphs" else without_graphs():
            found[kind] = draw(model, slide_inputs(plan.sampling_batch // 4), settings)
    rows = []
    for kind in ("graphs", "eager"):
        # a rounded value at the edge of a count may become the next one, and what is drawn after it follows
        same = float((np.abs(found[kind] - found["cpu"]) < 1e-3).mean())
        shift = float(np.abs(found[kind].mean(axis=(0, 1)) - found["cpu"].mean(axis=(0, 1))).max())
        rows.append({"case": f"draws {kind}", "equal_share": same, "largest_shift": shift, "ok": same > 0.98})
    equal = bool((found["graphs"] == found["eager"]).mean() > 0.999)
    return [*rows, {"case": "draws graphs = eager", "ok": equal}]


# --- training -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepCase:
    """How a training step is computed."""

    name: str
    kind: str  # plain float32, float32 or bfloat16
    rank: int | None = None
    checkpointing: bool = False
    compiled: bool = False

    @property
    def label(self) -> str:
        further = " checkpointing" * self.checkpointing + " compiled" * self.compiled
        return f"{self.name} {self.kind} rank {self.rank or 'full'}{further}"


def step_cases(name: str) -> list[StepCase]:
    """Plain, float32 and bfloat16, rank 32 and full, with checkpointing."""
    ranks = [(rank, kept) for rank in (None, 32) for kept in (False, True)]
    return [
        StepCase(name, "plain float32"),
        StepCase(name, "float32"),
        *(StepCase(name, "bfloat16", rank, kept) for rank, kept in ranks),
    ]


def training(cases: list[StepCase], plan: Plan, matrix: dict[str, float], report: Callable[[dict], None]) -> None:
    """Time steps; the first of each size is the plain one."""
    plain: dict[str, tuple[float, int]] = {}  # seconds and operations of a plain step
    for case in cases:
        forget()
        try:
            step = _step(case, plan)
            flops = plain[case.name][1] if case.name in plain else operations(step)
            forget()
            seconds = repeated(step, plan.seconds)
        except Exception as error:
            report({"part": "training", "case": case.label, "error": reason(error)})
            continue
        finally:
            step = None  # and with it the model
        median = statistics.median(seconds)
        plain.setdefault(case.name, (median, flops))
        rate = matrix[f"{case.kind.removeprefix('plain ')}_tflop_per_s"]
        found = {
            "spots_per_s": plan.batch / median,
            "times_as_fast_as_plain": plain[case.name][0] / median,
            "share_of_matrix_rate": flops / median / 1e12 / rate,
            "peak_gb": peak_gb(),
        }
        report({"part": "training", "case": case.label, **summary(seconds), **found})


def _step(case: StepCase, plan: Plan) -> Callable[[], None]:
    dtype = torch.bfloat16 if case.kind == "bfloat16" else torch.float32
    model: torch.nn.Module = make_model(case.name, plan, case.rank, True, dtype)
    if case.checkpointing:
        model.enable_gradient_checkpointing()
    if case.compiled or case.kind.startswith("plain"):
        model.modulation.fused = False
    if case.kind.startswith("plain") and isinstance(model.backbone, CellFMModel):
        model = PlainHinge(model).to(device())
    if case.compiled:
        model.compile(dynamic=False)
    return training_step(model.train(), plan.batch, case.kind == "bfloat16")


# --- sampling -----------------------------------------------------------------------------------------------------


def slide_inputs(spots: int) -> SlideInputs:
    features = torch.randn(spots, FEATURES, generator=torch.Generator().manual_seed(0)).numpy()
    side = int(np.ceil(np.sqrt(spots)))
    positions = np.stack([np.arange(spots) // side, np.arange(spots) % side], axis=1).astype(float)
    return SlideInputs("slide", [f"spot{number}" for number in range(spots)], features, positions)


def draw(model: HingeModel, inputs: SlideInputs, settings: SamplingSettings) -> np.ndarray:
    ids = torch.arange(1, GENES + 1)
    return draw_spots(model, MaskedDiffusionScheduler(TIMESTEPS, "cosine"), ids, inputs, settings).values


class without_graphs:
    """Every pass is launched kernel by kernel."""

    def __enter__(self) -> None:
        self.most, cuda_graphs.MOST_GRAPHS = cuda_graphs.MOST_GRAPHS, 0

    def __exit__(self, *_: object) -> None:
        cuda_graphs.MOST_GRAPHS = self.most


def sampling(plan: Plan, report: Callable[[dict], None]) -> None:
    """A slide's draws of every size: plain loop, float32 and bfloat16, with and without graphs."""
    for name, spots in plan.spots.items():
        plain_rate, inputs = None, slide_inputs(spots)
        cases = ["plain float32", "float32 graphs", "bfloat16 eager", "bfloat16 graphs"]
        if name == "cellfm-800m":
            cases.remove("float32 graphs")  # minutes
        for kind in cases:
            label = f"{name} {kind}"
            try:
                dtype = torch.bfloat16 if kind.startswith("bfloat16") else torch.float32
                model = make_model(name, plan, 32, False, dtype).eval()
                settings = SamplingSettings(num_draws=plan.draws, batch_size=plan.sampling_batch)
                forget()
                if kind == "plain float32":
                    rate, seconds = _plain_rate(name, plan)
                else:
                    with without_graphs() if "eager" in kind else nullcontext():
                        seconds = repeated(lambda: draw(model, inputs, settings), plan.seconds, 3, 1)  # noqa: B023
                    rate = spots * plan.draws / statistics.median(seconds)
            except Exception as error:
                report({"part": "sampling", "case": label, "error": reason(error)})
                continue
            finally:
                model = None
                gc.collect()
            plain_rate = plain_rate or rate
            found = {"spot_draws_per_s": rate, "times_as_fast_as_plain": rate / plain_rate, "peak_gb": peak_gb()}
            report({"part": "sampling", "case": label, **summary(seconds), **found})


def _plain_rate(name: str, plan: Plan) -> tuple[float, list[float]]:
    """Spot-draws a second of 50 passes each, float32; of `PlainHinge`, or of the model's passes one by one."""
    model = make_model(name, plan, None, True, torch.float32).eval()
    arguments, _ = batch_of(plan.plain_spots)
    scheduler, ids = MaskedDiffusionScheduler(TIMESTEPS, "cosine"), arguments[4]
    if isinstance(model.backbone, CellFMModel):
        plain, generator = PlainHinge(model).to(device()).eval(), torch.Generator().manual_seed(0)
        seconds = repeated(lambda: plain_draws(plain, scheduler, arguments[3], ids, 1, generator), 0, 3, 1)
    else:

        @torch.no_grad()
        def passes() -> None:
            for _ in range(TIMESTEPS):
                model(*arguments)

        seconds = repeated(passes, 0, 3, 1)
    return plan.plain_spots / statistics.median(seconds), seconds


# --- features -----------------------------------------------------------------------------------------------------


def features(plan: Plan, report: Callable[[dict], None]) -> None:
    """Features of a simulated slide by a ViT: images a second of the bare encoder, and of the whole command."""
    from hinge.data.readers import read_slide
    from hinge.data.simulate import simulate_slides
    from hinge.encoders import extract_features, load_encoder

    grid = (32, 32) if torch.cuda.is_available() else (3, 2)
    with tempfile.TemporaryDirectory() as folder:
        slide = read_slide(simulate_slides(folder, n_slides=1, grid=grid, n_genes=20)[0])
        loaded = load_encoder(f"random:{plan.vit}")
        patch = np.zeros((plan.patches, loaded.patch_px, loaded.patch_px, 3), dtype=np.uint8)
        x = loaded.transform(torch.from_numpy(patch).to(loaded.device))
        plain = next(iter(loaded.module.parameters())).dtype

        @torch.inference_mode()
        def bare(dtype: torch.dtype) -> None:
            with torch.autocast(device().type, dtype, enabled=dtype != plain):
                loaded.module(x)

        def whole() -> None:
            extract_features(slide, loaded, Path(folder) / "f.h5", batch_size=plan.patches, overwrite=True)

        for label, function, number in (
            (f"{plan.vit} bare {plain}", lambda: bare(plain), plan.patches),
            (f"{plan.vit} bare bfloat16", lambda: bare(torch.bfloat16), plan.patches),
            (f"{plan.vit} extract_features", whole, slide.n_obs),
        ):
            try:
                forget()
                seconds = repeated(
                    function, plan.seconds, 3 if function is whole else 30, 1 if function is whole else 2
                )
            except Exception as error:
                report({"part": "features", "case": label, "error": reason(error)})
                continue
            rate = number / statistics.median(seconds)
            report({"part": "features", "case": label, **summary(seconds), "patches_per_s": rate, "peak_gb": peak_gb()})


def table(rows: list[dict]) -> str:
    """Markdown of all rows."""
    keys = ["median_s", "spots_per_s", "spot_draws_per_s", "patches_per_s", "times_as_fast_as_plain"]
    keys += ["share_of_matrix_rate", "peak_gb"]
    lines = [f"| part | case | {' | '.join(key.replace('_', ' ') for key in keys)} |", "| --- " * (len(keys) + 2) + "|"]
    for row in rows:
        cells = [f"{row[key]:.3g}" if row.get(key) is not None else "" for key in keys]
        lines.append(f"| {row['part']} | {row['case']} | {' | '.join(cells)} |" + row.get("error", ""))
    return "\n".join(lines)


def main(
    tiny: Annotated[bool, typer.Option(help="Tiny sizes: does everything run?")] = False,
    parts: Annotated[str, typer.Option(help=f"Which of {', '.join(PARTS)}.")] = "",
    seconds: Annotated[float | None, typer.Option(help="That a timing may take.")] = None,
    sizes: Annotated[str, typer.Option(help=f"Which of {', '.join(SIZES)}.")] = "",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file, rewritten after every row.")] = None,
) -> None:
    """Check and time everything that runs on a GPU."""
    plan = SMALL if tiny else FULL
    chosen = sizes.replace(",", " ").split() or list(plan.sizes)
    plan = replace(
        plan,
        seconds=plan.seconds if seconds is None else seconds,
        sizes={name: plan.sizes[name] for name in chosen},
        spots={name: spots for name, spots in plan.spots.items() if name in chosen},
    )
    wanted = parts.replace(",", " ").split() or list(PARTS)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    result: dict = {"device": name, "torch": torch.__version__, "python": platform.python_version(), "rows": []}
    torch.backends.cuda.matmul.allow_tf32 = False

    def keep() -> None:
        if output is not None:
            output.write_text(json.dumps(result, indent=1) + "\n")

    def report(row: dict) -> None:
        result["rows"].append(row)
        print(json.dumps(row), flush=True)
        keep()

    result["rates"] = rates()
    print(json.dumps(result), flush=True)
    if "checks" in wanted:
        result["checks"] = check(plan)
        for row in result["checks"]:
            print(json.dumps(row), flush=True)
        keep()
    if "sampling" in wanted:
        sampling(plan, report)
    if "features" in wanted:
        features(plan, report)
    if "training" in wanted:
        training([case for size in plan.sizes for case in step_cases(size)], plan, result["rates"], report)
    if "compiled" in wanted:
        for size in plan.sizes:
            both = [StepCase(size, "plain float32"), StepCase(size, "bfloat16", 32, compiled=True)]
            training(both, plan, result["rates"], report)
    keep()
    print(table(result["rows"]))
    failed = [row["case"] for row in result.get("checks", []) if not row["ok"]]
    failed += [row["case"] for row in result["rows"] if "error" in row]
    if failed:
        raise SystemExit("failed: " + ", ".join(failed))


if __name__ == "__main__":
    typer.run(main)
