"""The networks of iBOT: student, teacher, heads and losses."""

import random
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, distributed, nn

from hinge.training.ibot_config import IbotConfig, VitConfig
from hinge.utils import checksums
from hinge.utils.errors import ConfigError
from hinge.utils.files import atomic_path, write_json
from hinge.utils.packages import require


def block_masks(
    images: int, grid: tuple[int, int], masked_images: float, share: tuple[float, float], generator: torch.Generator
) -> Tensor:
    """Which tokens are hidden from the student, in blocks.

    Parameters
    ----------
    images
        Number of images, n.
    grid
        Rows and columns of tokens.
    masked_images
        Share of the images that are masked, at least one is.
    share
        Least and largest share of their tokens.
    generator
        Decides everything.

    Returns
    -------
    Tensor
        bool (n, rows, columns), True for hidden.
    """
    from lightly.models.utils import random_block_mask

    tokens = grid[0] * grid[1]
    # lightly draws from Python's global generator: set it, and give it back as it was
    before = random.getstate()
    random.seed(int(torch.randint(2**62, (1,), generator=generator)))
    try:
        masks = random_block_mask(
            (images, *grid),
            batch_mask_ratio=max(masked_images, 1 / images),
            min_image_mask_ratio=share[0],
            max_image_mask_ratio=share[1],
            min_num_masks_per_block=max(1, min(4, int(share[0] * tokens))),
            max_num_masks_per_block=tokens,
        )
    finally:
        random.setstate(before)
    return masks


def build_vit(config: VitConfig, drop_path: float = 0.0) -> VisionTransformer:
    """The ViT, freshly initialised; it takes images of any size that is a multiple of its patches.

    Raises
    ------
    ConfigError
        timm has no such ViT, or it has no class token.
    """
    settings = {"num_classes": 0, "global_pool": config.pooling, "dynamic_img_size": True, **config.arguments}
    if config.pooling == "avg":
        settings["fc_norm"] = False  # the norm stays where a class token has it too
    try:
        vit = timm.create_model(config.architecture, drop_path_rate=drop_path, **settings)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"timm cannot build {config.architecture} with {config.arguments}: {error}") from error
    if not isinstance(vit, VisionTransformer) or not vit.has_class_token:
        raise ConfigError(f"{config.architecture} is no ViT with a class token, which iBOT needs")
    return vit


class _Branch(nn.Module):
    """ViT and heads, once as student and once as teacher."""

    def __init__(self, vit: VisionTransformer, config: IbotConfig):
        from lightly.models.modules import DINOProjectionHead, MaskedVisionTransformerTIMM

        super().__init__()
        # timm's own initialisation and learnt positions
        self.vit = MaskedVisionTransformerTIMM(vit, weight_initialization="skip", pos_embed_initialization="skip")
        nn.init.trunc_normal_(self.vit.mask_token, std=0.02)
        size = (vit.embed_dim, config.hidden, config.bottleneck, config.outputs)
        self.class_head = DINOProjectionHead(*size)
        self.patch_head = self.class_head if config.shared_head else DINOProjectionHead(*size)

    def tokens(self, images: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W), mask bool (B, h, w) → class token (B, D), patch tokens (B, h·w, D)."""
        prefix = self.vit.vit.num_prefix_tokens
        if mask is not None:
            hidden = mask.flatten(1)
            mask = torch.cat([hidden.new_zeros(len(hidden), prefix), hidden], dim=1)
        encoded = self.vit.encode(images, mask=mask)
        return encoded[:, 0], encoded[:, prefix:]


class _TokenCenter(nn.Module):
    """Running mean of the teacher's outputs for masked tokens, in place of lightly's.

    Processes have different numbers of masked tokens: lightly's averages the means of the processes, and so depends on
    how many there are.
    """

    value: Tensor

    def __init__(self, outputs: int, momentum: float):
        super().__init__()
        self.register_buffer("value", torch.zeros(1, outputs))
        self.momentum = momentum

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Outputs (N, K) of all of this process's masked tokens."""
        total = torch.cat([x.sum(dim=0), x.new_tensor([len(x)])])
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(total)
        self.value = self.momentum * self.value + (1 - self.momentum) * (total[:-1] / total[-1])


