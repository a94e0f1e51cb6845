"""Feed every reader with damaged and hostile files, and count what comes out.

    python tests/reliability/fuzz.py --inputs 10000 --seed 0 --output fuzz.json
    python tests/reliability/fuzz.py --corpus tests/reliability/corpus

A small valid file or folder of each kind is made on the spot, one file in it is mutated (bytes of any file; nodes of
JSON and YAML, cells of tables, what is inside gzip, the checked parts of PNG, safetensors and zip, where HDF5 says that
strings lie), and the reader is called on it in a forked child. It may succeed or raise a `HingeError`, within
`MOST_SECONDS` of CPU time and `MOST_BYTES` of memory beyond what the child began with. Anything else is a finding:
another exception, a crash, a hang.

An input is a pure function of reader, seed and number: `--only READER --seed S --first N --inputs 1 --keep FOLDER`
makes it again and keeps it. What was found lies in the folder corpus as the files that differ from the valid ones.
"""

import argparse
import contextlib
import dataclasses
import gzip
import io
import json
import math
import os
import random
import re
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse
import tifffile
import torch
import yaml
import zarr
from anndata import AnnData
from PIL import Image
from safetensors.torch import save_file

from hinge.backbones import CellFMConfig, CellFMModel
from hinge.backbones.hgnc import GeneNames
from hinge.backbones.mindspore import read_mindspore
from hinge.backbones.published_cellfm import export_cellfm
from hinge.backbones.state_files import open_state
from hinge.backbones.vocabulary import GeneVocabulary
from hinge.config import check_config, load_config, save_config
from hinge.data import SlideImage, read_slide
from hinge.data.draws import draws_of_slide, read_draws, write_draws
from hinge.data.feature_writer import FeatureWriter
from hinge.data.features import read_feature_header, read_features, read_features_at
from hinge.data.hest_download import read_sample_table, select_samples
from hinge.data.observed import read_observed
from hinge.data.panel import Panel, read_panel
from hinge.data.patches import PatchReader
from hinge.data.writers import write_draws_zarr
from hinge.encoders import load_encoder
from hinge.encoders.weights import read_checkpoint
from hinge.evaluation.metrics.gene_sets import read_gene_sets
from hinge.evaluation.predictions import PredictionFiles, read_prediction
from hinge.experiments.grid import load_grid
from hinge.models import HingeModel
from hinge.run.genes import GeneMatcher
from hinge.run.run import Run
from hinge.sharing.export import _read_metadata
from hinge.tasks.folds import slide_groups
from hinge.tasks.labels import read_labels
from hinge.training.checkpoints import read_tensors, write_tensors
from hinge.utils.errors import HingeError
from hinge.utils.files import read_json, write_json

MOST_SECONDS = 10.0  # of CPU time
MOST_BYTES = 1 << 30
HANG_SECONDS = 60.0  # of CPU time
STUCK_SECONDS = 900.0  # of the clock, for one that waits: other processes may have the cores
BATCH = 40  # inputs a child is given

SPOTS, GENES = 12, 6
SIDE = 240  # of images, px
UM_PER_PX = 2.5


# --- valid files ------------------------------------------------------------------------------------


def counts() -> np.ndarray:
    """Counts (SPOTS, GENES) of a slide."""
    return np.random.default_rng(0).poisson(3, (SPOTS, GENES)).astype(np.float32)


def places() -> np.ndarray:
    """Pixel x, y (SPOTS, 2): a grid of 40 px."""
    y, x = (grid.ravel() for grid in np.mgrid[:4, :3])
    return np.stack([x, y], axis=1) * 40.0 + 60


def barcodes() -> list[str]:
    return [f"{x:.0f}x{y:.0f}" for x, y in (places() - 60) / 40]


def genes() -> list[str]:
    return [f"GENE{number}" for number in range(GENES)]


def pixels() -> np.ndarray:
    """Tissue-like RGB (SIDE, SIDE, 3)."""
    noise = np.random.default_rng(1).normal(0, 9, (SIDE, SIDE, 3))
    return (np.array([200, 130, 190]) + noise).clip(0, 255).astype(np.uint8)


def slide() -> AnnData:
    made = AnnData(scipy.sparse.csr_matrix(counts()))
    made.obs_names, made.var_names = barcodes(), genes()
    made.obs["total_counts"] = counts().sum(axis=1)
    made.obsm["spatial"] = places()
    made.uns["hinge"] = {"um_per_px": UM_PER_PX, "spot_pitch_um": 100.0, "spot_diameter_um": 55.0}
    return made


def write_image(path: Path, **options: Any) -> None:
    Image.fromarray(pixels()).save(path, **options)


def make_h5ad(folder: Path) -> None:
    slide().write_h5ad(folder / "s.h5ad")
    write_image(folder / "s.jpg")


