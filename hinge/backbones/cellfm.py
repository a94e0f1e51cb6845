"""CellFM: a retention network over genes, pre-trained on 100 million human cells.

A cell (here: a spot) is a CLS token followed by one token per gene. Each layer mixes tokens by linear attention, whose
cost is linear in the number of genes, and a gated linear unit, both with post-norm residuals. Two decoders map tokens
to values: gene-wise (an MLP on each token) and cell-wise (the CLS token and the gene embeddings).

Zeng et al., *CellFM: a large-scale foundation model pre-trained on transcriptomics of 100 million human cells*, Nature
Communications 2025.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from hinge.backbones.base import ExpressionBackbone
from hinge.backbones.cellfm_config import CellFMConfig
from hinge.backbones.cellfm_layers import GeneDecoder, RetentionBlock, ValueEncoder
from hinge.backbones.expression_prior import ExpressionPrior
from hinge.backbones.published_cellfm import read_cellfm
from hinge.backbones.weights import build, find_weights
from hinge.data.transforms import get_transform

INITIAL_CORRECTION = 0.1
"""Weight of the network's prediction beside the expression prior before pre-training."""


class CellFMModel(ExpressionBackbone):
    """CellFM with its value encoder, both decoders and the mask token of pre-training.

    Parameters
    ----------
    config
        Size and variant.

    References
    ----------
    Zeng et al., Nature Communications 2025 (CellFM).
    """

    config_class = CellFMConfig
    base_model_prefix = "cellfm"
    lora_targets = ("qkvu", "uv", "out")
    _no_split_modules = ["RetentionBlock"]  # noqa: RUF012 (as transformers declares it)

    def __init__(self, config: CellFMConfig):
        super().__init__(config)
        width = config.hidden_size
        self.gene_embedding = nn.Embedding(config.num_embeddings, width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.zero_token = nn.Parameter(torch.empty(1, 1, width))
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.value_encoder = ValueEncoder(width, config.num_value_bins, config.negative_slope)
        if config.technical_tokens:
            self.technical_tokens = nn.Parameter(torch.empty(1, 2, width))
            self.technical_encoder = ValueEncoder(width, config.num_value_bins, config.negative_slope)
        self.layers = nn.ModuleList(RetentionBlock(config) for _ in range(config.num_hidden_layers))
        self.gene_decoder = GeneDecoder(width, config.negative_slope)
        self.cell_decoder = nn.Linear(width, width, bias=False)
        self.expression_prior: ExpressionPrior | None = None
        if config.num_prior_factors:
            self.expression_prior = ExpressionPrior(config.num_embeddings, config.num_prior_factors)
            self.correction_scale = nn.Parameter(torch.full((1,), INITIAL_CORRECTION))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Draw the initial weights for pre-training."""
        if isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
            with torch.no_grad():
                module.weight[0] = 0
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, ValueEncoder):
            # wide enough that the soft bins differ between values from the first step on
            nn.init.normal_(module.to_bins.weight, std=1.0)
            nn.init.normal_(module.mix_bins.weight, std=module.mix_bins.in_features**-0.5)
            nn.init.normal_(module.table.weight, std=1.0)
            nn.init.ones_(module.skip)
        elif isinstance(module, CellFMModel):
            for token in (module.cls_token, module.zero_token, module.mask_token):
                nn.init.normal_(token, std=0.5)
            if module.config.technical_tokens:
                nn.init.normal_(module.technical_tokens, std=0.5)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        num_attention_heads: int | None = None,
        technical_tokens: bool | None = None,
        zero_input: str | None = None,
        masked_input: str | None = None,
        negative_slope: float | None = None,
        layer_norm_eps: float | None = None,
    ) -> "CellFMModel":
        """Load a model from a folder, the Hugging Face Hub, or a file of published weights.

        Kind and size of published weights are recognised from their tensors. Peak memory is the size of the model in
        `dtype` plus the largest tensor of the file.

        Parameters
        ----------
        path
            A folder that `save_pretrained` or `hinge convert` wrote; `owner/name` of such a folder on the Hugging
            Face Hub; a MindSpore checkpoint (`.ckpt`); a state dict of the torch port (`.pth`, `.pt`,
            `.safetensors`); or a checkpoint of the authors' HINGE code, of which the backbone is read.
        dtype
            Type of the weights, e.g. `torch.bfloat16`; None: the stored type.
        num_attention_heads
            Number of heads of a published file. It is needed if the width is not 1536 (48 heads), because tensors do
            not contain it.
        technical_tokens, zero_input, masked_input, negative_slope, layer_norm_eps
            As in `CellFMConfig`. None: the values in the folder's config; for published weights the values of their
            training, 0.2 and 1e-7 for CellFM in any file, 0.01 and 1e-6 for HINGE. The code of the torch port uses
            0.01 and 1e-5.

        Returns
        -------
        CellFMModel
            In eval mode, on the CPU.

        Raises
        ------
        WeightsError
            The file is missing, damaged, incomplete or of another model.
        ConfigError
            An argument is missing or does not fit the file.
        """
        options = {
            "technical_tokens": technical_tokens,
            "zero_input": zero_input,
            "masked_input": masked_input,
            "negative_slope": negative_slope,
            "layer_norm_eps": layer_norm_eps,
        }
        path = find_weights(path)
        return build(cls, read_cellfm(path, num_attention_heads, **options), path, dtype)

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the genes: CLS, and two technical tokens if the model has them."""
        return 3 if self.config.technical_tokens else 1

    def encode_values(self, counts: Tensor, library_size: Tensor, gene_ids: Tensor | None = None) -> Tensor:
        """Return counts by the transform `config.transform`, see `ExpressionBackbone`."""
        return get_transform(self.config.transform).forward(counts, library_size)

    def decode_values(
        self,
        values: Tensor,
        library_size: Tensor,
        spots: Tensor | None = None,
        gene_ids: Tensor | None = None,
    ) -> Tensor:
        """Return counts by the inverse of the transform, see `ExpressionBackbone`."""
        return get_transform(self.config.transform).inverse(values, library_size)

    def embed(self, values: Tensor, visible: Tensor, gene_ids: Tensor, nonzero: Tensor | None = None) -> Tensor:
        """Return the tokens of values.

        Parameters
        ----------
        values
            (B, G) expression as `encode_values` returns it. Masked values are ignored
            (`masked_input="mask_token"`) or encoded as a fill value (`"value_plus_zero_token"`).
        visible
            (B, G), 1 for visible and 0 for masked genes.
        gene_ids
            (G,) or (B, G) vocabulary ids.
        nonzero
            (B, G), 1 for genes with a count above 0. `config.zero_input` sets the use of the others.

        Returns
        -------
        Tensor
            (B, P + G, D), P = `num_prefix_tokens`.
        """
        config = self.config
        seen = visible.unsqueeze(-1).to(self.cls_token.dtype)
        expected = self.expected(values, visible, gene_ids)
        if expected is not None:
            values = torch.where(visible > 0, values, expected.to(values.dtype))
        embedded = self.value_encoder(values.to(self.cls_token.dtype))
        if expected is not None:
            embedded = embedded + self.mask_token * (1 - seen)
        elif config.masked_input == "mask_token":
            embedded = embedded * seen + self.mask_token * (1 - seen)
        else:
            embedded = embedded + self.zero_token * (1 - seen)
        if nonzero is not None and config.zero_input == "token":
            zero = seen * (1 - nonzero.unsqueeze(-1).to(seen.dtype))
            embedded = self.zero_token * zero + embedded * (1 - zero)
        genes = self.gene_embedding(gene_ids).expand_as(embedded) + embedded
        if nonzero is not None and config.zero_input == "pad":
            genes = genes * nonzero.unsqueeze(-1).to(genes.dtype)
        prefix = [self.cls_token]
        if config.technical_tokens:
            prefix.append(self.technical_tokens)
        return torch.cat([*(token.expand(genes.shape[0], -1, -1) for token in prefix), genes], dim=1)

    def key_masks(
        self, visible: Tensor, nonzero: Tensor | None = None, present: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return which tokens give keys in the first and in the second half of the layers.

        In the first half masked genes give no keys. In the second half all tokens give keys except padding: genes with
        a count of 0 if `config.zero_input` is `"pad"`, and genes that are not `present`.

        Returns
        -------
        tuple
            (B, P + G) for the first half; (B, P + G) or None (all) for the second.
        """
        prefix = visible.new_ones(visible.shape[0], self.num_prefix_tokens)
        first = torch.cat([prefix, visible], dim=1)
        real = present
        if nonzero is not None and self.config.zero_input == "pad":
            real = nonzero if present is None else nonzero * present
        return first, None if real is None else torch.cat([prefix, real.to(prefix.dtype)], dim=1)

    def value_scale(self, num_genes: int, nonzero: Tensor | None = None) -> Tensor | float:
        """Return n^{-½} with n the number of genes with a count; (n - 3 + 1e-6)^{-½} with technical tokens."""
        if nonzero is None:
            count: Tensor | float = float(num_genes)
        else:
            # counted in at least float32: half precision cannot hold the number of genes
            count = nonzero.to(torch.promote_types(self.dtype, torch.float32)).sum(dim=-1).view(-1, 1, 1)
        if self.config.technical_tokens:
            count = count - 3 + 1e-6
        scale = count**-0.5
        return scale if isinstance(scale, float) else scale.to(self.cls_token.dtype)

    def layer_inputs(
        self, visible: Tensor, present: Tensor | None = None, nonzero: Tensor | None = None
    ) -> list[tuple]:
        """Return key mask and value scale of each layer; `nonzero` as in `embed`, see `ExpressionBackbone`."""
        early, late = self.key_masks(visible, nonzero, present)
        scale = self.value_scale(visible.shape[1], nonzero)
        half = len(self.layers) // 2
        return [(early, scale)] * half + [(late, scale)] * (len(self.layers) - half)

    def with_prefix(self, seen: tuple, count: int) -> tuple:
        """Return a key mask with `count` more keys in front, and the value scale."""
        key_mask, scale = seen
        return key_mask if key_mask is None else nn.functional.pad(key_mask, (count, 0), value=1.0), scale

    def unused_parameters(self) -> tuple[str, ...]:
        """Return prefixes of the parameters that neither `embed` nor the layers nor `decode` use."""
        masked = self.config.masked_input == "mask_token" or self.expression_prior is not None
        return ("zero_token" if masked else "mask_token", "cell_decoder", "technical_encoder", "expression_prior")

    def expected(self, values: Tensor, visible: Tensor, gene_ids: Tensor) -> Tensor | None:
        """Return the conditional mean (B, G) under the expression prior; None where the model has none."""
        return None if self.expression_prior is None else self.expression_prior(values, visible, gene_ids)

    def decode(self, tokens: Tensor) -> Tensor:
        """Return values (B, G) of tokens (B, P + G, D) by the gene-wise decoder, as a difference from `expected`."""
        decoded = self.gene_decoder(tokens[:, self.num_prefix_tokens :])
        return decoded if self.expression_prior is None else decoded * self.correction_scale

    @torch.no_grad()
    def set_expression_prior(self, mean: np.ndarray, loadings: np.ndarray, noise: np.ndarray) -> None:
        """Set the expression prior of genes 1…G: mean (G,), loadings (G, K) and variances of the noise (G,)."""
        assert self.expression_prior is not None
        rows = slice(1, len(mean) + 1)
        for parameter, content in (
            (self.expression_prior.mean, mean),
            (self.expression_prior.loadings, loadings),
            (self.expression_prior.log_noise, np.log(noise)),
        ):
            parameter[rows] = torch.from_numpy(np.ascontiguousarray(content)).to(parameter)

    @torch.no_grad()
    def add_genes(self, ids: dict[str, int], seed: int) -> None:
        """Add embeddings of new genes, see `ExpressionBackbone.add_genes`."""
        super().add_genes(ids, seed)
        if ids and self.expression_prior is not None:
            self.expression_prior.add_rows(len(self.gene_embedding.weight), list(ids.values()))

    def decode_cell(self, tokens: Tensor, gene_ids: Tensor) -> Tensor:
        """Return values (B, G) of tokens (B, P + G, D) by the cell-wise decoder, Σ sigmoid(W·gene embedding) ⊙ CLS."""
        query = torch.sigmoid(self.cell_decoder(self.gene_embedding(gene_ids)))
        return (query * tokens[:, :1]).sum(dim=-1)

    def forward(self, values: Tensor, visible: Tensor, gene_ids: Tensor, nonzero: Tensor | None = None) -> Tensor:
        """Return the tokens after the last layer, (B, P + G, D); see `embed` for the arguments."""
        h = self.embed(values, visible, gene_ids, nonzero)
        for layer, seen in zip(self.layers, self.layer_inputs(visible, nonzero=nonzero), strict=True):
            h = layer(h, *seen)
        return h
