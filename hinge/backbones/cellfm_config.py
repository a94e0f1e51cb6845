"""The configuration of CellFM."""

from pathlib import Path

from transformers import PretrainedConfig

from hinge.backbones.vocabulary import GeneVocabulary, vocabulary_for
from hinge.data.transforms import get_transform


class CellFMConfig(PretrainedConfig):
    """Size and variant of a CellFM model.

    Parameters
    ----------
    num_genes
        Genes in the vocabulary. Id 0 is padding, genes are 1…num_genes. The embedding has num_genes + 1 rows,
        rounded up to a multiple of 8.
    hidden_size, num_hidden_layers, num_attention_heads
        1536, 40, 48 for the 800M model; 1536, 2, 48 for the 80M model.
    num_value_bins
        Width of the soft discretisation of a value.
    negative_slope, layer_norm_eps
        Slope of LeakyReLU and epsilon of LayerNorm. The published weights were trained under MindSpore with 0.2
        and 1e-7, which are the defaults. The published torch ports use torch's defaults, 0.01 and 1e-5.
    masked_input
        Replacement for the value of a masked gene: `"mask_token"` as in CellFM's pre-training, or
        `"value_plus_zero_token"` as in the released HINGE code (the encoded fill value plus the zero token).
    zero_input
        Treatment of visible genes with a count of 0 when `nonzero` is given: `"pad"` (the token is zeroed and gives
        no key; the 800M model) or `"token"` (the zero token replaces the value; the 80M model).
    technical_tokens
        Whether two tokens after CLS absorb technical covariates (the 80M model). They also change the number of
        genes by which the values of retention are scaled.
    gene_names
        Symbols in the order of their ids from 1, if the vocabulary may be stored with the weights. CellFM's own
        vocabulary is not stored (CC BY-NC-ND).
    num_prior_factors
        Factors of an `ExpressionPrior`, the linear-Gaussian model of the pre-training counts that the network then
        corrects; 0 for none, as in the published model. With it, the value of a masked gene is encoded as its
        conditional mean, plus the mask token.
    num_spot_factors
        The first of them, which describe differences between spots of one patient; the others describe differences
        between patients.
    prior_library_size
        Median library size of the counts that the factor model was fitted to; 0 where it is not known.
    transform
        Name of the transform from counts to the values that the model takes, see `hinge.data.transforms`:
        `log1p_cp10k` for the published weights.
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
        transform: str = "log1p_cp10k",
        num_prior_factors: int = 0,
        num_spot_factors: int = 0,
        prior_library_size: float = 0.0,
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
        self.num_prior_factors = num_prior_factors
        self.num_spot_factors = num_spot_factors
        self.prior_library_size = prior_library_size
        self.transform = get_transform(transform).name
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
        """Rows of the gene embedding."""
        return (self.num_genes + 1 + 7) // 8 * 8

    def set_genes(self, genes: list[str]) -> None:
        """Make genes the vocabulary of a model that is to be pre-trained, with the ids 1, 2, 3 …"""
        self.num_genes, self.gene_names = len(genes), list(genes)

    def read_vocabulary(self, file: str | Path | None = None) -> GeneVocabulary | None:
        """Return the genes that the weights know, of a file or stored with them; None if there are none."""
        if file is not None:
            return vocabulary_for(file, self.num_embeddings)
        return GeneVocabulary.from_genes(self.gene_names) if self.gene_names else None

    def add_genes(self, genes: list[str], last: int) -> None:
        """Append genes, of which the last one has the id `last`, to the vocabulary."""
        self.num_genes = max(self.num_genes, last)
        if self.gene_names:
            self.gene_names = [*self.gene_names, *genes]
