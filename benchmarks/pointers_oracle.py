"""Ceilings for `pointers`: depths that are told, as a policy by import path (with benchmarks/ on the import path).

--model.policy=pointers_oracle:OracleDepths
"""

from typing import Any

import torch
from torch import Tensor

from midskip.data.pointers import hops
from midskip.model.packing import PackedBatch
from midskip.policies import Decision, Policy


class OracleDepths(Policy):
    """A token of hop h runs its first h + extra layers and no other. It is no fair rival: who runs tells the model h.

    Args:
        extra: layers beyond the hop. With `skipped_kv="drop"` 1 is needed, so that the next token of the chain still
            finds this one's key.
    """

    def __init__(self, num_layers: int, width: int, initializer_range: float = 0.02, extra: int = 0):
        super().__init__(num_layers, width, initializer_range)
        self.extra = extra

    def decide(self, layer: int, h_ND: Tensor, state: dict[str, Any], batch: PackedBatch) -> Decision:
        if layer == 0:
            assert batch.token_N is not None
            depth_N = batch.pack(hops(batch.unpack(batch.token_N))).clamp(min=0) + self.extra
            state["keeps"] = list(torch.stack([depth_N > n for n in range(self.num_layers)]))
            batch.count(state["keeps"])
        return Decision(state["keeps"][layer])
