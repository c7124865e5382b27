"""The folder that `midskip sweep` writes: which runs there are, and what each gave. Nothing else here knows its format.

sweep.json         {"arms": [{"name", "points": [POINT]}]}, of which each POINT is
                   {"settings", "seeds": {SEED: KEY}, "trials", "learning_rate", and perhaps "tuned_at"}
results/KEY.json   {"recipe", "seed", "report", "training_flops", "seconds", "machine"}
failed/KEY.txt     why a run failed

Or one file with all of that, as `save_results` writes it: {"sweep": ..., "results": {KEY: ...}, "failed": {KEY: ...}}.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

SWEEP_FILE, RESULTS_FOLDER, FAILED_FOLDER = "sweep.json", "results", "failed"
OF_CODE = ("commit", "midskip")  # in what a result says of its machine
BY_POSITION = ("loss_by_position", "num_targets_by_position")  # of what was measured on held-out text


class Cost(NamedTuple):
    """What a model costs: `words` for an axis, `heading` for a column."""

    words: str
    heading: str


COSTS = {
    "flops": Cost("inference FLOPs a token, as executed, head included", "FLOPs a token"),
    "training_flops": Cost("training FLOPs", "training FLOPs"),
    "seconds": Cost("training time (seconds of wall-clock)", "seconds"),
    "kv_bytes": Cost("KV cache (bytes a token)", "KV bytes a token"),
}
MEASURES = ("executed_share", "accuracy", "depth_rank_correlation")  # also told where they are measured


@dataclass
class Run:
    """One trained model.

    loss: held-out, in nats; infinite where it is no finite number.
    costs: those of `COSTS` that were measured, each finite and above 0.
    measures: those of `MEASURES` that were.
    num_targets, num_tokens: predictions that were scored, and tokens trained on; None where that is not told.
    """

    dense: bool
    loss: float
    costs: dict[str, float]
    measures: dict[str, float]
    num_targets: int | None
    num_tokens: int | None
    machine: str


def on_one_machine(runs: Iterable[Run]) -> bool:
    """Else their seconds say nothing of one another."""
    return len({run.machine for run in runs}) <= 1


def timed_alike(points: Iterable[Point], seeds: Sequence[str]) -> bool:
    """Whether the runs of these seeds were on one machine."""
    return on_one_machine(point.runs[seed] for point in points for seed in seeds)


@dataclass
class Point:
    """A point of an arm's grid: what its seeds gave, by seed.

    missing: by seed, the keys of results that are not there; failed: those of them whose run has failed, and why.
    A point whose learning rate is still being chosen has no seeds yet.
    tuned_at: the name of another point, where its learning rate was tried; None if it was tried here.
    """

    arm: str
    settings: dict[str, Any]
    trials: int | None
    learning_rate: float | None
    tuned_at: str | None = None
    runs: dict[str, Run] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def dense(self) -> bool:
        return any(run.dense for run in self.runs.values())


class Results(NamedTuple):
    """What a sweep left: its `sweep.json`, and by key what a run gave and why it failed, None where it did not."""

    place: str
    sweep: dict[str, Any]
    result: Callable[[str], dict[str, Any] | None]
    failure: Callable[[str], str | None]


def read_results(place: str | Path) -> Results:
    """Of the folder of a sweep, or of a file that `save_results` wrote.

    Raises:
        ValueError: neither, or a file that cannot be read.
    """
    place = Path(place)
    if place.is_file():
        saved = _json(place)
        parts = [part for name in ("sweep", "results", "failed") if isinstance(part := saved.get(name), dict)]
        if len(parts) < 3:
            raise ValueError(f"{str(place)!r} is no file that `midskip frontier --save` writes")
        return Results(str(place), parts[0], parts[1].get, parts[2].get)
    if not place.is_dir():
        raise ValueError(
            f"there is nothing at {str(place)!r}; expected a folder that `midskip sweep` writes, or a file that "
            "`midskip frontier --save` writes"
        )
    file = place / SWEEP_FILE
    if not file.is_file():
        raise ValueError(f"{str(place)!r} has no {SWEEP_FILE}; expected a folder that `midskip sweep` writes")

    def in_folder(folder: str, key: str, ending: str) -> Path | None:
        if Path(key).name != key:
            raise ValueError(f"the key {key!r} in {str(file)!r} is no name of a file in {RESULTS_FOLDER}")
        found = place / folder / f"{key}.{ending}"
        return found if found.is_file() else None

    def result(key: str) -> dict[str, Any] | None:
        return None if (found := in_folder(RESULTS_FOLDER, key, "json")) is None else _json(found)

    def failure(key: str) -> str | None:
        found = in_folder(FAILED_FOLDER, key, "txt")
        return None if found is None else found.read_text(encoding="utf-8", errors="replace").strip()

    return Results(str(file), _json(file), result, failure)


def save_results(place: str | Path, file: str | Path) -> None:
    """Write into one file of JSON what `frontier` reads of a sweep, and the trials of learning rates; without losses by
    position.

    Raises:
        ValueError: as `read_points`.
    """
    from midskip.runs import to_json, write_atomically  # which imports torch

    found = read_results(place)
    _points(found)
    arms = found.sweep["arms"]
    keys = sorted(keys_of(arms))
    results = {key: result for key in keys if (result := found.result(key)) is not None}
    for result in results.values():
        for name in BY_POSITION:
            result["report"]["validation"].pop(name, None)
    failed = {key: why for key in keys if key not in results and (why := found.failure(key)) is not None}
    write_atomically(Path(file), to_json({"sweep": {"arms": arms}, "results": results, "failed": failed}) + "\n")


def keys_of(arms: Iterable[Mapping[str, Any]]) -> set[str]:
    """Of all runs that these arms of a `sweep.json` name, trials of learning rates too."""
    rows = [row for arm in arms for row in arm["points"]]
    return {key for row in rows for key in (*row["seeds"].values(), *(trial["key"] for trial in row.get("tuning", ())))}


def read_points(place: str | Path) -> list[Point]:
    """All points, those without any result too.

    Raises:
        ValueError: no such folder, no sweep or no result in it, or a file that has not what it should.
    """
    return _points(read_results(place))


def _points(found: Results) -> list[Point]:
    points = []
    try:
        for arm in found.sweep["arms"]:
            for row in arm["points"]:
                rate = row.get("learning_rate")
                trials = row.get("trials")
                trials = trials if trials is None else int(trials)
                tuned_at = None if row.get("tuned_at") is None else str(row["tuned_at"])
                point = Point(str(arm["name"]), dict(row["settings"]), trials, rate, tuned_at)
                for seed, key in sorted(row["seeds"].items(), key=lambda item: (len(item[0]), item[0])):
                    _take_result(found, point, seed, key)
                points.append(point)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{found.place!r} is no list of arms and points: {error!r}") from error
    if not any(point.runs for point in points):
        raise ValueError(f"none of the results that {found.place!r} names is there: let `midskip sweep` finish a run")
    return points


def _take_result(found: Results, point: Point, seed: str, key: str) -> None:
    if not seed.isdecimal():
        raise ValueError(f"{found.place!r} has a seed {seed!r}; expected a whole number")
    result, what = found.result(key), f"{key!r} of {found.place!r}"
    if result is None:
        point.missing[seed] = key
        if (why := found.failure(key)) is not None:
            point.failed[seed] = why
        return
    try:
        run = _run(result)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{what} is no result of a run: {error!r}") from error
    if str(result.get("seed", seed)) != seed:
        raise ValueError(f"{what} is of seed {result['seed']}, and is named for seed {seed}")
    if any(other.dense != run.dense for other in point.runs.values()):
        raise ValueError(f"{what} and another seed of its point differ in whether they are dense")
    point.runs[seed] = run


def _run(result: Mapping[str, Any]) -> Run:
    validation, training = result["report"]["validation"], result["report"].get("training", {})
    costs = {
        "flops": validation.get("flops_per_token"),
        "training_flops": result.get("training_flops"),
        "seconds": training.get("seconds", result.get("seconds")),
        "kv_bytes": validation.get("kv_bytes_per_token"),
    }
    loss, machine = validation["loss"], result.get("machine")
    if isinstance(machine, Mapping):
        machine = {name: value for name, value in machine.items() if name not in OF_CODE}
    return Run(
        dense=result["recipe"]["model"]["policy"] == "dense",
        loss=float(loss) if loss is not None and math.isfinite(loss) else math.inf,
        costs={name: float(cost) for name, cost in costs.items() if cost is not None and 0 < cost < math.inf},
        measures={name: float(validation[name]) for name in MEASURES if validation.get(name) is not None},
        num_targets=validation.get("num_targets"),
        num_tokens=training.get("num_tokens"),
        machine=json.dumps(machine, sort_keys=True),
    )


def _json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(file)!r} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{str(file)!r} holds {type(values).__name__}; expected an object of JSON")
    return values
