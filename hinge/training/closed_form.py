"""Solving for the gene-wise path before the first gradient step, so that training starts from strong baselines."""

import numpy as np
import torch
from sklearn.decomposition import FactorAnalysis
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.model_selection import GroupKFold, cross_val_predict
from torch import Tensor

from hinge.diffusion.scheduler import MaskedDiffusionScheduler
from hinge.loop import step_generator
from hinge.models.hinge import HingeModel
from hinge.models.path import saturating_share

# masked shares at which partly masked spots are looked at
MASKED_SHARES = (0.99, 0.97, 0.9, 0.75, 0.5, 0.25, 0.1)
SATURATIONS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
SMALLEST_SCALE = 0.05
# the factors may take over from the backbone, but not so far that training it has no effect any more
LEAST_BACKBONE_MIX = -0.75


@torch.no_grad()
def fit_gene_path(
    model: HingeModel,
    scheduler: MaskedDiffusionScheduler,
    gene_ids: Tensor,
    features: Tensor,
    values: Tensor,
    groups: np.ndarray,
    seed: int,
) -> float:
    """Set the parameters of a model's `GenePath` from its training spots.

    Of what the backbone leaves unexplained in fully masked spots, ridge regression on the features (penalty by
    cross-validation over groups) takes its part; a factor analysis of the out-of-fold residuals gives loadings and
    noise. How backbone, regression and factors share the work once genes are visible (`mix`, biases, log-scales,
    saturation) is least squares on partly masked spots, again out of fold, so that nothing is trusted more than
    it deserves on a new slide.

    Parameters
    ----------
    model
        With a gene path. Nothing else of it is changed.
    scheduler, gene_ids
        Of the diffusion and the panel.
    features, values
        (n, d) unaugmented features and (n, G) expression of the training spots.
    groups
        (n,) what cross-validation keeps together.
    seed
        Of the masks.

    Returns
    -------
    float
        The ridge penalty that was chosen.
    """
    path, device = model.path, model.feature_mean.device
    num_spots, num_genes = values.shape
    total = scheduler.config.num_train_timesteps
    generator = step_generator(seed, 22)
    x = model.standardise(features.to(device)).cpu().numpy().astype(np.float64)
    target = values.double().numpy()

    def decoded_at(step: int) -> tuple[np.ndarray, np.ndarray]:
        """What the model decodes without its path, and what it saw."""
        timesteps = torch.full((num_spots,), step)
        uniform = torch.rand(num_spots, num_genes, generator=generator)
        noise = torch.randn(num_spots, num_genes, generator=generator)
        filled, visible = scheduler.add_mask(values, timesteps, uniform=uniform, noise=noise)
        following = scheduler.visible_at(timesteps - 1, uniform)
        parts = []
        for start in range(0, num_spots, 256):
            rows = slice(start, start + 256)
            inputs = (filled[rows], visible[rows], timesteps[rows], features[rows])
            tokens = model.tokens(
                *(tensor.to(device) for tensor in inputs), gene_ids, next_visible=following[rows].to(device)
            )
            parts.append(model.backbone.decode(tokens).float().cpu())
        return torch.cat(parts).double().numpy(), visible.double().numpy()

    decoded, _ = decoded_at(total)
    offset = decoded.mean(axis=0)
    residual = target - decoded
    folds = min(5, len(np.unique(groups)))
    splits = list(GroupKFold(folds).split(x, groups=groups)) if folds > 1 else None
    ridge = RidgeCV(alphas=np.logspace(-1, 6, 29), cv=splits).fit(x, residual)
    if splits is not None:
        regression = cross_val_predict(Ridge(ridge.alpha_), x, residual, cv=splits)
    else:
        regression = ridge.predict(x)
    unexplained = residual - regression
    num_factors = min(path.loadings.shape[1], num_genes // 2, num_spots // 10)
    loadings = np.zeros(tuple(path.loadings.shape))
    noise_variance = np.maximum(unexplained.var(axis=0), SMALLEST_SCALE**2)
    if num_factors:
        analysis = FactorAnalysis(num_factors, svd_method="lapack").fit(unexplained)
        loadings[:, :num_factors] = analysis.components_.T
        noise_variance = np.maximum(analysis.noise_variance_, SMALLEST_SCALE**2)

    def write(parameter: Tensor, content: np.ndarray) -> None:
        parameter.copy_(torch.from_numpy(np.ascontiguousarray(content)).reshape(parameter.shape))

    write(path.mean.weight, ridge.coef_)
    write(path.mean.bias, ridge.intercept_)
    write(path.offset, offset)
    write(path.loadings, loadings)
    write(path.readout, loadings)
    write(path.log_noise, np.log(noise_variance))

    shares, columns, left, weights = [], [], [], []
    curve = scheduler.num_masked(np.arange(total + 1), num_genes) / num_genes
    steps = {int(np.abs(curve[1:-1] - share).argmin()) + 1 for share in MASKED_SHARES} if total > 1 else set()
    for step in sorted(step for step in steps if 0 < curve[step] < 1):
        decoded, visible = decoded_at(step)
        expected = torch.from_numpy(offset + regression).float().to(device)
        seen = torch.from_numpy(visible).float().to(device)
        factors = path.factors(values.to(device), seen, expected).cpu().double().numpy()
        carried = factors @ loadings.T
        shares.append(visible.mean())
        columns.append(np.stack([decoded - offset, regression, carried]))
        left.append(target - decoded - regression - carried)
        weights.append(1 - visible)

    def shared_work(saturation: float) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
        """Least squares of what is left on φ·columns and φ per gene: error, mix, biases, log-scales."""
        phi = saturating_share(np.asarray(shares), saturation)
        per_gene = np.maximum(sum(f**2 * w.sum(axis=0) for f, w in zip(phi, weights, strict=True)), 1e-12)

        def bias_of(parts: list[np.ndarray]) -> np.ndarray:
            return sum(f * (w * part).sum(axis=-2) for f, w, part in zip(phi, weights, parts, strict=True)) / per_gene

        scaled = [f * column for f, column in zip(phi, columns, strict=True)]
        column_bias, left_bias = bias_of(scaled), bias_of(left)
        gram, right = np.zeros((3, 3)), np.zeros(3)
        for f, w, column, rest in zip(phi, weights, scaled, left, strict=True):
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
        for f, w, column, rest in zip(phi, weights, scaled, left, strict=True):
            squared = (w * (rest - np.einsum("i,ing->ng", mix, column) - f * bias) ** 2).sum(axis=0)
            variances.append(squared / np.maximum(w.sum(axis=0), 1))
            error += squared.sum()
        return error, mix, bias, np.stack(variances)

    masked_variance = unexplained.var(axis=0)
    phi, variances = np.zeros(1), masked_variance[None]
    if shares:
        saturation = min(SATURATIONS, key=lambda value: shared_work(value)[0])
        _, mix, bias, partly = shared_work(saturation)
        path.saturation.fill_(saturation)
        write(path.mix, mix)
        write(path.visible_bias, bias)
        phi = np.concatenate([phi, saturating_share(np.asarray(shares), saturation)])
        variances = np.vstack([variances, partly])
    log_scales = np.log(np.maximum(np.sqrt(variances), SMALLEST_SCALE))
    # a variance of many masked genes is known better than one of few
    counts = np.array([num_spots, *(w.sum() / num_genes for w in weights)])
    line = np.polynomial.polynomial.polyfit(phi, log_scales, 1 if len(phi) > 1 else 0, w=np.sqrt(counts))
    write(path.log_scale.bias, line[0])
    write(path.visible_log_scale, line[1] if len(line) > 1 else np.zeros(num_genes))
    return float(ridge.alpha_)
