"""Untrusted files: only our own errors come out, in little time and memory, and nothing in them is run or followed.

What a fuzzer found lies in the folder corpus and is read again here, with some hundred fresh mutations; attacks that
a mutation hardly finds have a test each.
"""

import bz2
import contextlib
import gzip
import json
import lzma
import os
import pickle
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import anndata as ad
import h5py
import numcodecs
import numcodecs.zarr3
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
import yaml
import zarr
from anndata import AnnData
from helpers import ROOT
from helpers.visium import write_visium
from numcodecs.checksum32 import CRC32C
from PIL import Image
from zarr.codecs import BloscCodec, GzipCodec, ZstdCodec

from hinge.backbones.mindspore import read_mindspore
from hinge.backbones.state_files import open_state
from hinge.config import load_config
from hinge.data import SlideImage, read_slide
from hinge.data.draws import draws_of_slide, read_draws, write_draws
from hinge.data.feature_writer import FeatureWriter
from hinge.data.features import read_features
from hinge.encoders import load_encoder
from hinge.encoders.weights import read_checkpoint
from hinge.experiments.grid import load_grid
from hinge.sharing.export import _read_metadata
from hinge.utils.errors import DataError, HingeError, WeightsError
from hinge.utils.files import read_json
from hinge.utils.resumable import ResumableArrays
from hinge.utils.safe_hdf5 import check_hdf5

pytestmark = pytest.mark.full

TRILLION = 10**12
CPU_SECONDS, BYTES = 10.0, 1 << 30


@contextlib.contextmanager
def refused(match: str = "", error: type[HingeError] = HingeError):
    """What is read in the block is refused, within the CPU time and memory that any reader may take."""
    status = Path("/proc/self/status")

    def memory(key: str) -> int:
        return next(int(line.split()[1]) << 10 for line in status.read_text().splitlines() if line.startswith(key))

    if status.exists():
        Path("/proc/self/clear_refs").write_text("5")
    before, started = memory("VmRSS") if status.exists() else 0, time.process_time()
    with pytest.raises(error, match=match):
        yield
    assert time.process_time() - started < CPU_SECONDS
    if status.exists():
        assert memory("VmHWM") - before < BYTES


# --- the fuzzer -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    """Figures of a short run of the fuzzer over the corpus and fresh mutations, in a process of its own."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the fuzzer measures as Linux does")
    output = tmp_path_factory.mktemp("fuzz") / "fuzz.json"
    arguments = [
        "--corpus",
        ROOT / "tests" / "reliability" / "corpus",
        "--inputs",
        "250",
        "--seed",
        "20",
        "--output",
        output,
    ]
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "reliability" / "fuzz.py", *arguments],
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert output.is_file(), done.stderr[-3000:]
    return json.loads(output.read_text())


def test_only_our_own_errors_come_out(fuzzed):
    assert fuzzed["findings"] == []


def test_every_reader_was_fed_and_refused_something(fuzzed):
    kinds = fuzzed["targets"]
    assert len(kinds) >= 35 and all(facts["inputs"] for facts in kinds.values())
    refusals = sum(facts["refused"] for facts in kinds.values())
    assert refusals > 100 and sum(facts["read"] for facts in kinds.values()) > 20


def test_the_corpus_is_small_and_of_known_readers():
    files = [file for file in (ROOT / "tests" / "reliability" / "corpus").rglob("*") if file.is_file()]
    assert files and sum(file.stat().st_size for file in files) < 200_000


# --- nothing is run ---------------------------------------------------------------------------------


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
@pytest.mark.parametrize("read", [open_state, read_checkpoint])
def test_no_pickle_of_a_weight_file_is_run(tmp_path, read, suffix, archive):
    path, sprung = tmp_path / f"w{suffix}", tmp_path / "sprung"
    content = {"model": {"weight": torch.ones(2), "trap": Trap(sprung)}}
    torch.save(content, path, _use_new_zipfile_serialization=archive)
    with refused(r"w\.", WeightsError):
        read(path)
    path.write_bytes(pickle.dumps(content))
    with refused(r"w\.", WeightsError):
        read(path)
    assert not sprung.exists()


