"""Valid slides have no findings; each property that is broken in turn is found by its code."""

import gzip
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import scipy.io
import scipy.sparse
import tifffile
from helpers.sections import (
    GENES,
    make_section,
    positions_table,
    write_bins,
    write_h5ad,
    write_her2st,
    write_hest,
    write_outs,
    write_thumbnails,
    write_tiff,
)
from helpers.visium import write_matrix
from PIL import Image

from hinge.data.checks import Context, check_slide, unreadable
from hinge.data.checks.placement import ORIENTATIONS
from hinge.data.readers import build_slide
from hinge.utils.errors import DataError

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore")]
SECTION = make_section()
KEPT = SECTION.on_tissue
BARCODES = np.array(SECTION.barcodes)[KEPT]
COUNTS = SECTION.counts[KEPT]
RNG = np.random.default_rng(3)
OTHER = make_section(seed=5)
MOUSE = [f"{gene[0]}{gene[1:].lower()}" for gene in GENES]
CONTROLS = [*GENES[:-4], "NegControlProbe_00042", "BLANK_0069", "antisense_PGR", "UnassignedCodeword_0001"]
ENSEMBL = [f"ENSG{number:011d}" for number in range(60)]
EQUAL = np.round(COUNTS / COUNTS.sum(axis=1, keepdims=True) * 10_000).astype(int)


def found(path, **options):
    """Codes of the findings of the slide at a path; a file that cannot be read is a finding."""
    try:
        slide = build_slide(path, require_counts=False, **options)
    except DataError as error:
        return [unreadable(error).code]
    return [finding.code for finding in check_slide(slide)]


# --- changes of a Space Ranger folder -------------------------------------------------------------------


def outs_with(change):
    """A folder of Space Ranger, and a change of its files: `change(folder)` may return arguments of `read_slide`."""

    def write(folder):
        write_outs(SECTION, folder)
        return folder, change(folder) or {}

    return write


def image(pixels, **options):
    return outs_with(lambda folder: write_tiff(folder / "image.tif", pixels, **options) and None)


def matrix(counts=COUNTS, names=GENES, barcodes=BARCODES, kinds=None):
    path = "outs/filtered_feature_bc_matrix.h5"
    return outs_with(lambda folder: write_matrix(folder / path, counts, barcodes, names, kinds))


def positions(change):
    def write(folder):
        change(positions_table(SECTION)).to_csv(folder / "outs/spatial/tissue_positions.csv", index=False)

    return outs_with(write)


def shift_outside(share):
    def change(table):
        chosen = table.index[table["in_tissue"] == 1][: round(share * KEPT.sum())]
        table.loc[chosen, "pxl_col_in_fullres"] = -10.0
        return table

    return change


def shuffled(table):
    columns = ["pxl_row_in_fullres", "pxl_col_in_fullres"]
    table.loc[KEPT, columns] = table.loc[KEPT, columns].to_numpy()[RNG.permutation(KEPT.sum())]
    return table


def repeated(table):
    chosen = table.index[KEPT]
    columns = ["pxl_row_in_fullres", "pxl_col_in_fullres"]
    table.loc[chosen[:5], columns] = table.loc[chosen[5:10], columns].to_numpy()
    return table


