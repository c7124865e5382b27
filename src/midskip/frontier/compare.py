"""All points of a sweep against the envelope of its dense models."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from midskip.frontier.against import difference, point_named, verdict
from midskip.frontier.envelope import Envelope
from midskip.frontier.intervals import CONFIDENCE, mean_interval
from midskip.frontier.notes import notes_on, point_name, remarks_on, seeds_named
from midskip.frontier.read import COSTS, MEASURES, Point, on_one_machine, read_points, timed_alike

ELSEWHERE = "timed on another machine, or with other versions, than dense models"  # in the place of one


def frontier(folder: str | Path, against: str | None = None) -> dict[str, Any]:
    """Held-out loss of every point of a sweep against its costs, and its distance to dense models of the same cost.

    docs/comparing.md says how each number is found. The means of dense models are over the seeds that all of them have;
    those of another point are over the seeds that it shares with them.

    Args:
        folder: that `midskip sweep` wrote, or a file of `save_results`.
        against: the name of an arm, or of an arm and its settings, that each point is also held to.

    Returns:
        `confidence` of the intervals; `seeds` that all dense models have; `costs`, the names that were measured;
        `envelopes`, by cost, of the means (`mean`) and by seed: `knots` [[cost, loss], ...], `cheapest`, `dearest`;
        `points`, for each that has a result: arm, settings, dense, trials, learning_rate; seeds that its means are
        over; loss, losses by seed, in nats; costs and costs_by_seed; measures; remarks, in words; and `against_dense`
        by cost, None for a dense point: distance in nats (below 0 is better than dense), distances by seed, interval
        [low, high], cost_percent (of cost at equal loss, below 0 is cheaper), verdict. A dense point has `on_envelope`
        by cost instead, None where loss or cost is not known; `missing`: arm, settings, seed and key of results that
        are not there, and why the run failed, if it did; `notes`: what else limits the numbers, in words. A number that
        is not known is None. With `against`: that name, and of each point `against_other`, see
        `midskip.frontier.against`.

    Raises:
        ValueError: no folder, no result, no dense model, no seed that all dense models have, or no such arm.
    """
    points = read_points(folder)
    missing = [
        {"arm": point.arm, "settings": point.settings, "seed": seed, "key": key, "failed": point.failed.get(seed)}
        for point in points
        for seed, key in point.missing.items()
    ]
    unknown = [point_name(point.arm, point.settings) for point in points if not (point.runs or point.missing)]
    other = None if against is None else point_named(points, against)
    points = [point for point in points if point.runs]
    dense = [point for point in points if point.dense]
    if not dense:
        raise ValueError(f"{str(folder)!r} has no result of a dense model (policy: dense): there is no envelope")
    seeds = [seed for seed in dense[0].runs if all(seed in point.runs for point in dense)]
    if not seeds:
        had = "; ".join(f"{point_name(point.arm, point.settings)}: {', '.join(point.runs)}" for point in dense[:5])
        raise ValueError(f"the dense models have no seed in common, so none can be compared with others. Seeds: {had}")
    envelopes = {cost: found for cost in COSTS if (found := _envelopes(dense, seeds, cost))}
    rows = [_row(point, dense, seeds, envelopes) for point in points]
    if other is not None:
        for row, point in zip(rows, points, strict=True):
            row["against_other"] = difference(point, other)
    return {
        "confidence": CONFIDENCE,
        "against": against,
        "seeds": seeds,
        "costs": list(envelopes),
        "envelopes": {
            cost: {
                name: {"knots": envelope.knots, "cheapest": envelope.cheapest, "dearest": envelope.dearest}
                for name, envelope in found.items()
                if envelope.knots
            }
            for cost, found in envelopes.items()
        },
        "points": rows,
        "missing": missing,
        "notes": notes_on(points, dense, seeds, envelopes, missing, unknown, against),
    }


def _envelopes(dense: Sequence[Point], seeds: Sequence[str], cost: str) -> dict[str, Envelope]:
    """By seed, and of the means; empty where no dense model has this cost for all seeds, or seconds of several machines
    would be one envelope."""
    usable = [point for point in dense if all(cost in point.runs[seed].costs for seed in seeds)]
    if not usable or (cost == "seconds" and not timed_alike(usable, seeds)):
        return {}
    found = {
        seed: Envelope((point.runs[seed].costs[cost], point.runs[seed].loss) for point in usable) for seed in seeds
    }
    means = [(_mean_cost(point, seeds, cost), _mean_loss(point, seeds)) for point in usable]
    return {"mean": Envelope((mean, loss) for mean, loss in means if mean is not None), **found}


def _row(
    point: Point, dense: Sequence[Point], dense_seeds: Sequence[str], envelopes: Mapping[str, dict[str, Envelope]]
) -> dict[str, Any]:
    paired = [seed for seed in point.runs if seed in dense_seeds]
    seeds = paired or list(point.runs)
    used = [point.runs[seed] for seed in seeds]
    loss = _mean_loss(point, seeds)
    costs = {cost: mean for cost in envelopes if (mean := _mean_cost(point, seeds, cost)) is not None}
    measures = {name: [run.measures[name] for run in used if name in run.measures] for name in MEASURES}
    row = {
        "arm": point.arm,
        "settings": point.settings,
        "dense": point.dense,
        "trials": point.trials,
        "learning_rate": point.learning_rate,
        "seeds": seeds,
        "loss": _finite(loss),
        "losses": {seed: _finite(run.loss) for seed, run in point.runs.items()},
        "costs": costs,
        "costs_by_seed": {seed: run.costs for seed, run in point.runs.items()},
        "measures": {name: fmean(values) for name, values in measures.items() if values},
        "remarks": [] if point.dense else remarks_on(point, dense),
        "against_dense": None,
    }
    if point.dense:
        knots = {cost: found["mean"].knots for cost, found in envelopes.items()}
        known = math.isfinite(loss)
        row["on_envelope"] = {
            cost: (costs[cost], loss) in knots[cost] if known and cost in costs else None for cost in envelopes
        }
    else:
        row["against_dense"] = {cost: _against(point, dense, paired, cost, found) for cost, found in envelopes.items()}
    return row


def _against(
    point: Point, dense: Sequence[Point], paired: Sequence[str], cost: str, envelopes: Mapping[str, Envelope]
) -> dict[str, Any]:
    none = {"distance": None, "distances": {}, "interval": None, "cost_percent": None}
    if reason := _no_distance(point, dense, paired, cost, envelopes):
        return {**none, "verdict": reason}
    distances, percents = {}, []
    for seed in paired:
        run, envelope = point.runs[seed], envelopes[seed]
        expected, equal = envelope.at(run.costs[cost]), envelope.cost_at(run.loss)
        assert expected is not None  # else there was a reason
        distances[seed] = run.loss - expected
        percents.append(None if equal is None else 100 * (run.costs[cost] / equal - 1))
    interval = mean_interval(list(distances.values()))
    return {
        "distance": fmean(distances.values()),
        "distances": distances,
        "interval": interval and list(interval),
        "cost_percent": None if None in percents else fmean(percents),
        "verdict": verdict(interval, len(paired), "better", "worse"),
    }


def _no_distance(
    point: Point, dense: Sequence[Point], paired: Sequence[str], cost: str, envelopes: Mapping[str, Envelope]
) -> str | None:
    """Why the point has no distance at this cost, in words; None if it has one."""
    runs = {seed: point.runs[seed] for seed in paired}
    others = [other.runs[seed] for other in dense for seed in paired]
    if not runs:
        return "no seed in common with the dense models"
    if not all(cost in run.costs for run in runs.values()):
        return "this cost was not measured"
    if diverged := [seed for seed, run in runs.items() if math.isinf(run.loss)]:
        return f"no finite loss ({seeds_named(diverged)})"
    if len({run.num_targets for run in (*runs.values(), *others)} - {None}) > 1:
        return "not evaluated on the text of the dense models"
    if cost == "seconds" and not on_one_machine((*runs.values(), *others)):
        return ELSEWHERE
    outside = [seed for seed, run in runs.items() if envelopes[seed].at(run.costs[cost]) is None]
    if outside:
        some = f" ({seeds_named(outside)})" if len(outside) < len(runs) else ""
        return f"outside the dense range{some}"
    return None


def _mean_loss(point: Point, seeds: Iterable[str]) -> float:
    return fmean(point.runs[seed].loss for seed in seeds)


def _mean_cost(point: Point, seeds: Iterable[str], cost: str) -> float | None:
    costs = [point.runs[seed].costs.get(cost) for seed in seeds]
    return None if None in costs else fmean(costs)  # pyright: ignore[reportArgumentType]


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None
