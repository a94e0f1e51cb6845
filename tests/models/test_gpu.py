"""What differs on GPUs: the benchmark that checks it runs anywhere, and a GPU's passes where there is one."""

import json
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

from hinge.models.subset import GeneSubset
from hinge.utils.cuda_graphs import GraphedFunction

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.full
def test_the_benchmark_runs_at_tiny_sizes(tmp_path):
    """Every part but the compiled one, which needs a C++ compiler."""
    output = tmp_path / "gpu.json"
    arguments = ["--tiny", "--parts", "checks,sampling,features,training", "--sizes", "default,scgpt", "-o", output]
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(output.read_text())
    assert all(row["ok"] for row in result["checks"]) and len(result["checks"]) == 7
    assert [row["case"] for row in result["rows"] if "error" in row] == []
    assert {row["part"] for row in result["rows"]} == {"sampling", "features", "training"}


def test_a_subset_rounded_up_hides_the_genes_that_it_adds():
    present = torch.zeros(3, 20)
    present[0, :3] = present[1, 5:10] = present[2, ::3] = 1
    exact, rounded = GeneSubset.of(present), GeneSubset.of(present, 8)
    assert exact.index.shape == (3, 7) and rounded.index.shape == (3, 8)
    for subset in (exact, rounded):
        rebuilt = subset.scatter(subset.present, torch.zeros(3, 20))
        assert torch.equal(rebuilt, present)
    # as many tokens as genes are all genes in their order, of which some are hidden
    every = GeneSubset.of(present, 16 + 4)
    assert every.index is None and torch.equal(every.present, present)
    assert GeneSubset.of(torch.ones(2, 20), 16) is None


def test_without_a_gpu_a_function_is_called_as_it_is():
    calls = []

    def function(x, y):
        calls.append(y)
        return x + 1

    graphed = GraphedFunction(function)
    with torch.inference_mode():
        assert [float(graphed(torch.tensor(float(value)), None)) for value in range(3)] == [1, 2, 3]
    assert calls == [None] * 3


@needs_gpu
def test_a_graph_computes_what_the_function_computes():
    weight = torch.randn(8, 8, device="cuda")
    graphed = GraphedFunction(lambda x, mask: (x @ weight).relu() if mask is None else (x @ weight) * mask)
    with torch.inference_mode():
        for seed in range(4):
            torch.manual_seed(seed)
            for rows in (3, 5):
                x, mask = torch.randn(rows, 8, device="cuda"), torch.rand(rows, 8, device="cuda")
                assert torch.equal(graphed(x, None), (x @ weight).relu())
                assert torch.equal(graphed(x, mask), (x @ weight) * mask)
