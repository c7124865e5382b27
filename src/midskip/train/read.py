"""A recipe from YAML and the command line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import yaml
from jsonargparse import SUPPRESS, ArgumentParser
from yaml.composer import ComposerError

from midskip.names import near
from midskip.train.recipe import GROUPS, Recipe


def recipe_parser() -> ArgumentParser:
    """The settings of a recipe on the command line, as --group.name=value, and how `read_recipe` gives it a file."""
    parser = ArgumentParser("midskip train RECIPE.yaml", exit_on_error=False, allow_abbrev=False, default_env=False)
    parser.add_argument("--config", action="config", help=SUPPRESS)  # the command names the recipe by itself
    parser.add_class_arguments(Recipe, as_group=False)
    return parser


def read_recipe(path: str | Path | None = None, overrides: list[str] | None = None) -> Recipe:
    """The recipe in a YAML file, with `--group.name=value` overrides.

    Raises:
        ValueError: no such file, not YAML, an unknown setting or one of the wrong type, null where that means nothing,
            or out of range, with its name.
    """
    arguments = [] if path is None else ["--config", str(path)]
    if path is not None and not Path(path).is_file():
        raise ValueError(f"there is no recipe at {str(path)!r}; expected a YAML file")
    parser, written = recipe_parser(), None
    try:
        written = {} if path is None else read_yaml(Path(path))
        if not isinstance(written, dict):
            raise ValueError(f"it holds {written!r}; expected settings by name")
        parsed = parser.parse_args(arguments + (overrides or []))
    except Exception as error:  # jsonargparse raises its own kinds for YAML, names and types
        hints = filter(None, map(_meant, _names(written, overrides or [])))
        raise ValueError(f"the recipe cannot be used: {error}{next(hints, '')}") from error
    for name in _names(written, []):
        if (hint := _meant(name)) is not None:  # jsonargparse drops unknown names with nothing in them
            raise ValueError(f"the recipe cannot be used: there is no setting {name!r}{hint}")
    given = parsed.as_dict()
    for name, group in GROUPS.items():
        if not isinstance(given[name], dict) or "__path__" in given[name]:
            got = given[name] if not isinstance(given[name], dict) else "a file"
            raise ValueError(f"the recipe cannot be used: {name} is {got!r}; expected settings by name")
        _check_values(f"{name}.", given[name], group)
    _check_values("", given, Recipe)
    settings = {name: group(**given[name]) for name, group in GROUPS.items()}
    return Recipe(given["output"], **settings, dense_layers=given["dense_layers"])


class _Loader(yaml.SafeLoader):
    """Refuses a name that stands twice, of which PyYAML would keep the last. A date is text."""

    yaml_implicit_resolvers = {
        first: [one for one in resolvers if one[0] != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        names: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in names:
                    raise ComposerError(None, None, f"{key.value!r} stands twice", key.start_mark)
                names.add(key.value)
        return node


def read_yaml(path: Path) -> Any:
    """What a YAML file holds. Raises yaml.YAMLError, also for a name that is given twice, and UnicodeDecodeError."""
    with path.open(encoding="utf-8") as file:
        return yaml.load(file, _Loader)  # a SafeLoader


def _names(written: Any, overrides: list[str]) -> Iterator[str]:
    """Of all settings that are given, in a file and by overrides, as `group.name`, known or not; none of a file that
    holds no names."""
    if isinstance(written, dict):
        for group, settings in written.items():
            is_group = isinstance(settings, dict) and settings
            yield from (f"{group}.{name}" for name in settings) if is_group else (str(group),)
    for override in overrides:
        if override.startswith("--"):
            yield override[2:].partition("=")[0]


def _meant(name: str) -> str | None:
    """A hint at the setting that is meant by one that is not known, maybe empty; None for one that is."""
    known = {"": [one.name for one in fields(Recipe)]}
    known |= {group: [one.name for one in fields(settings)] for group, settings in GROUPS.items()}
    group, last = name.split(".")[:2] if "." in name else ("", name)
    if last in known.get(group, ()):
        return None
    elsewhere = [f"{other}.{last}".lstrip(".") for other, names in known.items() if last in names]
    if group not in known and not elsewhere:
        return near(group, GROUPS)
    return near(last, known.get(group, ())) or (f"; did you mean {elsewhere[0]!r}?" if elsewhere else "")


def _check_values(prefix: str, given: dict[str, Any], settings: type) -> None:
    """Refuses null where the annotation has no None (jsonargparse lets it pass), and numbers that nothing can count."""
    annotations = get_type_hints(settings)
    defaults = asdict(settings())
    for one in fields(settings):
        value = given[one.name]
        if value is None and NoneType not in get_args(annotations[one.name]):
            kind = one.type.__name__ if isinstance(one.type, type) else str(one.type).replace("typing.", "")
            raise ValueError(
                f"the recipe cannot be used: {prefix}{one.name} is null; expected a value of the type {kind}: "
                f"leave it out for its default, {defaults[one.name]!r}"
            )
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and abs(number) >= 2**63:
                raise ValueError(f"the recipe cannot be used: {prefix}{one.name} has {number}; expected below 2**63")
