"""A modulated layer of a frozen backbone with few passes over memory, forward and backward.

The elementwise operations on (B, N, D) tensors between the matrix products cost more than the products on a CPU and in
bfloat16. Each group of them is one autograd function here. It computes no gradient of frozen weights, recomputes cheap
values instead of storing them, changes the memory layout of heads within an operation, and omits factors that the
following norm removes. Results equal those of the plain layer up to rounding.
"""

from collections.abc import Callable
from functools import wraps

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from hinge.backbones.cellfm_layers import GatedLinearUnit, Retention

_RMS_FLOOR = 1e-12

# η below 2⁻¹³: what the norm adds is less than a sixteenth of the rounding of bfloat16, and inference leaves it out
_NEGLIGIBLE_MIX = -9.0


def _as_given(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return `forward` without autocast, which on GPUs computes norms in float32 whatever the inputs are."""

    @wraps(forward)
    def function(ctx, x: Tensor, *arguments):
        with torch.autocast(x.device.type, enabled=False):
            return forward(ctx, x, *arguments)

    return function


class _Modulate(Function):
    """shift + (1 + scale)·((1 − η)h + η·LayerNorm(h)), η = sigmoid(mix)."""

    @staticmethod
    @_as_given
    def forward(ctx, h: Tensor, shift: Tensor, scale: Tensor, mix: Tensor, eps: float) -> Tensor:
        eta = mix.sigmoid()
        normed, mean, rstd = torch.native_layer_norm(h, h.shape[-1:], None, None, eps)
        opened = 1 + scale
        ctx.save_for_backward(h, mean, rstd, opened, eta)
        ctx.eps = eps
        mixed = normed.lerp_(h, (1 - eta).to(h.dtype))
        return torch.addcmul(shift, mixed, opened, out=mixed)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        h, mean, rstd, opened, eta = ctx.saved_tensors
        width = h.shape[-1:]
        normed = torch.native_layer_norm(h, width, None, None, ctx.eps)[0]
        inner = grad * opened
        # dη = Σ inner · (normed − h), then through the sigmoid; one sum in float32, because the difference of two sums
        # that are rounded to bfloat16 has no significant digit
        grad_eta = (normed - h).mul_(inner).sum(dtype=_accurate(h))
        grad_mix = eta * (1 - eta) * grad_eta
        mixed = normed.lerp_(h, (1 - eta).to(h.dtype))
        grad_shift = grad.sum(dim=1, keepdim=True)
        grad_scale = mixed.mul_(grad).sum(dim=1, keepdim=True)
        through = torch.ops.aten.native_layer_norm_backward(
            inner, h, width, mean, rstd, None, None, [True, False, False]
        )[0]
        grad_h = inner.lerp_(through, eta.to(h.dtype))
        return grad_h, grad_shift, grad_scale, grad_mix, None


class _Retain(Function):
    """Gated, head-wise normalised Q(KᵀV) from the joint projection (B, N, 4D); see `Retention`."""

    @staticmethod
    def _heads(qkvu: Tensor, key_mask: Tensor | None, num_heads: int) -> tuple[Tensor, Tensor]:
        """Return ReLU of queries and masked keys (2, B, H, N, d), and values (B, H, N, d)."""
        apart = _apart(qkvu, num_heads)
        pair = torch.empty(apart[:2].shape, dtype=qkvu.dtype, device=qkvu.device)
        torch.clamp_min(apart[:2], 0, out=pair)
        if key_mask is not None:
            pair[1].mul_(_wide(key_mask[:, None, :, None], pair[1]))
        return pair, apart[2].contiguous()

    @staticmethod
    @_as_given
    def forward(ctx, qkvu: Tensor, key_mask: Tensor | None, num_heads: int, floor: Tensor | float) -> Tensor:
        batch, tokens, width = qkvu.shape
        width //= 4
        pair, value = _Retain._heads(qkvu, key_mask, num_heads)
        summary = pair[1].transpose(-2, -1) @ value
        mixed = pair[0] @ summary
        inverse = _normalise(mixed, floor)
        ctx.save_for_backward(qkvu, key_mask, summary, mixed, inverse)
        ctx.num_heads = num_heads
        # contiguous, because the sigmoid is not vectorised on strided bfloat16
        out = F.silu(qkvu[..., 3 * width :].contiguous(), inplace=True)
        out.view(batch, tokens, num_heads, width // num_heads).mul_(mixed.transpose(1, 2))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        qkvu, key_mask, summary, mixed, inverse = ctx.saved_tensors
        batch, tokens, width = grad.shape
        heads = (batch, tokens, ctx.num_heads, width // ctx.num_heads)
        gate = qkvu[..., 3 * width :].contiguous()
        grad_all = torch.empty_like(qkvu)
        by_head = _apart(grad_all, ctx.num_heads)

        grad = grad.contiguous().view(heads)
        through_gate = (grad * mixed.transpose(1, 2)).view(batch, tokens, width)
        grad_all[..., 3 * width :].copy_(torch.ops.aten.silu_backward(through_gate, gate))
        grad_mixed = torch.empty_like(mixed)
        opened = F.silu(gate, inplace=True).view(heads)
        torch.mul(grad.transpose(1, 2), opened.transpose(1, 2), out=grad_mixed)
        # x / rms(x) does not depend on the length of x: remove the component along x
        along = (grad_mixed * mixed).mean(dim=-1, keepdim=True)
        grad_mixed.addcmul_(mixed, _wide(along, mixed), value=-1).mul_(_wide(inverse, mixed))

        pair, value = _Retain._heads(qkvu, key_mask, ctx.num_heads)
        query, key = pair
        grad_query = grad_mixed @ summary.transpose(-2, -1)
        torch.ops.aten.threshold_backward.grad_input(grad_query, query, 0, grad_input=by_head[0])
        grad_summary = query.transpose(-2, -1) @ grad_mixed
        # a masked key is 0, so this also stops the gradient of masked keys
        torch.ops.aten.threshold_backward.grad_input(
            value @ grad_summary.transpose(-2, -1), key, 0, grad_input=by_head[1]
        )
        by_head[2].copy_(key @ grad_summary)
        return grad_all, None, None, None


class _Join(Function):
    """LayerNorm(λh + gate·x) with frozen weights, computed as LayerNorm(h + gate/λ·x) with a smaller epsilon."""

    @staticmethod
    @_as_given
    def forward(ctx, h: Tensor, x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, scale: float, eps: float):
        gate = gate / scale
        total = torch.addcmul(h, x, gate)
        out, mean, rstd = torch.native_layer_norm(total, h.shape[-1:], weight, bias, eps / scale**2)
        ctx.save_for_backward(total, x, gate, mean, rstd, weight, bias)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        total, x, gate, mean, rstd, weight, bias = ctx.saved_tensors
        grad_h = torch.ops.aten.native_layer_norm_backward(
            grad.contiguous(), total, total.shape[-1:], mean, rstd, weight, bias, [True, False, False]
        )[0]
        grad_gate = (grad_h * x).sum(dim=1, keepdim=True) / ctx.scale
        return grad_h, grad_h * gate, grad_gate, None, None, None, None


class _Product(Function):
    """u ⊙ v of a joint tensor (B, N, 2D)."""

    @staticmethod
    @_as_given
    def forward(ctx, uv: Tensor) -> Tensor:
        ctx.save_for_backward(uv)
        u, v = uv.chunk(2, dim=-1)
        return u * v

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (uv,) = ctx.saved_tensors
        u, v = uv.chunk(2, dim=-1)
        both = torch.empty_like(uv)
        grad_u, grad_v = both.chunk(2, dim=-1)
        torch.mul(grad, v, out=grad_u)
        torch.mul(grad, u, out=grad_v)
        return both


def _normalise(mixed: Tensor, floor: Tensor | float) -> Tensor:
    """Divide heads (…, d) in place by their root mean square, and return what they were multiplied by."""
    length = torch.linalg.vector_norm(mixed, dim=-1, keepdim=True, dtype=_accurate(mixed))
    inverse = (mixed.shape[-1] ** 0.5 / length.clamp_min(floor)).to(mixed.dtype)
    mixed.mul_(_wide(inverse, mixed))
    return inverse


def _retain_first(layer: Retention, x: Tensor, key_mask: Tensor | None, floor: Tensor | float, first: int) -> Tensor:
    """Return the first tokens (B, first, D) of what `_Retain` makes of a layer's joint projection, without gradients.

    Heads stay side by side in the tokens: one product of all heads with all others replaces those of each head, and its
    blocks off the diagonal are set to zero.
    """
    heads, width = layer.num_heads, x.shape[-1] // layer.num_heads
    queries, keys, values, gates = layer.qkvu.weight.chunk(4)
    key = F.linear(x, keys).clamp_min_(0)
    if key_mask is not None:
        key.mul_(_wide(key_mask.unsqueeze(-1), key))
    summary = (key.transpose(-2, -1) @ F.linear(x, values)).unflatten(-1, (heads, width)).unflatten(1, (heads, width))
    own = torch.eye(heads, dtype=x.dtype, device=x.device).view(heads, 1, heads, 1)
    asked = x[:, :first].contiguous()
    mixed = F.linear(asked, queries).clamp_min_(0) @ (summary * own).flatten(-2).flatten(1, 2)
    by_head = mixed.unflatten(-1, (heads, width))
    _normalise(by_head, floor)
    return F.silu(F.linear(asked, gates), inplace=True).mul_(mixed)


def _apart(qkvu: Tensor, num_heads: int) -> Tensor:
    """Return a view (4, B, H, N, d) of (B, N, 4D)."""
    batch, tokens, width = qkvu.shape
    return qkvu.view(batch, tokens, 4, num_heads, width // (4 * num_heads)).permute(2, 0, 3, 1, 4)


def _wide(column: Tensor, like: Tensor) -> Tensor:
    """Return a column (…, 1) as wide as `like` where a product with a column is not vectorised: CPUs, bfloat16."""
    slow = like.device.type == "cpu" and like.dtype == torch.bfloat16
    return column.expand_as(like).contiguous() if slow else column


def _accurate(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def modulate(h: Tensor, shift: Tensor, scale: Tensor, mix: Tensor, eps: float) -> Tensor:
    """Return the modulated input of a sublayer: shift + (1 + scale)·((1 − η)h + η·LayerNorm(h)), η = sigmoid(mix).

    Parameters
    ----------
    h
        (B, N, D) tokens.
    shift, scale
        (B, 1, D).
    mix
        Scalar.
    eps
        Epsilon of the LayerNorm.
    """
    if not torch.is_grad_enabled() and h.device.type == "cpu" and float(mix) < _NEGLIGIBLE_MIX:
        # on a GPU the host would wait for the number
        return torch.addcmul(shift, h, 1 + scale)
    return _Modulate.apply(h, shift, scale, mix, eps)


def retention(
    layer: Retention, x: Tensor, key_mask: Tensor | None, value_scale: Tensor | float, first: int | None = None
) -> Tensor:
    """Return the first tokens (B, first, D) of `layer(x, key_mask, value_scale)`, where the key mask is 0 or 1.

    The norm over each head removes the scale factors of queries, keys and values, which are therefore omitted. With
    `first`, which is for inference, all tokens give keys and values, and only the first ones queries and gates.
    """
    head_width = x.shape[-1] // layer.num_heads
    if isinstance(value_scale, Tensor):  # stays on the device: reading it back would make the host wait in every layer
        value_scale = value_scale.min().to(_accurate(x))
    # lower bound of the plain layer's root mean square, for unscaled factors
    floor = _RMS_FLOOR * head_width**1.5 / value_scale
    mask = None if key_mask is None else key_mask.to(x.dtype)
    if first is not None:
        return layer.out(_retain_first(layer, x, mask, floor, first))
    return layer.out(_Retain.apply(layer.qkvu(x), mask, layer.num_heads, floor))


def feed_forward(layer: GatedLinearUnit, x: Tensor) -> Tensor:
    """Return `layer(x)`."""
    return layer.out(_Product.apply(layer.uv(x)))


def join(h: Tensor, x: Tensor, gate: Tensor, norm: torch.nn.LayerNorm, scale: float) -> Tensor:
    """Return LayerNorm(scale·h + gate ⊙ x) with the frozen weights of `norm`.

    h, x are (B, N, D), gate (B, 1, D).
    """
    return _Join.apply(h, x, gate, norm.weight, norm.bias, scale, norm.eps)
