"""Further ways in which slides are broken or valid, found by trying files of the kinds of `test_mutations`."""

from dataclasses import replace

import anndata
import numpy as np
import pytest
import scipy.io
import scipy.sparse
import tifffile
from helpers.sections import GENES, make_section, positions_table, write_h5ad, write_outs, write_tiff
from helpers.visium import COLUMNS
from PIL import Image

from hinge.data.checks import check_slide, unreadable
from hinge.data.readers import build_slide
from hinge.utils.errors import DataError

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore")]
SECTION = make_section()
KEPT = SECTION.on_tissue
COUNTS = SECTION.counts[KEPT]
BARCODES = np.array(SECTION.barcodes)[KEPT]
PICTURE = Image.fromarray(SECTION.pixels)
TALL = replace(SECTION, pixels=np.pad(SECTION.pixels, ((0, 300), (0, 0), (0, 0)), constant_values=243))
OF_TWO = [f"ENS{'' if number < 30 else 'MUS'}G{number:011d}" for number in range(60)]


def table(edit=None, spots="tissue", section=SECTION, options=None):
    """An h5ad, changed by `edit`."""
    return lambda folder: (write_h5ad(section, folder, edit, spots), options or {})


def off_tissue(convert):
    def edit(slide):
        slide.obs["in_tissue"] = convert(slide.obs["in_tissue"])

    return table(edit, "all")


