"""The tables in docs/frontier.md are those that `midskip frontier` and `benchmarks/reasons.py` make of the committed
results."""

import json
import re
from importlib import import_module
from pathlib import Path

import pytest

from midskip.frontier import frontier, frontier_markdown

ROOT = Path(__file__).parent.parent
REASONS = re.compile(r"<!-- benchmarks/reasons.py (\S+) -->\n(.*?)\n<!-- end -->", re.DOTALL)
TABLE = re.compile(r"<!-- midskip frontier (\S+) --cost (\w+) -->\n(.*?)\n<!-- end -->", re.DOTALL)


def test_the_tables_are_those_of_the_results() -> None:
    tables = TABLE.findall((ROOT / "docs" / "frontier.md").read_text(encoding="utf-8"))
    for file, cost, table in tables:
        assert table == frontier_markdown(frontier(ROOT / file), cost)
    assert tables


def test_the_table_of_reasons_is_that_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    found = REASONS.findall((ROOT / "docs" / "frontier.md").read_text(encoding="utf-8"))
    for file, table in found:
        assert table == import_module("reasons").table(json.loads((ROOT / file).read_text())["runs"])
    assert found