class Ibot(nn.Module):
    """Student, teacher and both losses, in a forward so that several processes share gradients."""

    def __init__(self, vit: VitConfig, config: IbotConfig):
        require("lightly", "pretrain", "pre-training an encoder")
        from lightly.loss import DINOLoss, IBOTPatchLoss

        super().__init__()
        self.student = _Branch(build_vit(vit, vit.drop_path), config)
        self.teacher = _Branch(build_vit(vit), config).requires_grad_(False)
        self.teacher.load_state_dict(self.student.state_dict())
        self.class_loss = DINOLoss(config.outputs)
        self.patch_loss = IBOTPatchLoss(config.outputs)
        self.patch_loss.center = _TokenCenter(config.outputs, self.patch_loss.center.momentum)
        self.patch_loss_weight = config.patch_loss_weight
        self.register_buffer("mean", torch.tensor(vit.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(vit.std).view(3, 1, 1), persistent=False)
        self.carried = nn.ModuleDict(
            {"teacher": self.teacher, "class_loss": self.class_loss, "patch_loss": self.patch_loss}
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of a large crop's tokens."""
        return tuple(self.student.vit.vit.patch_embed.grid_size)

    @property
    def image_px(self) -> int:
        """Side of a large crop in pixels."""
        return self.student.vit.vit.patch_embed.img_size[0]

    @property
    def last_layers(self) -> list[nn.Module]:
        """The student's prototypes."""
        return [self.student.class_head.last_layer, self.student.patch_head.last_layer]

    def train(self, mode: bool = True) -> "Ibot":
        """The teacher is never in training mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, large: Tensor, small: Tensor, mask: Tensor, temperature: float) -> dict[str, Tensor]:
        """Both losses, a mean over patches.

        Parameters
        ----------
        large
            (2, B, 3, H, H) crops in [0, 1].
        small
            (n, B, 3, h, h) crops in [0, 1]; n may be 0.
        mask
            bool (2, B, rows, columns): what the student does not see of the large crops.
        temperature
            Of the teacher's softmax.
        """
        batch = large.shape[1]
        large, small = (self._normalise(crops).flatten(0, 1) for crops in (large, small))
        mask = mask.flatten(0, 1)
        hidden = mask.flatten(1)
        with torch.no_grad():
            taught, taught_patches = self.teacher.tokens(large)
            taught = self.teacher.class_head(taught).float()
            taught_patches = self.teacher.patch_head(taught_patches[hidden]).float()
        classes, patches = self.student.tokens(large, mask)
        if len(small):
            classes = torch.cat([classes, self.student.tokens(small)[0]])
        classes = self.student.class_head(classes).float()
        patches = self.student.patch_head(patches[hidden]).float()
        # products of probabilities: not in half precision
        with torch.autocast(large.device.type, enabled=False):
            return {
                "class_loss": self.class_loss(list(taught.split(batch)), list(classes.split(batch)), temperature),
                "patch_loss": self.patch_loss(taught_patches, patches, mask, temperature),
            }

    @torch.no_grad()
    def teach(self, momentum: float) -> None:
        """Move the teacher: momentum · teacher + (1 - momentum) · student."""
        from lightly.models.utils import update_momentum

        update_momentum(self.student, self.teacher, momentum)

    def _normalise(self, crops: Tensor) -> Tensor:
        return (crops - self.mean) / self.std


def save_encoder(network: VisionTransformer, vit: VitConfig, folder: str | Path, settings: dict[str, Any]) -> Path:
    """Write a ViT as `load_encoder` and timm read it.

    Parameters
    ----------
    network, vit
        The ViT and what it is.
    folder
        Gets `model.safetensors`, timm's `config.json` and `pretraining.json`.
    settings
        Content of `pretraining.json`.

    Returns
    -------
    Path
        `folder`.
    """
    px = network.patch_embed.img_size[0]
    arguments = {"global_pool": vit.pooling, **vit.arguments} | ({"fc_norm": False} if vit.pooling == "avg" else {})
    description = {
        "architecture": vit.architecture,
        "num_classes": 0,
        "num_features": network.num_features,
        "global_pool": vit.pooling,
        "patch_um": vit.patch_um,
        "model_args": arguments,
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [3, px, px],
            "mean": list(vit.mean),
            "std": list(vit.std),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "fixed_input_size": True,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    dtype = getattr(torch, vit.dtype)
    tensors = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in network.state_dict().items()}
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        save_file(tensors, temporary / "model.safetensors")
        write_json(temporary / "pretraining.json", settings)
        write_json(temporary / "config.json", description)
        checksums.accept(temporary, "pretrain-histology")
    return Path(folder)
