"""scGPT and scGPT-spatial.

Cui et al., *scGPT: toward building a foundation model for single-cell multi-omics using generative AI*, Nature Methods
2024. Wang et al., *scGPT-spatial: continual pretraining of single-cell foundation model for spatial transcriptomics*,
2025. scGPT-spatial decodes with a mixture of experts, and ranks counts relative to the mean of each gene.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from hinge.backbones.binning import scgpt_bins
from hinge.backbones.gene_transformer import GeneTransformer, make_cell_decoder
from hinge.backbones.published_scgpt import read_scgpt
from hinge.backbones.transformer_config import ScGPTConfig
from hinge.backbones.transformer_layers import ExpertDecoder, ValueDecoder
from hinge.backbones.weights import Weights

_HIDDEN = 2  # hidden layers of the decoder


class ScGPTModel(GeneTransformer):
    """scGPT with its decoders, frozen or to be trained.

    Masked genes enter as the published code has it: in the generative pattern by a flag, and their attention output
    skips the output product; in the full pattern by the value -1.

    Parameters
    ----------
    config
        Size and variant.

    References
    ----------
    Cui et al., Nature Methods 2024. Wang et al., 2025 (scGPT-spatial).
    """

    config_class = ScGPTConfig

    def __init__(self, config: ScGPTConfig):
        super().__init__(config)
        width = config.hidden_size
        self.flag_embedding = nn.Embedding(2, width) if config.with_flag else None
        if config.num_experts:
            self.value_decoder: nn.Module = ExpertDecoder(
                width, config.num_experts, config.num_chosen, _HIDDEN, "leaky_relu"
            )
        else:
            self.value_decoder = ValueDecoder(width, _HIDDEN, "leaky_relu")
        self.cell_decoder = make_cell_decoder(config, scaled=False)
        if config.with_impute_decoder:
            self.impute_decoder = make_cell_decoder(config, scaled=False)
        self.post_init()

    @classmethod
    def read_weights(cls, path: str | Path, attention: str | None = None) -> Weights:
        """Return the weights in a folder of ours or of published files, of which none is read yet."""
        return read_scgpt(path, attention)

    @property
    def flagged(self) -> bool:
        """Whether a masked gene has a flag in place of a value."""
        return self.config.attention == "generative"

    @property
    def masked_skip_out(self) -> bool:
        """Whether the attention output of masked genes skips the output product."""
        return self.config.attention == "generative"

    def bins(self, values: np.ndarray) -> np.ndarray:
        """Return the bins (m,) of the values (m,) of one cell, all above 0."""
        return scgpt_bins(values, self.config.num_bins)

    def decode_neighbours(self, tokens: Tensor, gene_ids: Tensor, coordinates: Tensor, num_neighbours: int) -> Tensor:
        """Return bins (B, G) of each cell from the CLS tokens of the nearest other cells (scGPT-spatial).

        Parameters
        ----------
        tokens
            (B, N, D).
        gene_ids
            (G,) or (B, G).
        coordinates
            (B, 2).
        num_neighbours
            Of the cells of the batch.
        """
        distance = torch.cdist(coordinates, coordinates)
        distance.fill_diagonal_(torch.inf)
        nearest = distance.topk(num_neighbours, largest=False).indices
        cells = tokens[:, 0][nearest].mean(dim=1)
        return self.impute_decoder(cells, self.embed_genes(gene_ids).expand(tokens.shape[0], -1, -1))
