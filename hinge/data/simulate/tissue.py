"""Simulated tissue: slides whose true distribution of expression given the image is known.

They need no download, take about two seconds each, and tell how good a prediction could be at best.

**What the image shows.** Smooth Gaussian random fields f_d(x) split a section into domains (tumour, stroma,
immune, fat) with weights w_d(x) ∝ exp(f_d(x)). Candidate cells on a jittered lattice are kept with the
domain's probability, typed from the domain's mixture tilted by one more smooth field per cell type, and
thinned until no two nuclei overlap much (Matérn's second hard-core process). Each cell type has nuclei of its
own size, elongation, darkness and chromatin; each domain its own eosin, fibres and holes. The picture follows
Beer–Lambert's law from a hematoxylin and an eosin plane, with stain vectors that differ a little by slide.

**What it does not show.** With c_sk cells of type k in the disc of spot s, gene g has the count

    y_sg ~ Poisson(r_sg γ_sg),  γ_sg ~ Gamma(shape θ_g, mean 1)        (so y is negative binomial)
    r_sg = δ_s (b_g + Σ_k c_sk M_kg F_skg)
    F_skg = exp(Σ_p L_kpg a_sp − ½ Σ_p L_kpg²)                         (gene programs p)
    δ_s = exp(τ u_s − ½ τ²)                                            (sequencing depth)

M are the cell types' mean profiles (log-normal, marker genes up), b is ambient RNA, L the programs' loadings,
a and u are hidden activities: each is independent of the image and of the others, standard normal at every
spot, and over the spots of a slide a Gaussian process whose correlation at the distance D is

    (1 − ρ) 1[D = 0] + ρ exp(−D / ℓ).

Slides of one seed share M, b, L and θ; each has its own tissue and activities.

**The best possible score.** F, δ and γ are independent of each other and of the image and have mean 1, hence
E[y_sg | image] = b_g + Σ_k c_sk M_kg in closed form: `layers["expected"]`. `oracle_draws` samples y given c,
which is all that a perfect reader of the image could do; a slide's own counts are one such draw.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.sparse import csr_matrix
from scipy.spatial import KDTree
from scipy.spatial.distance import cdist
from tqdm import tqdm

from hinge.utils.errors import ConfigError, DataError
from hinge.utils.files import atomic_path

SPOT_PITCH_UM, SPOT_DIAMETER_UM = 200.0, 100.0
MARGIN_UM = 200.0  # from the outermost spots' centres to the image's edge
RASTER_UM = 20.0  # step of the grid on which smooth fields live
N_PROGRAMS = 3
DEPTH_SD, SMOOTH_SHARE, SMOOTH_LENGTH_UM = 0.3, 0.5, 500.0  # τ, ρ, ℓ above
MAX_PIXELS = 400_000_000


@dataclass(frozen=True)
class CellType:
    """How the nuclei of a cell type look, and how much RNA a cell holds beside the others."""

    name: str
    radius_um: float  # of the circle with the nucleus's area
    elongation: float  # long axis over short axis
    stain: float  # hematoxylin at the rim
    vesicular: float  # share of it that the centre lacks
    chromatin: float  # contrast of the grain
    rna: float


@dataclass(frozen=True)
class Domain:
    """What fills a region of the tissue, and the ground between its nuclei."""

    name: str
    prevalence: float  # added to the domain's random field
    mixture: tuple[float, ...]  # share of each of the CELL_TYPES
    density: float  # share of the candidate cells that is kept
    eosin: float
    hematoxylin: float
    fibres: float  # contrast of the eosin's streaks
    holes: float  # share of the candidate vacuoles and lumens that is kept


CELL_TYPES = (
    CellType("tumour", 4.6, 1.25, 1.45, 0.40, 0.30, 1.8),
    CellType("fibroblast", 3.3, 3.2, 1.25, 0.10, 0.15, 1.0),
    CellType("lymphocyte", 3.0, 1.08, 2.00, 0.05, 0.10, 0.6),
    CellType("macrophage", 4.4, 1.5, 0.80, 0.30, 0.25, 1.4),
    CellType("endothelial", 2.8, 2.2, 1.50, 0.05, 0.10, 0.9),
    CellType("plasma", 3.6, 1.15, 1.70, 0.35, 0.55, 1.6),
)
DOMAINS = (
    Domain("tumour", 0.3, (0.80, 0.05, 0.05, 0.06, 0.03, 0.01), 0.80, 0.42, 0.24, 0.30, 0.04),
    Domain("stroma", 0.4, (0.04, 0.62, 0.07, 0.11, 0.13, 0.03), 0.24, 0.42, 0.07, 0.75, 0.03),
    Domain("immune", -0.3, (0.04, 0.09, 0.66, 0.07, 0.04, 0.10), 0.95, 0.34, 0.18, 0.30, 0.01),
    Domain("fat", -0.5, (0.02, 0.33, 0.10, 0.25, 0.28, 0.02), 0.25, 0.30, 0.04, 0.40, 0.97),
)


def simulate_tissue(
    folder: str | Path,
    n_slides: int = 4,
    grid: tuple[int, int] = (16, 16),
    n_genes: int = 300,
    n_cell_types: int = 5,
    seed: int = 0,
    um_per_px: float = 1.0,
    with_image: bool = True,
    first: int = 0,
) -> list[Path]:
    """Write simulated slides `sim<first>.h5ad`, `sim<first + 1>.h5ad`, …, each with a `.jpg` image beside it.

    A slide depends on `seed` and its own number, not on how many there are. Slides of one seed share cell
    types and gene programs: give slides for masked pre-training numbers of their own through `first`, and
    they tell the biology but nothing else about the slides to test on.

    Parameters
    ----------
    folder
        Where the files go; made if missing.
    n_slides
        How many slides.
    grid
        Rows and columns of spots (pitch 200 µm, diameter 100 µm), 1 to 64 each.
    n_genes
        Genes, named `SIM001`, `SIM002`, …
    n_cell_types
        How many of `CELL_TYPES` occur, from the first on.
    seed
        Names the biology and, with the slide's number, the slide.
    um_per_px
        Resolution of the image, µm per pixel.
    with_image
        False renders no image; the counts are the same.
    first
        Number of the first slide.

    Returns
    -------
    list of Path
        The h5ad files. Beside what every slide has they hold `layers["expected"]` (n, G) = E[counts | image],
        `obsm["cells"]` (n, K) = number of cells of each type in each spot, `obs["domain"]`, and, for
        `oracle_draws`, `varm["profile"]` (G, K), `varm["loadings"]` (G, K·P), `var["ambient"]`,
        `var["dispersion"]` and `uns["hinge_truth"]`.

    Raises
    ------
    ConfigError
        If an argument is out of its range.
    """
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
        _require_whole(name, value, low, high)
    if not isinstance(um_per_px, int | float) or not 0.2 <= um_per_px <= 4:
        raise ConfigError(f"um_per_px takes a number from 0.2 to 4 µm per pixel, not {um_per_px!r}")
    width, height = _size_um(grid) / um_per_px
    if with_image and width * height > MAX_PIXELS:
        raise ConfigError(
            f"a grid of {grid[0]} x {grid[1]} spots at um_per_px={um_per_px} makes an image of "
            f"{width * height / 1e6:.0f} megapixels; take fewer spots or more µm per pixel (at most "
            f"{MAX_PIXELS // 1_000_000} megapixels)"
        )

    types = CELL_TYPES[:n_cell_types]
    biology = _biology(np.random.default_rng([seed, 0]), types, n_genes)
    paths = []
    for number in tqdm(range(first, first + n_slides), desc="simulate", unit="slide", disable=None):
        # a stream for each part, so that the counts do not depend on whether an image is rendered
        tissue_rng, counts_rng, image_rng = np.random.default_rng([seed, 1, number]).spawn(3)
        tissue = _tissue(tissue_rng, types, grid)
        slide = _slide(counts_rng, f"sim{number}", tissue, biology, types, grid, um_per_px)
        image_path = Path(folder) / f"sim{number}.jpg"
        if with_image:
            slide.uns["hinge"]["image_path"] = image_path.name
            with atomic_path(image_path) as temporary:
                picture = Image.fromarray(_render(image_rng, tissue, types, um_per_px))
                picture.save(temporary, quality=90, subsampling=0)
        else:
            image_path.unlink(missing_ok=True)  # a reader would take another seed's image for this slide's
        paths.append(image_path.with_suffix(".h5ad"))
        with atomic_path(paths[-1]) as temporary:
            slide.write_h5ad(temporary)
    return paths


def oracle_draws(slide: ad.AnnData, n_draws: int, seed: int = 0) -> np.ndarray:
    """Draw counts from their true distribution given the cells in each spot, all spots of a slide jointly.

    Parameters
    ----------
    slide
        A slide of `simulate_tissue`, or some of its spots and genes.
    n_draws
        How many draws.
    seed
        Seed of the draws; no seed repeats the slide's own counts.

    Returns
    -------
    np.ndarray
        (n_draws, n, G) float32 counts.

    Raises
    ------
    DataError
        If the slide is not simulated, or has lost the parameters of the simulation.
    """
    _require_whole("n_draws", n_draws, 1, 1_000_000)
    _require_whole("seed", seed, 0, 2**63)
    rng = np.random.default_rng([seed, 2])
    try:
        root = _activity_root(slide)
        return np.stack([_draw_counts(rng, slide, root) for _ in range(n_draws)])
    except KeyError as error:
        raise DataError(f"oracle_draws needs a slide of simulate_tissue; this one has no {error}") from error


def _require_whole(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(f"{name} takes a whole number from {low} to {high}, not {value!r}")


def _size_um(grid: tuple[int, int]) -> np.ndarray:
    """Width and height of the image around a grid of (rows, columns) spots."""
    return 2 * MARGIN_UM + SPOT_PITCH_UM * (np.array(grid)[::-1] - 1)


# ------------------------------------------------------------------------------------------------- expression


def _biology(rng: np.random.Generator, types: Sequence[CellType], n_genes: int) -> dict[str, np.ndarray]:
    """Parameters that all slides share: M (G, K), L (G, K·P), b (G,), θ (G,)."""
    level = rng.normal(0, 0.6, (n_genes, 1))
    fold = rng.normal(0, 0.4, (n_genes, len(types)))
    marker = np.where(rng.random(n_genes) < 0.7, rng.uniform(1.2, 3.0, n_genes), 0)
    fold[np.arange(n_genes), rng.integers(len(types), size=n_genes)] += marker
    profile = np.exp(level + fold)
    # a fifth of a count per gene and cell: a few thousand counts a spot over 300 genes
    profile *= 0.2 * np.array([kind.rna for kind in types]) / profile.mean(0)
    # a program moves a gene alike in all cell types, and in some of them more or the other way
    shape = (n_genes, len(types), N_PROGRAMS)
    loadings = rng.normal(0, 0.22, (n_genes, 1, N_PROGRAMS))
    loadings = loadings + rng.normal(0, 0.3, shape) * (rng.random(shape) < 0.5)
    return {
        "profile": profile,
        "loadings": loadings.reshape(n_genes, -1),
        "ambient": 1.5 * profile.mean(1),
        "dispersion": np.exp(rng.normal(np.log(20), 0.4, n_genes)),
    }


def _activity_root(slide: ad.AnnData) -> np.ndarray:
    """Cholesky root (n, n) of the hidden activities' correlation over the spots."""
    truth = slide.uns["hinge_truth"]
    spots_um = np.asarray(slide.obsm["spatial"]) * truth["um_per_px"]
    correlation = truth["smooth_share"] * np.exp(-cdist(spots_um, spots_um) / truth["smooth_length_um"])
    return np.linalg.cholesky(correlation + (1 - truth["smooth_share"]) * np.eye(len(spots_um)))


