"""Closed-form initialisation of the gene factors and of the library size, before the first gradient step."""

import logging
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import ndtr
from torch import Tensor

from hinge.data.gene_parts import GenePart, gene_parts
from hinge.data.spots import SpotTable, spot_groups
from hinge.diffusion.scheduler import MaskedDiffusionScheduler
from hinge.evaluation.ridge import RidgeFolds, fit_ridge, fit_ridge_by_component, fit_ridge_of_parts
from hinge.models.distributions import CountGrid, RoundedGaussian
from hinge.models.expected_values import expected_values
from hinge.models.gene_factors import GeneFactorModel
from hinge.models.hinge import HingeModel
from hinge.models.library_size import LOG_SIZES, NORMAL_SCORES
from hinge.models.regression_uncertainty import RegressionUncertainty
from hinge.models.subset import spots_at_a_time
from hinge.training.completed_regression import fit_completed_ridge
from hinge.training.loop import step_generator
from hinge.training.measured import MeasuredGenes, variance_of
from hinge.training.partly_masked import fit_visible_share, partly_masked_spots
from hinge.training.prior_covariance import PriorCovariance, factor_scores, fit_factors, prior_covariance
from hinge.training.spatial_correlation import SpatialCorrelation
from hinge.training.stored_regression import StoredRegression
from hinge.utils.threads import in_torch_threads

logger = logging.getLogger(__name__)

SMALLEST_SCALE = 0.05
# of a gene's deviation, added to residuals before their logarithm is taken
RESIDUAL_FLOOR = 0.1
# of the library size among the features, in units of that of an image feature
LIBRARY_SIZE_PENALTY = 0.01
# least mean value whose location is looked for, its largest distance from it, rounds of bisection
LEAST_EXPECTED, FARTHEST_LOCATION, LOCATION_ROUNDS = 0.02, 4.0, 16
# of values that a backbone decodes: rounding
SAME_DECODED = 1e-3


class Initialisation(NamedTuple):
    """What training takes from the initialisation beside the parameters that it sets.

    Attributes
    ----------
    slide_shift
        (n, G) of each training spot: the difference of the out-of-fold regression, slide shift included, from the
        fitted regression. Scales and factors are then trained on residuals as large as those of a new slide's spots.
        The mean over a slide is the slide's shift against the fitted regression.
    library_shift
        (n,) of `initialise_library_size`; None for a model without library sizes.
    regression
        The uncertainty of the regression.
    """

    slide_shift: Tensor
    library_shift: Tensor | None
    regression: RegressionUncertainty


