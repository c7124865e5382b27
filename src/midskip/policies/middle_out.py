"""The paper's policy: a token may leave for the rest of the first half and comes back at the mirrored layer.

N packed tokens, D width, L layers.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from midskip.nn.layout import Layout
from midskip.policies.base import Decision, Policy

STARTS = ("open", "spread", "released")


class MiddleOut(Policy):
    """Scores add up over the first half of the layers; a token whose sum reaches 1 skips the middle.

        score        s(i, l) = relu(w_l . h(i, l) + b_l)          for l < L/2
        depth score  S(i, l) = sum of s(i, l') for l' <= l
        gate         g(i, l) = 1 - min(S(i, l), 1)                for l < L/2;  g(i, l) = g(i, L-1-l) above

    (arXiv 2506.21103.) For odd L the middle layer has a gate of its own. Scores are float32, also under autocast.
    Where S >= 1 the gate is 0 and its slope 0, so that a token that left gives its gate no gradient and need not be
    scored again.

    Under an effort (`set_effort`) the score is factor * relu(...), hence S that of training times the factor; and where
    the ceiling closes a layer, S is at least 1. Layer l < L/2 and its mirror are two blocks, so l is open under a
    ceiling of 2 (l + 1) or more, and the middle one of an odd L under L: with L > 1, a ceiling of 1 stops all.

    Args:
        start: `"open"`: w = 0 and b > 0 such that every gate starts between 1 and 0.9 (the middle one) and every
            token gives every gate a gradient; `"spread"`: the same b and a normal w of norm 0.2, so that tokens
            differ from the first step, as a controller that moves b needs; `"released"`: as in the paper's code, w
            normal and b = 0, which starts with almost half of the gates at 0.
    """

    adjustable = True

    def __init__(self, num_layers: int, width: int, initializer_range: float = 0.02, start: str = "open"):
        super().__init__(num_layers, width, initializer_range)
        if start not in STARTS:
            raise ValueError(f"start is {start!r}; expected one of {', '.join(map(repr, STARTS))}")
        self.start = start
        self.num_gates = (num_layers + 1) // 2
        self.weight = nn.Parameter(torch.empty(self.num_gates, width))
        self.bias = nn.Parameter(torch.empty(self.num_gates))

    def reset_parameters(self, init: Any = nn.init) -> None:
        if self.start == "open":
            init.zeros_(self.weight)
        else:
            # a spread of 0.2 in the first scores of normed hidden states, at any width
            std = self.initializer_range if self.start == "released" else 0.2 / self.width**0.5
            init.normal_(self.weight, std=std)
        if self.start == "released":
            init.zeros_(self.bias)
        else:
            init.constant_(self.bias, 0.1 / self.num_gates)

    def decide(self, layer: int, h_ND: Tensor, state: dict[str, Any], layout: Layout) -> Decision:
        if layer == 0:
            state.update(depth_scores=[], decisions=[])
        decisions = state["decisions"]
        if layer >= self.num_gates:
            return decisions[self.num_layers - 1 - layer]
        present = self._scored(layer, state, layout)
        if self._closed(layer):
            before_N = state["depth_scores"][-1] if layer else h_ND.new_zeros(len(h_ND), dtype=_wide(h_ND))
            depth_score_N = before_N.clamp(min=1)
        elif layer == 0:
            depth_score_N = self._score(layer, h_ND)
        elif present.rows_N is None:
            depth_score_N = state["depth_scores"][-1] + self._score(layer, h_ND)
        else:
            score_M = self._score(layer, h_ND.index_select(0, present.rows_N))
            depth_score_N = state["depth_scores"][-1].index_add(0, present.rows_N, score_M)
        state["depth_scores"].append(depth_score_N)
        keep_N = depth_score_N < 1
        gate_N = torch.where(keep_N, 1 - depth_score_N, 0)
        decisions.append(Decision(keep_N, gate_N, gate_N))
        return decisions[-1]

    def _scored(self, layer: int, state: dict[str, Any], layout: Layout) -> Layout:
        """Who gets a score in this layer: the tokens that have not left before."""
        return layout.keep(state["decisions"][layer - 1].keep_N) if layer else layout

    def _closed(self, layer: int) -> bool:
        """Whether the ceiling lets nobody into this layer and those between it and its mirror."""
        return self.ceiling is not None and min(2 * (layer + 1), self.num_layers) > self.ceiling

    def _score(self, layer: int, h_ND: Tensor) -> Tensor:
        wide = _wide(h_ND)
        one = slice(layer, layer + 1)
        with torch.autocast(h_ND.device.type, enabled=False):
            score_N1 = F.relu(F.linear(h_ND.to(wide), self.weight[one].to(wide), self.bias[one].to(wide)))
        score_N = score_N1.squeeze(1)
        return score_N if self.factor == 1.0 else self.factor * score_N

    def flops(self, layer: int, state: dict[str, Any], layout: Layout) -> int:
        if layer >= self.num_gates or self._closed(layer):
            return 0
        return 2 * self.width * self._scored(layer, state, layout).num_tokens


def _wide(h_ND: Tensor) -> torch.dtype:
    return torch.promote_types(h_ND.dtype, torch.float32)
