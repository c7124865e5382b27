"""Write the tables of the pages in `PAGES` anew, from the results that are committed.

    python benchmarks/tables.py

A table stands between a line like `<!-- midskip frontier FILE --cost flops -->` or
`<!-- benchmarks/reasons.py FILE -->` and `<!-- end -->`; `KINDS` has all of them. The tests hold the pages to what this
writes.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import agreement
import gates
import overview
import reasons
import speed

from midskip.frontier import frontier, frontier_markdown
from midskip.runs import write_atomically

ROOT = Path(__file__).parents[1]
PAGES = tuple(ROOT / "docs" / name for name in ("frontier.md", "frontier-training.md", "results.md"))
MARKED = re.compile(
    r"(<!-- (?:midskip |benchmarks/)(\w+)(?:\.py)? (\S+)(?: --\w+ (\w+))? -->\n)(.*?)(<!-- end -->)", re.S
)


def _json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


KINDS: dict[str, Callable[[Path, str], str]] = {
    "frontier": lambda file, cost: frontier_markdown(frontier(file), cost),
    "reasons": lambda file, _: reasons.table(_json(file)["runs"]),
    "agreement": lambda file, _: agreement.table(_json(file)["runs"]),
    "gates": lambda file, _: gates.table(_json(file)["rows"]),
    "overview": lambda place, _: overview.table(place) if place.is_dir() else overview.deciders(place),
    "speed": lambda file, task: speed.table(_json(file)["rows"], task),
}


def filled(text: str) -> str:
    """The text of a page with each table as the results give it."""
    return MARKED.sub(lambda found: f"{found[1]}{KINDS[found[2]](ROOT / found[3], found[4])}\n{found[6]}", text)


if __name__ == "__main__":
    for page in PAGES:
        write_atomically(page, filled(page.read_text(encoding="utf-8")))
