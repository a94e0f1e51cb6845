"""Commands that start many stages or many runs."""

from pathlib import Path
from typing import Annotated

import typer

from hinge.cli.console import print_scores
from hinge.cli.options import Overrides, Ray, Seed, Workers, as_cluster
from hinge.utils.errors import HingeError


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for slides and results.")] = Path("hinge-demo"),
    seed: Seed = 0,
) -> None:
    """Simulate tissue, train on it, sample a held-out slide, score and report: no download, minutes on a CPU.

    Example: hinge demo --output hinge-demo
    """
    from hinge.experiments.demo import run_demo

    opened = run_demo(output, seed)
    print_scores(opened.paths.scores)
    print(f"report: {opened.paths.report}")


def ablate(
    grid: Annotated[Path, typer.Argument(metavar="GRID", help="YAML file of a grid.", show_default=False)],
    output: Annotated[
        Path, typer.Argument(metavar="OUTPUT", help="Folder for its runs and tables.", show_default=False)
    ],
    overrides: Overrides = None,
    ray: Ray = None,
    workers: Workers = None,
) -> None:
    """Run named variants of a configuration, over held-out slides and seeds, and write their table.

    Example: hinge ablate configs/ablations/weights.yaml runs/weights --ray
    """
    from hinge.experiments.ablation import ablate as run_ablation
    from hinge.experiments.grid import load_grid

    cluster = as_cluster(ray, workers)
    tables = run_ablation(load_grid(grid), output, overrides or [], cluster)
    print(tables.markdown.read_text())
    print(f"table: {tables.csv}")
    if tables.failures:
        first = tables.failures[0]
        raise HingeError(f"{len(tables.failures)} runs are missing; the first is {first.name}: {first.message}")
