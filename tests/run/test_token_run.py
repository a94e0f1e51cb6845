"""A run with condition tokens, from a table of slides."""

import json

import numpy as np
import pytest
from helpers.runs import finish, tiny_settings

from hinge.config import check_config
from hinge.data.draws import read_draws
from hinge.run.run import Run
from hinge.utils.errors import ConfigError


@pytest.mark.full
def test_categories_come_from_the_table_of_slides_or_the_caller(tiny_slides, tmp_path, call_cli):
    rows = ["slide,counts,image,organ,Technology"]
    for name, organ, technology in (
        ("sim0", "breast", "ST"),
        ("sim1", "lung", "ST"),
        ("sim2", "lung", "CosMx"),  # a technology that training did not have
        ("sim10", "breast", ""),
        ("sim11", "", "ST"),
    ):
        image = f"{tiny_slides / name}.jpg" if name in ("sim0", "sim1", "sim2") else ""
        rows.append(f"{name},{tiny_slides / name}.h5ad,{image},{organ},{technology}")
    (tmp_path / "table.csv").write_text("\n".join(rows))
    settings = tiny_settings(tiny_slides, tmp_path / "run", condition={"tokens": ["organ", "technology"]})
    settings["data"]["path"] = str(tmp_path / "table.csv")
    settings["evaluation"] = {"baselines": ["mean", "ridge-cv"], "bootstrap": 0}
    run = Run(check_config(settings, "config"))
    finish(run)
    opened = Run.open(run.folder)
    assert opened.tokens.shares == {"organ": {"breast": 0.5, "lung": 0.5}, "technology": {"ST": 1.0}}
    drawn = read_draws(run.paths.samples("sim2"))
    assert drawn.uns["hinge"]["condition"] == "organ=lung, technology=unknown"
    assert {row["method"] for row in json.loads(run.paths.scores.read_text())["rows"]} >= {"hinge", "ridge-cv"}

    other = opened.sample("sim2", output=tmp_path / "breast.h5ad", condition={"organ": "breast"})
    assert read_draws(other).uns["hinge"]["condition"] == "organ=breast, technology=unknown"
    assert not np.allclose(read_draws(other).X, drawn.X)
    # Python, the command and the run draw the same
    pipe = opened.pipeline()
    slide, features = opened.slide("sim2"), opened.features(opened.slide("sim2"))
    same = pipe(slide, features=features, condition={"organ": "breast"}, progress=False)
    np.testing.assert_array_equal(same.X, read_draws(other).X)
    output = tmp_path / "command.h5ad"
    called = call_cli("sample", run.folder, "--slide", "sim2", "--condition", "organ=breast", "-o", output)
    assert called.code == 0, called.err
    np.testing.assert_array_equal(read_draws(output).X, same.X)
    with pytest.raises(ConfigError, match="the training slides have breast, lung"):
        opened.sample("sim2", output=tmp_path / "x.h5ad", condition={"organ": "skin"})
    assert not (tmp_path / "x.h5ad").exists()