@torch.no_grad()
def initialise_gene_factors(
    model: HingeModel,
    scheduler: MaskedDiffusionScheduler,
    gene_ids: Tensor,
    spots: SpotTable,
    seed: int,
    batch_size: int = 256,
    stored: StoredRegression | None = None,
) -> Initialisation:
    """Set the parameters of a model's `GeneFactorModel` (and `LibrarySizeModel`) from its training spots.

    1. Ridge regression on the features predicts what the backbone leaves unexplained in fully masked spots.
    2. The out-of-fold residuals are divided into the shift of each slide and the rest. A draw shifts a slide as a
       whole, so the factors must not contain differences between slides.
    3. A factor analysis of the rest, its correlations shrunk towards those of the pre-training counts, gives loadings
       and noise. The correlation of neighbouring spots gives the share and the range of the smooth part of a draw's
       noise. Ridge regression of the logarithm of the rest gives how log-scales follow the features.
    4. Least squares on partly masked spots decides how backbone, regression and factors are weighed once genes are
       visible (`mix`, biases, log-scales, saturation). It uses the out-of-fold regression, so that the weights suit a
       new slide.

    Parameters
    ----------
    model
        With a `GeneFactorModel`. Nothing else of it is changed.
    scheduler, gene_ids
        Of the diffusion and the panel.
    spots
        Training spots, with features (n, V, d) of which view 0 is used.
    seed
        Of the masks.
    batch_size
        Spots of a forward pass, at most.
    stored
        Fits the regression to all spots of a store of which `spots` are a part. It is not used where what the backbone
        decodes without a visible gene differs between spots.
    """
    factors = model.gene_factor_model
    backbone = _Backbone(model, scheduler, gene_ids, spots, seed, batch_size)
    x = backbone.condition.cpu().numpy().astype(np.float64)
    decoded, _ = backbone.decode(scheduler.config.num_train_timesteps)
    offset = decoded.mean(axis=0)
    residual = backbone.target - decoded
    parts, measured = gene_parts(spots), backbone.measured
    groups = spot_groups(spots.slide, spots.coords, "fold")
    if stored is not None and np.ptp(decoded, axis=0).max() > SAME_DECODED:
        logger.info("the regression on the features is fitted to %d of %d training spots", len(x), len(stored))
        stored = None
    prior = prior_covariance(model.backbone, gene_ids)
    penalty_factors = _penalty_factors(model, x.shape[1])
    loadings = None if prior is None else prior.standardised_loadings()
    if stored is not None:
        ridge = stored.fit(model, x, offset, backbone.library_shift)
    elif measured is None:
        ridge, _ = fit_ridge_by_component(RidgeFolds(x, groups, penalty_factors), residual, loadings)
    else:
        most = _most_factors(factors, len(x), len(offset))
        ridge = fit_completed_ridge(x, residual, parts, groups, measured, most, penalty_factors, loadings)
    shifts, slide_of = slide_shifts(residual - ridge.held_out, spots.slide, measured)
    regression = ridge.held_out + shifts[slide_of]
    unexplained = residual - ridge.held_out - shifts[slide_of]
    if measured is not None:
        unexplained[~measured.values()] = 0.0
    for parameter, content in (
        (factors.masked_decoding, model.config.masked_decoding),
        (factors.mean.weight, ridge.weight),
        (factors.mean.bias, ridge.bias),
        (factors.offset, offset),
    ):
        write(parameter, content)
    _set_noise(factors, unexplained, SpatialCorrelation(spots.coords, slide_of), groups, prior, measured)
    _set_scale_weights(factors, x, unexplained, parts, measured)
    partly = partly_masked_spots(factors, scheduler, backbone, offset, regression)
    _set_scales(factors, partly, unexplained, 1 - model.config.masked_decoding, x.mean(axis=0), measured)
    if model.library_size_model is not None and model.config.head in ("rounded_gaussian", "rounded_mixture"):
        _set_location_excess(model, spots, backbone.condition[:, :-1])
    uncertainty = RegressionUncertainty(x.shape[1])
    uncertainty.fit(x, ridge.penalty, None if stored is None else len(stored))
    slide_shift = torch.from_numpy(regression - ridge.predict(x)).float()
    return Initialisation(slide_shift, backbone.library_shift, uncertainty)