def two_of(column):
    def edit(slide):
        slide.obs[column] = ["one"] * (slide.n_obs // 2) + ["two"] * (slide.n_obs - slide.n_obs // 2)

    return table(edit)


def joined(slide):
    """Two sections in one table, whose barcodes say nothing."""
    both = anndata.concat([slide, slide])
    both.obs_names = [f"spot{number}" for number in range(both.n_obs)]
    both.obsm["spatial"][slide.n_obs :] += 3
    return both


def genes_of_two(slide):
    slide.var["gene_ids"] = OF_TWO


def named(names):
    return table(lambda slide: setattr(slide, "var_names", names))


def exchanged(slide):
    slide.obsm["spatial"] = slide.obsm["spatial"][:, ::-1].copy()


def elsewhere(change):
    """Positions at another place than obsm["spatial"]."""

    def edit(slide):
        change(slide, slide.obsm.pop("spatial"))

    return table(edit)


def in_obs(slide, places):
    slide.obs["pxl_col_in_fullres"], slide.obs["pxl_row_in_fullres"] = places.T


def image(write):
    """A Space Ranger folder with another image: `write(folder)` returns its path."""

    def make(folder):
        write_outs(SECTION, folder, image=False)
        return folder, {"image": write(folder)}

    return make


def saved(picture, name, **options):
    def write(folder):
        picture.save(folder / name, **options)
        return folder / name

    return image(write)


def tag(number):
    found = Image.Exif()
    found[274] = number
    return found.tobytes()


def ome(pixels, axes, **options):
    def write(folder):
        path = folder / "slide.ome.tif"
        tifffile.imwrite(path, np.ascontiguousarray(pixels), ome=True, metadata={"axes": axes}, **options)
        return path

    return image(write)


def positions(as_bytes):
    def make(folder):
        outs = write_outs(SECTION, folder)
        (outs / "spatial" / "tissue_positions.csv").write_bytes(as_bytes(positions_table(SECTION)))
        return folder, {}

    return make


def mtx(counts, **options):
    """Counts as a folder of Matrix Market files."""

    def make(folder):
        outs = write_outs(SECTION, folder)
        (outs / "filtered_feature_bc_matrix.h5").unlink()
        inside = outs / "filtered_feature_bc_matrix"
        inside.mkdir()
        scipy.io.mmwrite(inside / "matrix.mtx", scipy.sparse.csr_matrix(counts), **options)
        (inside / "barcodes.tsv").write_text("\n".join(BARCODES) + "\n")
        (inside / "features.tsv").write_text("\n".join(f"{gene}\t{gene}" for gene in GENES))
        return folder, {}

    return make


CHANNELS = SECTION.pixels.transpose(2, 0, 1)
BROKEN = {
    "in_tissue as text": ("spots-off-tissue", off_tissue(lambda column: column.astype(str))),
    "in_tissue as booleans": ("spots-off-tissue", off_tissue(lambda column: column.astype(bool))),
    "in_tissue as categories": ("spots-off-tissue", off_tissue(lambda column: column.astype(str).astype("category"))),
    **{
        f"two sections by {name}": ("several-sections", two_of(name))
        for name in ("batch", "Sample", "section_name", "library", "slice", "sample_name", "capture_area")
    },
    "two sections on one array": ("several-sections", table(joined)),
    "Ensembl names of two species": ("genes-two-genomes", named(OF_TWO)),
    "Ensembl ids of two species": ("genes-two-genomes", table(genes_of_two)),
    "two genomes by one underscore": (
        "genes-two-genomes",
        named([f"{'hg19' if number < 30 else 'mm10'}_{gene}" for number, gene in enumerate(GENES)]),
    ),
    "x and y exchanged, all on the image": ("image-orientation", table(exchanged, section=TALL)),
    "x and y exchanged at Space Ranger": (
        "image-orientation",
        positions(
            lambda found: found.rename(columns=dict(zip(COLUMNS[4:], COLUMNS[:3:-1], strict=True))).to_csv().encode()
        ),
    ),
    "typed in metres": ("resolution-implausible", table(options={"um_per_px": 5e-7})),
    "sums that are nearly equal": (
        "counts-not-raw",
        table(lambda slide: setattr(slide, "X", np.rint(COUNTS / COUNTS.sum(1, keepdims=True) * 3000))),
    ),
    "no positions": ("slide-unreadable", elsewhere(lambda slide, places: None)),
    "JPEG turned by a camera": ("image-rotated-tag", saved(PICTURE, "i.jpg", quality=92, exif=tag(6))),
    "grey": ("image-channels", saved(PICTURE.convert("L"), "i.png")),
    "grey with alpha": ("image-channels", saved(PICTURE.convert("LA"), "i.png")),
    "grey as RGB": ("image-channels", saved(PICTURE.convert("L").convert("RGB"), "i.jpg", quality=80)),
    "inverted": ("image-dark", saved(Image.fromarray(255 - SECTION.pixels), "i.png")),
    "blue, green, red": (
        "image-mismatch",
        saved(Image.fromarray(np.ascontiguousarray(SECTION.pixels[..., ::-1])), "i.png"),
    ),
    "decimals": (
        "slide-unreadable",
        image(lambda folder: write_tiff(folder / "i.tif", np.float32(SECTION.pixels / 255))),
    ),
    "OME-TIFF of two channels": ("slide-unreadable", ome(CHANNELS[:2], "CYX", photometric="minisblack")),
    "OME-TIFF of fluorescence": ("image-dark", ome((255 - CHANNELS) // 3, "CYX", photometric="minisblack")),
    "transposed counts": ("slide-unreadable", mtx(COUNTS)),
}
VALID = {
    "positions as whole numbers": table(
        lambda slide: slide.obsm.update({"spatial": slide.obsm["spatial"].round().astype(int)})
    ),
    "JPEG that no camera turned": saved(PICTURE, "i.jpg", quality=92, exif=tag(1)),
    "JPEG of four inks": saved(PICTURE.convert("CMYK"), "i.jpg", quality=92),
    "PNG with a palette": saved(PICTURE.quantize(256), "i.png"),
    "channels apart": image(lambda folder: write_tiff(folder / "i.tif", CHANNELS.copy(), planarconfig="separate")),
    "OME-TIFF with channels first": ome(CHANNELS, "CYX", photometric="minisblack"),
    "semicolons": positions(lambda found: found.to_csv(index=False, sep=";").encode()),
    "UTF-16": positions(lambda found: found.to_csv(index=False).encode("utf-16")),
    "capitals": positions(lambda found: found.rename(columns=str.upper).to_csv(index=False).encode()),
    "barcodes without -1": positions(
        lambda found: found.assign(barcode=found["barcode"].str[:-2]).to_csv(index=False).encode()
    ),
    "columns in another order": positions(lambda found: found[found.columns[::-1]].to_csv(index=False).encode()),
    "real numbers and two columns of features": mtx(COUNTS.T.astype(float), field="real"),
}


def read(path, options):
    return build_slide(path, require_counts=False, **options)


@pytest.mark.parametrize("name", BROKEN)
def test_it_is_found(name, tmp_path):
    code, make = BROKEN[name]
    path, options = make(tmp_path)
    try:
        found = check_slide(read(path, options))
    except DataError as error:
        found = [unreadable(error)]
    codes = [finding.code for finding in found]
    assert code in codes and codes.count(code) == 1, found


@pytest.mark.parametrize("name", VALID)
def test_it_is_valid(name, tmp_path):
    slide = read(*VALID[name](tmp_path))
    found = [str(finding) for finding in check_slide(slide)]
    assert found == [] and slide.n_obs == KEPT.sum()


@pytest.mark.parametrize(
    "make, says",
    [
        (elsewhere(in_obs), r"has obs\['pxl_col_in_fullres'\], obs\['pxl_row_in_fullres'\]: copy the positions"),
        (elsewhere(lambda slide, places: slide.obsm.update({"X_spatial": places})), r"has obsm\['X_spatial'\]: copy"),
        (
            elsewhere(lambda slide, places: slide.obsm.update({"spatial": np.c_[places, places[:, 0]]})),
            r"has shape \(92, 3\) there: keep the columns of x and y",
        ),
        (mtx(COUNTS), r"matrix.mtx has counts of 92 features and 60 barcodes.*it is transposed"),
    ],
)
def test_the_sentence_says_what_is_there(make, says, tmp_path):
    with pytest.raises(DataError, match=says):
        read(*make(tmp_path))
