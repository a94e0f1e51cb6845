"""The expected value of log2(count + 1) in the spots of a simulated slide, without random numbers."""

from itertools import product

import anndata as ad
import numpy as np
from numpy.polynomial.hermite_e import hermegauss
from numpy.typing import NDArray

_PROGRAM_NODES, _CAPTURE_NODES = 4, 5  # of Gauss-Hermite quadrature, for each hidden activity
_GRID = 1024  # rates of the table of each gene, evenly spaced in the logarithm
_STEP, _LONGEST = 0.1, 4.0  # of the integral over log(t), whose integrand is exp(-exp(4)) at its end


def expected_log_counts(slide: ad.AnnData) -> NDArray[np.float64]:
    """Return E[log2(y + 1)] (n, G) of the counts y given the cells, in the notation of `hinge.data.simulate.counts`.

    The activities of the programs are integrated out by Gauss-Hermite quadrature. The rest depends on the gene and on
    the rate alone and is read from a table by linear interpolation. The error is below 0.002.

    Parameters
    ----------
    slide
        A slide of `simulate_slides`, or some of its spots and genes.

    Raises
    ------
    KeyError
        The slide lacks parameters of the simulation.
    """
    cells, profile = np.asarray(slide.obsm["cells"], dtype=np.float64), np.asarray(slide.varm["profile"])
    loadings = np.asarray(slide.varm["loadings"]).reshape(slide.n_vars, cells.shape[1], -1)
    ambient = slide.var["ambient"].to_numpy()
    nodes, weights = hermegauss(_PROGRAM_NODES)
    # the programs' factors are below exp(|a| Σ|L|)
    highest = np.exp(np.abs(nodes).max() * np.abs(loadings).sum(axis=2).max()) * (cells @ profile.T).max()
    grid = np.linspace(np.log(ambient.min()), np.log(ambient.max() + highest), _GRID)
    table = _table(grid, slide.var["dispersion"].to_numpy(), float(slide.uns["hinge_truth"]["depth_sd"]))
    first = np.arange(slide.n_vars) * _GRID
    slopes, values = np.diff(table, append=table[:, -1:]).ravel(), table.ravel()
    mean = np.zeros((slide.n_obs, slide.n_vars))
    for chosen in product(range(_PROGRAM_NODES), repeat=loadings.shape[2]):
        activity, weight = nodes[list(chosen)], np.prod(weights[list(chosen)] / weights.sum())
        factor = np.exp(loadings @ activity - 0.5 * (loadings**2).sum(axis=2))
        place = (np.log(cells @ (profile * factor).T + ambient) - grid[0]) * ((_GRID - 1) / (grid[-1] - grid[0]))
        below = place.astype(np.int64)
        place -= below
        below += first
        mean += weight * (values[below] + place * slopes[below])
    return mean


def _table(grid: NDArray, dispersion: NDArray, depth_sd: float) -> NDArray[np.float64]:
    """Return E[log2(y + 1)] (G, R) of counts of the log rates `grid` (R,), mean over the capture efficiency.

    A negative binomial of mean r and shape θ has E[exp(-t y)] = (1 + r (1 - exp(-t)) / θ)^-θ, and
    log(1 + y) = ∫ exp(-t) (1 - exp(-t y)) / t dt over t > 0 (Frullani's integral). In log(t) the trapezoidal rule
    converges fast.
    """
    from scipy.interpolate import CubicSpline

    nodes, weights = hermegauss(_CAPTURE_NODES)
    shifts = depth_sd * nodes - 0.5 * depth_sd**2
    coarse = np.linspace(grid[0] + shifts.min(), grid[-1] + shifts.max(), 256)
    # the integrand falls as r t towards small t
    times = np.exp(np.arange(np.log(1e-8) - max(coarse[-1], 0.0), _LONGEST, _STEP))
    total = np.zeros((len(dispersion), len(coarse)))
    for time in times:
        rate = np.exp(coarse) * -np.expm1(-time) / dispersion[:, None]
        total -= np.exp(-time) * np.expm1(-dispersion[:, None] * np.log1p(rate))
    of_rates = CubicSpline(coarse, total * (_STEP / np.log(2)), axis=1)
    return sum(weight / weights.sum() * of_rates(grid + shift) for weight, shift in zip(weights, shifts, strict=True))
