"""The comparison of two commits: correctness at tiny size, never speed."""

import json
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT

pytestmark = pytest.mark.full


@pytest.fixture
def repository(tmp_path):
    """A repository of two commits whose benchmark takes no time, or none of the second fails."""
    folder = tmp_path / "repository"
    (folder / "benchmarks").mkdir(parents=True)
    shutil.copy(ROOT / "benchmarks" / "compare_commits.py", folder / "benchmarks")

    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)

    git("init", "-q")
    for commit in ("one", "two"):
        (folder / "package.py").write_text(f"NAME = {commit!r}")
        (folder / "benchmarks" / "benchmark.py").write_text(
            "import sys, package\nopen(sys.argv[1], 'a').write(package.NAME + ' ')\nsys.exit(len(sys.argv) > 2)"
        )
        git("add", "-A")
        git("commit", "-qm", commit)
    return folder


def run(repository, *arguments):
    command = [sys.executable, "benchmarks/compare_commits.py", "HEAD~1", "HEAD", *map(str, arguments)]
    return subprocess.run(command, cwd=repository, capture_output=True, text=True)


def test_each_round_runs_the_package_of_both_commits(repository, tmp_path):
    log, output = tmp_path / "log", tmp_path / "out.json"
    # at a limit of 0 the later commit is always slower
    done = run(repository, "--rounds", 3, "--limit", 0, "-o", output, "--", log)
    assert done.returncode == 1, done.stderr
    assert log.read_text().split() == ["two", "one", "one", "two", "two", "one"]
    result = json.loads(output.read_text())
    seconds, ratio = result["cpu_seconds"], result["ratio"]
    ratios = sorted(new / old for old, new in zip(seconds["before"], seconds["after"], strict=True))
    assert (ratio["min"], ratio["median"], ratio["max"]) == tuple(ratios) and ratios[0] > 0
    assert "| 3 rounds |" in done.stdout
    worktrees = subprocess.run(["git", "worktree", "list"], cwd=repository, capture_output=True, text=True).stdout
    assert len(worktrees.splitlines()) == 1
    assert run(repository, "--rounds", 1, "--limit", 1e9, "--", log).returncode == 0


def test_a_benchmark_that_fails_is_named(repository, tmp_path):
    done = run(repository, "--rounds", 1, "--", tmp_path / "log", "further")
    assert done.returncode == 1 and "the benchmark failed with after" in done.stderr
