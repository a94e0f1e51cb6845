"""HINGE: a frozen expression model turned into a generator conditioned on histology.

Fang et al., HINGE, CVPR 2026 (arXiv 2603.19766). The features of a patch, the diffusion timestep and the
visible genes form one condition vector z. From z every layer of the frozen backbone gets shifts, scales and
gates (SoftAdaLN), which start so that the backbone computes what it did before. Only the conditioning path and
the value head are trained.

What the paper compares this with is here too, as options: AdaLN-Zero, the condition as further tokens, cross-attention,
and a backbone that is trained as well, whole or by low-rank adapters.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hinge.backbones.cellfm import CellFMModel
from hinge.models import kernels
from hinge.models.gene_factors import GeneFactorModel, LibrarySizeModel
from hinge.models.heads import COUNT_HEADS, HEADS, CountGrid, HeadOutput, needs_library_size
from hinge.models.injection import Concatenation, CrossAttention
from hinge.models.subset import GeneSubset
from hinge.utils import hub
from hinge.utils.errors import WeightsError, one_line
from hinge.utils.files import arrays_digest, atomic_path
from hinge.utils.packages import require

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
TIME_WIDTH = 256
SOFT_NORM_EPS = 1e-6
INJECTIONS = ("soft_adaln", "adaln_zero", "concatenation", "cross_attention")
NORMS = ("soft", "layer", "none")
STARTS = ("identity", "random")
TUNINGS = ("frozen", "full", "lora")
LORA_TARGETS = ("qkvu", "uv", "out")  # every product of a layer


class ConditionEmbedding(nn.Module):
    """z = MLP(sinusoidal(t)) + MLP(features) [+ MLP(visible genes)], (B, D)."""

    def __init__(self, feature_dim: int, num_genes: int, hidden_size: int, with_mask: bool):
        super().__init__()

        def mlp(width: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(width, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

        self.time = mlp(TIME_WIDTH)
        self.features = mlp(feature_dim)
        self.visible = mlp(num_genes) if with_mask else None
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def parts(self, timestep: Tensor, features: Tensor, visible: Tensor) -> list[Tensor]:
        """timestep (B,), features (B, d), visible (B, G) → the terms of z, each (B, D)."""
        wave = get_timestep_embedding(timestep, TIME_WIDTH, flip_sin_to_cos=True, downscale_freq_shift=0)
        parts = [self.time(wave), self.features(features)]
        return parts if self.visible is None else [*parts, self.visible(visible)]

    def forward(self, timestep: Tensor, features: Tensor, visible: Tensor) -> Tensor:
        """timestep (B,), features (B, d), visible (B, G) → z (B, D)."""
        return sum(self.parts(timestep, features, visible))


class SoftAdaLN(nn.Module):
    """Shifts, scales and gates of all layers and of the decoder from one condition vector.

    Per layer (shift_a, scale_a, gate_a, shift_f, scale_f, gate_f), before the decoder (shift, scale), in one
    matrix product. The weight starts at zero; the bias too, but for the gates: 6 where a sigmoid follows
    (σ(6) = 0.9975), 1 where not. So the layers start as those of the backbone.

    Parameters
    ----------
    hidden_size, num_layers
        D and L of the backbone.
    rank
        None for a full matrix (L·6D² weights), or the rank of a factorisation per layer.
    gate
        `"sigmoid"` or `"linear"`.
    norm
        What shifts and scales are applied to: `"soft"`, SoftNorm; `"layer"`, LayerNorm without affine; `"none"`, the
        tokens as they are.
    start
        `"identity"` as above; `"random"`: weights N(0, 0.02) and every bias at zero; `"closed"`: weights and biases
        at zero, so that with the linear gate no sublayer contributes (AdaLN-Zero: Peebles and Xie, ICCV 2023).
    """

    def __init__(
        self,
        hidden_size: int,
        num_layers: int,
        rank: int | None,
        gate: str,
        norm: str = "soft",
        start: str = "identity",
    ):
        super().__init__()
        self.hidden_size, self.num_layers, self.rank, self.gate, self.norm = hidden_size, num_layers, rank, gate, norm
        outputs = (6 * num_layers + 2) * hidden_size
        if rank is None:
            self.weight = nn.Parameter(torch.zeros(outputs, hidden_size))
        else:
            # one group of `rank` inner units for each layer and one for the decoder
            self.down = nn.Linear(hidden_size, (num_layers + 1) * rank, bias=False)
            self.up = nn.Parameter(torch.zeros(num_layers, 6 * hidden_size, rank))
            self.up_decoder = nn.Parameter(torch.zeros(2 * hidden_size, rank))
        bias = torch.zeros(6 * num_layers + 2, hidden_size)
        if start == "identity":
            open_gate = 6.0 if gate == "sigmoid" else 1.0
            bias[2 : 6 * num_layers : 6] = open_gate
            bias[5 : 6 * num_layers : 6] = open_gate
        elif start == "random":
            for weight in [self.weight] if rank is None else [self.up, self.up_decoder]:
                nn.init.normal_(weight, std=0.02)
        self.bias = nn.Parameter(bias.flatten())
        if norm == "soft":
            # η = sigmoid(scalar): how much of the LayerNorm enters; starts at 6e-6
            self.norm_mix = nn.Parameter(torch.full((num_layers, 2), -12.0))
            self.norm_mix_decoder = nn.Parameter(torch.tensor(-12.0))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z (B, D) → layers (L, 6, B, 1, D), gates applied, and decoder (2, B, 1, D)."""
        z = F.silu(z)
        batch, layers, width = z.shape[0], self.num_layers, self.hidden_size
        if self.rank is None:
            vectors = F.linear(z, self.weight, self.bias)
        else:
            inner = self.down(z)
            split = layers * self.rank
            per_layer = inner[:, :split].view(batch, layers, self.rank)
            vectors = torch.cat(
                [
                    torch.einsum("blr,lor->blo", per_layer, self.up.to(inner.dtype)).flatten(1),
                    F.linear(inner[:, split:], self.up_decoder),
                ],
                dim=1,
            )
            vectors = vectors + self.bias
        vectors = vectors.view(batch, 6 * layers + 2, 1, width).transpose(0, 1)
        per_layer = vectors[: 6 * layers].view(layers, 6, batch, 1, width)
        if self.gate == "sigmoid":
            gates = per_layer[:, 2::3].sigmoid()
            per_layer = torch.cat([per_layer[:, :2], gates[:, :1], per_layer[:, 3:5], gates[:, 1:]], dim=1)
        return per_layer, vectors[6 * layers :]

    def modulate(self, h: Tensor, shift: Tensor, scale: Tensor, place: tuple[int, int] | None = None) -> Tensor:
        """shift + (1 + scale) ⊙ norm(h), h (B, N, D); `place` is (layer, sublayer), or None before the decoder."""
        if self.norm == "soft":
            h = soft_norm(h, self.norm_mix_decoder if place is None else self.norm_mix[place])
        elif self.norm == "layer":
            h = F.layer_norm(h, h.shape[-1:], eps=SOFT_NORM_EPS)
        return torch.addcmul(shift, h, 1 + scale)


