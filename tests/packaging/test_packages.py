"""The distribution: its name and version, and what is said where an optional package is missing."""

import sys
from importlib import metadata

import numpy as np
import pytest
import tifffile
from helpers import ROOT
from helpers.visium import write_visium_hd

import hinge
from hinge.data import SlideImage, read_slide
from hinge.utils.errors import ConfigError
from hinge.utils.packages import require

# module: its extra
OPTIONAL = {
    "igraph": "cluster",
    "imagecodecs": "ome-tiff",
    "lightly": "pretrain",
    "peft": "lora",
    "pyarrow": "visium-hd",
    "spatialdata": "spatialdata",
}


def test_version_is_that_of_the_distribution():
    assert hinge.__version__ == metadata.version("hinge-histology")
    assert (ROOT / "hinge" / "py.typed").is_file()


@pytest.mark.parametrize(("module", "extra"), OPTIONAL.items())
def test_missing_package_is_named_with_its_extra(module, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError) as raised:
        require(module, extra, "the work")
    assert str(raised.value) == f'the work needs the package {module}: pip install "hinge-histology[{extra}]"'
    requirements = metadata.requires("hinge-histology")
    assert any(line.startswith(module) and f"extra == '{extra}'" in line for line in requirements)
    assert not any(line.startswith(module) and "extra" not in line for line in requirements)


def test_compressed_ome_tiff_needs_an_extra(tmp_path, monkeypatch):
    pytest.importorskip("imagecodecs")
    path = tmp_path / "slide.ome.tif"
    tifffile.imwrite(path, np.full((64, 64, 3), 200, np.uint8), tile=(32, 32), compression="lzw", photometric="rgb")
    with SlideImage(path) as image:
        assert image.read_pixels(0, 0, 2, 2).tolist() == np.full((2, 2, 3), 200).tolist()
    refusal = ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")

    def no_codec(*arguments, **settings):
        raise refusal

    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    monkeypatch.setattr(tifffile.TIFF.DECOMPRESSORS.__class__, "__getitem__", no_codec)
    with pytest.raises(ConfigError, match=r'hinge-histology\[ome-tiff\]"'), SlideImage(path) as image:
        image.read_pixels(0, 0, 2, 2)


def test_positions_of_visium_hd_need_an_extra(tmp_path, monkeypatch):
    write_visium_hd(tmp_path / "hd" / "outs")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match=r'hinge-histology\[visium-hd\]"'):
        read_slide(tmp_path, "hd_square_016um")
