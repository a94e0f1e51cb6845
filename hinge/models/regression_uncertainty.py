"""How uncertain the regression on the features is at a spot: more where its features are unlike those of training."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

NUM_DIRECTIONS = 64
"""Directions of the training features that are told apart; the rest has the variance of the prior."""


class RegressionUncertainty(nn.Module):
    """The posterior covariance of the weights of a ridge regression, in units of the residual's variance.

    With standardised features X of the training spots and the penalty λ, the weights of a gene have the posterior
    covariance (XᵀX + λ)⁻¹ (Hoerl and Kennard, Technometrics 12, 1970), and a prediction at x has the leverage
    h(x) = xᵀ(XᵀX + λ)⁻¹x. Residuals of spots that were held out contain the leverage of a typical spot, so that draws
    add what exceeds it.

    Parameters
    ----------
    condition_dim
        d of the regression.
    """

    directions: Tensor
    deviations: Tensor
    rest: Tensor
    centre: Tensor
    width: Tensor
    typical: Tensor
    limit: Tensor

    def __init__(self, condition_dim: int):
        super().__init__()
        for name, shape in (
            ("directions", (condition_dim, NUM_DIRECTIONS)),
            # posterior standard deviation of the weights along each direction, and along all others
            ("deviations", (NUM_DIRECTIONS,)),
            ("rest", ()),
            ("centre", (condition_dim,)),
            ("width", (condition_dim,)),
            # leverage of training spots that are left out: median, and the 99th percentile
            ("typical", ()),
            ("limit", ()),
        ):
            self.register_buffer(name, torch.ones(shape) if name == "width" else torch.zeros(shape))

    @torch.no_grad()
    def fit(self, features: NDArray, penalty: float, num_spots: int | None = None) -> None:
        """Set the buffers from the conditions (n, d) of the training spots and the penalty of standardised features.

        num_spots is the number of spots that the regression was fitted to, where the conditions are of a part of them.
        """
        x = np.asarray(features, dtype=np.float64)
        centre, width = x.mean(axis=0), x.std(axis=0)
        width[width == 0] = 1.0
        x = (x - centre) / width
        gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
        sizes, vectors = np.linalg.eigh(gram)
        count = min(NUM_DIRECTIONS, int((sizes > 1e-9 * max(sizes[-1], 1e-12)).sum()))
        sizes, vectors = sizes[::-1][:count], vectors[:, ::-1][:, :count]
        if len(x) < x.shape[1]:
            vectors = x.T @ vectors / np.sqrt(sizes)
        if num_spots is not None:
            sizes = sizes * (num_spots / len(x))
        directions, deviations = np.zeros(self.directions.shape), np.zeros(NUM_DIRECTIONS)
        directions[:, :count], deviations[:count] = vectors, 1 / np.sqrt(sizes + penalty)
        for name, content in (
            ("directions", directions),
            ("deviations", deviations),
            ("rest", np.array(penalty**-0.5)),
            ("centre", centre),
            ("width", width),
        ):
            getattr(self, name).copy_(torch.from_numpy(content))
        inside = np.minimum((self.coefficients(features) ** 2).sum(axis=1), 0.99)
        left_out = inside / (1 - inside)
        self.typical.fill_(float(np.median(left_out)))
        self.limit.fill_(float(np.quantile(left_out, 0.99)))

    def coefficients(self, features: NDArray | Tensor) -> NDArray[np.float64]:
        """Return coefficients (n, R + 1) of conditions (n, d), whose sum of squares is the leverage.

        The last is that of all directions that are not told apart.
        """
        x = (torch.as_tensor(np.asarray(features), dtype=torch.float64) - self.centre.cpu().double()) / self.width.cpu()
        along = x @ self.directions.cpu().double()
        rest = ((x**2).sum(dim=1) - (along**2).sum(dim=1)).clamp_min(0).sqrt() * self.rest.cpu().double()
        return torch.cat([along * self.deviations.cpu().double(), rest[:, None]], dim=1).numpy()

    def excess(self, features: NDArray | Tensor) -> NDArray[np.float64]:
        """Return the coefficients (n, R + 1) of what exceeds the leverage of a typical training spot."""
        coefficients = self.coefficients(features)
        leverage = (coefficients**2).sum(axis=1)
        share = np.maximum(leverage - float(self.typical), 0.0) / np.maximum(leverage, 1e-12)
        return coefficients * np.sqrt(share)[:, None]

    def novelty(self, features: NDArray | Tensor) -> NDArray[np.float64]:
        """Return the leverage (n,) in units of the 99th percentile of training spots that are left out."""
        return (self.coefficients(features) ** 2).sum(axis=1) / max(float(self.limit), 1e-12)
