"""Draws of genes outside the panel, which no training slide measured, given the draws of the panel."""

import numpy as np
import torch
from torch import Tensor

from hinge.backbones import ExpressionBackbone
from hinge.diffusion.inputs import SamplingSettings
from hinge.diffusion.randomness import Stream, random_generator
from hinge.utils.errors import ConfigError

GENES_AT_ONCE = 256
"""Genes outside the panel in one forward pass. Their tokens see each other, so the number is part of the result."""


class OutsideGenes:
    """Distribution of genes outside the panel given the panel's, by the expression prior and the backbone.

    The backbone predicts the location of a gene from the drawn values of the panel. What it leaves has the covariance
    that the factor model of the pre-training counts gives, given the panel: ΛCΛᵀ + Ψ with C the posterior covariance of
    the factors (Bishop, Pattern Recognition and Machine Learning, 2006, section 12.2.4).

    Parameters
    ----------
    backbone
        With an expression prior.
    panel_ids, outside_ids
        (G,) and (E,) vocabulary ids.
    genes
        E symbols of the genes outside the panel.
    transform
        Of the values; draws in log2(count + 1) are rounded to counts.

    Raises
    ------
    ConfigError
        The backbone has no expression prior.
    """

    def __init__(
        self, backbone: ExpressionBackbone, panel_ids: Tensor, outside_ids: Tensor, genes: list[str], transform: str
    ):
        prior = getattr(backbone, "expression_prior", None)
        if prior is None:
            raise ConfigError(
                "this run's backbone has no expression prior and cannot draw genes outside the panel (--genes): "
                "train a run whose backbone hinge pre-trained on counts of these genes"
            )
        self.backbone, self.panel_ids, self.outside_ids = backbone, panel_ids, outside_ids
        self.genes, self.transform = genes, transform
        loadings = {name: prior.loadings[ids].double().cpu() for name, ids in self._ids().items()}
        noise = {name: prior.log_noise[ids].double().cpu().exp() for name, ids in self._ids().items()}
        panel = loadings["panel"]
        precision = panel.T @ (panel / noise["panel"].unsqueeze(1)) + torch.eye(panel.shape[1], dtype=torch.float64)
        # a root of the posterior covariance of the factors: C = RRᵀ
        root = torch.linalg.solve_triangular(
            torch.linalg.cholesky(precision).T, torch.eye(len(precision), dtype=torch.float64), upper=True
        )
        self.shared = (loadings["outside"] @ root).numpy()  # (E, K)
        self.own = noise["outside"].sqrt().numpy()  # (E,)

    @classmethod
    def of_genes(
        cls, backbone: ExpressionBackbone, panel: list[str], panel_ids: Tensor, genes: list[str], transform: str
    ) -> "OutsideGenes":
        """Return the distribution of those of `genes` that are not in the panel.

        Raises
        ------
        ConfigError
            The backbone does not know a gene, all are in the panel, or the backbone has no expression prior.
        """
        outside = [gene for gene in dict.fromkeys(genes) if gene not in set(panel)]
        known = {name: number for number, name in enumerate(getattr(backbone.config, "gene_names", None) or [], 1)}
        missing = [gene for gene in outside if gene not in known]
        if not outside:
            raise ConfigError("all genes of --genes are in the panel, and are drawn without it")
        if missing:
            raise ConfigError(
                f"the backbone does not know {len(missing)} of {len(outside)} genes outside the panel (--genes): "
                f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}"
            )
        return cls(backbone, panel_ids, torch.tensor([known[gene] for gene in outside]), outside, transform)

    def _ids(self) -> dict[str, Tensor]:
        return {"panel": self.panel_ids, "outside": self.outside_ids}

    @torch.no_grad()
    def location(self, values: np.ndarray, batch_size: int) -> np.ndarray:
        """Return the predicted values (B, E) given values of the panel (B, G)."""
        device = next(self.backbone.parameters()).device
        parts = []
        for start in range(0, len(values), batch_size):
            panel = torch.from_numpy(np.ascontiguousarray(values[start : start + batch_size])).to(device)
            blocks = []
            for first in range(0, len(self.outside_ids), GENES_AT_ONCE):
                ids = self.outside_ids[first : first + GENES_AT_ONCE]
                zeros = panel.new_zeros(len(panel), len(ids))
                known = torch.cat([torch.ones_like(panel), zeros], dim=1)
                both = torch.cat([self.panel_ids, ids]).to(device)
                predicted = self.backbone.predict(torch.cat([panel, zeros], dim=1), known, both)
                blocks.append(predicted[:, len(self.panel_ids) :].cpu())
            parts.append(torch.cat(blocks, dim=1))
        return torch.cat(parts).numpy()

    def draw(self, values: np.ndarray, spots: list[str], seed: int, batch_size: int) -> np.ndarray:
        """Return draws (K, n, E) given draws of the panel (K, n, G).

        Random numbers are a function of the seed, the name of the spot (n,) and the number of the draw.
        """
        number, size = values.shape[:2]
        drawn = np.empty((number, size, len(self.outside_ids)), dtype=np.float32)
        for draw in range(number):
            location = self.location(values[draw], batch_size)
            for spot, name in enumerate(spots):
                generator = random_generator(Stream.OUTSIDE_PANEL, seed, name, draw)
                factors = generator.standard_normal(self.shared.shape[1])
                noise = self.shared @ factors + self.own * generator.standard_normal(len(self.own))
                drawn[draw, spot] = np.maximum(location[spot] + noise, 0)
        if self.transform == "log2p1":
            drawn = np.log2(1 + np.rint(np.exp2(drawn) - 1)).astype(np.float32)
        return drawn

    def append(
        self, values: np.ndarray, expected: np.ndarray, spots: list[str], sampling: SamplingSettings
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return draws (K, n, G + E) and expected values (n, G + E): those of the panel, then the others.

        Expected are the locations given the expected values of the panel, which have no noise of draws.
        """
        drawn = self.draw(values, spots, sampling.seed, sampling.batch_size)
        location = np.maximum(self.location(expected, sampling.batch_size), 0).astype(np.float32)
        return np.concatenate([values, drawn], axis=2), np.concatenate([expected, location], axis=1)
