"""Augmentation of H&E patches for self-supervised pre-training: random crops, and stains of other laboratories.

Both functions take the uniform numbers they need, so that a patch's augmentation depends on nothing but these.
"""

from dataclasses import dataclass

import torch
from skimage.color import hed_from_rgb
from torch import Tensor
from torch.nn import functional as F

CROP_DRAWS = 6
"""Uniform numbers that a crop takes."""

STAIN_DRAWS = 6
"""Uniform numbers that the stains of a crop take."""

_SHIFT_SHARE = 0.1  # of the strength: how far a stain is raised, in units of optical density


@dataclass(frozen=True)
class Crops:
    """One kind of crops.

    Attributes
    ----------
    number
        Crops of each patch, n.
    px
        Side of a crop in pixels.
    scale
        Least and largest share of the patch's area.
    ratio
        Largest ratio of a crop's sides before it is made a square.
    """

    number: int
    px: int
    scale: tuple[float, float]
    ratio: float = 4 / 3


def random_crops(patches: Tensor, crops: Crops, uniform: Tensor) -> Tensor:
    """Random resized crops, flipped and turned by quarters.

    Parameters
    ----------
    patches
        Float (B, 3, H, H) in [0, 1]. Pixels are interpolated, not averaged: H is best not more than twice what gives
        a crop its own pixels.
    crops
        How many and how large.
    uniform
        (B, n, CROP_DRAWS) in [0, 1).

    Returns
    -------
    Tensor
        (B, n, 3, px, px) in [0, 1].
    """
    if crops.number == 0:
        return patches.new_zeros(len(patches), 0, 3, crops.px, crops.px)
    draws = uniform.flatten(0, 1)
    low, high = crops.scale
    area = low + (high - low) * draws[:, 0]
    stretch = crops.ratio ** (draws[:, 1] - 0.5)  # of one side; the other shrinks by it
    width, height = (area.sqrt() * stretch).clamp_max(1), (area.sqrt() / stretch).clamp_max(1)
    x, y = (1 - width) * (2 * draws[:, 2] - 1), (1 - height) * (2 * draws[:, 3] - 1)
    # from a crop's coordinates to its patch's, both -1…1: a symmetry of the square, then scale and shift
    turn, flip = (draws[:, 4] * 4).floor(), (draws[:, 5] < 0.5).to(draws) * 2 - 1
    cos, sin = (turn == 0).to(draws) - (turn == 2).to(draws), (turn == 1).to(draws) - (turn == 3).to(draws)
    across = torch.stack([width * cos * flip, -width * sin, x], dim=1)
    down = torch.stack([height * sin * flip, height * cos, y], dim=1)
    grid = F.affine_grid(torch.stack([across, down], dim=1), [len(draws), 3, crops.px, crops.px], align_corners=False)
    # the crops of a patch below each other are one picture that is sampled from it
    grid = grid.unflatten(0, uniform.shape[:2]).flatten(1, 2)
    found = F.grid_sample(patches, grid.to(patches), mode="bilinear", padding_mode="border", align_corners=False)
    return found.unflatten(2, (crops.number, crops.px)).transpose(1, 2).contiguous()


def jitter_stains(images: Tensor, strength: float, uniform: Tensor) -> Tensor:
    """Change how much hematoxylin, eosin and residual colour each image holds.

    Colours are taken apart into stains by Ruifrok and Johnston's matrix, each stain of each image is scaled by 1 + a
    and raised by b, a and b uniform, and colours are put together again, as in [1]_.

    Parameters
    ----------
    images
        (B, n, 3, H, W) in [0, 1].
    strength
        Largest a; b is at most a tenth of it, in units of optical density. 0 changes nothing but pure black.
    uniform
        (B, n, STAIN_DRAWS) in [0, 1).

    Returns
    -------
    Tensor
        As `images`, in [0, 1].

    References
    ----------
    .. [1] Tellez et al., "Whole-Slide Mitosis Detection in H&E Breast Histology Using PHH3 as a Reference to Train
       Distilled Stain-Invariant Convolutional Networks", IEEE Transactions on Medical Imaging 37, 2018.
    """
    scale, shift = ((2 * uniform - 1) * strength).unflatten(2, (2, 3)).unbind(2)
    unmix = torch.from_numpy(hed_from_rgb).to(uniform)
    mix = torch.linalg.inv(unmix)
    # (density @ unmix) * (1 + a) + b, then @ mix: one small matrix and one shift for each image
    matrix = (unmix * (1 + scale[:, :, None])) @ mix
    shift = (_SHIFT_SHARE * shift) @ mix
    density = torch.einsum("bnchw,bncd->bndhw", -torch.log(images.clamp_min(1 / 255)), matrix.to(images))
    return torch.exp(-(density + shift.to(images)[..., None, None])).clamp(0, 1)
