"""Shares of work drawn step by step, each held by a scale of the scores of its own.

S shares, L layers.
"""

from __future__ import annotations

import math
from random import Random

from torch import Tensor

from midskip.regularizers import Regularizer
from midskip.regularizers.base import floats

LARGEST = 14.0  # of the log of a scale, about that of a calibration
GAIN = 2.0  # how far the log of a scale moves for a share that is off by 1


class DrawnShares(Regularizer):
    """One of several shares of block-tokens a step, drawn at random; its scale of the scores follows the share that
    really ran. So a share is held over all layers together, and how it is spread over layers and tokens is learnt.

    Args:
        num_layers: L.
        shares: of block-tokens, each above 0 and at most 1.
        score_scales: where the scales start, one a share.
        seed: of what is drawn.
    """

    changing = ("log_scales", "num_steps")

    def __init__(self, num_layers: int, shares: list[float], score_scales: list[float], seed: int = 0):
        super().__init__(num_layers)
        if not shares or not all(0 < share <= 1 for share in shares):
            raise ValueError(f"shares is {shares!r}; expected some numbers above 0 and up to 1")
        self.shares, self.seed = list(shares), seed
        self.log_scales = floats([math.log(scale) for scale in score_scales])
        self.num_steps = floats(0)

    @property
    def drawn(self) -> int:
        """Which share the step to come is for; each is drawn once in S steps, in an order that changes."""
        turn, place = divmod(int(self.num_steps), len(self.shares))
        return Random(f"{self.seed} {turn}").sample(range(len(self.shares)), len(self.shares))[place]

    @property
    def expected_share(self) -> float:
        return self.shares[self.drawn]

    @property
    def score_scales(self) -> tuple[float, ...]:
        return (math.exp(self.log_scales[self.drawn].item()),)

    def update(self, mean_L: Tensor, variance_L: Tensor, share_L: Tensor | None = None) -> None:
        assert share_L is not None
        now = self.log_scales[self.drawn].item() + GAIN * (share_L.mean().item() - self.shares[self.drawn])
        self.log_scales[self.drawn] = min(max(now, -LARGEST), LARGEST)
        self.num_steps += 1
