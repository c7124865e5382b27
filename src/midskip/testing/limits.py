"""The contract of a run-time budget: what a policy that is `adjustable` does under limits.

B sequences, T columns, N packed tokens, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from midskip.model.packing import PackedBatch
from midskip.policies import Policy

SCALES = (0.0, 0.5, 1.0, 2.0, 8.0)


@contextmanager
def limits(policy: Policy, score_scale: float = 1.0, max_layers: int | None = None) -> Iterator[None]:
    """Under these limits for a while; then under those before."""
    before = policy.score_scale, policy.max_layers
    policy.set_limits(score_scale, max_layers)
    try:
        yield
    finally:
        policy.set_limits(*before)


def _kept(policy: Policy, seen: list[tuple[Tensor, PackedBatch]]) -> list[Tensor]:
    """By layer, bool [N]: who is kept, shown these hidden states whatever was decided before."""
    state: dict[str, Any] = {}
    kept = []
    for layer, (h_ND, batch) in enumerate(seen):
        keep_N = policy(layer, h_ND, state, batch).keep_N
        kept.append(torch.ones(len(h_ND), dtype=torch.bool, device=h_ND.device) if keep_N is None else keep_N)
    return kept


def broken_limits(policy: Policy, run: Callable[[], Tensor], valid_BT: Tensor) -> str:
    """What is wrong under limits, "" if nothing is.

    Args:
        run: gives the gates [B, T, L] of a pass over the tokens of `valid_BT`, bool [B, T].
    """
    seen: list[tuple[Tensor, PackedBatch]] = []  # by layer, what the policy is shown as trained

    def look(_: Policy, arguments: tuple[Any, ...]) -> None:
        seen.append((arguments[1].clone(), arguments[3]))

    with policy.register_forward_pre_hook(look):
        as_trained_BTL = run()
    with limits(policy, 0.0):
        if not (run() == valid_BT[..., None]).all():
            return "under score_scale 0 a token does not run every block with gate 1"
    before: list[Tensor] = []
    for score_scale in SCALES:
        with limits(policy, score_scale):
            kept = _kept(policy, seen)
        for layer, (more_N, fewer_N) in enumerate(zip(before, kept)):
            if (fewer_N & ~more_N).any():
                return f"score_scale {score_scale} keeps a token in layer {layer} that a smaller one sends away"
        before = kept
    for max_layers in range(1, policy.num_layers + 1):
        for score_scale in (0.0, 1.0):
            with limits(policy, score_scale, max_layers):
                most = int((run() > 0).sum(-1).max())
            if most > max_layers:
                return f"a token runs {most} blocks under max_layers {max_layers} and score_scale {score_scale}"
    if not torch.equal(run(), as_trained_BTL):
        return "after limits were set and taken back the gates are not those of before"
    return ""
