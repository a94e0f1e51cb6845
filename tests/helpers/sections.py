"""One section of tissue, written in the layouts of the readers; what a test changes before or after it is written."""

import json
from dataclasses import dataclass, field

import anndata
import numpy as np
import pandas as pd
import scipy.sparse
import tifffile
from PIL import Image

from helpers.visium import COLUMNS, hexagon, write_matrix

GENES = [
    *("ERBB2", "KRT5", "KRT8", "EPCAM", "CD3D", "CD3E", "MS4A1", "COL1A1", "COL1A2", "FN1", "ACTB", "GAPDH", "VIM"),
    *("ESR1", "PGR", "MKI67", "CD74", "IGKC", "MT-ND1", "MT-CO1", "RPS3", "RPL4", "MTOR", "MTDH", "MT2A", "B2M"),
    *(f"GENE{number}" for number in range(34)),
]


@dataclass
class Section:
    """Spots 100 px apart on an image of 1 µm per pixel; the tissue is an L that fits in one orientation only."""

    pixels: np.ndarray
    row: np.ndarray
    column: np.ndarray
    x: np.ndarray
    y: np.ndarray
    on_tissue: np.ndarray
    counts: np.ndarray
    barcodes: list[str]
    genes: list[str] = field(default_factory=lambda: list(GENES))

    def adata(self, spots="tissue"):
        """AnnData as scanpy.read_visium gives it: all spots with the column in_tissue, or those on tissue."""
        kept = self.on_tissue if spots == "tissue" else np.ones(len(self.x), bool)
        slide = anndata.AnnData(scipy.sparse.csr_matrix(self.counts[kept].astype(np.float32)))
        slide.obs_names, slide.var_names = np.array(self.barcodes)[kept], self.genes
        slide.obs["in_tissue"] = self.on_tissue[kept].astype(int)
        slide.obs["array_row"], slide.obs["array_col"] = self.row[kept], self.column[kept]
        slide.obsm["spatial"] = np.stack([self.x, self.y], axis=1)[kept]
        return slide


