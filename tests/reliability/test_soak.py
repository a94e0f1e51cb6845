"""A long run: what the script finds wrong, and a short one."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT

SCRIPT = ROOT / "benchmarks" / "soak.py"


@pytest.fixture(scope="module")
def soak():
    spec = importlib.util.spec_from_file_location("soak", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rounds(number=40, **growth):
    start = {"rss": 1000.0, "files": 6, "threads": 3, "children": 0}
    return [{k: v + growth.get(k, 0) * i for k, v in start.items()} | {"digest": "a"} for i in range(number)]


def test_what_is_wrong_is_said(soak):
    figures, wrong = soak.verdict(rounds())
    assert not wrong and figures["change"] == 0
    assert soak.verdict(rounds(rss=1))[1] == []  # 2 % in the end
    assert soak.verdict(rounds(rss=5))[1] == ["memory changes by +10.9%"]
    assert soak.verdict(rounds(files=1))[1] == ["files grow from 22 to 45"]
    assert soak.verdict(rounds(children=1))[1] == ["children grow from 16 to 39"]
    assert soak.verdict([*rounds(), {**rounds(1)[0], "digest": "b"}])[1] == ["the draws change from round to round"]
    assert "too few" in soak.verdict(rounds(3))[1][0]


@pytest.mark.slow
def test_short_run(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "--seconds", "90", "--output", str(tmp_path / "soak.jsonl")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    figures = json.loads(done.stdout)
    assert figures["rounds"] == len((tmp_path / "soak.jsonl").read_text().splitlines()) >= 6
