"""A short way from the features, and from visible genes, to every gene's distribution.

SoftAdaLN reaches genes only through shifts and scales that all of them share. This path speaks to each gene on its
own: a linear regression on the features, and shared factors that carry what visible genes say beyond it to the
masked ones. It starts at zero, so that the model still equals its backbone; training may first solve for it in
closed form (`hinge.training.closed_form`).
"""

import torch
from torch import Tensor, nn


def saturating_share(share, saturation):
    """φ(s) = s(1 + c)/(s + c): 0 at 0, 1 at 1, half-way near s = c.

    The share of visible genes as the path sees it: a few of them already tell most of what all of them do.
    """
    return share * (1 + saturation) / (share + saturation)


class GenePath(nn.Module):
    """Location and log-scale of every gene from features, visible genes and what the backbone decoded.

    With P = W·features + b and φ = φ(share of visible genes), the residual of a visible gene is
    e = value − offset − P. The factors z of a spot have a standard normal prior and e = Λz + noise, noise of
    variance ψ per gene; ẑ is the posterior mean of z given the visible residuals (a factor model; Bishop, Pattern
    Recognition and Machine Learning, 2006, section 12.2.4). Then

        location = decoded + m₀φ(decoded − offset) + (1 + m₁φ)P + (1 + m₂φ)R·ẑ + φ·visible_bias
        log-scale = S·features + s + φ·visible_log_scale

    Parameters
    ----------
    feature_dim, num_genes
        d and G.
    num_factors
        K, the number of factors.
    """

    def __init__(self, feature_dim: int, num_genes: int, num_factors: int):
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
        self.register_buffer("saturation", torch.tensor(0.1))

    def factors(self, values: Tensor, visible: Tensor, expected: Tensor) -> Tensor:
        """Posterior mean of the factors: values, visible, expected (B, G) → (B, K)."""
        loadings = self.loadings.float()
        precision = visible.float() * torch.exp(-self.log_noise.float())
        # the K × K system wants float32 whatever the run's precision is
        with torch.autocast(values.device.type, enabled=False):
            outer = (loadings.unsqueeze(2) * loadings.unsqueeze(1)).flatten(1)
            count = loadings.shape[1]
            system = (precision @ outer).view(-1, count, count) + torch.eye(count, device=values.device)
            right = (precision * (values.float() - expected.float())) @ loadings
            return torch.linalg.solve(system, right.unsqueeze(-1)).squeeze(-1)

    def forward(self, decoded: Tensor, values: Tensor, visible: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """decoded, values, visible (B, G), features (B, d) → location and log-scale (B, G)."""
        phi = saturating_share(visible.float().mean(dim=1, keepdim=True), self.saturation)
        path = self.mean(features).float()
        carried = self.factors(values, visible, self.offset + path) @ self.readout.float().T
        location = (
            decoded
            + self.mix[0] * phi * (decoded - self.offset)
            + (1 + self.mix[1] * phi) * path
            + (1 + self.mix[2] * phi) * carried
            + phi * self.visible_bias
        )
        return location, self.log_scale(features).float() + phi * self.visible_log_scale
