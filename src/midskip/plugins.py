"""Classes of outside authors, by import path or by name, without a fork; and which of them a saved folder may name."""

import importlib
import inspect
import sys
from collections.abc import Collection
from importlib.metadata import distributions
from pathlib import Path

from midskip.names import near

# By kind: our package that has those built in, and the group of entry points in which other packages offer theirs.
GROUPS = {"policy": "midskip.policies", "regularizer": "midskip.regularizers", "labelled data": "midskip.data"}


def load_class(path: str, base: type, kind: str, names: tuple[str, ...]) -> type:
    """The class at "package.module:Class", or the one that an installed package offers by this name.

    This imports. What a saved folder names goes through `check_saved` first.

    Args:
        path: the import path, or the name of an entry point.
        base: the class that it must be a subclass of.
        kind: what it is, for the errors and the group of entry points: a key of `GROUPS`.
        names: the short names that would have been accepted in its place, for the errors.

    Raises:
        ValueError: no such module, class or name, two packages that offer one name, or the class is no `base`.
    """
    import torch  # not above: what help and refused arguments need of this module is only a name

    is_path = all(path.partition(":")[::2])
    module_name, _, class_name = (path if is_path else _offered_as(path, kind, names)).partition(":")
    if module_name.startswith("."):
        raise ValueError(f"{kind} {path!r} is relative; expected the whole name of a module, as package.module:Class")
    try:
        with torch.device("cpu"):  # `from_pretrained` builds models on "meta"; what a module makes for itself is real
            found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{kind} {path!r} cannot be loaded: {error}; is its module installed?") from error
    if not (inspect.isclass(found) and issubclass(found, base)):
        raise ValueError(f"{kind} {path!r} is {found!r}; expected a subclass of {base.__module__}.{base.__name__}")
    return found


def check_saved(path: object, kind: str, trust: Collection[str], where: str) -> None:
    """Refuses what a saved folder names and nobody consented to: code that it would have imported.

    Free are names without a module (of what is built in, or of an entry point), our own modules of that kind, and
    "package.module:Class" where an installed package offers just that as an entry point.

    Args:
        path: what the folder names.
        kind: a key of `GROUPS`.
        trust: modules that the caller consents to, as "package.module" or "package.module:Class".
        where: what names it, for the error.

    Raises:
        ValueError: neither free nor consented to; the message says how to consent.
    """
    if not isinstance(trust, list | tuple | set | frozenset) or not all(isinstance(name, str) for name in trust):
        raise ValueError(f"trust is {trust!r}; expected a list of names of modules, as ['package.module']")
    if not isinstance(path, str) or ":" not in path:
        return
    module = path.partition(":")[0]
    is_free = module.startswith(f"{GROUPS[kind]}.") or module in {name.partition(":")[0] for name in trust}
    if is_free or path in {value for _, value in _offers(kind)}:
        return
    told = f"{where} names the {kind} {path!r}"
    if not is_module_name(module):  # nothing to type after --trust
        raise ValueError(f"{told}, which is no import path; expected 'package.module:Class'")
    raise ValueError(
        f"{told}, and a saved folder imports only what is built in or what an installed package offers as an entry "
        f"point: if you trust the module {module!r}, add --trust {module} to the command, or trust=[{module!r}] to the "
        "call in Python"
    )


def is_module_name(text: str) -> bool:
    """Whether it can be the name of a module, "package.module"."""
    return all(part.isidentifier() for part in text.split("."))


def search_folder(folder: Path) -> None:
    """Modules in `folder` can be imported too, by a name that no installed one has."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _offers(kind: str) -> set[tuple[str, str]]:
    """Name and "package.module:Class" of all that installed packages offer. The current folder is no installation:
    what lies there may have been downloaded."""
    here = Path.cwd().resolve()
    places = [place for place in sys.path if Path(place).resolve() != here]
    return {
        (entry.name, f"{entry.module}:{entry.attr}")
        for distribution in distributions(path=places)
        for entry in distribution.entry_points
        if entry.group == GROUPS.get(kind)
    }


def _offered_as(name: str, kind: str, names: tuple[str, ...]) -> str:
    offers = _offers(kind)
    found = sorted(value for offered, value in offers if offered == name)
    if len(found) > 1:
        raise ValueError(
            f"{kind} {name!r} is offered by several installed packages, as {', '.join(found)}: give one of these paths"
        )
    if not found:
        names += tuple(sorted({offered for offered, _ in offers}))
        known = ", ".join(map(repr, names))
        raise ValueError(
            f"unknown {kind} {name!r}; expected one of {known} or 'package.module:Class'{near(name, names)}"
        )
    return found[0]
