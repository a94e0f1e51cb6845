"""Train, sample, evaluate and report again and again in one process: does it grow?

    python benchmarks/soak.py --seconds 3600 --output soak.jsonl

Each round is a new run on the same small simulated tissue, in a folder that is deleted afterwards. After each,
one line goes to the output: resident memory (after the garbage collector), open files, threads, child processes. At the
end, memory in the last third of the rounds (without the first ones, in which libraries load and caches fill) is
compared with the first third. Exit code 1: it differs by more than 5 %, something stays open, or the last round's
draws are not those of the first.
"""

import argparse
import gc
import json
import logging
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

from hinge.utils.threads import prepare_cpu

prepare_cpu()

import numpy as np  # noqa: E402
import psutil  # noqa: E402

from hinge.config import check_config  # noqa: E402
from hinge.data import simulate_slides  # noqa: E402
from hinge.data.draws import read_draws  # noqa: E402
from hinge.report import report_run  # noqa: E402
from hinge.run.run import Run  # noqa: E402
from hinge.utils.files import arrays_digest  # noqa: E402

WARM_UP_SHARE = 0.15
LARGEST_CHANGE = 0.05


def settings(slides: Path, output: Path) -> dict:
    """Return the settings of a run whose stages take a few seconds."""
    return {
        "output": str(output),
        "data": {"path": str(slides), "train": ["sim0", "sim1"], "test": ["sim2"], "pretrain": ["sim10"]},
        "panel": {"genes": 20},
        "backbone": {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "pretrain": {"steps": 5, "batch_size": 16},
        },
        "training": {"epochs": None, "steps": 5, "batch_size": 16},
        "sampling": {"draws": 3, "steps": 4},
        "evaluation": {"bootstrap": 20, "baselines": ["mean", "ridge-cv", "knn", "gaussian-diffusion"]},
    }


def play_round(slides: Path, folder: Path) -> str:
    """Return the digest of the draws of one run, whose folder is deleted afterwards."""
    run = Run(check_config(settings(slides, folder), "the soak's configuration"))
    run.train()
    run.sample("sim2")
    run.evaluate()
    report_run(run)
    draws = read_draws(run.paths.samples("sim2"))
    digest = arrays_digest({name: np.asarray(layer) for name, layer in draws.layers.items()})
    shutil.rmtree(folder)
    return digest


def measure(process: psutil.Process) -> dict[str, int]:
    """Return the resources that the process holds; memory in bytes."""
    gc.collect()
    return {
        "rss": process.memory_info().rss,
        "files": process.num_fds(),
        "threads": process.num_threads(),
        "children": len(process.children(recursive=True)),
    }


def verdict(rounds: list[dict]) -> tuple[dict[str, float], list[str]]:
    """Figures over the rounds, and what is wrong with them.

    Parameters
    ----------
    rounds
        As `measure` gives them, with `digest`.
    """
    kept = rounds[max(2, round(WARM_UP_SHARE * len(rounds))) :]
    third = len(kept) // 3
    if third < 1:
        return {}, [f"{len(rounds)} rounds are too few for a conclusion"]
    first, last = kept[:third], kept[-third:]
    before, after = (float(np.mean([line["rss"] for line in part])) for part in (first, last))
    figures = {"rounds": len(rounds), "rss_first_third": before, "rss_last_third": after, "change": after / before - 1}
    wrong = []
    if abs(figures["change"]) > LARGEST_CHANGE:
        wrong.append(f"memory changes by {figures['change']:+.1%}")
    for key in ("files", "threads", "children"):
        figures[f"{key}_first_third"], figures[f"{key}_last_third"] = (
            max(r[key] for r in part) for part in (first, last)
        )
        if figures[f"{key}_last_third"] > figures[f"{key}_first_third"]:
            wrong.append(f"{key} grow from {figures[f'{key}_first_third']} to {figures[f'{key}_last_third']}")
    if len({line["digest"] for line in rounds}) > 1:
        wrong.append("the draws change from round to round")
    return figures, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--output", type=Path, default=Path("soak.jsonl"))
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    process, rounds, started = psutil.Process(), [], time.monotonic()
    arguments.output.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        slides = Path(scratch) / "slides"
        simulate_slides(slides, n_slides=3, grid=(6, 6), n_genes=40, um_per_px=2.0)
        simulate_slides(slides, n_slides=1, grid=(6, 6), n_genes=40, um_per_px=2.0, first=10, with_image=False)
        while time.monotonic() - started < arguments.seconds:
            digest = play_round(slides, Path(scratch) / "run")
            rounds.append({"seconds": round(time.monotonic() - started, 1), **measure(process), "digest": digest})
            with arguments.output.open("a") as file:
                file.write(json.dumps(rounds[-1]) + "\n")
    figures, wrong = verdict(rounds)
    print(json.dumps(figures, indent=1))
    for sentence in wrong:
        print("soak:", sentence, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
