"""A factor model of expression inside a backbone: the linear-Gaussian prediction of masked genes from visible ones."""

import torch
from torch import Tensor, nn


class ExpressionPrior(nn.Module):
    """Conditional mean of masked genes under a factor model of the counts that a backbone was pre-trained on.

    Values of a spot are mean + Λz + noise, z standard normal of K factors, noise of variance ψ per gene (Bishop,
    Pattern Recognition and Machine Learning, 2006, section 12.2.4). The network of the backbone predicts what is left.

    Parameters
    ----------
    num_rows
        Rows of the gene embedding; row 0 is padding.
    num_factors
        K.
    """

    def __init__(self, num_rows: int, num_factors: int):
        super().__init__()
        # fitted in closed form before the network is trained, and then fixed
        self.mean = nn.Parameter(torch.zeros(num_rows), requires_grad=False)
        self.loadings = nn.Parameter(torch.zeros(num_rows, num_factors), requires_grad=False)
        self.log_noise = nn.Parameter(torch.zeros(num_rows), requires_grad=False)

    def forward(self, values: Tensor, visible: Tensor, gene_ids: Tensor) -> Tensor:
        """Return the conditional mean of masked genes given the visible ones, and the mean of visible genes.

        Of a visible gene nothing is predicted; a denoiser of noisy values, to whom all genes are visible, must not get
        the noise back.

        Parameters
        ----------
        values, visible
            (B, G); values of masked genes are ignored.
        gene_ids
            (G,) or (B, G) vocabulary ids.

        Returns
        -------
        Tensor
            float32 (B, G).
        """
        with torch.autocast(values.device.type, enabled=False):
            mean, loadings, log_noise = (each[gene_ids].float() for each in (self.mean, self.loadings, self.log_noise))
            seen = visible.float()
            precision = seen * torch.exp(-log_noise)
            count = loadings.shape[-1]
            if gene_ids.ndim == 1:
                outer = (loadings.unsqueeze(2) * loadings.unsqueeze(1)).flatten(1)
                system = (precision @ outer).view(-1, count, count)
            else:
                system = (loadings * precision.unsqueeze(-1)).transpose(1, 2) @ loadings
            system = system + torch.eye(count, device=values.device)
            residual = torch.where(seen > 0, values.float() - mean, 0.0) * precision
            if gene_ids.ndim == 1:
                right = residual @ loadings
            else:
                right = (residual.unsqueeze(1) @ loadings).squeeze(1)
            factors = torch.cholesky_solve(right.unsqueeze(-1), torch.linalg.cholesky(system))
            return mean + torch.where(seen > 0, 0.0, (loadings @ factors).squeeze(-1))

    @torch.no_grad()
    def add_rows(self, num_rows: int, new: list[int]) -> None:
        """Grow to `num_rows` rows; genes of the rows `new` get a typical mean and noise, and no factors."""
        first = min(new)
        for name in ("mean", "loadings", "log_noise"):
            old = getattr(self, name)
            grown = old.new_zeros(max(num_rows, len(old)), *old.shape[1:])
            grown[: len(old)] = old
            grown[new] = 0 if name == "loadings" else old[1:first].float().mean().to(old)
            setattr(self, name, nn.Parameter(grown, requires_grad=False))
