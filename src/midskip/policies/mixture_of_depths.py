"""Mixture-of-Depths: in every second block only the tokens with the highest scores run (arXiv 2404.02258).

N packed tokens, L layers, G gates, S sequences.
"""

from typing import Any

import torch
from torch import Tensor

from midskip.distributed import sum_over_ranks
from midskip.model.packing import PackedBatch
from midskip.policies.base import Policy, check_shares
from midskip.policies.decision import Decision
from midskip.policies.scored import ScoredPolicy

MEMORY = 0.98  # of the threshold, from one step to the next


class MixtureOfDepths(ScoredPolicy):
    """Every second layer has a router. In training the best `capacity` of each sequence run it, by rank among all its
    tokens, as in the paper. Ranks need tokens that are yet to come. So in evaluation, in decoding, and in training
    under a scale of the scores, a token runs if its number r lies above a threshold: a running mean, over training
    steps, of the lowest number that was among the best.

    The output is multiplied by 1, with the surrogate gradient of 1 - exp(b - r), b the threshold: the paper multiplies
    by the score itself, which shrinks it. Capacity comes down from 1 over `ramp_steps` optimizer steps.

    Args:
        capacity: share of the tokens that run a layer with a router, in (0, 1]; all layers together run
            (1 + capacity) / 2.
        ramp_steps: optimizer steps in which that is reached.
        router: `"linear"` or `"bottleneck"`.
    """

    counts_steps = True

    def __init__(
        self, num_layers: int, width: int, initializer_range: float = 0.02, capacity: float = 0.125,
        ramp_steps: int = 50, router: str = "linear",
    ):  # fmt: skip
        check_shares(capacity=capacity)
        if isinstance(ramp_steps, bool) or not isinstance(ramp_steps, int) or ramp_steps < 1:
            raise ValueError(f"ramp_steps is {ramp_steps!r}; expected a whole number of at least 1")
        gates = tuple(layer // 2 if layer % 2 else None for layer in range(num_layers))
        super().__init__(num_layers, width, initializer_range, gates, num_layers // 2, router, trains_bias=False)
        self.gates, self.gate_of_layer = gates, (None,) * num_layers  # the capacity holds the share
        self.capacity, self.ramp_steps = capacity, ramp_steps
        self._lowest: Tensor | None = None  # [2, G], sums over sequences of the lowest number kept, and their count

    def share_profile(self, outer: int) -> list[float | None]:
        return Policy.share_profile(self, outer)  # a ValueError: the capacity holds the share

    def decide(self, layer: int, h_ND: Tensor, state: dict[str, Any], batch: PackedBatch) -> Decision:
        gate = self.gates[layer]
        if gate is None:
            return self.ungated(state, batch)
        number_N = self.routers[gate](h_ND.detach())
        readiness_N = self.readiness(number_N, gate)
        if self.training and self.score_scale == 1.0 and self.max_layers is None:
            keep_N = self._best(number_N.detach(), gate, state, batch)
        else:
            keep_N = self.within(readiness_N < 1, state)
        return self.decision(keep_N, readiness_N)

    def _best(self, number_N: Tensor, gate: int, state: dict[str, Any], batch: PackedBatch) -> Tensor:
        """bool [N], those among the best of their sequence, and notes the lowest of these."""
        if "share" not in state:  # on a GPU the host waits for the step, once a pass
            ramp = min(1.0, (int(self.num_steps) + 1) / self.ramp_steps)
            state["share"] = 1 - (1 - self.capacity) * ramp
        order_N = number_N.argsort(descending=True, stable=True)
        order_N = order_N[batch.sequence_N[order_N].argsort(stable=True)]  # by sequence, the best first
        rank_N = torch.empty_like(order_N)
        rank_N[order_N] = batch.index_in_sequence_N  # rows are by sequence, and so is the order
        limit_S = (state["share"] * batch.cu_seqlens.diff().to(number_N.dtype)).ceil()
        limit_N = limit_S[batch.sequence_N]
        keep_N, last_N = rank_N < limit_N, rank_N == limit_N - 1
        noted = torch.stack([torch.where(last_N, number_N, 0).sum(), last_N.sum()])
        state.setdefault("lowest", {})[gate] = noted
        return keep_N

    @torch.no_grad()
    def observe(self, state: dict[str, Any], nats_N: Tensor, scored_N: Tensor) -> None:
        noted = state.get("lowest")
        if noted:
            lowest_2G = torch.stack([noted[gate] for gate in sorted(noted)], 1)
            self._lowest = lowest_2G if self._lowest is None else self._lowest + lowest_2G

    @torch.no_grad()
    def absorb(self) -> None:
        super().absorb()
        if self._lowest is None:
            return
        sum_over_ranks(self._lowest)
        mean_G = (self._lowest[0] / self._lowest[1].clamp(min=1)).to(self.bias)
        # while the capacity comes down the threshold moves with it, without memory
        memory = MEMORY if int(self.num_steps) > self.ramp_steps else 0.0
        self.bias.lerp_(mean_G, 1 - memory)
        self._lowest = None

    def flops(self, layer: int, state: dict[str, Any], batch: PackedBatch) -> int:
        gate = self.gates[layer]
        return 0 if gate is None else self.router_flops(gate) * batch.num_tokens
