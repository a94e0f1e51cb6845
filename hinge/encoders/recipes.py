"""Published histology encoders: how each is built, what it expects and where its weights are.

A recipe builds an encoder without weights; `hinge.encoders.registry` loads them. But for a small one that lies in the
package, weights are not shipped: each set comes from its authors under their licence, most after a request on the
Hugging Face Hub.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.layers import SwiGLUPacked, resample_abs_pos_embed, to_2tuple
from torch import Tensor, nn
from torch.nn import functional as F

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BIOPTIMUS_MEAN, BIOPTIMUS_STD = (0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517)
HIBOU_MEAN, HIBOU_STD = (0.7068, 0.5755, 0.7220), (0.1950, 0.2316, 0.1816)

PATCH_UM = 112.0
"""Side of a patch of all encoders unless told otherwise: 224 px at 0.5 µm/px, the patch of HEST-1k."""


@dataclass(frozen=True)
class Recipe:
    """One published encoder.

    Attributes
    ----------
    architecture
        A timm model, or one of `TOWERS`.
    arguments
        Its arguments.
    pooling
        `cls`: the class token; `cls+mean`: beside it the mean of the patch tokens; `own`: what the
        architecture returns.
    dim
        Numbers per patch.
    licence
        Of the weights.
    repo, file
        Where the weights are on the Hugging Face Hub; `repo` is None where they are not.
    packaged
        The weights where they lie in this package.
    source
        Where else they come from: a web page.
    gated
        Whether access has to be asked for.
    patch_px, mean, std, interpolation
        Side of the input, and how pixels in [0, 1] are normalised and resized.
    """

    architecture: str
    pooling: Literal["cls", "cls+mean", "own"]
    dim: int
    licence: str
    file: str
    packaged: Path | None = None
    repo: str | None = None
    source: str | None = None
    gated: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)
    patch_px: int = 224
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"

    @property
    def page(self) -> str:
        """The web page to fetch the weights from."""
        return self.source or f"https://huggingface.co/{self.repo}"


class AttentionPooledViT(nn.Module):
    """CONCH's image tower: a ViT whose tokens are pooled by one learnt query (Lu et al., Nat. Med. 2024).

    Parameters
    ----------
    trunk
        A timm ViT.
    dim
        Width of query and output.
    pool
        The pooling attention, `MultiheadPool` (CONCH) or `PlainPool` (CONCH v1.5).
    resize_positions
        Function that brings the checkpoint's position embeddings (1, 1 + g², D) to a grid of another side.
    arguments
        Of the ViT.
    """

    def __init__(
        self,
        trunk: str,
        dim: int,
        pool: type[nn.Module],
        resize_positions: Callable[[Tensor, int], Tensor],
        **arguments: Any,
    ) -> None:
        super().__init__()
        self.trunk = timm.create_model(trunk, num_classes=0, **arguments)
        self.resize_positions = resize_positions
        self.attn_pool_contrast = pool(dim, self.trunk.num_features)
        self.ln_contrast = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) to features (B, d)."""
        return self.ln_contrast(self.attn_pool_contrast(self.trunk.forward_features(x)))


class MultiheadPool(nn.Module):
    """Attention of one query to all tokens, with biases."""

    def __init__(self, dim: int, token_dim: int, heads: int = 8) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(1, dim))
        self.attn = nn.MultiheadAttention(dim, heads, kdim=token_dim, vdim=token_dim, batch_first=True)
        self.ln_q, self.ln_k = nn.LayerNorm(dim), nn.LayerNorm(token_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, D) to (B, d)."""
        keys = self.ln_k(tokens)
        query = self.ln_q(self.query).expand(len(keys), 1, -1)
        return self.attn(query, keys, keys, need_weights=False)[0][:, 0]


class PlainPool(nn.Module):
    """Attention of one query to all tokens, without biases."""

    def __init__(self, dim: int, token_dim: int, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.zeros(1, dim))
        self.ln_q, self.ln_k = nn.LayerNorm(dim), nn.LayerNorm(token_dim)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(token_dim, 2 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, D) to (B, d)."""
        query = self.to_q(self.ln_q(self.query)).expand(len(tokens), 1, -1)
        key, value = self.to_kv(self.ln_k(tokens)).chunk(2, dim=-1)
        query, key, value = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (query, key, value))
        return self.to_out(F.scaled_dot_product_attention(query, key, value).flatten(1))


