"""The same layers for every token: the control that knows nothing of tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from midskip.model.packing import PackedBatch
from midskip.policies.base import Policy, check_shares
from midskip.policies.decision import Decision


class Static(Policy):
    """Every token runs the same layers, and no token runs the others: a shallower dense model that still holds the
    weights of all.

    Args:
        share: of the layers that run, in (0, 1]; the middle ones are left out first.
        layers: instead, which layers run, counted from 0.
    """

    def __init__(
        self, num_layers: int, width: int, initializer_range: float = 0.02, share: float | None = None,
        layers: Sequence[int] | None = None,
    ):  # fmt: skip
        super().__init__(num_layers, width, initializer_range)
        if (share is None) == (layers is None):
            raise ValueError(f"share is {share!r} and layers {layers!r}; expected one of the two")
        if share is not None:
            check_shares(share=share)
            num_run = max(1, round(share * num_layers))
            layers = [*range((num_run + 1) // 2), *range(num_layers - num_run // 2, num_layers)]
        known = set(range(num_layers))
        fits = isinstance(layers, Sequence) and layers and all(isinstance(layer, int) for layer in layers)
        if not (layers and fits) or len(set(layers)) < len(layers) or not known.issuperset(layers):
            raise ValueError(f"layers is {layers!r}; expected some of 0 to {num_layers - 1}, none of them twice")
        self.layers = frozenset(layers)
        self.closed_layers = frozenset(known - self.layers)

    def decide(self, layer: int, h_ND: Tensor, state: dict[str, Any], batch: PackedBatch) -> Decision:
        if layer in self.layers:
            return Decision()
        if "left" not in state:
            state["left"] = Decision(torch.zeros(len(h_ND), dtype=torch.bool, device=h_ND.device))
        return state["left"]
