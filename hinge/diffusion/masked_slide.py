"""Some spots of a slide without visible genes: what a model predicts of them with any slide effect."""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtri
from torch import Tensor

from hinge.diffusion.scheduler import MaskedDiffusionScheduler
from hinge.models.distributions import ExpressionDistribution
from hinge.models.hinge import HingeModel
from hinge.models.subset import spots_at_a_time

# spots that represent a slide, and the least value of a gene whose means over few and over all spots are compared
NUM_SPOTS, LEAST_VALUE = 192, 0.05


@torch.inference_mode()
def regression_condition(model: HingeModel, features: NDArray) -> Tensor:
    """Return the condition of the regression (n, d) of features, with a typical library size."""
    device, sizes = model.feature_mean.device, model.library_size_model
    x = model.standardise(torch.as_tensor(np.asarray(features), dtype=torch.float32, device=device))
    return x if sizes is None else model.with_library_size(x, sizes.typical(x))


def spot_novelty(model: HingeModel, features: NDArray) -> NDArray[np.float64]:
    """Return how far the features (n, d) of spots are from those of training, see `RegressionUncertainty.novelty`.

    The model must have a prior of slide levels.
    """
    assert model.slide_prior is not None
    return model.slide_prior.regression.novelty(regression_condition(model, features).cpu())


