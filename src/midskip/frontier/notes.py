"""What limits a comparison, in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from midskip.frontier.envelope import Envelope
from midskip.frontier.intervals import CONFIDENCE
from midskip.frontier.labels import NAME_LENGTH, SETTINGS_LENGTH, settings_label, shortened
from midskip.frontier.read import COSTS, Point, timed_alike

SHOWN = 6  # names in a note


def remarks_on(point: Point, others: Sequence[Point], called: str = "dense") -> list[str]:
    """What makes the comparison with these unequal, though it can be made."""
    remarks = [f"{seeds_named(list(point.failed))} failed"] if point.failed else []
    theirs = {other.trials for other in others}
    if theirs != {point.trials}:
        own = "an unknown number of" if point.trials is None else point.trials
        remarks.append(f"tuned with {own} trial{'s' * (own != 1)}, {called} with {_range(theirs)}")
    if point.tuned_at is not None:
        remarks.append(f"learning rate of {shortened(point.tuned_at, SETTINGS_LENGTH)}")
    if elsewhere := sum(other.tuned_at is not None for other in others):
        remarks.append(f"learning rate tried at another for {elsewhere} of {len(others)} {called} models")
    tokens = {run.num_tokens for run in point.runs.values()} - {None}
    their_tokens = {run.num_tokens for other in others for run in other.runs.values()} - {None}
    if tokens and their_tokens and tokens != their_tokens:
        remarks.append(f"trained on {_range(tokens)} tokens, {called} on {_range(their_tokens)}")
    return remarks


def notes_on(
    points: Sequence[Point],
    dense: Sequence[Point],
    seeds: Sequence[str],
    envelopes: Mapping[str, dict[str, Envelope]],
    missing: Sequence[Mapping[str, Any]],
    unknown: Sequence[str],
    against: str | None,
) -> list[str]:
    notes = []
    if missing:
        count = len(missing) + sum(len(point.runs) for point in points)
        named = [
            f"{point_name(row['arm'], row['settings'])}, seed {row['seed']}{' (failed)' * bool(row['failed'])}"
            for row in missing[:SHOWN]
        ]
        named += ["..."] * (len(missing) > SHOWN)
        notes.append(f"{len(missing)} of {count} results are missing: {'; '.join(named)}")
    if unknown:
        named = [*unknown[:SHOWN], *["..."] * (len(unknown) > SHOWN)]
        notes.append(f"learning rate not chosen yet: {'; '.join(named)}")
    if unused := [seed for point in dense for seed in point.runs if seed not in seeds]:
        notes.append(f"{seeds_named(sorted(set(unused)))} not used: not every dense model has it")
    for cost, found in envelopes.items():
        count = sum(all(cost in point.runs[seed].costs for seed in seeds) for point in dense)
        if count < len(dense):
            notes.append(f"{COSTS[cost].heading}: measured for {count} of {len(dense)} dense models")
        if not all(envelope.knots for envelope in found.values()):
            notes.append(f"{COSTS[cost].heading}: a seed has no dense model with a finite loss")
    timed = any("seconds" in point.runs[seed].costs for point in dense for seed in seeds)
    if timed and not timed_alike(dense, seeds):
        notes.append(f"{COSTS['seconds'].heading}: left out, since the dense models did not run on one machine")
    if diverged := sum(math.isinf(run.loss) for point in points for run in point.runs.values()):
        notes.append(f"results without a finite loss: {diverged}")
    compared = sum(not point.dense for point in points) if against is None else len(points) - 1
    if compared:
        other = "dense models" if against is None else shortened(against, NAME_LENGTH)
        chance = f"{(1 - CONFIDENCE):.0%} of intervals leave 0 out by chance"
        notes.append(f"{compared} points compared with {other}; {chance} where there is no difference")
    return notes


def point_name(arm: str, settings: Mapping[str, Any]) -> str:
    return f"{shortened(arm, NAME_LENGTH)} ({shortened(settings_label(settings), SETTINGS_LENGTH)})"


def seeds_named(seeds: Sequence[str]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}"


def _range(values: Iterable[int | None]) -> str:
    known = sorted(value for value in values if value is not None)
    if not known:
        return "an unknown number"
    return f"{known[0]:,}" if known[0] == known[-1] else f"{known[0]:,} to {known[-1]:,}"