def make_section(seed=0, height=1300, width=1600):
    """A section with about 100 spots on tissue, of 60 genes."""
    rng = np.random.default_rng(seed)
    row, column, x, y = hexagon(12, 28, 100.0)
    x, y = x + 120.0, y + 140.0
    grid_y, grid_x = np.mgrid[:height, :width]
    upright = (grid_x > 150) & (grid_x < 650) & (grid_y > 120) & (grid_y < 1150)
    foot = (grid_x > 150) & (grid_x < 1450) & (grid_y > 800) & (grid_y < 1150)
    tissue = upright | foot
    pixels = np.full((height, width, 3), (243, 240, 243), np.uint8)
    colour = np.array([200, 120, 180]) + rng.normal(0, 12, (height // 4, width // 4, 1)).repeat(4, 0).repeat(4, 1)
    pixels[tissue] = colour.clip(60, 235).astype(np.uint8)[tissue]
    nuclei = tissue & (rng.random((height // 10, width // 10)) < 0.15).repeat(10, 0).repeat(10, 1)
    pixels[nuclei] = (90, 50, 130)
    on_tissue = tissue[y.round().astype(int), x.round().astype(int)]
    rate = np.exp(rng.normal(0.3, 1, len(GENES))) * rng.gamma(4, 0.25, (len(x), 1))
    counts = rng.poisson(rate) * np.where(on_tissue, 1, 0)[:, None] + rng.poisson(0.05, (len(x), len(GENES)))
    barcodes = [f"{''.join(rng.choice(list('ACGT'), 16))}-1" for _ in x]
    return Section(pixels, row, column, x, y, on_tissue, counts, barcodes)


def write_tiff(path, pixels, **options):
    """A striped TIFF, compressed."""
    tifffile.imwrite(path, pixels, **{"photometric": "rgb", "compression": "zlib", **options})
    return path


def positions_table(section):
    """The table of Space Ranger's positions."""
    values = [section.barcodes, section.on_tissue.astype(int), section.row, section.column, section.y, section.x]
    return pd.DataFrame(dict(zip(COLUMNS, values, strict=True)))


def write_thumbnails(folder, pixels, scale=0.5, prefix="", **scales):
    """Space Ranger's two thumbnails and its scale factors."""
    picture = Image.fromarray(pixels)
    for size, factor in (("hires", scale), ("lowres", scale * 0.3)):
        small = picture.resize([round(side * factor) for side in picture.size], Image.Resampling.BOX)
        small.save(folder / f"{prefix}tissue_{size}_image.png")
        scales[f"tissue_{size}_scalef"] = factor
    scales = {"spot_diameter_fullres": 65.0, "fiducial_diameter_fullres": 105.0, **scales}
    (folder / f"{prefix}scalefactors_json.json").write_text(json.dumps(scales))


def write_outs(section, folder, image=True, thumbnail_of=None):
    """`<folder>/outs` of Space Ranger 2 and later, and `<folder>/image.tif`."""
    outs = folder / "outs"
    (outs / "spatial").mkdir(parents=True)
    kept = section.on_tissue
    write_matrix(
        outs / "filtered_feature_bc_matrix.h5",
        section.counts[kept],
        np.array(section.barcodes)[kept],
        section.genes,
    )
    positions_table(section).to_csv(outs / "spatial" / "tissue_positions.csv", index=False)
    write_thumbnails(outs / "spatial", section.pixels if thumbnail_of is None else thumbnail_of)
    if image:
        write_tiff(folder / "image.tif", section.pixels)
    return outs


def write_h5ad(section, folder, edit=None, spots="tissue", name="slide", **tiff):
    """`<folder>/<name>.h5ad` as scanpy writes a Visium slide, and its image beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    slide = section.adata(spots)
    if edit is not None:
        slide = edit(slide) or slide
    slide.write_h5ad(folder / f"{name}.h5ad")
    write_tiff(folder / f"{name}.tif", section.pixels, **tiff)
    return folder / f"{name}.h5ad"


def write_hest(section, folder, edit=None, name="S1", **facts):
    """A sample of HEST-1k."""
    for part in ("st", "wsis", "metadata"):
        (folder / part).mkdir(parents=True)
    write_h5ad(section, folder / "st", edit, name=name)
    (folder / "st" / f"{name}.tif").rename(folder / "wsis" / f"{name}.tif")
    facts = {
        "pixel_size_um_estimated": 1.0,
        "inter_spot_dist": 100.0,
        "spot_diameter": 55.0,
        "species": "Homo sapiens",
        "st_technology": "Visium",
        **facts,
    }
    (folder / "metadata" / f"{name}.json").write_text(json.dumps(facts))
    return folder


def write_her2st(section, folder, name="A1"):
    """A section in the layout of the HER2ST repository: an array of 200 µm pitch at 2 µm per pixel."""
    for part in ("ST-cnts", "ST-spotfiles", f"ST-imgs/{name[0]}/{name}"):
        (folder / part).mkdir(parents=True)
    rows, columns = (grid.ravel() for grid in np.mgrid[1:11, 1:14])
    x, y = columns * 100.0 + 100, rows * 100.0 + 100
    kept = (section.pixels[y.astype(int), x.astype(int)] < 230).any(axis=1)
    rows, columns, x, y = (values[kept] for values in (rows, columns, x, y))
    counts = np.random.default_rng(1).poisson(2, (len(x), len(section.genes)))
    index = [f"{column}x{row}" for row, column in zip(rows, columns, strict=True)]
    pd.DataFrame(counts, index=index, columns=section.genes).to_csv(
        folder / "ST-cnts" / f"{name}.tsv.gz", sep="\t", compression="gzip"
    )
    pd.DataFrame(
        {"x": columns, "y": rows, "new_x": columns, "new_y": rows, "pixel_x": x, "pixel_y": y, "selected": 1}
    ).to_csv(folder / "ST-spotfiles" / f"{name}_selection.tsv", sep="\t", index=False)
    Image.fromarray(section.pixels).save(folder / "ST-imgs" / name[0] / name / "HE.jpg", quality=95)
    return folder


def write_bins(section, folder, bin_um=16, bins_in="binned_outputs", **scales):
    """Visium HD of one bin size over the tissue, at 1 µm per pixel; every bin on tissue has counts."""
    place = folder / "outs" / bins_in / f"square_{bin_um:03d}um"
    (place / "spatial").mkdir(parents=True)
    row, column = (grid.ravel() for grid in np.mgrid[:60, :80])
    x, y = 30 + (column + 0.5) * bin_um, 30 + (row + 0.5) * bin_um
    on_tissue = (section.pixels[y.astype(int), x.astype(int)] < 230).any(axis=1)
    barcodes = np.array([f"s_{bin_um:03d}um_{r:05d}_{c:05d}-1" for r, c in zip(row, column, strict=True)])
    table = pd.DataFrame(dict(zip(COLUMNS, [barcodes, on_tissue.astype(int), row, column, y, x], strict=True)))
    table.to_parquet(place / "spatial" / "tissue_positions.parquet")
    counts = np.random.default_rng(2).poisson(0.5, (int(on_tissue.sum()), len(section.genes)))
    write_matrix(place / "filtered_feature_bc_matrix.h5", counts, barcodes[on_tissue], section.genes)
    scales = {"microns_per_pixel": 1.0, "bin_size_um": float(bin_um), "spot_diameter_fullres": float(bin_um), **scales}
    write_thumbnails(place / "spatial", section.pixels, **scales)
    write_tiff(folder / "image.tif", section.pixels)
    return folder / "outs"
