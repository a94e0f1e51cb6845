"""Simulated slides: the true distribution of the counts given the image is known.

A slide needs no download and takes about two seconds. Four modules make it: `cell_types` (constants), `tissue` (the
layout of domains and cells), `images` (the H&E image of a tissue) and `counts` (the counts given the cells).
"""

from collections.abc import Sequence
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from PIL import Image
from scipy.sparse import csr_matrix
from scipy.spatial import KDTree
from tqdm import tqdm

from hinge.data.simulate.cell_types import (
    CELL_TYPES,
    DOMAINS,
    LIBRARY_SIZE_SD,
    MARGIN_UM,
    SMOOTH_LENGTH_UM,
    SMOOTH_SHARE,
    SPOT_DIAMETER_UM,
    SPOT_PITCH_UM,
    CellType,
    image_size_um,
)
from hinge.data.simulate.counts import activity_root, draw_counts, draw_gene_parameters, patient_factors
from hinge.data.simulate.images import render_image
from hinge.data.simulate.tissue import Tissue, lay_out_tissue, raster_index
from hinge.utils.errors import ConfigError, require_whole_number
from hinge.utils.files import atomic_path

MAX_PIXELS = 400_000_000


def simulate_slides(
    folder: str | Path,
    n_slides: int = 4,
    grid: tuple[int, int] = (16, 16),
    n_genes: int = 300,
    n_cell_types: int = 5,
    seed: int = 0,
    um_per_px: float = 1.0,
    with_image: bool = True,
    first: int = 0,
    n_patients: int = 1,
) -> list[Path]:
    """Write simulated slides `sim<first>.h5ad`, `sim<first + 1>.h5ad`, …, each with a `.jpg` image beside it.

    A slide depends on `seed` and on its own number, not on the number of slides. Slides of one seed share cell types
    and gene programs. Give slides for pre-training other numbers than the test slides (`first`): they then share only
    the cell types and programs.

    Parameters
    ----------
    folder
        Output folder; created if it does not exist.
    n_slides
        Number of slides.
    grid
        Rows and columns of spots (pitch 200 µm, diameter 100 µm), 1 to 64 each.
    n_genes
        Genes, named `SIM001`, `SIM002`, …
    n_cell_types
        Number of `CELL_TYPES` that occur, from the first on.
    seed
        Seed of cell types and programs and, together with the number of the slide, of the slide.
    um_per_px
        Resolution of the image, µm per pixel.
    with_image
        False renders no image; the counts are the same.
    first
        Number of the first slide.
    n_patients
        Slide i is of patient i mod n_patients. The expression of every patient but the first is shifted, gene by gene
        and as a whole, by the amounts of `patient_factors`.

    Returns
    -------
    list of Path
        The h5ad files. In addition to the fields of every slide they hold `layers["expected"]` (n, G) =
        E[counts | image], `obsm["cells"]` (n, K) = number of cells of each type in each spot, `obs["domain"]` and
        `obs["patient"]`.
        `oracle_draws` reads `varm["profile"]` (G, K), `varm["loadings"]` (G, K·P), `var["ambient"]`,
        `var["dispersion"]` and `uns["hinge_truth"]`.

    Raises
    ------
    ConfigError
        An argument is out of its range.
    """
    require_whole_number("n_patients", n_patients, 1, 10_000)
    _check_arguments(n_slides, grid, n_genes, n_cell_types, seed, um_per_px, with_image, first)
    types = CELL_TYPES[:n_cell_types]
    biology = draw_gene_parameters(np.random.default_rng([seed, 0]), types, n_genes)
    paths = []
    for number in tqdm(range(first, first + n_slides), desc="simulate", unit="slide", disable=None):
        # a stream for each part, so that the counts do not depend on whether an image is rendered
        tissue_rng, counts_rng, image_rng = np.random.default_rng([seed, 1, number]).spawn(3)
        tissue = lay_out_tissue(tissue_rng, types, grid)
        patient = number % n_patients
        factors = patient_factors(seed, patient, n_genes)
        of_patient = biology | {key: (biology[key].T * factors).T for key in ("profile", "ambient")}
        slide = _make_slide(counts_rng, f"sim{number}", tissue, of_patient, types, grid, um_per_px)
        slide.obs["patient"] = f"P{patient}"
        image_path = Path(folder) / f"sim{number}.jpg"
        if with_image:
            slide.uns["hinge"]["image_path"] = image_path.name
            with atomic_path(image_path) as temporary:
                picture = Image.fromarray(render_image(image_rng, tissue, types, um_per_px))
                picture.save(temporary, quality=90, subsampling=0)
        else:
            image_path.unlink(missing_ok=True)  # an image of another seed must not be read with these counts
        paths.append(image_path.with_suffix(".h5ad"))
        with atomic_path(paths[-1]) as temporary:
            slide.write_h5ad(temporary)
    return paths


