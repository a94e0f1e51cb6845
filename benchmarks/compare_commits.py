"""Is one commit slower than another? The same benchmark of both, in turns, in one run.

    python benchmarks/compare_commits.py main HEAD -- train --size quick
    python benchmarks/compare_commits.py v0.1 HEAD --rounds 7 -- sample --size quick --spots 50 --draws 4

What follows `--` is a command of `benchmarks/benchmark.py` of the second commit, which is run with the package of each
commit. Each round runs both, in changing order; a round's ratio is that of the two CPU times of the processes, their
start included, which a busy machine changes less than seconds. The table has the median ratio, the smallest and the
largest. Exit code 1 where even the smallest is above --limit.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parent.parent


def git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True).stdout


def cpu_seconds(package: Path, benchmark: Path, arguments: list[str]) -> float:
    """CPU time of one run of the benchmark with the package in a folder."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"PYTHONPATH": str(package)}
    command = [sys.executable, str(benchmark / "benchmarks" / "benchmark.py"), *arguments]
    done = subprocess.run(command, env=environment, cwd=package, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the benchmark failed with {package.name}: {done.stderr.strip().splitlines()[-1:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def compare(before: str, after: str, arguments: list[str], rounds: int) -> dict:
    """Return the CPU times of both commits, and the ratio after / before of each round."""
    seconds: dict[str, list[float]] = {"before": [], "after": []}
    commits = {"before": git("rev-parse", before).strip(), "after": git("rev-parse", after).strip()}
    with tempfile.TemporaryDirectory() as folder:
        trees = {name: Path(folder) / name for name in commits}
        try:
            for name, commit in commits.items():
                git("worktree", "add", "--detach", "--force", str(trees[name]), commit)
            for number in range(rounds):
                for name in list(trees) if number % 2 else list(trees)[::-1]:
                    seconds[name].append(cpu_seconds(trees[name], trees["after"], arguments))
        finally:
            for tree in trees.values():
                if tree.exists():
                    git("worktree", "remove", "--force", str(tree))
    ratios = [new / old for old, new in zip(seconds["before"], seconds["after"], strict=True)]
    return {
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "benchmark": arguments,
        "commits": commits,
        "cpu_seconds": seconds,
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
    }


def main(
    before: Annotated[str, typer.Argument(help="A commit.")],
    after: Annotated[str, typer.Argument(help="A later one.")],
    benchmark: Annotated[list[str], typer.Argument(help="Command of benchmark.py with its options, after --.")],
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each.")] = 5,
    limit: Annotated[float, typer.Option(help="Ratio from which on the later commit is slower.")] = 1.1,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file.")] = None,
) -> None:
    """Compare the speed of two commits."""
    result = compare(before, after, benchmark, rounds)
    if output is not None:
        output.write_text(json.dumps(result, indent=2) + "\n")
    ratio = result["ratio"]
    print(f"| {' '.join(benchmark)} | CPU seconds before | after | ratio | smallest | largest |")
    print("| --- | --- | --- | --- | --- | --- |")
    columns = [f"{statistics.median(values):.2f}" for values in result["cpu_seconds"].values()]
    columns += [f"{ratio[key]:.3f}" for key in ("median", "min", "max")]
    print(f"| {rounds} rounds | {' | '.join(columns)} |")
    if ratio["min"] > limit:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