def _draw_counts(rng: np.random.Generator, slide: ad.AnnData, root: np.ndarray) -> np.ndarray:
    """One draw (n, G) float32 of all spots' counts; the formulas are the module's."""
    cells, profile = slide.obsm["cells"], slide.varm["profile"]
    loadings = np.asarray(slide.varm["loadings"]).reshape(slide.n_vars, cells.shape[1], -1)
    hidden = root @ rng.standard_normal((slide.n_obs, loadings.shape[2] + 1))
    activity, depth = hidden[:, :-1], hidden[:, -1:]
    rate = np.tile(slide.var["ambient"].to_numpy(), (slide.n_obs, 1))
    for k in range(cells.shape[1]):
        program = np.exp(activity @ loadings[:, k].T - 0.5 * (loadings[:, k] ** 2).sum(1))
        rate += cells[:, [k]] * profile[:, k] * program
    depth_sd = slide.uns["hinge_truth"]["depth_sd"]
    rate *= np.exp(depth_sd * depth - 0.5 * depth_sd**2)
    dispersion = slide.var["dispersion"].to_numpy()
    return rng.poisson(rate * rng.gamma(dispersion, size=rate.shape) / dispersion).astype(np.float32)


def _slide(
    rng: np.random.Generator,
    name: str,
    tissue: "Tissue",
    biology: dict[str, np.ndarray],
    types: Sequence[CellType],
    grid: tuple[int, int],
    um_per_px: float,
) -> ad.AnnData:
    """Lay the grid of spots on a tissue, count the cells in each and draw the counts."""
    row, column = (index.ravel() for index in np.indices(grid))
    spots_um = MARGIN_UM + SPOT_PITCH_UM * np.column_stack([column, row])
    distance, spot = KDTree(spots_um).query(tissue.cells_um)
    inside = distance <= SPOT_DIAMETER_UM / 2
    cells = np.zeros((len(spots_um), len(types)), np.float32)
    np.add.at(cells, (spot[inside], tissue.kinds[inside]), 1)
    domain = tissue.domains.argmax(0)[_raster_index(spots_um, tissue.depth_um.shape)]

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
        "depth_sd": DEPTH_SD,
        "smooth_share": SMOOTH_SHARE,
        "smooth_length_um": SMOOTH_LENGTH_UM,
    }
    slide.X = csr_matrix(_draw_counts(rng, slide, _activity_root(slide)))
    slide.layers["expected"] = (cells @ biology["profile"].T + biology["ambient"]).astype(np.float32)
    return slide


