"""Imports run one way through the package, and its lowest layer knows nothing of those above."""

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import midskip

PACKAGE = Path(midskip.__file__).parent
CORE = tuple(f"model.{name}" for name in ("packing", "ops", "layer_cache", "attention", "layers", "loss", "skip_path"))
ORDER = (
    (
        *CORE,
        "model.config",
        "budget.calibration",
        "budget.measured_on",
        "budget.monitor",
        "distributed",
        "names",
        "lazy",
        "plugins",
        "layer_statistics",
        "locks",
    ),
    ("policies", "regularizers", "model.cache"),
    ("model.outputs", "model.drafts", "model.generation", "card"),
    ("model.hub",),
    ("model.inputs",),
    ("model.modeling",),
    ("reference", "cost", "data", "convert", "report", "runs"),
    ("testing", "groups", "look"),
    ("evaluate", "budget.calibrate", "generate", "serving"),
    ("tasks",),
    ("train",),  # a run ends with its own evaluation and report
    ("bench", "demo", "frontier", "retrofit", "app"),
    ("sweep",),
    ("commands",),
    ("cli", "__main__"),
)
RANK = {part: rank for rank, parts in enumerate(ORDER) for part in parts}
EMPTY = ("midskip.model", "midskip.budget")  # packages whose modules stand in several rows: they import nothing


def module_name(file: Path) -> str:
    parts = ("midskip", *file.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imports(name: str, source: str, is_package: bool) -> Iterator[str]:
    """Every module that this one imports anywhere in its text."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = name.split(".")[: len(name.split(".")) - node.level + is_package]
                base = ".".join(parents + ([base] if base else []))
            submodules = [f"{base}.{alias.name}" for alias in node.names if f"{base}.{alias.name}" in MODULES]
            yield from submodules or [base]


FOUND = {
    name: sorted(set(imports(name, file.read_text(encoding="utf-8"), file.name == "__init__.py")))
    for name, file in MODULES.items()
}


def inner(name: str) -> list[str]:
    return [other for other in FOUND[name] if other.split(".")[0] == "midskip"]


def rank(name: str) -> int:
    if name in EMPTY:
        return 0
    _, *parts = name.split(".")
    part = next((part for part in (".".join(parts[:2]), parts[0]) if part in RANK), None)
    assert part, f"{name} has no place in the order of imports: give it one in this test"
    return RANK[part]


def test_packages_that_stand_in_several_rows_import_nothing() -> None:
    assert [FOUND[name] for name in EMPTY] == [[], []]


def test_the_reader_of_imports_sees_them_all() -> None:
    source = "import a.b\nfrom c import d\nfrom . import e\nfrom .f import g\ndef h():\n    from ..i import j\n"
    assert list(imports("midskip.x.y", source, False)) == ["a.b", "c", "midskip.x", "midskip.x.f", "midskip.i"]
    assert list(imports("midskip.x", "from .f import g", True)) == ["midskip.x.f"]
    assert (
        "midskip.model.packing" in FOUND["midskip.model.modeling"]
        and "midskip.model.config" in FOUND["midskip.model.modeling"]
    )


def test_imports_run_one_way() -> None:
    pairs = [(name, other) for name in MODULES if name != "midskip" for other in inner(name)]
    for name, other in pairs:
        assert other != "midskip", f"{name} imports the package itself, which imports it: name the module"
        assert rank(other) <= rank(name), f"{name} imports {other}, which stands above it"


def test_no_circle() -> None:
    graph: dict[str, set[str]] = {}
    for name in MODULES:
        wanted = {other for other in inner(name) if other != name}
        # a module of another package is loaded after that package itself
        parents = {".".join(other.split(".")[:2]) for other in wanted}
        graph[name] = wanted | {parent for parent in parents if not name.startswith(parent)}
    TopologicalSorter(graph).prepare()


def test_the_core_knows_torch_alone() -> None:
    pairs = [(name, other) for name in CORE for other in FOUND[f"midskip.{name}"]]
    for name, other in pairs:
        root = other.split(".")[0]
        known = root == "torch" or root in sys.stdlib_module_names or other.removeprefix("midskip.") in CORE
        assert known, f"{name} imports {other}"


def test_the_reference_implementation_is_for_tests_only() -> None:
    used = {name for name in MODULES if {"midskip.reference", "midskip.testing"} & set(FOUND[name])}
    used |= {name for name in MODULES for other in FOUND[name] if other.startswith("midskip.testing.")}
    # nothing is timed that does not agree with it; no other path of a user leads through it
    assert {name for name in used if not name.startswith("midskip.testing")} == {"midskip.bench.agree"}


def test_nothing_heavy_is_loaded_by_the_model() -> None:
    heavy = {"matplotlib", "rich", "jsonargparse", "tensorboard", "datasets", "accelerate"}
    seen, todo = set(), ["midskip"]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        assert not heavy & {other.split(".")[0] for other in FOUND[name]}, name
        todo += [other for other in inner(name) if other in MODULES]
    assert "midskip.model.modeling" in seen
