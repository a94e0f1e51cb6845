"""`hinge check DATA --run RUN`: is a slide like those that a run was trained on?"""

import json

import numpy as np
import pytest
from PIL import Image

from hinge.data.checks.novelty import check_novelty
from hinge.data.draws import read_draws


def test_many_novel_spots_are_a_warning():
    assert list(check_novelty(np.array([0.5] * 91 + [2.0] * 9))) == []
    (finding,) = check_novelty(np.array([0.5] * 80 + [2.0] * 20))
    assert finding.level == "warning" and finding.code == "features-novel" and finding.message.startswith("20% of the")


def test_a_slide_is_compared_with_the_training_slides(copied_tiny_run, call_cli, tmp_path):
    folder, slides = copied_tiny_run.folder, copied_tiny_run.config.data.path
    done = call_cli("check", slides, "--sample", "sim2", "--run", folder, "--json", tmp_path / "found.json")
    assert done.code == 0 and ", novelty " in done.out
    (own,) = json.loads((tmp_path / "found.json").read_text())["slides"]
    draws = read_draws(copied_tiny_run.paths.samples("sim2"))
    assert own["novelty"] == pytest.approx(np.median(draws.obs["novelty"]), rel=1e-4)

    slide = copied_tiny_run.slide("sim2")
    copy = tmp_path / "other" / "strange.h5ad"
    copy.parent.mkdir()
    pixels = np.asarray(Image.open(slide.uns["hinge"]["image_path"]).convert("RGB")).copy()
    # the same tissue in another stain, half of it
    pixels[:, : pixels.shape[1] // 2] = pixels[:, : pixels.shape[1] // 2, ::-1] // 2 + 90
    Image.fromarray(pixels).save(copy.with_suffix(".png"))
    slide = slide.copy()
    for key in ("image_path", "name"):
        slide.uns["hinge"].pop(key, None)
    slide.uns.pop("spatial", None)
    slide.write_h5ad(copy)
    done = call_cli("check", copy.parent, "--run", folder, "--json", tmp_path / "found.json")
    (other,) = json.loads((tmp_path / "found.json").read_text())["slides"]
    assert other["novel"] > own["novel"]
    assert done.code == 0 and "[features-novel]" in done.out


def test_what_does_not_go_together(copied_tiny_run, call_cli, tmp_path):
    folder, slides = copied_tiny_run.folder, copied_tiny_run.config.data.path
    for arguments, told in (
        ((folder, "--run", folder), "name a data set"),
        ((slides, "--run", folder, "--panel", folder / "panel.json"), "leave out --panel"),
        ((slides, "--run", tmp_path), "tmp"),
    ):
        done = call_cli("check", *arguments)
        assert done.code == 2 and told in done.err, done.err
