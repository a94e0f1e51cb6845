"""Cell types and tissue domains of the simulation, and its physical scales."""

from dataclasses import dataclass

import numpy as np

SPOT_PITCH_UM, SPOT_DIAMETER_UM = 200.0, 100.0
MARGIN_UM = 200.0  # from the outermost spots' centres to the image's edge
RASTER_UM = 20.0  # step of the grid on which smooth fields live
N_PROGRAMS = 3
# between patients, of natural logarithms: of each gene by itself, and of all genes together
PATIENT_SD, PATIENT_DEPTH_SD = 0.6, 0.7
LIBRARY_SIZE_SD, SMOOTH_SHARE, SMOOTH_LENGTH_UM = 0.3, 0.5, 500.0  # τ, ρ, ℓ above


@dataclass(frozen=True)
class CellType:
    """The appearance of the nuclei of a cell type, and the relative amount of RNA in a cell."""

    name: str
    radius_um: float  # of the circle with the nucleus's area
    elongation: float  # long axis over short axis
    stain: float  # hematoxylin at the rim
    vesicular: float  # share of it that the centre lacks
    chromatin: float  # contrast of the grain
    rna: float


@dataclass(frozen=True)
class Domain:
    """The cell types of a region of the tissue, and the appearance of the ground between nuclei."""

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


def image_size_um(grid: tuple[int, int]) -> np.ndarray:
    """Return width and height of the image around a grid of (rows, columns) spots."""
    return 2 * MARGIN_UM + SPOT_PITCH_UM * (np.array(grid)[::-1] - 1)
