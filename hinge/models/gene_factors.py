"""The gene factor model: every gene's distribution from the features and from the visible genes, without the backbone.

SoftAdaLN reaches genes only through shifts and scales that all of them share. The gene factor model has parameters for
each gene: a linear regression on the features, and factors that carry the residuals of visible genes to masked genes.
It starts at zero, so that a new model equals its backbone; `hinge.training.initialisation` fits it in closed form.
"""

import torch
from torch import Tensor, nn

from hinge.models.precision import at_least_float32


def saturating_share(share, saturation):
    """Return φ(s) = s(1 + c)/(s + c): 0 at 0, 1 at 1, half-way near s = c.

    It replaces the share of visible genes: a few of them carry most of the information that all of them carry.
    """
    return share * (1 + saturation) / (share + saturation)


class GeneFactorModel(nn.Module):
    """Location and log-scale of every gene from features, visible genes and the backbone's prediction.

    With P = W·features + b and φ = φ(share of visible genes), the residual of a visible gene is
    e = value − offset − P − slide shift. The factors z of a spot have a standard normal prior and e = Λz + noise,
    of variance ψ per gene; ẑ and C are the posterior mean and covariance of z given the visible residuals (a factor
    model; Bishop, Pattern Recognition and Machine Learning, 2006, section 12.2.4), v = ψ + diag(ΛCΛᵀ) is the variance
    left in every gene and v₀ the one before any is visible. Then

        location = offset + (δ + (1 + m₀ − δ)φ)(decoded − offset) + (1 + m₁φ)P + (1 + m₂φ)R·ẑ
                   + φ·visible_bias + (1 − φ)(a + b·P) + slide shift
        log-scale = S·features + s + ρ·½log(v / v₀) + φ·visible_log_scale

    δ weights the backbone's prediction where no gene is visible. It is 1 until the initialisation sets it, so that a
    new model equals its backbone. There the backbone has no more information than P, and what it learns beyond P from
    the images of some slides need not hold on other slides. a and b are zero during training; `fit_masked_mean` then
    sets them such that the mean of the head's distribution, which differs from its location where values are rounded
    to counts, follows P.

    Genes revealed in the same step are drawn together: their normal numbers have the correlations of ΛCΛᵀ + Ψ
    (`innovation`), so that few steps do not lose the dependence between genes.

    Parameters
    ----------
    feature_dim, num_genes
        d and G.
    num_factors
        K, the number of factors.
    num_slide_factors
        R: a slide shifts all its spots by U·a with a (R,) standard normal. The shifts of training slides are estimated;
        that of a new slide is part of a draw.
    """

    saturation: Tensor
    masked_decoding: Tensor
    masked_bias: Tensor
    masked_slope: Tensor
    slide_loadings: Tensor
    factor_spatial_share: Tensor
    spatial_share: Tensor
    spatial_range: Tensor
    spatial_scale: Tensor

    def __init__(self, feature_dim: int, num_genes: int, num_factors: int, num_slide_factors: int):
        super().__init__()
        self.mean = nn.Linear(feature_dim, num_genes)
        self.log_scale = nn.Linear(feature_dim, num_genes)
        for linear in (self.mean, self.log_scale):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        self.offset = nn.Parameter(torch.zeros(num_genes))
        self.loadings = nn.Parameter(0.1 * torch.randn(num_genes, num_factors))
        self.log_noise = nn.Parameter(torch.zeros(num_genes))
        self.readout = nn.Parameter(torch.zeros(num_genes, num_factors))
        self.mix = nn.Parameter(torch.zeros(3))
        self.visible_bias = nn.Parameter(torch.zeros(num_genes))
        self.visible_log_scale = nn.Parameter(torch.zeros(num_genes))
        self.left_log_scale = nn.Parameter(torch.zeros(()))
        self.register_buffer("saturation", torch.tensor(0.1))
        self.register_buffer("masked_decoding", torch.ones(()))
        self.register_buffer("masked_bias", torch.zeros(num_genes))
        self.register_buffer("masked_slope", torch.zeros(num_genes))
        # for the draws of a whole slide: U above, the share of a factor's and of a gene's own variance that
        # neighbouring spots have in common, and the range in spot pitches over which it falls to 1/e
        self.register_buffer("slide_loadings", torch.zeros(num_genes, num_slide_factors))
        self.register_buffer("factor_spatial_share", torch.zeros(num_factors))
        self.register_buffer("spatial_share", torch.zeros(num_genes))
        self.register_buffer("spatial_range", torch.ones(()))
        # the smooth part is multiplied by this, so that it has its share of the variance within a slide
        self.register_buffer("spatial_scale", torch.ones(()))

    def masked(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return location and log-scale (B, G) where no gene is visible, but for the backbone's prediction."""
        regression = at_least_float32(self.mean(features))
        location = self.offset + regression + self.masked_bias + self.masked_slope * regression
        return location, at_least_float32(self.log_scale(features))

    def posterior(self, values: Tensor, visible: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
        """Return the posterior of the factors given the visible genes.

        Parameters
        ----------
        values, visible, expected
            (B, G); `expected` is what the factors add to: offset, regression and slide shift.

        Returns
        -------
        tuple
            Posterior mean (B, K), and W = L⁻¹Λᵀ (B, K, G) with LLᵀ the posterior precision: the covariance that is
            left between genes is WᵀW + Ψ.
        """
        loadings = at_least_float32(self.loadings)
        precision = at_least_float32(visible) * torch.exp(-at_least_float32(self.log_noise))
        # the K × K system needs float32 whatever the precision of the run is
        with torch.autocast(values.device.type, enabled=False):
            outer = (loadings.unsqueeze(2) * loadings.unsqueeze(1)).flatten(1)
            count = loadings.shape[1]
            system = (precision @ outer).view(-1, count, count) + torch.eye(count, device=values.device)
            # not torch.linalg.cholesky, whose check makes the host wait for the device; the system is positive definite
            lower = torch.linalg.cholesky_ex(system).L
            right = (precision * (at_least_float32(values) - at_least_float32(expected))) @ loadings
            mean = torch.cholesky_solve(right.unsqueeze(-1), lower).squeeze(-1)
            # the inverse times Λᵀ is one product: a third of the time of solving for G columns
            identity = torch.eye(count, device=values.device).expand_as(lower)
            return mean, torch.linalg.solve_triangular(lower, identity, upper=False) @ loadings.T

    def innovation(self, left: Tensor, factor_normal: Tensor, gene_normal: Tensor) -> Tensor:
        """Return standard normal numbers (B, G) with the correlations that are left between genes.

        Parameters
        ----------
        left
            W (B, K, G) of `posterior`.
        factor_normal, gene_normal
            (B, K) and (B, G) independent standard normal numbers.
        """
        noise = at_least_float32(self.log_noise).exp()
        shared = torch.einsum("bkg,bk->bg", left, factor_normal)
        return (shared + noise.sqrt() * gene_normal) / ((left**2).sum(dim=1) + noise).sqrt()

    def forward(
        self, decoded: Tensor, values: Tensor, visible: Tensor, features: Tensor, slide_shift: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return location and log-scale (B, G), and W (B, K, G) of `posterior`.

        Parameters
        ----------
        decoded
            (B, G) prediction of the backbone.
        values, visible
            (B, G).
        features
            (B, d) standardised.
        slide_shift
            (B, G) shift of the whole slide; None for no shift.
        """
        phi = saturating_share(at_least_float32(visible).mean(dim=1, keepdim=True), self.saturation)
        regression = at_least_float32(self.mean(features))
        shift = torch.zeros_like(regression) if slide_shift is None else at_least_float32(slide_shift)
        factors, left = self.posterior(values, visible, self.offset + regression + shift)
        carried = factors @ at_least_float32(self.readout).T
        noise, loadings = at_least_float32(self.log_noise).exp(), at_least_float32(self.loadings)
        left_share = ((left**2).sum(dim=1) + noise) / ((loadings**2).sum(dim=1) + noise)
        location = (
            decoded
            + (self.mix[0] * phi - (1 - self.masked_decoding) * (1 - phi)) * (decoded - self.offset)
            + (1 + self.mix[1] * phi) * regression
            + (1 + self.mix[2] * phi) * carried
            + phi * self.visible_bias
            + (1 - phi) * (self.masked_bias + self.masked_slope * regression)
            + shift
        )
        log_scale = at_least_float32(self.log_scale(features)) + phi * self.visible_log_scale
        return location, log_scale + 0.5 * self.left_log_scale * left_share.log(), left
