"""What a sweep runs: its runs, each with a key that says what decides it, and which of them are wanted next."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from midskip.data.labelled import is_labelled
from midskip.train.recipe import Recipe

CODE = 1  # to be raised when the same recipe would train another model, as when a default changes, or when what a
# result says changes

Losses = Mapping[str, float | None]  # by key, of the runs that have ended: held-out loss, None where the run failed


def decides(recipe: Recipe) -> dict[str, Any]:
    """What decides a run: the recipe without its folder, and without dense models beside it."""
    given = asdict(recipe)
    del given["output"]
    return given | {"dense_layers": []}


def user_code(recipe: Recipe) -> dict[str, str]:
    """SHA-256, by module, of the files of the user's own classes that the recipe names, as they were when this process
    first asked; without modules whose file cannot be read."""
    names = [recipe.model.policy, recipe.regularizer.name]
    names += [recipe.data.source] if is_labelled(recipe.data.source) else []
    modules = {name.partition(":")[0] for name in names if ":" in name and not name.startswith("midskip.")}
    return {module: found for module in modules if (found := _hash_of(module))}


@cache
def _hash_of(module: str) -> str:
    """Of a module's file; "" if that cannot be told."""
    try:
        loaded = sys.modules.get(module) or importlib.util.find_spec(module)
        file = getattr(loaded, "__file__", None) or getattr(loaded, "origin", None)
        return hashlib.sha256(Path(str(file)).read_bytes()).hexdigest()
    except Exception:  # a package beside it is imported, and raises what it likes; or it lies in an archive
        return ""


