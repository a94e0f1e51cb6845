"""Measure which share of each stage's time goes into checksums, flushing to the disk, and checks for finite numbers.

    hinge demo --output demo
    python benchmarks/integrity.py demo/run

The stages of a finished run are repeated in a copy. Time is taken inside the functions that check, so that other load
on the machine changes both sides alike.
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


class Clock:
    """Seconds inside functions, counted once where one calls another."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(CHECKS, 0.0)
        self.inside = 0

    def wrap(self, kind: str, function):
        @functools.wraps(function)
        def timed(*arguments, **options):
            self.inside += 1
            began = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.inside -= 1
                if not self.inside:
                    self.seconds[kind] += time.perf_counter() - began

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
    print(f"{'stage':12s} {'s':>8s}", *(f"{kind:>16s}" for kind in CHECKS), f"{'together':>9s}")
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
                clock.seconds = dict.fromkeys(CHECKS, 0.0)
                sys.argv = ["hinge", *command.format(run=run, slides=slides).split()]
                began = time.perf_counter()
                with contextlib.suppress(SystemExit), contextlib.redirect_stdout(None):
                    hinge()
                whole = time.perf_counter() - began
                shares.append((whole, *(clock.seconds[kind] / whole for kind in CHECKS)))
            middle = [sorted(column)[len(column) // 2] for column in zip(*shares, strict=True)]
            print(
                f"{stage:12s} {middle[0]:8.2f}", *(f"{share:16.2%}" for share in middle[1:]), f"{sum(middle[1:]):9.2%}"
            )


if __name__ == "__main__":
    main()
