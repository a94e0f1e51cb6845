"""Log-likelihood of measured spots under a model that reveals their genes one by one."""

import numpy as np
import torch
from torch import Tensor

from hinge.diffusion.randomness import Stream, spot_uniforms
from hinge.diffusion.scheduler import MaskedDiffusionScheduler
from hinge.models.hinge import HingeModel


@torch.inference_mode()
def chain_log_likelihood(
    model: HingeModel,
    scheduler: MaskedDiffusionScheduler,
    features: Tensor | np.ndarray,
    gene_ids: Tensor,
    values: np.ndarray,
    spots: list[str],
    num_passes: int = 32,
    seed: int = 0,
    library_size: np.ndarray | None = None,
    batch_size: int = 256,
    measured: np.ndarray | None = None,
) -> np.ndarray:
    """Return the log-likelihood of each spot's genes along random orders of revealing, in nats.

    With σ an order of the genes, log p(x) is at least the mean over σ of Σ_k log p(x_σ(k) | x_σ(1) … x_σ(k−1)). Every
    gene that is still masked is as likely to be the next: the mean over orders is G times the mean over k of the mean
    log-probability of the masked genes given k visible ones (Hoogeboom et al., ICLR 2022, autoregressive diffusion). A
    pass looks at one k and one order for each spot; the k of its passes are spread evenly over 0 … G − 1.

    Parameters
    ----------
    model, scheduler
        Trained together. The head gives log-masses of counts or log-densities: only likelihoods of the same kind can
        be compared. The slide effect is taken as zero.
    features
        (n, d).
    gene_ids
        (G,) vocabulary ids.
    values
        (n, G) measured, in the model's units.
    spots
        n names; with `seed` they fix the orders.
    num_passes
        Forward passes of each spot; the result's error falls with their root.
    seed
        Of the orders.
    library_size
        (n,) counts over all genes, where the model takes them: the likelihood is then given the library size.
    batch_size
        Spots in one forward pass.
    measured
        bool (G,) whether a gene was measured: the likelihood is of these genes. None: all were.

    Returns
    -------
    ndarray
        (n,) float64.
    """
    device = model.feature_mean.device
    features = torch.as_tensor(np.asarray(features), dtype=torch.float32)
    expression = torch.from_numpy(np.asarray(values, dtype=np.float32))
    num_genes = expression.shape[1]
    has = torch.ones(num_genes) if measured is None else torch.from_numpy(measured).float()
    num_measured = int(has.sum())
    result = np.zeros(len(expression))
    sizes = shift = None
    if library_size is not None:
        sizes = torch.as_tensor(np.asarray(library_size)).float().to(device)
        if model.slide_prior is not None and model.library_size_model is not None:
            shift = model.library_size_model.slide_shift(model.standardise(features.to(device)), sizes)
    for start in range(0, len(expression), batch_size):
        rows = np.arange(start, min(start + batch_size, len(expression)))
        truth = expression[rows].to(device)
        for number in range(num_passes):
            uniform = np.stack(
                [spot_uniforms(seed, spots[row], number, num_genes, stream=Stream.LIKELIHOOD_ORDER) for row in rows]
            )
            num_visible = np.floor((number + uniform[:, 1, 0]) / num_passes * num_measured).astype(np.int64)
            # genes that were not measured come last, and are never visible
            rank = torch.from_numpy((uniform[:, 0] + (1 - has.numpy())).argsort(1).argsort(1))
            visible = (rank < torch.from_numpy(num_visible)[:, None]).float().to(device)
            timesteps = scheduler.timesteps_of(visible)
            coming = torch.from_numpy(num_genes - scheduler.num_masked(timesteps - 1, num_genes))[:, None]
            noise = torch.special.ndtri(torch.from_numpy(uniform[:, 2])).float().to(device)
            output = model(
                values=scheduler.fill_masked(truth, visible, noise),
                visible=visible,
                timestep=timesteps.to(device),
                features=features[rows].to(device),
                gene_ids=gene_ids.to(device),
                next_visible=torch.maximum(visible, ((rank < coming).float() * has).to(device)),
                library_size=None if sizes is None else sizes[torch.from_numpy(rows)],
                **({} if shift is None else {"library_shift": torch.full((len(rows),), shift, device=device)}),
            )
            # to the CPU before float64: not every accelerator has it
            hidden, log_prob = (1 - visible.cpu()) * has, output.log_prob(truth).cpu().double()
            result[rows] += ((log_prob * hidden).sum(dim=1) / hidden.sum(dim=1)).numpy() * num_measured / num_passes
    return result
