"""What is at a path that no reader recognises, the nearest layout, and what it lacks."""

from collections.abc import Iterable
from pathlib import Path

_MOST_NAMED = 5
# what a layout is known by, and what it needs beside that: (format, part of a name, what is lacking)
_SIGNS = (
    ("Xenium", "experiment.xenium", "cell_feature_matrix.h5 and cells.parquet beside it"),
    ("Visium", "spatial", "filtered_feature_bc_matrix.h5, or a folder filtered_feature_bc_matrix, beside spatial/"),
    ("Visium", "feature_bc_matrix", "the folder spatial/ with tissue_positions.csv and scalefactors_json.json"),
    ("Visium", "tissue_positions", "filtered_feature_bc_matrix.h5 and scalefactors_json.json"),
    ("Visium", "matrix.mtx", "tissue_positions.csv and scalefactors_json.json, in spatial/ or beside the counts"),
    ("her2st", "ST-spotfiles", "ST-cnts/<sample>.tsv.gz"),
    ("her2st", "ST-imgs", "ST-cnts/<sample>.tsv.gz and ST-spotfiles/<sample>_selection.tsv"),
    ("HEST", "wsis", "st/<sample>.h5ad"),
    ("HEST", "metadata", "st/<sample>.h5ad and wsis/<sample>.tif"),
    ("SpatialData", ".zarr", "a table of counts in tables/"),
    ("SpatialData", "zarr.json", "a table of counts in tables/"),
    ("SpatialData", ".zgroup", "a table of counts in tables/"),
    ("table of slides", ".csv", "a first line with the columns slide, and image or counts"),
    ("table of slides", ".tsv", "a first line with the columns slide, and image or counts, and the ending .csv"),
    ("h5ad", ".h5", "the layout of AnnData and the ending .h5ad, or spatial/ beside it (Visium)"),
    ("h5ad", ".loom", "conversion to .h5ad with anndata.read_loom(…).write_h5ad(…)"),
    ("h5ad", ".rds", "conversion to .h5ad, with raw counts in X and pixel positions in obsm['spatial']"),
    ("Visium", ".tar", "unpacking: tar -xf"),
    ("Visium", ".zip", "unpacking: unzip"),
    ("image", ".gz", "unpacking: gunzip"),
)


def describe_unknown(path: Path, formats: Iterable[str]) -> str:
    """Return two sentences: what was found at a path, and the nearest layout with what it lacks."""
    if path.is_dir():
        names = sorted(each.name + ("/" if each.is_dir() else "") for each in path.glob("[!.]*"))
        below = [each.name for each in path.glob("[!.]*/[!.]*")][:1000]
        shown = ", ".join(names[:_MOST_NAMED]) + (", …" if len(names) > _MOST_NAMED else "")
        found = f"{path} holds no slides in a known format: it has {shown or 'no files'}"
    else:
        names, below = [path.name], []
        found = f"{path} holds no slides in a known format"
    for there in (names, below):
        for format, sign, lacking in _SIGNS:
            if any(_matches(name.rstrip("/"), sign) for name in there):
                return f"{found}. The nearest layout is {format}, which lacks {lacking}."
    return f"{found}. Known formats are {', '.join(formats)}; name the folder or file that holds one of them."


def _matches(name: str, sign: str) -> bool:
    if sign.startswith("."):
        return name.lower().endswith(sign) or (sign == ".tar" and ".tar." in name.lower())
    return name == sign or name.lower().endswith(sign) or (sign in name and "_" in sign)