class MaskedSlide:
    """Some spots of a slide without visible genes, and what a model predicts of them with any shift."""

    def __init__(self, model: HingeModel, scheduler: MaskedDiffusionScheduler, gene_ids: Tensor, features: NDArray):
        assert model.gene_factor_model is not None
        device, self.model, self._factors = model.feature_mean.device, model, model.gene_factor_model
        self.whole = regression_condition(model, features)
        self.features = self.whole[:, : model.config.feature_dim]
        rows = np.linspace(0, len(features) - 1, min(len(features), NUM_SPOTS)).astype(int)
        chosen = self.features[torch.from_numpy(rows).to(device)]
        sizes, self.sizes, condition = model.library_size_model, None, chosen
        self.stretch, self.log_scale = 1.0, np.zeros(len(gene_ids))
        if sizes is not None:
            # library sizes evenly over their distribution
            order = (0.5 + 0.618034 * np.arange(len(rows))) % 1
            normal = torch.as_tensor(ndtri(order), dtype=torch.float32, device=device)
            self.sizes = sizes(chosen, normal)
            condition = model.with_library_size(chosen, self.sizes)
        nothing = torch.zeros(len(rows), len(gene_ids), device=device)
        filled = scheduler.fill_masked(nothing, nothing, nothing)
        timesteps = torch.full((len(rows),), scheduler.config.num_train_timesteps, device=device)
        gene_ids = gene_ids.to(device)
        size = spots_at_a_time(len(rows), len(gene_ids), model.config.hidden_size, gene_ids.device)
        parts = zip(*(part.split(size) for part in (filled, nothing, timesteps, condition)), strict=True)
        found = []
        for values, visible, times, some in parts:
            tokens = model.tokens(values, visible, times, some, gene_ids, next_visible=visible)
            found.append(model.locate(tokens, values, visible, some, gene_ids)[:3])
        self.located = found[0] if len(found) == 1 else tuple(map(torch.cat, zip(*found, strict=True)))
        self._masked = self._factors.masked(condition)
        self._centre, self._slope = self._masked[0].mean(dim=0), torch.ones_like(self._masked[0][0])
        # how much more some spots express than all spots do, by the regression
        predicted = self.predicted()
        few, many = predicted[rows].mean(axis=0), predicted.mean(axis=0)
        self.ratio = np.clip((few + LEAST_VALUE) / (many + LEAST_VALUE), 0.5, 2.0)

    def set_log_sd(self, log_sd: float) -> float:
        """Make the logarithms of the library sizes spread with a standard deviation; return the factor."""
        if self.model.library_size_model is not None:
            self.stretch = log_sd / self.model.library_size_model.log_spread(self.features)
        return self.stretch

    def set_scale(self, log_scale: NDArray, slope: NDArray) -> None:
        """Set what is added to the log-scales (G,), and the factor (G,) of differences between spots."""
        self.log_scale = log_scale
        self._slope = torch.as_tensor(slope, dtype=self._centre.dtype).to(self._centre.device)

    @property
    def pattern(self) -> tuple[Tensor, Tensor]:
        """Mean location (G,) of the regression over the slide, and the factor (G,) of differences from it."""
        return self._centre, self._slope

    def mean(self, shift: NDArray, library_shift: float) -> NDArray[np.float64]:
        """Return the mean of the distributions over the slide (G,); arguments as of `distribution`."""
        return _over_spots(self.distribution(shift, library_shift).mean) / self.ratio

    def variance(self, shift: NDArray, library_shift: float) -> NDArray[np.float64]:
        """Return the mean over the slide of the variances of the distributions (G,)."""
        return _over_spots(self.distribution(shift, library_shift).variance)

    def regression_variance(self) -> NDArray[np.float64]:
        """Return the same of the gene factors alone, without a shift: what the initialisation found out of fold."""
        location, log_scale = self._masked
        nothing = location.new_zeros(*location.shape, self.model.config.hidden_size)
        location = location + self._change(self.sizes)
        return _over_spots(self.model.distribution(location, nothing, log_scale, self.sizes).variance)

    def distribution(self, shift: NDArray, library_shift: float) -> ExpressionDistribution:
        """Return the distributions with a shift (G,) of the locations, and one of the logarithms of library sizes."""
        location, tokens, log_scale = self.located
        if log_scale is not None:
            log_scale = log_scale + torch.as_tensor(self.log_scale, dtype=log_scale.dtype, device=log_scale.device)
        location = location + (self._slope - 1) * (self._masked[0] - self._centre)
        moved = location + torch.as_tensor(shift, dtype=location.dtype, device=location.device)
        sizes = None if self.sizes is None else (self.sizes**self.stretch * np.exp(library_shift)).clamp_min(1)
        return self.model.distribution(moved + self._change(sizes), tokens, log_scale, sizes)

    def _change(self, sizes: Tensor | None) -> Tensor | float:
        """Return by how much library sizes (B,) of the spots change their locations (B, G); 0 without such a model."""
        model = self.model.library_size_model
        return 0.0 if model is None or sizes is None else model.change(sizes) + model.excess(self.sizes)

    def library_shift(self, library_size: float) -> float:
        """Return the shift of the logarithms with which the slide has a mean library size; 0 without such a model."""
        model = self.model.library_size_model
        return 0.0 if model is None else float(np.log(library_size)) - model.log_mean(self.features, self.stretch)

    @torch.inference_mode()
    def predicted(self) -> NDArray[np.float64]:
        """Return the regression (n, G) of the gene factor model on the features of all spots."""
        regression = self._factors.offset + self._factors.mean(self.whole)
        return (regression + self._typical_change()).clamp_min(0).double().cpu().numpy()

    @torch.inference_mode()
    def regression_difference(self) -> NDArray[np.float64]:
        """Return the mean regression (G,) over the slide, less that over the training spots.

        Zero where both are whole slides whose features are standardised within each. Zero with condition tokens, which
        are features too and whose part of the level the prior has.
        """
        assert self.model.slide_prior is not None
        if self.model.config.num_tokens:
            return np.zeros(self.model.config.num_genes)
        weight = self._factors.mean.weight.double()
        away = self.whole.double() - self.model.slide_prior.regression.centre.to(weight)
        # the change of the training spots has no mean
        difference = away.mean(dim=0) @ weight.T + self._typical_change().double().mean(dim=0)
        return difference.cpu().numpy()

    def _typical_change(self) -> Tensor:
        """Return by how much typical library sizes of all spots change their values (n, G); 0 without such a model."""
        model = self.model.library_size_model
        return self.features.new_zeros(()) if model is None else model.change(model.typical(self.features))

    def residuals(self, generator: np.random.Generator, count: int) -> NDArray[np.float64]:
        """Return random residuals (count, G) of the regression, correlated between genes as those of spots are."""
        loadings = self._factors.loadings.detach().cpu().double().numpy()
        noise = self._factors.log_noise.detach().cpu().double().exp().numpy()
        shared = generator.standard_normal((count, loadings.shape[1])) @ loadings.T
        return shared + np.sqrt(noise) * generator.standard_normal((count, len(noise)))

    def within(self, count: NDArray) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return loadings (G, K) and variances (G,) of the mean residual of a gene over a number of spots (G,)."""
        factors, number = self._factors, np.maximum(count, 1)
        loadings = factors.loadings.detach().cpu().double().numpy() / np.sqrt(number)[:, None]
        return loadings, factors.log_noise.detach().cpu().double().exp().numpy() / number


def _over_spots(values: Tensor) -> NDArray[np.float64]:
    return values.double().mean(dim=0).cpu().numpy()
