"""Peak memory and steps per second of training from disk, on generated slides that lack genes.

    python benchmarks/training_store.py [--slides 30 300] [--spots 1000] [--features 1536] [--genes 400] [--steps 200]

Every slide measured one of five panels of 60 % of the genes; the backbone is of width 32 with two layers. Each row is a
process of its own. Training from disk includes initialisation and validation, with three penalties of the ridge
regression in place of 29, which changes its time alone; training in memory, for the speed, does not. Steps are counted
by CPU seconds after the initialisation, so that other processes of the machine do not count.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SHARE = 0.6  # of the genes, on a slide
PANELS = 5


def spots_of(number: int, spots: int, features: int, genes: int):
    """Return the spots of a slide on a square lattice; expression follows the features, with a level of the slide."""
    from hinge.data.spots import SpotTable
    from hinge.data.transforms import get_transform

    rng, shared = np.random.default_rng([1, number]), np.random.default_rng(0)
    found = rng.normal(size=(spots, 1, features)).astype(np.float16).astype(np.float32)
    weight = shared.normal(size=(features, genes)) / features**0.5
    # gene g is on the panels g, g + 1 and g + 2 of five
    there = (number - np.arange(genes)) % PANELS < round(SHARE * PANELS)
    rate = np.exp2(1 + found[:, 0] @ weight + rng.normal(size=genes) / 2)
    counts = np.where(there, rng.poisson(rate), 0).astype(np.float32)
    side = int(np.ceil(spots**0.5))
    size = np.maximum(counts.sum(axis=1) / SHARE, 1).astype(np.float32)
    return SpotTable(
        slide=np.full(spots, f"slide{number}"),
        barcodes=np.array([f"spot{each}" for each in range(spots)]),
        coords=np.stack([np.arange(spots) % side, np.arange(spots) // side], axis=1) * 100.0,
        features=found,
        counts=counts,
        library_size=size,
        values=get_transform("log2p1").forward(counts, size),
        genes=[f"G{each}" for each in range(genes)],
        transform="log2p1",
        measured={f"slide{number}": there},
    )


def train(arguments: argparse.Namespace, slides: int, store: bool) -> None:
    """Train in this process; print its peak memory in MB and its steps per CPU second."""
    from hinge.utils.threads import prepare_cpu

    prepare_cpu()  # as every command does, before torch is imported
    import torch

    import hinge.evaluation.ridge as ridge
    import hinge.training.loop as loop
    from hinge.backbones import CellFMConfig, CellFMModel
    from hinge.data.spot_store import SpotStore
    from hinge.data.spots import concatenate_spots
    from hinge.diffusion import MaskedDiffusionScheduler
    from hinge.models import HingeModel
    from hinge.training import TrainingConfig, train_hinge

    ridge.PENALTIES = ridge.PENALTIES[::14]
    times, write = [], loop.TrainingLog.write

    def timed(log: loop.TrainingLog, record: dict) -> None:
        times.append(time.process_time())
        write(log, record)

    loop.TrainingLog.write = timed
    shape = (arguments.spots, arguments.features, arguments.genes)
    if store:
        names, genes = [f"slide{number}" for number in range(slides)], [f"G{each}" for each in range(arguments.genes)]
        spots = SpotStore(arguments.folder / "store", names, genes, "log2p1")
    else:
        spots = concatenate_spots([spots_of(number, *shape) for number in range(slides)])
    torch.manual_seed(0)
    backbone = CellFMModel(
        CellFMConfig(num_genes=arguments.genes, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    )
    config = TrainingConfig(
        epochs=None,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        initialisation=store,
        validation_share=0.1 if store else 0.0,
        checkpoint_every=arguments.steps,
        evaluate_every=arguments.steps,
    )
    model = HingeModel.from_backbone(backbone, arguments.features, arguments.genes)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as output:
        scheduler = MaskedDiffusionScheduler()
        train_hinge(model, scheduler, torch.arange(1, arguments.genes + 1), spots, config, output)
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) / 1024
    # the first steps make buffers, and the last one writes a checkpoint
    steps = np.diff(times[len(times) // 10 : -1])
    print(f"{peak:.0f} {len(steps) / steps.sum():.3f}")


def main() -> None:
    """Write the slides, train on them, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("spots", 1000), ("features", 1536), ("genes", 400), ("steps", 200), ("batch-size", 32)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--slides", type=int, nargs="+", default=[30, 300])
    parser.add_argument("--folder", type=Path, help="where the store is written; a temporary folder by default")
    parser.add_argument("--train", nargs=2, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        train(arguments, arguments.train[0], store=bool(arguments.train[1]))
        return
    from hinge.data.spot_store import write_slide

    with tempfile.TemporaryDirectory() as temporary:
        arguments.folder = arguments.folder or Path(temporary)
        started = time.process_time()
        for number in range(max(arguments.slides)):
            slide = spots_of(number, arguments.spots, arguments.features, arguments.genes)
            if not (arguments.folder / "store" / f"slide{number}").exists():
                write_slide(arguments.folder / "store", slide, made_from="generated")
        written = sum(file.stat().st_size for file in (arguments.folder / "store").rglob("*") if file.is_file())
        print(f"store: {written / 1e6:.0f} MB, generated and written in {time.process_time() - started:.0f} CPU s")
        few = min(arguments.slides)
        _, in_memory = _child(arguments, few, store=False)
        print("| slides | spots from | peak memory, MB | steps per CPU second |\n| --- | --- | --- | --- |")
        print(f"| {few} | memory | | {in_memory:.2f} |", flush=True)
        peaks = []
        for slides in sorted(arguments.slides):
            peak, steps = _child(arguments, slides, store=True)
            peaks.append(peak)
            print(f"| {slides} | disk | {peak:.0f} | {steps:.2f} ({100 * steps / in_memory:.0f} %) |", flush=True)
        print(f"peak with {max(arguments.slides)} slides: {peaks[-1] / peaks[0]:.3f} of that with {few}")


def _child(arguments: argparse.Namespace, slides: int, store: bool) -> tuple[float, float]:
    """Train in a process of its own; return peak memory in MB and steps per CPU second."""
    sizes = ("spots", "features", "genes", "steps", "batch_size", "folder")
    options = [part for name in sizes for part in (f"--{name.replace('_', '-')}", str(getattr(arguments, name)))]
    chosen = [str(slides), str(int(store))]
    command = [sys.executable, __file__, *options, "--train", *chosen]
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE)
    peak, steps = done.stdout.split()[-2:]
    return float(peak), float(steps)


if __name__ == "__main__":
    main()
