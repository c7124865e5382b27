"""Nobody skips: the plain Transformer, on the same code."""

from typing import Any

from torch import Tensor

from midskip.model.packing import PackedBatch
from midskip.policies.base import Policy
from midskip.policies.decision import Decision


class Dense(Policy):
    """Every token runs every layer with gate 1."""

    is_hard = True

    def decide(self, layer: int, h_ND: Tensor, state: dict[str, Any], batch: PackedBatch) -> Decision:
        return Decision()
