"""What a policy decides about one layer.

N packed tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Decision:
    """Which tokens run a layer, and how much.

    Attributes:
        keep_N: bool [N], True where the token is present; None means all are.
        output_gate_N: float32 [N] in [0, 1], multiplies what the layer adds; None means 1. Read only where kept.
        key_gate_N: float32 [N], above 0 and up to 1, weighs the token's key; None means 1. Read only where kept,
            and only with `skipped_kv="drop"`.
        skip_path_N: bool [N], True for a token that takes the skip path of this layer, if the model has skip paths
            (`config.skip_path`); it must not be kept. None: each token takes it as far as it does not run the layer,
            that is, times 1 minus its output gate. A policy whose tokens stay away for several layers says here where
            they leave, and the path stands for all of those layers.
        readiness_N: float32 or wider [N], a hard gate's readiness to skip: in evaluation, without limits, a token is
            kept where it lies below 1. It decides nothing; `midskip bench` reads it, to tell a gate that rounding moved
            from one that is wrong.

    A policy that keeps the same tokens in two layers returns the same tensor `keep_N`, best the same `Decision`:
    what follows from it (rows, positions, angles) is then worked out once.
    """

    keep_N: Tensor | None = None
    output_gate_N: Tensor | None = None
    key_gate_N: Tensor | None = None
    skip_path_N: Tensor | None = None
    readiness_N: Tensor | None = None

    @classmethod
    def hard(
        cls, keep_N: Tensor, score_N: Tensor, skip_path_N: Tensor | None = None, readiness_N: Tensor | None = None
    ) -> Decision:
        """A hard gate: exactly 1 where a token is kept and 0 elsewhere, in training and evaluation alike.

        Its gradient is a surrogate, the straight-through one: in the backward pass the output gate of a token that is
        kept has the gradient of `score_N`. A token that is not kept gives none: nothing was computed that could tell
        what its gate is worth. Keys have no gate.

        Args:
            keep_N: bool [N].
            score_N: floating point, finite [N], what rises with the gate: the more, the sooner the token is kept.
            skip_path_N, readiness_N: as in `Decision`.
        """
        wide_N = score_N.to(torch.promote_types(score_N.dtype, torch.float32))
        gate_N = 1 + (wide_N - wide_N.detach()) if torch.is_grad_enabled() and wide_N.requires_grad else None
        return cls(keep_N, gate_N, None, skip_path_N, readiness_N)

    def leaving(self, keep_N: Tensor) -> Tensor:
        """bool [N]: who is kept here and not by `keep_N`, the decision about the next layer."""
        return ~keep_N if self.keep_N is None else self.keep_N & ~keep_N


def problem_of(decision: Any, num_tokens: int) -> str:
    """What is wrong with what `decide` gave about so many tokens; "" if nothing is. A GPU waits for it."""
    if not isinstance(decision, Decision):
        return f"decide returned {type(decision).__name__}; expected a Decision"
    for name in ("keep_N", "skip_path_N", "output_gate_N", "key_gate_N"):
        x_N, wants_bool = getattr(decision, name), name in ("keep_N", "skip_path_N")
        dtypes = (torch.bool,) if wants_bool else (torch.float32, torch.float64)
        if x_N is None or (isinstance(x_N, Tensor) and x_N.dtype in dtypes and x_N.shape == (num_tokens,)):
            continue
        form = f"{x_N.dtype} {list(x_N.shape)}" if isinstance(x_N, Tensor) else type(x_N).__name__
        return f"{name} is {form}; expected {'torch.bool' if wants_bool else 'torch.float32 or float64'} [{num_tokens}]"
    keep_N, path_N = decision.keep_N, decision.skip_path_N
    if path_N is not None and (path_N if keep_N is None else path_N & keep_N).any():
        return "skip_path_N is True for a token that is kept"
    for name in ("output_gate_N", "key_gate_N"):
        gate_N = getattr(decision, name)
        if gate_N is None:
            continue
        kept_N = gate_N if keep_N is None else gate_N[keep_N]
        if not ((kept_N >= 0) & (kept_N <= 1)).all():
            return f"{name} reaches from {kept_N.min():.4g} to {kept_N.max():.4g} where kept; expected 0 to 1"
        if name == "key_gate_N" and not (kept_N > 0).all():
            return "key_gate_N is 0 for a token that is kept; give it a gate above 0 or do not keep it"
    return ""
