"""Workers of a Ray cluster: killed in the middle, and on commands that share slides, cells and folds."""

import csv
import importlib.util
import os
import shutil
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
import yaml
from helpers import ROOT
from helpers.ray_tasks import open_noted, open_nothing, open_unreliable
from helpers.runs import tiny_settings

from hinge.data import simulate_slides
from hinge.tasks.many_slides import open_sampling
from hinge.utils.errors import DataError
from hinge.utils.files import file_digest
from hinge.utils.parallel import each_slide
from hinge.utils.ray_workers import TRIES, Cluster

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason='needs ray: pip install -e ".[ray]"'),
]

CLUSTER = """
import sys
from hinge.utils.parallel import task_runner
from hinge.utils.ray_workers import Cluster

with task_runner(Cluster("local", 2)):
    import ray

    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def cluster():
    """A cluster of this machine, for two workers; it ends when its process does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        # as in this process: other threads sum in another order
        patch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
        # as a cluster of a command sets them; ray reads them when it is imported
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", "0" * 64)
        process = subprocess.Popen(
            [sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        address = process.stdout.readline().strip()
        if not address:
            alone = [sys.executable, "-c", "import ray; ray.init(num_cpus=2, include_dashboard=False)"]
            if subprocess.run(alone, capture_output=True).returncode:
                pytest.skip("Ray does not start on this machine, with or without hinge")
        assert address, "the cluster did not start"
        yield process, Cluster(address, 2)
        process.stdin.close()
        process.wait(60)


def test_killed_workers_and_a_plain_loop_give_the_same_draws(cluster, tiny_run, tmp_path):
    simulate_slides(tmp_path / "slides", n_slides=5, grid=(4, 5), n_genes=40, um_per_px=2.0, first=20)
    slides = [str(path) for path in sorted((tmp_path / "slides").glob("*.h5ad"))]
    plain, shared = (shutil.copytree(tiny_run.folder, tmp_path / name) for name in ("plain", "shared"))
    options = {"image": None, "um_per_px": None, "spot_um": None, "batch_size": 6, "seed": 3}
    assert len(dict(each_slide(slides, partial(open_sampling, plain, **options), plain / "samples"))) == 5

    opened = partial(open_noted, partial(open_sampling, shared, **options), tmp_path, "sim22.h5ad")
    written = dict(each_slide(slides, opened, shared / "samples", cluster[1]))
    assert sorted(written) == slides
    done = [line.split() for line in (tmp_path / "done").read_text().splitlines()]
    assert Counter(name for name, _ in done) == dict.fromkeys(slides, 1)
    assert (tmp_path / "killed").read_text() not in {process for name, process in done if name.endswith("sim22.h5ad")}
    for [path] in written.values():
        assert path.read_bytes() == (plain / "samples" / path.name).read_bytes()
    left = {path.name for path in (shared / "samples").iterdir()}
    assert left == {"catalogue.parquet", *(path.name for path in (plain / "samples").iterdir())}

    before = {path: path.stat().st_mtime_ns for [path] in written.values()}
    again = dict(each_slide(slides, partial(open_sampling, shared, **options), shared / "samples", cluster[1]))
    assert {path: path.stat().st_mtime_ns for [path] in again.values()} == before  # finished slides are skipped


def test_failures_and_an_address(cluster, tiny_slides, tmp_path, caplog, call_cli):
    process, workers = cluster
    done = []
    with pytest.raises(DataError) as raised:
        for name, _ in each_slide(["a", "damaged", "deadly", "b", "bug", "c"], open_unreliable, tmp_path, workers):
            done.append(name)
    assert sorted(done) == ["a", "b", "c"]
    text = str(raised.value)
    assert text.startswith("3 of 6 slides failed, the others are done: ") and "damaged (the slide is damaged)" in text
    assert "deadly (its worker was lost" in text and f"bug (ZeroDivisionError: a bug; {TRIES} workers tried)" in text
    with pytest.raises(DataError, match="there is no model; run hinge train first"):
        list(each_slide(["a"], open_nothing, tmp_path, workers))

    # cells of a grid and folds, on the command line
    base = tiny_settings(tiny_slides, Path("never"), training__steps=2, evaluation={"baselines": [], "bootstrap": 0})
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    variants = {"a": {}, "bad": {"features.encoder": "no_such_encoder"}, "b": {"training.steps": 3}}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump({"base": "base.yaml", "variants": variants}))
    ray = ["--ray", workers.address, "--workers", "2"]
    result = call_cli("ablate", tmp_path / "grid.yaml", tmp_path / "shared", *ray)
    assert result.code == 2 and "1 runs are missing; the first is bad/sim2/seed0" in result.err
    call_cli("ablate", tmp_path / "grid.yaml", tmp_path / "plain")
    rows = [list(csv.DictReader((tmp_path / name / "table.csv").open())) for name in ("shared", "plain")]
    scores = [[{key: row[key] for key in row if "seconds" not in key} for row in table] for table in rows]
    assert scores[0] == scores[1] and {row["variant"] for row in scores[0]} == {"a", "b"}
    tune = ["finetune-encoder", tiny_slides, "--encoder", "stain-texture", "--tune", "linear", "--epochs", "1"]
    tune += ["--genes", "8", "--sample", "sim0", "--sample", "sim1", "--sample", "sim2", "--output"]
    for name, more in (("tuned", []), ("tuned on workers", ray)):
        result = call_cli(*tune, tmp_path / name, *more)
        assert result.code == 0, result.err
    scores = [(tmp_path / name / "scores.json").read_bytes() for name in ("tuned", "tuned on workers")]
    assert scores[0] == scores[1]

    # a cluster of this machine is reached from this machine alone
    processes = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    listening = {
        connection.laddr.ip.removeprefix("::ffff:")
        for connection in psutil.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN and connection.pid in processes
    }
    assert listening <= {"127.0.0.1", "::1"}


def test_features_on_a_cluster_of_the_command(cluster, tiny_slides, tmp_path, call_cli):
    features = ["features", tiny_slides, "--encoder", "stain-texture"]
    for name in ("sim0", "sim1", "sim2"):
        features += ["--sample", name]
    result = call_cli(*features, "--output", tmp_path / "shared", "--ray", "--workers", "2")
    assert result.code == 0, result.err
    assert sorted(result.out.splitlines()) == [
        f"features: {path}" for path in sorted((tmp_path / "shared").glob("*.h5"))
    ]
    assert "slides: 3 done, 0 failed" in result.err
    assert call_cli(*features, "--output", tmp_path / "plain").code == 0
    catalogue = pd.read_parquet(tmp_path / "shared" / "catalogue.parquet")
    assert list(catalogue["slide"]) == ["sim0", "sim1", "sim2"]
    for path, digest in zip(catalogue["path"], catalogue["sha256"], strict=True):
        assert file_digest(tmp_path / "shared" / path) == digest
    for path in (tmp_path / "plain").iterdir():
        assert path.read_bytes() == (tmp_path / "shared" / path.name).read_bytes()
