"""Folders as Space Ranger writes them."""

import json
import math

import h5py
import numpy as np
import pandas as pd
import scipy.sparse
import tifffile
from PIL import Image

COLUMNS = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]


def write_matrix(path, counts, barcodes, genes, kinds=None):
    """Counts (n, G) as Space Ranger's h5: CSC of genes x barcodes."""
    matrix = scipy.sparse.csr_matrix(counts)  # spots' rows are the columns of genes x barcodes
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        group["barcodes"] = np.array(barcodes, dtype="S")
        group["data"], group["indices"], group["indptr"] = matrix.data.astype("i4"), matrix.indices, matrix.indptr
        group["shape"] = np.array([len(genes), len(barcodes)], dtype="i4")
        features = group.create_group("features")
        features["id"] = np.array([f"ENSG{i:011d}" for i in range(len(genes))], dtype="S")
        features["name"] = np.array(genes, dtype="S")
        features["feature_type"] = np.array(kinds or ["Gene Expression"] * len(genes), dtype="S")
        features["genome"] = np.array(["GRCh38"] * len(genes), dtype="S")
        features["_all_tag_keys"] = np.array(["genome"], dtype="S")


def draw_counts(rng, spots, genes, per_spot):
    """Counts (spots, genes), CSR, of about per_spot molecules a spot."""
    total = round(spots * per_spot)
    places = rng.integers(0, spots, total), rng.integers(0, genes, total)
    return scipy.sparse.csr_matrix((np.ones(total), places), shape=(spots, genes))


def hexagon(rows, columns, pitch_px, turn=0.0):
    """Array row and column and pixel x, y of a hexagonal array in which every other column of a row is left out."""
    row, column = (grid.ravel() for grid in np.mgrid[:rows, :columns])
    kept = (row + column) % 2 == 0
    row, column = row[kept], column[kept]
    x, y = column * pitch_px / 2, row * pitch_px * math.sqrt(3) / 2
    return row, column, x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn)


def write_visium(outs, rows=8, columns=12, genes=20, pitch_px=100.0, header=True, image=True, depth=2.0, seed=0):
    """A folder as Space Ranger leaves it, the image beside it; every fifth spot is not on tissue."""
    rng = np.random.default_rng(seed)
    row, column, x, y = hexagon(rows, columns, pitch_px, turn=0.02)
    x, y = x - x.min() + pitch_px, y - y.min() + pitch_px
    side = math.ceil(max(x.max(), y.max()) + pitch_px)
    barcodes = [f"{''.join(rng.choice(list('ACGT'), 16))}-1" for _ in row]
    on_tissue = np.arange(len(row)) % 5 > 0
    positions = pd.DataFrame(
        {
            "barcode": barcodes,
            "in_tissue": on_tissue.astype(int),
            "array_row": row,
            "array_col": column,
            "pxl_row_in_fullres": y.round().astype(int),
            "pxl_col_in_fullres": x.round().astype(int),
        }
    )
    (outs / "spatial").mkdir(parents=True)
    name = "tissue_positions.csv" if header else "tissue_positions_list.csv"
    positions.sample(frac=1, random_state=0).to_csv(outs / "spatial" / name, index=False, header=header)
    counts = draw_counts(rng, int(on_tissue.sum()), genes, per_spot=genes * depth / 4)
    write_matrix(
        outs / "filtered_feature_bc_matrix.h5",
        counts,
        np.array(barcodes)[on_tissue],
        [f"GENE{i}" for i in range(genes)],
    )
    write_images(outs, side, spot_px=pitch_px * 0.65)
    if image:
        options = {"tile": (512, 512), "photometric": "rgb", "compression": "jpeg"}
        tifffile.imwrite(outs.parent / "full.tif", np.full((side, side, 3), 200, np.uint8), **options)
    return positions[on_tissue].set_index("barcode"), counts


def write_images(folder, side, spot_px, **more):
    scales = {"spot_diameter_fullres": spot_px, "fiducial_diameter_fullres": spot_px * 1.6, **more}
    for size, most in (("hires", 2000), ("lowres", 600)):
        small = min(most, side)
        Image.new("RGB", (small, small), "pink").save(folder / "spatial" / f"tissue_{size}_image.png")
        scales[f"tissue_{size}_scalef"] = small / side
    (folder / "spatial" / "scalefactors_json.json").write_text(json.dumps(scales))


def write_visium_hd(outs, bins=(8, 16), area_um=160.0, um_per_px=0.5, genes=12, per_spot=4, seed=0):
    """Square bins over a capture area of area_um x area_um whose corner is at pixel (20, 30)."""
    rng = np.random.default_rng(seed)
    side_px = math.ceil(area_um / um_per_px) + 60
    for bin_um in bins:
        folder = outs / "binned_outputs" / f"square_{bin_um:03d}um"
        (folder / "spatial").mkdir(parents=True)
        across = int(area_um // bin_um)
        row, column = (grid.ravel() for grid in np.mgrid[:across, :across])
        barcodes = [f"s_{bin_um:03d}um_{r:05d}_{c:05d}-1" for r, c in zip(row, column, strict=True)]
        on_tissue = (row + column > 3).astype(int)
        table = dict(zip(COLUMNS, [barcodes, on_tissue, row, column], strict=False))
        table["pxl_row_in_fullres"] = 30 + (row + 0.5) * bin_um / um_per_px
        table["pxl_col_in_fullres"] = 20 + (column + 0.5) * bin_um / um_per_px
        pd.DataFrame(table).to_parquet(folder / "spatial" / "tissue_positions.parquet")
        keep = on_tissue == 1
        counts = draw_counts(rng, int(keep.sum()), genes, per_spot)
        names = [f"GENE{i}" for i in range(genes)]
        write_matrix(folder / "filtered_feature_bc_matrix.h5", counts, np.array(barcodes)[keep], names)
        write_images(folder, side_px, bin_um / um_per_px, microns_per_pixel=um_per_px, bin_size_um=float(bin_um))
    options = {"tile": (256, 256), "photometric": "rgb", "compression": "jpeg"}
    tifffile.imwrite(outs.parent / "he.tif", np.full((side_px, side_px, 3), 200, np.uint8), **options)