class _Backbone:
    """The training spots as the backbone decodes them, without the gene factors.

    Attributes
    ----------
    condition
        (n, d) standardised features, with the library size where the model has it.
    values, target
        (n, G) expression; in float64 and without what the library size changes it by.
    measured
        Which genes the spots have; None for all.
    library_shift
        As of `Initialisation`.
    """

    def __init__(self, model: HingeModel, scheduler, gene_ids: Tensor, spots: SpotTable, seed: int, batch_size: int):
        self.batch_size = batch_size
        self.model, self.scheduler, self.gene_ids = model, scheduler, gene_ids
        self.device = model.feature_mean.device
        self.generator = step_generator(seed, 22)
        self.values = torch.from_numpy(np.asarray(spots.values, dtype=np.float32))
        self.target = self.values.double().numpy()
        self.measured = MeasuredGenes.of(spots)
        features = torch.from_numpy(np.asarray(spots.features[:, 0], dtype=np.float32))
        self.condition = model.standardise(features.to(self.device))
        self.library_shift: Tensor | None = None
        if model.library_size_model is not None:
            self.library_shift = initialise_library_size(model, spots)
            sizes = torch.from_numpy(np.asarray(spots.library_size, dtype=np.float32))
            self.target -= model.library_size_model.change(sizes.to(self.device)).cpu().double().numpy()
            relative = sizes * (-self.library_shift).exp()
            self.condition = model.with_library_size(self.condition, relative.to(self.device))

    def decode(self, timestep: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the decoded values (n, G) at a timestep, and which genes were visible (n, G)."""
        timesteps = torch.full((len(self.values),), timestep)
        uniform = torch.rand(self.values.shape, generator=self.generator)
        noise = torch.randn(self.values.shape, generator=self.generator)
        visible = self.scheduler.visible_at(timesteps, uniform)
        following = self.scheduler.visible_at(timesteps - 1, uniform)
        if self.measured is not None:
            everything = np.arange(len(timesteps))
            has = self.measured.of_spots(everything)
            visible, following = visible * has, following * has
            timesteps = self.measured.timesteps(self.scheduler, everything, timesteps, visible)
        filled = self.scheduler.fill_masked(self.values, visible, noise)
        size = spots_at_a_time(self.batch_size, len(self.gene_ids), self.model.config.hidden_size, self.device)

        def part(start: int) -> Tensor:
            rows = slice(start, start + size)
            inputs = (filled[rows], visible[rows], timesteps[rows], self.condition[rows])
            inputs = (*(tensor.to(self.device) for tensor in inputs), self.gene_ids)
            with torch.no_grad():  # which holds for one thread
                tokens = self.model.tokens(*inputs, next_visible=following[rows].to(self.device))
                return self.model.decode(tokens, inputs[0], inputs[1], self.gene_ids).float().cpu()

        parts = list(in_torch_threads(part, range(0, len(timesteps), size), self.device.type))
        return torch.cat(parts).double().numpy(), visible.double().numpy()


@torch.no_grad()
def initialise_library_size(model: HingeModel, spots: SpotTable) -> Tensor:
    """Set a model's `LibrarySizeModel` from its training spots: ridge regression of log library size on the features.

    Scale and quantiles are those of out-of-fold residuals within slides. The expected change of values with the library
    size is that of Poisson counts with the training spots' composition. Return the shift (n,) of each spot's slide, by
    which the logarithms of its library sizes are larger.
    """
    sizes = model.library_size_model
    x = model.standardise(torch.from_numpy(np.asarray(spots.features[:, 0], dtype=np.float32)).to(model.device))
    log_size = np.log(np.maximum(np.asarray(spots.library_size, dtype=np.float64), 1))[:, None]
    groups = spot_groups(spots.slide, spots.coords, "fold")
    features = x.cpu().numpy().astype(np.float64)
    ridge = fit_ridge(features, log_size, groups)
    shifts, slide_of = slide_shifts(log_size - ridge.held_out, spots.slide)
    left = log_size - ridge.held_out - shifts[slide_of]
    spatial = SpatialCorrelation(spots.coords, slide_of)
    scale = max(float(left.std()), SMALLEST_SCALE)
    write(sizes.mean.weight, ridge.weight)
    write(sizes.mean.bias, ridge.bias)
    write(sizes.scale, scale)
    write(sizes.quantile_excess, np.quantile((left - left.mean()) / scale, ndtr(NORMAL_SCORES)) - NORMAL_SCORES)
    write(sizes.spatial_share, spatial.share(left, spatial.range(left))[0])
    within = log_size - ridge.predict(features)
    of_slides = np.array([within[slide_of == number].mean() for number in range(len(shifts))])
    write(sizes.expected_change, _expected_values(spots))
    # without a mean over the training spots, which is that of the regression
    sizes.expected_change -= sizes.change(sizes.typical(x)).mean(dim=0)
    return torch.from_numpy(of_slides[slide_of]).float()


def _expected_values(spots: SpotTable) -> np.ndarray:
    """Return the mean values (…, G) at `LOG_SIZES` of Poisson counts with the composition of the spots."""
    counts, sizes = spots.known_counts().astype(np.float64), np.maximum(spots.library_size.astype(np.float64), 1)
    total = np.where(np.isfinite(counts), sizes[:, None], 0.0).sum(axis=0)
    shares = np.nansum(counts, axis=0) / np.maximum(total, 1)
    # counts spread more than those of Poisson, but how they depend on the library size is hardly another
    spread = np.zeros(len(shares))
    return np.stack([expected_values(shares, size, np.ones(1), spread, spots.transform) for size in np.exp(LOG_SIZES)])


def _set_location_excess(model: HingeModel, spots: SpotTable, x: Tensor) -> None:
    """Set by how much locations change beyond what is expected of values, from standardised features (n, d).

    The location at a library size is found by bisection, such that a Gaussian, rounded to the counts of this library
    size, has the expected mean. Its scale is that of a spot with the mean features and this library size.
    """
    sizes, device = model.library_size_model, model.device
    library_size = torch.from_numpy(np.exp(LOG_SIZES)).float().to(device)
    condition = model.with_library_size(x.mean(dim=0).expand(len(library_size), -1), library_size)
    scale = model.gene_factor_model.masked(condition)[1].exp()
    wanted = torch.from_numpy(np.maximum(_expected_values(spots), LEAST_EXPECTED)).float().to(device)
    grid = CountGrid(spots.transform, library_size)
    low, high = wanted - FARTHEST_LOCATION, wanted + FARTHEST_LOCATION
    for _ in range(LOCATION_ROUNDS):
        middle = (low + high) / 2
        less = RoundedGaussian(middle, scale, grid).mean < wanted
        low, high = torch.where(less, middle, low), torch.where(less, high, middle)
    sizes.location_excess.copy_((low + high) / 2 - wanted)
    sizes.location_excess -= sizes.excess(sizes.typical(x)).mean(dim=0)


def slide_shifts(
    residual: np.ndarray, slides: np.ndarray, measured: MeasuredGenes | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean residual (S, G) of each slide, and the number of each spot's slide (n,).

    residual is (n, G), slides (n,). The shift of a single slide is zero: nothing tells it from the regression; so is
    that of a gene that one slide or not this one has.
    """
    names, slide_of = np.unique(slides, return_inverse=True)
    if len(names) == 1:
        return np.zeros((1, residual.shape[1])), slide_of
    shifts = np.stack([residual[slide_of == number].mean(axis=0) for number in range(len(names))])
    if measured is not None:
        shifts = np.where(measured.of_slides & (measured.of_slides.sum(axis=0) > 1), shifts, 0.0)
    return shifts, slide_of


def write(parameter: Tensor, content: np.ndarray | float) -> None:
    """Set a parameter or buffer to an array of as many numbers."""
    with torch.no_grad():
        parameter.copy_(torch.from_numpy(np.ascontiguousarray(content)).reshape(parameter.shape))


def _penalty_factors(model: HingeModel, num_features: int) -> np.ndarray | None:
    """Return the penalty of each feature (d,) in units of that of an image feature; None: 1 for all.

    The library size is a single column of known effect among hundreds from the image, whose penalty is much too large
    for it.
    """
    if model.library_size_model is None:
        return None
    factors = np.ones(num_features)
    factors[-1] = LIBRARY_SIZE_PENALTY
    return factors


def _most_factors(factors: GeneFactorModel, num_spots: int, num_genes: int) -> int:
    """Return the number of factors that the spots suffice for."""
    return min(factors.loadings.shape[1], num_genes // 2, num_spots // 10)


def _set_noise(
    factors: GeneFactorModel,
    unexplained: np.ndarray,
    spatial: SpatialCorrelation,
    groups: np.ndarray,
    prior: PriorCovariance | None,
    measured: MeasuredGenes | None,
) -> None:
    """Set loadings, noise and spatial correlation from what is unexplained within slides (n, G).

    The correlations of the residuals are shrunk towards those of `prior`, of the pre-training counts; None for none.
    """
    num_spots, num_genes = unexplained.shape
    of_slides = None if measured is None else measured.of_slides
    spatial_range = spatial.range(unexplained, of_slides)
    write(factors.spatial_range, spatial_range)
    write(factors.spatial_scale, (1 - spatial.common(spatial_range)) ** -0.5)
    num_factors = _most_factors(factors, num_spots, num_genes)
    loadings = np.zeros(tuple(factors.loadings.shape))
    variance, left_over = variance_of(unexplained, measured), unexplained
    if num_factors:
        analysis = fit_factors(unexplained, groups, num_factors, prior, measured)
        loadings[:, :num_factors] = analysis.components_.T
        variance = analysis.noise_variance_
        scores = factor_scores(analysis, unexplained, measured)
        # scores are shrunk towards zero, which does not change their correlation
        write(factors.factor_spatial_share[:num_factors], spatial.share(scores, spatial_range))
        left_over = unexplained - scores @ analysis.components_
        if measured is not None:
            left_over = np.where(measured.values(), left_over, 0.0)
    write(factors.spatial_share, spatial.share(left_over, spatial_range, of_slides))
    write(factors.loadings, loadings)
    write(factors.readout, loadings)
    write(factors.log_noise, np.log(np.maximum(variance, SMALLEST_SCALE**2)))


def _set_scale_weights(
    factors: GeneFactorModel,
    x: np.ndarray,
    unexplained: np.ndarray,
    parts: list[GenePart],
    measured: MeasuredGenes | None,
) -> None:
    """Set how a gene's log-scale follows the features (n, d): ridge regression of the logarithm of the residuals.

    The penalty is cross-validated, because spots are few: trained by gradients, the weights fit the training slides and
    widen or narrow the distributions of another slide at random.
    """
    deviation = unexplained.std(axis=0) if measured is None else np.sqrt(variance_of(unexplained, measured))
    floor = RESIDUAL_FLOOR * deviation + SMALLEST_SCALE
    fit = fit_ridge_of_parts(x, 0.5 * np.log(unexplained**2 + floor**2), parts)
    write(factors.log_scale.weight, fit.weight)


def _set_scales(
    factors: GeneFactorModel,
    partly: list,
    unexplained: np.ndarray,
    left_out: float,
    centre: np.ndarray,
    measured: MeasuredGenes | None,
) -> None:
    """Set how backbone, regression and factors are weighed, and log-scales, over the share of visible genes.

    partly is of `partly_masked_spots`, unexplained (n, G) what is left of fully masked spots, left_out the share of the
    decoded values that does not count where no gene is visible, centre (d,) the mean of the features.
    """
    phi, variances = np.zeros(1), variance_of(unexplained, measured)[None]
    if partly:
        fit = fit_visible_share(partly, left_out)
        write(factors.saturation, fit.saturation)
        write(factors.mix, fit.mix)
        write(factors.visible_bias, fit.bias)
        write(factors.left_log_scale, 1.0)
        phi = np.concatenate([phi, fit.phi])
        variances = np.vstack([variances, fit.variances])
    log_scales = np.log(np.maximum(np.sqrt(variances), SMALLEST_SCALE))
    if partly:
        log_scales[1:] -= np.stack([each.left_log_scale for each in partly])
    # a variance of many masked genes is known better than one of few
    num_spots, num_genes = unexplained.shape
    counts = np.array([num_spots, *(each.weight.sum() / num_genes for each in partly)])
    if measured is None:
        line = np.polynomial.polynomial.polyfit(phi, log_scales, 1 if len(phi) > 1 else 0, w=np.sqrt(counts))
    else:
        line = _lines(phi, log_scales, np.stack([measured.count(), *(each.weight for each in partly)]))
    # the log-scales above are of a typical spot
    write(factors.log_scale.bias, line[0] - factors.log_scale.weight.cpu().double().numpy() @ centre)
    write(factors.visible_log_scale, line[1] if len(line) > 1 else np.zeros(num_genes))


def _lines(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return intercept and slope (2, G) of the weighted least-squares line of each column of y (T, G) on x (T,)."""
    total = np.maximum(weights.sum(axis=0), 1e-12)
    centre, mean = weights.T @ x / total, (weights * y).sum(axis=0) / total
    away = x[:, None] - centre
    slope = (weights * away * (y - mean)).sum(axis=0) / np.maximum((weights * away**2).sum(axis=0), 1e-12)
    return np.stack([mean - slope * centre, slope])
