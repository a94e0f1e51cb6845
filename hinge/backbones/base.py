"""The contract of an expression backbone."""

from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from hinge.utils import hub
from hinge.utils.errors import ConfigError
from hinge.utils.files import arrays_digest
from hinge.utils.licences import check_licence, recorded_licence

DTYPES = {str(dtype)[6:]: dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}


class ResidualBlock(GradientCheckpointingLayer):
    """A layer of two sublayers, each with a residual and a norm; a conditioned model calls the three parts one by one.

    Attributes
    ----------
    fused
        Whether `hinge.models.kernels` has fused versions of this layer.
    """

    fused: ClassVar[bool] = False

    def enter(self, number: int, h: Tensor) -> Tensor:
        """Return tokens h (B, N, D) as sublayer `number` (0 or 1) takes them: normalised in a pre-norm layer."""
        raise NotImplementedError

    def sublayer(self, number: int, x: Tensor, *seen: Any) -> Tensor:
        """Return what sublayer `number` makes of x (B, N, D): 0 mixes tokens, 1 treats each token alone.

        `seen` is one item of `ExpressionBackbone.layer_inputs`.
        """
        raise NotImplementedError

    def leave(self, number: int, h: Tensor, update: Tensor) -> Tensor:
        """Return tokens plus the output of sublayer `number`, both (B, N, D); normalised in a post-norm layer."""
        raise NotImplementedError

    def forward(self, h: Tensor, *seen: Any) -> Tensor:
        """h (B, N, D) → (B, N, D)."""
        for number in (0, 1):
            h = self.leave(number, h, self.sublayer(number, self.enter(number, h), *seen))
        return h


