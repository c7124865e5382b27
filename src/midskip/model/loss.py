"""Losses of packed logits, a few rows at a time: no float32 copy of all logits is made.

B sequences, T columns, N tokens, R of them at a time, V vocabulary.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_LOGITS, CHUNK_LOGITS_GPU = 2**22, 2**27  # that are worked on at a time; a GPU is full with so many
IGNORED = -100  # the target of a token that is not scored


def next_targets(labels_BT: Tensor, valid_BT: Tensor) -> Tensor:
    """int64 [B, T]: the label of the next column, which each token has to predict; `IGNORED` where it or that token is
    a pad, and in the last column.

    Args:
        labels_BT: int64.
        valid_BT: bool, False for pads.
    """
    next_BT = F.pad(torch.where(valid_BT, labels_BT, IGNORED)[:, 1:], (0, 1), value=IGNORED)
    return torch.where(valid_BT, next_BT, IGNORED)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, target_N: Tensor, overwrite: bool, backend: str | None) -> Tensor:
        ctx.save_for_backward(logits_NV, target_N)
        ctx.overwrite, ctx.backend, ctx.is_spent = overwrite, backend, False
        return _nats(logits_NV.detach(), target_N, backend)

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
        logits_NV = logits_NV.detach()
        for rows in _chunks(logits_NV):
            out_NV[rows] = _call(_slope, ctx.backend, logits_NV[rows], target_N[rows], scale_N[rows])
        return out_NV, None, None, None


def cross_entropy(logits_NV: Tensor, target_N: Tensor, overwrite: bool = False, backend: str | None = None) -> Tensor:
    """Cross-entropy of each row in nats, float32 or wider [N]; 0 where the target is `IGNORED`.

    Args:
        target_N: int64 [N].
        overwrite: let the backward pass write the gradient of the logits into their memory; only where nobody else
            reads them. A second backward pass is then refused.
        backend: of torch.compile, which makes one pass over memory of each direction; None: not compiled.
    """
    if not (torch.is_grad_enabled() and logits_NV.requires_grad):
        return _nats(logits_NV, target_N, backend)
    return _CrossEntropy.apply(logits_NV, target_N, overwrite, backend)  # pyright: ignore[reportReturnType]


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, target_NV: Tensor) -> Tensor:
        ctx.save_for_backward(logits_NV, target_NV)
        wide = torch.promote_types(logits_NV.dtype, torch.float32)
        nats = []
        for rows in _chunks(logits_NV):
            log_target_RV = target_NV[rows].log_softmax(1, dtype=wide)
            log_RV = logits_NV[rows].log_softmax(1, dtype=wide)
            nats.append((log_target_RV.exp() * (log_target_RV - log_RV)).sum(1))
        return torch.cat(nats) if nats else logits_NV.new_zeros(0, dtype=wide)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits_NV, target_NV = ctx.saved_tensors
        out_NV = torch.empty_like(logits_NV)
        for rows in _chunks(logits_NV):
            slope_RV = logits_NV[rows].softmax(1, dtype=grad_N.dtype) - target_NV[rows].softmax(1, dtype=grad_N.dtype)
            out_NV[rows] = slope_RV * grad_N[rows, None]
        return out_NV, None


def divergence(logits_NV: Tensor, target_NV: Tensor) -> Tensor:
    """KL(target || model) of each row in nats, float32 or wider [N], from logits of both; the target gets no
    gradient."""
    return _Divergence.apply(logits_NV, target_NV.detach())  # pyright: ignore[reportReturnType]


def _nats(logits_NV: Tensor, target_N: Tensor, backend: str | None) -> Tensor:
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    nats = [_call(_rows_nats, backend, logits_NV[rows], target_N[rows], wide) for rows in _chunks(logits_NV)]
    return torch.cat(nats) if nats else logits_NV.new_zeros(0, dtype=wide)


def _rows_nats(logits_RV: Tensor, target_R: Tensor, wide: torch.dtype) -> Tensor:
    if torch.compiler.is_compiling():  # no gather from what was widened, so that nobody need write it
        sum_R = logits_RV.to(wide).logsumexp(1)
        own_R = logits_RV.gather(1, target_R.clamp(min=0)[:, None]).squeeze(1).to(wide)
        return torch.where(target_R == IGNORED, 0, sum_R - own_R)
    return F.nll_loss(logits_RV.log_softmax(1, dtype=wide), target_R, ignore_index=IGNORED, reduction="none")


def _slope(logits_RV: Tensor, target_R: Tensor, scale_R: Tensor) -> Tensor:
    """Gradient of the logits: (softmax - 1 at the target) * scale."""
    slope_RV, target_R1 = logits_RV.softmax(1, dtype=scale_R.dtype), target_R.clamp(min=0)[:, None]
    if torch.compiler.is_compiling():
        is_target_RV = torch.arange(logits_RV.shape[1], device=logits_RV.device) == target_R1
        return ((slope_RV - is_target_RV.to(slope_RV.dtype)) * scale_R[:, None]).to(logits_RV.dtype)
    slope_RV.scatter_add_(1, target_R1, slope_RV.new_full((), -1).expand_as(target_R1))
    return slope_RV.mul_(scale_R[:, None])


def _call(function: Callable[..., Tensor], backend: str | None, logits_RV: Tensor, *given: Any) -> Tensor:
    if backend is not None and logits_RV.shape[0] > 1:  # 0 and 1 would each be compiled apart, for nothing
        function = _compiled(function, backend)
    return function(logits_RV, *given)


@cache
def _compiled(function: Callable[..., Tensor], backend: str) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=True, backend=backend)


def _chunks(logits_NV: Tensor) -> Iterator[slice]:
    size = CHUNK_LOGITS_GPU if logits_NV.is_cuda else CHUNK_LOGITS
    num_rows = max(1, size // logits_NV.shape[1])
    return (slice(start, start + num_rows) for start in range(0, logits_NV.shape[0], num_rows))
