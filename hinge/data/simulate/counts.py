"""The counts of a simulated slide given its cells.

With c_sk cells of type k in the disc of spot s, gene g has the count

    y_sg ~ Poisson(r_sg γ_sg),  γ_sg ~ Gamma(shape θ_g, mean 1)        (so y is negative binomial)
    r_sg = δ_s (b_g + Σ_k c_sk M_kg F_skg)
    F_skg = exp(Σ_p L_kpg a_sp − ½ Σ_p L_kpg²)                         (gene programs p)
    δ_s = exp(τ u_s − ½ τ²)                                            (capture efficiency)

M are the cell types' mean profiles (log-normal, with marker genes), b is ambient RNA, L the loadings of the programs.
a and u are hidden activities: each is independent of the image and of the others, standard normal at every spot, and
over the spots of a slide a Gaussian process whose correlation at the distance D is

    (1 − ρ) 1[D = 0] + ρ exp(−D / ℓ).

Slides of one seed share M, b, L and θ; each has its own tissue and activities. M and b of a patient have one more
factor for each gene (`patient_factors`).

F, δ and γ are independent of each other and of the image and have mean 1. The best possible prediction is therefore
known in closed form: E[y_sg | image] = b_g + Σ_k c_sk M_kg, which is `layers["expected"]`. `oracle_draws` samples y
given c; the counts of a slide are one such draw.
"""

from collections.abc import Sequence

import anndata as ad
import numpy as np
from scipy.spatial.distance import cdist

from hinge.data.simulate.cell_types import N_PROGRAMS, PATIENT_DEPTH_SD, PATIENT_SD, CellType
from hinge.utils.errors import DataError, require_whole_number


def oracle_draws(slide: ad.AnnData, n_draws: int, seed: int = 0, root: np.ndarray | None = None) -> np.ndarray:
    """Draw counts from their true distribution given the cells in each spot, all spots of a slide jointly.

    Parameters
    ----------
    slide
        A slide of `simulate_slides`, or some of its spots and genes.
    n_draws
        Number of draws.
    seed
        Seed of the draws; no seed reproduces the counts of the slide itself.
    root
        Result of `activity_root`; None computes it.

    Returns
    -------
    np.ndarray
        (n_draws, n, G) float32 counts.

    Raises
    ------
    DataError
        The slide is not simulated, or lacks parameters of the simulation.
    """
    require_whole_number("n_draws", n_draws, 1, 1_000_000)
    require_whole_number("seed", seed, 0, 2**63)
    rng = np.random.default_rng([seed, 2])
    try:
        root = activity_root(slide) if root is None else root
        return np.stack([draw_counts(rng, slide, root) for _ in range(n_draws)])
    except KeyError as error:
        raise DataError(f"oracle_draws needs a slide of simulate_slides; this one has no {error}") from error


def draw_gene_parameters(rng: np.random.Generator, types: Sequence[CellType], n_genes: int) -> dict[str, np.ndarray]:
    """Draw the parameters that all slides share: M (G, K), L (G, K·P), b (G,), θ (G,)."""
    level = rng.normal(0, 0.6, (n_genes, 1))
    fold = rng.normal(0, 0.4, (n_genes, len(types)))
    marker = np.where(rng.random(n_genes) < 0.7, rng.uniform(1.2, 3.0, n_genes), 0)
    fold[np.arange(n_genes), rng.integers(len(types), size=n_genes)] += marker
    profile = np.exp(level + fold)
    # a fifth of a count per gene and cell: a few thousand counts a spot over 300 genes
    profile *= 0.2 * np.array([kind.rna for kind in types]) / profile.mean(0)
    # a program has one effect on a gene in all cell types, and an additional one in some of them
    shape = (n_genes, len(types), N_PROGRAMS)
    loadings = rng.normal(0, 0.22, (n_genes, 1, N_PROGRAMS))
    loadings = loadings + rng.normal(0, 0.3, shape) * (rng.random(shape) < 0.5)
    return {
        "profile": profile,
        "loadings": loadings.reshape(n_genes, -1),
        "ambient": 1.5 * profile.mean(1),
        "dispersion": np.exp(rng.normal(np.log(20), 0.4, n_genes)),
    }


def patient_factors(seed: int, patient: int, n_genes: int) -> np.ndarray:
    """Return the factors (G,) of the expression of a patient; those of patient 0 are 1.

    Their logarithms are normal: of every gene by itself with a standard deviation of `PATIENT_SD`, and of all genes
    together, the depth of sequencing, with `PATIENT_DEPTH_SD`. Both are about those between patients of HER2ST.
    """
    if patient == 0:
        return np.ones(n_genes)
    rng = np.random.default_rng([seed, 3, patient])
    return np.exp(PATIENT_DEPTH_SD * rng.standard_normal() + PATIENT_SD * rng.standard_normal(n_genes))


def activity_root(slide: ad.AnnData) -> np.ndarray:
    """Return the Cholesky root (n, n) of the correlation of the hidden activities over spots.

    Raises
    ------
    DataError
        The slide is not simulated.
    """
    return np.linalg.cholesky(activity_correlation(slide))


def activity_correlation(slide: ad.AnnData) -> np.ndarray:
    """Return the correlation (n, n) of a hidden activity over spots.

    Raises
    ------
    DataError
        The slide is not simulated.
    """
    truth = slide.uns.get("hinge_truth")
    if truth is None:
        raise DataError("the activities of a slide need one of simulate_slides; this one has no 'hinge_truth'")
    spots_um = np.asarray(slide.obsm["spatial"]) * truth["um_per_px"]
    # in place: with 5,000 spots each array of this size is 200 MB
    correlation = cdist(spots_um, spots_um)
    np.negative(correlation, out=correlation)
    correlation /= truth["smooth_length_um"]
    np.exp(correlation, out=correlation)
    correlation *= truth["smooth_share"]
    correlation[np.diag_indices(len(spots_um))] += 1 - truth["smooth_share"]
    return correlation


def draw_counts(rng: np.random.Generator, slide: ad.AnnData, root: np.ndarray) -> np.ndarray:
    """Draw the counts (n, G), float32, of all spots by the formulas of the module."""
    cells, profile = slide.obsm["cells"], slide.varm["profile"]
    loadings = np.asarray(slide.varm["loadings"]).reshape(slide.n_vars, cells.shape[1], -1)
    hidden = root @ rng.standard_normal((slide.n_obs, loadings.shape[2] + 1))
    activity, capture = hidden[:, :-1], hidden[:, -1:]
    rate = np.tile(slide.var["ambient"].to_numpy(), (slide.n_obs, 1))
    for k in range(cells.shape[1]):
        program = np.exp(activity @ loadings[:, k].T - 0.5 * (loadings[:, k] ** 2).sum(1))
        rate += cells[:, [k]] * profile[:, k] * program
    deviation = slide.uns["hinge_truth"]["depth_sd"]
    rate *= np.exp(deviation * capture - 0.5 * deviation**2)
    dispersion = slide.var["dispersion"].to_numpy()
    return rng.poisson(rate * rng.gamma(dispersion, size=rate.shape) / dispersion).astype(np.float32)