class ConvStem(nn.Module):
    """CTransPath's patch embedding: convolutions in place of one (Wang et al., Med. Image Anal. 2022)."""

    def __init__(self, img_size: Any, patch_size: Any, embed_dim: int, norm_layer: type[nn.Module], **_: Any) -> None:
        super().__init__()
        sizes = zip(to_2tuple(img_size), to_2tuple(patch_size), strict=True)
        self.grid_size = tuple(image // patch for image, patch in sizes)
        narrow, wide = embed_dim // 8, embed_dim // 4
        self.proj = nn.Sequential(
            nn.Conv2d(3, narrow, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(narrow),
            nn.ReLU(),
            nn.Conv2d(narrow, wide, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU(),
            nn.Conv2d(wide, embed_dim, 1),
        )
        self.norm = norm_layer(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) to tokens (B, H/4, W/4, D)."""
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class PooledTokens(nn.Module):
    """A ViT's class token, and beside it the mean of its patch tokens if wanted."""

    def __init__(self, vit: nn.Module, pooling: Literal["cls", "cls+mean"]) -> None:
        super().__init__()
        self.vit, self.pooling = vit, pooling

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) to features (B, d)."""
        tokens = self.vit.forward_features(x)
        if self.pooling == "cls":
            return tokens[:, 0]
        return torch.cat([tokens[:, 0], tokens[:, self.vit.num_prefix_tokens :].mean(dim=1)], dim=1)


def _bilinear_positions(positions: Tensor, side: int) -> Tensor:
    """As CONCH's loader does it."""
    return resample_abs_pos_embed(positions, [side, side], interpolation="bilinear", antialias=False)


def _enlarged_positions(positions: Tensor, side: int) -> Tensor:
    """As CONCH v1.5 does it: stored for a 224-px image, enlarged like iBOT's for a larger one."""
    stored = 14
    if positions.shape[1] != 1 + stored**2:
        positions = _bilinear_positions(positions, stored)
    if side == stored:
        return positions
    first, grid = positions[:, :1], positions[:, 1:].unflatten(1, (stored, stored)).permute(0, 3, 1, 2)
    # the published factor has 0.1 too much, against rounding, and shifts the result by it
    grid = F.interpolate(grid, scale_factor=(side + 0.1) / stored, mode="bicubic")
    return torch.cat([first, grid.flatten(2).transpose(1, 2)], dim=1)


TOWERS = {
    "conch": partial(AttentionPooledViT, "vit_base_patch16_224", 512, MultiheadPool, _bilinear_positions),
    "conch-v1.5": partial(AttentionPooledViT, "vit_large_patch16_224", 768, PlainPool, _enlarged_positions),
    "ctranspath": partial(timm.create_model, "swin_tiny_patch4_window7_224", num_classes=0, embed_layer=ConvStem),
}

_SWIGLU = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
_VIRCHOW = {"init_values": 1e-5, "mlp_ratio": 5.3375, **_SWIGLU}
_H_OPTIMUS = {"img_size": 224, "init_values": 1e-5}
_HIBOU = {"patch_size": 14, "init_values": 1.0, "reg_tokens": 4, "no_embed_class": True, **_SWIGLU}
_MAHMOOD_LICENCE = "CC BY-NC-ND 4.0"
_OWKIN_LICENCE = "Owkin non-commercial"

RECIPES: dict[str, Recipe] = {
    "uni": Recipe(
        "vit_large_patch16_224",
        pooling="cls",
        dim=1024,
        licence=_MAHMOOD_LICENCE,
        repo="MahmoodLab/UNI",
        file="pytorch_model.bin",
        gated=True,
        arguments={"init_values": 1e-5},
        interpolation="bilinear",
    ),
    "uni2-h": Recipe(
        "vit_giant_patch14_224",
        pooling="cls",
        dim=1536,
        licence=_MAHMOOD_LICENCE,
        repo="MahmoodLab/UNI2-h",
        file="pytorch_model.bin",
        gated=True,
        arguments={
            "depth": 24,
            "num_heads": 24,
            "embed_dim": 1536,
            "init_values": 1e-5,
            "mlp_ratio": 5.33334,
            "reg_tokens": 8,
            "no_embed_class": True,
            **_SWIGLU,
        },
        interpolation="bilinear",
    ),
    "conch": Recipe(
        "conch",
        pooling="own",
        dim=512,
        licence=_MAHMOOD_LICENCE,
        repo="MahmoodLab/CONCH",
        file="pytorch_model.bin",
        gated=True,
        arguments={"img_size": 448},
        patch_px=448,
        mean=CLIP_MEAN,
        std=CLIP_STD,
    ),
    "conch-v1.5": Recipe(
        "conch-v1.5",
        pooling="own",
        dim=768,
        licence=_MAHMOOD_LICENCE,
        repo="MahmoodLab/conchv1_5",
        file="pytorch_model_vision.bin",
        gated=True,
        arguments={"img_size": 448, "init_values": 1.0},
        patch_px=448,
        interpolation="bilinear",
    ),
    "virchow": Recipe(
        "vit_huge_patch14_224",
        pooling="cls+mean",
        dim=2560,
        licence="Apache 2.0",
        repo="paige-ai/Virchow",
        file="pytorch_model.bin",
        gated=True,
        arguments=_VIRCHOW,
    ),
    "virchow2": Recipe(
        "vit_huge_patch14_224",
        pooling="cls+mean",
        dim=2560,
        licence="CC BY-NC-ND 4.0",
        repo="paige-ai/Virchow2",
        file="pytorch_model.bin",
        gated=True,
        arguments={**_VIRCHOW, "reg_tokens": 4},
    ),
    "gigapath": Recipe(
        "vit_giant_patch14_dinov2",
        pooling="cls",
        dim=1536,
        licence="Apache 2.0",
        repo="prov-gigapath/prov-gigapath",
        file="pytorch_model.bin",
        gated=True,
        arguments={"img_size": 224, "patch_size": 16, "init_values": 1e-5, "mlp_ratio": 5.33334},
    ),
    "h-optimus-0": Recipe(
        "vit_giant_patch14_reg4_dinov2",
        pooling="cls",
        dim=1536,
        licence="Apache 2.0",
        repo="bioptimus/H-optimus-0",
        file="pytorch_model.bin",
        arguments=_H_OPTIMUS,
        mean=BIOPTIMUS_MEAN,
        std=BIOPTIMUS_STD,
    ),
    "h-optimus-1": Recipe(
        "vit_giant_patch14_reg4_dinov2",
        pooling="cls",
        dim=1536,
        licence="CC BY-NC-ND 4.0",
        repo="bioptimus/H-optimus-1",
        file="pytorch_model.bin",
        gated=True,
        arguments=_H_OPTIMUS,
        mean=BIOPTIMUS_MEAN,
        std=BIOPTIMUS_STD,
    ),
    "phikon": Recipe(
        "vit_base_patch16_224",
        pooling="cls",
        dim=768,
        licence=_OWKIN_LICENCE,
        repo="owkin/phikon",
        file="model.safetensors",
        arguments={"norm_layer": partial(nn.LayerNorm, eps=1e-12)},
        interpolation="bilinear",
    ),
    "phikon-v2": Recipe(
        "vit_large_patch16_224",
        pooling="cls",
        dim=1024,
        licence=_OWKIN_LICENCE,
        repo="owkin/phikon-v2",
        file="model.safetensors",
        arguments={"init_values": 1.0},
        interpolation="bilinear",
    ),
    "hibou-b": Recipe(
        "vit_base_patch16_224",
        pooling="cls",
        dim=768,
        licence="Apache 2.0",
        repo="histai/hibou-b",
        file="model.safetensors",
        # SwiGLU's two inner layers side by side: 2 x 2048 and 2 x 2736 numbers
        arguments={**_HIBOU, "mlp_ratio": 4096.5 / 768},
        mean=HIBOU_MEAN,
        std=HIBOU_STD,
    ),
    "hibou-l": Recipe(
        "vit_large_patch16_224",
        pooling="cls",
        dim=1024,
        licence="Apache 2.0",
        repo="histai/hibou-L",
        file="model.safetensors",
        gated=True,
        arguments={**_HIBOU, "mlp_ratio": 5472.5 / 1024},
        mean=HIBOU_MEAN,
        std=HIBOU_STD,
    ),
    "ctranspath": Recipe(
        "ctranspath",
        pooling="own",
        dim=768,
        licence="GPL 3.0",
        file="ctranspath.pth",
        source="https://github.com/Xiyue-Wang/TransPath",
        interpolation="bilinear",
    ),
    "spafoundation": Recipe(
        "vit_base_patch16_224",
        pooling="cls",
        dim=768,
        licence="MIT",
        file="spafoundation_1m_vitb16.pth",
        source="https://github.com/NingZhangCSUBio/SpaFoundation",
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    ),
    # configs/pretrain/small.yaml; its card is docs/hinge-vit-tiny.md
    "hinge-vit-tiny": Recipe(
        "vit_tiny_patch16_224",
        pooling="cls+mean",
        dim=384,
        licence="Apache-2.0",
        file="hinge-vit-tiny.safetensors",
        packaged=Path(__file__).with_name("hinge-vit-tiny.safetensors"),
        arguments={"img_size": 96, "patch_size": 16, "embed_dim": 192, "depth": 6, "num_heads": 3},
        patch_px=96,
        mean=(0.70, 0.58, 0.70),
        std=(0.21, 0.23, 0.18),
    ),
}


def build(recipe: Recipe) -> nn.Module:
    """Construct a recipe's network with fresh weights, on torch's current default device."""
    if recipe.architecture in TOWERS:
        return TOWERS[recipe.architecture](**recipe.arguments)
    vit = timm.create_model(recipe.architecture, num_classes=0, **recipe.arguments)
    return vit if recipe.pooling == "own" else PooledTokens(vit, recipe.pooling)
