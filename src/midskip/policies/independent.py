"""A gate a layer: each layer asks each token anew, and who skips one may run the next.

N packed tokens.
"""

from typing import Any

from torch import Tensor

from midskip.model.packing import PackedBatch
from midskip.policies.base import Decision
from midskip.policies.scored import ScoredPolicy


class Independent(ScoredPolicy):
    """Layer l runs for the tokens whose router's number r(i, l) lies above the bias b(l), whatever they ran before.

    The gate is exactly 1 or 0. Its surrogate gradient is that of 1 - exp(b - r) (see `Decision.hard`). Without a
    regularizer that sets b, all of it is learned, and nothing holds the share. A token under `max_layers` runs the
    first layers that it would run.

    Args:
        router: `"bottleneck"` or `"linear"`.
    """

    def __init__(
        self, num_layers: int, width: int, initializer_range: float = 0.02, router: str = "bottleneck"
    ):  # fmt: skip
        gates = tuple(range(num_layers))
        super().__init__(num_layers, width, initializer_range, gates, num_layers, router)

    def decide(self, layer: int, h_ND: Tensor, state: dict[str, Any], batch: PackedBatch) -> Decision:
        readiness_N = self.readiness(self.routers[layer](h_ND.detach()), layer)
        return self.decision(self.within(readiness_N < 1, state), readiness_N)

    def flops(self, layer: int, state: dict[str, Any], batch: PackedBatch) -> int:
        return self.router_flops(layer) * batch.num_tokens
