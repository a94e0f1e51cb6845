"""The framework of the checks: codes and their page, levels, what commands do with findings."""

import json
import re

import numpy as np
import pytest
from helpers import ROOT
from helpers.sections import make_section, write_h5ad, write_outs, write_tiff

import hinge
from hinge.data.checks import CODES, Context, check_slide, stop_on_errors
from hinge.data.checks.findings import Finding
from hinge.data.readers import build_slide
from hinge.utils.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def section():
    return make_section()


def test_the_page_has_a_row_and_a_section_for_each_code():
    page = (ROOT / "docs" / "reference" / "findings.md").read_text()
    rows = re.findall(r"^\| \[([\w-]+)\]\(#([\w-]+)\) \| .* \| (.*) \|$", page, re.MULTILINE)
    assert [(row[0], row[2].replace("`", "")) for row in rows] == list(CODES.items())
    assert all(row[0] == row[1] for row in rows)
    assert re.findall(r"^## (.*)$", page, re.MULTILINE) == list(CODES)


def test_an_unknown_code_is_refused():
    with pytest.raises(ValueError, match="no code"):
        Finding("error", "nonsense", "", "")
    with pytest.raises(
        ConfigError, match="--allow takes the code of a finding, not 'nonsense': one of slide-unreadable,"
    ):
        stop_on_errors(None, [], ["nonsense"])


def test_errors_stop_and_allowed_ones_are_told_once(section, tmp_path, caplog):
    write_outs(section, tmp_path)
    write_tiff(tmp_path / "image.tif", section.pixels[::-1, ::-1])
    slide = build_slide(tmp_path)
    findings = check_slide(slide)
    with pytest.raises(DataError, match=r"\[image-orientation\].*--allow image-orientation goes on regardless"):
        stop_on_errors(slide, findings)
    caplog.clear()
    for _ in range(2):
        stop_on_errors(slide, findings, ["image-orientation"])
    assert caplog.text.count("[image-orientation]") == 1


def test_an_adata_of_ones_own(section, tmp_path):
    slide = hinge.read_slide(write_h5ad(section, tmp_path))
    assert hinge.check_slide(slide) == []
    slide.obsm["spatial"][0] = np.nan
    (finding,) = hinge.check_slide(slide)
    assert finding.code == "slide-unreadable" and "coordinates are not finite" in finding.message


def test_what_slides_are_checked_for(section, tmp_path):
    slide = build_slide(write_h5ad(section, tmp_path))
    assert [each.code for each in check_slide(slide, Context(target_um_per_px=0.25))] == ["image-coarse"]
    (lacking,) = check_slide(slide, Context(panel=["ERBB2", "NONE1", "NONE2"]))
    assert lacking.code == "genes-panel" and "lacks 2 of the panel's 3 genes: NONE1, NONE2" in lacking.message
    mouse = ["Erbb2", "Krt5", "Krt8", "Epcam", "Cd3d", "Cd3e", "Col1a1", "Col1a2", "Actb", "Gapdh", "Vim", "Esr1"]
    (other,) = check_slide(slide, Context(panel=mouse))
    assert (other.level, other.code) == ("error", "genes-species") and "the panel is of mouse" in other.message


def test_the_command(section, tmp_path, call_cli):
    write_outs(section, tmp_path / "good")
    write_outs(section, tmp_path / "bad")
    write_tiff(tmp_path / "bad" / "image.tif", section.pixels[:, ::-1])
    done = call_cli("check", tmp_path, "--json", tmp_path / "check.json", "--html", tmp_path / "check.html")
    assert done.code == 2
    good = "human, Visium, 1 µm per pixel (the distance between spots), pitch 100 µm, 100% of spots on tissue"
    assert good in done.out and "error: image.tif fits Space Ranger's thumbnail mirrored left to right" in done.out
    slides = json.loads((tmp_path / "check.json").read_text())["slides"]
    assert [slide["slide"] for slide in slides] == ["bad", "good"] and slides[1]["findings"] == []
    assert slides[1]["spots"] == section.on_tissue.sum() and slides[1]["um_per_px_from"] == "the distance between spots"
    page = (tmp_path / "check.html").read_text()
    assert page.count("<img") == 2 and "image-orientation" in page and "no findings" in page
    allowed = ("--allow", "image-orientation", "--allow", "spots-on-glass")
    assert call_cli("check", tmp_path, *allowed).code == 0
    assert call_cli("check", tmp_path, "--sample", "good").code == 0
    assert call_cli("check", tmp_path, "--allow", "nonsense").code == 2


def test_features_check_first(section, tmp_path, call_cli):
    write_outs(section, tmp_path / "S")
    write_tiff(tmp_path / "S" / "image.tif", section.pixels[::-1])
    command = ("features", tmp_path / "S", "-o", tmp_path / "features", "--encoder", "stain-texture")
    refused = call_cli(*command)
    assert refused.code == 2 and "[image-orientation]" in refused.err and not list(tmp_path.glob("features/*.h5"))
    done = call_cli(*command, "--allow", "image-orientation", "--allow", "spots-on-glass")
    assert done.code == 0 and "mirrored top to bottom" in done.err and list(tmp_path.glob("features/*.h5"))
