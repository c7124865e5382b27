"""`midskip frontier`: its options, and what it does."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from midskip.commands.parser import Parser, check_target

WIDTH = 160  # of the table where there is no terminal


def run(arguments: list[str]) -> None:
    from midskip.frontier import COSTS, frontier, frontier_markdown, frontier_table, save_results, write_frontier

    parser = Parser(
        "frontier",
        epilog="Writes frontier.json and frontier.md (all costs), frontier.png and frontier.svg, and prints a table "
        "for one cost. docs/comparing.md says how the numbers are found.",
    )
    parser.add_argument("folder", help="folder that `midskip sweep` wrote, or a file of --save")
    parser.add_argument("--output", type=Path, help="folder for numbers and pictures (default: that folder)")
    parser.add_argument("--save", type=Path, metavar="FILE", help="also write all results into this one file of JSON")
    parser.add_argument("--cost", choices=list(COSTS), default="flops", help="of the table (default: %(default)s)")
    parser.add_argument(
        "--against", metavar="ARM", help="hold all models to this one in place of dense ones of the same cost: an arm, "
        "or an arm and settings as in the table, for example 'dense num_hidden_layers=12'",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.save and options.save.parent != options.output:  # a folder that is made
        check_target("save", options.save)
    if options.output and options.output.exists() and not options.output.is_dir():
        raise ValueError(f"--output is {str(options.output)!r}, which is a file; expected a folder")
    from midskip.report import visible
    from midskip.runs import to_json, write_atomically

    result = frontier(options.folder, options.against)
    table = frontier_table(result, options.cost)  # first, since it refuses a cost that was not measured
    source = Path(options.folder)
    output = options.output or (source.parent if source.is_file() else source)
    output.mkdir(parents=True, exist_ok=True)
    if options.save:
        save_results(source, options.save)
    write_atomically(output / "frontier.json", to_json(result) + "\n")
    pages = (f"## {COSTS[cost].words}\n\n{frontier_markdown(result, cost)}\n" for cost in result["costs"])
    write_atomically(output / "frontier.md", "\n".join(pages))
    for ending in ("png", "svg"):
        write_frontier(output / f"frontier.{ending}", result)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(table)
    for note in result["notes"]:
        console.print(Text(visible(f"{note}.")), soft_wrap=True)
