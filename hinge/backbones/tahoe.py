"""Tahoe-x1: transformers over genes of 70 million to 3 billion parameters, pre-trained on perturbed cells.

Gandhi et al., *Tahoe-x1: scaling perturbation-trained single-cell foundation models to 3 billion parameters*, 2025.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from hinge.backbones.binning import tahoe_bins
from hinge.backbones.gene_transformer import GeneTransformer, make_cell_decoder
from hinge.backbones.published_tahoe import read_tahoe
from hinge.backbones.transformer_config import TahoeConfig
from hinge.backbones.transformer_layers import DrugEncoder, ValueDecoder
from hinge.backbones.weights import Weights


class TahoeModel(GeneTransformer):
    """Tahoe-x1 with its decoders, frozen or to be trained.

    Masked genes have a flag in place of a value, in both attention patterns. The models of 70 million and 1.3 billion
    parameters were trained with the generative pattern, the one of 3 billion with the full one.

    Parameters
    ----------
    config
        Size and variant.

    References
    ----------
    Gandhi et al., 2025 (Tahoe-x1).
    """

    config_class = TahoeConfig

    def __init__(self, config: TahoeConfig):
        super().__init__(config)
        width = config.hidden_size
        self.flag_embedding = nn.Embedding(2, width)
        self.value_decoder = ValueDecoder(width, config.num_decoder_layers, config.decoder_activation)
        self.cell_decoder = make_cell_decoder(config, config.scaled_cell_decoder)
        if config.num_drugs:
            self.drug_encoder = DrugEncoder(
                config.num_drugs, config.fingerprint_size, width, config.drug_activation, config.layer_norm_eps
            )
        self.post_init()

    @classmethod
    def read_weights(cls, path: str | Path, attention: str | None = None) -> Weights:
        """Return the weights in a folder of ours or of published files, of which none is read yet."""
        return read_tahoe(path, attention)

    @property
    def flagged(self) -> bool:
        """Whether a masked gene has a flag in place of a value: always."""
        return True

    @property
    def masked_skip_out(self) -> bool:
        """Whether the attention output of masked genes skips the output product: never."""
        return False

    def bins(self, values: np.ndarray) -> np.ndarray:
        """Return the bins (m,) of the values (m,) of one cell, all above 0."""
        return tahoe_bins(values, self.config.num_bins)

    def with_drugs(self, h: Tensor, drug_ids: Tensor) -> Tensor:
        """Return tokens (B, N, D) whose second one, `<drug>`, is that of drugs (B,); 0 is an unknown drug."""
        return torch.cat([h[:, :1], self.drug_encoder(drug_ids).unsqueeze(1), h[:, 2:]], dim=1)
