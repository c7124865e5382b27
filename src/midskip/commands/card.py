"""`midskip card`: its options, and what it does."""

from __future__ import annotations

from rich.console import Console

from midskip.commands.parser import Parser, add_trust


def run(arguments: list[str]) -> None:
    parser = Parser(
        "card",
        epilog="Shown are report.json and recipe.yaml of a run, retrofit.json, the calibration, evaluated.json of "
        "`midskip evaluate RUN --budgets ...` and bench.json of `midskip bench --run RUN --output RUN/bench`. What you "
        "write into the header of the card as license, license_name, license_link, language or base_model stays.",
    )
    parser.add_argument("run", help="folder of a run, or of a retrofit")
    parser.add_argument("--name", help="of the repository it will lie in, as somebody/skipper (default: the folder's)")
    add_trust(parser)
    options = parser.parse_args(arguments)
    from midskip.budget.measured_on import calibration_of
    from midskip.card import CARD_FILE, write_card
    from midskip.report import print_paths
    from midskip.runs import load_any_run

    model, _ = load_any_run(options.run, options.trust)
    if model.config.calibration is not None:
        calibration_of(model)  # refuses one of other weights or settings: what else was measured may be of those too
    file = write_card(options.run, model, options.name)
    if file is None:
        raise ValueError(
            f"{options.run!r} has a {CARD_FILE} that midskip did not write, or that is yours now: move it away first"
        )
    print_paths(Console(), {"model card": file})
