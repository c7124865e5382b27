"""Policies for tests and benchmarks: a share of block-tokens that is skipped, imposed and not learned.

N packed tokens, L layers.
"""

from typing import Any

import torch
from torch import Tensor

from midskip.model.packing import PackedBatch
from midskip.policies.base import Policy
from midskip.policies.decision import Decision
from midskip.policies.difficulty import drawn
from midskip.policies.middle_out import MiddleOut

NUM_DRAWN = 2**16  # numbers of each kind; positions that lie so far apart share theirs
LARGEST_SEED = 2**32


class FixedDepths(Policy):
    """Random nested depths that depend on nothing but a token's position: a token runs the first d layers and the
    last d, with d drawn so that `skip_share` of all block-tokens are skipped on average, evenly spread. The numbers
    are drawn once and looked up, so that deciding costs next to nothing. Rows of a batch keep the same columns unless
    their positions differ.

    Args:
        skip_share: share of block-tokens skipped, in [0, 1].
        fractional: gates of the tokens present are drawn from (0.5, 1) and differ by layer; otherwise they are 1
            and left out.
        seed: of the draw, from 0 to `LARGEST_SEED`.
    """

    is_mirrored = True

    def __init__(
        self, num_layers: int, width: int, initializer_range: float = 0.02, skip_share: float = 0.5,
        fractional: bool = False, seed: int = 0,
    ):  # fmt: skip
        super().__init__(num_layers, width, initializer_range)
        if not 0 <= skip_share <= 1:
            raise ValueError(f"skip_share is {skip_share!r}; expected a number from 0 to 1")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= LARGEST_SEED:
            raise ValueError(f"seed is {seed!r}; expected a whole number from 0 to {LARGEST_SEED}")
        self.skip_share, self.fractional, self.seed = skip_share, fractional, seed
        self.num_gates = (num_layers + 1) // 2
        self._drawn: dict[int, Tensor] = {}

    def decide(self, layer: int, h_ND: Tensor, state: dict[str, Any], batch: PackedBatch) -> Decision:
        if layer == 0:
            state["decisions"] = [self._decision(gate, batch) for gate in range(self.num_gates)]
            batch.count([decision.keep_N for decision in state["decisions"]])
        return state["decisions"][min(layer, self.num_layers - 1 - layer)]

    def _decision(self, layer: int, batch: PackedBatch) -> Decision:
        # the layer that a token leaves at is spread evenly and has the mean that gives the share asked for
        spread = self.num_gates * 2 * min(self.skip_share, 1 - self.skip_share)
        leaves_N = self.num_gates * max(0, 1 - 2 * self.skip_share) + spread * self._uniform(0, batch)
        keep_N = leaves_N.round() > layer
        gate_N = 0.5 + 0.5 * self._uniform(layer + 1, batch) if self.fractional else None
        return Decision(None if self.skip_share == 0 else keep_N, gate_N, gate_N)

    def _uniform(self, stream: int, batch: PackedBatch) -> Tensor:
        """float32 [N] in [0, 1), the same for the same position."""
        device = batch.position_N.device
        if stream not in self._drawn or self._drawn[stream].device != device:
            generator = torch.Generator().manual_seed(self.seed * 1000 + stream)
            self._drawn[stream] = torch.rand(NUM_DRAWN, generator=generator).to(device)
        return self._drawn[stream][batch.position_N % NUM_DRAWN]


class Redrawn(MiddleOut):
    """Hard gates that go by a hash of tokens, which is drawn anew every `redraw_steps` optimizer steps: the control for
    what it is worth that the same tokens keep leaving."""

    counts_steps = True

    def __init__(self, num_layers: int, width: int, initializer_range: float = 0.02, redraw_steps: int = 10):
        super().__init__(num_layers, width, initializer_range, gates="hard")
        self.redraw_steps = redraw_steps

    def priority(self, token_N: Tensor, previous_N: Tensor) -> Tensor:
        return drawn(token_N, previous_N, int(self.num_steps) // self.redraw_steps)
