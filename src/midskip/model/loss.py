"""The cross-entropy of packed logits, a few rows at a time: no float32 copy of all logits is made.

N tokens, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_LOGITS = 2**22  # logits that are worked on at a time
IGNORED = -100  # the target of a token that is not scored


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, target_N: Tensor, overwrite: bool) -> Tensor:
        ctx.save_for_backward(logits_NV, target_N)
        ctx.overwrite, ctx.is_spent = overwrite, False
        return _nats(logits_NV, target_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.is_spent:
            raise RuntimeError(
                "a second backward pass of one forward pass: run the model with output_logits=True for it"
            )
        logits_NV, target_N = ctx.saved_tensors
        ctx.is_spent = ctx.overwrite
        out_NV = logits_NV.detach() if ctx.overwrite else torch.empty_like(logits_NV)
        scale_N = torch.where(target_N == IGNORED, 0, grad_N)
        for rows in _chunks(logits_NV):
            slope = logits_NV[rows].to(grad_N.dtype).softmax(1)
            target = target_N[rows].clamp(min=0)[:, None]
            slope.scatter_add_(1, target, slope.new_full((), -1).expand_as(target))
            out_NV[rows] = slope.mul_(scale_N[rows, None])
        return out_NV, None, None


def cross_entropy(logits_NV: Tensor, target_N: Tensor, overwrite: bool = False) -> Tensor:
    """Cross-entropy of each row in nats, float32 or wider [N]; 0 where the target is `IGNORED`.

    Args:
        target_N: int64 [N].
        overwrite: let the backward pass write the gradient of the logits into their memory; only where nobody else
            reads them. A second backward pass is then refused.
    """
    if not (torch.is_grad_enabled() and logits_NV.requires_grad):
        return _nats(logits_NV, target_N)
    return _CrossEntropy.apply(logits_NV, target_N, overwrite)  # pyright: ignore[reportReturnType]


def _nats(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    nats = [
        F.cross_entropy(logits_NV[rows].to(wide), target_N[rows], ignore_index=IGNORED, reduction="none")
        for rows in _chunks(logits_NV)
    ]
    return torch.cat(nats) if nats else logits_NV.new_zeros(0, dtype=wide)


def _chunks(logits_NV: Tensor) -> Iterator[slice]:
    num_rows = max(1, CHUNK_LOGITS // logits_NV.shape[1])
    return (slice(start, start + num_rows) for start in range(0, logits_NV.shape[0], num_rows))
