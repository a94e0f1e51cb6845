"""Configurations of transformers over genes: scGPT, scGPT-spatial and Tahoe-x1."""

from pathlib import Path
from typing import Any

import numpy as np
from transformers import PretrainedConfig

from hinge.backbones.binning import NUM_BINS
from hinge.backbones.published_files import read_tokens, tokens_with_specials
from hinge.backbones.vocabulary import GeneVocabulary
from hinge.utils.errors import ConfigError

ATTENTION = ("generative", "full")
CLS, PAD, DRUG = "<cls>", "<pad>", "<drug>"


class GeneTransformerConfig(PretrainedConfig):
    """Size and variant of a transformer over genes.

    Parameters
    ----------
    vocab_size
        Rows of the gene embedding, special tokens included.
    hidden_size, num_hidden_layers, num_attention_heads, intermediate_size
        Width D, layers, heads, and inner width of the feed-forward networks.
    attention
        `"generative"` or `"full"`, see the module.
    pre_norm
        Whether layer norms stand before the sublayers, with one after the last layer, or after their residuals.
    activation
        Of value encoder and feed-forward networks: `"relu"` or `"gelu"`.
    num_bins
        Bins of a value, the one of 0 included.
    max_value, pad_value, mask_value
        Largest value that the value encoder distinguishes; value of special tokens; value of masked genes where they
        have no flag.
    layer_norm_eps
        ε of LayerNorm.
    tokens
        Names of the vocabulary in the order of their ids from 0, None for a row without a name. Special tokens are
        written `<...>`.
    """

    def __init__(
        self,
        vocab_size: int = 60697,
        hidden_size: int = 512,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 8,
        intermediate_size: int = 512,
        attention: str = "generative",
        pre_norm: bool = False,
        activation: str = "relu",
        num_bins: int = NUM_BINS,
        max_value: float = 512,
        pad_value: float = -2,
        mask_value: float = -1,
        layer_norm_eps: float = 1e-5,
        tokens: list[str | None] | None = None,
        **kwargs: Any,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.attention = attention
        self.pre_norm = pre_norm
        self.activation = activation
        self.num_bins = num_bins
        self.max_value = max_value
        self.pad_value = pad_value
        self.mask_value = mask_value
        self.layer_norm_eps = layer_norm_eps
        self.tokens = tokens
        if attention not in ATTENTION:
            raise ConfigError(f"attention must be {' or '.join(ATTENTION)}, not {attention!r}")
        if hidden_size % num_attention_heads:
            raise ValueError(f"hidden_size {hidden_size} is not divisible by {num_attention_heads} heads")
        if tokens is not None and not 0 < len(tokens) <= vocab_size:
            raise ValueError(f"{vocab_size:,} embeddings cannot be those of {len(tokens):,} tokens")
        super().__init__(**kwargs)

    @property
    def num_embeddings(self) -> int:
        """Rows of the gene embedding."""
        return self.vocab_size

    def set_genes(self, genes: list[str]) -> None:
        """Make genes the vocabulary of a model that is to be pre-trained, with the ids 1, 2, 3 …"""
        self.tokens = [PAD, *genes, CLS]
        self.vocab_size = len(self.tokens)

    def token_id(self, token: str) -> int:
        """Return the id of a token.

        Raises
        ------
        ConfigError
            The vocabulary is not known, or has no such token.
        """
        if self.tokens is None or token not in self.tokens:
            raise ConfigError(f"the vocabulary of this {self.model_type} has no token {token}")
        return self.tokens.index(token)

    def read_vocabulary(self, file: str | Path | None = None) -> GeneVocabulary | None:
        """Return the genes that the weights know, without special tokens, of a file or stored with them."""
        tokens = self.tokens
        if file is not None:
            tokens = tokens_with_specials(read_tokens(Path(file)), (), self.vocab_size, Path(file))
        if tokens is None:
            return None
        return GeneVocabulary.from_tokens(
            {token: number for number, token in enumerate(tokens) if token is not None}, self.vocab_size
        )

    def gene_scale(self, gene_ids: np.ndarray) -> np.ndarray:
        """Return by what counts of genes (G,) are divided before they are ranked, float64 (G,)."""
        return np.ones(len(gene_ids))

    def add_genes(self, genes: list[str], last: int) -> None:
        """Append genes, of which the last one has the id `last`, to the vocabulary."""
        if self.tokens is not None:
            first = last + 1 - len(genes)
            self.tokens = [*self.tokens, *[None] * (first - len(self.tokens)), *genes]
        self.vocab_size = max(self.vocab_size, last + 1)


class ScGPTConfig(GeneTransformerConfig):
    """Size and variant of scGPT.

    Parameters
    ----------
    with_flag
        Whether the weights have the flags of masked genes, which the generative attention needs.
    num_experts, num_chosen
        Experts of the decoder and how many decode a token; 0: a single decoder.
    with_impute_decoder
        Whether there is a cell decoder for neighbours.
    gene_means
        Means by which counts are divided before they are ranked, in the order of the ids, None where not known; None:
        counts are ranked as they are.
    arguments
        See `GeneTransformerConfig`.
    """

    model_type = "scgpt"

    def __init__(
        self,
        with_flag: bool = True,
        num_experts: int = 0,
        num_chosen: int = 2,
        with_impute_decoder: bool = False,
        gene_means: list[float | None] | None = None,
        **arguments: Any,
    ):
        self.with_flag = with_flag
        self.num_experts = num_experts
        self.num_chosen = num_chosen
        self.with_impute_decoder = with_impute_decoder
        self.gene_means = gene_means
        super().__init__(**arguments)
        if self.attention == "generative" and not with_flag:
            raise ConfigError(
                "these scGPT weights have no flag of masked genes (flag_encoder), which generative attention needs; "
                "choose attention full (backbone.attention)"
            )

    def gene_scale(self, gene_ids: np.ndarray) -> np.ndarray:
        """Return the genes' means (G,), 1 where one is not known."""
        means = self.gene_means
        known = [None if means is None or number >= len(means) else means[number] for number in gene_ids.tolist()]
        return np.array([1.0 if mean is None else mean for mean in known])


class TahoeConfig(GeneTransformerConfig):
    """Size and variant of Tahoe-x1.

    Parameters
    ----------
    decoder_activation
        Of the decoder: `"leaky_relu"` or `"gelu"`.
    num_decoder_layers
        Hidden layers of the decoder.
    scaled_cell_decoder
        Whether the cell decoder divides by √D.
    num_drugs, fingerprint_size, drug_activation
        Rows and width of the table of chemical fingerprints, and activation of their encoder; 0 drugs: there is none.
    arguments
        See `GeneTransformerConfig`.
    """

    model_type = "tahoe"

    def __init__(
        self,
        decoder_activation: str = "leaky_relu",
        num_decoder_layers: int = 1,
        scaled_cell_decoder: bool = True,
        num_drugs: int = 0,
        fingerprint_size: int = 0,
        drug_activation: str = "gelu",
        pre_norm: bool = True,
        **arguments: Any,
    ):
        self.decoder_activation = decoder_activation
        self.num_decoder_layers = num_decoder_layers
        self.scaled_cell_decoder = scaled_cell_decoder
        self.num_drugs = num_drugs
        self.fingerprint_size = fingerprint_size
        self.drug_activation = drug_activation
        super().__init__(pre_norm=pre_norm, **arguments)
