"""The layout of a simulated tissue: domains, cells, nuclei and holes.

Smooth Gaussian random fields f_d(x) split a section into domains (tumour, stroma, immune, fat) with weights
w_d(x) ∝ exp(f_d(x)). Candidate cells on a jittered lattice are kept with the domain's probability. Their type is drawn
from the domain's mixture, tilted by one more smooth field per cell type. Cells are thinned until no two nuclei overlap
by much (Matérn's second hard-core process).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.spatial import KDTree

from hinge.data.simulate.cell_types import DOMAINS, RASTER_UM, CellType, image_size_um


@dataclass(frozen=True)
class Tissue:
    """The layout of a tissue; fields (h, w) are on the raster."""

    domains: np.ndarray  # (D, h, w) weights, sum 1
    depth_um: np.ndarray  # (h, w) distance to the tissue's edge, negative outside
    fibres_um: np.ndarray  # (2, h, w) position along and across the fibres, which bend
    cells_um: np.ndarray  # (N, 2) x, y
    kinds: np.ndarray  # (N,) index of the cell type
    radii_um: np.ndarray  # (N,) of the nuclei
    holes_um: np.ndarray  # (H, 3) x, y and radius of fat vacuoles and lumens


def lay_out_tissue(rng: np.random.Generator, types: Sequence[CellType], grid: tuple[int, int]) -> Tissue:
    """Lay out domains and place cells for a grid of spots."""
    size_um = image_size_um(grid)
    shape = tuple((size_um[::-1] / RASTER_UM).astype(int))
    y, x = (RASTER_UM * (index + 0.5) for index in np.indices(shape))

    fields = [smooth_field(rng, shape, 350) + 0.5 * smooth_field(rng, shape, 80) for _ in DOMAINS]
    prevalence = np.array([kind.prevalence for kind in DOMAINS]) + rng.normal(0, 0.25, len(DOMAINS))
    # with this factor, one domain dominates at most places and borders are soft
    domains = _softmax(5 * (np.stack(fields) + prevalence[:, None, None]))
    # the edge is within the margin, outside the discs of all spots
    beyond = (np.abs(at - side / 2) - side / 2 + 150 for at, side in zip((x, y), size_um, strict=True))
    depth_um = (
        150
        - np.hypot(*(distance.clip(0) for distance in beyond))
        - (60 + 30 * smooth_field(rng, shape, 120)).clip(10, 90)
    )
    angle = rng.uniform(0, np.pi)
    bend = 90 * smooth_field(rng, shape, 350) + 8 * smooth_field(rng, shape, 60)
    fibres = np.stack([x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle) + bend])

    density = np.tensordot([kind.density for kind in DOMAINS], domains, 1) * (depth_um > 5)
    cells = _scatter(rng, size_um, 7.5, 0.45, density * np.exp(0.3 * smooth_field(rng, shape, 200)))
    holes = _scatter(rng, size_um, 48, 0.2, np.tensordot([kind.holes for kind in DOMAINS], domains, 1))
    fat = domains[-1][raster_index(holes, shape)]
    holes = np.column_stack([holes, (9 + 13 * fat) * np.exp(rng.normal(0, 0.12, len(holes)))])
    if len(holes):
        distance, nearest = KDTree(holes[:, :2]).query(cells)
        cells = cells[distance > holes[nearest, 2]]

    mixture = np.array([kind.mixture[: len(types)] for kind in DOMAINS])
    mixture = np.tensordot((mixture / mixture.sum(1, keepdims=True)).T, domains, 1)
    tilt = np.stack([smooth_field(rng, shape, 160) for _ in types])
    shares = _softmax(np.log(mixture) + tilt).cumsum(0)[(slice(None), *raster_index(cells, shape))]
    kinds = (rng.random(len(cells)) > shares[:-1]).sum(0)
    radii = np.array([kind.radius_um for kind in types])[kinds] * np.exp(rng.normal(0, 0.12, len(cells)))

    # Matérn II: of two nuclei that overlap by more than a third, the later in a random order is removed
    alive = np.ones(len(cells), bool)
    if len(cells):
        pairs = KDTree(cells).query_pairs(1.3 * radii.max(), output_type="ndarray")
        gap = np.linalg.norm(cells[pairs[:, 0]] - cells[pairs[:, 1]], axis=1)
        pairs = pairs[gap < 0.65 * radii[pairs].sum(1)]
        order = rng.permutation(len(cells))
        alive[np.where(order[pairs[:, 0]] > order[pairs[:, 1]], pairs[:, 0], pairs[:, 1])] = False
    return Tissue(domains, depth_um, fibres, cells[alive], kinds[alive], radii[alive], holes)


def smooth_field(rng: np.random.Generator, shape: tuple[int, ...], length_um: float) -> np.ndarray:
    """Return a Gaussian random field (h, w) of mean 0 and variance 1: white noise blurred by `length_um` / 2."""
    sigma = length_um / 2 / RASTER_UM
    pad = int(np.ceil(3 * sigma))  # so that the edges vary as much as the middle
    noise = rng.standard_normal([side + 2 * pad for side in shape], np.float32)
    field = gaussian_filter(noise, sigma, truncate=3)[pad : pad + shape[0], pad : pad + shape[1]]
    return field * (2 * np.sqrt(np.pi) * sigma)  # the kernel's squares sum to 1 / (4πσ²)


def _scatter(
    rng: np.random.Generator, size_um: np.ndarray, spacing_um: float, jitter: float, density: np.ndarray
) -> np.ndarray:
    """Return points (N, 2) of a jittered lattice, each kept with the raster's probability at its place."""
    x, y = np.meshgrid(*(np.arange(spacing_um / 2, side, spacing_um) for side in size_um))
    x[::2] += spacing_um / 2
    points = np.column_stack([x.ravel(), y.ravel()])
    points = (points + rng.uniform(-jitter, jitter, points.shape) * spacing_um).clip(0, size_um)
    return points[rng.random(len(points)) < density[raster_index(points, density.shape)]]


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(0))
    return weights / weights.sum(0)


def raster_index(points_um: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return row and column of the raster's cell that contains each point (x, y)."""
    column, row = (points_um / RASTER_UM).astype(int).T
    return row.clip(0, shape[0] - 1), column.clip(0, shape[1] - 1)
