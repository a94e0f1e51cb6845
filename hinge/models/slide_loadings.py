"""The slide effect of models without a `SlidePrior`, which were trained before there was one."""

import numpy as np
import torch
from torch import Tensor

from hinge.models.hinge import HingeModel


@torch.inference_mode()
def slide_effect_posterior(
    model: HingeModel, features: Tensor | np.ndarray, observed: np.ndarray, library_size: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the posterior of the slide effect given measured values of some genes or spots.

    A slide shifts the expression of all its spots by U·a, with a (R,) standard normal before anything is measured. The
    mean residual of a measured gene over its spots is (U·a) of that gene plus Gaussian noise. The noise has the
    covariance ΛΛᵀ + Ψ of the gene factors within a slide, divided by the number of spots.

    Parameters
    ----------
    model
        With a fitted `GeneFactorModel`.
    features
        (n, d) of all spots of one slide.
    observed
        (n, G) measured values in the model's units, NaN where nothing was measured.
    library_size
        (n,) counts over all genes, NaN where not known; a spot without one has the median for its features.

    Returns
    -------
    tuple
        Mean (R,) of a, and the Cholesky root (R, R) of its covariance. None for a model without gene factors, and
        where nothing was measured.
    """
    factors = model.gene_factor_model
    genes = np.flatnonzero(~np.isnan(observed).all(axis=0))
    if factors is None or len(genes) == 0:
        return None
    device = model.feature_mean.device
    condition = model.standardise(torch.as_tensor(np.asarray(features), dtype=torch.float32, device=device))
    if model.library_size_model is not None:
        known = model.library_size_model.typical(condition)
        if library_size is not None:
            given = torch.as_tensor(np.asarray(library_size), dtype=torch.float32, device=device)
            known = torch.where(given.isnan(), known, given)
        condition = model.with_library_size(condition, known)

    def array(tensor: Tensor) -> np.ndarray:
        # to the CPU before float64: not every accelerator has it
        return tensor.cpu().double().numpy()

    residual = (observed - array(factors.offset + factors.mean(condition)))[:, genes]
    measured = ~np.isnan(residual)
    # each gene in whichever spots it was measured; of two genes, the spots that have both are in both means
    weights = measured / measured.sum(axis=0)
    loadings = array(factors.loadings)[genes]
    within = loadings @ loadings.T + np.diag(np.exp(array(factors.log_noise)[genes]))
    covariance = within * (weights.T @ weights)
    slide_loadings = array(factors.slide_loadings)[genes]
    solved = np.linalg.solve(covariance, slide_loadings)
    posterior = np.linalg.inv(np.eye(slide_loadings.shape[1]) + slide_loadings.T @ solved)
    mean = posterior @ (solved.T @ np.nansum(weights * np.nan_to_num(residual), axis=0))
    return mean, np.linalg.cholesky(posterior)
