"""The folder that `midskip sweep` writes: which runs there are, and what each gave. Nothing else here knows its format.

sweep.json         {"arms": [{"name", "points": [{"settings", "seeds": {SEED: KEY}, "trials", "learning_rate"}]}]}
results/KEY.json   {"recipe", "seed", "report", "training_flops", "seconds", "machine"}
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

SWEEP_FILE, RESULTS_FOLDER, FAILED_FOLDER = "sweep.json", "results", "failed"
OF_CODE = ("commit", "midskip")  # in what a result says of its machine


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


@dataclass
class Point:
    """A point of an arm's grid: what its seeds gave, by seed.

    missing: by seed, the keys of results that are not there; failed: those of them whose run has failed, and why.
    A point whose learning rate is still being chosen has no seeds yet.
    """

    arm: str
    settings: dict[str, Any]
    trials: int | None
    learning_rate: float | None
    runs: dict[str, Run] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def dense(self) -> bool:
        return any(run.dense for run in self.runs.values())


def read_points(folder: str | Path) -> list[Point]:
    """All points, those without any result too.

    Raises:
        ValueError: no such folder, no sweep or no result in it, or a file that has not what it should.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {str(folder)!r}; expected one that `midskip sweep` writes")
    if not (folder / SWEEP_FILE).is_file():
        raise ValueError(f"{str(folder)!r} has no {SWEEP_FILE}; expected a folder that `midskip sweep` writes")
    sweep = _json(folder / SWEEP_FILE)
    points = []
    try:
        for arm in sweep["arms"]:
            for row in arm["points"]:
                rate = row.get("learning_rate")
                trials = row.get("trials")
                point = Point(str(arm["name"]), dict(row["settings"]), trials if trials is None else int(trials), rate)
                for seed, key in sorted(row["seeds"].items(), key=lambda item: (len(item[0]), item[0])):
                    _read_result(folder, point, seed, key)
                points.append(point)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(folder / SWEEP_FILE)!r} is no list of arms and points: {error!r}") from error
    if not any(point.runs for point in points):
        where = str(folder / RESULTS_FOLDER)
        raise ValueError(f"{where!r} has none of the results that {SWEEP_FILE} names: let `midskip sweep` finish a run")
    return points


def _read_result(folder: Path, point: Point, seed: str, key: str) -> None:
    if not seed.isdecimal():
        raise ValueError(f"{str(folder / SWEEP_FILE)!r} has a seed {seed!r}; expected a whole number")
    if Path(key).name != key:
        raise ValueError(f"the key {key!r} in {str(folder / SWEEP_FILE)!r} is no name of a file in {RESULTS_FOLDER}")
    file = folder / RESULTS_FOLDER / f"{key}.json"
    if not file.is_file():
        point.missing[seed] = key
        failure = folder / FAILED_FOLDER / f"{key}.txt"
        if failure.is_file():
            point.failed[seed] = failure.read_text(encoding="utf-8", errors="replace").strip()
        return
    result = _json(file)
    try:
        run = _run(result)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{str(file)!r} is no result of a run: {error!r}") from error
    if str(result.get("seed", seed)) != seed:
        raise ValueError(f"{str(file)!r} is of seed {result['seed']}; {SWEEP_FILE} names it for seed {seed}")
    if any(other.dense != run.dense for other in point.runs.values()):
        raise ValueError(
            f"{str(file)!r} and another seed of its point in {SWEEP_FILE} differ in whether they are dense"
        )
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
