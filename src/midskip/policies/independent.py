"""A gate a layer: each layer asks each token anew, and who skips one may run the next.

N packed tokens.
"""

from typing import Any

import torch
from torch import Tensor

from midskip.model.packing import PackedBatch
from midskip.policies.base import check_counts
from midskip.policies.decision import Decision
from midskip.policies.scored import ScoredPolicy


class Independent(ScoredPolicy):
    """Layer l runs for the tokens whose router's number r(i, l) lies above the bias b(l), whatever they ran before.

    The gate is exactly 1 or 0. Its surrogate gradient is that of 1 - exp(b - r) (see `Decision.hard`). Without a
    regularizer that sets b, all of it is learned, and nothing holds the share. A token under `max_layers` runs the
    first layers that it would run.

    Args:
        router: `"bottleneck"` or `"linear"`.
        outer: first and as many last layers that every token runs.
        first_tokens: positions at the beginning of each sequence whose tokens run every layer: many others attend to
            them.
    """

    def __init__(
        self, num_layers: int, width: int, initializer_range: float = 0.02, router: str = "bottleneck", outer: int = 0,
        first_tokens: int = 0,
    ):  # fmt: skip
        check_counts(outer=outer, first_tokens=first_tokens)
        num_gates = num_layers - 2 * outer
        if num_gates < 1:
            raise ValueError(f"outer is {outer} of {num_layers} layers, which leaves none to skip; expected less")
        gates = (None,) * outer + tuple(range(num_gates)) + (None,) * outer
        super().__init__(num_layers, width, initializer_range, gates, num_gates, router)
        self.outer, self.first_tokens = outer, first_tokens
        self.skip_path_layers = range(outer, num_layers - outer)

    def decide(self, layer: int, h_ND: Tensor, state: dict[str, Any], batch: PackedBatch) -> Decision:
        gate = self.gate_of_layer[layer]
        if gate is None:
            return self.ungated(state, batch)
        readiness_N = self.readiness(self.routers[gate](h_ND.detach()), gate)
        keep_N = readiness_N < 1
        if self.first_tokens:
            first_N = batch.position_N < self.first_tokens
            keep_N, readiness_N = keep_N | first_N, torch.where(first_N, 0, readiness_N)  # their gate learns nothing
        return self.decision(self.within(keep_N, state), readiness_N)

    def flops(self, layer: int, state: dict[str, Any], batch: PackedBatch) -> int:
        gate = self.gate_of_layer[layer]
        return 0 if gate is None else self.router_flops(gate) * batch.num_tokens
