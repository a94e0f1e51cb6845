"""A frozen histology encoder: a network that maps a patch to a vector, and the preprocessing of patches."""

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from hinge.utils.errors import ConfigError


class Preprocess(nn.Module):
    """Convert patches as read from an image to the input of a network.

    Parameters
    ----------
    patch_px
        Side of the network's input.
    mean, std
        Normalisation of R, G, B in [0, 1].
    interpolation
        Interpolation of patches of another size, with antialiasing.
    """

    def __init__(
        self,
        patch_px: int,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        interpolation: Literal["bilinear", "bicubic"] = "bicubic",
    ) -> None:
        super().__init__()
        self.patch_px, self.mean, self.std = patch_px, tuple(mean), tuple(std)
        self.interpolation = InterpolationMode(interpolation)

    def forward(self, patches: Tensor) -> Tensor:
        """Uint8 (B, H, W, 3) to float32 (B, 3, patch_px, patch_px)."""
        x = patches.permute(0, 3, 1, 2)
        if x.shape[-1] != self.patch_px or x.shape[-2] != self.patch_px:
            x = TF.resize(x, [self.patch_px, self.patch_px], self.interpolation, antialias=True)
        return TF.normalize(x.to(torch.float32) / 255, self.mean, self.std)

    def describe(self) -> str:
        """Return all settings as text; they are part of the digest of an encoder."""
        return f"{self.patch_px} px, mean {self.mean}, std {self.std}, {self.interpolation.value}"


class Joined(nn.Module):
    """Several encoders on the same patches; their features are concatenated."""

    def __init__(self, encoders: "Sequence[Encoder]") -> None:
        super().__init__()
        self.members = nn.ModuleList(nn.Sequential(encoder.transform, encoder.module) for encoder in encoders)

    def forward(self, patches: Tensor) -> Tensor:
        """Uint8 (B, H, W, 3) to (B, d), the concatenated features of the members."""
        return torch.cat([member(patches).to(torch.float32) for member in self.members], dim=1)


@dataclass(frozen=True, eq=False)
class Encoder:
    """A frozen histology encoder.

    Attributes
    ----------
    name
        Name as in `load_encoder`.
    dim
        Number of features per patch, d.
    patch_um
        Side of a patch in µm.
    patch_px
        Side of a patch in pixels.
    digest
        SHA-256 of the weights and of the preprocessing.
    transform
        Preprocessing of uint8 patches (B, H, W, 3) to the input of `module`.
    module
        The network, in eval mode and without gradients.
    feature_dtype
        Type in which its features are stored.
    """

    name: str
    dim: int
    patch_um: float
    patch_px: int
    digest: str
    transform: nn.Module
    module: nn.Module
    feature_dtype: Literal["float16", "float32"] = "float16"

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return next(itertools.chain(self.module.parameters(), self.module.buffers())).device

    def encode(self, batch: np.ndarray, dtype: Literal["float32", "bfloat16"] | None = None) -> np.ndarray:
        """Return the features of a batch of patches.

        Parameters
        ----------
        batch
            RGB, uint8 (B, H, W, 3); resized if it is not `patch_px` wide.
        dtype
            Type of the computation; None: bfloat16 on CUDA, float32 elsewhere.

        Returns
        -------
        numpy.ndarray
            float32 (B, d).

        Raises
        ------
        ConfigError
            `dtype` is neither of the two.
        """
        if dtype not in (None, "float32", "bfloat16"):
            raise ConfigError(f"an encoder computes in float32 or bfloat16, not in {dtype!r}")
        kind = self.device.type
        half = dtype == "bfloat16" or (dtype is None and kind == "cuda")
        patches = torch.from_numpy(batch).to(self.device)
        with torch.inference_mode():
            x = self.transform(patches)
            with torch.autocast(kind, torch.bfloat16) if half else contextlib.nullcontext():
                features = self.module(x)
        return features.to("cpu", torch.float32).numpy()
