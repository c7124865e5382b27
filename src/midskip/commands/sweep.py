"""`midskip sweep`: its options, and what it does."""

from __future__ import annotations

from midskip.commands.parser import Parser, at_least_one


def run(arguments: list[str]) -> None:
    parser = Parser(
        "sweep",
        epilog="What is there is not done again: a sweep that was killed goes on, and one whose grid has grown does "
        "what is new. docs/sweeps.md tells what the file may say.",
    )
    parser.add_argument("sweep", metavar="SWEEP.yaml", help="a YAML file; the folder sweeps has one")
    parser.add_argument(
        "--jobs", type=at_least_one, help="runs at once (default: 1; with --ray as many as GPUs, or else CPUs)"
    )
    parser.add_argument(
        "--ray", nargs="?", const="", metavar="ADDRESS",
        help="on Ray, on this machine or on the cluster at ADDRESS (auto: the one that is there)",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="print the runs and what is done, and run nothing")
    options = parser.parse_args(arguments)
    from midskip.sweep import listed, read_sweep, run_sweep

    sweep = read_sweep(options.sweep)
    if options.list:
        print("\n".join(listed(sweep)))
        return
    run_sweep(sweep, options.jobs, options.ray is not None, options.ray or None)
