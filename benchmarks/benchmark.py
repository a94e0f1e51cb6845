"""What training, sampling, features and loading cost on this machine, beside a plain implementation.

    python benchmarks/benchmark.py train --size base
    python benchmarks/benchmark.py sample --spots 1000 --draws 20
    python benchmarks/benchmark.py features --encoder random:vit_small_patch16_224
    python benchmarks/benchmark.py load
    python benchmarks/benchmark.py scale --plot scale.png
    python benchmarks/benchmark.py steps runs/her2st
    python benchmarks/benchmark.py processes
    python benchmarks/benchmark.py workers
    python benchmarks/benchmark.py rates slide.svs

Every command prints JSON and writes it where --output says. The candidates alternate in one process, so that a busy
machine slows all of it; times are medians with the smallest and the largest. Peak memory is that of a process of its
own, above what it had before its first step.
"""

import json
import multiprocessing
import platform
import resource
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

from hinge.utils.threads import prepare_cpu

prepare_cpu()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import typer  # noqa: E402
from plain import PlainHinge, plain_draws  # noqa: E402

from hinge.backbones import CellFMConfig, CellFMModel  # noqa: E402
from hinge.diffusion import MaskedDiffusionScheduler, SamplingSettings, SlideInputs, draw_spots  # noqa: E402
from hinge.models import HingeModel  # noqa: E402

# width, layers, heads, genes
SIZES = {
    "quick": (64, 4, 4, 100),
    "her2st": (64, 4, 4, 200),
    "base": (128, 40, 4, 200),
    "80M": (1536, 2, 48, 200),
    "800M": (1536, 40, 48, 200),
    "20k": (64, 4, 4, 20000),
}
FEATURES = 128
BINS = 64
KINDS = ("plain float32", "hinge float32", "hinge bfloat16")

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode=None)
Output = Annotated[Path | None, typer.Option("--output", "-o", help="JSON file.")]
Size = Annotated[str, typer.Option(help=", ".join(SIZES))]


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine() -> dict:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def report(result: dict, output: Path | None) -> None:
    text = json.dumps({**machine(), **result}, indent=2)
    print(text)
    if output is not None:
        output.write_text(text + "\n")


def timed(function: Callable[[], object]) -> float:
    synchronise()
    started = time.perf_counter()
    function()
    synchronise()
    return time.perf_counter() - started