def test_no_pickle_of_an_encoders_folder_is_run(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224"}))
    torch.save({"weight": Trap(tmp_path / "sprung")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"weights alone|weights, and"):
        load_encoder(str(tmp_path))
    assert not (tmp_path / "sprung").exists()


def test_no_pickle_of_an_array_is_run(tmp_path):
    parts = ResumableArrays(tmp_path / "x.h5ad", {}, {"values": ((4, 2), np.float32, 0)}, 4, 2)
    parts.prepare()
    np.save(parts.folder / "values.npy", np.array([Trap(tmp_path / "sprung")], dtype=object), allow_pickle=True)
    with refused("damaged", DataError):
        parts.read()
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("read", [load_config, load_grid, _read_metadata])
@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.mkdir ['{}']", "!!python/object/new:os.mkdir ['{}']", "!!python/name:os.mkdir"]
)
def test_no_tag_of_yaml_is_run(tmp_path, read, tag):
    (tmp_path / "x.yaml").write_text("output: " + tag.format(tmp_path / "sprung"))
    with refused("YAML"):
        read(tmp_path / "x.yaml")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("read", [load_config, load_grid, _read_metadata])
def test_aliases_of_yaml_do_not_multiply(tmp_path, read):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 12)]
    (tmp_path / "x.yaml").write_text("\n".join(lines))
    with refused("aliases"):
        read(tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_text("output: &a [*a]")
    with refused("aliases"):
        read(tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_text("output: " + "[" * 3000)
    with refused("YAML"):
        read(tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_text("output: " + "x" * 300_000)
    with refused("bytes"):
        read(tmp_path / "x.yaml")


def test_deep_json(tmp_path):
    (tmp_path / "x.json").write_text("[" * 100_000)
    with refused("not a readable JSON", DataError):
        read_json(tmp_path / "x.json")


# --- nothing is followed ----------------------------------------------------------------------------


@pytest.fixture
def slides(tiny_slide):
    """The h5ad of a valid slide."""
    return tiny_slide


def features_file(path):
    with FeatureWriter(path, ["a", "b"], np.zeros((2, 2)), 1, 3, encoder="e", digest="d", patch_um=1, patch_px=1) as f:
        f.write(np.arange(2), np.ones((2, 1, 3)))
    return path


def ten_x(folder):
    write_visium(folder / "V")
    return folder / "V" / "filtered_feature_bc_matrix.h5"


READERS = {
    "h5ad": (lambda slides, tmp: slides, "X/data", lambda path: read_slide(path)),
    "10x": (lambda slides, tmp: ten_x(tmp), "matrix/data", lambda path: read_slide(path.parent, require_image=False)),
    "features": (lambda slides, tmp: features_file(tmp / "f.h5"), "features", read_features),
}


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("way", ["link", "raw", "virtual", "group", "outside"])
def test_hdf5_does_not_lead_into_other_files(slides, tmp_path, kind, way):
    make, name, read = READERS[kind]
    path = make(slides, tmp_path)
    read(path)
    other = tmp_path / "secret.h5"
    with h5py.File(path) as file:
        values = file[name][:]
    with h5py.File(other, "w") as file:
        file["values"] = values
    (tmp_path / "raw").write_bytes(values.tobytes())
    with h5py.File(path, "r+") as file:
        if way != "outside":
            del file[name]
        if way == "link":
            file[name] = h5py.ExternalLink(str(other), "values")
        elif way == "raw":
            where = [(str(tmp_path / "raw"), 0, values.nbytes)]
            file.create_dataset(name, values.shape, values.dtype, external=where)
        elif way == "virtual":
            layout = h5py.VirtualLayout(values.shape, values.dtype)
            layout[:] = h5py.VirtualSource(str(other), "values", values.shape)
            file.create_virtual_dataset(name, layout)
        elif way == "group":
            file.create_group("sub")["x"] = h5py.ExternalLink(str(other), "/")
            file[name] = h5py.SoftLink("/sub/x/values")
        else:  # a link that nothing asks for
            file["more"] = h5py.ExternalLink("/etc/passwd", "/")
    with refused("must be a dataset in the file itself", DataError):
        read(path)


def draws_with_store(slides, store):
    slide = read_slide(slides)
    values = np.ones((2, slide.n_obs, 3), np.float32)
    path = slides.parent / "run" / "d.h5ad"
    write_draws(
        path, draws_of_slide(values, values[0], slide, list(slide.var_names[:3]), {"draws": 2, "transform": "log2p1"})
    )
    draws = ad.read_h5ad(path)
    draws.uns["hinge"]["draws_store"] = store
    draws.write_h5ad(path)
    return path


@pytest.mark.parametrize("store", ["../elsewhere.zarr", "/tmp/elsewhere.zarr", "sub/../../elsewhere.zarr"])
def test_draws_name_no_store_elsewhere(slides, store):
    path = draws_with_store(slides, store)
    with refused("which is outside", DataError):
        read_draws(path)


def test_a_link_beside_draws_leads_nowhere_else(slides, tmp_path):
    path = draws_with_store(slides, "d.zarr")
    (tmp_path / "secret").mkdir()
    (path.parent / "d.zarr").symlink_to(tmp_path / "secret")
    with refused("which is outside", DataError):
        read_draws(path)


def ome_zarr(folder, paths):
    group = zarr.open_group(folder, mode="w", zarr_format=2)
    group.create_array("0", data=np.full((3, 64, 64), 200, np.uint8), chunks=(3, 64, 64))
    axes = [{"name": name} for name in "cyx"]
    group.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": [{"path": path} for path in paths]}]
    return folder


@pytest.mark.parametrize("name", ["../secret.zarr/0", "{}/secret.zarr/0", "0/../../secret.zarr/0"])
def test_an_image_names_no_array_elsewhere(tmp_path, name):
    ome_zarr(tmp_path / "secret.zarr", ["0"])
    path = ome_zarr(tmp_path / "s.zarr", ["0", name.format(tmp_path)])
    with refused("which is outside", DataError):
        SlideImage(path)
    SlideImage(ome_zarr(tmp_path / "s.zarr", ["0"])).close()


def test_an_index_of_shards_is_not_followed(tmp_path):
    (tmp_path / "weights").mkdir()
    torch.save({"secret": torch.ones(2)}, tmp_path / "secret.bin")
    index = {"weight_map": {"secret": "../secret.bin"}}
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        (tmp_path / "weights" / name).write_text(json.dumps(index))
    for read in (open_state, lambda path: load_encoder(str(path))):
        with refused(error=WeightsError):
            read(tmp_path / "weights")


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc/x", "..", "a\\b"])
def test_a_cohort_names_no_slide_by_a_path(slides, name):
    (slides.parent / "t.csv").write_text(f"slide,image\n{name},tiny.png\n")
    with refused("cannot be the name of a slide", DataError):
        read_slide(slides.parent / "t.csv")


# --- nothing announced is believed ------------------------------------------------------------------


@pytest.mark.parametrize("kind", READERS)
def test_an_hdf5_dataset_of_a_trillion(slides, tmp_path, kind):
    make, name, read = READERS[kind]
    path = make(slides, tmp_path)
    for options in ({"chunks": (1 << 16,)}, {"chunks": (1 << 16,), "compression": "gzip"}, {}):
        with h5py.File(path, "r+") as file:
            del file[name]
            file.create_dataset(name, (TRILLION,), "f4", **options)
        with refused("malicious|compressed twice|readable|shape", DataError):
            read(path)


@pytest.mark.parametrize("kind", READERS)
def test_an_hdf5_dataset_that_unpacks_to_a_thousandfold(slides, tmp_path, kind):
    make, name, read = READERS[kind]
    path = make(slides, tmp_path)
    with h5py.File(path, "r+") as file:
        del file[name]
        zeros = np.zeros(1 << 22, np.float32)
        bomb = file.create_dataset(name, (100 << 22,), "f4", chunks=zeros.shape, compression="gzip", compression_opts=1)
        packed = zlib.compress(zeros.tobytes(), 1)
        for chunk in range(100):
            bomb.id.write_direct_chunk((chunk << 22,), packed)
    assert path.stat().st_size < 16 << 20
    with refused("malicious|compressed twice", DataError):
        read(path)


def test_strings_of_hdf5_that_never_end(slides):
    """A heap whose free space is 0 bytes long: the library walks it for ever."""
    content = bytearray(slides.read_bytes())
    at = content.index(b"GCOL") + 16
    while content[at : at + 2] != b"\0\0":
        at += 16 + -(-struct.unpack("<Q", content[at + 8 : at + 16])[0] // 8) * 8
    content[at + 8 : at + 16] = bytes(8)
    slides.write_bytes(content)
    with refused("heap", DataError):
        read_slide(slides)


def lengths_of_strings(path, name=None):
    """Where the lengths of a file's strings lie: of a dataset, or all outside of it."""
    content = path.read_bytes()
    with h5py.File(path) as file:
        start, size = file["obs/_index"].id.get_offset(), file["obs/_index"].id.get_storage_size()
    found, heap = [], content.find(b"GCOL\x01")
    while heap >= 0:
        at = content.find(struct.pack("<Q", heap))
        while at >= 0:
            found.append(at - 4)
            at = content.find(struct.pack("<Q", heap), at + 1)
        heap = content.find(b"GCOL\x01", heap + 1)
    return [at for at in sorted(found) if (start <= at < start + size) == (name is not None)]


@pytest.mark.parametrize("name", [None, "obs/_index"])
@pytest.mark.parametrize("length", [0xFFFFFFFF, 0x40000000, 129 << 20])
def test_a_string_of_hdf5_of_gigabytes(slides, name, length):
    """The library allocates the stated length before it reads the string."""
    content, places = slides.read_bytes(), lengths_of_strings(slides, name)
    assert len(places) > 5
    for place in (places[0], places[len(places) // 2], places[-1]):
        slides.write_bytes(content[:place] + struct.pack("<I", length) + content[place + 4 :])
        with refused(f"a string declares {length:,} bytes", DataError):
            read_slide(slides)


@pytest.mark.parametrize("libver", ["earliest", "latest"])
@pytest.mark.parametrize("userblock", [0, 512])
def test_every_string_of_an_hdf5_file_is_checked(tmp_path, libver, userblock):
    """Of datasets in one piece, in chunks, as part of rows, and of attributes near and far, also where no heap lies."""
    path, strings = tmp_path / "x.h5", np.array(["a", "bc", "def"], dtype=object)
    text = h5py.string_dtype()
    with h5py.File(path, "w", libver=libver, userblock_size=userblock) as file:
        file["plain"], file["one"] = strings, "alone"
        file.create_dataset("chunks", data=strings, chunks=(2,), compression="gzip", shuffle=True)
        rows = np.dtype([("number", "i4"), ("first", text), ("inner", [("x", "f8"), ("second", text)])])
        file["rows"] = np.array([(1, "one", (0.5, "x")), (2, "two", (1.5, "y"))], rows)
        for number in range(12):  # more than eight are kept elsewhere
            file["plain"].attrs[f"name {number}"] = "value" if number % 2 else strings
        file.create_group("größe").attrs["ßß"] = "s"
    check_hdf5(path)
    content = path.read_bytes()
    heap = content.index(b"GCOL\x01") - userblock
    places, at = [], content.find(struct.pack("<Q", heap))
    while at >= 0:
        places.append(at - 4)
        at = content.find(struct.pack("<Q", heap), at + 1)
    assert len(places) >= 3 + 1 + 4 + 6 + 18 + 1
    for place in places:
        for address in (heap, 0x5555):
            damaged = struct.pack("<IQ", 0xF0000000, address)
            path.write_bytes(content[:place] + damaged + content[place + 12 :])
            with pytest.raises(DataError, match=r"a string declares 4,026,531,840 bytes|checksum"):
                check_hdf5(path)


def test_packed_strings_of_hdf5_of_gigabytes(slides):
    ad.read_h5ad(slides).write_h5ad(slides, compression="gzip")
    read_slide(slides)
    with h5py.File(slides, "r+") as file:
        index = file["obs/_index"]
        mask, packed = index.id.read_direct_chunk((0,))
        content = bytearray(zlib.decompress(packed))
        content[16 * 3 : 16 * 3 + 4] = b"\xff" * 4
        index.id.write_direct_chunk((0,), zlib.compress(content), mask)
    with refused("a string declares 4,294,967,295 bytes", DataError):
        read_slide(slides)


@pytest.mark.parametrize("kind", ["<i4", "<i8", "<f4", "<u1"])
@pytest.mark.parametrize("options", [{}, {"chunks": (64,)}, {"chunks": (64,), "compression": "gzip"}])
def test_numbers_that_look_like_strings_of_hdf5_are_read(slides, kind, options):
    """-1, the address of a heap and 1 in numbers: the same bytes as a string of gigabytes."""
    content = slides.read_bytes()
    heap = content.index(b"GCOL\x01")
    like = np.frombuffer(struct.pack("<qQQ", -1, heap, 1) * 32, kind)
    with h5py.File(slides, "r+") as file:
        file["uns"].create_dataset("like", data=like, **options)
    assert options.get("compression") or slides.read_bytes().count(struct.pack("<iQI", -1, heap, 1)) >= 8
    assert read_slide(slides).n_obs


def test_strings_of_a_large_hdf5_file_are_checked_in_a_moment(tmp_path):
    """Hundreds of heaps and thousands of pieces: in one pass."""
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file["names"] = np.array(["x" * 900 + str(row) for row in range(40_000)], dtype=object)
        file.create_dataset("values", data=np.arange(1_000_000), chunks=(100,))
        file.attrs["kind"] = "much"
    assert path.read_bytes().count(b"GCOL\x01") > 500
    started = time.process_time()
    check_hdf5(path)
    assert time.process_time() - started < CPU_SECONDS


def test_safetensors_of_a_trillion(tmp_path):
    for shape, end in (([TRILLION], 4 * TRILLION), ([TRILLION], 16), ([2**62, 4], 16)):
        head = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()
        (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + bytes(16))
        for read in (open_state, read_checkpoint):
            with refused(r"w\.safetensors", WeightsError):
                read(tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", TRILLION) + b"{}")
    with refused(r"w\.safetensors", WeightsError):
        open_state(tmp_path / "w.safetensors")


def test_mindspore_of_a_trillion(tmp_path):
    dims = b"\x08\x80\xa0\x94\xa5\x8d\x1d"  # 10^12
    tensor = dims + b"\x12\x07Float32" + b"\x1a\x04" + bytes(4)
    value = b"\x0a\x01w" + b"\x12" + bytes([len(tensor)]) + tensor
    (tmp_path / "w.ckpt").write_bytes(b"\x0a" + bytes([len(value)]) + value)
    with refused("1000000000000", WeightsError):
        read_mindspore(tmp_path / "w.ckpt")


@pytest.mark.parametrize("archive", [True, False])
def test_a_tensor_that_repeats_one_number_a_trillion_times(tmp_path, archive):
    torch.save({"w": torch.ones(1).expand(TRILLION)}, tmp_path / "w.pth", _use_new_zipfile_serialization=archive)
    for read in (open_state, read_checkpoint):
        with refused("declares 1,000,000,000,000 numbers", WeightsError):
            read(tmp_path / "w.pth")


def test_a_compressed_archive_of_weights(tmp_path):
    torch.save({"w": torch.zeros(1 << 24)}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "w.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert (tmp_path / "w.pth").stat().st_size < 1 << 17
    for read in (open_state, read_checkpoint):
        with refused("compressed", WeightsError):
            read(tmp_path / "w.pth")


@pytest.mark.parametrize("key", ["num_layers", "hidden_size", "num_genes", "feature_dim"])
def test_a_models_config_of_a_trillion(tmp_path, key):
    from hinge.backbones import CellFMConfig, CellFMModel
    from hinge.models import HingeModel

    size = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_value_bins": 4}
    backbone = CellFMModel(CellFMConfig(num_genes=10, **size))
    backbone.save_pretrained(tmp_path / "backbone")
    HingeModel.from_backbone(backbone, feature_dim=3, num_genes=5).save_pretrained(tmp_path / "model")
    HingeModel.from_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    content = json.loads(path.read_text())
    for number in (TRILLION, 10**6, -1, "many"):
        path.write_text(json.dumps(content | {key: number}))
        with refused("describes no hinge model", WeightsError):
            HingeModel.from_pretrained(tmp_path / "model")
    path.write_text(json.dumps(content))
    path = tmp_path / "backbone" / "config.json"
    content = json.loads(path.read_text())
    for key in ("num_hidden_layers", "hidden_size", "num_genes"):
        for number in (TRILLION, -1, "many"):
            path.write_text(json.dumps(content | {key: number}))
            with refused("backbone", WeightsError):
                CellFMModel.from_pretrained(tmp_path / "backbone")


def png(width, height, data):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_images_of_a_trillion_pixels(tmp_path):
    (tmp_path / "a.png").write_bytes(png(10**6, 10**6, zlib.compress(b"")))
    with refused("1000000 x 1000000 pixels", DataError):
        SlideImage(tmp_path / "a.png")
    import tifffile

    # striped for Pillow, tiled for OpenSlide; the sizes are mended afterwards
    for name, options in (("strips.tif", {"rowsperstrip": 16}), ("tiles.tif", {"tile": (64, 64)})):
        tifffile.imwrite(tmp_path / name, np.zeros((128, 128, 3), np.uint8), photometric="rgb", **options)
        with tifffile.TiffFile(tmp_path / name, mode="r+b") as file:
            for tag in ("ImageWidth", "ImageLength"):
                file.pages[0].tags[tag].overwrite(10**6, dtype="I")
        with refused("pixels|malicious|compressed twice|damaged", DataError):
            SlideImage(tmp_path / name).thumbnail(100)
    with tifffile.TiffFile(tmp_path / "tiles.tif", mode="r+b") as file:
        for tag in ("TileWidth", "TileLength"):
            file.pages[0].tags[tag].overwrite(1 << 19, dtype="I")
    with refused(r"tiles\.tif", DataError):
        SlideImage(tmp_path / "tiles.tif").thumbnail(100)


def test_an_image_that_unpacks_to_a_thousandfold(tmp_path):
    side, packer = 20_000, zlib.compressobj(9)
    row = bytes(1 + 3 * side)
    (tmp_path / "a.png").write_bytes(png(side, side, b"".join([packer.compress(row * side), packer.flush()])))
    assert (tmp_path / "a.png").stat().st_size < 2 << 20
    with refused("malicious|compressed twice", DataError):
        SlideImage(tmp_path / "a.png").thumbnail(100)


def test_ome_zarr_of_a_trillion_pixels(tmp_path):
    path = ome_zarr(tmp_path / "s.zarr", ["0"])
    for where in (path / "0" / ".zarray",):
        content = json.loads(where.read_text())
        where.write_text(json.dumps(content | {"shape": [3, 10**6, 10**6]}))
    with refused("malicious|compressed twice", DataError):
        SlideImage(path)


# codecs of Zarr: as format 2 and 3 have them, and what unpacks to far more than the bytes announced
CODECS = {
    "zstd": (numcodecs.Zstd, ZstdCodec, lambda: zstd_bomb()),
    "blosc": (
        numcodecs.Blosc,
        BloscCodec,
        lambda: struct.pack("<4B3I", 2, 1, 33, 4, 2**31 - 64, 1 << 18, 80) + bytes(64),
    ),
    "gzip": (numcodecs.GZip, GzipCodec, lambda: gzip.compress(bytes(32 << 20)) * 80),
    "zlib": (numcodecs.Zlib, numcodecs.zarr3.Zlib, lambda: zlib.compress(bytes(128 << 20), 1)),
    "lz4": (numcodecs.LZ4, numcodecs.zarr3.LZ4, lambda: struct.pack("<I", 2**31 - 64) + bytes(64)),
    "bz2": (numcodecs.BZ2, numcodecs.zarr3.BZ2, lambda: bz2.compress(bytes(32 << 20)) * 80),
    "lzma": (numcodecs.LZMA, numcodecs.zarr3.LZMA, lambda: lzma.compress(bytes(32 << 20), preset=0) * 80),
}


def zstd_bomb():
    """20,000 blocks, each of them one byte 128 k times; the frame does not state its length."""
    blocks = [struct.pack("<I", (last | 2 | 128 << 13))[:3] + b"\0" for last in [0] * 19_999 + [1]]
    return struct.pack("<IBB", 0xFD2FB528, 0, 56) + b"".join(blocks)


def store_of_draws(slides, format, **options):
    """A table of draws with a store of its own format and codecs, and the file of the store's first chunk."""
    path = draws_with_store(slides, "d.zarr")
    group = zarr.open_group(path.parent / "d.zarr", mode="w", zarr_format=format)
    draws = ad.read_h5ad(path)
    values = np.random.default_rng(0).poisson(2, (*draws.shape, 3)).astype("f4")
    array = group.create_group("obsm").create_array("draws", data=values, chunks=(4, 2, 3), **options)
    chunk = path.parent / "d.zarr" / "obsm" / "draws" / array.metadata.encode_chunk_key((0, 0, 0))
    return path, values, chunk


@pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3")
@pytest.mark.parametrize("format", [2, 3])
@pytest.mark.parametrize("codec", CODECS)
def test_a_chunk_of_zarr_that_unpacks_to_gigabytes(slides, format, codec):
    path, values, chunk = store_of_draws(slides, format, compressors=CODECS[codec][format - 2]())
    draws = read_draws(path)
    np.testing.assert_array_equal(draws.layers["draw_001"], values[..., 1])
    chunk.write_bytes(CODECS[codec][2]())
    assert chunk.stat().st_size < 4 << 20
    with refused("malicious|compressed twice", DataError):
        read_draws(path)


def test_a_chunk_of_zarr_in_a_shard_that_unpacks_to_gigabytes(slides):
    path, values, shard = store_of_draws(slides, 3, shards=(8, 2, 3), compressors=ZstdCodec())
    np.testing.assert_array_equal(read_draws(path).layers["draw_001"], values[..., 1])
    content, bomb = shard.read_bytes(), zstd_bomb()
    index = np.frombuffer(content[-36:-4], "<u8").copy()
    index[2:] = len(content) - 36, len(bomb)
    shard.write_bytes(content[:-36] + bomb + index.tobytes() + bytes(CRC32C(location="end").encode(index))[-4:])
    with refused("malicious|compressed twice", DataError):
        read_draws(path)


@pytest.mark.parametrize("form", ["frames", "stated", "many"])
def test_frames_of_zstd(slides, form):
    path, _, chunk = store_of_draws(slides, 2, compressors=numcodecs.Zstd())
    sound = chunk.read_bytes()
    if form == "frames":  # behind a sound one, and one to be skipped
        chunk.write_bytes(sound + struct.pack("<II", 0x184D2A50, 4) + b"skip" + zstd_bomb())
    elif form == "stated":
        chunk.write_bytes(struct.pack("<IBBQ", 0xFD2FB528, 0xC0, 56, 2**40) + zstd_bomb()[6:])
    else:
        chunk.write_bytes(numcodecs.Zstd().encode(bytes(1 << 20)) * 3000)
    with refused("malicious|compressed twice", DataError):
        read_draws(path)


@pytest.mark.parametrize("filters", [[{"id": "pickle"}], [{"id": "zstd"}]])
def test_chunks_of_zarr_are_packed_once_and_not_pickled(slides, tmp_path, filters):
    path, _, chunk = store_of_draws(slides, 2, compressors=numcodecs.Zstd())
    chunk.write_bytes(numcodecs.Zstd().encode(pickle.dumps(Trap(tmp_path / "sprung"))))
    image = ome_zarr(tmp_path / "s.zarr", ["0"])
    for array in (chunk.parent, image / "0"):
        described = json.loads((array / ".zarray").read_text())
        strings = {"dtype": "|O", "fill_value": "", "filters": [{"id": "vlen-utf8"}, *filters]}
        for change in (strings, {"filters": filters}):
            (array / ".zarray").write_text(json.dumps(described | change))
            with refused("pickle|compressed twice|damaged", DataError):
                read_draws(path) if array == chunk.parent else SlideImage(image)
    assert not (tmp_path / "sprung").exists()


def test_a_chunk_of_an_image_that_unpacks_to_gigabytes(tmp_path):
    path = ome_zarr(tmp_path / "s.zarr", ["0"])
    with SlideImage(path) as image:
        assert image.thumbnail(64).shape == (64, 64, 3)
    (path / "0" / "0.0.0").write_bytes(CODECS["blosc"][2]())
    with SlideImage(path) as image, refused("malicious|compressed twice", DataError):
        image.thumbnail(64)


def test_chunks_of_zarr_behind_a_link_are_not_read(slides, tmp_path):
    path, _, chunk = store_of_draws(slides, 3)
    (chunk.parents[1] / "0").rename(tmp_path / "elsewhere")
    (chunk.parents[1] / "0").symlink_to(tmp_path / "elsewhere")
    with refused("holds links", DataError):
        read_draws(path)


def test_a_chunk_larger_than_its_array(slides):
    path, _, chunk = store_of_draws(slides, 2)
    described = json.loads((chunk.parent / ".zarray").read_text())
    (chunk.parent / ".zarray").write_text(json.dumps(described | {"chunks": [10**6, 10**3, 3]}))
    with refused("has chunks of 12,000,000,000 bytes", DataError):
        read_draws(path)


def test_a_store_of_draws_of_a_trillion(slides):
    path = draws_with_store(slides, "d.zarr")
    group = zarr.open_group(path.parent / "d.zarr", mode="w")
    group.create_group("obsm").create_array("draws", shape=(30, 3, TRILLION), chunks=(30, 3, 1), dtype="float32")
    with refused("malicious|compressed twice", DataError):
        read_draws(path)


def test_a_spatialdata_table_of_a_trillion(tmp_path):
    from anndata.io import write_elem

    table = AnnData(scipy.sparse.csr_matrix(np.ones((4, 2))))
    table.uns["spatialdata_attrs"] = {"region": "r", "region_key": "region", "instance_key": "i"}
    root = zarr.open_group(tmp_path / "s.zarr", mode="w")
    write_elem(root.create_group("tables"), "table", table)
    del root["tables/table/X/data"]
    root["tables/table/X"].create_array("data", shape=(TRILLION,), chunks=(1 << 20,), dtype="float32")
    with refused("malicious|compressed twice", DataError):
        read_slide(tmp_path / "s.zarr")


@pytest.mark.parametrize("format", [2, 3])
@pytest.mark.parametrize("name", ["X/data", "obs/_index"])
def test_a_chunk_of_a_spatialdata_table_that_unpacks_to_gigabytes(tmp_path, format, name):
    from anndata.io import write_elem

    table = AnnData(scipy.sparse.csr_matrix(np.ones((4, 2))))
    table.uns["spatialdata_attrs"] = {"region": "r", "region_key": "region", "instance_key": "i"}
    root = zarr.open_group(tmp_path / "s.zarr", mode="w", zarr_format=format)
    write_elem(root.create_group("tables"), "table", table)
    chunk = tmp_path / "s.zarr" / "tables" / "table" / name / ("0" if format == 2 else "c/0")
    chunk.write_bytes(CODECS["blosc" if format == 2 else "zstd"][2]())
    with refused("malicious|compressed twice", DataError):
        read_slide(tmp_path / "s.zarr")


def test_gzip_that_unpacks_to_a_thousandfold(tmp_path):
    (tmp_path / "ST-cnts").mkdir()
    line = b"1x1" + b"\t0" * 1000 + b"\n"
    head = b"\t" + b"\t".join(b"G%d" % gene for gene in range(1000)) + b"\n"
    packed = gzip.compress(head + line * 200_000, 9)
    assert len(packed) < 2 << 20
    (tmp_path / "ST-cnts" / "A1.tsv.gz").write_bytes(packed)
    with refused("malicious|compressed twice", DataError):
        read_slide(tmp_path, require_image=False)


def test_parquet_of_a_hundred_million_equal_rows(tmp_path):
    write_visium(tmp_path / "V")
    spatial = tmp_path / "V" / "spatial"
    table = pd.read_csv(spatial / "tissue_positions.csv")
    (spatial / "tissue_positions.csv").unlink()
    import pyarrow as pa
    import pyarrow.parquet as pq

    once = pa.Table.from_pandas(table.iloc[[0] * 1_000_000], preserve_index=False)
    with pq.ParquetWriter(spatial / "tissue_positions.parquet", once.schema, compression="zstd") as writer:
        for _ in range(20):
            writer.write_table(once)
    with refused("malicious|compressed twice", DataError):
        read_slide(tmp_path / "V", require_image=False)


def test_sound_files_that_compress_well_are_read(slides, tmp_path):
    """An ordinary sparse slide, stored dense and gzipped."""
    slide = ad.read_h5ad(slides)
    slide.X = np.zeros(slide.shape, np.float32)
    slide.X[:, 0] = 1
    slide.write_h5ad(slides, compression="gzip")
    assert read_slide(slides).X.sum() == slide.n_obs
    Image.new("RGB", (5000, 5000), "white").save(tmp_path / "white.png")
    with SlideImage(tmp_path / "white.png") as image:
        assert image.thumbnail(100).shape == (100, 100, 3)


def test_yaml_with_ordinary_aliases_is_read(tmp_path):
    text = "output: run\ndata: {path: s, train: &t [a, b], test: [c]}\nevaluation: {}\n"
    (tmp_path / "x.yaml").write_text(text)
    assert load_config(tmp_path / "x.yaml").data.train == ["a", "b"]
    terms = yaml.safe_dump({"a": [1, 2], "b": "x"}) + "c: &c {d: 1}\ne: *c\n"
    (tmp_path / "t.yaml").write_text(terms)
    assert _read_metadata(tmp_path / "t.yaml")["e"] == {"d": 1}
