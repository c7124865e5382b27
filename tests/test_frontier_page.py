"""The tables in docs/frontier.md are those that `midskip frontier` makes of the committed results."""

import re
from pathlib import Path

from midskip.frontier import frontier, frontier_markdown

ROOT = Path(__file__).parent.parent
TABLE = re.compile(r"<!-- midskip frontier (\S+) --cost (\w+) -->\n(.*?)\n<!-- end -->", re.DOTALL)


def test_the_tables_are_those_of_the_results() -> None:
    tables = TABLE.findall((ROOT / "docs" / "frontier.md").read_text(encoding="utf-8"))
    for file, cost, table in tables:
        assert table == frontier_markdown(frontier(ROOT / file), cost)
    assert tables
