"""The law of a run-time budget: what a policy that is `adjustable` does under an effort.

B sequences, T columns, N packed tokens, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

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


def broken_effort(policy: Policy, run: Callable[[], Tensor], valid_BT: Tensor) -> str:
    """What is wrong under an effort, "" if nothing is.

    Args:
        run: gives the gates [B, T, L] of a pass over the tokens of `valid_BT`, bool [B, T].
    """
    keep_N: list[Tensor] = []  # of layer 0, where all efforts see the same hidden states

    def look(module: Policy, arguments: tuple[Any, ...], decision: Any) -> None:
        layer, h_ND = arguments[:2]
        if layer == 0:
            everybody_N = torch.ones(len(h_ND), dtype=torch.bool, device=h_ND.device)
            keep_N.append(everybody_N if decision.keep_N is None else decision.keep_N)

    as_trained_BTL = run()
    hook = policy.register_forward_hook(look)
    try:
        for factor in FACTORS:
            with effort(policy, factor):
                gates_BTL = run()
            if factor == 0 and not (gates_BTL == valid_BT[..., None]).all():
                return "under factor 0 a token does not run every block with gate 1"
            if len(keep_N) > 1 and (keep_N[-1] & ~keep_N[-2]).any():
                return f"factor {factor} keeps a token in layer 0 that a smaller factor sends away"
    finally:
        hook.remove()
    for ceiling in range(1, policy.num_layers + 1):
        for factor in (0.0, 1.0):
            with effort(policy, factor, ceiling):
                most = int((run() > 0).sum(-1).max())
            if most > ceiling:
                return f"a token runs {most} blocks under a ceiling of {ceiling} and factor {factor}"
    if not torch.equal(run(), as_trained_BTL):
        return "after an effort was set and taken back the gates are not those of before"
    return ""
