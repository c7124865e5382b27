"""What a token that skips a layer gets instead: a map with few FLOPs.

N packed tokens, D width, R rank.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from midskip.model.packing import PackedBatch


class SkipPath(nn.Module):
    """h + rms(h) f(h / rms(h)), where the layer would have given h + branch(h). It starts at f = 0.

    Args:
        width: D.
        kind: of f. `"linear"`: A z + b, with A [D, D]. `"low_rank"`: U V z + b, with U [D, R] and V [R, D].
            `"adapter"`: U silu(V z) + b.
        rank: R; None for `"linear"`.
        eps: added to the mean square.
    """

    def __init__(self, width: int, kind: str, rank: int | None, eps: float):
        super().__init__()
        self.width, self.kind, self.eps = width, kind, eps
        self.down = None if rank is None else nn.Parameter(torch.empty(rank, width))
        self.weight = nn.Parameter(torch.empty(width, rank or width))
        self.bias = nn.Parameter(torch.empty(width))

    def reset_parameters(self, init: Any = nn.init) -> None:
        if self.down is not None:
            init.normal_(self.down, std=self.width**-0.5)
        init.zeros_(self.weight)
        init.zeros_(self.bias)

    def forward(self, h_ND: Tensor) -> Tensor:
        """[N, D], what is added to `h_ND`."""
        z_ND, rms_N1 = normalized(h_ND, self.eps)
        if self.down is not None:
            z_ND = F.linear(z_ND, self.down)
            z_ND = F.silu(z_ND) if self.kind == "adapter" else z_ND
        return rms_N1 * F.linear(z_ND, self.weight, self.bias)

    @property
    def flops(self) -> int:
        """Of the matrix products, for one token."""
        return 2 * (self.weight.numel() + (0 if self.down is None else self.down.numel()))


def take_path(
    path: nn.Module, before_ND: Tensor, after_ND: Tensor, batch: PackedBatch, keep_N: Tensor | None,
    gate_N: Tensor | None, taking_N: Tensor | None, runs_on_no_rows: bool,
) -> Tensor:  # fmt: skip
    """Add what a layer's skip path gives to the tokens that take it.

    Args:
        path: a `SkipPath`.
        before_ND, after_ND: hidden states before and after the layer.
        keep_N, gate_N, taking_N: the `keep_N`, `output_gate_N` and `skip_path_N` of the `Decision`.
        runs_on_no_rows: whether the path is to be called if no token takes it.
    """
    dtype = after_ND.dtype
    if taking_N is None and gate_N is not None:  # all of them, more or less
        rest_N = 1 - gate_N if keep_N is None else torch.where(keep_N, 1 - gate_N, 1)
        return torch.addcmul(after_ND, rest_N.to(dtype)[:, None], path(before_ND).to(dtype))
    if taking_N is not None:
        indices_M = batch.keep(taking_N).indices_N
        if indices_M is None:
            return after_ND + path(before_ND).to(dtype)
    else:
        skipped_N = torch.zeros_like(batch.column_N, dtype=torch.bool) if keep_N is None else ~keep_N
        num_skipped = batch.num_tokens - batch.keep(keep_N).num_tokens
        indices_M = torch.nonzero_static(skipped_N, size=num_skipped).squeeze(1)
    if not (len(indices_M) or runs_on_no_rows):
        return after_ND
    return after_ND.index_add(0, indices_M, path(before_ND.index_select(0, indices_M)).to(dtype))


def normalized(h_ND: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """h / rms(h) [N, D], and rms(h) [N, 1], worked out in float32 or wider, of the dtype of `h_ND`."""
    wide_ND = h_ND.to(torch.promote_types(h_ND.dtype, torch.float32))
    rms_N1 = (wide_ND.square().mean(1, keepdim=True) + eps).sqrt()
    return (wide_ND / rms_N1).to(h_ND.dtype), rms_N1.to(h_ND.dtype)
