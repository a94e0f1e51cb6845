"""CellFM: a retention network over genes, pre-trained on 100 million human cells.

Zeng et al., *CellFM: a large-scale foundation model pre-trained on transcriptomics of 100 million human
cells*, Nature Communications 2025. A cell (here: a spot) is a set of gene tokens behind a CLS token. Each
layer mixes tokens by linear attention (cost linear in the number of genes) and a gated linear unit, both with
post-norm residuals. Two decoders read the tokens back: gene-wise (an MLP on each token) and cell-wise (the
CLS token against the gene embeddings).

The model was trained under MindSpore, whose LeakyReLU has slope 0.2 and whose LayerNorm has epsilon 1e-7:
these are the defaults. The published torch ports use torch's own defaults (0.01, 1e-5); set
`negative_slope` and `layer_norm_eps` to reproduce them.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from hinge.backbones.checkpoints import fill, is_folder, open_state, read_our_config, read_published
from hinge.utils import hub
from hinge.utils.errors import ConfigError, WeightsError, one_line
from hinge.utils.files import arrays_digest


class CellFMConfig(PretrainedConfig):
    """Size and variant of a CellFM.

    Parameters
    ----------
    num_genes
        Genes in the vocabulary. Id 0 is padding, genes are 1…num_genes; the embedding has num_genes + 1 rows,
        rounded up to a multiple of 8.
    hidden_size, num_hidden_layers, num_attention_heads
        1536, 40, 48 for the 800M model; 1536, 2, 48 for the 80M model.
    num_value_bins
        Width of the soft discretisation of a value.
    negative_slope, layer_norm_eps
        0.2 and 1e-7 under MindSpore (the published weights), 0.01 and 1e-5 in the torch ports.
    masked_input
        What stands for the value of a masked gene: `"mask_token"` as in CellFM's pre-training, or
        `"value_plus_zero_token"` as in the released HINGE code (the encoded fill value plus the zero token).
    zero_input
        What a visible gene without any count becomes when `nonzero` is given: `"pad"` (its token is zeroed and
        gives no key; the 800M generation) or `"token"` (the zero token in place of its value; the 80M one).
    technical_tokens
        Two tokens after CLS that absorb technical covariates (the 80M generation); they also shift the count
        of genes that scales the values of retention.
    gene_names
        Symbols in the order of their ids, starting at id 1, where the vocabulary may be stored with the
        weights. CellFM's own vocabulary is not stored (CC BY-NC-ND).
    """

    model_type = "cellfm"

    def __init__(
        self,
        num_genes: int = 27855,
        hidden_size: int = 1536,
        num_hidden_layers: int = 40,
        num_attention_heads: int = 48,
        num_value_bins: int = 256,
        negative_slope: float = 0.2,
        layer_norm_eps: float = 1e-7,
        masked_input: str = "mask_token",
        zero_input: str = "pad",
        technical_tokens: bool = False,
        gene_names: list[str] | None = None,
        **kwargs,
    ):
        self.num_genes = num_genes
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_value_bins = num_value_bins
        self.negative_slope = negative_slope
        self.layer_norm_eps = layer_norm_eps
        self.masked_input = masked_input
        self.zero_input = zero_input
        self.technical_tokens = technical_tokens
        self.gene_names = gene_names
        for name, allowed in {
            "masked_input": ("mask_token", "value_plus_zero_token"),
            "zero_input": ("pad", "token"),
        }.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        if hidden_size % num_attention_heads:
            raise ValueError(f"hidden_size {hidden_size} is not divisible by {num_attention_heads} heads")
        super().__init__(**kwargs)

    @property
    def num_embeddings(self) -> int:
        return (self.num_genes + 1 + 7) // 8 * 8


def read_config(path: str | Path) -> CellFMConfig:
    """Size and variant of a backbone, a folder of ours or a published file, without reading its weights.

    Raises
    ------
    WeightsError, ConfigError
        As `CellFMModel.from_pretrained`.
    """
    if is_folder(path):
        try:
            return CellFMConfig.from_dict(read_our_config(path))
        except (ValueError, TypeError, LookupError, AttributeError, ZeroDivisionError) as error:
            raise WeightsError(f"the backbone in {path} cannot be built: {one_line(error)}") from error
    return CellFMConfig(**read_published(path).config)


class ValueEncoder(nn.Module):
    """A value as a soft mixture of learned embeddings (CellFM's auto-discretisation)."""

    def __init__(self, hidden_size: int, num_bins: int, negative_slope: float):
        super().__init__()
        self.negative_slope = negative_slope
        self.to_bins = nn.Linear(1, num_bins, bias=False)
        self.mix_bins = nn.Linear(num_bins, num_bins, bias=False)
        self.table = nn.Linear(num_bins, hidden_size, bias=False)
        self.skip = nn.Parameter(torch.zeros(1, 1))

    def forward(self, values: Tensor) -> Tensor:
        """values (B, G) → embeddings (B, G, D)."""
        bins = F.leaky_relu(self.to_bins(values.unsqueeze(-1)), self.negative_slope)
        return self.table(torch.softmax(self.mix_bins(bins) + bins * self.skip, dim=-1))


class Retention(nn.Module):
    """Multi-head linear attention: O = Q(KᵀV), normalised per head and gated."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        # query, key, value and gate in one product; the published weights hold them apart
        self.qkvu = nn.Linear(hidden_size, 4 * hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor, key_mask: Tensor | None, value_scale: Tensor | float) -> Tensor:
        """x (B, N, D), key_mask (B, N) with 0 for tokens that give no key, value_scale (B, 1, 1) or a number."""
        query, key, value, gate = self.qkvu(x).chunk(4, dim=-1)
        root = (x.shape[-1] // self.num_heads) ** 0.5
        query = F.relu(query) / root
        key = F.relu(key) / root
        if key_mask is not None:
            key = key * key_mask.unsqueeze(-1).to(key.dtype)
        value = value * value_scale
        query, key, value = (rearrange(y, "b n (h d) -> b h n d", h=self.num_heads) for y in (query, key, value))
        mixed = query @ (key.transpose(-2, -1) @ value)
        # root-mean-square norm without a learned scale; float32 because its square overflows half precision
        mixed = mixed.float()
        rms = mixed.norm(dim=-1, keepdim=True) * (1 / root)
        mixed = (mixed / rms.clamp_min(1e-12)).to(x.dtype)
        return self.out(rearrange(mixed, "b h n d -> b n (h d)") * (gate * gate.sigmoid()))


class GatedLinearUnit(nn.Module):
    """o(u(x) ⊙ v(x)), no biases."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.uv = nn.Linear(hidden_size, 2 * hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.uv(x).chunk(2, dim=-1)
        return self.out(u * v)


class RetentionBlock(nn.Module):
    """One layer: LN(λh + retention(h)), LN(λh + glu(h)), λ = (2L)^¼.

    The parts are public so that a model on top can modulate what goes into and comes out of each sublayer.
    """

    def __init__(self, config: CellFMConfig):
        super().__init__()
        self.retention = Retention(config.hidden_size, config.num_attention_heads)
        self.feed_forward = GatedLinearUnit(config.hidden_size)
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.residual_scale = (2 * config.num_hidden_layers) ** 0.25

    def forward(self, h: Tensor, key_mask: Tensor | None, value_scale: Tensor | float) -> Tensor:
        """h (B, N, D) → (B, N, D)."""
        h = self.norm1(h * self.residual_scale + self.retention(h, key_mask, value_scale))
        return self.norm2(h * self.residual_scale + self.feed_forward(h))


class GeneDecoder(nn.Module):
    """Gene-wise decoder: w₂(leaky(w₁h)) on each token."""

    def __init__(self, hidden_size: int, negative_slope: float):
        super().__init__()
        self.negative_slope = negative_slope
        self.hidden = nn.Linear(hidden_size, hidden_size, bias=False)
        self.output = nn.Linear(hidden_size, 1, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, G, D) → values (B, G)."""
        return self.output(F.leaky_relu(self.hidden(tokens), self.negative_slope)).squeeze(-1)


class CellFMModel(PreTrainedModel):
    """CellFM with its encoder, both decoders and the pre-training mask token.

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
    main_input_name = "values"

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
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Initial weights of a model that is to be pre-trained here."""
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
        """Load weights: ours, or those that were published, whose kind and size are recognised.

        Memory peaks at the size of the model in `dtype` plus the largest tensor of the file.

        Parameters
        ----------
        path
            A folder that `save_pretrained` or `hinge convert` wrote, or such a one as `owner/name` on the Hugging
            Face Hub; a MindSpore checkpoint (`.ckpt`); a state
            dict of the torch port (`.pth`, `.pt`, `.safetensors`); or a checkpoint of the authors' HINGE code, of
            which this takes the backbone.
        dtype
            Of the weights, e.g. `torch.bfloat16`; None: as stored.
        num_attention_heads
            Needed for a published file whose width is not 1536 (which has 48): the tensors do not tell it.
        technical_tokens, zero_input, masked_input, negative_slope, layer_norm_eps
            As in CellFMConfig. None: as the file says; for published ones, those that its weights were trained
            with: 0.2 and 1e-7 for CellFM, whatever file they come in, 0.01 and 1e-6 for HINGE. The torch port
            itself computes with 0.01 and 1e-5.

        Returns
        -------
        CellFMModel
            In eval mode, on the CPU.

        Raises
        ------
        WeightsError
            The file is missing, damaged, foreign or not whole.
        ConfigError
            An argument is needed or does not fit.
        """
        if hub.is_repository(path):
            path = hub.find(path, "backbone")
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype, None)
            if not isinstance(dtype, torch.dtype):
                raise ConfigError("dtype must be float32, bfloat16 or float16")
        options = {
            "technical_tokens": technical_tokens,
            "zero_input": zero_input,
            "masked_input": masked_input,
            "negative_slope": negative_slope,
            "layer_norm_eps": layer_norm_eps,
        }
        try:
            if is_folder(path):
                given = {name: value for name, value in options.items() if value is not None}
                config = CellFMConfig.from_dict({**read_our_config(path), **given})
                try:
                    state = open_state(path)
                except WeightsError as error:
                    raise WeightsError(f"the backbone in {path} cannot be read: {error}") from error
                sources: dict[str, tuple[str, ...]] = {name: (name,) for name in state.shapes}
            else:
                published = read_published(path, num_attention_heads, **options)
                config, state, sources = CellFMConfig(**published.config), published.state, published.sources
            if not 0 < config.num_hidden_layers <= len(state.shapes):
                raise ValueError(f"it cannot have {config.num_hidden_layers:,} layers in {len(state.shapes)} tensors")
            with torch.device("meta"):
                model = cls(config)
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ZeroDivisionError) as error:
            raise WeightsError(f"the backbone in {path} cannot be built: {one_line(error)}") from error
        fill(model, state, sources, dtype)
        return model.eval()

    def push_to_hub(self, repository: str, private: bool = True) -> str:
        """Upload weights and config to `owner/name` on the Hugging Face Hub; the repository's address."""
        return hub.upload_saved(self.save_pretrained, repository, private)

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens in front of the genes: CLS, and the two technical ones where the model has them."""
        return 3 if self.config.technical_tokens else 1

    @torch.no_grad()
    def add_genes(self, ids: dict[str, int], seed: int) -> None:
        """Give genes that the weights do not know an embedding of their own, drawn like those that are trained.

        Parameters
        ----------
        ids
            Gene → id after the last of the vocabulary. The row of such an id may exist: the table is padded to a
            multiple of 8, and what stands in the padding means nothing.
        seed
            Of the draw.
        """
        if not ids:
            return
        config, table = self.config, self.gene_embedding.weight
        first = min(ids.values())
        trained = table[1:first].float()
        drawn = torch.randn(len(ids), table.shape[1], generator=torch.Generator().manual_seed(seed))
        drawn = trained.mean(dim=0) + trained.std(dim=0) * drawn
        config.num_genes = max(config.num_genes, *ids.values())
        if config.gene_names:
            config.gene_names = [*config.gene_names, *sorted(ids, key=ids.get)]
        grown = table.new_zeros(max(config.num_embeddings, len(table)), table.shape[1])
        grown[: len(table)] = table
        grown[list(ids.values())] = drawn.to(table)
        self.gene_embedding = nn.Embedding.from_pretrained(grown, freeze=not table.requires_grad)

    def digest(self) -> str:
        """SHA-256 over the weights: what an adapter names as its backbone."""
        return arrays_digest(dict(self.state_dict()))

    def embed(self, values: Tensor, visible: Tensor, gene_ids: Tensor, nonzero: Tensor | None = None) -> Tensor:
        """Turn values into tokens.

        Parameters
        ----------
        values
            (B, G) expression in the model's units. Where `visible` is 0 it is ignored
            (`masked_input="mask_token"`) or the fill value that is encoded (`"value_plus_zero_token"`).
        visible
            (B, G), 1 = seen.
        gene_ids
            (G,) or (B, G) vocabulary ids.
        nonzero
            (B, G), 1 = the gene has a count. Where given, the others are treated as `zero_input` says.

        Returns
        -------
        Tensor
            (B, P + G, D), P = `num_prefix_tokens`.
        """
        config = self.config
        seen = visible.unsqueeze(-1).to(self.cls_token.dtype)
        embedded = self.value_encoder(values.to(self.cls_token.dtype))
        if config.masked_input == "mask_token":
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
        """Which tokens give keys, in the first and in the second half of the layers.

        In the first half masked genes give none; in the second all do, but for padding: genes of no count where those
        are padding, and genes that are not `present`.

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
        """n^{-½} with n the number of genes that count; the 80M generation has (n - 3 + 1e-6)^{-½}."""
        if nonzero is None:
            count: Tensor | float = float(num_genes)
        else:
            count = nonzero.float().sum(dim=-1).view(-1, 1, 1)
        if self.config.technical_tokens:
            count = count - 3 + 1e-6
        return count**-0.5

    def decode(self, tokens: Tensor) -> Tensor:
        """Gene-wise decoder: tokens (B, P + G, D) → values (B, G)."""
        return self.gene_decoder(tokens[:, self.num_prefix_tokens :])

    def decode_cell(self, tokens: Tensor, gene_ids: Tensor) -> Tensor:
        """Cell-wise decoder: Σ sigmoid(W·gene embedding) ⊙ CLS; tokens (B, P + G, D) → values (B, G)."""
        query = torch.sigmoid(self.cell_decoder(self.gene_embedding(gene_ids)))
        return (query * tokens[:, :1]).sum(dim=-1)

    def forward(self, values: Tensor, visible: Tensor, gene_ids: Tensor, nonzero: Tensor | None = None) -> Tensor:
        """Tokens after the last layer, (B, P + G, D); see `embed` for the arguments."""
        h = self.embed(values, visible, gene_ids, nonzero)
        early, late = self.key_masks(visible, nonzero)
        scale = self.value_scale(values.shape[1], nonzero)
        for number, layer in enumerate(self.layers):
            h = layer(h, early if number < len(self.layers) // 2 else late, scale)
        return h
