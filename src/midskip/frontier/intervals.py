"""A confidence interval of a mean, by Student's t distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

CONFIDENCE = 0.9


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The two-sided t-interval of the mean of the population, at `CONFIDENCE`; None for fewer than two values."""
    if len(values) < 2:
        return None
    half = t_quantile((1 + CONFIDENCE) / 2, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def t_quantile(probability: float, degrees: int) -> float:
    """Below this value lies a t-distributed number of so many degrees of freedom with this probability (0.5 to 1).

    Found by bisection of the distribution function, which is a finite sum for whole degrees of freedom.
    """
    if not 0.5 <= probability < 1 or degrees < 1:
        got = f"probability is {probability} and degrees is {degrees}"
        raise ValueError(f"{got}; expected a probability in [0.5, 1) and at least 1 degree of freedom")
    low, high = 0.0, math.pi / 2  # of the angle whose tangent is t / sqrt(degrees)
    for _ in range(80):
        angle = (low + high) / 2
        low, high = (angle, high) if _within(angle, degrees) < 2 * probability - 1 else (low, angle)
    return math.tan(low) * math.sqrt(degrees)


def _within(angle: float, degrees: int) -> float:
    """The probability of lying between -t and t, where t is sqrt(degrees) tan(angle)."""
    odd = degrees % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for power in range(odd, degrees - 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (power + 1) / (power + 2)
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
