"""`midskip frontier`: its options, and what it does."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from midskip.commands.parser import Parser

WIDTH = 160  # of the table where there is no terminal


def run(arguments: list[str]) -> None:
    from midskip.frontier import COSTS, frontier, frontier_table, write_frontier

    parser = Parser(
        "frontier",
        epilog="Writes frontier.json (all costs), frontier.png and frontier.svg, and prints a table for one cost. "
        "docs/frontier.md says how the numbers are found.",
    )
    parser.add_argument("folder", help="folder that `midskip sweep` wrote")
    parser.add_argument("--output", type=Path, help="folder for numbers and pictures (default: FOLDER)")
    parser.add_argument("--cost", choices=list(COSTS), default="flops", help="of the table (default: %(default)s)")
    options = parser.parse_args(arguments)
    from midskip.report import visible
    from midskip.runs import to_json, write_atomically

    result = frontier(options.folder)
    table = frontier_table(result, options.cost)  # first, since it refuses a cost that was not measured
    output = options.output or Path(options.folder)
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / "frontier.json", to_json(result) + "\n")
    for ending in ("png", "svg"):
        write_frontier(output / f"frontier.{ending}", result)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(table)
    for note in result["notes"]:
        console.print(Text(visible(f"{note}.")), soft_wrap=True)
