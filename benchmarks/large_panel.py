"""Peak memory and time of training and sampling on panels of thousands of genes.

    python benchmarks/large_panel.py [--genes 2000 6000 18000] [--spots 50] [--draws 2]

Each panel is a process of its own: simulated tissue, a backbone of width 64 with 4 layers that is pre-trained for a few
steps, training on 512 genes a step, draws of a slide.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def peak_gb() -> float:
    """Return the largest memory that this process had so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def measure(folder: Path, genes: int, draws: int) -> None:
    """Train and sample in this process and print a row of the table."""
    from hinge.utils.threads import prepare_cpu

    prepare_cpu()  # as every command does
    from hinge.config import check_config
    from hinge.run.run import Run

    config = {
        "output": str(folder / "run"),
        "data": {"path": str(folder / "slides"), "train": ["sim0", "sim1"], "test": ["sim2"]},
        "panel": {"method": "union", "genes": genes},
        "features": {"encoder": "stain-texture"},
        "backbone": {"pretrain": {"steps": 5, "genes_per_step": 512}},
        "training": {"epochs": None, "steps": 20, "batch_size": 16, "genes_per_step": 512},
        "sampling": {"draws": draws, "steps": 8},
    }
    run, started = Run(check_config(config, "config")), time.perf_counter()
    run.train()
    trained, seconds = peak_gb(), time.perf_counter() - started
    started = time.perf_counter()
    run.sample("sim2")
    sampled = time.perf_counter() - started
    row = (f"{len(run.panel().genes):,}", f"{trained:.2f}", f"{seconds:.0f}", f"{peak_gb():.2f}", f"{sampled:.0f}")
    print(f"| {' | '.join(row)} |", flush=True)


def main() -> None:
    """Print a table of peak memory and time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--genes", type=int, nargs="+", default=[2000, 6000, 18000])
    parser.add_argument("--spots", type=int, default=50)
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        measure(arguments.folder, arguments.genes[0], arguments.draws)
        return
    print("| genes | peak of training, GB | seconds | peak with sampling, GB | seconds of sampling |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    for genes in arguments.genes:
        with tempfile.TemporaryDirectory() as folder:
            simulate = (
                "import sys; from hinge.data import simulate_slides; "
                "simulate_slides(sys.argv[1], n_slides=3, grid=(int(sys.argv[2]) // 10, 10), n_genes=int(sys.argv[3]))"
            )
            # more genes than the panel has: some have no count
            more = str(genes * 5 // 4)
            subprocess.run([sys.executable, "-c", simulate, f"{folder}/slides", str(arguments.spots), more], check=True)
            command = [sys.executable, __file__, "--folder", folder, "--genes", str(genes)]
            subprocess.run([*command, "--draws", str(arguments.draws)], check=True)


if __name__ == "__main__":
    main()
