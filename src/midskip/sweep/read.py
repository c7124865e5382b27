"""A sweep's file, read with all its recipes, so that what is wrong is found before anything runs."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from midskip.names import near
from midskip.sweep.plan import Point, Sweep
from midskip.train.checks import check_memory, check_model, check_regularizer
from midskip.train.read import read_recipe, read_yaml
from midskip.train.recipe import GROUPS

RATE_AND_RATES = "training.learning_rate is set, and learning_rates are to be tried; expected one of them"
OF_ALL_ARMS = ("recipe", "learning_rates", "tune_at")  # may stand above the arms, for those that do not have their own
FILE_KEYS = ("output", "seeds", "arms", "settings", "tune_seed", "keep_runs", *OF_ALL_ARMS)
TUNE_AT = ("each_point", "first_point")
ARM_KEYS = ("name", "settings", "grid", *OF_ALL_ARMS)
SETTINGS = tuple(f"{group}.{field.name}" for group, settings in GROUPS.items() for field in fields(settings))
OPEN = ("data.settings", "model.policy_settings", "regularizer.settings")  # whose parts are not ours to know
SWEEPS_OWN = {
    "training.seed": "seeds of the sweep",
    "output": "output of the sweep",
    "dense_layers": "an arm of their own for dense models",
}


def read_sweep(path: str | Path) -> Sweep:
    """The sweep in a YAML file; see docs/sweeps.md.

    Raises:
        ValueError: no such file, not YAML, or anything in it, its recipes or their settings that cannot be used.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no sweep at {str(path)!r}; expected a YAML file")
    try:
        given = read_yaml(path)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"the sweep {str(path)!r} cannot be read: {error}") from error
    try:
        return _sweep(path, given)
    except ValueError as error:
        raise ValueError(f"the sweep {str(path)!r} cannot be used: {error}") from error


def _sweep(path: Path, given: Any) -> Sweep:
    given = _mapping("the file", given)
    _known("the file", given, FILE_KEYS)
    output = given.get("output")
    if not isinstance(output, str) or not output:
        raise ValueError(f"output is {output!r}; expected a folder")
    seeds = tuple(_seed("seeds", seed) for seed in _values("seeds", given.get("seeds")))
    tune_seed = _seed("tune_seed", given.get("tune_seed", seeds[0]))
    keep_runs = given.get("keep_runs", False)
    if not isinstance(keep_runs, bool):
        raise ValueError(f"keep_runs is {keep_runs!r}; expected true or false")
    of_all = _settings("settings", given.get("settings"))
    if "learning_rates" in given and "training.learning_rate" in of_all:
        raise ValueError(RATE_AND_RATES)
    arms = given.get("arms")
    if not isinstance(arms, list) or not arms:
        raise ValueError(f"arms is {arms!r}; expected a list of at least one arm")
    points: list[Point] = []
    names: dict[str, int] = {}  # and how many learning rates each tries
    firsts: dict[str, Point] = {}
    for number, arm in enumerate(arms, 1):
        arm = {key: given[key] for key in OF_ALL_ARMS if key in given} | _mapping(f"arm {number}", arm)
        name = arm.get("name")
        if not isinstance(name, str) or not name:
            raise ValueError(f"the name of arm {number} is {name!r}; expected words")
        if name in names:
            raise ValueError(f"two arms have the name {name!r}; expected different names")
        try:
            of_arm = _arm(path.parent, arm, of_all, seeds, tune_seed, firsts)
        except ValueError as error:
            raise ValueError(f"arm {name!r}: {error}") from error
        names[name], firsts[name] = len(of_arm[0].learning_rates), of_arm[0]
        points += of_arm
    tuned = {name: count for name, count in names.items() if count}
    if "tune_seed" in given and not any("learning_rates" in arm for arm in (given, *arms)):
        raise ValueError(f"tune_seed is {tune_seed} without learning_rates to try; give them, or leave tune_seed out")
    if len(set(tuned.values())) > 1:
        told = ", ".join(f"{name} {count}" for name, count in tuned.items())
        raise ValueError(
            f"arms try different numbers of learning_rates ({told}); expected as many for all, to be fair, or one for "
            "an arm that is not tuned"
        )
    return Sweep(path, Path.cwd(), Path(os.path.expanduser(output)), tuple(points), keep_runs)


