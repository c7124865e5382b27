"""The lowest loss that dense models reach for a cost."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np


class Envelope:
    """The running minimum of the loss, cheapest model first, interpolated linearly in the logarithm of the cost.

    Attributes:
        knots: (cost, loss) of the models that have a lower loss than every cheaper one; costs rise, losses fall.
        cheapest, dearest: the range of costs, of all models. Beyond it nothing is known, and nothing is made up.

    A model that is no knot changes nothing but the range: behind the last knot the envelope is flat. Models without a
    finite loss or a cost above 0 are left out.
    """

    def __init__(self, points: Iterable[tuple[float, float]]):
        usable = sorted((cost, loss) for cost, loss in points if 0 < cost < math.inf and math.isfinite(loss))
        self.knots: list[tuple[float, float]] = []
        for cost, loss in usable:
            if not self.knots or loss < self.knots[-1][1]:
                self.knots.append((cost, loss))
        self.cheapest, self.dearest = (usable[0][0], usable[-1][0]) if usable else (math.inf, -math.inf)
        self._logs = [math.log(cost) for cost, _ in self.knots]
        self._losses = [loss for _, loss in self.knots]

    def at(self, cost: float) -> float | None:
        """The loss at this cost, or None outside the range."""
        if not self.cheapest <= cost <= self.dearest:
            return None
        return float(np.interp(math.log(cost), self._logs, self._losses))

    def cost_at(self, loss: float) -> float | None:
        """The lowest cost at which the envelope has this loss, or None where it never has."""
        if not self.knots or not self._losses[-1] <= loss <= self._losses[0]:
            return None
        return math.exp(np.interp(loss, self._losses[::-1], self._logs[::-1]))
