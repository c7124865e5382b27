"""`midskip demo`: its options, and what it does."""

from __future__ import annotations

from midskip.commands.parser import Parser, at_least_one


def run(arguments: list[str]) -> None:
    parser = Parser("demo")
    parser.add_argument("--output", default="runs/demo", help="run folder (default: %(default)s)")
    parser.add_argument("--steps", type=at_least_one, default=500, help="steps of each model (default: %(default)s)")
    parser.add_argument(
        "--source", default="pydocs", help="pydocs, a text file or a folder of .txt (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    from midskip.demo import demo

    demo(options.output, options.steps, options.source)