def _check_arguments(
    n_slides: int,
    grid: tuple[int, int],
    n_genes: int,
    n_cell_types: int,
    seed: int,
    um_per_px: float,
    with_image: bool,
    first: int,
) -> None:
    if not isinstance(grid, Sequence) or len(grid) != 2:
        raise ConfigError(f"grid takes two whole numbers (rows, columns of spots), not {grid!r}")
    for name, value, low, high in (
        ("n_slides", n_slides, 1, 10_000),
        ("grid", grid[0], 1, 64),
        ("grid", grid[1], 1, 64),
        ("n_genes", n_genes, 1, 50_000),
        ("n_cell_types", n_cell_types, 1, len(CELL_TYPES)),
        ("seed", seed, 0, 2**32 - 1),
        ("first", first, 0, 2**31),
    ):
        require_whole_number(name, value, low, high)
    if not isinstance(um_per_px, int | float) or not 0.2 <= um_per_px <= 4:
        raise ConfigError(f"um_per_px takes a number from 0.2 to 4 µm per pixel, not {um_per_px!r}")
    width, height = image_size_um(grid) / um_per_px
    if with_image and width * height > MAX_PIXELS:
        raise ConfigError(
            f"a grid of {grid[0]} x {grid[1]} spots at um_per_px={um_per_px} needs an image of "
            f"{width * height / 1e6:.0f} megapixels, and at most {MAX_PIXELS // 1_000_000} are possible; "
            "take fewer spots or more µm per pixel"
        )


def _make_slide(
    rng: np.random.Generator,
    name: str,
    tissue: Tissue,
    biology: dict[str, np.ndarray],
    types: Sequence[CellType],
    grid: tuple[int, int],
    um_per_px: float,
) -> ad.AnnData:
    """Place a grid of spots on a tissue, count the cells in each spot and draw the counts."""
    row, column = (index.ravel() for index in np.indices(grid))
    spots_um = MARGIN_UM + SPOT_PITCH_UM * np.column_stack([column, row])
    distance, spot = KDTree(spots_um).query(tissue.cells_um)
    inside = distance <= SPOT_DIAMETER_UM / 2
    cells = np.zeros((len(spots_um), len(types)), np.float32)
    np.add.at(cells, (spot[inside], tissue.kinds[inside]), 1)
    domain = tissue.domains.argmax(0)[raster_index(spots_um, tissue.depth_um.shape)]

    slide = ad.AnnData(
        obs=pd.DataFrame(
            {"array_row": row, "array_col": column, "domain": [DOMAINS[index].name for index in domain]},
            index=[f"{x}x{y}" for x, y in zip(column, row, strict=True)],
        ),
        var=pd.DataFrame(
            {key: biology[key] for key in ("ambient", "dispersion")},
            index=[f"SIM{gene:03d}" for gene in range(1, len(biology["ambient"]) + 1)],
        ),
        obsm={"spatial": spots_um / um_per_px, "cells": cells},
        varm={key: biology[key] for key in ("profile", "loadings")},
    )
    slide.uns["hinge"] = {
        "name": name,
        "um_per_px": float(um_per_px),
        "spot_pitch_um": SPOT_PITCH_UM,
        "spot_diameter_um": SPOT_DIAMETER_UM,
        "source_format": "h5ad",
    }
    slide.uns["hinge_truth"] = {
        "cell_types": np.array([kind.name for kind in types]),
        "um_per_px": float(um_per_px),
        "depth_sd": LIBRARY_SIZE_SD,
        "smooth_share": SMOOTH_SHARE,
        "smooth_length_um": SMOOTH_LENGTH_UM,
    }
    slide.X = csr_matrix(draw_counts(rng, slide, activity_root(slide)))
    slide.layers["expected"] = (cells @ biology["profile"].T + biology["ambient"]).astype(np.float32)
    return slide
