"""The recipe in a saved folder, read as data. (jsonargparse, for recipes of one's own, imports what they name.)"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from midskip.names import near
from midskip.train.recipe import Recipe


def read_saved_recipe(path: Path) -> Recipe:
    """The recipe that `Recipe.save` wrote. Nothing that it names is imported.

    Raises:
        ValueError: no YAML, or a setting that is not known, of the wrong type or out of range, with its name.
    """
    try:
        return _read("", yaml.safe_load(path.read_bytes()) or {}, Recipe)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"the recipe in {str(path)!r} cannot be used: {error}") from error


def _read(name: str, value: Any, kind: Any) -> Any:
    if not is_dataclass(kind):
        if isinstance(value, str) and float in (kind, *get_args(kind)):
            with suppress(ValueError):
                value = float(value)  # PyYAML takes 1e-3 for words
        if not _fits(value, kind):
            raise ValueError(f"{name} is {value!r}; expected {_name(kind)}")
        return value
    if not isinstance(value, dict):
        raise ValueError(f"{name or 'it'} is {value!r}; expected settings by name")
    kinds, prefix = get_type_hints(kind), f"{name}." if name else ""
    for inner in value:
        if inner not in kinds:
            raise ValueError(f"there is no setting {f'{prefix}{inner}'!r}{near(str(inner), kinds)}")
    return kind(**{inner: _read(f"{prefix}{inner}", one, kinds[inner]) for inner, one in value.items()})  # pyright: ignore[reportCallIssue]


def _name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).removeprefix("typing.")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value from YAML is of the type that an annotation says."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return any(_fits(value, one) for one in arguments)
    if origin is Literal:
        return value in arguments
    if origin is list:
        return isinstance(value, list) and all(_fits(one, arguments[0]) for one in value)
    if origin is dict:
        return isinstance(value, dict) and all(isinstance(one, str) for one in value)
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, int):
        return kind in (int, float) and abs(value) < 2**63
    return isinstance(value, kind)
