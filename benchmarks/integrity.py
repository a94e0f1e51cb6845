"""Measure which share of each stage's time goes into checksums, flushing to the disk, and checks for finite numbers.

    hinge demo --output demo
    python benchmarks/integrity.py demo/run

The stages of a finished run are repeated in a copy. Time is taken inside the functions that check and around the whole
command, which other load on the machine changes alike: seconds of CPU time, which load does not change, and seconds by
the clock, which include the wait for the disk.
"""

import argparse
import contextlib
import functools
import importlib
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

CHECKS = {
    "checksums": (("hinge.utils.checksums", "record"), ("hinge.utils.checksums", "verified")),
    "flushing": (("hinge.utils.files", "_flush"), ("hinge.utils.files", "_flush_one")),
    "finite numbers": (
        ("hinge.utils.weights", "check_weights"),
        ("hinge.data.feature_writer", "FeatureWriter.checked"),
    ),
}
STAGES = {
    "features": (("features",), "features {slides} --sample sim0 --encoder stain-texture --output {run}/../features"),
    "training": (("model", "training"), "train --config {run}/config.yaml"),
    "draws": (("samples",), "sample {run}"),
    "evaluation": (("scores", "baselines"), "evaluate {run}"),
    "report": ((), "report {run}"),
    "export": ((), "export {run} --format zarr"),
}


def now() -> np.ndarray:
    """Return the seconds of CPU time and by the clock."""
    return np.array([time.process_time(), time.perf_counter()])


class Clock:
    """Seconds inside functions, counted once where one calls another."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.seconds, self.inside = {kind: np.zeros(2) for kind in CHECKS}, 0

    def wrap(self, kind: str, function):
        @functools.wraps(function)
        def timed(*arguments, **options):
            self.inside += 1
            began = now()
            try:
                return function(*arguments, **options)
            finally:
                self.inside -= 1
                if not self.inside:
                    self.seconds[kind] += now() - began

        return timed


def instrument(clock: Clock) -> None:
    """Replace the functions of `CHECKS`, also where a module has imported them by name."""
    from hinge.cli import app  # noqa: F401

    for kind, places in CHECKS.items():
        for module_name, name in places:
            owner = importlib.import_module(module_name)
            *outer, name = name.split(".")
            for part in outer:
                owner = getattr(owner, part)
            before = getattr(owner, name)
            after = clock.wrap(kind, before)
            setattr(owner, name, after)
            for module in list(sys.modules.values()):
                if getattr(module, "__name__", "").startswith("hinge") and getattr(module, name, None) is before:
                    setattr(module, name, after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    for module in (
        "run.training",
        "run.sampling",
        "run.evaluation",
        "report",
        "sharing.export",
        "encoders",
        "run.baselines",
    ):
        importlib.import_module(f"hinge.{module}")
    from hinge.cli.app import main as hinge
    from hinge.config import load_config

    clock = Clock()
    instrument(clock)
    print("share of CPU time / share of the time by the clock")
    print(f"{'stage':12s} {'CPU s':>8s}", *(f"{kind:>18s}" for kind in (*CHECKS, "together")), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        run = Path(temporary) / "run"
        slides = load_config(given.run / "config.yaml", trained=True).data.path
        for stage, (removed, command) in STAGES.items():
            shares = []
            for _ in range(given.repeats):
                shutil.rmtree(run, ignore_errors=True)
                shutil.rmtree(run.parent / "features", ignore_errors=True)
                shutil.copytree(given.run, run)
                for name in removed:
                    shutil.rmtree(run / name, ignore_errors=True)
                settings = (run / "config.yaml").read_text()
                (run / "config.yaml").write_text(settings.replace(str(given.run.resolve()), str(run)))
                hinge_checksums = importlib.import_module("hinge.utils.checksums")
                if (run / hinge_checksums.NAME).exists():
                    hinge_checksums.accept(run)
                clock.start()
                sys.argv = ["hinge", *command.format(run=run, slides=slides).split()]
                began = now()
                with contextlib.suppress(SystemExit), contextlib.redirect_stdout(None):
                    hinge()
                whole = now() - began
                each = [clock.seconds[kind] / whole for kind in CHECKS]
                shares.append([whole, *each, sum(each)])
            middle = np.median(np.array(shares), axis=0)
            told = (f"{cpu:.2%} / {clock_time:.2%}" for cpu, clock_time in middle[1:])
            print(f"{stage:12s} {middle[0, 0]:8.2f}", *(f"{text:>18s}" for text in told), flush=True)


if __name__ == "__main__":
    main()
