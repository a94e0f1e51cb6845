"""A short way from the features, and from visible genes, to every gene's distribution.

SoftAdaLN reaches genes only through shifts and scales that all of them share. This path speaks to each gene on its
own: a linear regression on the features, and shared factors that carry what visible genes say beyond it to the
masked ones. It starts at zero, so that the model still equals its backbone; training may first solve for it in
closed form (`hinge.training.initialisation`).
"""

import torch
from torch import Tensor, nn


def saturating_share(share, saturation):
    """φ(s) = s(1 + c)/(s + c): 0 at 0, 1 at 1, half-way near s = c.

    The share of visible genes as the path sees it: a few of them already tell most of what all of them do.
    """
    return share * (1 + saturation) / (share + saturation)


class GeneFactorModel(nn.Module):
    """Location and log-scale of every gene from features, visible genes and what the backbone decoded.

    With P = W·features + b and φ = φ(share of visible genes), the residual of a visible gene is
    e = value − offset − P − slide shift. The factors z of a spot have a standard normal prior and e = Λz + noise,
    of variance ψ per gene; ẑ and C are the posterior mean and covariance of z given the visible residuals (a factor
    model; Bishop, Pattern Recognition and Machine Learning, 2006, section 12.2.4), v = ψ + diag(ΛCΛᵀ) is the variance
    left in every gene and v₀ the one before any is visible. Then

        location = offset + (δ + (1 + m₀ − δ)φ)(decoded − offset) + (1 + m₁φ)P + (1 + m₂φ)R·ẑ
                   + φ·visible_bias + (1 − φ)(a + b·P) + slide shift
        log-scale = S·features + s + ρ·½log(v / v₀) + φ·visible_log_scale

    δ is how much of what the backbone decodes counts where no gene is visible. There it knows no more than P does,
    and what it learns of some slides' images beyond P need not hold on the next one. It is 1 until the closed-form
    start sets it, so that a new model equals its backbone. a and b are zero until training is over: they then make the
    mean of the head's distribution, which is not its location where values are rounded to counts, follow P
    (`fit_masked_mean`).

    Genes revealed in the same step are drawn together: their normal numbers have the correlations of ΛCΛᵀ + Ψ
    (`innovation`), so that few steps do not cost dependence.

    Parameters
    ----------
    feature_dim, num_genes
        d and G.
    num_factors
        K, the number of factors.
    num_slide_factors
        R: a slide's own shift of all its spots is U·a with a (R,) standard normal. Shifts of training slides are
        estimated; a new slide's is part of what a draw draws.
    """

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
        # how a whole slide is drawn: U above, and what share of a factor's and of a gene's own variance neighbouring
        # spots have in common, with the range in spot pitches over which it falls to 1/e
        self.register_buffer("slide_loadings", torch.zeros(num_genes, num_slide_factors))
        self.register_buffer("factor_spatial_share", torch.zeros(num_factors))
        self.register_buffer("spatial_share", torch.zeros(num_genes))
        self.register_buffer("spatial_range", torch.ones(()))
        # what the smooth part is multiplied with so that it has its share of the variance within a slide
        self.register_buffer("spatial_scale", torch.ones(()))

    def posterior(self, values: Tensor, visible: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
        """What visible genes say of the factors.

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
        loadings = self.loadings.float()
        precision = visible.float() * torch.exp(-self.log_noise.float())
        # the K × K system wants float32 whatever the run's precision is
        with torch.autocast(values.device.type, enabled=False):
            outer = (loadings.unsqueeze(2) * loadings.unsqueeze(1)).flatten(1)
            count = loadings.shape[1]
            system = (precision @ outer).view(-1, count, count) + torch.eye(count, device=values.device)
            lower = torch.linalg.cholesky(system)
            right = (precision * (values.float() - expected.float())) @ loadings
            mean = torch.cholesky_solve(right.unsqueeze(-1), lower).squeeze(-1)
            return mean, torch.linalg.solve_triangular(lower, loadings.T.expand(lower.shape[0], -1, -1), upper=False)

    def innovation(self, left: Tensor, factor_normal: Tensor, gene_normal: Tensor) -> Tensor:
        """Standard normal numbers (B, G) with the correlations that the factors leave between genes.

        left is W (B, K, G) of `posterior`; factor_normal (B, K) and gene_normal (B, G) are independent.
        """
        noise = self.log_noise.float().exp()
        shared = torch.einsum("bkg,bk->bg", left, factor_normal)
        return (shared + noise.sqrt() * gene_normal) / ((left**2).sum(dim=1) + noise).sqrt()

    def forward(
        self, decoded: Tensor, values: Tensor, visible: Tensor, features: Tensor, slide_shift: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Location and log-scale (B, G), and W (B, K, G) of `posterior`.

        decoded, values, visible, slide_shift are (B, G), features (B, d).
        """
        phi = saturating_share(visible.float().mean(dim=1, keepdim=True), self.saturation)
        path = self.mean(features).float()
        shift = torch.zeros_like(path) if slide_shift is None else slide_shift.float()
        factors, left = self.posterior(values, visible, self.offset + path + shift)
        carried = factors @ self.readout.float().T
        noise, loadings = self.log_noise.float().exp(), self.loadings.float()
        left_share = ((left**2).sum(dim=1) + noise) / ((loadings**2).sum(dim=1) + noise)
        location = (
            decoded
            + (self.mix[0] * phi - (1 - self.masked_decoding) * (1 - phi)) * (decoded - self.offset)
            + (1 + self.mix[1] * phi) * path
            + (1 + self.mix[2] * phi) * carried
            + phi * self.visible_bias
            + (1 - phi) * (self.masked_bias + self.masked_slope * path)
            + shift
        )
        log_scale = self.log_scale(features).float() + phi * self.visible_log_scale
        return location, log_scale + 0.5 * self.left_log_scale * left_share.log(), left


class LibrarySizeModel(nn.Module):
    """The library_size of a spot, its count over all genes: log-normal around a regression on the features.

    It is solved for in closed form (`hinge.training.initialisation`) and not trained further.

    Parameters
    ----------
    feature_dim
        d.
    """

    LARGEST = 5.0

    def __init__(self, feature_dim: int):
        super().__init__()
        self.mean = nn.Linear(feature_dim, 1).requires_grad_(False)
        nn.init.zeros_(self.mean.weight)
        nn.init.zeros_(self.mean.bias)
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("slide_scale", torch.zeros(()))
        self.register_buffer("spatial_share", torch.zeros(()))

    def forward(self, features: Tensor, normal: Tensor, slide_normal: Tensor) -> Tensor:
        """features (B, d), standard normal numbers (B,) of the spots and of their slides → library sizes (B,), at least 1."""
        location = self.mean(features).float().squeeze(-1)
        return (location + self.scale * normal + self.slide_scale * slide_normal).exp().round().clamp_min(1)

    def typical(self, features: Tensor) -> Tensor:
        """Depth (B,) in the middle of what spots of these features (B, d) have."""
        middle = features.new_zeros(len(features))
        return self(features, middle, middle)

    def standardise(self, features: Tensor, library_size: Tensor) -> Tensor:
        """How unusual a library size (B,) is for its features (B, d), in standard deviations, (B,)."""
        scale = (self.scale**2 + self.slide_scale**2).sqrt()
        unusual = (library_size.float().clamp_min(1).log() - self.mean(features).float().squeeze(-1)) / scale
        return unusual.clamp(-self.LARGEST, self.LARGEST)