def _unlike(defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """What differs from the defaults, group by group."""
    return {
        name: _unlike(default, given[name]) if isinstance(default, dict) and default else given[name]
        for name, default in defaults.items()
        if given[name] != default
    }


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        recipe: its `output` is not that of the run.
        key: 16 hexadecimal digits; two runs with the same key would give the same result.
        label: arm, grid point and seed, for people.
    """

    recipe: Recipe
    key: str
    label: str

    @classmethod
    def of(cls, recipe: Recipe, label: str) -> Run:
        chosen = _unlike(decides(Recipe()), decides(recipe))  # so a setting that is new one day changes no key
        text = json.dumps({"recipe": chosen, "code": CODE}, sort_keys=True, separators=(",", ":"))
        return cls(recipe, hashlib.sha256(text.encode()).hexdigest()[:16], label)

    @property
    def seed(self) -> int:
        return self.recipe.training.seed


@dataclass(frozen=True)
class Point:
    """A point of an arm's grid.

    Attributes:
        settings: the values of the grid, by name.
        recipe: with these settings; seed and, where it is tuned, learning rate are those of no run.
        seeds: that are wanted.
        learning_rates: to choose among, two or more; empty if it is the recipe's own.
        tune_seed: of the runs among which it is chosen.
        tuned_at: the point whose trials choose for this one too; by default this one.
    """

    arm: str
    settings: dict[str, Any]
    recipe: Recipe
    seeds: tuple[int, ...]
    learning_rates: tuple[float, ...] = ()
    tune_seed: int = 0
    tuned_at: Point | None = None
    _runs: dict[tuple[int, float | None], Run] = field(default_factory=dict, compare=False, repr=False)

    @property
    def label(self) -> str:
        values = (f"{name.rpartition('.')[2]}={show(value)}" for name, value in self.settings.items())
        return " ".join([self.arm, *values])

    def run(self, seed: int, learning_rate: float | None = None) -> Run:
        """That run."""
        if (seed, learning_rate) in self._runs:
            return self._runs[seed, learning_rate]
        changed = {"seed": seed} | ({} if learning_rate is None else {"learning_rate": learning_rate})
        label = f"{self.label} seed={seed}" + ("" if learning_rate is None else f" learning_rate={learning_rate:g}")
        run = Run.of(replace(self.recipe, training=replace(self.recipe.training, **changed)), label)
        return self._runs.setdefault((seed, learning_rate), run)

    def trials(self) -> list[Run]:
        """The runs among which the learning rate is chosen."""
        return [(self.tuned_at or self).run(self.tune_seed, rate) for rate in self.learning_rates]

    def own_runs(self, losses: Losses) -> dict[str, Run]:
        """Those that are known, by key, without trials of another point."""
        trials = self.trials() if self.tuned_at is None else []
        return {run.key: run for run in (*trials, *self.of_seeds(losses).values())}

    def learning_rate(self, losses: Losses) -> float | None:
        """The best of `learning_rates` by held-out loss, the first of equals; a trial that failed loses. None as long
        as a trial has not ended, and where none succeeded. The recipe's where there are none to choose among."""
        trials = self.trials()
        if not trials:
            return self.recipe.training.learning_rate
        if any(trial.key not in losses for trial in trials):
            return None
        found = [
            loss if loss is not None and not math.isnan(loss) else math.inf for loss in map(losses.get, keys(trials))
        ]
        best = min(range(len(found)), key=found.__getitem__)
        return self.learning_rates[best] if found[best] < math.inf else None

    def of_seeds(self, losses: Losses) -> dict[int, Run]:
        """The run of each seed, as far as it is known: before the learning rate is chosen, of none."""
        if not self.learning_rates:
            return {seed: self.run(seed) for seed in self.seeds}
        rate = self.learning_rate(losses)
        return {} if rate is None else {seed: self.run(seed, rate) for seed in self.seeds}

    def num_runs(self) -> int:
        """Once the learning rate is chosen; without trials of another point."""
        if not self.learning_rates or self.tuned_at is not None:
            return len(self.seeds)
        return len(set(self.seeds) - {self.tune_seed}) + len(self.learning_rates)


@dataclass(frozen=True)
class Sweep:
    """A sweep, as its file says.

    Attributes:
        path: the file.
        folder: the folder that paths in recipes are relative to.
        output: the folder of the sweep.
        points: of all arms, in order.
        keep_runs: whether run folders keep weights and checkpoints.
    """

    path: Path
    folder: Path
    output: Path
    points: tuple[Point, ...]
    keep_runs: bool = False

    def num_runs(self) -> int:
        """The most that it can have: a run of two points counts twice."""
        return sum(point.num_runs() for point in self.points)

    def runs(self, losses: Losses) -> list[Run]:
        """All runs that are known to be wanted, each key once: trials first, then seed by seed."""
        found: dict[str, Run] = {}
        for run in self._runs(losses):
            found.setdefault(run.key, run)
        return list(found.values())

    def _runs(self, losses: Losses) -> Iterator[Run]:
        for point in self.points:
            yield from point.trials()
        of_points = [point.of_seeds(losses) for point in self.points]
        for seed in dict.fromkeys(seed for point in self.points for seed in point.seeds):
            yield from (runs[seed] for runs in of_points if seed in runs)

    def index(self, losses: Losses) -> dict[str, Any]:
        """What `sweep.json` says."""
        arms: dict[str, list[dict[str, Any]]] = {}
        for point in self.points:
            row: dict[str, Any] = {"settings": point.settings}
            row["seeds"] = {str(seed): run.key for seed, run in point.of_seeds(losses).items()}
            row["trials"] = max(1, len(point.learning_rates))
            row["learning_rate"] = point.learning_rate(losses)
            if point.tuned_at is not None:
                row["tuned_at"] = point.tuned_at.label
            if trials := point.trials():
                row["tuning"] = [
                    {"learning_rate": rate, "seed": point.tune_seed, "key": trial.key}
                    for rate, trial in zip(point.learning_rates, trials, strict=True)
                ]
            arms.setdefault(point.arm, []).append(row)
        return {
            "sweep": str(self.path),
            "code": CODE,
            "arms": [{"name": name, "points": rows} for name, rows in arms.items()],
        }


def keys(runs: list[Run]) -> list[str]:
    return [run.key for run in runs]


def show(value: Any) -> str:
    """A setting's value, in short."""
    return value if isinstance(value, str) else json.dumps(value)
