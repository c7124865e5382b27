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
GATES = ("soft", "hard")
SOFT_OPEN_SCORE = 0.1  # depth score at which the innermost soft gate starts
HARD_OPEN_BIAS = -4.0  # of hard gates; the logarithm of a score spreads by about 1 around its bias
SURROGATES = ("loss", "straight_through")
LESSON_WEIGHT = 0.003  # small beside the gradient of the loss, with which it is clipped; AdamW does not mind
LARGEST_EXPONENT = 30.0  # a score is finite under any factor, and so is its gradient


class MiddleOut(Policy):
    """Scores add up over the first half of the layers; a token whose sum reaches 1 skips the middle.

        score        s(i, l) = relu(w_l . h(i, l) + b_l)          for l < L/2, with soft gates
                     s(i, l) = exp(sqrt(D) cos(w_l, h(i, l)) + b_l)            with hard gates
        depth score  S(i, l) = sum of s(i, l') for l' <= l
        gate         g(i, l) = 1 - min(S(i, l), 1)                for l < L/2, with soft gates
                     g(i, l) = 1 if S(i, l) < 1 else 0                         with hard gates
                     g(i, l) = g(i, L-1-l)                        for l >= L/2

    (arXiv 2506.21103 for soft gates.) For odd L the middle layer has a gate of its own. Scores are float32, also under
    autocast. Where S >= 1 the gate is 0 and its slope 0, so that a token that left gives its gate no gradient and need
    not be scored again.

    A hard gate has no gradient of its own. It learns by a surrogate:

    - `"loss"`: w . h is fitted to the loss of the token's own prediction, with the sign turned (a regression, see
      `lesson`), so that tokens which are easy to predict leave;
    - `"straight_through"`: in the backward pass the gate has the gradient of 1 - S (see `Decision.hard`).

    Either reaches the policy's weights and not the hidden states, which learn from the loss alone. The cosine keeps the
    spread of the scores whatever the size of w and h, and the exponential keeps every score above 0, so that a larger
    bias or factor sends any token away.

    Under an effort (`set_effort`) the score is multiplied by the factor, hence S too; and where the ceiling closes a
    layer, S is at least 1. Layer l < L/2 and its mirror are two blocks, so l is open under a ceiling of 2 (l + 1) or
    more, and the middle one of an odd L under L: with L > 1, a ceiling of 1 stops all.

    Args:
        gates: `"soft"` or `"hard"`.
        start: of soft gates. `"open"`: w = 0 and b > 0 such that every gate starts between 1 and 0.9 (the middle one)
            and every token gives every gate a gradient; `"spread"`: the same b and a normal w of norm 0.2, so that
            tokens differ from the first step, as a controller that moves b needs; `"released"`: as in the paper's code,
            w normal and b = 0, which starts with almost half of the gates at 0. Hard gates have one start, `"open"`: w
            normal, and b so low that every token runs every layer.
        surrogate: of hard gates, `"loss"` or `"straight_through"`.
    """

    adjustable = True

    def __init__(
        self, num_layers: int, width: int, initializer_range: float = 0.02, start: str = "open", gates: str = "soft",
        surrogate: str = "loss",
    ):  # fmt: skip
        super().__init__(num_layers, width, initializer_range)
        given = (("start", start, STARTS), ("gates", gates, GATES), ("surrogate", surrogate, SURROGATES))
        for name, value, known in given:
            if value not in known:
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, known))}")
        if gates == "hard" and start != "open":
            raise ValueError(f"start is {start!r}, of soft gates; hard gates start 'open': leave it out")
        self.start, self.is_hard = start, gates == "hard"
        self.learns_from_loss = self.needs_budget = self.is_hard and surrogate == "loss"
        self.num_gates = (num_layers + 1) // 2
        self.open_bias = HARD_OPEN_BIAS if self.is_hard else SOFT_OPEN_SCORE / self.num_gates
        self.weight = nn.Parameter(torch.empty(self.num_gates, width))
        self.bias = nn.Parameter(torch.empty(self.num_gates))
        self.mean_loss = nn.Parameter(torch.empty(self.num_gates)) if self.learns_from_loss else None

    def reset_parameters(self, init: Any = nn.init) -> None:
        if self.is_hard:  # so small that its direction is learnt in the first steps
            init.normal_(self.weight, std=1e-3 * self.width**-0.5)
        elif self.start == "open":
            init.zeros_(self.weight)
        else:
            # a spread of 0.2 in the first scores of normed hidden states, at any width
            std = self.initializer_range if self.start == "released" else 0.2 / self.width**0.5
            init.normal_(self.weight, std=std)
        init.constant_(self.bias, 0.0 if self.start == "released" else self.open_bias)
        if self.mean_loss is not None:
            init.zeros_(self.mean_loss)

    def decide(self, layer: int, h_ND: Tensor, state: dict[str, Any], layout: Layout) -> Decision:
        if layer == 0:
            state.update(depth_scores=[], decisions=[], ease=[])
        decisions = state["decisions"]
        if layer >= self.num_gates:
            return decisions[self.num_layers - 1 - layer]
        present = self._scored(layer, state, layout)
        if self._closed(layer):
            before_N = state["depth_scores"][-1] if layer else h_ND.new_zeros(len(h_ND), dtype=_wide(h_ND))
            depth_score_N = before_N.clamp(min=1)
        elif layer == 0:
            depth_score_N = self._score(layer, h_ND, present, state)
        elif present.rows_N is None:
            depth_score_N = state["depth_scores"][-1] + self._score(layer, h_ND, present, state)
        else:
            score_M = self._score(layer, h_ND.index_select(0, present.rows_N), present, state)
            depth_score_N = state["depth_scores"][-1].index_add(0, present.rows_N, score_M)
        state["depth_scores"].append(depth_score_N)
        keep_N = depth_score_N < 1
        if self.learns_from_loss:
            decisions.append(Decision(keep_N))
        elif self.is_hard:
            decisions.append(Decision.hard(keep_N, 1 - depth_score_N))
        else:
            gate_N = torch.where(keep_N, 1 - depth_score_N, 0)
            decisions.append(Decision(keep_N, gate_N, gate_N))
        return decisions[-1]

    def _scored(self, layer: int, state: dict[str, Any], layout: Layout) -> Layout:
        """Who gets a score in this layer: the tokens that have not left before."""
        return layout.keep(state["decisions"][layer - 1].keep_N) if layer else layout

    def _closed(self, layer: int) -> bool:
        """Whether the ceiling lets nobody into this layer and those between it and its mirror."""
        return self.ceiling is not None and min(2 * (layer + 1), self.num_layers) > self.ceiling

    def _score(self, layer: int, h_ND: Tensor, present: Layout, state: dict[str, Any]) -> Tensor:
        wide = _wide(h_ND)
        x_ND, weight_1D, bias = h_ND.to(wide), self.weight[layer : layer + 1].to(wide), self.bias[layer].to(wide)
        with torch.autocast(h_ND.device.type, enabled=False):
            if self.is_hard:
                x_ND = x_ND.detach()
                size_N = torch.linalg.vector_norm(x_ND, dim=1).clamp(min=torch.finfo(wide).tiny)
                ease_N = F.linear(x_ND, weight_1D).squeeze(1) / size_N * self.width**0.5
                if self.learns_from_loss:
                    state["ease"].append((layer, present, ease_N))
                size = torch.linalg.vector_norm(weight_1D).clamp(min=torch.finfo(wide).tiny)
                score_N = (ease_N / size + bias).clamp(max=LARGEST_EXPONENT).exp()
            else:
                score_N = F.relu(F.linear(x_ND, weight_1D, bias[None])).squeeze(1)
        return score_N if self.factor == 1.0 else self.factor * score_N

    def lesson(self, state: dict[str, Any], nats_N: Tensor) -> Tensor | None:
        """With `surrogate="loss"`: LESSON_WEIGHT (mean_loss_l - w_l . h / rms(h) - nats)^2, summed over the layers in
        which the token was scored."""
        if self.mean_loss is None:
            return None
        total_N = torch.zeros_like(nats_N) * self.bias.sum()  # which a controller moves: its gradient is 0, not none
        for layer, present, ease_M in state["ease"]:
            rows_M = present.rows_N
            nats_M = nats_N if rows_M is None else nats_N.index_select(0, rows_M)
            error_M = (self.mean_loss[layer] - ease_M - nats_M).square()
            total_N = total_N + error_M if rows_M is None else total_N.index_add(0, rows_M, error_M)
        return LESSON_WEIGHT * total_N

    def flops(self, layer: int, state: dict[str, Any], layout: Layout) -> int:
        if layer >= self.num_gates or self._closed(layer):
            return 0
        return 2 * self.width * self._scored(layer, state, layout).num_tokens


def _wide(h_ND: Tensor) -> torch.dtype:
    return torch.promote_types(h_ND.dtype, torch.float32)
