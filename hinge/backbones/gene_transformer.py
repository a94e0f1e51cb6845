"""A transformer over genes, whose values are bins: what scGPT, scGPT-spatial and Tahoe-x1 have in common.

A cell (here: a spot) is a CLS token followed by one token per gene, the sum of an embedding of the gene and one of its
value. There are no positions. Attention is one of two patterns. In the full one every token sees all others. In the
generative one a masked gene sees the visible genes and itself, and visible genes see each other: what is predicted of a
masked gene does not depend on which other genes are masked.
"""

from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from hinge.backbones.base import ExpressionBackbone
from hinge.backbones.binning import CellSequences, bin_values, cell_sequences
from hinge.backbones.transformer_config import CLS, PAD, GeneTransformerConfig
from hinge.backbones.transformer_layers import CellDecoder, ContinuousValueEncoder, TransformerBlock
from hinge.backbones.weights import Weights, build, find_weights
from hinge.utils.errors import ConfigError


class GeneTransformer(ExpressionBackbone):
    """The transformer; a subclass adds its decoder as `value_decoder`, and says how masked genes enter.

    Attributes
    ----------
    flag_embedding
        Its second row stands in place of the value of a masked gene.
    """

    base_model_prefix = "gene_transformer"
    value_space = "bins"
    lora_targets = ("qkv", "out", "up", "down")
    _no_split_modules = ["TransformerBlock"]  # noqa: RUF012 (as transformers declares it)

    value_decoder: nn.Module
    flag_embedding: nn.Embedding | None

    def __init__(self, config: GeneTransformerConfig):
        super().__init__(config)
        width, eps = config.hidden_size, config.layer_norm_eps
        self.gene_embedding = nn.Embedding(config.vocab_size, width)
        self.gene_norm = nn.LayerNorm(width, eps=eps)
        self.value_encoder = ContinuousValueEncoder(width, config.activation, config.max_value, eps)
        self.layers = nn.ModuleList(
            TransformerBlock(
                width, config.num_attention_heads, config.intermediate_size, config.activation, eps, config.pre_norm
            )
            for _ in range(config.num_hidden_layers)
        )
        self.final_norm = nn.LayerNorm(width, eps=eps) if config.pre_norm else None

    def _init_weights(self, module: nn.Module) -> None:
        """Draw the initial weights for pre-training."""
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        if isinstance(module, ContinuousValueEncoder):
            # values are up to 50: the units of the first layer must bend at different ones
            nn.init.uniform_(module.linear1.weight, -0.2, 0.2)
            nn.init.uniform_(module.linear1.bias, -2.0, 2.0)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, dtype: torch.dtype | str | None = None, attention: str | None = None
    ) -> Self:
        """Load a model from a folder of ours or of published weights; arguments and errors as `load_backbone`."""
        path = find_weights(path)
        return build(cls, cls.read_weights(path, attention), path, dtype)

    @classmethod
    def read_weights(cls, path: str | Path, attention: str | None) -> Weights:
        """Return the weights in a folder of ours or of published files, of which none is read yet."""
        raise NotImplementedError

    @property
    def flagged(self) -> bool:
        """Whether a masked gene has a flag in place of a value, or the value `mask_value`."""
        raise NotImplementedError

    @property
    def masked_skip_out(self) -> bool:
        """Whether the attention output of masked genes skips the output product."""
        raise NotImplementedError

    @property
    def masked_give_no_keys(self) -> bool:
        """Whether a masked gene changes no other token: so it is in the generative pattern."""
        return self.config.attention == "generative"

    # --- values ----------------------------------------------------------------------------------

    def bins(self, values: np.ndarray) -> np.ndarray:
        """Return the bins (m,) of the values (m,) of one cell, all above 0, as the published code computes them."""
        raise NotImplementedError

    def encode_values(self, counts: Tensor, library_size: Tensor, gene_ids: Tensor | None = None) -> Tensor:
        """Return the bins of counts, each row by the edges of its own values; see `ExpressionBackbone`."""
        rows, scale = counts.detach().cpu().numpy().reshape(-1, counts.shape[-1]), self._scale(counts, gene_ids)
        binned = np.zeros(rows.shape, dtype=np.float32)
        for number, row in enumerate(rows):
            expressed = row != 0
            if expressed.any():
                binned[number, expressed] = self.bins(row[expressed].astype(np.float64) / scale[expressed])
        return torch.from_numpy(binned).reshape(counts.shape).to(counts.device)

    def decode_values(
        self,
        values: Tensor,
        library_size: Tensor,
        spots: Tensor | None = None,
        gene_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the counts at the lower edges of bins, linear between them; see `ExpressionBackbone`.

        Raises
        ------
        ConfigError
            There are no `spots`: bins are ranks within a spot.
        """
        if spots is None:
            raise ConfigError("bins are ranks within a spot: decode_values needs the counts of the spots")
        scale = self._scale(spots, gene_ids)
        rows = spots.detach().cpu().double().numpy().reshape(-1, spots.shape[-1]) / scale
        bins = values.detach().cpu().double().numpy().reshape(rows.shape)
        found = [bin_values(of_spot, row, self.config.num_bins) for of_spot, row in zip(bins, rows, strict=True)]
        return torch.from_numpy(np.stack(found) * scale).float().reshape(values.shape).to(values.device)

    def _scale(self, counts: Tensor, gene_ids: Tensor | None) -> np.ndarray:
        """Return by what counts (..., G) of genes (G,) are divided before they are ranked, float64 (G,)."""
        return np.ones(counts.shape[-1]) if gene_ids is None else self.config.gene_scale(gene_ids.cpu().numpy())

    def sequences(self, counts: np.ndarray, gene_ids: np.ndarray, *further: str) -> CellSequences:
        """Return cells as the published code feeds them to the model; none of their genes is left out.

        Parameters
        ----------
        counts
            (n, G) raw counts.
        gene_ids
            (G,) vocabulary ids.
        further
            Special tokens after `<cls>`.
        """
        config = self.config
        special = [config.token_id(token) for token in (CLS, *further)]
        values = np.asarray(counts, dtype=np.float64) / config.gene_scale(gene_ids)
        return cell_sequences(values, gene_ids, self.bins, special, config.token_id(PAD), config.pad_value)

    # --- tokens ----------------------------------------------------------------------------------

    def embed_genes(self, gene_ids: Tensor) -> Tensor:
        """Return the normalised embeddings (..., D) of vocabulary ids (...)."""
        return self.gene_norm(self.gene_embedding(gene_ids))

    def embed_sequence(self, gene_ids: Tensor, values: Tensor, masked: Tensor) -> Tensor:
        """Return the tokens (B, N, D) of a sequence with its special tokens.

        Parameters
        ----------
        gene_ids
            (N,) or (B, N) vocabulary ids.
        values
            (B, N) bins, the pad value for special tokens; ignored where masked.
        masked
            bool (B, N).
        """
        values = values.to(self.gene_embedding.weight.dtype)
        if self.flagged:
            encoded = torch.where(masked.unsqueeze(-1), self.flag_embedding.weight[1], self.value_encoder(values))
        else:
            encoded = self.value_encoder(values.masked_fill(masked, self.config.mask_value))
        return self.embed_genes(gene_ids) + encoded

    def run_sequence(self, h: Tensor, masked: Tensor, padding: Tensor | None = None) -> Tensor:
        """Return the tokens (B, N, D) of a sequence as the decoder takes them.

        Parameters
        ----------
        h
            (B, N, D), of `embed_sequence`.
        masked, padding
            bool (B, N), True = masked, and True = padding, which no other token sees.
        """
        seen = self._seen(masked, None if padding is None else ~padding)
        for layer in self.layers:
            h = layer(h, *seen)
        return self.finish(h)

    def _seen(self, masked: Tensor, present: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return which keys (B, 1, N, N) a query sees, None for all, and the rows (B, N, 1) without output product."""
        keys = present
        if self.masked_give_no_keys:
            keys = ~masked if present is None else present & ~masked
        allowed = None
        if keys is not None:
            itself = torch.eye(keys.shape[1], dtype=torch.bool, device=keys.device)
            allowed = (keys.unsqueeze(1) | itself).unsqueeze(1)
        return allowed, masked.unsqueeze(-1) if self.masked_skip_out else None

    def embed(self, values: Tensor, visible: Tensor, gene_ids: Tensor) -> Tensor:
        """Return the tokens (B, 1 + G, D) of bins (B, G), with CLS in front; see `ExpressionBackbone`."""
        batch = values.shape[0]
        cls = gene_ids.new_full((1,), self.config.token_id(CLS))
        ids = torch.cat([cls.expand(*gene_ids.shape[:-1], 1), gene_ids], dim=-1)
        values = torch.cat([values.new_full((batch, 1), self.config.pad_value), values], dim=1)
        return self.embed_sequence(ids, values, _with_cls(visible <= 0, False))

    def layer_inputs(self, visible: Tensor, present: Tensor | None = None) -> list[tuple]:
        """Return what each layer takes beside the tokens, see `ExpressionBackbone`."""
        seen = self._seen(_with_cls(visible <= 0, False), None if present is None else _with_cls(present > 0, True))
        return [seen] * len(self.layers)

    def with_prefix(self, seen: tuple, count: int) -> tuple:
        """Return `seen` for `count` more tokens in front, which see what CLS sees."""
        allowed, without_out = seen
        if allowed is not None:
            allowed = nn.functional.pad(allowed, (count, 0), value=True)
            allowed = torch.cat([allowed[:, :, :1].expand(-1, -1, count, -1), allowed], dim=2)
        if without_out is not None:
            without_out = nn.functional.pad(without_out, (0, 0, count, 0), value=False)
        return allowed, without_out

    def finish(self, h: Tensor) -> Tensor:
        """Return the tokens after the norm that follows the last layer of a pre-norm transformer."""
        return h if self.final_norm is None else self.final_norm(h)

    def decode(self, tokens: Tensor) -> Tensor:
        """Return bins (B, G), real numbers, of tokens (B, 1 + G, D)."""
        return self.value_decoder(tokens[:, 1:])

    def decode_cell(self, tokens: Tensor, gene_ids: Tensor) -> Tensor:
        """Return bins (B, G) of the CLS token and the embeddings of genes (G,) or (B, G)."""
        return self.cell_decoder(tokens[:, 0], self.embed_genes(gene_ids).expand(tokens.shape[0], -1, -1))

    def unused_parameters(self) -> tuple[str, ...]:
        """Return prefixes of the parameters that neither `embed` nor the layers nor `decode` use."""
        return ("cell_decoder", "impute_decoder", "drug_encoder", *(() if self.flagged else ("flag_embedding",)))

    def forward(self, values: Tensor, visible: Tensor, gene_ids: Tensor) -> Tensor:
        """Return the tokens (B, 1 + G, D) as the decoder takes them; see `embed` for the arguments."""
        h = self.embed(values, visible, gene_ids)
        for layer, seen in zip(self.layers, self.layer_inputs(visible), strict=True):
            h = layer(h, *seen)
        return self.finish(h)


def make_cell_decoder(config: GeneTransformerConfig, scaled: bool) -> CellDecoder:
    """Return the cell decoder of a model; `scaled` divides by √D."""
    return CellDecoder(config.hidden_size, config.hidden_size**-0.5 if scaled else 1.0)


def _with_cls(genes: Tensor, cls: bool) -> Tensor:
    """Return bool (B, 1 + G) from that of the genes (B, G)."""
    return nn.functional.pad(genes, (1, 0), value=cls)
