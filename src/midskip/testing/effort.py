"""The contract of a run-time budget: what a policy that is `adjustable` does under an effort.

B sequences, T columns, N packed tokens, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from midskip.model.packing import Layout
from midskip.policies import Policy

FACTORS = (0.0, 0.5, 1.0, 2.0, 8.0)


@contextmanager
def effort(policy: Policy, factor: float = 1.0, ceiling: int | None = None) -> Iterator[None]:
    """Under this effort for a while; then under the one before."""
    before = policy.factor, policy.ceiling
    policy.set_effort(factor, ceiling)
    try:
        yield
    finally:
        policy.set_effort(*before)


def _kept(policy: Policy, seen: list[tuple[Tensor, Layout]]) -> list[Tensor]:
    """By layer, bool [N]: who is kept, shown these hidden states whatever was decided before."""
    state: dict[str, Any] = {}
    kept = []
    for layer, (h_ND, layout) in enumerate(seen):
        keep_N = policy(layer, h_ND, state, layout).keep_N
        kept.append(torch.ones(len(h_ND), dtype=torch.bool, device=h_ND.device) if keep_N is None else keep_N)
    return kept


def broken_effort(policy: Policy, run: Callable[[], Tensor], valid_BT: Tensor) -> str:
    """What is wrong under an effort, "" if nothing is.

    Args:
        run: gives the gates [B, T, L] of a pass over the tokens of `valid_BT`, bool [B, T].
    """
    seen: list[tuple[Tensor, Layout]] = []  # by layer, what the policy is shown as trained

    def look(_: Policy, arguments: tuple[Any, ...]) -> None:
        seen.append((arguments[1].clone(), arguments[3]))

    hook = policy.register_forward_pre_hook(look)
    try:
        as_trained_BTL = run()
    finally:
        hook.remove()
    with effort(policy, 0.0):
        if not (run() == valid_BT[..., None]).all():
            return "under factor 0 a token does not run every block with gate 1"
    before: list[Tensor] = []
    for factor in FACTORS:
        with effort(policy, factor):
            kept = _kept(policy, seen)
        for layer, (more_N, fewer_N) in enumerate(zip(before, kept)):
            if (fewer_N & ~more_N).any():
                return f"factor {factor} keeps a token in layer {layer} that a smaller factor sends away"
        before = kept
    for ceiling in range(1, policy.num_layers + 1):
        for factor in (0.0, 1.0):
            with effort(policy, factor, ceiling):
                most = int((run() > 0).sum(-1).max())
            if most > ceiling:
                return f"a token runs {most} blocks under a ceiling of {ceiling} and factor {factor}"
    if not torch.equal(run(), as_trained_BTL):
        return "after an effort was set and taken back the gates are not those of before"
    return ""
