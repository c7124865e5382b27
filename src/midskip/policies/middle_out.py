"""The paper's policy: a token may leave for the rest of the first half and comes back at the mirrored layer.

N packed tokens, D width, L layers.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from midskip.model.packing import PackedBatch
from midskip.names import check_one_of
from midskip.policies.base import Policy, check_counts
from midskip.policies.decision import Decision
from midskip.policies.difficulty import Difficulty, drawn

STARTS = ("open", "spread", "released")
GATES = ("soft", "hard")
SOFT_OPEN_SCORE = 0.1  # depth score at which the innermost soft gate starts
HARD_OPEN_BIAS = -4.0  # of hard gates, or lower in deep models; priorities reach down to -2
SCORES = ("hash", "difficulty", "hidden_states", "linear")
BY_STATES = ("hidden_states", "linear")
LARGEST_EXPONENT = 30.0  # a score is finite under any scale, and so is its gradient


class MiddleOut(Policy):
    """Scores add up over the first half of the layers; a token whose sum reaches 1 skips the middle.

        depth score  S(i, l) = sum of the scores s(i, l') for l' <= l
        soft gate    g(i, l) = 1 - min(S(i, l), 1)          for l < L/2;  g(i, l) = g(i, L-1-l) above
        hard gate    g(i, l) = 1 if S(i, l) < 1, else 0     the same

    For odd L the middle layer has a gate of its own. Where S >= 1 the gate is 0 and its slope 0, so that a token that
    left gives its gate no gradient and need not be scored again. Scores are float32, also under autocast:

        soft gates                           s(i, l) = relu(w_l . h(i, l) + b_l)          (arXiv 2506.21103)
        hard gates, scores="hash"            s(i, l) = exp(b_l - u(i))
        hard gates, scores="difficulty"      s(i, l) = exp(b_l - d(i))
        hard gates, scores="hidden_states"   s(i, l) = exp(b_l + sqrt(D) cos(w_l, h(i, l)))
        hard gates, scores="linear"          s(i, l) = exp(b_l - w_l . h(i, l) / rms(h(i, l))), and S the largest so far

    u is drawn, once and for all, for each pair of a token and the one before it. d is how hard such pairs have been to
    go on from (`Difficulty`), a running mean of losses without a gradient: what is easy leaves. The last two learn by a
    surrogate gradient, that of 1 - S (straight-through, see `Decision.hard`), which reaches w and b and not the hidden
    states. The cosine does not depend on the size of w; `linear` is what `midskip retrofit` fits. How many leave is set
    by b, which a regularizer moves. An exponential is never 0, so that a larger b or scale sends any token away.

    Under limits (`set_limits`) the score is multiplied by the scale, hence S too; and where `max_layers` closes a
    layer, S is at least 1. Layer l < L/2 and its mirror are two blocks, so l is open under `max_layers` of 2 (l + 1) or
    more, and the middle one of an odd L under L: with L > 1, 1 stops all.

    Args:
        gates: `"soft"` or `"hard"`.
        scores: of hard gates, `"hash"`, the default, `"difficulty"`, `"hidden_states"` or `"linear"`. The first two
            need a model that is given ids and not embeddings, and the regularizer `target_share`.
        start: of soft gates. `"open"`: w = 0 and b > 0 such that every gate starts between 1 and 0.9 (the middle one)
            and every token gives every gate a gradient; `"spread"`: the same b and a normal w of norm 0.2, so that
            tokens differ from the first step, as a regularizer that moves b needs; `"released"`: as in the paper's
            code, w normal and b = 0, which starts with almost half of the gates at 0. Hard gates have one start,
            `"open"`: b so low that every token runs every layer (of those that go by hidden states, all but a few).
        first_tokens: of hard gates: positions at the beginning of each sequence whose tokens run every layer.
    """

    adjustable = is_mirrored = True

    def __init__(
        self, num_layers: int, width: int, initializer_range: float = 0.02, start: str = "open", gates: str = "soft",
        scores: str | None = None, first_tokens: int = 0,
    ):  # fmt: skip
        super().__init__(num_layers, width, initializer_range)
        for name, value, known in (("start", start, STARTS), ("gates", gates, GATES), ("scores", scores, SCORES)):
            if value is not None or name != "scores":
                check_one_of(name, value, known)
        if gates == "hard" and start != "open":
            raise ValueError(f"start is {start!r}, of soft gates; hard gates start 'open': leave it out")
        if gates == "soft" and scores is not None:
            raise ValueError(f"scores is {scores!r}, of hard gates; add gates: hard, or leave it out")
        check_counts(first_tokens=first_tokens)
        if gates == "soft" and first_tokens:
            raise ValueError(f"first_tokens is {first_tokens!r}, of hard gates; add gates: hard, or leave it out")
        self.start, self.is_hard, scores = start, gates == "hard", scores or "hash"
        self.first_tokens, self.has_linear_gates = first_tokens, self.is_hard and scores == "linear"
        self.num_gates = (num_layers + 1) // 2
        self.skip_path_layers = range(self.num_gates)  # each for the layers from there to its mirror
        self.gate_of_layer = nested(num_layers, 0)[0]
        hard_bias = min(HARD_OPEN_BIAS, -2.01 - math.log(self.num_gates))  # the sum of all scores is below 1
        self.open_bias = hard_bias if self.is_hard else SOFT_OPEN_SCORE / self.num_gates
        self.needs_target_share = self.is_hard and scores not in BY_STATES
        self.difficulty = Difficulty() if self.is_hard and scores == "difficulty" else None
        if type(self).absorb is MiddleOut.absorb:  # which is for `difficulty` alone
            self.needs_midskip_trainer = self.difficulty is not None or self.counts_steps
        self.weight = None if self.needs_target_share else nn.Parameter(torch.empty(self.num_gates, width))
        self.bias = nn.Parameter(torch.empty(self.num_gates), requires_grad=not self.needs_target_share)

    def reset_parameters(self, init: Any = nn.init) -> None:
        super().reset_parameters(init)
        init.constant_(self.bias, 0.0 if self.start == "released" else self.open_bias)
        if self.difficulty is not None:
            init.zeros_(self.difficulty.seen)
        elif self.weight is None:
            pass
        elif self.is_hard:
            init.normal_(self.weight, std=self.width**-0.5)
        elif self.start == "open":
            init.zeros_(self.weight)
        else:
            # a spread of 0.2 in the first scores of normed hidden states, at any width
            std = self.initializer_range if self.start == "released" else 0.2 / self.width**0.5
            init.normal_(self.weight, std=std)

    def skip_path_end(self, layer: int) -> int:
        return self.num_layers - layer

    @torch.no_grad()
    def set_linear_gate(self, gate: int, weight_D: Tensor, bias: float) -> None:
        if self.weight is None or not self.has_linear_gates:
            super().set_linear_gate(gate, weight_D, bias)
            return
        self.weight[gate] = weight_D.to(self.weight)
        self.bias[gate] = bias

    def share_profile(self, outer: int) -> list[float | None]:
        return nested(self.num_layers, outer)[1]

    def decide(self, layer: int, h_ND: Tensor, state: dict[str, Any], batch: PackedBatch) -> Decision:
        if layer == 0:
            state.update(depth_scores=[], decisions=[])
            if self.weight is None:
                self._decide_by_tokens(state, batch, _wide(h_ND))
        if layer >= self.num_gates:
            return state["decisions"][self.num_layers - 1 - layer]
        if self.weight is not None:
            before_N = state["depth_scores"][-1] if layer else h_ND.new_zeros(len(h_ND), dtype=_wide(h_ND))
            indices_N = self._scored(layer, state, batch).indices_N
            if self._closed(layer):
                self._decide(state, before_N.clamp(min=1))
            elif indices_N is None:
                self._decide(state, self._first_kept(self._joined(before_N, self._score(layer, h_ND)), batch))
            else:
                before_M = before_N.index_select(0, indices_N)
                total_M = self._joined(before_M, self._score(layer, h_ND.index_select(0, indices_N)))
                self._decide(state, self._first_kept(before_N.index_copy(0, indices_N, total_M), batch))
        return state["decisions"][layer]

    def _decide_by_tokens(self, state: dict[str, Any], batch: PackedBatch, dtype: torch.dtype) -> None:
        """All decisions at once, since they are known from the ids."""
        state["pair"] = _pair(batch)
        priority_N = self.priority(*state["pair"]).to(dtype)
        depth_score_N = torch.zeros_like(priority_N)
        for layer in range(self.num_gates):
            if self._closed(layer):
                depth_score_N = depth_score_N.clamp(min=1)
            else:
                more_N = depth_score_N + self._score(layer, priority_N)
                depth_score_N = self._first_kept(torch.where(depth_score_N < 1, more_N, depth_score_N), batch)
            self._decide(state, depth_score_N)
        decisions = state["decisions"]
        batch.count([mask_N for decision in decisions for mask_N in (decision.keep_N, decision.skip_path_N)])

    def _joined(self, before_N: Tensor, score_N: Tensor) -> Tensor:
        """The depth score after one more score."""
        return torch.maximum(before_N, score_N) if self.has_linear_gates else before_N + score_N

    def _first_kept(self, depth_score_N: Tensor, batch: PackedBatch) -> Tensor:
        """The first tokens of a sequence do not leave."""
        if not self.first_tokens:
            return depth_score_N
        return torch.where(batch.position_N < self.first_tokens, 0, depth_score_N)

    def _decide(self, state: dict[str, Any], depth_score_N: Tensor) -> None:
        """Add the decision that follows from the scores."""
        state["depth_scores"].append(depth_score_N)
        keep_N = depth_score_N < 1
        before = state["decisions"][-1] if state["decisions"] else Decision()
        leaving_N = before.leaving(keep_N) if self.has_skip_paths else None
        if self.is_hard:
            state["decisions"].append(Decision.hard(keep_N, 1 - depth_score_N, leaving_N))
        else:
            gate_N = torch.where(keep_N, 1 - depth_score_N, 0)
            state["decisions"].append(Decision(keep_N, gate_N, gate_N, leaving_N))

    def priority(self, token_N: Tensor, previous_N: Tensor) -> Tensor:
        """Float [N]: of hard gates that go by tokens (int64 [N], and those before them, -1 where there is none), what
        keeps a token: the lower, the sooner it leaves."""
        if self.difficulty is None:
            return drawn(token_N, previous_N)
        return self.difficulty(token_N, previous_N)

    def observe(self, state: dict[str, Any], nats_N: Tensor, scored_N: Tensor) -> None:
        if self.difficulty is not None:
            token_N, previous_N = state["pair"]
            self.difficulty.observe(token_N, previous_N, nats_N, scored_N)

    def absorb(self) -> None:
        super().absorb()
        if self.difficulty is not None:
            self.difficulty.absorb()

    def _scored(self, layer: int, state: dict[str, Any], batch: PackedBatch) -> PackedBatch:
        """Who gets a score in this layer: the tokens that have not left before."""
        return batch.keep(state["decisions"][layer - 1].keep_N) if layer else batch

    def _closed(self, layer: int) -> bool:
        """Whether `max_layers` lets nobody into this layer and those between it and its mirror."""
        return self.max_layers is not None and min(2 * (layer + 1), self.num_layers) > self.max_layers

    def _score(self, layer: int, seen_ND: Tensor) -> Tensor:
        """Of hidden states [N, D], or of priorities of tokens [N]."""
        wide = _wide(seen_ND)
        seen_ND, bias = seen_ND.to(wide), self.bias[layer].to(wide)
        if self.weight is None:
            score_N = (bias - seen_ND).clamp(max=LARGEST_EXPONENT).exp()
        else:
            with torch.autocast(seen_ND.device.type, enabled=False):
                score_N = self._score_states(seen_ND, self.weight[layer : layer + 1].to(wide), bias)
        return score_N if self.score_scale == 1.0 else self.score_scale * score_N

    def _score_states(self, h_ND: Tensor, weight_1D: Tensor, bias: Tensor) -> Tensor:
        if not self.is_hard:
            return F.relu(F.linear(h_ND, weight_1D, bias[None])).squeeze(1)
        h_ND = h_ND.detach()
        if self.has_linear_gates:
            number_N = -F.linear(F.rms_norm(h_ND, h_ND.shape[-1:]), weight_1D).squeeze(1)
        else:
            sizes_N = torch.linalg.vector_norm(h_ND, dim=1) * torch.linalg.vector_norm(weight_1D)
            cosine_N = F.linear(h_ND, weight_1D).squeeze(1) / sizes_N.clamp(min=torch.finfo(h_ND.dtype).tiny)
            number_N = self.width**0.5 * cosine_N
        return (number_N + bias).clamp(max=LARGEST_EXPONENT).exp()

    def flops(self, layer: int, state: dict[str, Any], batch: PackedBatch) -> int:
        if self.weight is None or layer >= self.num_gates or self._closed(layer):
            return 0
        return 2 * self.width * self._scored(layer, state, batch).num_tokens


def nested(num_layers: int, outer: int) -> tuple[tuple[int, ...], list[float | None]]:
    """`Policy.gate_of_layer` and `share_profile` of gates that close towards the middle."""
    gate_of_layer = tuple(min(layer, num_layers - 1 - layer) for layer in range(num_layers))
    steps = max(1, gate_of_layer[num_layers // 2] - outer)
    return gate_of_layer, [None if gate < outer else (gate - outer) / steps for gate in gate_of_layer]


def _pair(batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """The tokens, and those before them."""
    if batch.token_N is None:
        raise ValueError(
            "the gates of this model go by token ids, and it was given inputs_embeds: give input_ids, or train it with "
            "the policy setting scores: hidden_states"
        )
    return batch.token_N, batch.previous_token_N


def _wide(h_ND: Tensor) -> torch.dtype:
    return torch.promote_types(h_ND.dtype, torch.float32)
