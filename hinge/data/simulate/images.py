"""The H&E image of a simulated tissue.

Each cell type has nuclei of its own size, elongation, darkness and chromatin; each domain its own eosin, fibres and
holes. The image follows Beer–Lambert's law from a hematoxylin and an eosin plane, with stain vectors that differ
slightly between slides.
"""

from collections.abc import Sequence

import numpy as np
from scipy.ndimage import gaussian_filter

from hinge.data.simulate.cell_types import DOMAINS, RASTER_UM, CellType
from hinge.data.simulate.tissue import Tissue, raster_index, smooth_field


def render_image(rng: np.random.Generator, tissue: Tissue, types: Sequence[CellType], um_per_px: float) -> np.ndarray:
    """Return the H&E image of a tissue, (height, width, 3) uint8."""
    raster = tissue.depth_um.shape
    shape = tuple(round(side * RASTER_UM / um_per_px) for side in raster)
    grain = _tile(rng, 0.7, 0.7)

    def looks(name: str) -> np.ndarray:
        return np.array([getattr(kind, name) for kind in types])[tissue.kinds]

    n_cells, n_holes = len(tissue.kinds), len(tissue.holes_um)
    at = raster_index(tissue.cells_um, raster)
    down, right = (slope[at] for slope in np.gradient(tissue.fibres_um[1]))
    # long nuclei are parallel to the fibres, others have random angles
    turn = np.where(looks("elongation") > 2, 0.3, np.pi)
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
    cloud = 0.7 * smooth_field(rng, raster, 80) + 0.7 * smooth_field(rng, raster, 300)
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
    """Return periodic noise (512, 512) of mean 0 and variance 1, blurred by `down` and `right` pixels."""
    tile = gaussian_filter(rng.standard_normal((512, 512), np.float32), (down, right), mode="wrap")
    return tile / tile.std()


def _interpolation(n_pixels: int, n_raster: int) -> np.ndarray:
    """Return weights (n_pixels, n_raster) of linear interpolation from raster cells to pixels along one axis."""
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
