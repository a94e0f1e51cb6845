"""Solving for the gene-wise path before the first gradient step, so that training starts from strong baselines."""

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist
from sklearn.decomposition import FactorAnalysis
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.model_selection import GroupKFold, cross_val_predict
from torch import Tensor

from hinge.data.neighbourhood import spot_positions
from hinge.data.spots import SpotTable, spatial_groups
from hinge.diffusion.scheduler import MaskedDiffusionScheduler
from hinge.models.gene_factors import saturating_share
from hinge.models.hinge import HingeModel
from hinge.training.loop import step_generator

# masked shares at which partly masked spots are looked at
MASKED_SHARES = (0.99, 0.97, 0.9, 0.75, 0.5, 0.25, 0.1)
SATURATIONS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
SMALLEST_SCALE = 0.05
# the factors may take over from the backbone, but not so far that training it has no effect any more
LEAST_BACKBONE_MIX = -1.0


# the correction of the fully masked mean: spots and numbers in their tokens at most, rounds, step of the derivative and
# its least value, bounds of the slope
MEAN_SPOTS, MEAN_NUMBERS = 1000, 3 * 10**8
MEAN_ROUNDS, MEAN_STEP, SLOWEST_MEAN, MEAN_SLOPES = 5, 0.05, 0.02, (-0.5, 1.0)

# distances, in spot pitches, at which residuals of neighbouring spots are compared, and ranges that are tried
LAGS = ((0.5, 1.2), (1.2, 1.7), (1.7, 2.5), (2.5, 3.5), (3.5, 5.0), (5.0, 7.0))
RANGES = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
LARGEST_SPATIAL_SHARE = 0.95


