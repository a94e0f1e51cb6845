"""Least squares on partly masked spots: how a model weighs backbone, regression and factors once genes are visible."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from hinge.diffusion.scheduler import MaskedDiffusionScheduler
from hinge.models.gene_factors import GeneFactorModel, saturating_share
from hinge.training.measured import MeasuredGenes
from hinge.utils.threads import in_torch_threads

# masked shares at which partly masked spots are looked at
MASKED_SHARES = (0.99, 0.97, 0.9, 0.75, 0.5, 0.25, 0.1)
SATURATIONS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
# the factors may take over from the backbone, but not so far that training it has no effect any more
LEAST_BACKBONE_MIX = -1.0
# values of spots that are looked at together
MOST_VALUES = 1 << 16


@dataclass(frozen=True)
class PartlyMasked:
    """What the fit needs of the training spots at one share of visible genes, however many they are.

    Attributes
    ----------
    share
        Mean share of visible genes.
    moments
        (5, 5, G) sums over masked values of the products of five columns: the decoded values without their mean, the
        regression, the factors' part, the values without these three, and 1.
    left_log_scale
        (G,) mean log of the deviation that visible genes leave, as a share of that without them, of the factor model.
    """

    share: float
    moments: np.ndarray
    left_log_scale: np.ndarray

    @property
    def weight(self) -> np.ndarray:
        """The number (G,) of masked values."""
        return self.moments[4, 4]


@dataclass(frozen=True)
class VisibleShareFit:
    """Weights of the first three columns of `PartlyMasked`, which grow with φ(share of visible genes).

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
        Has `target` (n, G) of the spots, `measured`, and decode(timestep) → decoded values and visible
        genes (n, G).
    offset, regression
        (G,) mean of the decoded values, and (n, G) out-of-fold regression with slide shifts.
    """
    total, num_genes = scheduler.config.num_train_timesteps, len(offset)
    curve = scheduler.num_masked(np.arange(total + 1), num_genes) / num_genes
    steps = {int(np.abs(curve[1:-1] - share).argmin()) + 1 for share in MASKED_SHARES} if total > 1 else set()
    loadings, noise = (tensor.detach().cpu().double().numpy() for tensor in (factors.loadings, factors.log_noise.exp()))
    device, measured = factors.loadings.device, backbone.measured
    prior_variance = (loadings**2).sum(axis=1) + noise

    def on_device(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).float().to(device)

    def sums(decoded: np.ndarray, visible: np.ndarray, some: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        weight = 1 - visible[some] if measured is None else (1 - visible[some]) * measured.of_rows(some).values()
        predicted = offset + regression[some]
        with torch.no_grad():  # which holds for one thread
            scores, left = factors.posterior(
                on_device(backbone.target[some]), on_device(visible[some]), on_device(predicted)
            )
        carried = scores.cpu().double().numpy() @ loadings.T
        left_variance = (left**2).sum(dim=1).cpu().double().numpy() + noise
        left_log_scale = (0.5 * np.log(left_variance / prior_variance) * weight).sum(axis=0)
        remaining = backbone.target[some] - decoded[some] - regression[some] - carried
        moments = _moments([decoded[some] - offset, regression[some], carried, remaining], weight)
        return moments, left_log_scale, float(visible[some].sum())

    def of_spots(decoded: np.ndarray, visible: np.ndarray, rows: np.ndarray) -> PartlyMasked:
        parts = np.array_split(rows, -(-len(rows) * num_genes // MOST_VALUES))
        results = list(in_torch_threads(partial(sums, decoded, visible), parts, device.type))
        moments = np.sum([each for each, _, _ in results], axis=0)
        left_log_scale = np.sum([each for _, each, _ in results], axis=0)
        share = sum(each for _, _, each in results) / (len(rows) * num_genes)
        return PartlyMasked(share, moments, left_log_scale / np.maximum(moments[4, 4], 1))

    found = []
    for step in sorted(step for step in steps if 0 < curve[step] < 1):
        decoded, visible = backbone.decode(step)
        found += [of_spots(decoded, visible, rows) for rows in _with_as_many_genes(measured, len(decoded))]
    return found


def _moments(columns: list[np.ndarray], weight: np.ndarray) -> np.ndarray:
    """Return the weighted sums (m + 1, m + 1, G) of products of m columns (n, G) and of 1."""
    weighted = [weight * column for column in columns] + [weight]
    size = len(weighted)
    sums = np.empty((size, size, weight.shape[1]))
    for i in range(size):
        for j in range(i, size):
            product = weighted[i].sum(axis=0) if j == size - 1 else np.einsum("ng,ng->g", columns[j], weighted[i])
            sums[i, j] = sums[j, i] = product
    return sums


def _with_as_many_genes(measured: MeasuredGenes | None, num_spots: int) -> list[np.ndarray]:
    """Return the numbers of the spots whose slides have about as many genes, in eighths: they share a visible share."""
    if measured is None:
        return [np.arange(num_spots)]
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
    # moments of φ·columns, of what remains without the part of the decoded values that does not count, and of φ
    shares = []
    for f, each in zip(phi, partly, strict=True):
        change = np.diag([f, f, f, 1.0, f])
        change[3, 0] = left_out * (1 - f)
        shares.append(np.einsum("ik,klg,jl->ijg", change, each.moments, change, optimize=True))
    total = sum(shares)
    per_gene = np.maximum(total[4, 4], 1e-12)
    # what a gene's own bias explains of the columns and of the rest
    biases = total[4, :4] / per_gene
    crossed = np.einsum("ig,jg->ijg", biases, total[4, :4])
    left = total[:4, :4] - crossed - crossed.transpose(1, 0, 2) + biases[:, None] * biases * total[4, 4]
    gram, right = left[:3, :3].sum(axis=-1), left[:3, 3].sum(axis=-1)
    gram += (1e-6 * np.trace(gram) + 1e-12) * np.eye(3)
    mix = np.linalg.solve(gram, right)
    if not LEAST_BACKBONE_MIX <= mix[0] <= 0:
        mix[0] = np.clip(mix[0], LEAST_BACKBONE_MIX, 0)
        mix[1:] = np.linalg.solve(gram[1:, 1:], right[1:] - gram[1:, 0] * mix[0])
    bias = biases[3] - mix @ biases[:3]
    weights = np.vstack([np.tile(-mix[:, None], len(bias)), np.ones(len(bias)), -bias])
    squared = [np.maximum(np.einsum("ig,ijg,jg->g", weights, share, weights), 0.0) for share in shares]
    variances = np.stack([each / np.maximum(one.weight, 1) for each, one in zip(squared, partly, strict=True)])
    return VisibleShareFit(saturation, mix, bias, phi, variances, float(np.sum(squared)))