WHITE = np.full_like(SECTION.pixels, 255)
ALPHA = np.dstack([SECTION.pixels, np.zeros(SECTION.pixels.shape[:2], np.uint8)])
DARK = (255 - SECTION.pixels) // 3
TWO_GENOMES = [f"GRCh38_{gene}" for gene in GENES] + [f"mm10___{gene}" for gene in MOUSE]
VISIUM = {
    "typed half": ("resolution-contradiction", outs_with(lambda folder: {"um_per_px": 0.5})),
    "typed a quarter": ("resolution-contradiction", outs_with(lambda folder: {"um_per_px": 0.25})),
    "typed a tenth more": ("resolution-contradiction", outs_with(lambda folder: {"um_per_px": 1.1})),
    "typed nanometres": ("resolution-implausible", outs_with(lambda folder: {"um_per_px": 250.0})),
    "typed a hundredth": ("resolution-implausible", outs_with(lambda folder: {"um_per_px": 0.01})),
    "tag of half": (
        "resolution-contradiction",
        image(SECTION.pixels, resolution=(2e4, 2e4), resolutionunit="CENTIMETER"),
    ),
    "metadata of half": (
        "resolution-contradiction",
        outs_with(lambda folder: write_thumbnails(folder / "outs/spatial", SECTION.pixels, microns_per_pixel=0.5)),
    ),
    **{
        f"image {how}": ("image-orientation", image(np.ascontiguousarray(turn(SECTION.pixels))))
        for how, turn in ORIENTATIONS.items()
        if how != "as it is"
    },
    "image of half the size": ("image-size", image(np.ascontiguousarray(SECTION.pixels[::2, ::2]))),
    "image a little larger": ("image-size", image(np.pad(SECTION.pixels, ((0, 40), (0, 0), (0, 0)), "edge"))),
    "thumbnail as the image": (
        "image-thumbnail",
        outs_with(lambda folder: {"image": folder / "outs/spatial/tissue_hires_image.png"}),
    ),
    "image of another section": ("image-mismatch", image(np.roll(OTHER.pixels, (500, 700), (0, 1)))),
    "one channel": ("image-channels", image(SECTION.pixels[..., 0], photometric="minisblack")),
    "channels as pages": ("image-channels", image(np.stack([SECTION.pixels[..., 0]] * 4), photometric="minisblack")),
    "12 bits in 16": ("image-bits", image(SECTION.pixels.astype(np.uint16) * 16)),
    "10 bits in 16": ("image-bits", image(SECTION.pixels.astype(np.uint16) * 4)),
    "alpha 0": ("image-blank", image(ALPHA, extrasamples=["unassalpha"])),
    "alpha 0 in tiles": ("image-blank", image(ALPHA, extrasamples=["unassalpha"], tile=(256, 256))),
    "all white": ("image-blank", image(WHITE)),
    "all black": ("image-blank", image(np.zeros_like(WHITE))),
    "dark": ("image-dark", image(DARK)),
    "orientation tag in strips": ("image-rotated-tag", image(SECTION.pixels, extratags=[(274, "H", 1, 8, True)])),
    "orientation tag in tiles": (
        "image-rotated-tag",
        image(SECTION.pixels, tile=(128, 128), extratags=[(274, "H", 1, 2, True)]),
    ),
    "positions of another section": (
        "barcodes-off-tissue",
        positions(lambda table: table.assign(in_tissue=np.roll(table["in_tissue"].to_numpy(), 30))),
    ),
    "a tenth of the barcodes off tissue": (
        "barcodes-off-tissue",
        positions(lambda table: table.assign(in_tissue=table["in_tissue"] * (np.arange(len(table)) % 10 > 0))),
    ),
    "aggregated barcodes": (
        "several-sections",
        matrix(
            np.vstack([COUNTS, COUNTS]),
            barcodes=[*BARCODES, *(barcode[:-1] + "2" for barcode in BARCODES)],
        ),
    ),
    "equal sums": ("counts-not-raw", matrix(EQUAL)),
    "binary": ("counts-not-raw", matrix((COUNTS > 0).astype(int))),
    "doubled": ("counts-not-raw", matrix(COUNTS * 2)),
    "mostly empty": ("counts-empty", matrix(COUNTS * (np.arange(len(COUNTS)) % 3 == 0)[:, None])),
    "two genomes": ("genes-two-genomes", matrix(np.hstack([COUNTS, COUNTS // 2]), TWO_GENOMES)),
    "control features": ("genes-controls", matrix(names=CONTROLS)),
    "Ensembl names": ("genes-ensembl", matrix(names=ENSEMBL)),
    "mouse genes on a human reference": ("genes-species", matrix(names=MOUSE)),
    "shuffled positions": ("spots-array", positions(shuffled)),
    "a few spots outside": ("spots-outside", positions(shift_outside(0.1))),
    "many spots outside": ("spots-outside", positions(shift_outside(0.3))),
    "repeated positions": ("spots-repeated", positions(repeated)),
    "no scale factors": (
        "slide-unreadable",
        outs_with(lambda folder: (folder / "outs/spatial/scalefactors_json.json").unlink()),
    ),
    "damaged counts": (
        "slide-unreadable",
        outs_with(lambda folder: (folder / "outs/filtered_feature_bc_matrix.h5").write_bytes(b"text") and None),
    ),
}


# --- changes of an AnnData ------------------------------------------------------------------------------


def h5ad(edit=None, section=SECTION, options=None, **more):
    return lambda folder: (write_h5ad(section, folder, edit, **more), options or {})


def set_obs(**columns):
    return lambda slide: slide.obs.assign(**columns).pipe(lambda obs: setattr(slide, "obs", obs))


def set_x(values):
    return lambda slide: setattr(slide, "X", scipy.sparse.csr_matrix(values.astype(np.float32)))


def set_names(names):
    return lambda slide: setattr(slide, "var_names", names)


def log_with(place):
    def edit(slide):
        if place == "raw":
            slide.raw = slide.copy()
        else:
            slide.layers[place] = slide.X.copy()
        slide.X = slide.X.log1p()

    return edit


def swap(slide):
    slide.obsm["spatial"] = slide.obsm["spatial"][:, ::-1].copy()


def turned(how):
    return h5ad(section=replace(SECTION, pixels=np.ascontiguousarray(ORIENTATIONS[how](SECTION.pixels))))


def uns(**values):
    return lambda slide: slide.uns.update(values)


HALF = replace(SECTION, pixels=np.ascontiguousarray(SECTION.pixels[::2, ::2]))
MOVED = replace(SECTION, pixels=np.full_like(SECTION.pixels, 243))
MOVED.pixels[1160:1290, :1500] = SECTION.pixels[810:940, 200:201]
H5AD = {
    "tag of half": (
        "resolution-contradiction",
        h5ad(resolution=(2e4, 2e4), resolutionunit="CENTIMETER"),
    ),
    "typed half": ("resolution-contradiction", h5ad(options={"um_per_px": 0.5})),
    "metadata of half": ("resolution-contradiction", h5ad(uns(hinge={"um_per_px": 0.5}))),
    "pitch of half": ("resolution-contradiction", h5ad(uns(hinge={"um_per_px": 1.0, "spot_pitch_um": 50.0}))),
    "spots off tissue": ("spots-off-tissue", h5ad(spots="all")),
    "two libraries": ("several-sections", h5ad(uns(spatial={"A": {}, "B": {}}))),
    "two library_ids": ("several-sections", h5ad(set_obs(library_id=["A"] * 60 + ["B"] * (KEPT.sum() - 60)))),
    "barcodes -1 and -2": (
        "several-sections",
        h5ad(lambda slide: setattr(slide, "obs_names", [f"{b[:-1]}{i % 2 + 1}" for i, b in enumerate(BARCODES)])),
    ),
    "barcodes -1-0 and -1-1": (
        "several-sections",
        h5ad(lambda slide: setattr(slide, "obs_names", [f"{b}-{i % 2}" for i, b in enumerate(BARCODES)])),
    ),
    "counts in raw": ("counts-elsewhere", h5ad(log_with("raw"))),
    "counts in another layer": ("counts-elsewhere", h5ad(log_with("molecules"))),
    "no counts": ("slide-unreadable", h5ad(set_x(COUNTS * 0.5))),
    "equal sums": ("counts-not-raw", h5ad(set_x(EQUAL))),
    "binary": ("counts-not-raw", h5ad(set_x(COUNTS > 0))),
    "control features": ("genes-controls", h5ad(set_names(CONTROLS))),
    "negative probes of CosMx": ("genes-controls", h5ad(set_names([*GENES[:-2], "NegPrb3", "SystemControl12"]))),
    "blanks of MERSCOPE": ("genes-controls", h5ad(set_names([*GENES[:-2], "Blank-3", "Blank-12"]))),
    "Ensembl names": ("genes-ensembl", h5ad(set_names(ENSEMBL))),
    "Ensembl names with versions": ("genes-ensembl", h5ad(set_names([f"{name}.3" for name in ENSEMBL]))),
    "two genomes by prefix": (
        "genes-two-genomes",
        h5ad(set_names([*(f"hg19_{gene}" for gene in GENES[:40]), *(f"mm10_{gene}" for gene in MOUSE[40:])])),
    ),
    "mirrored image": ("image-orientation", turned("mirrored left to right")),
    "image upside down": ("image-orientation", turned("mirrored top to bottom")),
    "image turned by 180°": ("image-orientation", turned("turned by 180°")),
    "x and y swapped": ("spots-outside", h5ad(swap)),
    "image of another section": ("spots-on-glass", h5ad(section=MOVED)),
    "image of half the size": ("spots-outside", h5ad(section=HALF)),
    "all white": ("image-blank", h5ad(section=replace(SECTION, pixels=WHITE))),
    "one channel": (
        "image-channels",
        h5ad(section=replace(SECTION, pixels=SECTION.pixels[..., 1]), photometric="minisblack"),
    ),
    "coarse image": (
        "image-coarse",
        h5ad(lambda slide: slide.obs.drop(columns=["array_row", "array_col"]).pipe(
            lambda obs: setattr(slide, "obs", obs)), options={"um_per_px": 6.0}),
    ),
    "shuffled array": (
        "spots-array",
        h5ad(
            lambda slide: set_obs(array_col=RNG.permutation(slide.obs["array_col"].to_numpy()))(slide),
            options={"um_per_px": 1.0},
        ),
    ),
}  # fmt: skip


# --- changes of other layouts ---------------------------------------------------------------------------


def hest(edit=None, options=None, **facts):
    return lambda folder: (write_hest(SECTION, folder, edit, **facts), options or {})


def few_outside(slide):
    slide.obsm["spatial"][:8, 0] = -5.0


def her2st(change=lambda folder: None):
    def write(folder):
        write_her2st(SECTION, folder)
        return folder, change(folder) or {}

    return write


def her2st_image(pixels):
    return her2st(lambda folder: Image.fromarray(pixels).save(folder / "ST-imgs/A/A1/HE.jpg", quality=95))


def bins(options=None, **more):
    return lambda folder: (write_bins(SECTION, folder, **more), options or {})


def table(text, **more):
    def write(folder):
        write_outs(SECTION, folder / "S", **more)
        (folder / "cohort.csv").write_text(text)
        return folder / "cohort.csv", {}

    return write


def alone(pixels=SECTION.pixels, um_per_px=None, **options):
    return lambda folder: (write_tiff(folder / "slide.tif", pixels, **options), {"um_per_px": um_per_px})


OTHERS = {
    "HEST resolution": ("resolution-contradiction", hest(pixel_size_um_estimated=0.584)),
    "HEST resolution a tenth off": ("resolution-contradiction", hest(pixel_size_um_estimated=0.9)),
    "HEST typed": ("resolution-contradiction", hest(options={"um_per_px": 0.25})),
    "HEST distance of spots": ("resolution-contradiction", hest(inter_spot_dist=200.0)),
    "HEST spots outside": ("spots-outside", hest(few_outside)),
    "HEST species": ("genes-species", hest(species="Mus musculus")),
    "HEST controls": ("genes-controls", hest(set_names(CONTROLS), st_technology="Xenium")),
    "HEST without resolution": ("slide-unreadable", hest(pixel_size_um_estimated=None, inter_spot_dist=None)),
    "her2st typed": ("resolution-contradiction", her2st(lambda folder: {"um_per_px": 0.5})),
    "her2st mirrored": ("image-orientation", her2st_image(np.ascontiguousarray(SECTION.pixels[:, ::-1]))),
    "her2st white": ("image-blank", her2st_image(WHITE)),
    "her2st dark": ("image-dark", her2st_image(DARK)),
    "bins metadata": ("resolution-contradiction", bins(microns_per_pixel=0.5)),
    "bins typed": ("resolution-contradiction", bins({"um_per_px": 0.4})),
    "bins other size": ("resolution-contradiction", bins(bin_size_um=8.0)),
    "table resolution": ("resolution-contradiction", table("slide,counts,um_per_px\nA,S,0.25\n")),
    "table without counts": ("slide-unreadable", table("slide,counts\nA,elsewhere\n")),
    "image typed": ("resolution-implausible", alone(um_per_px=20.0)),
    "image coarse": ("image-coarse", alone(um_per_px=5.0)),
    "image of one channel": ("slide-unreadable", alone(SECTION.pixels[..., 1], 1.0, photometric="minisblack")),
    "image without tissue": ("slide-unreadable", alone(WHITE, 1.0)),
}

MUTATIONS = {
    f"{layout}: {name}": case
    for layout, cases in (("visium", VISIUM), ("h5ad", H5AD), ("other", OTHERS))
    for name, case in cases.items()
}


def test_there_are_enough():
    assert len(MUTATIONS) >= 90 and len(VARIANTS) >= 40


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_property_is_found(name, tmp_path):
    code, write = MUTATIONS[name]
    path, options = write(tmp_path)
    assert code in found(path, **options)


# --- what is right --------------------------------------------------------------------------------------


def compressed(**options):
    return image(SECTION.pixels, **options)


def saved_as(suffix, **options):
    def change(folder):
        (folder / "image.tif").unlink()
        Image.fromarray(SECTION.pixels).save(folder / f"image{suffix}", **options)

    return outs_with(change)


def ome(folder):
    with tifffile.TiffWriter(folder / "image.ome.tif") as file:
        for pixels, um in ((SECTION.pixels[::8, ::8], 8.0), (SECTION.pixels, 1.0)):
            file.write(pixels, photometric="rgb", metadata={"axes": "YXS", "PhysicalSizeX": um, "PhysicalSizeY": um})
    (folder / "image.tif").unlink()


def pages(folder):
    with tifffile.TiffWriter(folder / "image.tif") as file:
        file.write(SECTION.pixels[::8, ::8], photometric="rgb")
        file.write(SECTION.pixels, photometric="rgb", tile=(256, 256))


def pyramid(folder):
    with tifffile.TiffWriter(folder / "image.tif") as file:
        file.write(SECTION.pixels, photometric="rgb", tile=(256, 256), subifds=1)
        file.write(np.ascontiguousarray(SECTION.pixels[::2, ::2]), photometric="rgb", tile=(256, 256), subfiletype=1)


def as_geo(folder):
    """The files as they lie on GEO: no folders, a prefix, compressed."""
    outs = folder / "outs"
    for file in [outs / "filtered_feature_bc_matrix.h5", *(outs / "spatial").iterdir()]:
        target = folder / f"GSM1234567_P1_{file.name}"
        if file.suffix == ".h5":
            shutil.copy(file, target)
        else:
            target.with_name(target.name + ".gz").write_bytes(gzip.compress(file.read_bytes()))
    shutil.rmtree(outs)


def as_mtx(compress, names):
    def change(folder):
        (folder / "outs/filtered_feature_bc_matrix.h5").unlink()
        place = folder / "outs/filtered_feature_bc_matrix"
        place.mkdir()
        scipy.io.mmwrite(place / "matrix.mtx", scipy.sparse.csc_matrix(COUNTS.T))
        lines = {
            "barcodes.tsv": BARCODES,
            names: [f"{i}\t{gene}\tGene Expression" for i, gene in zip(ENSEMBL, GENES, strict=True)],
        }
        for name, rows in lines.items():
            (place / name).write_text("\n".join(rows) + "\n")
        for file in list(place.iterdir()) if compress else []:
            (place / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
            file.unlink()

    return outs_with(change)


def raw_matrix(folder):
    (folder / "outs/filtered_feature_bc_matrix.h5").unlink()
    write_matrix(folder / "outs/raw_feature_bc_matrix.h5", SECTION.counts, SECTION.barcodes, GENES)


def space_ranger_1(folder):
    (folder / "outs/spatial/tissue_positions.csv").unlink()
    table = positions_table(SECTION).round().astype({"pxl_row_in_fullres": int, "pxl_col_in_fullres": int})
    table.to_csv(folder / "outs/spatial/tissue_positions_list.csv", index=False, header=False)


def segmented(folder):
    place = folder / "outs/segmented_outputs"
    place.mkdir(parents=True)
    chosen = np.flatnonzero(KEPT)[::2]
    numbers = np.arange(1, len(chosen) + 1)
    write_matrix(
        place / "filtered_feature_cell_matrix.h5",
        SECTION.counts[chosen],
        [f"cellid_{number:09d}-1" for number in numbers],
        GENES,
    )
    outlines = []
    for number, x, y in zip(numbers, SECTION.x[chosen], SECTION.y[chosen], strict=True):
        ring = [[x + a, y + b] for a, b in ((-5, -5), (5, -5), (5, 5), (-5, 5), (-5, -5))]
        outlines.append(
            {"geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": {"cell_id": int(number)}}
        )
    (place / "cell_segmentations.geojson").write_text(json.dumps({"features": outlines}))
    (place / "spatial").mkdir()
    write_thumbnails(place / "spatial", SECTION.pixels, microns_per_pixel=1.0)
    write_tiff(folder / "image.tif", SECTION.pixels)
    return folder, {}


def with_symbols(column):
    def edit(slide):
        slide.var[column] = slide.var_names.to_numpy()
        slide.var_names = ENSEMBL

    return edit


def without(*columns):
    return lambda slide: setattr(slide, "obs", slide.obs.drop(columns=list(columns)))


def counts_layer(slide):
    slide.layers["counts"] = slide.X.copy()
    slide.X = slide.X.log1p()


def subset(slide):
    return slide[::2].copy()


OPAQUE = np.dstack([SECTION.pixels, np.full(SECTION.pixels.shape[:2], 255, np.uint8)])
VARIANTS = {
    "strips": compressed(),
    "no compression": compressed(compression=None),
    "LZW": compressed(compression="lzw"),
    "JPEG tiles": compressed(tile=(256, 256), compression="jpeg"),
    "WebP tiles": compressed(tile=(256, 256), compression="webp"),
    "JPEG 2000 tiles": compressed(tile=(256, 256), compression="jpeg2000"),
    "zstd tiles": compressed(tile=(256, 256), compression="zstd"),
    "BigTIFF": compressed(bigtiff=True),
    "small strips": compressed(rowsperstrip=8),
    "opaque alpha": image(OPAQUE, extrasamples=["unassalpha"]),
    "16 bits in full": image(SECTION.pixels.astype(np.uint16) * 257),
    "tag of a printer": compressed(resolution=(72, 72), resolutionunit="INCH"),
    "tag that agrees": compressed(resolution=(1e4, 1e4), resolutionunit="CENTIMETER"),
    "PNG": saved_as(".png"),
    "JPEG": saved_as(".jpg", quality=90),
    "OME-TIFF with a macro image": outs_with(ome),
    "TIFF with a thumbnail first": outs_with(pages),
    "pyramid": outs_with(pyramid),
    "typed a little off": outs_with(lambda folder: {"um_per_px": 0.97}),
    "Space Ranger 1": outs_with(space_ranger_1),
    "parquet": outs_with(
        lambda folder: positions_table(SECTION).to_parquet(folder / "outs/spatial/tissue_positions.parquet")
    ),
    "files of GEO": outs_with(as_geo),
    "mtx": as_mtx(True, "features.tsv"),
    "mtx uncompressed": as_mtx(False, "features.tsv"),
    "mtx of version 2": as_mtx(False, "genes.tsv"),
    "raw counts": outs_with(raw_matrix),
    "antibodies beside genes": matrix(
        np.hstack([COUNTS, COUNTS[:, :3]]),
        [*GENES, "CD3.1", "CD4.1", "CD8.1"],
        kinds=["Gene Expression"] * 60 + ["Antibody Capture"] * 3,
    ),
    "one genome by prefix": matrix(names=[f"GRCh38_{gene}" for gene in GENES]),
    "genes with numbers": matrix(names=[*GENES[:-2], "ERCC1", "NEGR1"]),
    "h5ad": h5ad(),
    "h5ad with symbols in a column": h5ad(with_symbols("feature_name")),
    "h5ad with other symbols": h5ad(with_symbols("gene_symbols")),
    "h5ad with counts in a layer": h5ad(counts_layer),
    "h5ad dense": h5ad(lambda slide: setattr(slide, "X", slide.X.toarray())),
    "h5ad by column": h5ad(lambda slide: setattr(slide, "X", slide.X.tocsc())),
    "h5ad without in_tissue": h5ad(without("in_tissue")),
    "h5ad of one library": h5ad(set_obs(library_id="A")),
    "h5ad subset to one library of two": h5ad(
        lambda slide: (set_obs(library_id="A")(slide), uns(spatial={"A": {}, "B": {}})(slide))[0]
    ),
    "h5ad of every other spot": h5ad(subset),
    "h5ad with metadata": h5ad(uns(hinge={"um_per_px": 1.0, "spot_pitch_um": 100.0})),
    "HEST": hest(),
    "HEST of Xenium": hest(inter_spot_dist=None, st_technology="Xenium"),
    "HEST of mouse": hest(set_names(MOUSE), species="Mus musculus"),
    "HEST with in_tissue of nothing": hest(set_obs(in_tissue=np.arange(KEPT.sum()) % 2)),
    "her2st": her2st(),
    "bins": bins(),
    "bins of 8 µm": bins(bin_um=8),
    "bins without binned_outputs": bins(bins_in="."),
    "cells": segmented,
    "table": table("slide,counts\nA,S\n"),
    "table with further columns": table("Slide;COUNTS;age\nA;S;61\n"),
    "image": alone(um_per_px=0.5),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_valid_slide_has_no_findings(name, tmp_path):
    path, options = VARIANTS[name](tmp_path)
    slide = build_slide(path, require_counts=False, **options)
    assert [str(finding) for finding in check_slide(slide, Context(target_um_per_px=1.0))] == []
    assert slide.uns["hinge"]["um_per_px"] == pytest.approx(options.get("um_per_px", 2.0 if name == "her2st" else 1.0))


def test_counts_are_the_same_in_every_layout(tmp_path):
    for number, name in enumerate(
        ["strips", "files of GEO", "mtx", "mtx uncompressed", "mtx of version 2", "raw counts"]
    ):
        path, _ = VARIANTS[name](tmp_path / str(number))
        slide = build_slide(path)
        assert list(slide.var_names) == GENES and list(slide.obs_names) == list(BARCODES)
        np.testing.assert_array_equal(slide.X.toarray(), COUNTS)