def make_dense_h5ad(folder: Path) -> None:
    made = slide()
    made.X = counts()
    made.obs["patient"] = pd.Categorical(["a", "b"] * (SPOTS // 2))
    made.write_h5ad(folder / "s.h5ad", compression="gzip")
    write_image(folder / "s.jpg")


def make_visium(folder: Path, kind: str = "csv") -> None:
    outs = folder / "V" / "outs"
    (outs / "spatial").mkdir(parents=True)
    names, rows, columns = [], *(grid.ravel() for grid in np.mgrid[:4, :6])
    kept = (rows + columns) % 2 == 0
    rows, columns = rows[kept], columns[kept]
    names = [f"ACGT{number:04d}-1" for number in range(SPOTS)]
    table = pd.DataFrame({"barcode": names, "in_tissue": 1, "array_row": rows, "array_col": columns})
    table["pxl_row_in_fullres"] = (60 + rows * 20 * math.sqrt(3)).astype(int)
    table["pxl_col_in_fullres"] = (60 + columns * 20).astype(int)
    if kind == "parquet":
        table.to_parquet(outs / "spatial" / "tissue_positions.parquet")
    else:
        table.to_csv(outs / "spatial" / "tissue_positions.csv", index=False)
    matrix = scipy.sparse.csr_matrix(counts()).astype("i4")
    if kind == "mtx":
        inner = outs / "filtered_feature_bc_matrix"
        inner.mkdir()
        entries = matrix.T.tocoo()
        lines = [f"{r + 1} {c + 1} {v}" for r, c, v in zip(entries.row, entries.col, entries.data, strict=True)]
        head = f"%%MatrixMarket matrix coordinate integer general\n{GENES} {SPOTS} {entries.nnz}\n"
        for name, text in (
            ("matrix.mtx", head + "\n".join(lines) + "\n"),
            ("barcodes.tsv", "\n".join(names) + "\n"),
            ("features.tsv", "".join(f"ENSG{i:011d}\t{gene}\tGene Expression\n" for i, gene in enumerate(genes()))),
        ):
            (inner / f"{name}.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    else:
        with h5py.File(outs / "filtered_feature_bc_matrix.h5", "w") as file:
            group = file.create_group("matrix")
            group["barcodes"] = np.array(names, dtype="S")
            group["data"], group["indices"], group["indptr"] = matrix.data, matrix.indices, matrix.indptr
            group["shape"] = np.array([GENES, SPOTS], dtype="i4")
            features = group.create_group("features")
            features["id"] = np.array([f"ENSG{i:011d}" for i in range(GENES)], dtype="S")
            features["name"] = np.array(genes(), dtype="S")
            features["feature_type"] = np.array(["Gene Expression"] * GENES, dtype="S")
            features["genome"] = np.array(["GRCh38"] * GENES, dtype="S")
            features["_all_tag_keys"] = np.array(["genome"], dtype="S")
    scales = {"tissue_hires_scalef": 0.5, "tissue_lowres_scalef": 0.25, "spot_diameter_fullres": 26.0}
    (outs / "spatial" / "scalefactors_json.json").write_text(json.dumps(scales))
    small = Image.fromarray(pixels())
    small.resize((SIDE // 2, SIDE // 2)).save(outs / "spatial" / "tissue_hires_image.png")
    small.resize((SIDE // 4, SIDE // 4)).save(outs / "spatial" / "tissue_lowres_image.png")


def make_her2st(folder: Path) -> None:
    for name in ("ST-cnts", "ST-spotfiles", "ST-imgs/A/A1"):
        (folder / name).mkdir(parents=True)
    table = pd.DataFrame(counts().astype(int), index=barcodes(), columns=genes())
    text = table.to_csv(sep="\t").encode()
    (folder / "ST-cnts" / "A1.tsv.gz").write_bytes(gzip.compress(text, mtime=0))
    array = (places() - 60) / 40
    spots = pd.DataFrame({"x": array[:, 0], "y": array[:, 1], "new_x": array[:, 0], "new_y": array[:, 1]})
    spots["pixel_x"], spots["pixel_y"], spots["selected"] = places()[:, 0], places()[:, 1], 1
    spots.to_csv(folder / "ST-spotfiles" / "A1_selection.tsv", sep="\t", index=False)
    write_image(folder / "ST-imgs" / "A" / "A1" / "HE_A1.jpg")


def make_hest(folder: Path) -> None:
    for name in ("st", "wsis", "metadata"):
        (folder / name).mkdir()
    slide().write_h5ad(folder / "st" / "T1.h5ad")
    tifffile.imwrite(folder / "wsis" / "T1.tif", pixels(), tile=(128, 128), photometric="rgb", compression="jpeg")
    facts = {"pixel_size_um_estimated": UM_PER_PX, "inter_spot_dist": 100.0, "spot_diameter": 55.0, "id": "T1"}
    write_json(folder / "metadata" / "T1.json", facts)


def make_spatialdata(folder: Path) -> None:
    import spatialdata
    from spatialdata.models import Image2DModel, ShapesModel, TableModel

    made = slide()
    made.uns.clear()
    made.obs["region"] = pd.Categorical(["spots"] * SPOTS)
    made.obs["location_id"] = np.arange(SPOTS)
    spatialdata.SpatialData(
        images={"he": Image2DModel.parse(pixels().transpose(2, 0, 1), dims=("c", "y", "x"))},
        shapes={"spots": ShapesModel.parse(places(), geometry=0, radius=11.0)},
        tables={"table": TableModel.parse(made, region="spots", region_key="region", instance_key="location_id")},
    ).write(folder / "s.zarr")


def make_cohort(folder: Path) -> None:
    make_h5ad(folder)
    rows = "slide,image,counts,sample,um_per_px,patient,split,condition\n"
    rows += "P1,s.jpg,s.h5ad,,,1,train,tumour\nP2,s.jpg,,,2.5,2,test,tumour\n"
    (folder / "table.csv").write_text(rows)


def make_features(folder: Path) -> None:
    facts = {"encoder": "stain-texture", "digest": "ab" * 32, "patch_um": 112.0, "patch_px": 224}
    with FeatureWriter(folder / "f.h5", barcodes(), places(), 2, 8, **facts) as writer:
        writer.write(np.arange(SPOTS), np.random.default_rng(0).normal(size=(SPOTS, 2, 8)))


def make_trident(folder: Path) -> None:
    with h5py.File(folder / "f.h5", "w") as file:
        file.create_dataset("features", data=np.random.default_rng(0).normal(size=(SPOTS, 8)), compression="gzip")
        file["coords"] = (places() - 20).astype(np.int64)
        file["coords"].attrs["patch_size_level0"] = 40


def make_mindspore(folder: Path) -> None:
    def varint(number: int) -> bytes:
        out = b""
        while number >= 0x80:
            out, number = out + bytes([number & 0x7F | 0x80]), number >> 7
        return out + bytes([number])

    def block(number: int, payload: bytes) -> bytes:
        return varint(number << 3 | 2) + varint(len(payload)) + payload

    content = b""
    for name, shape in (("net.gene_emb", (4, 3)), ("net.cls_token", (1, 1, 3)), ("scale", ())):
        dims = b"".join(b"\x08" + varint(size) for size in shape)
        values = np.arange(math.prod(shape), dtype="<f4").tobytes()
        tensor = dims + block(2, b"Float32") + block(3, values)
        content += block(1, block(1, name.encode()) + block(2, tensor))
    (folder / "w.ckpt").write_bytes(content)


def tiny_backbone() -> CellFMModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        size = {"hidden_size": 4, "num_hidden_layers": 2, "num_attention_heads": 2, "num_value_bins": 3}
        return CellFMModel(CellFMConfig(num_genes=7, gene_names=[f"GENE{k}" for k in range(7)], **size)).eval()


def make_backbone(folder: Path) -> None:
    tiny_backbone().save_pretrained(folder / "backbone")


def make_model(folder: Path) -> None:
    backbone = tiny_backbone()
    backbone.save_pretrained(folder / "backbone")
    HingeModel.from_backbone(backbone, feature_dim=5, num_genes=GENES).save_pretrained(folder / "model")


def state() -> dict[str, torch.Tensor]:
    return {"blocks.0.weight": torch.arange(12.0).view(3, 4), "bias": torch.ones(3, dtype=torch.float16)}


def make_safetensors(folder: Path) -> None:
    save_file(state(), folder / "w.safetensors", metadata={"format": "pt"})


def make_pth(folder: Path) -> None:
    torch.save({"epoch": 3, "model": state()}, folder / "w.pth")


def make_legacy_pth(folder: Path) -> None:
    torch.save(state(), folder / "w.pth", _use_new_zipfile_serialization=False)


def make_published(folder: Path) -> None:
    torch.save(export_cellfm(tiny_backbone()), folder / "w.pth")


def make_checkpoint(folder: Path) -> None:
    write_tensors(folder / "step.safetensors", state(), {"step": 3, "best_score": 0.5})


def make_timm(folder: Path) -> None:
    network = {"embed_dim": 6, "depth": 1, "num_heads": 2, "img_size": 32, "patch_size": 16, "mlp_ratio": 1}
    import timm

    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **network)
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "num_features": 6, "model_args": network}
    config["pretrained_cfg"] = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}
    write_json(folder / "config.json", config | {"patch_um": 112.0})


def make_config(folder: Path) -> None:
    content = {
        "output": "run",
        "data": {"path": "slides", "train": ["a", "b"], "test": ["c"], "pretrain": ["d"]},
        "model": {"head": "negative_binomial"},
        "training": {"steps": 10, "learning_rate": 1e-4},
        "sampling": {"draws": 3},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content))


def make_grid(folder: Path) -> None:
    make_config(folder)
    content = {
        "base": "run.yaml",
        "settings": {"training.steps": 5},
        "held_out": ["a", ["b", "c"]],
        "seeds": [0, 1],
        "variants": {"one": {}, "two": {"model.head": "point"}},
    }
    (folder / "grid.yaml").write_text(yaml.safe_dump(content))


def make_terms(folder: Path) -> None:
    terms = {"tissue_ontology_term_id": "UBERON:0000310", "title": "a slide", "donor": ["x", 2]}
    (folder / "terms.yaml").write_text(yaml.safe_dump(terms))


def make_json(folder: Path) -> None:
    Panel.from_list(genes()).save(folder / "panel.json")
    GeneVocabulary.from_genes(genes()).save(folder / "vocabulary.json")
    write_json(folder / "sets.json", {"a": genes()[:3], "b": genes()[3:]})
    (folder / "sets.gmt").write_text("a\tone\tGENE0\tGENE1\nb\ttwo\tGENE2\n")
    (folder / "panel.txt").write_text("\n".join(genes()) + "\n")


def make_tables(folder: Path) -> None:
    (folder / "genes.csv").write_text("symbol,id,ensembl_id\nGENE0,1,ENSG00000000001\nGENE1,2,\n")
    text = "symbol\tprev_symbol\talias_symbol\tensembl_gene_id\nAIRIM\tC1orf109\tX|Y\tENSG00000116922\n"
    (folder / "hgnc.tsv").write_text(text)
    text = "id,organ,oncotree_code,st_technology,species\nTENX1,Breast,IDC,Visium,Homo sapiens\n"
    (folder / "hest.csv").write_text(text)
    (folder / "groups.csv").write_text("slide,group\ns,1\nother,2\n")
    labels = pd.DataFrame({"x": places()[:, 0], "y": places()[:, 1], "label": ["a", "b"] * (SPOTS // 2)}, barcodes())
    labels.to_csv(folder / "labels.tsv", sep="\t")


def make_predictions(folder: Path) -> None:
    table = pd.DataFrame(np.log2(counts() + 1), barcodes(), genes()).round(3)
    table.to_csv(folder / "p.csv")
    (folder / "p.tsv.gz").write_bytes(gzip.compress(table.to_csv(sep="\t").encode(), mtime=0))
    made = AnnData(np.log2(counts() + 1), obs=slide().obs[[]], var=slide().var[[]])
    made.layers["draw_000"] = made.layers["draw_001"] = np.log2(counts() + 1)
    made.uns["hinge"] = {"transform": "log2p1"}
    made.write_h5ad(folder / "p.h5ad")


def make_observed(folder: Path) -> None:
    made = slide()
    made.X = counts()
    made.write_h5ad(folder / "o.h5ad")


def make_draws(folder: Path) -> None:
    make_h5ad(folder)
    about = {"draws": 3, "transform": "log2p1", "seed": 0}
    values = np.random.default_rng(0).random((3, SPOTS, GENES)).astype(np.float32)
    write_draws(folder / "d.h5ad", draws_of_slide(values, values.mean(axis=0), read_slide(folder), genes(), about))
    made = ad.read_h5ad(folder / "d.h5ad")
    write_draws_zarr(made, folder / "e.draws.zarr")
    for number in range(3):
        del made.layers[f"draw_{number:03d}"]
    made.uns["hinge"]["draws_store"] = "e.draws.zarr"
    made.write_h5ad(folder / "e.h5ad")


def make_run(folder: Path) -> None:
    run = folder / "run"
    (folder / "slides").mkdir()
    make_h5ad(folder / "slides")
    config = {"output": str(run), "data": {"path": str(folder / "slides"), "train": ["s"], "test": ["t"]}}
    config["backbone"] = {"path": str(run / "backbone")}
    save_config(check_config(config, "run"), run / "config.yaml")
    make_model(run)
    Panel.from_list(genes()).save(run / "panel.json")
    write_json(run / "split.json", {"train": ["s"], "test": ["t"], "spot_pitch_um": 100.0, "spot_diameter_um": 55.0})
    write_json(run / "model" / "scheduler_config.json", {"num_train_timesteps": 20, "schedule": "power"})


def make_tiff(folder: Path, kind: str) -> None:
    path = folder / ("s.ome.tif" if kind == "ome" else "s.tif")
    options: dict[str, Any] = {"photometric": "rgb"}
    if kind == "striped":
        tifffile.imwrite(path, pixels(), rowsperstrip=16, compression="lzw", **options)
        return
    options |= {"tile": (64, 64), "compression": "jpeg" if kind == "tiled" else "deflate"}
    with tifffile.TiffWriter(path, ome=kind == "ome") as file:
        facts = {"metadata": {"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "µm"}} if kind == "ome" else {}
        file.write(pixels(), subifds=1 if kind == "ome" else 0, **facts, **options)
        file.write(pixels()[::2, ::2], subfiletype=1, **options)


def make_ome_zarr(folder: Path) -> None:
    image = zarr.open_group(folder / "s.zarr", mode="w", zarr_format=2)
    for level, step in enumerate((1, 2)):
        values = np.ascontiguousarray(pixels()[::step, ::step].transpose(2, 0, 1))
        image.create_array(str(level), data=values, chunks=(3, 64, 64))
    axes = [{"name": "c", "type": "channel"}, *({"name": n, "type": "space", "unit": "micrometer"} for n in "yx")]
    datasets = [
        {"path": str(level), "coordinateTransformations": [{"type": "scale", "scale": [1, 0.5 * step, 0.5 * step]}]}
        for level, step in enumerate((1, 2))
    ]
    image.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": datasets}]


# --- readers ----------------------------------------------------------------------------------------


def read_whole_slide(path: Path, **options: Any) -> None:
    """A slide and two of its patches."""
    made = read_slide(path, **options)
    if made.uns["hinge"].get("image_path"):
        for _ in PatchReader(made[:2].copy(), 112.0, 64):
            pass


def read_image(path: Path) -> None:
    """All that is asked of an image."""
    with SlideImage(path) as image:
        image.um_per_px  # noqa: B018 (a property that reads)
        image.thumbnail(100)
        width, height = image.dimensions
        image.read_region((width / 2, height / 2), 112.0, 64, 1.0)
        for level in range(len(image.level_dimensions)):
            image.read_level(0, 0, 50, 50, level)


def read_state(path: Path) -> None:
    """All tensors of a file of weights, by both ways that read them."""
    each(lambda: _read_opened(path), lambda: read_checkpoint(path))


def _read_opened(path: Path) -> None:
    opened = open_state(path)
    for name in opened.shapes:
        opened.read(name).clone()


def read_spots() -> SimpleNamespace:
    """What a prediction is laid over."""
    values = np.log2(counts() + 1)
    total = counts().sum(axis=1)
    return SimpleNamespace(
        slide=np.array(["s"] * SPOTS),
        barcodes=barcodes(),
        genes=genes(),
        values=values,
        library_size=total,
        transform="log2p1",
    )


def each(*reads: Callable[[], Any]) -> None:
    """Call readers of several files, the first error last: one that refuses its file does not hide the others'."""
    refused = None
    for read in reads:
        try:
            read()
        except HingeError as error:
            refused = refused or error
    if refused:
        raise refused


def read_tables(folder: Path) -> None:
    made = slide()
    each(
        lambda: GeneVocabulary.load(folder / "genes.csv").match(["GENE0"]),
        lambda: GeneNames(folder / "hgnc.tsv").approved("C1orf109"),
        lambda: select_samples(read_sample_table(folder / "hest.csv"), organ=["breast"]),
        lambda: slide_groups({"s": made}, str(folder / "groups.csv")),
        lambda: read_labels({"s": made}, "label", str(folder / "labels.tsv")),
    )


def read_jsons(folder: Path) -> None:
    each(
        lambda: read_json(folder / "panel.json"),
        lambda: read_panel(folder / "panel.json"),
        lambda: read_panel(folder / "panel.txt"),
        lambda: GeneVocabulary.load(folder / "vocabulary.json"),
        lambda: read_gene_sets(folder / "sets.json"),
        lambda: read_gene_sets(folder / "sets.gmt"),
    )


def read_predictions(folder: Path) -> None:
    spots: Any = read_spots()
    names = ("p.csv", "p.tsv.gz", "p.h5ad")
    each(*(lambda name=name: read_prediction(PredictionFiles("m", (str(folder / name),)), spots) for name in names))


def read_all_observed(folder: Path) -> None:
    made = slide()
    made.uns["hinge"] = {"name": "s"}
    for transform in ("log2p1", "log1p_cp10k"):
        read_observed(folder / "o.h5ad", made, genes(), transform)


def read_all_features(folder: Path) -> None:
    read_feature_header(folder / "f.h5")
    read_features(folder / "f.h5", barcodes()[::-1])


def read_a_run(folder: Path) -> None:
    run = Run.open(folder / "run")
    matcher = GeneMatcher(run.config.backbone, run.paths.backbone)
    each(run.panel, run.spot_grid, run.pipeline, lambda: matcher.vocabulary)


@dataclasses.dataclass(frozen=True)
class Target:
    """One reader: how a valid input is made in a folder, how it is read, which files of it are mutated, its cost."""

    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    victims: tuple[str, ...] = ("*",)
    share: float = 1.0


TARGETS: dict[str, Target] = {
    "h5ad": Target(make_h5ad, lambda f: read_whole_slide(f / "s.h5ad"), ("s.h5ad",), 2),
    "h5ad-gzip": Target(make_dense_h5ad, lambda f: read_whole_slide(f / "s.h5ad"), ("s.h5ad",)),
    "10x-h5": Target(make_visium, lambda f: read_slide(f / "V", require_image=False), ("V/outs/*.h5",), 2),
    "visium": Target(make_visium, lambda f: read_slide(f / "V", require_image=False), ("V/outs/spatial/*",), 2),
    "visium-parquet": Target(
        lambda f: make_visium(f, "parquet"),
        lambda f: read_slide(f / "V", require_image=False),
        ("V/outs/spatial/*.parquet",),
    ),
    "visium-mtx": Target(
        lambda f: make_visium(f, "mtx"),
        lambda f: read_slide(f / "V", require_image=False),
        ("V/outs/filtered_feature_bc_matrix/*",),
    ),
    "her2st": Target(make_her2st, read_whole_slide, ("ST-cnts/*", "ST-spotfiles/*"), 2),
    "hest": Target(make_hest, read_whole_slide, ("metadata/*", "st/*"), 0.5),
    "spatialdata": Target(
        make_spatialdata, lambda f: read_whole_slide(f / "s.zarr", um_per_px=UM_PER_PX), ("s.zarr/**/*",)
    ),
    "cohort": Target(
        make_cohort,
        lambda f: each(*(lambda n=n: read_slide(f / "table.csv", n, require_counts=False) for n in ("P1", "P2"))),
        ("table.csv",),
    ),
    "features": Target(make_features, read_all_features, ("f.h5",), 2),
    "trident": Target(make_trident, lambda f: read_features_at(f / "f.h5", places()), ("f.h5",), 2),
    "mindspore": Target(make_mindspore, lambda f: read_mindspore(f / "w.ckpt", True), ("w.ckpt",), 2),
    "safetensors": Target(make_safetensors, lambda f: read_state(f / "w.safetensors"), ("w.safetensors",), 2),
    "pth": Target(make_pth, lambda f: read_state(f / "w.pth"), ("w.pth",), 2),
    "pth-legacy": Target(make_legacy_pth, lambda f: read_state(f / "w.pth"), ("w.pth",), 2),
    "cellfm-pth": Target(
        make_published, lambda f: CellFMModel.from_pretrained(f / "w.pth", num_attention_heads=2), ("w.pth",)
    ),
    "backbone": Target(make_backbone, lambda f: CellFMModel.from_pretrained(f / "backbone"), ("backbone/*",)),
    "model": Target(make_model, lambda f: HingeModel.from_pretrained(f / "model"), ("model/*",)),
    "timm": Target(make_timm, lambda f: load_encoder(str(f)), ("*",), 0.5),
    "checkpoint": Target(make_checkpoint, lambda f: read_tensors(f / "step.safetensors"), ("step.safetensors",)),
    "config": Target(make_config, lambda f: load_config(f / "run.yaml"), ("run.yaml",), 2),
    "grid": Target(make_grid, lambda f: load_grid(f / "grid.yaml"), ("grid.yaml",)),
    "terms": Target(make_terms, lambda f: _read_metadata(f / "terms.yaml"), ("terms.yaml",)),
    "json": Target(make_json, read_jsons, ("*",), 2),
    "tables": Target(make_tables, read_tables, ("*",), 2),
    "predictions": Target(make_predictions, read_predictions, ("*",), 2),
    "observed": Target(make_observed, read_all_observed, ("o.h5ad",)),
    "draws": Target(make_draws, lambda f: read_draws(f / "d.h5ad"), ("d.h5ad",)),
    "draws-zarr": Target(make_draws, lambda f: read_draws(f / "e.h5ad"), ("e.h5ad", "e.draws.zarr/**/*")),
    "run": Target(make_run, read_a_run, ("run/config.yaml", "run/*.json", "run/backbone/*.json", "run/model/*.json")),
    "png": Target(lambda f: write_image(f / "s.png"), lambda f: read_image(f / "s.png"), ("s.png",)),
    "jpeg": Target(lambda f: write_image(f / "s.jpg"), lambda f: read_image(f / "s.jpg"), ("s.jpg",)),
    "tiff": Target(lambda f: make_tiff(f, "striped"), lambda f: read_image(f / "s.tif"), ("s.tif",), 2),
    "tiff-pyramid": Target(lambda f: make_tiff(f, "tiled"), lambda f: read_image(f / "s.tif"), ("s.tif",), 2),
    "ome-tiff": Target(lambda f: make_tiff(f, "ome"), lambda f: read_image(f / "s.ome.tif"), ("s.ome.tif",), 2),
    "ome-zarr": Target(make_ome_zarr, lambda f: read_image(f / "s.zarr"), ("s.zarr/**/*",)),
}


# --- mutations --------------------------------------------------------------------------------------

NUMBERS = (0, 1, -1, 2, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 10**12, 2**63 - 1, 2**64 - 1)
VALUES: tuple[Any, ...] = (
    *NUMBERS,
    *(
        -(2**63),
        10**400,
        1e308,
        -1e308,
        5e-324,
        float("nan"),
        float("inf"),
        0.5,
        -0.0,
        True,
        None,
        "",
        " ",
        "\0",
        "nan",
    ),
    *(
        "../../../../etc/passwd",
        "/etc/passwd",
        "a" * 5000,
        "é",
        "\ud7ff",
        "1e999",
        "-1",
        "[]",
        [],
        {},
        [[]],
        {"": None},
    ),
)


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """One to four changes anywhere."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if not data:
            return b"\0"
        kind, at = rng.randrange(8), rng.randrange(len(data))
        length = min(len(data) - at, rng.choice((1, 2, 4, 8, 16, 64, 512)))
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            data[at:at] = data[at : at + length]
        elif kind == 4:
            source = rng.randrange(len(data))
            data[at : at + length] = data[source : source + length]
        elif kind == 5:
            del data[at : at + length]
        elif kind == 6:
            data[at : at + length] = rng.randbytes(length)
        else:
            size = rng.choice((1, 2, 4, 8))
            at -= at % size if rng.random() < 0.8 else 0
            number = rng.choice(NUMBERS) % (1 << 8 * size)
            data[at : at + size] = number.to_bytes(size, rng.choice(("little", "big")))
    return bytes(data)


def mutate_tree(content: Any, rng: random.Random) -> Any:
    """A document of mappings and lists with one node changed."""
    nodes: list[tuple[Any, Any]] = []

    def collect(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            nodes.append((node, key))
            collect(node[key])

    collect(content)
    if not nodes or rng.random() < 0.03:
        return rng.choice(VALUES)
    parent, key = rng.choice(nodes)
    kind = rng.randrange(8)
    if kind < 4:
        parent[key] = rng.choice(VALUES)
    elif kind == 4:
        del parent[key]
    elif kind == 5:
        parent[key] = [parent[key]] * rng.choice((1, 2, 1000))
    elif kind == 6:
        other, name = rng.choice(nodes)
        with contextlib.suppress(LookupError):  # taken from what the change removed
            parent[key] = json.loads(json.dumps(other[name]))
    elif isinstance(parent, dict):
        parent[str(rng.choice(VALUES))[:100]] = parent.pop(key)
    else:
        for _ in range(rng.choice((5, 300))):
            parent[key] = [parent[key]]
    return content


def mutate_text(content: bytes, rng: random.Random) -> bytes:
    """A table with a cell, row, column or delimiter changed; or any text with lines changed."""
    lines = content.decode("utf-8", "replace").split("\n")
    mark = "\t" if "\t" in lines[0] else "," if "," in lines[0] else " "
    row = rng.randrange(len(lines))
    cells = lines[row].split(mark)
    kind = rng.randrange(8)
    if kind < 3:
        cells[rng.randrange(len(cells))] = str(rng.choice(VALUES))
        lines[row] = mark.join(cells)
    elif kind == 3:
        del lines[row]
    elif kind == 4:
        lines[row:row] = [rng.choice(lines)] * rng.choice((1, 2, 100))
    elif kind == 5:
        lines[row] = mark.join(cells[: rng.randrange(len(cells) + 1)])
    elif kind == 6:
        lines[row] = lines[row].replace(mark, rng.choice(("\t", ",", ";", '"', "\0", "\r")), rng.choice((1, -1)))
    else:
        lines = [mark.join(line.split(mark)[::-1]) for line in lines]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def mutate(name: str, content: bytes, rng: random.Random) -> bytes:
    """A file with something changed in it; half of the time in its own terms, where it has terms."""
    if rng.random() < 0.5:
        return mutate_bytes(content, rng)
    try:
        if name.endswith(".gz"):
            return gzip.compress(mutate(name[:-3], gzip.decompress(content), rng), mtime=0)
        if name.endswith((".json", ".zattrs", ".zarray", ".zgroup", ".zmetadata")):
            return json.dumps(mutate_tree(json.loads(content), rng)).encode()
        if name.endswith(".yaml"):
            return yaml.safe_dump(mutate_tree(yaml.safe_load(content), rng), allow_unicode=True).encode()
        if name.endswith((".csv", ".tsv", ".txt", ".gmt", ".mtx")):
            return mutate_text(content, rng)
        if name.endswith(".safetensors"):
            length = struct.unpack("<Q", content[:8])[0]
            head = json.dumps(mutate_tree(json.loads(content[8 : 8 + length]), rng)).encode()
            return struct.pack("<Q", len(head)) + head + content[8 + length :]
        if name.endswith(".png"):
            return _mutate_png(content, rng)
        if name.endswith((".h5", ".h5ad")) and rng.random() < 0.5:
            return _mutate_strings(content, rng)
        if name.endswith(".pth") and content[:2] == b"PK":
            return _mutate_zip(content, rng)
    except (ValueError, OverflowError, RecursionError, yaml.YAMLError):
        pass
    return mutate_bytes(content, rng)


def _mutate_png(content: bytes, rng: random.Random) -> bytes:
    """A chunk changed, its checksum right."""
    chunks, at = [], 8
    while at < len(content):
        length = struct.unpack(">I", content[at : at + 4])[0]
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    number = rng.randrange(len(chunks))
    chunks[number] = (chunks[number][0], mutate_bytes(chunks[number][1], rng))
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    return content[:8] + b"".join(parts)


def _mutate_strings(content: bytes, rng: random.Random) -> bytes:
    """Length, heap or number in it of strings of HDF5 changed, a few at a time."""
    found = []
    for heap in re.finditer(rb"GCOL\x01", content):
        found += [each.start() - 4 for each in re.finditer(re.escape(struct.pack("<Q", heap.start())), content)]
    changed = bytearray(content)
    for at in rng.choices(found, k=rng.choice((1, 1, 3, 20))) if found else ():
        number = rng.choice((0, 1, 2**16, 2**27 + 1, 2**31 - 1, 2**31, 2**32 - 1, rng.getrandbits(32)))
        changed[at + (place := rng.choice((0, 0, 0, 4, 12))) : at + place + 4] = struct.pack("<I", number)
    return bytes(changed)


def _mutate_zip(content: bytes, rng: random.Random) -> bytes:
    """A member changed, its checksum right; sometimes deflated, which torch never writes."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(target, "w") as out:
        victim = rng.choice([name for name in source.namelist() for _ in range(5 if name.endswith(".pkl") else 1)])
        for name in source.namelist():
            body = source.read(name)
            kind = zipfile.ZIP_DEFLATED if name == victim and rng.random() < 0.2 else zipfile.ZIP_STORED
            out.writestr(name, mutate_bytes(body, rng) if name == victim else body, kind)
    return target.getvalue()


# --- harness ----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Outcome:
    """What one input did: `read`, `refused`, an exception's name, `crash …`, `hang`, `slow` or `memory`."""

    target: str
    name: str
    outcome: str
    seconds: float = 0.0
    bytes: int = 0
    message: str = ""
    where: str = ""


def build(folder: Path, target: str, seed: int, number: int, template: Path) -> str:
    """Lay input `number` of a target into an empty folder; which file was changed."""
    shutil.copytree(template, folder, dirs_exist_ok=True)
    files = sorted({file for pattern in TARGETS[target].victims for file in template.glob(pattern) if file.is_file()})
    rng = random.Random(f"{target}/{seed}/{number}")
    file = rng.choice(files).relative_to(template)
    (folder / file).write_bytes(mutate(file.name, (template / file).read_bytes(), rng))
    return str(file)


def _memory(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise LookupError(key)


def _try(target: str, folder: Path) -> Outcome:
    """Read one input in this process."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    before, started = _memory("VmRSS"), time.process_time()
    outcome, message, where = "read", "", ""
    try:
        TARGETS[target].read(folder)
    except HingeError as error:
        outcome, message = "refused", str(error)
    except BaseException as error:
        outcome, message = type(error).__name__, str(error)
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if "/hinge/" in frame.filename] or frames
        where = f"{Path(own[-1].filename).name}:{own[-1].lineno} … {Path(frames[-1].filename).name}:{frames[-1].lineno}"
    seconds, used = time.process_time() - started, _memory("VmHWM") - before
    if outcome in ("read", "refused"):
        outcome = "slow" if seconds > MOST_SECONDS else "memory" if used > MOST_BYTES else outcome
    return Outcome(target, "", outcome, seconds, used, message[:300], where)


def in_child(jobs: list[tuple[str, str, Callable[[Path], Any]]]) -> list[Outcome]:
    """Lay and read inputs (target, name, lay) in forked children; one that dies or hangs takes only its input along."""
    results: list[Outcome] = []
    while len(results) < len(jobs):
        first = len(results)
        batch = jobs[first : first + BATCH]
        here, there = os.pipe()
        child = os.fork()
        if not child:
            os.close(here)
            _serve(batch, there)
        os.close(there)
        done, alive = _collect(here, child)
        os.close(here)
        for outcome in done:
            outcome.name = jobs[len(results)][1]
            results.append(outcome)
        if len(done) < len(batch):
            target, name, _ = jobs[len(results)]
            results.append(Outcome(target, name, alive, HANG_SECONDS if alive == "hang" else 0.0))
    return results


def _serve(batch: list[tuple[str, str, Callable[[Path], Any]]], pipe: int) -> None:
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)  # C libraries complain here
        os.dup2(null, 1)
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        limit = _memory("VmSize") + 4 * MOST_BYTES  # stacks of threads and mapped files are no memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for target, _, lay in batch:
            with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
                lay(Path(folder))
                outcome = _try(target, Path(folder))
            os.write(pipe, json.dumps(dataclasses.asdict(outcome)).encode() + b"\n")
    finally:
        os._exit(0)


def _cpu_seconds(process: int) -> float:
    """CPU time that a process has used."""
    # the name of the program, which may contain spaces, ends with the last parenthesis
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _collect(pipe: int, child: int) -> tuple[list[Outcome], str]:
    """Output and exit code of a child process."""
    text, since, used, ended = b"", time.monotonic(), _cpu_seconds(child), ""
    while True:
        ready, _, _ = select.select([pipe], [], [], 1.0)
        if not ready:
            if _cpu_seconds(child) - used < HANG_SECONDS and time.monotonic() - since < STUCK_SECONDS:
                continue
            os.kill(child, signal.SIGKILL)
            ended = "hang"
            break
        part = os.read(pipe, 1 << 16)
        if not part:
            break
        text, since, used = text + part, time.monotonic(), _cpu_seconds(child)
    _, status = os.waitpid(child, 0)
    if not ended:
        signalled = os.WIFSIGNALED(status)
        ended = f"crash {signal.Signals(os.WTERMSIG(status)).name}" if signalled else f"exit {os.WEXITSTATUS(status)}"
    lines = text.split(b"\n")[:-1]
    return [Outcome(**json.loads(line)) for line in lines], ended


def templates(folder: Path, names: list[str]) -> None:
    """Make valid inputs, in a child: what libraries start in threads must not be there when others are forked."""
    child = os.fork()
    if not child:
        code = 1
        try:
            warnings.simplefilter("ignore")
            for name in names:
                (folder / name).mkdir()
                TARGETS[name].make(folder / name)
                TARGETS[name].read(folder / name)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if os.waitpid(child, 0)[1]:
        raise SystemExit("a valid input cannot be made or read")


def fuzz(names: list[str], inputs: int, seed: int, first: int, keep: Path | None, folder: Path) -> list[Outcome]:
    """Read `inputs` mutations, shared among the targets; findings are kept as files that differ from the valid ones."""
    shares = {name: TARGETS[name].share for name in names}
    results = []
    for name, share in shares.items():
        template = folder / name
        count = max(1, round(inputs * share / sum(shares.values())))

        def lay(number: int, name: str = name, template: Path = template) -> Callable[[Path], Any]:
            return lambda place: build(place, name, seed, number, template)

        started = time.monotonic()
        found = in_child([(name, str(number), lay(number)) for number in range(first, first + count)])
        results += found
        kinds = Counter(outcome.outcome for outcome in found)
        print(f"{name:16} {count:6} {time.monotonic() - started:6.0f} s  {dict(kinds)}", file=sys.stderr, flush=True)
        for outcome in found:
            if keep is not None and outcome.outcome not in ("read", "refused"):
                with tempfile.TemporaryDirectory() as place:
                    file = build(Path(place), name, seed, int(outcome.name), template)
                    target = keep / name / f"{seed}-{outcome.name}" / file
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(Path(place) / file, target)
    return results


def replay(corpus: Path, names: list[str], folder: Path) -> list[Outcome]:
    """Read what was found before: `<corpus>/<target>/<name>/…` are files to lay over the valid ones."""
    jobs = []
    for case in sorted(corpus.glob("*/*/")):
        if case.parent.name not in TARGETS:
            raise SystemExit(f"{case} is of no target")
        if case.parent.name not in names:
            continue

        def lay(place: Path, case: Path = case) -> None:
            shutil.copytree(folder / case.parent.name, place, dirs_exist_ok=True)
            shutil.copytree(case, place, dirs_exist_ok=True)

        jobs.append((case.parent.name, case.name, lay))
    return in_child(jobs)


def summary(results: list[Outcome]) -> dict[str, Any]:
    """Counts and extremes by target, and the findings."""
    table = {}
    for name in dict.fromkeys(outcome.target for outcome in results):
        own = [outcome for outcome in results if outcome.target == name]
        kinds = Counter(outcome.outcome for outcome in own)
        table[name] = {
            "inputs": len(own),
            "read": kinds.pop("read", 0),
            "refused": kinds.pop("refused", 0),
            "unexpected": dict(kinds),
            "slowest_s": round(max(outcome.seconds for outcome in own), 2),
            "most_MB": round(max(outcome.bytes for outcome in own) / 2**20),
        }
    findings = [dataclasses.asdict(each) for each in results if each.outcome not in ("read", "refused")]
    return {"inputs": len(results), "targets": table, "findings": findings}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=0, help="mutated inputs in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input of each reader")
    parser.add_argument("--only", action="append", choices=TARGETS, help="a reader; repeat for several")
    parser.add_argument("--corpus", type=Path, help="folder of inputs to read again")
    parser.add_argument("--keep", type=Path, help="folder for what is found")
    parser.add_argument("--output", type=Path, help="JSON file of the figures")
    given = parser.parse_args()
    names = given.only or list(TARGETS)
    with tempfile.TemporaryDirectory(prefix="fuzz-valid-") as folder:
        templates(Path(folder), names)
        results = replay(given.corpus, names, Path(folder)) if given.corpus else []
        if given.inputs:
            results += fuzz(names, given.inputs, given.seed, given.first, given.keep, Path(folder))
    found = summary(results)
    if given.output:
        write_json(given.output, found)
    for name, facts in found["targets"].items():
        print(f"{name:16} {facts}")
    groups = Counter((each["target"], each["outcome"], each["where"]) for each in found["findings"])
    for (target, outcome, where), count in sorted(groups.items()):
        print(f"FOUND {count} × {target}: {outcome} {where}")
    sys.exit(1 if found["findings"] else 0)


if __name__ == "__main__":
    main()
