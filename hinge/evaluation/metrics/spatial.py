"""Spatial structure of drawn maps against that of the measured ones."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hinge.evaluation.metrics.accuracy import CONSTANT_SHARE, as_matrix, constant_genes, gene_pcc
from hinge.evaluation.metrics.calibration import check_draws
from hinge.utils.errors import DataError

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

# neighbours lie within this many pitches: the 4 of a square lattice (the next are at 1.41) and the 6 of a
# hexagonal one (the next are at 1.73), with a tolerance for spots that are a little off the lattice
_REACH = 1.25
_PIXELS_PER_PITCH = 2  # of the raster that maps are compared on; rows of a hexagonal lattice interleave
_WINDOW = 7  # pixels a side of the SSIM's window, 3.5 spots


def lattice_pitch(coordinates: ArrayLike) -> float:
    """Return the median distance of a spot to the nearest other one, NaN for a single spot.

    Parameters
    ----------
    coordinates
        Position of each spot (n, 2), in any unit.
    """
    coordinates = as_matrix(coordinates, "the coordinates")
    if len(coordinates) < 2:
        return float("nan")
    from scipy.spatial import KDTree

    distance = KDTree(coordinates).query(coordinates, k=2)[0][:, 1]
    pitch = float(np.median(distance))
    if pitch <= 0:
        raise DataError("spots have no pitch: most of them lie at the place of another")
    return pitch


def neighbour_weights(coordinates: ArrayLike) -> "csr_matrix":
    """Return weights between neighbours on the spot lattice; those of each spot sum to 1.

    Parameters
    ----------
    coordinates
        Position of each spot (n, 2), in any unit.

    Returns
    -------
    csr_matrix
        (n, n): 1 / (number of neighbours) for the spots within 1.25 pitches; an isolated spot's row is empty.
    """
    from scipy.sparse import csr_matrix
    from scipy.spatial import KDTree

    coordinates = as_matrix(coordinates, "the coordinates")
    n = len(coordinates)
    if n < 2:
        return csr_matrix((n, n))
    pairs = KDTree(coordinates).query_pairs(_REACH * lattice_pitch(coordinates), output_type="ndarray")
    rows, columns = np.concatenate([pairs, pairs[:, ::-1]]).T
    count = np.bincount(rows, minlength=n)
    return csr_matrix((1.0 / count[rows], (rows, columns)), shape=(n, n))


def morans_i(values: ArrayLike, weights: "csr_matrix") -> NDArray[np.float64]:
    """Return Moran's I of each gene's map: about 0 without spatial pattern, towards 1 for a smooth one.

    Parameters
    ----------
    values
        Values (n, G).
    weights
        (n, n) of `neighbour_weights`.

    Returns
    -------
    ndarray
        (G,). NaN for constant genes, and for all where no spot has a neighbour.
    """
    values = as_matrix(values, "the expression")
    if weights.shape != (len(values), len(values)):
        raise DataError(f"weights between {weights.shape[0]} spots do not fit the expression of {len(values)}")
    constant, total = constant_genes(values), weights.sum()
    if total == 0:
        return np.full(values.shape[1], np.nan)
    # `scanpy.metrics.morans_i` gives the same numbers, but importing scanpy takes longer than everything else here
    values = values - values.mean(axis=0)
    square = (values**2).sum(axis=0)
    square[constant] = np.nan
    return len(values) / total * (values * (weights @ values)).sum(axis=0) / square


def moran_scores(measured: ArrayLike, draws: ArrayLike, coordinates: ArrayLike) -> dict[str, float]:
    """Return the spatial autocorrelation of drawn maps against that of the measured ones.

    Parameters
    ----------
    measured
        Values (n, G) in transform units.
    draws
        Values (K, n, G). Each draw is scored by itself: the mean of the draws is smoother than any of them.
    coordinates
        (n, 2), in any unit.

    Returns
    -------
    dict
        `measured` and `draw`, Moran's I of the measured slide and of a draw (mean over draws), mean over the
        genes that vary in the measured slide, a gene constant in a draw counting 0; `ratio`, the second over
        the first; `r`, Pearson correlation over genes of the two. NaN where there is nothing to compare.
    """
    measured, draws = check_draws(measured, draws)
    weights = neighbour_weights(_coordinates(coordinates, len(measured)))
    truth = morans_i(measured, weights)
    known = np.isfinite(truth)
    if not known.any():
        return dict.fromkeys(("measured", "draw", "ratio", "r"), float("nan"))
    drawn = np.mean([np.nan_to_num(morans_i(draw, weights), nan=0.0) for draw in draws], axis=0)
    truth, drawn = truth[known], drawn[known]
    # a ratio to a map without pattern is not defined
    patterned = truth.mean() > 0
    return {
        "measured": float(truth.mean()),
        "draw": float(drawn.mean()),
        "ratio": float(drawn.mean() / truth.mean()) if patterned else float("nan"),
        "r": float(gene_pcc(truth[:, None], drawn[:, None])[0]),
    }


def spot_structure(measured: ArrayLike, draws: ArrayLike) -> float:
    """Return the spot-spot structural correlation (SSC) of draws.

    It is the Pearson correlation, over pairs of different spots, between the spot-spot correlation matrices of the
    measured slide and of a draw, mean over draws. Each gene's mean over the spots is subtracted before spots are
    correlated over genes; otherwise genes that are abundant everywhere would make all spots similar.

    Parameters
    ----------
    measured
        Values (n, G) in transform units.
    draws
        Values (K, n, G).

    Returns
    -------
    float
        NaN with fewer than three spots or two genes, or where all measured spots are the same. A spot without
        variation in a draw has correlation 0 with every other spot.
    """
    measured, draws = check_draws(measured, draws)
    n_spots, n_genes = measured.shape
    if n_spots < 3 or n_genes < 2:
        return float("nan")
    truth = _standardised_spots(measured)
    square = _mean_product_of_pairs(truth, truth)
    return float(np.mean([_correlation_of_products(truth, square, _standardised_spots(draw)) for draw in draws]))


def _standardised_spots(values: NDArray) -> NDArray[np.float64]:
    """Return vectors (n, G) whose products are the correlations of spots, 0 for a spot without variation."""
    values = np.asarray(values, dtype=np.float64)
    values = values - values.mean(axis=0)
    values -= values.mean(axis=1, keepdims=True)
    size = np.linalg.norm(values, axis=1, keepdims=True)
    return np.divide(values, size, out=np.zeros_like(values), where=size > 1e-9)


def _correlation_of_products(one: NDArray, square: float, other: NDArray) -> float:
    """Return the correlation, over pairs of different spots, between x_s · x_t of two arrays (n, G).

    `square` is the mean over pairs of the square of x_s · x_t of the first.
    """
    n_pairs = len(one) * (len(one) - 1)
    mean = [(np.square(values.sum(axis=0)).sum() - np.square(values).sum()) / n_pairs for values in (one, other)]
    squares = (square, _mean_product_of_pairs(other, other))
    spread = [np.sqrt(max(squared - average**2, 0.0)) for squared, average in zip(squares, mean, strict=True)]
    if min(spread) <= CONSTANT_SHARE:  # of products that are correlations, at most 1
        return float("nan") if spread[0] <= CONSTANT_SHARE else 0.0
    product = _mean_product_of_pairs(one, other)
    return float(np.clip((product - mean[0] * mean[1]) / (spread[0] * spread[1]), -1.0, 1.0))


def _mean_product_of_pairs(one: NDArray, other: NDArray) -> float:
    """Return the mean of (x_s · x_t)(y_s · y_t) over pairs of different spots of two arrays (n, G).

    Sums over all pairs of spots follow from products of genes, Σ (x_s · x_t)(y_s · y_t) = |Xᵀ Y|², so that neither time
    nor memory grows with the square of the spots.
    """
    of_a_spot = [np.einsum("sg,sg->s", values, values) for values in (one, other)]
    return float((np.square(one.T @ other).sum() - of_a_spot[0] @ of_a_spot[1]) / (len(one) * (len(one) - 1)))


def ssim_of_maps(measured: ArrayLike, predicted: ArrayLike, coordinates: ArrayLike) -> float:
    """Return the structural similarity (SSIM) of predicted and measured maps, mean over genes.

    Maps are rasterised at half the pitch, each pixel with the value of the nearest spot; the SSIM of a
    7 x 7 window is averaged over the pixels within the tissue. The data range is the gene's measured one.

    Parameters
    ----------
    measured
        Values (n, G).
    predicted
        One prediction (n, G), or draws (K, n, G), each scored by itself.
    coordinates
        (n, 2), in any unit.

    Returns
    -------
    float
        At most 1. NaN where every gene is constant in the measured slide, or the slide is smaller than the
        window.
    """
    from scipy.spatial import KDTree
    from skimage.metrics import structural_similarity

    measured, predicted = as_matrix(measured, "the measured slide"), np.asarray(predicted, dtype=np.float64)
    measured, draws = check_draws(measured, predicted[None] if predicted.ndim == 2 else predicted)
    coordinates = _coordinates(coordinates, len(measured))
    varies = ~constant_genes(measured)
    if len(measured) < 2 or not varies.any():
        return float("nan")
    step = lattice_pitch(coordinates) / _PIXELS_PER_PITCH
    size = np.floor(np.ptp(coordinates, axis=0) / step + 1e-6).astype(int) + 1
    if size.min() < _WINDOW:
        return float("nan")
    grid = np.stack(np.meshgrid(*(np.arange(side) for side in size), indexing="ij"), axis=-1) * step
    distance, nearest = KDTree(coordinates - coordinates.min(axis=0)).query(grid)
    inside = distance <= _PIXELS_PER_PITCH * step
    scores = []
    for gene in np.flatnonzero(varies):
        truth = measured[nearest, gene]
        for draw in draws:
            _, similarity = structural_similarity(
                truth, draw[:, gene][nearest], win_size=_WINDOW, data_range=np.ptp(measured[:, gene]), full=True
            )
            scores.append(similarity[inside].mean())
    return float(np.mean(scores))


def _coordinates(coordinates: ArrayLike, n_spots: int) -> NDArray[np.float64]:
    coordinates = as_matrix(coordinates, "the coordinates")
    if coordinates.shape != (n_spots, 2):
        raise DataError(f"coordinates must be of shape ({n_spots}, 2), not {coordinates.shape}")
    return coordinates
