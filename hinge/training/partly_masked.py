"""Least squares on partly masked spots: how a model weighs backbone, regression and factors once genes are visible."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hinge.diffusion.scheduler import MaskedDiffusionScheduler
from hinge.models.gene_factors import GeneFactorModel, saturating_share
from hinge.training.measured import MeasuredGenes

# masked shares at which partly masked spots are looked at
MASKED_SHARES = (0.99, 0.97, 0.9, 0.75, 0.5, 0.25, 0.1)
SATURATIONS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
# the factors may take over from the backbone, but not so far that training it has no effect any more
LEAST_BACKBONE_MIX = -1.0


@dataclass(frozen=True)
class PartlyMasked:
    """The training spots at one share of visible genes.

    Attributes
    ----------
    share
        Mean share of visible genes.
    columns
        (3, n, G) what is weighed: the decoded values without their mean, the regression, the factors' part.
    remaining
        (n, G) values without the three.
    weight
        (n, G), 1 for masked genes.
    left_log_scale
        (G,) mean log of the deviation that visible genes leave, as a share of that without them, of the factor model.
    """

    share: float
    columns: np.ndarray
    remaining: np.ndarray
    weight: np.ndarray
    left_log_scale: np.ndarray


@dataclass(frozen=True)
class VisibleShareFit:
    """Weights of the three columns of `PartlyMasked`, which grow with φ(share of visible genes).

    Attributes
    ----------
    saturation
        Of `saturating_share`.
    mix
        (3,) `mix` of `GeneFactorModel`.
    bias
        (G,) its `visible_bias`.
    phi
        (T,) φ of each share.
    variances
        (T, G) mean squared error of masked genes at each share.
    error
        Sum of squared errors.
    """

    saturation: float
    mix: np.ndarray
    bias: np.ndarray
    phi: np.ndarray
    variances: np.ndarray
    error: float


def partly_masked_spots(
    factors: GeneFactorModel,
    scheduler: MaskedDiffusionScheduler,
    backbone,
    offset: np.ndarray,
    regression: np.ndarray,
) -> list[PartlyMasked]:
    """Return the training spots at the timesteps with masked shares nearest to `MASKED_SHARES`.

    Parameters
    ----------
    factors
        With loadings and noise.
    scheduler
        Of the diffusion.
    backbone
        Has `values` and `target` (n, G) of the spots, `measured`, and decode(timestep) → decoded values and visible
        genes (n, G).
    offset, regression
        (G,) mean of the decoded values, and (n, G) out-of-fold regression with slide shifts.
    """
    total, num_genes = scheduler.config.num_train_timesteps, len(offset)
    curve = scheduler.num_masked(np.arange(total + 1), num_genes) / num_genes
    steps = {int(np.abs(curve[1:-1] - share).argmin()) + 1 for share in MASKED_SHARES} if total > 1 else set()
    loadings, noise = (tensor.detach().cpu().double().numpy() for tensor in (factors.loadings, factors.log_noise.exp()))
    device, measured = factors.loadings.device, backbone.measured
    found = []
    for step in sorted(step for step in steps if 0 < curve[step] < 1):
        decoded, visible = backbone.decode(step)
        masked = 1 - visible if measured is None else (1 - visible) * measured.values()

        def on_device(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).float().to(device)

        scores, left = factors.posterior(backbone.values.to(device), on_device(visible), on_device(offset + regression))
        carried = scores.cpu().double().numpy() @ loadings.T
        left_variance = (left**2).sum(dim=1).cpu().double().numpy() + noise
        left_share = left_variance / ((loadings**2).sum(axis=1) + noise)
        columns = np.stack([decoded - offset, regression, carried])
        remaining = backbone.target - decoded - regression - carried
        for rows in _with_as_many_genes(measured, len(masked)):
            weight = masked[rows]
            left_log_scale = (0.5 * np.log(left_share[rows]) * weight).sum(0) / np.maximum(weight.sum(0), 1)
            found.append(PartlyMasked(visible[rows].mean(), columns[:, rows], remaining[rows], weight, left_log_scale))
    return found


def _with_as_many_genes(measured: MeasuredGenes | None, num_spots: int) -> list[slice | np.ndarray]:
    """Return the numbers of the spots whose slides have about as many genes, in eighths: they share a visible share."""
    if measured is None:
        return [slice(0, num_spots)]
    eighths = np.ceil(8 * measured.of_slides.mean(axis=1)).astype(int)[measured.slide_of]
    return [np.flatnonzero(eighths == number) for number in np.unique(eighths)]


def fit_visible_share(partly: list[PartlyMasked], left_out: float) -> VisibleShareFit:
    """Return the least-squares fit with the best of `SATURATIONS`.

    Parameters
    ----------
    partly
        Of `partly_masked_spots`, at least one.
    left_out
        Share of the decoded values that does not count where no gene is visible.
    """
    return min((_fit(partly, left_out, saturation) for saturation in SATURATIONS), key=lambda fit: fit.error)


def _fit(partly: list[PartlyMasked], left_out: float, saturation: float) -> VisibleShareFit:
    """Least squares of what remains on φ·columns, and on φ per gene, over masked genes."""
    phi = saturating_share(np.asarray([each.share for each in partly]), saturation)
    weights = [each.weight for each in partly]
    scaled = [f * each.columns for f, each in zip(phi, partly, strict=True)]
    rests = [each.remaining + left_out * (1 - f) * each.columns[0] for f, each in zip(phi, partly, strict=True)]
    per_gene = np.maximum(sum(f**2 * w.sum(axis=0) for f, w in zip(phi, weights, strict=True)), 1e-12)

    def bias_of(parts: list[np.ndarray]) -> np.ndarray:
        return sum(f * (w * part).sum(axis=-2) for f, w, part in zip(phi, weights, parts, strict=True)) / per_gene

    column_bias, left_bias = bias_of(scaled), bias_of(rests)
    gram, right = np.zeros((3, 3)), np.zeros(3)
    for f, w, column, rest in zip(phi, weights, scaled, rests, strict=True):
        free = column - f * column_bias[:, None, :]
        gram += np.einsum("ing,jng,ng->ij", free, free, w)
        right += np.einsum("ing,ng,ng->i", free, rest - f * left_bias, w)
    gram += (1e-6 * np.trace(gram) + 1e-12) * np.eye(3)
    mix = np.linalg.solve(gram, right)
    if not LEAST_BACKBONE_MIX <= mix[0] <= 0:
        mix[0] = np.clip(mix[0], LEAST_BACKBONE_MIX, 0)
        mix[1:] = np.linalg.solve(gram[1:, 1:], right[1:] - gram[1:, 0] * mix[0])
    bias = left_bias - np.einsum("i,ig->g", mix, column_bias)
    variances, error = [], 0.0
    for f, w, column, rest in zip(phi, weights, scaled, rests, strict=True):
        squared = (w * (rest - np.einsum("i,ing->ng", mix, column) - f * bias) ** 2).sum(axis=0)
        variances.append(squared / np.maximum(w.sum(axis=0), 1))
        error += squared.sum()
    return VisibleShareFit(saturation, mix, bias, phi, np.stack(variances), error)
