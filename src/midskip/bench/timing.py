"""Times of several sides in turns, and what is said of them."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

WARM_UP_TURNS = 1


def quantile(values: Sequence[float], share: float) -> float:
    """The value that `share` of all lie below, between two of them in proportion."""
    if not values or not 0 <= share <= 1:
        raise ValueError(f"asked for the quantile {share} of {len(values)} values; expected 0 to 1 of at least one")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    return ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    return {name: quantile(values, share) for name, share in (("median", 0.5), ("lower", 0.25), ("upper", 0.75))}


def stretch_mean(repeats: Sequence[Sequence[float]]) -> float:
    """The mean over a stretch of steps, each the median of its repeats, which all did the same work."""
    return statistics.mean(statistics.median(step) for step in zip(*repeats, strict=True))


def interleave(
    begin: Mapping[str, Callable[[], Callable[[int], Any]]],
    num_steps: int,
    repeats: int,
    order: random.Random,
    wait: Callable[[], None],
    tick: Callable[[], None] = lambda: None,
) -> dict[str, list[list[float]]]:
    """Seconds of each step of each side, [repeats][num_steps], after one turn that is not counted.

    Every turn takes one step of each side in an order drawn anew, then the next step: what the machine does besides
    falls on all alike.

    Args:
        begin: for each side, makes ready for a stretch (not timed) and gives what takes its step.
        wait: returns when the device has done all that it was given.
        tick: called after each stretch of a side.
    """
    seconds: dict[str, list[list[float]]] = {name: [] for name in begin}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # it would strike some side now and then
    try:
        for turn in range(WARM_UP_TURNS + repeats):
            steps = {name: make() for name, make in begin.items()}
            times: dict[str, list[float]] = {name: [] for name in begin}
            for step in range(num_steps):
                for name in order.sample(list(steps), len(steps)):
                    wait()
                    start_s = time.perf_counter()
                    kept = steps[name](step)
                    wait()
                    times[name].append(time.perf_counter() - start_s)
                    del kept  # giving memory back is not timed
            for name in begin:
                if turn >= WARM_UP_TURNS:
                    seconds[name].append(times[name])
                tick()
    finally:
        if collecting:
            gc.enable()
    return seconds


def waiter(device: torch.device | str) -> Callable[[], None]:
    """What returns when the device has done all that it was given."""
    device = torch.device(device)
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None
