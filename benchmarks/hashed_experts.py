"""A policy by import path: a mixture of experts by a hash (arXiv 2106.04426), as sublayers that are skipped.

    --model.skip_unit=sublayer --model.policy=hashed_experts:HashedExperts
    --model.policy_settings='{groups: [[1, 3, 5], [7, 9, 11]], closed: [2, 4, 8, 10]}'

Of each group every token runs one sublayer, so all tokens have the same FLOPs. It is the opponent of sublayers that
serve pairs of tokens independently of each other, where some pairs run more sublayers than others.

N packed tokens.
"""

from typing import Any

import torch
from torch import Tensor

from midskip.model.packing import PackedBatch
from midskip.policies import Decision, Policy
from midskip.policies.scored import uniform


class HashedExperts(Policy):
    """In each group a token runs the sublayer that a hash of its id and the one before it draws.

    Args:
        groups: lists of sublayers, none of them twice.
        closed: sublayers that no token runs. Those that are not named run for all.
    """

    def __init__(
        self, num_layers: int, width: int, initializer_range: float = 0.02, groups: list[list[int]] | None = None,
        closed: list[int] | None = None,
    ):  # fmt: skip
        super().__init__(num_layers, width, initializer_range)
        self.groups, self.closed_layers = groups or [], frozenset(closed or ())
        named = [layer for group in self.groups for layer in group] + list(self.closed_layers)
        if len(named) > len(set(named)) or not set(named) <= set(range(num_layers)) or not all(self.groups):
            raise ValueError(
                f"groups is {groups!r} and closed {closed!r}; expected numbers from 0 to {num_layers - 1}, each once"
            )

    def decide(self, layer: int, h_ND: Tensor, state: dict[str, Any], batch: PackedBatch) -> Decision:
        if layer == 0:
            nobody_N = torch.zeros(len(h_ND), dtype=torch.bool, device=h_ND.device)
            decisions = [Decision(nobody_N if n in self.closed_layers else None) for n in range(self.num_layers)]
            for number, group in enumerate(self.groups):
                expert_N = (uniform(batch, 1 + number, "pair") * len(group)).long()
                for expert, sublayer in enumerate(group):
                    decisions[sublayer] = Decision(expert_N == expert)
            state["decisions"] = decisions
            batch.count([decision.keep_N for decision in decisions])
        return state["decisions"][layer]
