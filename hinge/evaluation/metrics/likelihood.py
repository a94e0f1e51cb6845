"""Reference log-likelihoods of measured counts: of the marginal distribution and of the oracle."""

import numpy as np
import torch
from anndata import AnnData
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import ndtr
from torch import Tensor

from hinge.data.spots import SpotTable
from hinge.utils.errors import DataError

BANDWIDTHS = (0.05, 0.1, 0.2, 0.3, 0.45, 0.7, 1.0)
"""Widths of the kernel of the marginal, in units of log2(count + 1), that leave-one-out likelihood chooses from."""

_SMALLEST_MASS = 1e-12
_DEGREES = 5.0  # of freedom of the proposal: heavier tails than the posterior's


def marginal_log_likelihood(train_counts: ArrayLike, test_counts: ArrayLike) -> NDArray[np.float64]:
    """Return the log-probability of test spots' counts under the marginal distributions of genes in training.

    Genes are independent and the image is not used: it is the reference for the gain of a method. The distribution of a
    gene is a Gaussian kernel around its log2(count + 1) in each training spot, rounded to counts; the
    kernel's width is the one with the highest leave-one-out likelihood.

    Parameters
    ----------
    train_counts, test_counts
        Raw counts (n_train, G) and (n_test, G) of the same genes.

    Returns
    -------
    ndarray
        (n_test,) nats, sums over genes.
    """
    train, test = np.asarray(train_counts, dtype=np.float64), np.asarray(test_counts, dtype=np.float64)
    if len(train) < 2:
        raise DataError("the marginal distribution takes at least two training spots")

    def masses(at: NDArray, gene: int, width: float) -> NDArray:
        """Mass (m, n_train) of the counts at (m,) under the kernel of each training spot."""
        centre = np.log2(train[:, gene] + 1)
        low = np.where(at > 0, np.log2(at + 0.5), -np.inf)[:, None]
        return ndtr((np.log2(at + 1.5)[:, None] - centre) / width) - ndtr((low - centre) / width)

    result = np.zeros(len(test))
    for gene in range(train.shape[1]):

        def left_out(width: float, gene: int = gene) -> float:
            levels, level_of = np.unique(train[:, gene], return_inverse=True)
            mass = masses(levels, gene, width)
            own = mass[level_of, np.arange(len(train))]
            others = (mass.sum(axis=1)[level_of] - own) / (len(train) - 1)
            return float(np.log(np.maximum(others, _SMALLEST_MASS)).sum())

        width = max(BANDWIDTHS, key=left_out)
        levels, level_of = np.unique(test[:, gene], return_inverse=True)
        mass = masses(levels, gene, width).mean(axis=1)
        result += np.log(np.maximum(mass, _SMALLEST_MASS))[level_of]
    return result


