"""Networks of published encoders that are not timm models."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import timm
import torch
from timm.layers import resample_abs_pos_embed, to_2tuple
from torch import Tensor, nn
from torch.nn import functional as F

from hinge.utils.errors import ConfigError


class AttentionPooledViT(nn.Module):
    """The image encoder of CONCH: a ViT whose tokens are pooled by one learned query (Lu et al., Nat. Med. 2024).

    Parameters
    ----------
    trunk
        A timm ViT.
    dim
        Width of query and output.
    pool
        The pooling attention, `MultiheadPool` (CONCH) or `PlainPool` (CONCH v1.5).
    resize_positions
        Function that resizes the position embeddings (1, 1 + g², D) of the checkpoint to a grid of another side.
    arguments
        Further arguments of the ViT.
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
    """The patch embedding of CTransPath: several convolutions (Wang et al., Med. Image Anal. 2022)."""

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
    """The class token of a ViT, optionally followed by the mean of its patch tokens."""

    def __init__(self, vit: nn.Module, pooling: Literal["cls", "cls+mean"]) -> None:
        super().__init__()
        self.vit, self.pooling = vit, pooling

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) to features (B, d)."""
        tokens = self.vit.forward_features(x)
        if self.pooling == "cls":
            return tokens[:, 0]
        return torch.cat([tokens[:, 0], tokens[:, self.vit.num_prefix_tokens :].mean(dim=1)], dim=1)


class PooledStages(nn.Module):
    """The mean of every stage of a CNN, or of the patch tokens of every block of a ViT, concatenated.

    Early stages describe texture and colour, which the last layer of a network trained on photographs discards.

    Parameters
    ----------
    network
        A timm network whose stages are reachable: one with `forward_intermediates` (ViT, Swin, ResNet, ConvNeXt, ...),
        or one whose `blocks` are stages (EfficientNet, MobileNet).

    Raises
    ------
    ConfigError
        The network has neither.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        blocks = getattr(network, "blocks", None)
        # timm's forward_intermediates leaves out the stages of these networks that keep the resolution
        self._in_blocks = isinstance(blocks, nn.Sequential) and all(isinstance(b, nn.Sequential) for b in blocks)
        if not self._in_blocks and not hasattr(network, "forward_intermediates"):
            raise ConfigError(f"the stages of a {type(network).__name__} cannot be read: use its own pooling")

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) to features (B, d), d the sum of the stages' channels."""
        return torch.cat([stage.mean(dim=(2, 3)) for stage in self._stages(x)], dim=1)

    def _stages(self, x: Tensor) -> list[Tensor]:
        """Return the output of every stage, (B, C, h, w) each."""
        if not self._in_blocks:
            return self.network.forward_intermediates(x, output_fmt="NCHW", intermediates_only=True)
        found: list[Tensor] = []
        hooks = [stage.register_forward_hook(lambda *call: found.append(call[2])) for stage in self.network.blocks]
        try:
            self.network.forward_features(x)
        finally:
            for hook in hooks:
                hook.remove()
        return found


def _bilinear_positions(positions: Tensor, side: int) -> Tensor:
    """Resize position embeddings as CONCH does."""
    return resample_abs_pos_embed(positions, [side, side], interpolation="bilinear", antialias=False)


def _enlarged_positions(positions: Tensor, side: int) -> Tensor:
    """Resize position embeddings as CONCH v1.5 does: stored for 224 px, enlarged as in iBOT for a larger image."""
    stored = 14
    if positions.shape[1] != 1 + stored**2:
        positions = _bilinear_positions(positions, stored)
    if side == stored:
        return positions
    first, grid = positions[:, :1], positions[:, 1:].unflatten(1, (stored, stored)).permute(0, 3, 1, 2)
    # the published code adds 0.1 to the side against rounding, which shifts the result
    grid = F.interpolate(grid, scale_factor=(side + 0.1) / stored, mode="bicubic")
    return torch.cat([first, grid.flatten(2).transpose(1, 2)], dim=1)


TOWERS = {
    "conch": partial(AttentionPooledViT, "vit_base_patch16_224", 512, MultiheadPool, _bilinear_positions),
    "conch-v1.5": partial(AttentionPooledViT, "vit_large_patch16_224", 768, PlainPool, _enlarged_positions),
    "ctranspath": partial(timm.create_model, "swin_tiny_patch4_window7_224", num_classes=0, embed_layer=ConvStem),
}
