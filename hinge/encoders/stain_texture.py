"""An encoder without weights: 51 statistics of colour, stain and texture of a patch.

It needs no download and a few milliseconds per patch, and is a baseline for foundation models. All statistics are
invariant to flips and to rotations by 90°.
"""

from collections.abc import Callable
from functools import reduce

import torch
from skimage.color import hed_from_rgb
from torch import Tensor, nn
from torch.nn import functional as F

VERSION = 1
"""Part of the digest: features of different versions do not mix."""

PATCH_PX = 112
"""Side of the patches in pixels: 224 px was not better and four times slower."""

STEPS = (1, 2, 4)
"""Distances in pixels at which neighbours are compared."""

WINDOWS = (3, 7)
"""Sides in pixels of the squares in which the direction of edges is compared."""

PEAK_WINDOWS = (5, 9)
"""Sides in pixels of the square in which a nucleus is the darkest place."""

DIM = 2 * 12 + 4 * len(STEPS) + 3 * (len(WINDOWS) + 1) + 3 * len(PEAK_WINDOWS)

_TINY = 1e-6


class StainTexture(nn.Module):
    """Colour, stain and texture statistics of patches.

    With x the patch's R, G, B in [0, 1], stains are hematoxylin, eosin and DAB from the optical density
    -log(x) by the colour deconvolution of Ruifrok and Johnston (Anal. Quant. Cytol. Histol. 23, 2001;
    scikit-image's matrix), and "the three planes" are grey (mean of R, G, B), hematoxylin and eosin:

    - mean and deviation of R, G, B and of the three stains (12);
    - mean and deviation of the red and green shares of R + G + B and of the saturation (6);
    - mean and deviation of the edge strength (Sobel) of the three planes (6);
    - of grey and hematoxylin in 16 levels, with d the difference of two pixels at each of three distances:
      the means of d² and of 1 / (1 + d²), contrast and homogeneity of the grey-level co-occurrence matrix
      (Haralick et al., IEEE Trans. SMC 3, 1973) (12);
    - of the three planes, in two window sizes and over the whole patch: how far edges agree in direction (the
      coherence of the structure tensor, 0...1) (9);
    - of the local maxima of hematoxylin in two window sizes, which are mostly nuclei: their number per pixel,
      their height, and how far they rise above their surroundings (6).
    """

    def __init__(self) -> None:
        super().__init__()
        stains = torch.from_numpy(hed_from_rgb).to(torch.float32)
        self.register_buffer("_stains", stains, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """R, G, B in [0, 1], float (B, 3, H, W), to statistics, float32 (B, 51)."""
        # differences of nearly equal numbers lose their precision in bfloat16
        with torch.autocast(x.device.type, enabled=False):
            # a few patches at a time, so that the planes stay in the processor's cache
            return torch.cat([self._statistics(part) for part in x.to(torch.float32).split(8)])

    def _statistics(self, x: Tensor) -> Tensor:
        density = -torch.log(x.clamp_min(1 / 255))
        stains = torch.einsum("bchw,cd->bdhw", density, self._stains)
        hematoxylin = stains[:, :1]
        grey = x.mean(dim=1, keepdim=True)
        planes = torch.cat([grey, stains[:, :2]], dim=1)
        shares = x[:, :2] / x.sum(dim=1, keepdim=True).clamp_min(1e-3)
        brightest = x.amax(dim=1, keepdim=True)
        saturation = (brightest - x.amin(dim=1, keepdim=True)) / brightest.clamp_min(1e-3)
        down, across = _slopes(planes)
        return torch.cat(
            [
                _moments(x),
                _moments(stains),
                _moments(shares),
                _moments(saturation),
                _moments(torch.sqrt(down**2 + across**2)),
                _neighbour_differences((grey - 0.2) / 0.8),
                _neighbour_differences(hematoxylin / 3.0),
                _coherence(down, across),
                _peaks(hematoxylin),
            ],
            dim=1,
        )


def _slopes(planes: Tensor) -> tuple[Tensor, Tensor]:
    """Sobel's slopes down and across, each (B, C, H, W)."""
    padded = F.pad(planes, (1, 1, 1, 1), mode="replicate")
    smooth_rows = padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]
    smooth_columns = padded[..., :-2, :] + 2 * padded[..., 1:-1, :] + padded[..., 2:, :]
    down = smooth_rows[..., 2:, :] - smooth_rows[..., :-2, :]
    across = smooth_columns[..., 2:] - smooth_columns[..., :-2]
    return down / 8, across / 8


def _moments(planes: Tensor) -> Tensor:
    """Mean and deviation of each plane, (B, C, H, W) to (B, 2C)."""
    values = planes.flatten(2)
    return torch.cat([values.mean(dim=-1), values.std(dim=-1)], dim=1)


def _neighbour_differences(plane: Tensor) -> Tensor:
    """Contrast and homogeneity at each of STEPS, (B, 1, H, W) in about [0, 1] to (B, 6)."""
    levels = (plane * 16).clamp(0, 15.99).floor()
    found = []
    for step in STEPS:
        across = (levels[..., step:] - levels[..., :-step]) ** 2
        down = (levels[..., step:, :] - levels[..., :-step, :]) ** 2
        found.append(sum(d.flatten(1).mean(dim=1) for d in (across, down)) / 2)
        found.append(sum((1 / (1 + d)).flatten(1).mean(dim=1) for d in (across, down)) / 2)
    return torch.stack(found, dim=1)


def _in_windows(planes: Tensor, side: int, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Combine the square of odd side around each pixel, (B, C, H, W); beyond the patch its border goes on."""
    # rows, then columns, as whole shifted planes: many times faster than torch's pooling
    height, width = planes.shape[-2:]
    padded = F.pad(planes, (side // 2,) * 4, mode="replicate")
    rows = reduce(combine, (padded[..., k : k + width] for k in range(side)))
    return reduce(combine, (rows[..., k : k + height, :] for k in range(side)))


def _local_mean(planes: Tensor, side: int) -> Tensor:
    return _in_windows(planes, side, torch.add) / side**2


def _coherence(down: Tensor, across: Tensor) -> Tensor:
    """Agreement of edge directions in each of WINDOWS and overall, slopes (B, C, H, W) to (B, 3C)."""
    products = (across**2, down**2, across * down)

    def agreement(xx: Tensor, yy: Tensor, xy: Tensor) -> Tensor:
        return torch.sqrt((xx - yy) ** 2 + 4 * xy**2) / (xx + yy + _TINY)

    local = [agreement(*(_local_mean(p, side) for p in products)).mean(dim=(2, 3)) for side in WINDOWS]
    return torch.cat([*local, agreement(*(p.mean(dim=(2, 3)) for p in products))], dim=1)


def _peaks(hematoxylin: Tensor) -> Tensor:
    """Number, height and prominence of local maxima in each of PEAK_WINDOWS, (B, 1, H, W) to (B, 6)."""
    smooth, surroundings = _local_mean(hematoxylin, 3), _local_mean(hematoxylin, 15)
    # rounding of a constant plane must not count as peaks
    dark = smooth > smooth.mean(dim=(2, 3), keepdim=True) + 1e-3
    found = []
    for side in PEAK_WINDOWS:
        peaks = (smooth == _in_windows(smooth, side, torch.maximum)) & dark
        number = peaks.sum(dim=(1, 2, 3))
        found.append(number / smooth[0].numel())
        for height in (smooth, smooth - surroundings):
            found.append((height * peaks).sum(dim=(1, 2, 3)) / number.clamp_min(1))
    return torch.stack(found, dim=1)
