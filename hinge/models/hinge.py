"""HINGE: a frozen expression model turned into a generator conditioned on histology.

Fang et al., HINGE, CVPR 2026 (arXiv 2603.19766). The features of a patch, the diffusion timestep and the visible genes
form one condition vector z. From z every layer of the frozen backbone gets shifts, scales and gates (SoftAdaLN), which
start so that the backbone computes what it did before. Only the conditioning and the value head are trained.

The alternatives of the paper are options: AdaLN-Zero, the condition as further tokens, cross-attention, and a backbone
that is trained too, whole or by low-rank adapters.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from hinge.backbones.base import ExpressionBackbone
from hinge.models import pretrained
from hinge.models.distributions import CountGrid, ExpressionDistribution
from hinge.models.gene_factors import GeneFactorModel
from hinge.models.heads import HEADS
from hinge.models.injection import make_injection
from hinge.models.library_size import LibrarySizeModel
from hinge.models.options import DEFAULT_HEAD, DEFAULT_TRANSFORM, check_options
from hinge.models.precision import at_least_float32, keep_float32
from hinge.models.slide_effects import SlidePrior
from hinge.models.soft_adaln import ConditionEmbedding
from hinge.models.subset import GeneSubset
from hinge.models.tuning import check_backbone, frozen_names, prepare_backbone, run_layer
from hinge.models.value_bins import ValueBins
from hinge.utils.errors import WeightsError
from hinge.utils.files import arrays_digest


class HingeModel(ModelMixin, ConfigMixin):
    """The denoiser: predicts the masked genes of a spot from the visible ones and the patch.

    `from_backbone` makes one. `save_pretrained` writes what is trained; `from_pretrained` needs the same backbone.

    Parameters
    ----------
    feature_dim, num_genes, hidden_size, num_layers
        d, G, and D and L of the backbone.
    head
        `"point"` (the paper's), `"gaussian"`, `"censored_gaussian"`, or a distribution of counts:
        `"rounded_gaussian"`, `"rounded_mixture"`, `"negative_binomial"`, `"zero_inflated_negative_binomial"`.
    transform
        Name of the transform from counts to values; count heads need it.
    library_size
        Whether the spot's library size, its count over all genes, is a condition beside the features; a draw draws it
        first. Count heads under `"log1p_cp10k"` need it: which values counts can take depends on it.
    injection
        How the condition reaches the layers: `"soft_adaln"`; `"adaln_zero"`; `"concatenation"`, as further tokens;
        `"cross_attention"`. See `hinge.models.injection` for the last two.
    modulation_rank
        Rank of SoftAdaLN, None for full.
    gate, norm, start
        Of SoftAdaLN: `"sigmoid"` or `"linear"`; `"soft"`, `"layer"` or `"none"`; `"identity"` or `"random"`. AdaLN-Zero
        has its own.
    tuning, lora_rank
        Which weights of the backbone are trained too: `"frozen"`, none; `"full"`, all; `"lora"`, low-rank adapters on
        every product of its layers (peft).
    condition_on_visible
        `"current"`: the visible genes are part of the condition; `"next"`: those visible after the coming step,
        as in the released code; None: they are not.
    gene_factors, num_factors
        Whether there is a `GeneFactorModel`, and its number of factors. With one, sampling computes no tokens of genes
        that stay masked in a step, and training hides some of them (`drops_masked`).
    num_slide_factors
        Of models that were trained before there was a `SlidePrior`; see `GeneFactorModel`.
    slide_patients, num_tokens
        Names of the patients that the `SlidePrior` is fitted on, None for a model without one; and its categories.
    masked_decoding
        From 0 to 1: weight of the backbone's prediction where no gene is visible; from the initialisation on.
    standardise_features
        Whether features are divided by the training spots' deviations; the released code takes them as they are.
    feature_dropout, dropout
        Shares dropped in training: of the features, and of the output of every modulated sublayer.
    num_bins
        Bins of a backbone that ranks expression, see `hinge.models.value_bins`; None for one that takes values.
    backbone_digest
        SHA-256 of the frozen weights this model belongs to.
    """

    config_name = "config.json"
    _supports_gradient_checkpointing = True
    # `_apply` leaves these in float32 where the model is cast to half precision; `dtype` is that of the others
    _keep_in_fp32_modules = ("library_size_model", "gene_factor_model", "slide_prior", "value_head", "value_bins")

    feature_mean: Tensor
    feature_std: Tensor
    tuned_backbone: ExpressionBackbone | None
    _backbone: ExpressionBackbone | None

    @register_to_config
    def __init__(
        self,
        feature_dim: int,
        num_genes: int,
        hidden_size: int,
        num_layers: int,
        head: str = DEFAULT_HEAD,
        transform: str | None = DEFAULT_TRANSFORM,
        library_size: bool = False,
        injection: str = "soft_adaln",
        modulation_rank: int | None = None,
        gate: str = "sigmoid",
        norm: str = "soft",
        start: str = "identity",
        tuning: str = "frozen",
        lora_rank: int = 8,
        condition_on_visible: str | None = "current",
        gene_factors: bool = True,
        num_factors: int = 8,
        num_slide_factors: int = 0,
        slide_patients: list[str] | None = None,
        num_tokens: int = 0,
        masked_decoding: float = 0.0,
        standardise_features: bool = True,
        feature_dropout: float = 0.0,
        dropout: float = 0.0,
        num_bins: int | None = None,
        backbone_digest: str | None = None,
        drop_masked: bool | None = None,  # only in models of version 0.1: overrides the rule of `drops_masked`
    ):
        super().__init__()
        check_options(self.config)
        self.library_size_model = LibrarySizeModel(feature_dim, num_genes) if library_size else None
        self.condition = ConditionEmbedding(
            feature_dim + library_size, num_genes, hidden_size, with_mask=condition_on_visible is not None
        )
        num_parts = 2 if condition_on_visible is None else 3
        sizes = (hidden_size, num_layers, num_parts)
        self.modulation = make_injection(injection, sizes, modulation_rank, gate, norm, start, dropout)
        self.value_head = HEADS[head](hidden_size, num_genes)
        self.value_bins = None if num_bins is None else ValueBins(num_genes, transform, num_bins)
        # features are standardised with the training spots' statistics (`set_feature_statistics`)
        self.register_buffer("feature_mean", torch.zeros(feature_dim))
        self.register_buffer("feature_std", torch.ones(feature_dim))
        self.gene_factor_model: GeneFactorModel | None = None
        if gene_factors:
            factors = GeneFactorModel(feature_dim + library_size, num_genes, num_factors, num_slide_factors)
            if head == "point":  # a point has no scale to learn
                factors.log_scale.requires_grad_(False)
                factors.visible_log_scale.requires_grad_(False)
            self.gene_factor_model = factors
        self.slide_prior: SlidePrior | None = None
        if slide_patients is not None:
            self.slide_prior = SlidePrior(num_genes, slide_patients, feature_dim + library_size, num_tokens)
        self.gradient_checkpointing = False
        # outside the module registry: frozen, stored once elsewhere, and not part of this model's weights
        object.__setattr__(self, "_backbone", None)
        # inside it: a backbone that is trained too
        self.register_module("tuned_backbone", None)

    @property
    def backbone(self) -> ExpressionBackbone:
        if self.tuned_backbone is not None:
            return self.tuned_backbone
        if self._backbone is None:
            raise WeightsError("this HingeModel has no backbone yet; give it one with attach_backbone()")
        return self._backbone

    @property
    def drops_masked(self) -> bool:
        """Whether a step of sampling has no tokens of genes that stay masked: where nothing needs them."""
        exact = self.config.gene_factors or self.backbone.masked_give_no_keys
        return exact if self.config.drop_masked is None else self.config.drop_masked

    @classmethod
    def from_backbone(cls, backbone: ExpressionBackbone, feature_dim: int, num_genes: int, **options) -> "HingeModel":
        """Return a new model that equals the backbone for every input; `options` as in the class's parameters."""
        model = cls(
            feature_dim=feature_dim,
            num_genes=num_genes,
            hidden_size=backbone.config.hidden_size,
            num_layers=backbone.config.num_hidden_layers,
            num_bins=backbone.config.num_bins if backbone.value_space == "bins" else None,
            backbone_digest=backbone.digest(),
            **options,
        )
        return model.attach_backbone(backbone)

    def attach_backbone(self, backbone: ExpressionBackbone, check: bool = False) -> "HingeModel":
        """Make this model modulate `backbone`, which is frozen, or becomes part of the model where it is trained.

        A backbone of another size raises a WeightsError; with `check`, one of another digest does too.
        """
        check_backbone(backbone, self.config, with_digest=check)
        backbone = prepare_backbone(backbone, self.config.tuning, self.config.lora_rank)
        if self.config.tuning == "frozen":
            object.__setattr__(self, "_backbone", backbone)
        else:
            self.tuned_backbone = backbone
        return self

    def _apply(self, function, recurse=True):
        # .to(), .cuda(), .half() … move and cast the backbone along with the model
        if self._backbone is not None:
            self._backbone._apply(function)
        kept = keep_float32(function)
        for name, child in self.named_children():
            child._apply(kept if name in self._keep_in_fp32_modules else function)
        return super()._apply(kept, recurse=False)  # the feature statistics

    def to(self, *arguments, **options):
        """Move and cast model and backbone; the modules of `_keep_in_fp32_modules` are never cast to half precision."""
        # the method of ModelMixin warns that it would cast them
        return nn.Module.to(self, *arguments, **options)

    def set_feature_statistics(self, features: Tensor) -> None:
        """Standardise features from now on with the mean and deviation of `features` (n, d)."""
        features = features.double()
        deviation = features.std(dim=0, unbiased=False)
        self.feature_mean.copy_(features.mean(dim=0))
        # a constant feature carries no information; dividing it by 1 keeps it at zero
        self.feature_std.copy_(torch.where(deviation > 1e-8, deviation, torch.ones_like(deviation)))

    def standardise(self, features: Tensor) -> Tensor:
        """Return features (B, d) in units of the training spots' deviation, clipped at ±8; or as they are."""
        features = features.to(self.feature_mean.dtype)
        if not self.config.standardise_features:
            return features
        return ((features - self.feature_mean) / self.feature_std).clamp(-8, 8)

    def with_library_size(self, features: Tensor, library_size: Tensor, whole: Tensor | None = None) -> Tensor:
        """Return the condition (B, d + 1): standardised features (B, d), and how unusual the library size (B,) is.

        `whole` (B, d) are the features without dropout, where `features` have it.
        """
        assert self.library_size_model is not None
        unusual = self.library_size_model.standardise(features if whole is None else whole, library_size)
        return torch.cat([features, unusual.unsqueeze(-1).to(features.dtype)], dim=-1)

    def add_slide_prior(self, patients: list[str], num_tokens: int = 0) -> SlidePrior:
        """Give the model a prior of slide levels, still to be fitted, of these patients and T categories."""
        size, device = self.config.feature_dim + self.config.library_size, self.feature_mean.device
        self.register_to_config(slide_patients=list(patients), num_tokens=num_tokens)
        self.slide_prior = SlidePrior(self.config.num_genes, patients, size, num_tokens).to(device)
        return self.slide_prior

    def forward(
        self,
        values: Tensor,
        visible: Tensor,
        timestep: Tensor,
        features: Tensor,
        gene_ids: Tensor,
        next_visible: Tensor | None = None,
        feature_mask: Tensor | None = None,
        slide_shift: Tensor | None = None,
        library_size: Tensor | None = None,
        present: Tensor | None = None,
        library_shift: Tensor | None = None,
        index: Tensor | None = None,
    ) -> ExpressionDistribution:
        """Predict the distribution of every gene's value.

        Parameters
        ----------
        values, visible
            (B, G) expression, the fill where `visible` is 0; and 1 = seen.
        timestep
            (B,) diffusion timestep, 0 … T.
        features
            (B, d) features of the patch.
        gene_ids
            (G,) vocabulary ids.
        next_visible
            (B, G) genes visible after the coming step; needed with `condition_on_visible="next"`.
        feature_mask
            (B, d) factor of the standardised features (dropout in training); None for no change.
        slide_shift
            (B, G) shift of all spots of the slide, in units of values; None for no shift.
        library_size
            (B,) counts over all genes of each spot; needed where the model has a `LibrarySizeModel`.
        present
            (B, G), 0 = the gene's token is hidden from the others, as if the pass were without it; it is predicted all
            the same. None: all are seen.
        index
            (n,) numbers of the genes that have tokens; the others are predicted without the backbone. None: all.

        Returns
        -------
        ExpressionDistribution
            Over (B, G).
        """
        features = self.standardise(features)  # (B, d)
        # only for the backbone: the gene factor model would learn an uncertainty that is not there
        dropped = features if feature_mask is None else features * feature_mask
        if library_size is not None and self.library_size_model is not None:  # (B, d + 1)
            of_slide = library_size if library_shift is None else library_size * (-library_shift).exp()
            dropped = self.with_library_size(dropped, of_slide, features)
            features = self.with_library_size(features, of_slide)
        subset = GeneSubset.chosen(present, index, values.shape[0])  # len() would fix the size in `torch.export`
        h = self.tokens(values, visible, timestep, dropped, gene_ids, next_visible, subset)  # (B, P + G, D)
        return self.read_out(h, values, visible, features, gene_ids, slide_shift, library_size, subset)[0]

    def read_out(
        self,
        h: Tensor,
        values: Tensor,
        visible: Tensor,
        features: Tensor,
        gene_ids: Tensor,
        slide_shift: Tensor | None = None,
        library_size: Tensor | None = None,
        subset: GeneSubset | None = None,
    ) -> tuple[ExpressionDistribution, Tensor | None]:
        """Return the distribution of every gene's value from tokens (B, P + n, D).

        Return W (B, K, G) for `GeneFactorModel.innovation` too, None without gene factors. Other arguments as those of
        `forward`, but `features` and `subset` as in `tokens`.
        """
        sizes, excess = self.library_size_model, 0.0
        if library_size is not None and sizes is not None:
            excess, change = sizes.excess(library_size), sizes.change(library_size)
            slide_shift = change if slide_shift is None else slide_shift + change
        location, h, log_scale, left = self.locate(h, values, visible, features, gene_ids, slide_shift, subset)
        return self.distribution(location + excess, h, log_scale, library_size), left

    def locate(
        self,
        h: Tensor,
        values: Tensor,
        visible: Tensor,
        features: Tensor,
        gene_ids: Tensor,
        slide_shift: Tensor | None = None,
        subset: GeneSubset | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return location (B, G), tokens of the genes (B, G, D) and log-scale (B, G), and W; see `read_out`."""
        factors, log_scale, left, subset = self.gene_factor_model, None, None, subset and subset.predicted
        location = self.decode(h, values, visible, gene_ids, subset)  # (B, n)
        h = h[:, self.backbone.num_prefix_tokens :]  # (B, n, D)
        if subset is not None and subset.index is not None:
            # a gene without a token gets the offset, which the gene factor model takes as no prediction
            none = location.new_zeros(values.shape) if factors is None else factors.offset.expand(values.shape)
            location = subset.scatter(location, none)  # (B, G)
            h = subset.scatter(h, h.new_zeros(*values.shape, h.shape[-1]))  # (B, G, D)
        if factors is not None:
            location, log_scale, left = factors(location, values, visible, features, slide_shift)
        return location, h, log_scale, left

    def distribution(
        self, location: Tensor, h: Tensor, log_scale: Tensor | None, library_size: Tensor | None
    ) -> ExpressionDistribution:
        """Return the distribution of what `locate` found, for library sizes (B,)."""
        grid = None if self.config.transform is None else CountGrid(self.config.transform, library_size)
        return self.value_head(location, h, log_scale, grid)

    def tokens(
        self,
        values: Tensor,
        visible: Tensor,
        timestep: Tensor,
        features: Tensor,
        gene_ids: Tensor,
        next_visible: Tensor | None = None,
        subset: GeneSubset | None = None,
    ) -> Tensor:
        """Return the modulated backbone's tokens before its decoder, (B, P + n, D); of a subset, those it wants.

        Arguments as those of `forward`, but `features` are standardised, and have the library size appended
        (`with_library_size`) where the model takes one. `subset` are the genes that have tokens; None: all.
        """
        backbone, config = self.backbone, self.config
        visible = visible.to(features.dtype)
        shown = visible
        if config.condition_on_visible == "next":
            assert next_visible is not None, 'condition_on_visible="next" needs next_visible'
            shown = next_visible
        parts = self.condition(timestep, features, shown)  # (B, C, D)
        if self.value_bins is not None:
            values = self.value_bins.encode(values)
        present = None
        if subset is not None:
            values, visible, present = subset.gather(values), subset.gather(visible), subset.present
            gene_ids = gene_ids if subset.index is None else gene_ids[subset.index]
        h = backbone.embed(values, visible, gene_ids)  # (B, P + n, D)
        first = None if subset is None or subset.wanted is None else backbone.num_prefix_tokens + subset.wanted
        seen = backbone.layer_inputs(visible, present)
        return self.modulation(backbone, h, parts, seen, partial(run_layer, self), first)  # (B, P + m, D) of m wanted

    def decode(
        self, h: Tensor, values: Tensor, visible: Tensor, gene_ids: Tensor, subset: GeneSubset | None = None
    ) -> Tensor:
        """Return the backbone's prediction (B, n), in units of values, of tokens (B, P + n, D).

        Other arguments as those of `tokens`.
        """
        decoded = at_least_float32(self.backbone.decode(h))
        expected = self.backbone.expected(values, visible, gene_ids)
        if expected is not None:
            decoded = decoded + (expected if subset is None else subset.gather(expected))
        if self.value_bins is None:
            return decoded
        return self.value_bins.decode(decoded, None if subset is None else subset.index)

    def digest(self) -> str:
        """Return the SHA-256 over the trained weights."""
        return arrays_digest(self.trained_state())

    def trained_state(self) -> dict[str, Tensor]:
        """Return the state dict without what is frozen: weights of a backbone that has adapters."""
        frozen = frozen_names(self)
        return {name: tensor for name, tensor in self.state_dict().items() if name not in frozen}

    save_pretrained = pretrained.save_pretrained
    push_to_hub = pretrained.push_to_hub

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        backbone: ExpressionBackbone | None = None,
        *,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> "HingeModel":
        """Load what `save_pretrained` wrote and attach the backbone it was trained on; in eval mode.

        Parameters
        ----------
        folder
            Of the model or of a run, or `owner/name` on the Hugging Face Hub.
        backbone
            The backbone; None for the one in the folder of the model or beside it.
        torch_dtype, dtype
            Cast the model and its backbone, as `to` does; None: as stored.

        Raises
        ------
        WeightsError
            The folder lacks a file, a file is damaged, or the backbone is another one.
        """
        pretrained.refuse_options("from_pretrained", options, pretrained.HARMLESS_WHEN_LOADING)
        model = pretrained.load(cls, folder, backbone)
        # without dropout, which training switches on
        model.eval()
        wanted = torch_dtype if dtype is None else dtype
        return model if wanted is None else model.to(wanted)


for _verb, _reason in pretrained.NOT_OFFERED.items():
    setattr(HingeModel, _verb, pretrained.refused(_verb, _reason))
