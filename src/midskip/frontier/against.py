"""Every point of a sweep against one of them, seed by seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from midskip.frontier.intervals import mean_interval
from midskip.frontier.labels import settings_label, short_names
from midskip.frontier.notes import remarks_on
from midskip.frontier.read import COSTS, Point, on_one_machine
from midskip.names import near

LEAST_SEEDS = 3  # for a verdict


def point_named(points: Sequence[Point], name: str) -> Point:
    """The point of that name: of an arm, for its first point, or of an arm and its settings as the table shows them,
    for example `dense num_hidden_layers=12`.

    Raises:
        ValueError: none has it, or that point has no result.
    """
    short = short_names([point.settings for point in points if point.runs])  # as in the table
    known: dict[str, Point] = {}
    for point in points:
        for name_of in (point.arm, f"{point.arm} {settings_label(point.settings, short)}"):
            known.setdefault(name_of, point)
    if name not in known:
        arms = ", ".join(repr(arm) for arm in dict.fromkeys(point.arm for point in points))
        raise ValueError(
            f"no arm is called {name!r}{near(name, known)}; expected one of {arms}, or one of these and its settings"
        )
    if not known[name].runs:
        label = f"{known[name].arm} {settings_label(known[name].settings, short)}".rstrip()
        raise ValueError(f"{label!r}, for which {name!r} stands, has no result: name a point that has one")
    return known[name]


def difference(point: Point, other: Point) -> dict[str, Any]:
    """How `point` differs from `other` in the seeds that both have: distance in nats (below 0 is better), distances by
    seed, interval [low, high] and verdict as in docs/comparing.md; cost_percents by cost, the mean over these seeds,
    below 0 if `point` is the cheaper one."""
    none = {"distance": None, "distances": {}, "interval": None, "cost_percents": {}, "remarks": []}
    if point is other:
        return {**none, "verdict": "itself"}
    seeds = [seed for seed in point.runs if seed in other.runs]
    runs = [(point.runs[seed], other.runs[seed]) for seed in seeds]
    every = [run for pair in runs for run in pair]
    if not every:
        return {**none, "verdict": "no seed in common"}
    if not all(math.isfinite(run.loss) for run in every):
        return {**none, "verdict": "no finite loss"}
    if len({run.num_targets for run in every} - {None}) > 1:
        return {**none, "verdict": "not evaluated on the same text"}
    distances = {seed: mine.loss - theirs.loss for seed, (mine, theirs) in zip(seeds, runs, strict=True)}
    interval = mean_interval(list(distances.values()))
    known = COSTS if on_one_machine(every) else [cost for cost in COSTS if cost != "seconds"]
    shared = [cost for cost in known if all(cost in run.costs for run in every)]
    return {
        "distance": fmean(distances.values()),
        "distances": distances,
        "interval": interval and list(interval),
        "cost_percents": {
            cost: fmean(100 * (mine.costs[cost] / theirs.costs[cost] - 1) for mine, theirs in runs) for cost in shared
        },
        "verdict": verdict(interval, len(seeds), "lower loss", "higher loss"),
        "remarks": remarks_on(point, [other], "the other"),
    }


def verdict(interval: Sequence[float] | None, num_seeds: int, below: str, above: str) -> str:
    """`below` if the whole interval of a distance is below 0, `above` if it is above."""
    if interval is None or num_seeds < LEAST_SEEDS:
        return f"not enough seeds ({num_seeds} of {LEAST_SEEDS})"
    return below if interval[1] < 0 else above if interval[0] > 0 else "no difference"
