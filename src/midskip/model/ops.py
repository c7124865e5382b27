"""Operations with their backward pass written out, because torch composes them from many passes over memory.

Under torch.compile they are composed after all: the compiler makes few passes of that by itself, forward and backward,
and together with what stands around. Without gradients only the forward is called: for a few rows, as in decoding,
autograd's bookkeeping would cost as much as the work.

N packed tokens, D width, H heads, K head width.
"""

from typing import Any

import torch
from torch import Tensor


class _ScaledNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_D: Tensor, eps: float, gate_N: Tensor | None, residual_ND: Tensor | None
    ) -> Tensor:
        out_ND, inverse_N = _norm(x_ND, weight_D, eps, gate_N, residual_ND)
        ctx.save_for_backward(x_ND, weight_D, inverse_N, gate_N)
        ctx.has_residual = residual_ND is not None
        return out_ND

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_ND, weight_D, inverse_N, gate_N = ctx.saved_tensors
        wide = inverse_N.dtype
        grad_wide_ND, x_wide_ND, weight_wide_D = grad_ND.to(wide), x_ND.to(wide), weight_D.to(wide)
        scale_N = inverse_N if gate_N is None else inverse_N * gate_N
        product_ND = grad_wide_ND * x_wide_ND
        grad_weight_D = torch.mv(product_ND.T, scale_N).to(weight_D.dtype)
        along_N = torch.mv(product_ND, weight_wide_D)  # the gradient of each row's scale
        grad_x_ND = torch.mul(grad_wide_ND, weight_wide_D, out=product_ND).mul_(scale_N[:, None])
        pull_N = along_N * scale_N * inverse_N.square() / x_ND.shape[-1]
        grad_x_ND.addcmul_(x_wide_ND, pull_N[:, None], value=-1)
        grad_gate_N = None if gate_N is None else (along_N * inverse_N).to(gate_N.dtype)
        return grad_x_ND.to(x_ND.dtype), grad_weight_D, None, grad_gate_N, grad_ND if ctx.has_residual else None


def _norm(
    x_ND: Tensor, weight_D: Tensor, eps: float, gate_N: Tensor | None, residual_ND: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What `scaled_norm` gives, and the inverse root mean square of each row."""
    # no operation mixes dtypes: that is several times slower on CPU
    wide_ND = x_ND.to(torch.promote_types(x_ND.dtype, torch.float32))
    norm_N = torch.linalg.vector_norm(wide_ND, dim=-1)
    inverse_N = norm_N.square_().div_(x_ND.shape[-1]).add_(eps).rsqrt_()
    scale_N1 = (inverse_N if gate_N is None else inverse_N * gate_N)[:, None]
    out_ND = x_ND * scale_N1 if wide_ND is x_ND else wide_ND.mul_(scale_N1).to(x_ND.dtype)
    if residual_ND is None:
        return out_ND.mul_(weight_D), inverse_N
    return torch.addcmul(residual_ND, out_ND.to(residual_ND.dtype), weight_D.to(residual_ND.dtype)), inverse_N


def scaled_norm(
    x_ND: Tensor, weight_D: Tensor, eps: float, gate_N: Tensor | None = None, residual_ND: Tensor | None = None
) -> Tensor:
    """residual + gate * x / sqrt(mean(x^2) + eps) * weight, worked out in float32 or wider.

    Args:
        x_ND: what is normalised over D.
        gate_N: float32 [N], a factor of each row; None means 1.
        residual_ND: what is added, and whose dtype the result has; None means nothing, and the dtype of x.
    """
    if torch.compiler.is_compiling():
        wide_ND = x_ND.to(torch.promote_types(x_ND.dtype, torch.float32))
        out_ND = wide_ND * (wide_ND.square().mean(-1, keepdim=True) + eps).rsqrt() * weight_D
        out_ND = out_ND if gate_N is None else out_ND * gate_N[:, None]
        return out_ND.to(x_ND.dtype) if residual_ND is None else (residual_ND + out_ND).to(residual_ND.dtype)
    if not torch.is_grad_enabled():
        return _norm(x_ND, weight_D, eps, gate_N, residual_ND)[0]
    return _ScaledNorm.apply(x_ND, weight_D, eps, gate_N, residual_ND)  # pyright: ignore[reportReturnType]


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NHK: Tensor, cos: Tensor, sin: Tensor, feature_N: Tensor | None) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.has_feature = feature_N is not None
        return _turn(x_NHK, cos, sin, feature_N)

    @staticmethod
    def backward(ctx: Any, grad_NHK: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        cos, sin = ctx.saved_tensors
        grad_feature_N = None
        if ctx.has_feature:
            grad_NHK, grad_feature_NH1 = grad_NHK.split((grad_NHK.shape[-1] - 1, 1), -1)
            grad_feature_N = grad_feature_NH1.sum((1, 2)) if ctx.needs_input_grad[3] else None
        return _turn(grad_NHK, cos, -sin), None, None, grad_feature_N


def rotate(x_NHK: Tensor, rotary: tuple[Tensor, Tensor] | None, feature_N: Tensor | None = None) -> Tensor:
    """Turn the feature pairs (i, i + K/2) of every head by the angles of `rotary`: cosines [N, 1, K] (one for
    each feature) and sines [N, 1, K/2] (one for each pair); None turns nothing.

    Returns:
        [N, H, K], or [N, H, K + 1] with `feature_N` (of x's dtype) appended to each head of its row.
    """
    if rotary is None:
        return x_NHK if feature_N is None else torch.cat([x_NHK, _as_feature(feature_N, x_NHK)], -1)
    if torch.compiler.is_compiling():
        cos, sin = (part.to(x_NHK.dtype) for part in rotary)
        (first, second), (cos_first, cos_second) = x_NHK.chunk(2, -1), cos.chunk(2, -1)
        turned = [first * cos_first - second * sin, second * cos_second + first * sin]
        feature = [] if feature_N is None else [_as_feature(feature_N, x_NHK)]
        return torch.cat(turned + feature, -1)
    if not torch.is_grad_enabled():
        return _turn(x_NHK, *rotary, feature_N)
    return _Rotate.apply(x_NHK, *rotary, feature_N)  # pyright: ignore[reportReturnType]


def _as_feature(feature_N: Tensor, x_NHK: Tensor) -> Tensor:
    return feature_N[:, None, None].expand(-1, x_NHK.shape[1], 1)


def _turn(x_NHK: Tensor, cos: Tensor, sin: Tensor, feature_N: Tensor | None = None) -> Tensor:
    cos, sin = cos.to(x_NHK.dtype), sin.to(x_NHK.dtype)
    num_rows, num_heads, width = x_NHK.shape
    out_NHK = x_NHK.new_empty(num_rows, num_heads, width + (feature_N is not None))
    if feature_N is not None:
        out_NHK[..., width:] = feature_N[:, None, None]
    first, second = x_NHK.chunk(2, -1)
    torch.mul(x_NHK, cos, out=out_NHK[..., :width])
    out_NHK[..., : width // 2].addcmul_(second, sin, value=-1)
    out_NHK[..., width // 2 : width].addcmul_(first, sin)
    return out_NHK
