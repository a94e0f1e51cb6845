"""Draws of genes outside the panel, which no training slide measured, given the draws of the panel."""

import numpy as np
import torch
from torch import Tensor

from hinge.backbones import ExpressionBackbone
from hinge.data.transforms import get_transform
from hinge.diffusion.inputs import SamplingSettings
from hinge.diffusion.randomness import Stream, random_generator
from hinge.models.expected_values import CountingVariance
from hinge.utils.errors import ConfigError

LEAST_SHARE = 0.2
"""Least share of the prior's own variance of a gene that is not of counting."""

MOST_COUNTS = 4
"""Counts that the least expressed gene of a drawn panel may have, where a library size is read off."""

GENES_AT_ONCE = 256
"""Genes outside the panel in one forward pass. Their tokens see each other, so the number is part of the result."""


class OutsideGenes:
    """Distribution of genes outside the panel given the panel's, by the expression prior and the backbone.

    The backbone predicts the location of a gene from the drawn values of the panel. What it leaves has the covariance
    that the factor model of the pre-training counts gives, given the panel: ΛCΛᵀ + Ψ with C the posterior covariance of
    the factors (Bishop, Pattern Recognition and Machine Learning, 2006, section 12.2.4). Under log1p(cp10k), the part
    of Ψ that is of Poisson counting in the pre-training counts is replaced by that of the drawn spot (law of total
    variance). Under log2(count + 1) it is not: the level of a gene that no training slide has is the larger error.

    Parameters
    ----------
    backbone
        With an expression prior. Without the library size of its counts (folders of earlier versions), Ψ stays.
    panel_ids, outside_ids
        (G,) and (E,) vocabulary ids.
    genes
        E symbols of the genes outside the panel.
    transform
        Of the values. Draws are rounded to counts, under log1p(cp10k) of the library size of the panel's draw.

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
        self.genes, self.transform = genes, get_transform(transform)
        loadings = {name: prior.loadings[ids].double().cpu() for name, ids in self._ids().items()}
        noise = {name: prior.log_noise[ids].double().cpu().exp() for name, ids in self._ids().items()}
        panel = loadings["panel"]
        precision = panel.T @ (panel / noise["panel"].unsqueeze(1)) + torch.eye(panel.shape[1], dtype=torch.float64)
        # a root of the posterior covariance of the factors: C = RRᵀ
        root = torch.linalg.solve_triangular(
            torch.linalg.cholesky(precision).T, torch.eye(len(precision), dtype=torch.float64), upper=True
        )
        self.shared = (loadings["outside"] @ root).numpy()  # (E, K)
        self.own = noise["outside"].numpy()  # (E,)
        self.counting, self.rest = CountingVariance(transform), None
        there, mean = backbone.config.prior_library_size, prior.mean[outside_ids].double().cpu().numpy()
        if there and not self.transform.contains_library_size:
            self.rest = np.maximum(self.own - self.counting(mean, there), LEAST_SHARE * self.own)

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
            sizes = [self.library_size(of_spot) for of_spot in values[draw]]
            for spot, (name, size_of_spot) in enumerate(zip(spots, sizes, strict=True)):
                generator = random_generator(Stream.OUTSIDE_PANEL, seed, name, draw)
                factors = generator.standard_normal(self.shared.shape[1])
                own = self.own
                if self.rest is not None and size_of_spot is not None:
                    own = self.rest + self.counting(location[spot], size_of_spot)
                noise = self.shared @ factors + np.sqrt(own) * generator.standard_normal(len(own))
                drawn[draw, spot] = np.maximum(location[spot] + noise, 0)
            counted = [spot for spot, size in enumerate(sizes) if size is not None]
            known = np.array([sizes[spot] for spot in counted])
            counts = np.rint(self.transform.inverse(drawn[draw, counted], known))
            drawn[draw, counted] = self.transform.forward(counts, known)
        return drawn

    def library_size(self, values: np.ndarray) -> float | None:
        """Return the library size whose counts values (G,) of a drawn spot are; None where they are no counts.

        Under log1p(cp10k), values of counts are multiples of one over the library size. Values that contain it are not
        divided by it; 1 stands for it.
        """
        if self.transform.contains_library_size:
            return 1.0
        shares = np.expm1(values[values > 0].astype(np.float64)) / 1e4
        if not len(shares):
            return None
        for least in range(1, MOST_COUNTS + 1):
            counts = shares * least / shares.min()
            # the rounding of float32 grows with the count
            few = counts[counts < 50 * least]
            if np.abs(few - few.round()).max() < 0.05:
                return float(least / shares.min())
        return None

    def append(
        self, values: np.ndarray, expected: np.ndarray, spots: list[str], sampling: SamplingSettings
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return draws (K, n, G + E) and expected values (n, G + E): those of the panel, then the others.

        Expected are the locations given the expected values of the panel, which have no noise of draws.
        """
        drawn = self.draw(values, spots, sampling.seed, sampling.batch_size)
        location = np.maximum(self.location(expected, sampling.batch_size), 0).astype(np.float32)
        return np.concatenate([values, drawn], axis=2), np.concatenate([expected, location], axis=1)
