"""The benchmark of training from disk runs, at a small size."""

import contextlib
import importlib.util
import io
import sys

import pytest
from helpers import ROOT


@pytest.mark.full
def test_the_benchmark_prints_peaks_and_speeds(tmp_path, monkeypatch, capsys):
    from hinge.evaluation import ridge
    from hinge.training import loop

    path = ROOT / "benchmarks" / "training_store.py"
    spec = importlib.util.spec_from_file_location("training_store", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # the benchmark replaces them in a process of its own: put back afterwards
    monkeypatch.setattr(ridge, "PENALTIES", ridge.PENALTIES)
    monkeypatch.setattr(loop.TrainingLog, "write", loop.TrainingLog.write)

    def in_this_process(arguments, slides, store):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            module.train(arguments, slides, store)
        peak, steps = printed.getvalue().split()
        return float(peak), float(steps)

    monkeypatch.setattr(module, "_child", in_this_process)
    sizes = {"spots": 60, "features": 12, "genes": 20, "steps": 12, "batch-size": 8, "folder": tmp_path}
    options = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["training_store.py", "--slides", "3", "5", *options])
    module.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1:3] for line in lines[3:6]] == [[" 3 ", " memory "], [" 3 ", " disk "], [" 5 ", " disk "]]
    assert lines[6].startswith("peak with 5 slides:")
