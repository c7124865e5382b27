"""Classes named by import path, so that an outside author adds one without a fork."""

import importlib
import inspect

import torch

from midskip.names import near


def load_class(path: str, base: type, kind: str, names: tuple[str, ...]) -> type:
    """The class at "package.module:Class".

    Args:
        path: the import path.
        base: the class that it must be a subclass of.
        kind: what it is, for the errors: "policy", "regularizer".
        names: the short names that would have been accepted in its place, for the errors.

    Raises:
        ValueError: no such module or class, or the class is no `base`.
    """
    module_name, _, class_name = path.partition(":")
    if not module_name or not class_name:
        known = ", ".join(map(repr, names))
        raise ValueError(
            f"unknown {kind} {path!r}; expected one of {known} or 'package.module:Class'{near(path, names)}"
        )
    try:
        with torch.device("cpu"):  # `from_pretrained` builds models on "meta"; what a module makes for itself is real
            found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{kind} {path!r} cannot be loaded: {error}; is its module installed?") from error
    if not (inspect.isclass(found) and issubclass(found, base)):
        raise ValueError(f"{kind} {path!r} is {found!r}; expected a subclass of {base.__module__}.{base.__name__}")
    return found