def oracle_log_likelihood(slide: AnnData, spots: SpotTable, n_samples: int = 400, seed: int = 0) -> NDArray[np.float64]:
    """Return the log-probability of each simulated spot's counts given its cells: the bound of models of the image.

    Given the hidden activities of programs and library size, h ~ N(0, 1), genes are independent negative binomials (see
    `hinge.data.simulate.counts`). h is integrated out by importance sampling around its most
    probable value in each spot.

    Parameters
    ----------
    slide
        A slide of `hinge.data.simulate_slides`.
    spots
        Its spots on the panel.
    n_samples
        Samples of h for each spot.
    seed
        Seed of the samples.

    Returns
    -------
    ndarray
        (n,) nats.

    Raises
    ------
    DataError
        If the slide is not simulated.
    """
    rows, columns = slide.obs_names.get_indexer(spots.barcodes), slide.var_names.get_indexer(spots.genes)
    try:
        part = slide[rows, columns]
        cells = torch.from_numpy(np.asarray(part.obsm["cells"], dtype=np.float64))
        profile = torch.from_numpy(np.array(part.varm["profile"]))
        loadings = torch.from_numpy(np.array(part.varm["loadings"])).unflatten(1, (cells.shape[1], -1))
        ambient, dispersion = (torch.from_numpy(part.var[key].to_numpy().copy()) for key in ("ambient", "dispersion"))
        depth_sd = float(slide.uns["hinge_truth"]["depth_sd"])
    except KeyError as error:
        raise DataError(f"the oracle needs a slide of simulate_slides; this one has no {error}") from error
    counts = torch.from_numpy(np.asarray(spots.counts, dtype=np.float64))
    num_hidden = loadings.shape[2] + 1

    def log_joint(hidden: Tensor, cells: Tensor, counts: Tensor) -> Tensor:
        """hidden (…, H), cells (…, K), counts (…, G) → log p(counts, hidden) (…)."""
        programs = torch.exp(torch.einsum("...p,gkp->...gk", hidden[..., :-1], loadings) - 0.5 * (loadings**2).sum(-1))
        rate = ambient + torch.einsum("...k,gk,...gk->...g", cells, profile, programs)
        logits = rate.log() + (depth_sd * hidden[..., -1:] - 0.5 * depth_sd**2) - dispersion.log()
        # a negative binomial but for what does not depend on its mean
        genes = counts * logits - (counts + dispersion) * torch.logaddexp(logits, torch.zeros_like(logits))
        prior = -0.5 * (hidden**2).sum(-1) - 0.5 * num_hidden * np.log(2 * np.pi)
        return genes.sum(-1) + prior

    constant = torch.lgamma(counts + dispersion) - torch.lgamma(dispersion) - torch.lgamma(counts + 1)

    def negative(flat: NDArray) -> tuple[float, NDArray]:
        hidden = torch.from_numpy(flat).view(-1, num_hidden).requires_grad_()
        total = -log_joint(hidden, cells, counts).sum()
        (gradient,) = torch.autograd.grad(total, hidden)
        return total.item(), gradient.numpy().ravel()

    origin = np.zeros(len(counts) * num_hidden)
    found = minimize(negative, origin, jac=True, method="L-BFGS-B", options={"maxiter": 1000, "ftol": 1e-12})
    mode = torch.from_numpy(found.x).view(-1, num_hidden)
    curvature = -torch.func.vmap(torch.func.hessian(log_joint))(mode, cells, counts)
    values, vectors = torch.linalg.eigh(curvature)
    # the prior's own curvature is 1; less can only be a saddle
    root = vectors * values.clamp_min(0.5).rsqrt().unsqueeze(-2)

    generator = torch.Generator().manual_seed(seed)
    result = []
    for start in range(0, len(counts), 32):
        part = slice(start, start + 32)
        size = (len(counts[part]), n_samples, num_hidden)
        normal = torch.randn(size, generator=generator, dtype=torch.float64)
        chi2 = 2 * torch._standard_gamma(torch.full(size[:2], _DEGREES / 2, dtype=torch.float64), generator=generator)
        step = normal * (_DEGREES / chi2).sqrt().unsqueeze(-1)
        hidden = mode[part, None] + torch.einsum("nij,nsj->nsi", root[part], step)
        log_proposal = (
            torch.special.gammaln(torch.tensor((_DEGREES + num_hidden) / 2, dtype=torch.float64))
            - torch.special.gammaln(torch.tensor(_DEGREES / 2, dtype=torch.float64))
            - 0.5 * num_hidden * np.log(_DEGREES * np.pi)
            - 0.5 * (_DEGREES + num_hidden) * torch.log1p((step**2).sum(-1) / _DEGREES)
            - torch.linalg.slogdet(root[part]).logabsdet[:, None]
        )
        weights = log_joint(hidden, cells[part, None], counts[part, None]) - log_proposal
        result.append(torch.logsumexp(weights, dim=1) - np.log(n_samples) + constant[part].sum(dim=1))
    return torch.cat(result).numpy()