# ----------------------------------------------------------------------------------------------------- tissue


@dataclass(frozen=True)
class Tissue:
    """What is on the glass; fields (h, w) lie on the raster."""

    domains: np.ndarray  # (D, h, w) weights, sum 1
    depth_um: np.ndarray  # (h, w) distance to the tissue's edge, negative outside
    fibres_um: np.ndarray  # (2, h, w) position along and across the fibres, which bend
    cells_um: np.ndarray  # (N, 2) x, y
    kinds: np.ndarray  # (N,) index of the cell type
    radii_um: np.ndarray  # (N,) of the nuclei
    holes_um: np.ndarray  # (H, 3) x, y and radius of fat vacuoles and lumens


def _tissue(rng: np.random.Generator, types: Sequence[CellType], grid: tuple[int, int]) -> Tissue:
    """Lay out domains and place cells for a grid of spots."""
    size_um = _size_um(grid)
    shape = tuple((size_um[::-1] / RASTER_UM).astype(int))
    y, x = (RASTER_UM * (index + 0.5) for index in np.indices(shape))

    fields = [_smooth_field(rng, shape, 350) + 0.5 * _smooth_field(rng, shape, 80) for _ in DOMAINS]
    prevalence = np.array([kind.prevalence for kind in DOMAINS]) + rng.normal(0, 0.25, len(DOMAINS))
    # the factor makes mostly one domain at a place, with soft borders
    domains = _softmax(5 * (np.stack(fields) + prevalence[:, None, None]))
    # the edge winds through the margin and spares the discs of all spots
    beyond = (np.abs(at - side / 2) - side / 2 + 150 for at, side in zip((x, y), size_um, strict=True))
    depth_um = (
        150
        - np.hypot(*(distance.clip(0) for distance in beyond))
        - (60 + 30 * _smooth_field(rng, shape, 120)).clip(10, 90)
    )
    angle = rng.uniform(0, np.pi)
    bend = 90 * _smooth_field(rng, shape, 350) + 8 * _smooth_field(rng, shape, 60)
    fibres = np.stack([x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle) + bend])

    density = np.tensordot([kind.density for kind in DOMAINS], domains, 1) * (depth_um > 5)
    cells = _scatter(rng, size_um, 7.5, 0.45, density * np.exp(0.3 * _smooth_field(rng, shape, 200)))
    holes = _scatter(rng, size_um, 48, 0.2, np.tensordot([kind.holes for kind in DOMAINS], domains, 1))
    fat = domains[-1][_raster_index(holes, shape)]
    holes = np.column_stack([holes, (9 + 13 * fat) * np.exp(rng.normal(0, 0.12, len(holes)))])
    if len(holes):
        distance, nearest = KDTree(holes[:, :2]).query(cells)
        cells = cells[distance > holes[nearest, 2]]

    mixture = np.array([kind.mixture[: len(types)] for kind in DOMAINS])
    mixture = np.tensordot((mixture / mixture.sum(1, keepdims=True)).T, domains, 1)
    tilt = np.stack([_smooth_field(rng, shape, 160) for _ in types])
    shares = _softmax(np.log(mixture) + tilt).cumsum(0)[(slice(None), *_raster_index(cells, shape))]
    kinds = (rng.random(len(cells)) > shares[:-1]).sum(0)
    radii = np.array([kind.radius_um for kind in types])[kinds] * np.exp(rng.normal(0, 0.12, len(cells)))

    # Matérn II: of two nuclei that overlap by more than a third, the later in a random order goes
    alive = np.ones(len(cells), bool)
    if len(cells):
        pairs = KDTree(cells).query_pairs(1.3 * radii.max(), output_type="ndarray")
        gap = np.linalg.norm(cells[pairs[:, 0]] - cells[pairs[:, 1]], axis=1)
        pairs = pairs[gap < 0.65 * radii[pairs].sum(1)]
        order = rng.permutation(len(cells))
        alive[np.where(order[pairs[:, 0]] > order[pairs[:, 1]], pairs[:, 0], pairs[:, 1])] = False
    return Tissue(domains, depth_um, fibres, cells[alive], kinds[alive], radii[alive], holes)


