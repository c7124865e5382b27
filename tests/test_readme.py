"""The documents: their lists are whole, their links lead somewhere. Their code is run in test_docs.py."""

import inspect
import re
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import yaml

import midskip
from midskip.policies.base import BUILT_IN
from midskip.regularizers.build import _REGULARIZERS
from midskip.report import write_idea

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "midskip"
README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


# README


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_lines_of_the_documents_fit() -> None:
    for page in PAGES:
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            assert len(line) <= 120 or line.startswith("|"), f"{page.name}, line {number}, has {len(line)} characters"


# docs


def tree() -> Iterator[tuple[Path, str]]:
    """The paths in the list of files, and what is said of each."""
    section = ARCHITECTURE.split("\n## Files\n")[1].split("\n## ")[0]
    folders: list[str] = []
    for line in filter(str.strip, section.splitlines()):
        indent, name, text = re.fullmatch(r"( +)(\S+) *(.*)", line).groups()
        depth = len(indent) // 2 - 2
        folders = folders[:depth]
        yield ROOT.joinpath(*folders, name), text
        if name.endswith("/"):
            folders.append(name)
        else:
            assert text, f"nothing is said of {name}"


def settings(parameters: Iterable[tuple[str, Any]]) -> str:
    """As the tables of settings have them."""
    shown = (f"`{name}`" if given is inspect.Parameter.empty else f"`{name}` {given}" for name, given in parameters)
    return ", ".join(shown) or "none"


def test_the_tables_of_settings_are_those_of_the_code() -> None:
    rows: dict[str, list[str]] = {"policies": [], "regularizers": []}
    for name, path in BUILT_IN.items():
        policy = resolve_name(path)
        parameters = list(inspect.signature(policy).parameters.values())[3:]
        can = "yes" if policy.adjustable else "no"
        rows["policies"].append(f"| `{name}` | {settings((one.name, one.default) for one in parameters)} | {can} |")
    for name, (family, fixed, defaults) in _REGULARIZERS.items():
        parameters = list(inspect.signature(family).parameters.values())[1:]
        left = ((one.name, defaults.get(one.name, one.default)) for one in parameters if one.name not in fixed)
        rows["regularizers"].append(f"| `{name}` | {settings(left)} |")
    for page, expected in rows.items():
        table = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8").split("\n## Settings\n")[1].split("\n\n")[1]
        assert table.splitlines()[2:] == expected, page


def test_the_list_of_files_is_whole() -> None:
    listed = dict(tree())
    for path, text in listed.items():
        assert path.exists(), f"{path} is listed and nowhere else"
        if path.is_dir():
            for name in re.findall(r"[\w-]+\.(?:md|yaml)", text):
                assert (path / name).is_file(), f"{name} is listed and not in {path}"
    # what a folder's own __init__ gives is said of its files
    files = {path for path in PACKAGE.parent.rglob("*.py") if path.name != "__init__.py" or path.parent == PACKAGE}
    assert {path for path in listed if path.suffix == ".py"} == files
    names = [
        "".join(parts)
        for pattern in listed[ROOT / "recipes"].split(", ")
        for parts in product(*(part.strip("{}").split(",") for part in re.findall(r"{[^}]+}|[^{}]+", pattern)))
    ]
    assert sorted(names) == [recipe.stem for recipe in RECIPES]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert "://" in link or (page.parent / link).exists(), f"{page.name} links to {link}, which is not there"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_tests_named_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:tests|docs|recipes|benchmarks|src)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), f"{page.name} names {name}, which is not there"
    parts = "|".join(folder.name for folder in PACKAGE.iterdir() if folder.is_dir())
    for name in re.findall(rf"`((?:{parts})/[\w./-]+)`", text):
        assert (PACKAGE / name).exists(), f"{page.name} names {name}, which is not there"


def test_the_picture_of_the_idea_is_the_one_we_draw(tmp_path: Path) -> None:
    write_idea(tmp_path / "idea.svg")
    assert (tmp_path / "idea.svg").read_bytes() == (ROOT / "docs" / "idea.svg").read_bytes()


def test_the_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == midskip.__version__ and citation["cff-version"] == "1.2.0"
    assert f"## [{midskip.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