def take_turns(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, all functions once per round; a first round that does not count."""
    for function in functions.values():
        function()
    seconds = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            seconds[name].append(timed(function))
    return seconds


def summary(seconds: list[float]) -> dict:
    return {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds)}


def ratio(slow: list[float], fast: list[float]) -> float:
    """Median over rounds of what one takes of the other's time."""
    return round(statistics.median(a / b for a, b in zip(slow, fast, strict=True)), 2)


def matrix_rate(dtype: torch.dtype, side: int = 2048, repeats: int = 7) -> float:
    """FLOP/s of the best of several square matrix products."""
    a, b = (torch.randn(side, side, device=device()).to(dtype) for _ in range(2))
    a @ b
    return 2 * side**3 / min(timed(lambda: a @ b) for _ in range(repeats))


def peak_resident() -> int:
    """Bytes, the most this process ever held. getrusage would count what its parent held when it was started."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def make_model(size: str, kind: str, seed: int = 0) -> torch.nn.Module:
    width, layers, heads, genes = SIZES[size]
    torch.manual_seed(seed)
    with torch.device(device()):
        backbone = CellFMModel(
            CellFMConfig(
                num_genes=genes,
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_value_bins=BINS,
            )
        )
        # full modulation of 40 layers × 1536 would be 566 M weights, with Adam 9 GB
        rank = 32 if width * layers > 128 * 40 else None
        # the parts of the released model, with the tokens of a model with gene factors, the default
        options = {"head": "point", "gene_factors": False, "drop_masked": True, "modulation_rank": rank}
        model = HingeModel.from_backbone(backbone, FEATURES, genes, **options)
    model.to(device())
    if kind.startswith("plain"):
        return PlainHinge(model).to(device())
    if kind.endswith("bfloat16"):
        backbone.to(torch.bfloat16)
    return model


def training_step(size: str, kind: str, batch_size: int) -> Callable[[], None]:
    """One step of the paper's objective: mean squared error of masked genes, AdamW."""
    model = make_model(size, kind).train()
    genes, place = SIZES[size][3], device()
    generator = torch.Generator().manual_seed(1)
    values, target = (5 * torch.rand(batch_size, genes, generator=generator) for _ in range(2))
    visible = (torch.rand(batch_size, genes, generator=generator) < 0.5).float()
    timestep = torch.randint(1, 51, (batch_size,), generator=generator)
    features = torch.randn(batch_size, FEATURES, generator=generator)
    arguments = [tensor.to(place) for tensor in (values, visible, timestep, features, torch.arange(1, genes + 1))]
    masked, target = 1 - arguments[1], target.to(place)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-4, fused=not kind.startswith("plain"))

    def step() -> None:
        with torch.autocast(place.type, torch.bfloat16, enabled=kind.endswith("bfloat16")):
            predicted = model(*arguments)
        predicted = predicted if isinstance(predicted, torch.Tensor) else predicted.mean
        (((predicted.float() - target) ** 2 * masked).sum() / masked.sum()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def training_flops(size: str, batch_size: int) -> float:
    """Of the matrix products of a step: forward, and of the backward pass what frozen weights need."""
    width, layers, heads, genes = SIZES[size]
    tokens = batch_size * (genes + 1)
    linear = 2 * 8 * width**2 * tokens * layers
    retention = 4 * width * (width // heads) * tokens * layers
    decoder = 2 * (width**2 + width) * tokens
    encoder = 2 * (BINS**2 + BINS * (width + 1)) * tokens
    modulation = 2 * (6 * layers + 2) * width**2 * batch_size
    return 2 * linear + 3 * retention + 2 * decoder + encoder + 3 * modulation


def linear_share(size: str, batch_size: int, dtype: torch.dtype) -> float:
    """Rate of a layer's four products, at the sizes and layouts they have, of the machine's matrix rate."""
    width, _, _, genes = SIZES[size]
    x = torch.randn(batch_size * (genes + 1), width, device=device()).to(dtype)
    wide, narrow = (torch.randn(factor * width, width, device=device()).to(dtype) for factor in (4, 1))
    uv = torch.randn(2 * width, width, device=device()).to(dtype)

    def products() -> None:
        for weight in (wide, narrow, uv, narrow):
            torch.nn.functional.linear(x, weight)

    products()
    rate = 2 * 8 * width**2 * len(x) / min(timed(products) for _ in range(15))
    return rate / matrix_rate(dtype)


def _peak(size: str, kind: str, batch_size: int, connection) -> None:
    step = training_step(size, kind, batch_size)
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        step()
        step()
        connection.send(torch.cuda.max_memory_allocated() - before)
        return
    before = peak_resident()
    step()
    step()
    connection.send(peak_resident() - before)


def peak_memory(size: str, kind: str, batch_size: int) -> int:
    """Bytes that two training steps need above the model's own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_peak, args=(size, kind, batch_size, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


@app.command()
def train(
    size: Size = "base",
    batch_size: Annotated[int, typer.Option(help="Spots in a step.")] = 32,
    repeats: Annotated[int, typer.Option(help="Rounds.")] = 5,
    output: Output = None,
) -> None:
    """A training step: rate, memory, and how many times as fast as the plain one."""
    kinds = [kind for kind in KINDS if not (kind.startswith("plain") and size in ("80M", "800M", "20k"))]
    seconds = take_turns({kind: training_step(size, kind, batch_size) for kind in kinds}, repeats)
    genes, flops = SIZES[size][3], training_flops(size, batch_size)
    rates = {kind: matrix_rate(torch.bfloat16 if kind.endswith("bfloat16") else torch.float32) for kind in kinds}
    rows = {}
    for kind, own in seconds.items():
        median = statistics.median(own)
        rows[kind] = {
            **summary(own),
            "spots_per_s": batch_size / median,
            "tokens_per_s": batch_size * (genes + 1) / median,
            "tflop_per_s": flops / median / 1e12,
            "share_of_matrix_rate": round(flops / median / rates[kind], 3),
            "peak_memory_mb": round(peak_memory(size, kind, batch_size) / 1e6),
        }
        if kinds[0] in seconds and kind != kinds[0]:
            rows[kind]["times_as_fast_as_" + kinds[0].replace(" ", "_")] = ratio(seconds[kinds[0]], own)
            rows[kind]["memory_of_" + kinds[0].replace(" ", "_")] = round(
                rows[kind]["peak_memory_mb"] / rows[kinds[0]]["peak_memory_mb"], 3
            )
    linear = {
        name: round(linear_share(size, batch_size, dtype), 3)
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    }
    report({"benchmark": "train", "size": size, "rows": rows, "linear_layers_share_of_matrix_rate": linear}, output)


@app.command()
def sample(
    size: Size = "her2st",
    spots: Annotated[int, typer.Option(help="Spots of the slide.")] = 1000,
    draws: Annotated[int, typer.Option(help="Draws of each.")] = 20,
    steps: Annotated[int, typer.Option(help="Reveal steps of hinge.")] = 8,
    plain_spots: Annotated[int, typer.Option(help="Spot-draws of the plain loop, from which all are reckoned.")] = 64,
    repeats: Annotated[int, typer.Option(help="Rounds.")] = 3,
    output: Output = None,
) -> None:
    """A slide's draws: hinge's sampler against 50 full float32 passes a draw."""
    genes, place = SIZES[size][3], device()
    scheduler = MaskedDiffusionScheduler(50, "cosine")
    features = torch.randn(spots, FEATURES, generator=torch.Generator().manual_seed(0)).to(place)
    ids, names = torch.arange(1, genes + 1), [f"spot{number}" for number in range(spots)]
    plain = make_model(size, "plain float32").eval()
    models = {kind: make_model(size, kind).eval() for kind in KINDS[1:]}
    settings = SamplingSettings(num_draws=draws, num_inference_steps=steps, spatially_correlated=False)
    inputs = SlideInputs("slide", names, features.cpu().numpy())

    def fast(kind: str) -> None:
        draw_spots(models[kind], MaskedDiffusionScheduler(50, "cosine"), ids, inputs, settings)

    functions = {kind: (lambda kind=kind: fast(kind)) for kind in models}
    functions["plain float32"] = lambda: plain_draws(
        plain, scheduler, features[:plain_spots], ids.to(place), 1, torch.Generator().manual_seed(0)
    )
    seconds = take_turns(functions, repeats)
    scale = spots * draws / min(plain_spots, spots)
    seconds["plain float32"] = [scale * value for value in seconds["plain float32"]]
    rows = {
        kind: {
            **summary(own),
            "spot_draws_per_s": spots * draws / statistics.median(own),
            "times_as_fast_as_plain": ratio(seconds["plain float32"], own),
        }
        for kind, own in seconds.items()
    }
    setting = {"size": size, "spots": spots, "draws": draws, "steps": steps, "plain_steps": 50}
    report({"benchmark": "sample", **setting, "rows": rows}, output)


@app.command()
def steps(
    run: Annotated[Path, typer.Argument(help="Folder of a trained run.")],
    counts: Annotated[list[int] | None, typer.Option("--steps", help="Step counts.")] = None,
    draws: Annotated[int, typer.Option(help="Draws of each spot.")] = 20,
    output: Output = None,
) -> None:
    """Quality against the number of reveal steps, on a run's test slides."""
    from hinge.data.draws import read_draws
    from hinge.evaluation import prediction_from_draws, score
    from hinge.evaluation.metrics.coexpression import correlation_matrix, matrix_scores
    from hinge.run.run import Run

    opened, rows = Run.open(run), []
    for slide in opened.config.data.test:
        test = opened.spots([slide])
        for number in counts or (1, 2, 4, 8, 16, 25, 50):
            with tempfile.TemporaryDirectory() as folder:
                started = time.perf_counter()
                path = opened.sample(slide, output=Path(folder) / "draws.h5ad", draws=draws, steps=number)
                seconds = time.perf_counter() - started
                prediction = prediction_from_draws(read_draws(path), test)
            scores = score(test.values, prediction)
            pooled = np.nanmean([np.nan_to_num(correlation_matrix(draw)) for draw in prediction.draws], axis=0)
            together = matrix_scores(correlation_matrix(test.values), pooled)
            keys = ("pcc_mean", "pcc_50", "crps", "energy", "variogram", "coexpression_r", "coexpression_rmse")
            rows.append(
                {"slide": slide, "steps": number, "seconds": seconds}
                | {key: float(scores[key]) for key in keys}
                | {"pooled_r": float(together["r"]), "pooled_rmse": float(together["rmse"])}
            )
    report({"benchmark": "steps", "run": run.name, "rows": rows}, output)


@app.command()
def features(
    encoder: Annotated[str, typer.Option(help="As in hinge features.")] = "random:vit_small_patch16_224",
    batch_size: Annotated[int, typer.Option(help="Patches in one forward pass.")] = 32,
    repeats: Annotated[int, typer.Option(help="Rounds.")] = 3,
    output: Output = None,
) -> None:
    """Features of a simulated slide: share of the encoder's bare forward rate."""
    from hinge.data.readers import read_slide
    from hinge.data.simulate import simulate_slides
    from hinge.encoders import extract_features, load_encoder

    loaded = load_encoder(encoder)
    with tempfile.TemporaryDirectory() as folder:
        slide = read_slide(simulate_slides(folder, n_slides=1, grid=(8, 4), n_genes=20)[0])
        patch = np.zeros((batch_size, loaded.patch_px, loaded.patch_px, 3), dtype=np.uint8)
        x = loaded.transform(torch.from_numpy(patch).to(loaded.device))

        @torch.inference_mode()
        def bare(views: int) -> None:
            for _ in range(views * slide.n_obs // batch_size):
                loaded.module(x)

        def whole(views: int) -> None:
            extract_features(slide, loaded, Path(folder) / "f.h5", views=views, batch_size=batch_size, overwrite=True)

        functions = {
            "bare 1": lambda: bare(1),
            "whole 1": lambda: whole(1),
            "bare 8": lambda: bare(8),
            "whole 8": lambda: whole(8),
        }
        seconds = take_turns(functions, repeats)
    rows = {
        f"{views} views": {
            **summary(seconds[f"whole {views}"]),
            "patches_per_s": views * slide.n_obs / statistics.median(seconds[f"whole {views}"]),
            "share_of_bare_forward_rate": ratio(seconds[f"bare {views}"], seconds[f"whole {views}"]),
        }
        for views in (1, 8)
    }
    report({"benchmark": "features", "encoder": encoder, "batch_size": batch_size, "rows": rows}, output)


@app.command()
def load(
    size: Size = "80M",
    genes: Annotated[int, typer.Option(help="Genes in the vocabulary.")] = 27855,
    repeats: Annotated[int, typer.Option(help="Rounds.")] = 3,
    output: Output = None,
) -> None:
    """Loading a backbone from safetensors, in float32 and bfloat16."""
    width, layers, heads, _ = SIZES[size]
    with tempfile.TemporaryDirectory() as folder:
        config = CellFMConfig(num_genes=genes, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads)
        model = CellFMModel(config)
        count = sum(parameter.numel() for parameter in model.parameters())
        model.save_pretrained(folder)
        del model
        functions = {
            name: (lambda dtype=dtype: CellFMModel.from_pretrained(folder, dtype=dtype))
            for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
        }
        seconds = take_turns(functions, repeats)
    rows = {name: {**summary(own), "weights_per_s": count / statistics.median(own)} for name, own in seconds.items()}
    report({"benchmark": "load", "size": size, "weights": count, "rows": rows}, output)


def _sampling_cost(spots: int, genes: int, draws: int, connection) -> None:
    torch.manual_seed(0)
    config = CellFMConfig(
        num_genes=genes, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_value_bins=BINS
    )
    backbone = CellFMModel(config)
    model = HingeModel.from_backbone(backbone, FEATURES, genes, head="point", gene_factors=False).eval()
    backbone.to(torch.bfloat16)
    names = [str(number) for number in range(spots)]
    inputs = SlideInputs("slide", names, torch.randn(spots, FEATURES).numpy())
    before = peak_resident()
    started = time.perf_counter()
    # the same number of tokens in a batch for every panel
    size = max(1, 51200 // genes)
    settings = SamplingSettings(num_draws=draws, batch_size=size, spatially_correlated=False)
    draw_spots(model, MaskedDiffusionScheduler(50, "cosine"), torch.arange(1, genes + 1), inputs, settings)
    seconds = time.perf_counter() - started
    memory = (peak_resident() - before) / 1e6
    connection.send({"spots": spots, "genes": genes, "draws": draws, "seconds": seconds, "peak_memory_mb": memory})


@app.command()
def scale(
    spots: Annotated[list[int] | None, typer.Option(help="Numbers of spots, at 200 genes.")] = None,
    genes: Annotated[list[int] | None, typer.Option(help="Numbers of genes, at 16 spots.")] = None,
    draws: Annotated[int, typer.Option(help="Draws of each spot.")] = 2,
    plot: Annotated[Path | None, typer.Option(help="PNG file.")] = None,
    output: Output = None,
) -> None:
    """Time and memory of sampling as spots and genes grow, each size in its own process."""
    context = multiprocessing.get_context("spawn")
    sizes = [(number, 200) for number in spots or (250, 500, 1000, 2000)]
    sizes += [(16, number) for number in genes or (1000, 2500, 5000, 20000)]
    rows = []
    for number, panel in sizes:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_sampling_cost, args=(number, panel, draws, sender))
        process.start()
        sender.close()
        rows.append(receiver.recv())
        process.join()
    if plot is not None:
        _plot_scale(rows, plot)
    report({"benchmark": "scale", "rows": rows}, output)


def _shared_work(size: str, rank: int, world: int, port: int, spots: int, num_steps: int, sender) -> None:
    """Seconds that this process and the others together take to train and to sample."""
    import os

    from hinge.data.spots import SpotTable
    from hinge.training import TrainingConfig, train_hinge
    from hinge.training.loop import make_accelerator

    torch.set_num_threads(1)
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if world > 1:
        os.environ.update({name: str(value) for name, value in where.items()}, ACCELERATE_USE_CPU="true")
    model, genes = make_model(size, "hinge bfloat16"), SIZES[size][3]
    ids, scheduler = torch.arange(1, genes + 1), MaskedDiffusionScheduler(50, "cosine")
    values = np.random.default_rng(0).random((64, genes), dtype=np.float32)
    table = SpotTable(
        slide=np.repeat("A1", 64),
        barcodes=np.arange(64).astype(str),
        coords=np.zeros((64, 2)),
        features=np.random.default_rng(1).standard_normal((64, 1, FEATURES)).astype(np.float32),
        counts=values,
        library_size=np.ones(64, dtype=np.float32),
        values=values,
        genes=[str(number) for number in ids.tolist()],
        transform="log2p1",
    )
    seconds = {}
    for steps in (1, num_steps):
        config = TrainingConfig(
            epochs=None, steps=steps, batch_size=32, precision="bf16", validation_share=0, checkpoint_every=1000
        )
        accelerator = make_accelerator(config)
        with tempfile.TemporaryDirectory() as folder:
            accelerator.wait_for_everyone()
            started = time.perf_counter()
            train_hinge(model, scheduler, ids, table, config, Path(folder) / "training", accelerator=accelerator)
            accelerator.wait_for_everyone()
            seconds["train"] = time.perf_counter() - started
    for number in (4, spots):
        mine = np.array_split(np.arange(number), world)[rank]
        accelerator.wait_for_everyone()
        started = time.perf_counter()
        inputs = SlideInputs("slide", [str(spot) for spot in mine], table.features[mine % 64, 0])
        draw_spots(model, scheduler, ids, inputs, SamplingSettings(spatially_correlated=False))
        accelerator.wait_for_everyone()
        seconds["sample"] = time.perf_counter() - started
    sender.send(seconds)


@app.command()
def processes(
    size: Size = "her2st",
    spots: Annotated[int, typer.Option(help="Spots that are sampled.")] = 64,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 40,
    repeats: Annotated[int, typer.Option(help="Rounds.")] = 3,
    output: Output = None,
) -> None:
    """How many times as fast two CPU processes of one thread train and sample as one."""
    context = multiprocessing.get_context("spawn")
    seconds: dict[str, dict[int, list[float]]] = {"train": {1: [], 2: []}, "sample": {1: [], 2: []}}
    for _ in range(repeats):
        for world in (1, 2):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            receiver, sender = context.Pipe(duplex=False)
            shared = (world, port, spots, steps, sender)
            started = [context.Process(target=_shared_work, args=(size, rank, *shared)) for rank in range(world)]
            for process in started:
                process.start()
            sender.close()
            results = [receiver.recv() for _ in started]
            for what, rounds in seconds.items():
                rounds[world].append(max(result[what] for result in results))
            for process in started:
                process.join()
    rows = {
        what: {
            "one_s": statistics.median(own[1]),
            "two_s": statistics.median(own[2]),
            "speed_up": ratio(own[1], own[2]),
        }
        for what, own in seconds.items()
    }
    report({"benchmark": "processes", "size": size, "spots": spots, "steps": steps, "rows": rows}, output)


def _plot_scale(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for axis, key, fixed in ((axes[0], "spots", ("genes", 200)), (axes[1], "genes", ("spots", 16))):
        own = [row for row in rows if row[fixed[0]] == fixed[1]]
        axis.plot([row[key] for row in own], [row["seconds"] for row in own], "o-", color="#0072B2", label="time")
        axis.set(xlabel=key, ylabel="seconds", title=f"{fixed[1]} {fixed[0]}")
        memory = axis.twinx()
        memory.plot([row[key] for row in own], [row["peak_memory_mb"] for row in own], "s--", color="#D55E00")
        memory.set(ylabel="peak memory, MB (dashed)", ylim=(0, None))
        axis.set(xlim=(0, None), ylim=(0, None))
    figure.savefig(path, dpi=120)


@app.command()
def rates(
    slide: Annotated[Path, typer.Argument(help="Slide with an image.")],
    encoder: Annotated[str, typer.Option(help="Encoder.")] = "stain-texture+efficientnet-lite0",
    entries: Annotated[int, typer.Option(help="Entries of a file of checksums.")] = 100_000,
    output: Output = None,
) -> None:
    """CPU time of a patch, read and encoded, and of a file more in the checksums of a run: rates for docs/scale.md."""
    from hinge.data import read_slide
    from hinge.data.patches import PatchReader
    from hinge.encoders import load_encoder
    from hinge.utils import checksums

    torch.set_num_threads(1)
    loaded = load_encoder(encoder)
    there = read_slide(slide, require_counts=False, spot_pitch_um=100.0, spot_diameter_um=55.0)
    started = time.process_time()
    patches = np.concatenate([batch for _, batch in PatchReader(there, loaded.patch_um, loaded.patch_px)])
    read, few = (time.process_time() - started) / len(patches), patches[:32]
    loaded.encode(few, None)
    started = time.process_time()
    loaded.encode(few, None)
    encode = (time.process_time() - started) / len(few)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checksums._write(folder, {f"samples/slide{number}.h5ad": ["0" * 64] for number in range(entries)})
        started = time.process_time()
        checksums._write(folder, checksums._read(folder))
        add = time.process_time() - started
    found = {"read a patch": read, "encode a patch": encode, f"add to {entries} checksums": add}
    report({"benchmark": "rates", "CPU seconds": found}, output)


def _timed_features(data: Path, folder: Path, encoder: str):
    """Return the function that extracts a slide's features and gives process, CPU time and time of it."""
    import os

    from hinge.tasks.many_slides import open_features

    torch.set_num_threads(1)
    options = {"image": None, "um_per_px": None, "spot_um": None, "allow": (), "patch_um": None}
    extract = open_features(data, folder, encoder, None, **options)

    def timed(name: str) -> tuple[int, float, float]:
        started = time.perf_counter(), time.process_time()
        extract(name)
        return os.getpid(), time.process_time() - started[1], time.perf_counter() - started[0]

    return timed


@app.command()
def workers(
    slides: Annotated[int, typer.Option(help="Slides.")] = 40,
    side: Annotated[int, typer.Option(help="Spots along a side of a slide.")] = 8,
    encoder: Annotated[str, typer.Option(help="Encoder of their features.")] = "random:vit_small_patch16_224",
    number: Annotated[int, typer.Option(help="Workers.")] = 2,
    output: Output = None,
) -> None:
    """How many times as fast workers of Ray extract the features of small slides as one process does.

    Only the ratio of seconds contains the start of Ray. That of CPU time is what an idle machine gives.
    """
    from hinge.data import simulate_slides
    from hinge.utils.parallel import task_runner
    from hinge.utils.ray_workers import Cluster

    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        simulate_slides(folder / "slides", n_slides=slides, grid=(side, side), n_genes=20)
        names = [f"sim{number}" for number in range(slides)]
        for kind, cluster in (("one process", None), ("workers", Cluster("local", number))):
            open_worker = partial(_timed_features, folder / "slides", folder / kind, encoder)
            started = time.perf_counter()
            with task_runner(cluster) as run:
                done = [outcome.result for outcome in run("slides", {name: name for name in names}, open_worker)]
            seconds = time.perf_counter() - started
            each = {process: [one[1:] for one in done if one[0] == process] for process, *_ in done}
            found[kind] = {
                "seconds": seconds,
                "slides of each": [len(times) for times in each.values()],
                "CPU seconds of each": [sum(cpu for cpu, _ in times) for times in each.values()],
                "seconds at work of each": [sum(wall for _, wall in times) for times in each.values()],
            }
    one, several = found["one process"], found["workers"]
    ratios = {"times as fast": one["seconds"] / several["seconds"]}
    for key in ("seconds at work of each", "CPU seconds of each"):
        ratios[f"times as fast by {key}"] = max(one[key]) / max(several[key])
    report({"benchmark": "workers", **found, **ratios}, output)


if __name__ == "__main__":
    app()