def _smooth_field(rng: np.random.Generator, shape: tuple[int, ...], length_um: float) -> np.ndarray:
    """Gaussian random field (h, w) of mean 0 and variance 1: white noise blurred by `length_um` / 2."""
    sigma = length_um / 2 / RASTER_UM
    pad = int(np.ceil(3 * sigma))  # so that the edges vary as much as the middle
    noise = rng.standard_normal([side + 2 * pad for side in shape], np.float32)
    field = gaussian_filter(noise, sigma, truncate=3)[pad : pad + shape[0], pad : pad + shape[1]]
    return field * (2 * np.sqrt(np.pi) * sigma)  # the kernel's squares sum to 1 / (4πσ²)


def _scatter(
    rng: np.random.Generator, size_um: np.ndarray, spacing_um: float, jitter: float, density: np.ndarray
) -> np.ndarray:
    """Points (N, 2) of a jittered lattice, each kept with the raster's probability at its place."""
    x, y = np.meshgrid(*(np.arange(spacing_um / 2, side, spacing_um) for side in size_um))
    x[::2] += spacing_um / 2
    points = np.column_stack([x.ravel(), y.ravel()])
    points = (points + rng.uniform(-jitter, jitter, points.shape) * spacing_um).clip(0, size_um)
    return points[rng.random(len(points)) < density[_raster_index(points, density.shape)]]


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(0))
    return weights / weights.sum(0)