@torch.no_grad()
def initialise_gene_factors(
    model: HingeModel, scheduler: MaskedDiffusionScheduler, gene_ids: Tensor, spots: SpotTable, seed: int
) -> Tensor:
    """Set the parameters of a model's `GeneFactorModel` (and `LibrarySizeModel`) from its training spots.

    Of what the backbone leaves unexplained in fully masked spots, ridge regression on the features (penalty by
    cross-validation over slides, or over tiles of the only slide) takes its part. The out-of-fold residuals are
    divided into the shift of each slide and what is left within it. A draw shifts a slide as a whole, so only the
    latter is for the factors: pooled residuals would mistake differences between slides for co-expression. A factor
    analysis gives loadings and noise. How backbone, regression and factors share the work once genes are visible
    (`mix`, biases, log-scales, saturation) is least squares on partly masked spots, again out of fold, so that
    nothing is trusted more than it deserves on a new slide. The correlation of the residuals of neighbouring spots
    gives the share and the range of the smooth part of a draw's noise.

    Parameters
    ----------
    model
        With a gene path. Nothing else of it is changed.
    scheduler, gene_ids
        Of the diffusion and the panel.
    spots
        Training spots, with features (n, V, d) of which view 0 is used.
    seed
        Of the masks.

    Returns
    -------
    Tensor
        (n, G) `slide_shift` of each training spot for training: what takes the regression to its out-of-fold value,
        slide shift included. Scales and factors are then trained on residuals as large as those of a new slide's
        spots. The mean of it over a slide is the slide's shift against the fitted regression.
    """
    path, device = model.gene_factor_model, model.feature_mean.device
    values = torch.from_numpy(np.asarray(spots.values, dtype=np.float32))
    features = torch.from_numpy(np.asarray(spots.features[:, 0], dtype=np.float32))
    num_spots, num_genes = values.shape
    total = scheduler.config.num_train_timesteps
    generator = step_generator(seed, 22)
    library_size = None
    condition = model.standardise(features.to(device))
    if model.library_size_model is not None:
        initialise_library_size(model, spots)
        library_size = torch.from_numpy(np.asarray(spots.library_size, dtype=np.float32)).to(device)
        condition = model.with_library_size(condition, library_size)
    x = condition.cpu().numpy().astype(np.float64)
    target = values.double().numpy()
    slides, slide_of = np.unique(spots.slide, return_inverse=True)
    several = len(slides) > 1
    splits = held_out_folds(spots)

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
            inputs = (filled[rows], visible[rows], timesteps[rows], condition[rows])
            tokens = model.tokens(
                *(tensor.to(device) for tensor in inputs), gene_ids, next_visible=following[rows].to(device)
            )
            parts.append(model.backbone.decode(tokens).float().cpu())
        return torch.cat(parts).double().numpy(), visible.double().numpy()

    def write(parameter: Tensor, content: np.ndarray) -> None:
        parameter.copy_(torch.from_numpy(np.ascontiguousarray(content)).reshape(parameter.shape))

    def slide_means(y: np.ndarray) -> np.ndarray:
        """Mean over the spots of each slide, (S, …)."""
        return np.stack([y[slide_of == number].mean(axis=0) for number in range(len(slides))])

    decoded, _ = decoded_at(total)
    offset = decoded.mean(axis=0)
    residual = target - decoded
    ridge, regression = ridge_out_of_fold(x, residual, splits)
    unexplained = residual - regression
    shifts = np.zeros((len(slides), num_genes))
    if several:
        shifts = slide_means(unexplained)
        unexplained = unexplained - shifts[slide_of]
        # from here on, the shift of a training spot's slide is known
        regression = regression + shifts[slide_of]
    spatial = _SpatialCorrelation(spots.coords, slide_of)
    spatial_range = spatial.range(unexplained)
    path.masked_decoding.fill_(model.config.masked_decoding)
    path.spatial_range.fill_(spatial_range)
    path.spatial_scale.fill_((1 - spatial.common(spatial_range)) ** -0.5)
    num_factors = min(path.loadings.shape[1], num_genes // 2, num_spots // 10)
    loadings = np.zeros(tuple(path.loadings.shape))
    noise_variance = np.maximum(unexplained.var(axis=0), SMALLEST_SCALE**2)
    if num_factors:
        analysis = FactorAnalysis(num_factors, svd_method="lapack").fit(unexplained)
        loadings[:, :num_factors] = analysis.components_.T
        noise_variance = np.maximum(analysis.noise_variance_, SMALLEST_SCALE**2)
        scores = analysis.transform(unexplained)
        # scores are shrunk towards zero, which their correlation does not see
        write(path.factor_spatial_share[:num_factors], spatial.share(scores, spatial_range))
        left_over = unexplained - scores @ analysis.components_
    else:
        left_over = unexplained
    write(path.spatial_share, spatial.share(left_over, spatial_range))

    # covariance of slide shifts: what the out-of-fold shifts have, in the directions with most of it
    _, sizes, directions = np.linalg.svd(shifts / np.sqrt(len(slides)), full_matrices=False)
    rank = min(path.slide_loadings.shape[1], len(sizes))
    slide_loadings = np.zeros(tuple(path.slide_loadings.shape))
    slide_loadings[:, :rank] = directions[:rank].T * sizes[:rank]
    write(path.slide_loadings, slide_loadings)
    write(path.mean.weight, ridge.coef_)
    write(path.mean.bias, ridge.intercept_)
    write(path.offset, offset)
    write(path.loadings, loadings)
    write(path.readout, loadings)
    write(path.log_noise, np.log(noise_variance))

    shares, columns, remaining, weights, left_log_scales = [], [], [], [], []
    curve = scheduler.num_masked(np.arange(total + 1), num_genes) / num_genes
    steps = {int(np.abs(curve[1:-1] - share).argmin()) + 1 for share in MASKED_SHARES} if total > 1 else set()
    for step in sorted(step for step in steps if 0 < curve[step] < 1):
        decoded, visible = decoded_at(step)
        expected = torch.from_numpy(offset + regression).float().to(device)
        seen = torch.from_numpy(visible).float().to(device)
        factors, left = path.posterior(values.to(device), seen, expected)
        carried = factors.cpu().double().numpy() @ loadings.T
        left_variance = (left**2).sum(dim=1).cpu().double().numpy() + noise_variance
        left_share = left_variance / ((loadings**2).sum(axis=1) + noise_variance)
        left_log_scales.append((0.5 * np.log(left_share) * (1 - visible)).sum(0) / np.maximum((1 - visible).sum(0), 1))
        shares.append(visible.mean())
        columns.append(np.stack([decoded - offset, regression, carried]))
        remaining.append(target - decoded - regression - carried)
        weights.append(1 - visible)

    def shared_work(saturation: float) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
        """Least squares of what is left on φ·columns and φ per gene: error, mix, biases, log-scales."""
        phi = saturating_share(np.asarray(shares), saturation)
        left_out = 1 - model.config.masked_decoding
        rests = [rest + left_out * (1 - f) * column[0] for f, column, rest in zip(phi, columns, remaining, strict=True)]
        per_gene = np.maximum(sum(f**2 * w.sum(axis=0) for f, w in zip(phi, weights, strict=True)), 1e-12)

        def bias_of(parts: list[np.ndarray]) -> np.ndarray:
            return sum(f * (w * part).sum(axis=-2) for f, w, part in zip(phi, weights, parts, strict=True)) / per_gene

        scaled = [f * column for f, column in zip(phi, columns, strict=True)]
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
    if left_log_scales:
        path.left_log_scale.fill_(1.0)
        log_scales[1:] -= np.stack(left_log_scales)
    # a variance of many masked genes is known better than one of few
    counts = np.array([num_spots, *(w.sum() / num_genes for w in weights)])
    line = np.polynomial.polynomial.polyfit(phi, log_scales, 1 if len(phi) > 1 else 0, w=np.sqrt(counts))
    write(path.log_scale.bias, line[0])
    write(path.visible_log_scale, line[1] if len(line) > 1 else np.zeros(num_genes))
    return torch.from_numpy(regression - ridge.predict(x)).float()


@torch.no_grad()
def fit_masked_mean(
    model: HingeModel, scheduler: MaskedDiffusionScheduler, gene_ids: Tensor, features: Tensor, batch_size: int = 256
) -> None:
    """Make the mean of what a trained model predicts, where no gene is visible, its location.

    A Gaussian that is rounded to counts, with nothing below zero, has another mean than its location: along the
    regression it rises too steeply here and too little there. Per gene, a bias and a slope of the location
    (`masked_bias` and `masked_slope` of `GeneFactorModel`) make up for it, by Gauss–Newton least squares of that mean on the
    location as it was, which cannot be below zero either.

    Parameters
    ----------
    model
        Trained, with a gene path. Nothing else of it is changed.
    scheduler, gene_ids
        Of the diffusion and the panel.
    features
        (n, d) of training spots; a thousand of them are enough and more are not looked at, fewer where their tokens
        would fill more than `MEAN_NUMBERS`.
    batch_size
        Spots at a time.
    """
    if model.config.head == "point":
        return  # its mean is its location
    path, device = model.gene_factor_model, model.feature_mean.device
    enough = min(MEAN_SPOTS, max(32, MEAN_NUMBERS // (len(gene_ids) * model.config.hidden_size)))
    some = np.linspace(0, len(features) - 1, min(len(features), enough)).astype(int)
    condition = model.standardise(features[torch.from_numpy(some)].to(device))
    library_size = None
    if model.library_size_model is not None:
        library_size = model.library_size_model.typical(condition)
        condition = model.with_library_size(condition, library_size)
    regression = path.mean(condition).double()
    centre = regression.mean(dim=0)
    bias, slope = torch.zeros_like(centre), torch.zeros_like(centre)
    batches = [slice(start, start + batch_size) for start in range(0, len(condition), batch_size)]
    tokens, nothing = [], torch.zeros(len(condition), len(gene_ids), device=device)
    filled = scheduler.fill_masked(nothing, nothing, nothing)
    timesteps = torch.full((len(condition),), scheduler.config.num_train_timesteps, device=device)
    for rows in batches:
        tokens.append(
            model.tokens(
                filled[rows], nothing[rows], timesteps[rows], condition[rows], gene_ids, next_visible=nothing[rows]
            )
        )

    def predicted(moved: Tensor, part: str) -> Tensor:
        """Location or mean (n, G) of the head's distributions when their locations are moved by (n, G)."""
        parts = []
        for rows, h in zip(batches, tokens, strict=True):
            known = None if library_size is None else library_size[rows]
            output, _ = model.read_out(h, filled[rows], nothing[rows], condition[rows], moved[rows].float(), known)
            parts.append(getattr(output, part).double())
        return torch.cat(parts)

    path.masked_bias.zero_()
    path.masked_slope.zero_()
    wanted = predicted(torch.zeros_like(regression), "location").clamp_min(0)
    along = regression - centre
    # what a gene's spots say is weighed against no correction at all, as if by one spot in a hundred
    weight = 0.01 * len(condition)
    for _ in range(MEAN_ROUNDS):
        moved = bias + slope * along
        mean = predicted(moved, "mean")
        rate = ((predicted(moved + MEAN_STEP, "mean") - mean) / MEAN_STEP).clamp_min(SLOWEST_MEAN)
        missing = wanted - mean
        first, both = (rate**2).sum(dim=0) + weight, (rate**2 * along).sum(dim=0)
        second = (rate**2 * along**2).sum(dim=0) + weight * along.var(dim=0).clamp_min(1e-12)
        right, right_along = (rate * missing).sum(dim=0), (rate * along * missing).sum(dim=0)
        determinant = first * second - both**2
        bias = bias + (second * right - both * right_along) / determinant
        slope = (slope + (first * right_along - both * right) / determinant).clamp(*MEAN_SLOPES)
    path.masked_slope.copy_(slope)
    path.masked_bias.copy_(bias - slope * centre)


def initialise_library_size(model: HingeModel, spots: SpotTable) -> None:
    """Set a model's `LibrarySizeModel` from its training spots: ridge regression of log library size on the features.

    Scales are those of out-of-fold residuals, within slides and between them.
    """
    x = model.standardise(torch.from_numpy(np.asarray(spots.features[:, 0], dtype=np.float32)).to(model.device))
    x = x.cpu().numpy().astype(np.float64)
    log_depth = np.log(np.maximum(np.asarray(spots.library_size, dtype=np.float64), 1))[:, None]
    ridge, regression = ridge_out_of_fold(x, log_depth, held_out_folds(spots))
    left = log_depth - regression
    slides, slide_of = np.unique(spots.slide, return_inverse=True)
    if len(slides) > 1:
        shifts = np.stack([left[slide_of == number].mean(axis=0) for number in range(len(slides))])
        model.library_size_model.slide_scale.fill_(float(np.sqrt((shifts**2).mean())))
        left = left - shifts[slide_of]
    with torch.no_grad():
        model.library_size_model.mean.weight.copy_(torch.from_numpy(np.atleast_2d(ridge.coef_)))
        model.library_size_model.mean.bias.copy_(torch.from_numpy(np.atleast_1d(ridge.intercept_)))
    model.library_size_model.scale.fill_(max(float(left.std()), SMALLEST_SCALE))
    spatial = _SpatialCorrelation(spots.coords, slide_of)
    model.library_size_model.spatial_share.fill_(float(spatial.share(left, spatial.range(left))[0]))


def held_out_folds(spots: SpotTable) -> list | None:
    """Folds of cross-validation. A test slide is another slide: slides are held out where there are several."""
    several = len(np.unique(spots.slide)) > 1
    groups = spatial_groups(spots, "slide" if several else "tile")
    folds = min(5, len(np.unique(groups)))
    return list(GroupKFold(folds).split(groups, groups=groups)) if folds > 1 else None


def ridge_out_of_fold(x: np.ndarray, y: np.ndarray, splits: list | None) -> tuple[RidgeCV, np.ndarray]:
    """Ridge regression of y (n, C) on x (n, d), penalty by cross-validation, and its out-of-fold prediction."""
    ridge = RidgeCV(alphas=np.logspace(-1, 6, 29), cv=splits).fit(x, y)
    if splits is None:
        return ridge, ridge.predict(x).reshape(y.shape)
    return ridge, cross_val_predict(Ridge(ridge.alpha_), x, y, cv=splits).reshape(y.shape)


class _SpatialCorrelation:
    """How alike neighbouring spots of the training slides are.

    Residuals have mean zero on each slide, which takes from a smooth field what it has in common over the whole
    slide: of a correlation k(r) with mean k̄ over all pairs of a slide's spots, (k(r) − k̄) / (1 − k̄) is left.

    Parameters
    ----------
    coords, slide_of
        Coordinates (n, 2) of the spots, and the number (n,) of each one's slide.
    """

    def __init__(self, coords: np.ndarray, slide_of: np.ndarray):
        self.slides = []
        for number in np.unique(slide_of):
            rows = np.flatnonzero(slide_of == number)
            positions = spot_positions(coords[rows])
            tree = cKDTree(positions)
            near = tree.sparse_distance_matrix(tree, LAGS[-1][1], output_type="coo_matrix")
            # a sample of pairs is enough for the mean over all of them
            some = positions[:: max(1, len(positions) // 500)]
            self.slides.append((rows, near, cdist(some, some).ravel()))

    def observed(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Correlation (lags, C) of the columns of y (n, C) between spots, mean distance (lags,), weight (lags,)."""
        products, counts, distances = np.zeros((len(LAGS), y.shape[1])), np.zeros(len(LAGS)), np.zeros(len(LAGS))
        for rows, near, _ in self.slides:
            own = y[rows]
            for lag, (low, high) in enumerate(LAGS):
                chosen = (near.data >= low) & (near.data < high)
                pairs = coo_matrix((np.ones(chosen.sum()), (near.row[chosen], near.col[chosen])), shape=near.shape)
                products[lag] += (own * (pairs.tocsr() @ own)).sum(axis=0)
                counts[lag] += chosen.sum()
                distances[lag] += near.data[chosen].sum()
        seen = counts > 0
        variance = np.maximum(y.var(axis=0), 1e-12)
        return products[seen] / counts[seen, None] / variance, distances[seen] / counts[seen], np.sqrt(counts[seen])

    def common(self, spatial_range: float) -> float:
        """k̄ of k(r) = exp(−r / range), averaged over slides."""
        return float(np.mean([np.exp(-distances / spatial_range).mean() for _, _, distances in self.slides]))

    def share(self, y: np.ndarray, spatial_range: float) -> np.ndarray:
        """Share (C,) of the variance of the columns of y (n, C) that is smooth with this range."""
        correlation, distance, weight = self.observed(y)
        if not len(distance):
            return np.zeros(y.shape[1])
        left = self._left(distance, spatial_range)[:, None]
        share = (weight[:, None] * left * correlation).sum(axis=0) / (weight[:, None] * left**2).sum()
        return np.clip(share, 0, LARGEST_SPATIAL_SHARE)

    def range(self, y: np.ndarray) -> float:
        """The range in spot pitches that fits the average correlation of the columns of y (n, C) best."""
        correlation, distance, weight = self.observed(y)
        variance = y.var(axis=0)
        if not len(distance) or variance.sum() == 0:
            return 1.0
        average = correlation @ variance / variance.sum()

        def error(spatial_range: float) -> float:
            left = self._left(distance, spatial_range)
            share = np.clip((weight * left * average).sum() / (weight * left**2).sum(), 0, LARGEST_SPATIAL_SHARE)
            return float((weight * (average - share * left) ** 2).sum())

        return min(RANGES, key=error)

    def _left(self, distance: np.ndarray, spatial_range: float) -> np.ndarray:
        common = self.common(spatial_range)
        return (np.exp(-distance / spatial_range) - common) / (1 - common)
