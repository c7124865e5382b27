"""Times of several sides in turns, and what is said of them."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

WARM_UP_TURNS = 1


class Clock:
    """Takes the time of work on a device: on a GPU by CUDA events, which the device itself sets.

    Args:
        waits: the device is waited for before each stretch, as generation waits for each token; otherwise the host may
            run ahead, as in training. A CPU is never behind.
    """

    def __init__(self, device: torch.device | str = "cpu", waits: bool = True):
        self.device = torch.device(device)
        self.on_gpu = self.device.type == "cuda"
        self.waits = waits

    def wait(self) -> None:
        """Returns when the device has done all that it was given."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def begin(self) -> Any:
        """A mark where a stretch begins."""
        if self.waits:
            self.wait()
        return self.end()

    def end(self) -> Any:
        """A mark where one ends."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, begun: Any, ended: Any) -> float:
        """From one mark to another; the device must have been waited for."""
        return begun.elapsed_time(ended) / 1e3 if self.on_gpu else ended - begun


def quantile(values: Sequence[float], share: float) -> float:
    """The value that `share` of all lie below, between two of them in proportion."""
    if not values or not 0 <= share <= 1:
        raise ValueError(f"asked for the quantile {share} of {len(values)} values; expected 0 to 1 of at least one")
    return float(np.quantile(values, share))


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
    clock: Clock,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, list[list[float]]]:
    """Seconds of each step of each side, [repeats][num_steps], after one turn that is not counted.

    Every turn takes one step of each side in an order drawn anew, then the next step: what the machine does besides
    falls on all alike.

    Args:
        begin: for each side, makes ready for a stretch (not timed) and gives what takes its step.
        clock: of the device.
        tick: called after each stretch of a side.
    """
    seconds: dict[str, list[list[float]]] = {name: [] for name in begin}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # it would strike some side now and then
    try:
        for turn in range(WARM_UP_TURNS + repeats):
            steps = {name: make() for name, make in begin.items()}
            marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in begin}
            for step in range(num_steps):
                for name in order.sample(list(steps), len(steps)):
                    begun = clock.begin()
                    kept = steps[name](step)
                    marks[name].append((begun, clock.end()))
                    del kept  # giving memory back is not timed
            clock.wait()
            for name in begin:
                if turn >= WARM_UP_TURNS:
                    seconds[name].append([clock.seconds(*pair) for pair in marks[name]])
                tick()
    finally:
        if collecting:
            gc.enable()
    return seconds