class ExpressionBackbone(PreTrainedModel):
    """An expression foundation model that `hinge.models.HingeModel` can modulate.

    A subclass has `gene_embedding`, `layers` (each a `ResidualBlock`), and the methods below that raise
    NotImplementedError. Without modulation `forward` computes what the published model computes. Its config has
    `hidden_size`, `num_hidden_layers`, and `read_vocabulary()`.

    Attributes
    ----------
    value_space
        What `embed` takes and `decode` returns: `"transform"`, values of a transform of counts; `"bins"`, ranks of a
        spot's own values in bins, 0 for no count.
    lora_targets
        Names of the products of a layer, which adapters are added to.
    """

    main_input_name = "values"
    supports_gradient_checkpointing = True
    value_space: ClassVar[str] = "transform"
    lora_targets: ClassVar[tuple[str, ...]]

    gene_embedding: nn.Embedding
    layers: nn.ModuleList

    # --- values ----------------------------------------------------------------------------------

    def encode_values(self, counts: Tensor, library_size: Tensor, gene_ids: Tensor | None = None) -> Tensor:
        """Return values of the model of spots.

        Parameters
        ----------
        counts
            (..., G) raw counts; of all genes of a spot where `value_space` is `"bins"`, because ranks depend on them.
        library_size
            (...); bins do not depend on it.
        gene_ids
            (G,) vocabulary ids, for a backbone that divides counts by the genes' means.

        Returns
        -------
        Tensor
            float32 (..., G).
        """
        raise NotImplementedError

    def decode_values(
        self,
        values: Tensor,
        library_size: Tensor,
        spots: Tensor | None = None,
        gene_ids: Tensor | None = None,
    ) -> Tensor:
        """Return counts, not rounded, of values of the model; the inverse of `encode_values` up to the width of a bin.

        Parameters
        ----------
        values, library_size, gene_ids
            (..., G), (...) and (G,), as in `encode_values`.
        spots
            (..., G) raw counts of the spots whose bins the values are; needed where `value_space` is `"bins"`.
            While a spot is drawn they do not exist, and `hinge.models.value_bins` takes the place of this method.

        Returns
        -------
        Tensor
            float32 (..., G).
        """
        raise NotImplementedError

    # --- tokens ----------------------------------------------------------------------------------

    @property
    def num_prefix_tokens(self) -> int:
        """Number P of tokens before the genes."""
        return 1

    @property
    def masked_give_no_keys(self) -> bool:
        """Whether a masked gene changes no other token: leaving it out is exact."""
        return False

    def embed(self, values: Tensor, visible: Tensor, gene_ids: Tensor) -> Tensor:
        """Return tokens (B, P + G, D) of values (B, G), visible (B, G; 1 = seen) and vocabulary ids (G,) or (B, G)."""
        raise NotImplementedError

    def layer_inputs(self, visible: Tensor, present: Tensor | None = None) -> list[tuple]:
        """Return for each layer what it takes beside the tokens.

        Parameters
        ----------
        visible
            (B, G), 1 for visible and 0 for masked genes.
        present
            (B, G), 0 = the gene's token is hidden from the others. None: all are seen.
        """
        raise NotImplementedError

    def with_prefix(self, seen: tuple, count: int) -> tuple:
        """Return an item of `layer_inputs` for `count` more tokens in front, which all tokens see."""
        raise NotImplementedError

    def expected(self, values: Tensor, visible: Tensor, gene_ids: Tensor) -> Tensor | None:
        """Return what `decode` predicts the difference from, float32 (B, G); None for zero. Arguments as of `embed`."""
        return None

    def predict(self, values: Tensor, visible: Tensor, gene_ids: Tensor) -> Tensor:
        """Return the values (B, G), float32, that the model predicts without a condition. Arguments as of `embed`."""
        decoded = self.decode(self(values, visible, gene_ids)).float()
        expected = self.expected(values, visible, gene_ids)
        return decoded if expected is None else expected + decoded

    def finish(self, h: Tensor) -> Tensor:
        """Return the tokens (B, N, D) after the last layer as the decoder takes them."""
        return h

    def decode(self, tokens: Tensor) -> Tensor:
        """Return values (B, G) of tokens (B, P + G, D)."""
        raise NotImplementedError

    def decode_cell(self, tokens: Tensor, gene_ids: Tensor) -> Tensor:
        """Return values (B, G) of the first token alone and of the genes' embeddings."""
        raise NotImplementedError

    def unused_parameters(self) -> tuple[str, ...]:
        """Return prefixes of the parameters that neither `embed` nor the layers nor `decode` use."""
        raise NotImplementedError

    # --- weights ---------------------------------------------------------------------------------

    def digest(self) -> str:
        """Return the SHA-256 of the weights, by which a trained model refers to its backbone."""
        return arrays_digest(dict(self.state_dict()))

    @torch.no_grad()
    def add_genes(self, ids: dict[str, int], seed: int) -> None:
        """Add embeddings of new genes, drawn from the normal distribution of the trained embeddings.

        Parameters
        ----------
        ids
            Gene → id after the last one of the vocabulary. A row of this id may exist as padding; it is overwritten.
        seed
            Seed of the draw.
        """
        if not ids:
            return
        table = self.gene_embedding.weight
        trained = table[1 : min(ids.values())].float()
        drawn = torch.randn(len(ids), table.shape[1], generator=torch.Generator().manual_seed(seed))
        drawn = trained.mean(dim=0) + trained.std(dim=0) * drawn
        self.config.add_genes(sorted(ids, key=ids.__getitem__), max(ids.values()))
        grown = table.new_zeros(max(self.config.num_embeddings, len(table)), table.shape[1])
        grown[: len(table)] = table
        grown[list(ids.values())] = drawn.to(table)
        self.gene_embedding = nn.Embedding.from_pretrained(grown, freeze=not table.requires_grad)

    def push_to_hub(self, repository: str, private: bool = True, allow_licence: bool = False) -> str:
        """Upload weights and config to `owner/name` on the Hugging Face Hub and return its address.

        Raises
        ------
        ConfigError
            The licence of the weights forbids sharing them, and `allow_licence` does not state that their authors gave
            permission; or the Hub refuses.
        """
        check_licence("the backbone", recorded_licence(self.config.to_dict()), allow_licence)
        return hub.upload_saved(self.save_pretrained, repository, private)

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the gene embedding."""
        return self.gene_embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the gene embedding."""
        self.gene_embedding = value

    def resize_token_embeddings(self, *args: object, **options: object) -> NoReturn:
        """Not offered: a new row needs a gene, so use `add_genes`."""
        raise NotImplementedError("a backbone has one embedding per gene of its vocabulary; use add_genes to add genes")


def torch_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return the type of a name; a ConfigError lists the names."""
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ConfigError(f"dtype must be {', '.join(DTYPES)}, not {dtype!r}")
        return DTYPES[dtype]
    return dtype
