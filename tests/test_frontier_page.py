"""The tables in docs/frontier.md are those that `midskip frontier` and scripts in `benchmarks` make of the committed
results."""

import json
import re
from importlib import import_module
from pathlib import Path

import pytest

from midskip.frontier import frontier, frontier_markdown

ROOT = Path(__file__).parent.parent
OF_RUNS = re.compile(r"<!-- benchmarks/(reasons|agreement).py (\S+) -->\n(.*?)\n<!-- end -->", re.DOTALL)
TABLE = re.compile(r"<!-- midskip frontier (\S+) --cost (\w+) -->\n(.*?)\n<!-- end -->", re.DOTALL)


def test_the_tables_are_those_of_the_results() -> None:
    tables = TABLE.findall((ROOT / "docs" / "frontier.md").read_text(encoding="utf-8"))
    for file, cost, table in tables:
        assert table == frontier_markdown(frontier(ROOT / file), cost)
    assert tables


def test_the_tables_of_runs_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    found = OF_RUNS.findall((ROOT / "docs" / "frontier.md").read_text(encoding="utf-8"))
    for script, file, table in found:
        assert table == import_module(script).table(json.loads((ROOT / file).read_text())["runs"])
    results = ROOT / "benchmarks" / "results"
    expected = {file.name for kind in ("reasons", "agreement") for file in results.glob(f"*_{kind}.json")}
    assert {Path(file).name for _, file, _ in found} == expected, "no result is left out"