def soft_norm(h: Tensor, mix: Tensor) -> Tensor:
    """(1 − η)h + η·LayerNorm(h) without affine, η = sigmoid(mix); h (B, N, D)."""
    eta = mix.sigmoid().to(h.dtype)
    return (1 - eta) * h + eta * F.layer_norm(h, h.shape[-1:], eps=SOFT_NORM_EPS)


class HingeModel(ModelMixin, ConfigMixin):
    """The denoiser: what the masked genes of a spot are, given the visible ones and the patch.

    Make one with `HingeModel.from_backbone`; `save_pretrained` writes only what is trained here, and
    `from_pretrained` needs the same backbone again.

    Parameters
    ----------
    feature_dim, num_genes
        d and G.
    hidden_size, num_layers
        D and L of the backbone.
    head
        `"point"` (the paper's), `"gaussian"`, `"censored_gaussian"`, or a distribution of counts:
        `"rounded_gaussian"`, `"rounded_mixture"`, `"negative_binomial"`, `"zero_inflated_negative_binomial"`.
    transform
        What the values are of the counts; count heads need it.
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
        What of the backbone is trained along: `"frozen"`, nothing; `"full"`, all of it; `"lora"`, low-rank adapters
        on every product of its layers (peft).
    condition_on_visible
        `"current"`: the visible genes are part of the condition; `"next"`: those visible after the coming step,
        as in the released code; None: they are not.
    gene_factors, num_factors, num_slide_factors
        Whether there is a `GeneFactorModel`, and its numbers of factors.
    masked_decoding
        From 0 to 1: how much of what the backbone decodes counts, beside the gene path's regression, where no gene is
        visible, from the closed-form start on.
    drop_masked
        Whether training hides some masked genes' tokens from the others, so that a step of sampling may do without all
        but those of visible genes and of genes it reveals. None: with a gene path, where it costs nothing.
    standardise_features
        Whether features are divided by the training spots' deviations; the released code takes them as they are.
    feature_dropout, feature_noise
        Share of features dropped and standard deviation of the noise on standardised features in training.
    dropout
        On the output of every modulated sublayer in training.
    backbone_digest
        SHA-256 of the frozen weights this model belongs to.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        feature_dim: int,
        num_genes: int,
        hidden_size: int,
        num_layers: int,
        head: str = "gaussian",
        transform: str | None = None,
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
        num_slide_factors: int = 4,
        masked_decoding: float = 0.0,
        drop_masked: bool | None = None,
        standardise_features: bool = True,
        feature_dropout: float = 0.0,
        feature_noise: float = 0.0,
        dropout: float = 0.0,
        backbone_digest: str | None = None,
    ):
        super().__init__()
        for name, value, allowed in (
            ("head", head, tuple(HEADS)),
            ("injection", injection, INJECTIONS),
            ("gate", gate, ("sigmoid", "linear")),
            ("norm", norm, NORMS),
            ("start", start, STARTS),
            ("tuning", tuning, TUNINGS),
            ("condition_on_visible", condition_on_visible, ("current", "next", None)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, not {value!r}")
        if head in COUNT_HEADS and transform is None:
            raise ValueError(f"the head {head} is one of counts and needs the transform of the values")
        if needs_library_size(head, transform) and not library_size:
            raise ValueError(f"the head {head} needs the library size under log1p_cp10k")
        self.library_size_model = LibrarySizeModel(feature_dim) if library_size else None
        self.condition = ConditionEmbedding(
            feature_dim + library_size, num_genes, hidden_size, with_mask=condition_on_visible is not None
        )
        num_parts = 2 if condition_on_visible is None else 3
        if injection == "concatenation":
            self.modulation = Concatenation(hidden_size, num_parts)
        elif injection == "cross_attention":
            self.modulation = CrossAttention(hidden_size, num_layers, num_parts, dropout)
        elif injection == "adaln_zero":
            self.modulation = SoftAdaLN(hidden_size, num_layers, modulation_rank, "linear", "layer", "closed")
        else:
            self.modulation = SoftAdaLN(hidden_size, num_layers, modulation_rank, gate, norm, start)
        self.value_head = HEADS[head](hidden_size, num_genes)
        # features are standardised with the training spots' statistics (`set_feature_statistics`)
        self.register_buffer("feature_mean", torch.zeros(feature_dim))
        self.register_buffer("feature_std", torch.ones(feature_dim))
        self.gene_factor_model = (
            GeneFactorModel(feature_dim + library_size, num_genes, num_factors, num_slide_factors)
            if gene_factors
            else None
        )
        if gene_factors and head == "point":  # a point has no scale to learn
            self.gene_factor_model.log_scale.requires_grad_(False)
            self.gene_factor_model.visible_log_scale.requires_grad_(False)
        self.gradient_checkpointing = False
        self.fused = True
        # outside the module registry: frozen, stored once elsewhere, and not part of this model's weights
        object.__setattr__(self, "_backbone", None)
        # inside it: a backbone that is trained along
        self.register_module("tuned_backbone", None)

    @property
    def backbone(self) -> CellFMModel:
        if self.tuned_backbone is not None:
            return self.tuned_backbone
        if self._backbone is None:
            raise WeightsError("this HingeModel has no backbone yet; give it one with attach_backbone()")
        return self._backbone

    @property
    def drops_masked(self) -> bool:
        """Whether a step of sampling has no tokens of genes that stay masked."""
        return self.config.gene_factors if self.config.drop_masked is None else self.config.drop_masked

    @classmethod
    def from_backbone(cls, backbone: CellFMModel, feature_dim: int, num_genes: int, **options) -> "HingeModel":
        """A model that equals the backbone for every input; `options` as in the class's parameters."""
        model = cls(
            feature_dim=feature_dim,
            num_genes=num_genes,
            hidden_size=backbone.config.hidden_size,
            num_layers=backbone.config.num_hidden_layers,
            backbone_digest=backbone.digest(),
            **options,
        )
        return model.attach_backbone(backbone)

    def attach_backbone(self, backbone: CellFMModel, check: bool = False) -> "HingeModel":
        """Let this model modulate `backbone`, which is frozen, or taken over where the model trains it along.

        Parameters
        ----------
        backbone
            A CellFM of the width and depth this model was made for.
        check
            Also compare the digest of its weights with the one in the config.

        Raises
        ------
        WeightsError
            Another size, or other weights than the model was trained on.
        """
        size = (backbone.config.hidden_size, backbone.config.num_hidden_layers)
        if size != (self.config.hidden_size, self.config.num_layers):
            raise WeightsError(
                f"the backbone is {size[0]} wide and {size[1]} layers deep, the model was made for "
                f"{self.config.hidden_size} and {self.config.num_layers}"
            )
        if check and self.config.backbone_digest and backbone.digest() != self.config.backbone_digest:
            raise WeightsError(
                "these are not the backbone weights the model was trained on: expected digest "
                f"{self.config.backbone_digest[:12]}…, got {backbone.digest()[:12]}…"
            )
        backbone.requires_grad_(False).eval()
        if self.config.tuning == "frozen":
            object.__setattr__(self, "_backbone", backbone)
            return self
        if self.config.tuning == "lora":
            require("peft", "lora", "backbone.tuning=lora")  # takes seconds to import
            from peft import LoraConfig, inject_adapter_in_model

            settings = LoraConfig(
                r=self.config.lora_rank, lora_alpha=self.config.lora_rank, target_modules=list(LORA_TARGETS)
            )
            backbone = inject_adapter_in_model(settings, backbone)
        else:
            for name, parameter in backbone.named_parameters():
                parameter.requires_grad_(not name.startswith(_unused_in_backbone(backbone)))
        for parameter in backbone.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        self.tuned_backbone = backbone
        return self

    def cast_backbone(self, dtype: torch.dtype) -> None:
        """Keep what is frozen of the backbone in `dtype`; what is trained stays in float32."""
        for parameter in self.backbone.parameters():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)

    def _apply(self, function, recurse=True):
        # .to(), .cuda() … move the backbone along with the model
        if self._backbone is not None:
            self._backbone._apply(function)
        return super()._apply(function, recurse)

    def set_feature_statistics(self, features: Tensor) -> None:
        """Standardise features from now on with the mean and deviation of `features` (n, d)."""
        features = features.double()
        deviation = features.std(dim=0, unbiased=False)
        self.feature_mean.copy_(features.mean(dim=0))
        # a constant feature carries nothing; dividing it by 1 keeps it at zero
        self.feature_std.copy_(torch.where(deviation > 1e-8, deviation, torch.ones_like(deviation)))

    def standardise(self, features: Tensor) -> Tensor:
        """Features (B, d) in units of the training spots' deviation, clipped at ±8; or as they are."""
        if not self.config.standardise_features:
            return features.float()
        return ((features.float() - self.feature_mean) / self.feature_std).clamp(-8, 8)

    def with_library_size(self, features: Tensor, library_size: Tensor, whole: Tensor | None = None) -> Tensor:
        """Standardised features (B, d) → the condition (B, d + 1) with the library size (B,) for a model that takes it.

        `whole` (B, d) are the features without dropout, where `features` have it.
        """
        unusual = self.library_size_model.standardise(features if whole is None else whole, library_size)
        return torch.cat([features, unusual.unsqueeze(-1)], dim=-1)

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
    ) -> HeadOutput:
        """Predict the distribution of every gene's value.

        Parameters
        ----------
        values
            (B, G) expression; the fill where `visible` is 0.
        visible
            (B, G), 1 = seen.
        timestep
            (B,) diffusion timestep, 0 … T.
        features
            (B, d) features of the patch.
        gene_ids
            (G,) vocabulary ids.
        next_visible
            (B, G) genes visible after the coming step; needed with `condition_on_visible="next"`.
        feature_mask
            (B, d) what standardised features are multiplied with (dropout in training); None for no change.
        slide_shift
            (B, G) what all spots of the slide are shifted by, in units of values; None for no shift.
        library_size
            (B,) counts over all genes of each spot; needed where the model has a `LibrarySizeModel`.
        present
            (B, G), 0 = the gene's token is hidden from the others, as if the pass were without it; it is predicted all
            the same. None: all are seen.

        Returns
        -------
        HeadOutput
            Distribution over (B, G).
        """
        features = self.standardise(features)
        masked = features if feature_mask is None else features * feature_mask
        if self.library_size_model is not None:
            features, masked = (
                self.with_library_size(features, library_size),
                self.with_library_size(masked, library_size, features),
            )
        # only what conditions the backbone loses features: the gene path would learn an uncertainty that is not there
        subset = None if present is None else GeneSubset(None, present)
        h = self.tokens(values, visible, timestep, masked, gene_ids, next_visible, subset)
        return self.read_out(h, values, visible, features, slide_shift, library_size, subset)[0]

    def read_out(
        self,
        h: Tensor,
        values: Tensor,
        visible: Tensor,
        features: Tensor,
        slide_shift: Tensor | None = None,
        library_size: Tensor | None = None,
        subset: GeneSubset | None = None,
    ) -> tuple[HeadOutput, Tensor | None]:
        """From tokens (B, P + n, D) to the distribution of every gene's value.

        Other arguments as those of `forward`, but `features` and `subset` as in `tokens`.

        Returns
        -------
        tuple
            HeadOutput over (B, G), and W (B, K, G) for `GeneFactorModel.innovation`, None without a gene path.
        """
        location, log_scale, left = self.backbone.decode(h).float(), None, None
        h = h[:, self.backbone.num_prefix_tokens :]
        if subset is not None and subset.index is not None:
            # where the path has its offset, what was decoded says nothing
            nothing = (
                location.new_zeros(values.shape)
                if self.gene_factor_model is None
                else self.gene_factor_model.offset.expand(values.shape)
            )
            location = subset.scatter(location, nothing)
            h = subset.scatter(h, h.new_zeros(*values.shape, h.shape[-1]))
        if self.gene_factor_model is not None:
            location, log_scale, left = self.gene_factor_model(location, values, visible, features, slide_shift)
        grid = None if self.config.transform is None else CountGrid(self.config.transform, library_size)
        return self.value_head(location, h, log_scale, grid), left

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
        """The modulated backbone's tokens before its decoder, (B, P + n, D), n = G without a subset.

        Arguments as those of `forward`, but `features` are standardised (and `with_library_size` where the model has one);
        `subset` are the genes that have tokens, None for all: what is read out of the others is the gene path's word.
        """
        backbone, config = self.backbone, self.config
        visible = visible.to(features.dtype)
        shown = next_visible if config.condition_on_visible == "next" else visible
        parts = self.condition.parts(timestep, features, shown.to(features.dtype))

        present = None
        if subset is not None:
            values, visible, present = subset.gather(values), subset.gather(visible), subset.present
            gene_ids = gene_ids if subset.index is None else gene_ids[subset.index]
        h = backbone.embed(values, visible, gene_ids)
        early, late = backbone.key_masks(visible, present=present)
        value_scale = backbone.value_scale(values.shape[1])
        half = config.num_layers // 2
        key_masks = [early] * half + [late] * (config.num_layers - half)
        if config.injection in ("concatenation", "cross_attention"):
            parts = torch.stack(parts, dim=1)
            return self.modulation(backbone.layers, h, parts, key_masks, value_scale, self._run)
        layers, decoder = self.modulation(sum(parts))
        for number, (block, vectors) in enumerate(zip(backbone.layers, layers.to(h.dtype), strict=True)):
            h = self._run(self._modulated_block, number, block, h, vectors, key_masks[number], value_scale)
        return self.modulation.modulate(h, *decoder.to(h.dtype))

    def _run(self, function: Callable[..., Tensor], *arguments) -> Tensor:
        """function(*arguments), whose inner results are not kept for the gradient if checkpointing is on."""
        if self.gradient_checkpointing and self.training:
            return checkpoint(function, *arguments, use_reentrant=False)
        return function(*arguments)

    def _modulated_block(self, number, block, h, vectors, key_mask, value_scale) -> Tensor:
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = vectors
        if self._may_fuse(h):
            mix, scale = self.modulation.norm_mix[number], block.residual_scale
            x = kernels.modulate(h, shift_a, scale_a, mix[0], SOFT_NORM_EPS)
            mixed = kernels.retention(block.retention, x, key_mask, value_scale)
            h = kernels.join(h, self._dropout(mixed), gate_a, block.norm1, scale)
            x = kernels.modulate(h, shift_f, scale_f, mix[1], SOFT_NORM_EPS)
            fed = kernels.feed_forward(block.feed_forward, x)
            return kernels.join(h, self._dropout(fed), gate_f, block.norm2, scale)
        modulate = self.modulation.modulate
        mixed = block.retention(modulate(h, shift_a, scale_a, (number, 0)), key_mask, value_scale)
        h = block.norm1(torch.add(gate_a * self._dropout(mixed), h, alpha=block.residual_scale))
        fed = block.feed_forward(modulate(h, shift_f, scale_f, (number, 1)))
        return block.norm2(torch.add(gate_f * self._dropout(fed), h, alpha=block.residual_scale))

    def _may_fuse(self, h: Tensor) -> bool:
        """Whether layers are computed by `hinge.models.kernels`.

        Not in float32 inference, where the order of operations is that of the published code, bit for bit; not in
        float16, which unscaled products overflow; not where the backbone's norms want gradients.
        """
        if not self.fused or self.config.norm != "soft" or self.config.injection != "soft_adaln":
            return False
        if self.config.tuning == "full" or h.dtype not in (torch.float32, torch.bfloat16):
            return False
        return h.dtype == torch.bfloat16 or torch.is_grad_enabled()

    def _dropout(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config.dropout, self.training)

    def digest(self) -> str:
        """SHA-256 over the trained weights."""
        return arrays_digest(self.trained_state())

    def trained_state(self) -> dict[str, Tensor]:
        """The state dict without what is frozen: weights of a backbone that has adapters."""
        frozen = set()
        if self.tuned_backbone is not None:
            named = self.tuned_backbone.named_parameters()
            frozen = {f"tuned_backbone.{name}" for name, parameter in named if not parameter.requires_grad}
        return {name: tensor for name, tensor in self.state_dict().items() if name not in frozen}

    def num_trainable(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    def save_pretrained(self, save_directory: str | Path, **kwargs) -> None:
        """Write what was trained (safetensors) and the config with the backbone's digest; not the backbone."""
        if kwargs:
            raise ValueError(f"save_pretrained takes no {', '.join(kwargs)}")
        with atomic_path(save_directory) as folder:
            folder.mkdir()
            self.save_config(folder)
            weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.trained_state().items()}
            save_file(weights, folder / WEIGHTS_NAME, metadata={"format": "pt"})

    def push_to_hub(self, repository: str, private: bool = True, with_backbone: bool = False) -> str:
        """Upload what `save_pretrained` writes to `owner/name` on the Hugging Face Hub; the repository's address.

        `hinge push` uploads a whole run, with its panel and a model card. The backbone goes along only
        where `with_backbone` says so: one that was published by others has a licence of its own.
        """

        def save(folder: Path) -> None:
            self.save_pretrained(folder)
            if with_backbone:
                self.backbone.save_pretrained(folder / "backbone")

        return hub.upload_saved(save, repository, private)

    @classmethod
    def from_pretrained(cls, folder: str | Path, backbone: CellFMModel | None = None) -> "HingeModel":
        """Load what `save_pretrained` wrote and attach the backbone it was trained on; in eval mode.

        Parameters
        ----------
        folder
            Of the model or of a run, or `owner/name` on the Hugging Face Hub.
        backbone
            The backbone; None for the one that lies beside the model.

        Raises
        ------
        WeightsError
            The folder lacks a file, a file is damaged, or the backbone is another one.
        """
        folder = hub.find(folder, "model")
        try:
            config = json.loads((folder / cls.config_name).read_text())
            weights = load_file(folder / WEIGHTS_NAME)
        except FileNotFoundError as error:
            raise WeightsError(
                f"{folder} holds no hinge model: {Path(error.filename or '').name} is missing"
            ) from error
        except Exception as error:
            raise WeightsError(f"the hinge model in {folder} is damaged: {error}") from error
        if backbone is None:
            beside = next((each / "backbone" for each in (folder, folder.parent) if (each / "backbone").is_dir()), None)
            if beside is None:
                raise WeightsError(f"there is no backbone beside the model in {folder}; give the one it was trained on")
            backbone = CellFMModel.from_pretrained(beside)
        stored = sum(tensor.numel() for tensor in weights.values())
        try:
            if not isinstance(config.get("backbone_digest"), str | None):
                raise ValueError("its backbone_digest is no text")
            if config.get("num_layers", 0) > stored:
                raise ValueError(f"it announces {config['num_layers']:,} layers")
            # without storage first: a damaged config announces any size
            with torch.device("meta"):
                announced = sum(tensor.numel() for tensor in cls.from_config(config).state_dict().values())
            if announced > stored:
                raise ValueError(f"it is that of {announced:,} weights, and there are {stored:,}")
            model = cls.from_config(config)
        except (TypeError, ValueError, RuntimeError, LookupError, AttributeError, OverflowError, OSError) as error:
            raise WeightsError(f"{folder / cls.config_name} describes no hinge model: {one_line(error)}") from error
        model = model.attach_backbone(backbone, check=True)
        try:
            unexpected = model.load_state_dict(weights, strict=False).unexpected_keys
        except RuntimeError as error:
            raise WeightsError(f"the weights in {folder} do not fit its config.json: {error}") from error
        wrong = sorted(unexpected) or sorted(model.trained_state().keys() - weights.keys())
        if wrong:
            what = "have one that the model has not" if unexpected else "lack one"
            raise WeightsError(f"the weights in {folder} do not fit its config.json: they {what}, {wrong[0]}")
        # whoever loads a model samples with it: dropout is for training, which switches it on
        return model.eval()


def _unused_in_backbone(backbone: CellFMModel) -> tuple[str, ...]:
    """Weights that no gradient reaches from here: the cell-wise decoder, and tokens that this input has not."""
    unused = "zero_token" if backbone.config.masked_input == "mask_token" else "mask_token"
    return (unused, "cell_decoder", "technical_encoder")