def _arm(
    folder: Path, arm: dict[str, Any], of_all: dict[str, Any], seeds: tuple[int, ...], tune_seed: int,
    firsts: Mapping[str, Point],
) -> list[Point]:  # fmt: skip
    """A point for each combination of the grid's values; `firsts` are the first points of the arms above."""
    _known("an arm", arm, ARM_KEYS)
    recipe = arm.get("recipe")
    if not isinstance(recipe, str) or not recipe:
        raise ValueError(f"recipe is {recipe!r}; expected the path of a YAML file")
    beside = [place / recipe for place in (folder, Path())]
    found = next((place for place in beside if place.is_file()), None)
    if found is None:
        raise ValueError(f"there is no recipe {recipe!r}, neither beside the sweep's file nor in the current folder")
    own = _settings("settings", arm.get("settings"))
    grid = _settings("grid", arm.get("grid"))
    grid = {name: _values(f"grid: {name}", values) for name, values in grid.items()}
    for name in grid:
        if both := [one for one in own if one == name or _is_part(one, name)]:
            raise ValueError(f"{both[0]} is in settings and {name} in grid; expected one of them")
        if both := [one for one in grid if _is_part(one, name)]:
            raise ValueError(f"{name} and {both[0]}, a part of it, are in grid; expected one of them")
    rates: tuple[float, ...] = ()  # to be tried
    if "learning_rates" in arm:
        rates = tuple(map(_rate, _values("learning_rates", arm["learning_rates"])))
        if len(set(rates)) < len(rates):
            raise ValueError(f"learning_rates is {list(rates)}; expected different ones")
        if "training.learning_rate" in own.keys() | grid.keys():
            raise ValueError(RATE_AND_RATES)
        if len(rates) == 1:
            own, rates = own | {"training.learning_rate": rates[0]}, ()
    tune_at = arm.get("tune_at", TUNE_AT[0])
    if tune_at not in (*TUNE_AT, *firsts):
        raise ValueError(f"tune_at is {tune_at!r}; expected {', '.join(TUNE_AT)} or the name of an arm above")
    if "tune_at" in arm and "learning_rates" not in arm:
        raise ValueError(f"tune_at is {tune_at!r} without learning_rates to try; give them, or leave tune_at out")
    tuned_at = None
    if tune_at not in TUNE_AT:
        if firsts[tune_at].learning_rates != rates:
            raise ValueError(f"tune_at is {tune_at!r}, which tries other learning_rates; expected the same")
        tuned_at = firsts[tune_at].tuned_at or firsts[tune_at]
    points: list[Point] = []
    for values in itertools.product(*grid.values()):
        at = dict(zip(grid, values, strict=True))
        made = read_recipe(found, [f"--{name}={_argument(value)}" for name, value in _merged(of_all, own, at).items()])
        check_memory(made)
        regularizer = made.build_regularizer()
        check_regularizer(regularizer)
        check_model(made, regularizer)
        points.append(Point(arm["name"], at, made, seeds, rates, tune_seed, tuned_at))
        if tune_at == "first_point" and rates:
            tuned_at = points[0]
    return points


def _merged(*given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in the order in which they apply: what is given later wins, a whole over its parts too."""
    merged: dict[str, Any] = {}
    for settings in given:
        for name, value in settings.items():
            merged = {one: old for one, old in merged.items() if one != name and not _is_part(one, name)}
            merged[name] = value
    return merged


def _is_part(name: str, whole: str) -> bool:
    """As `regularizer.settings.outer` is of `regularizer.settings`."""
    return name.startswith(f"{whole}.")


def _known(where: str, given: Mapping[str, Any], names: Iterable[str]) -> None:
    for name in given:
        if name not in names:
            hint = near(name, names) or f"; expected some of {', '.join(names)}"
            raise ValueError(f"{where} has the key {name!r}, which is not known{hint}")


def _mapping(where: str, given: Any) -> dict[Any, Any]:
    if not isinstance(given, dict):
        raise ValueError(f"{where} is {given!r}; expected names and values")
    return given


def _settings(where: str, given: Any) -> dict[str, Any]:
    """Settings of a recipe, by their whole names."""
    given = _mapping(where, {} if given is None else given)
    for name in given:
        if name in SWEEPS_OWN:
            raise ValueError(f"{where} has {name}, which is the sweep's; expected {SWEEPS_OWN[name]}")
        inner = [group for group in OPEN if str(name).startswith(f"{group}.") and str(name) != f"{group}."]
        if name not in SETTINGS and not inner:
            raise ValueError(f"{where} has {name!r}, which is no setting of a recipe{near(name, SETTINGS)}")
    return given


def _values(where: str, given: Any) -> list[Any]:
    if not isinstance(given, list) or not given:
        raise ValueError(f"{where} is {given!r}; expected a list of at least one value")
    shown = [json.dumps(value, sort_keys=True, default=str) for value in given]
    if len(set(shown)) < len(shown):
        raise ValueError(f"{where} is {given!r}; expected each value once")
    return given


def _seed(where: str, given: Any) -> int:
    if isinstance(given, bool) or not isinstance(given, int) or not 0 <= given < 2**32:
        raise ValueError(f"{where} has {given!r}; expected whole numbers from 0 to below 2**32")
    return given


def _rate(given: Any) -> float:
    try:  # YAML takes 1e-3 for a word
        rate = float("" if isinstance(given, bool) else given)
    except (TypeError, ValueError):
        rate = -1.0
    if not 0 < rate < float("inf"):
        raise ValueError(f"learning_rates has {given!r}; expected numbers above 0")
    return rate


def _argument(value: Any) -> str:
    """A value as the command line has it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)