def _raster_index(points_um: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of the raster's cell in which each point (x, y) lies."""
    column, row = (points_um / RASTER_UM).astype(int).T
    return row.clip(0, shape[0] - 1), column.clip(0, shape[1] - 1)


# ------------------------------------------------------------------------------------------------------ image


def _render(rng: np.random.Generator, tissue: Tissue, types: Sequence[CellType], um_per_px: float) -> np.ndarray:
    """Paint the tissue: (height, width, 3) uint8."""
    raster = tissue.depth_um.shape
    shape = tuple(round(side * RASTER_UM / um_per_px) for side in raster)
    grain = _tile(rng, 0.7, 0.7)

    def looks(name: str) -> np.ndarray:
        return np.array([getattr(kind, name) for kind in types])[tissue.kinds]

    n_cells, n_holes = len(tissue.kinds), len(tissue.holes_um)
    at = _raster_index(tissue.cells_um, raster)
    down, right = (slope[at] for slope in np.gradient(tissue.fibres_um[1]))
    turn = np.where(looks("elongation") > 2, 0.3, np.pi)  # long nuclei lie along the fibres, others anyhow
    nuclei = _stamp(
        shape,
        tissue.cells_um / um_per_px,
        tissue.radii_um / um_per_px,
        elongation=looks("elongation") * np.exp(rng.normal(0, 0.12, n_cells)),
        angle=np.arctan2(down, right) + np.pi / 2 + turn * rng.uniform(-1, 1, n_cells),
        skew=rng.normal(0, 0.08, (2, n_cells)),
        tone=looks("stain") * np.exp(rng.normal(0, 0.15, n_cells)),
        vesicular=looks("vesicular"),
        contrast=looks("chromatin"),
        texture=grain,
    )
    holes = _stamp(
        shape,
        tissue.holes_um[:, :2] / um_per_px,
        tissue.holes_um[:, 2] / um_per_px,
        elongation=1.15,
        angle=rng.uniform(0, np.pi, n_holes),
        skew=rng.normal(0, 0.12, (2, n_holes)),
        tone=0.95,
        texture=grain,
    )

    # the ground between: eosin streaked along the fibres, hematoxylin, both thicker in places
    streaks = 0.6 * _tile(rng, 1.2, 9) + 0.6 * _tile(rng, 4, 20) + 0.5 * _tile(rng, 12, 40)
    cloud = 0.7 * _smooth_field(rng, raster, 80) + 0.7 * _smooth_field(rng, raster, 300)
    ground = [[kind.eosin, kind.hematoxylin, kind.fibres] for kind in DOMAINS]
    eosin, hematoxylin, fibres = np.tensordot(np.transpose(ground), tissue.domains, 1)
    log_eosin, log_hematoxylin = np.log(eosin) + 0.35 * fibres * cloud, np.log(hematoxylin) + 0.3 * cloud
    fields = np.stack([log_eosin, log_hematoxylin, fibres, tissue.depth_um, *tissue.fibres_um])
    rows, columns = (_interpolation(*sides) for sides in zip(shape, raster, strict=True))
    fields = fields.astype(np.float32) @ columns.T

    # Beer–Lambert: stain vectors near Ruifrok and Johnston's (2001), strengths and lamp differ by slide
    stains = np.array([[0.65, 0.70, 0.29], [0.18, 0.86, 0.45]]) * np.exp(rng.normal(0, 0.05, (2, 3)))
    stains = (stains * np.exp(rng.normal(0, 0.10, (2, 1)))).astype(np.float32)
    lamp = rng.uniform(240, 250, 3).astype(np.float32)
    picture = np.empty((*shape, 3), np.uint8)
    for start in range(0, shape[0], 64):  # in bands that fit the processor's cache
        band = slice(start, start + 64)
        log_eosin, log_hematoxylin, fibres, depth_um, along, across = rows[band] @ fields
        noise = grain[np.ix_(np.arange(start, start + len(along)) % 512, np.arange(shape[1]) % 512)]
        fibre = streaks[across.astype(np.int32) % 512, along.astype(np.int32) % 512]
        present = (depth_um / 8).clip(0, 1) * (1 - holes[band])
        eosin = present * np.exp(log_eosin + 0.35 * fibres * fibre + 0.06 * noise)
        eosin *= 1 - 0.5 * nuclei[band].clip(0, 1)
        hematoxylin = present * np.exp(log_hematoxylin + 0.2 * fibre + 0.15 * noise) + nuclei[band]
        for channel, (h, e) in enumerate(stains.T):
            light = lamp[channel] * np.exp(-h * hematoxylin - e * eosin)
            picture[band, :, channel] = (light + noise).clip(0, 255)
    return picture


def _tile(rng: np.random.Generator, down: float, right: float) -> np.ndarray:
    """Noise (512, 512) of mean 0 and variance 1, blurred by so many pixels, whose edges meet."""
    tile = gaussian_filter(rng.standard_normal((512, 512), np.float32), (down, right), mode="wrap")
    return tile / tile.std()


def _interpolation(n_pixels: int, n_raster: int) -> np.ndarray:
    """Weights (n_pixels, n_raster) of linear interpolation from raster cells to pixels along one axis."""
    place = ((np.arange(n_pixels) + 0.5) * n_raster / n_pixels - 0.5).clip(0, n_raster - 1)
    return (1 - np.abs(place[:, None] - np.arange(n_raster))).clip(0).astype(np.float32)


def _stamp(
    shape: tuple[int, int],
    centres: np.ndarray,
    radii: np.ndarray,
    *,
    elongation: np.ndarray | float,
    angle: np.ndarray,
    skew: np.ndarray,
    tone: np.ndarray | float,
    vesicular: np.ndarray | float = 0.0,
    contrast: np.ndarray | float = 0.0,
    texture: np.ndarray,
) -> np.ndarray:
    """Paint N eggs on a plane (height, width) of zeros, the strongest on top.

    An egg has the area π·radius² (px), `elongation` = long over short axis, and is skewed along and across
    by `skew` (2, N). It has the value `tone` at its rim, less by the share `vesicular` in the middle, and is
    modulated by `contrast` times the periodic `texture`.
    """
    major, minor = radii * np.sqrt(elongation), radii / np.sqrt(elongation)
    pad = 2 + int(np.ceil(1.4 * major.max(initial=0)))  # eggs may reach over the plane's edge
    plane = np.zeros((shape[0] + 2 * pad, shape[1] + 2 * pad), np.float32)
    numbers = [np.cos(angle), np.sin(angle), major, minor, *skew, tone, vesicular, contrast]
    numbers = np.array(np.broadcast_arrays(*numbers), np.float32)[..., None, None]
    order = np.argsort(major)  # neighbours in this order share a window
    for part in np.split(order, range(512, len(order), 512)):
        reach = 1 + int(np.ceil(1.4 * major[part].max(initial=0)))
        window = np.arange(-reach, reach + 1)
        corner = np.floor(centres[part]).astype(int)
        x, y = (window + 0.5 - (centres[part] - corner).T[..., None]).astype(np.float32)
        x, y = x[:, None, :], y[:, :, None]
        cos, sin, a, b, skew_u, skew_v, rim, pale, rough = numbers[:, part]
        u, v = (cos * x + sin * y) / a, (cos * y - sin * x) / b
        distance = np.sqrt(u * u + v * v) * (1 + skew_u * u + skew_v * v).clip(0.75)
        value = rim * ((1 - distance) * b + 0.5).clip(0, 1) * (1 - pale * (1 - distance**2).clip(0))
        column, row = corner.T[..., None] + pad + window
        row, column = row[:, :, None], column[:, None, :]
        value *= 1 + rough * texture[row % 512, column % 512]
        drawn = value > 0
        np.maximum.at(plane.reshape(-1), (row * plane.shape[1] + column)[drawn], value[drawn])
    return plane[pad:-pad, pad:-pad]
