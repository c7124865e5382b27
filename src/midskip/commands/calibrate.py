"""`midskip calibrate`: its options, and what it does."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from midskip.commands.parser import HELD_OUT, Parser, add_text, at_least_one, text_of


def run(arguments: list[str]) -> None:
    parser = Parser(
        "calibrate",
        epilog="Windows are as long as the model takes. Prompts much shorter than that have a higher loss than a "
        "calibration on them expects, and look like drift: for those give --data of documents as short, which are kept "
        "apart.",
    )
    add_text(parser, ", but text like the prompts to come is best")
    parser.add_argument("--name", help="what to call the text in reports and warnings (default: DATA)")
    parser.add_argument(
        "--lowest", type=float, default=0.1, help="share of blocks below which to stop (default: %(default)s)"
    )
    parser.add_argument(
        "--max_tokens", type=at_least_one, default=2**16,
        help="of the text, evenly spread; it is read some 20 to 40 times (default: %(default)s)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    from midskip.budget.calibrate import calibrate, check_settings, check_writable, save_calibration, thinned
    from midskip.card import REPORT_FILE, write_card
    from midskip.distributed import joined_ranks
    from midskip.report import calibration_table
    from midskip.runs import load_run, to_json

    with joined_ranks():
        model, tokenizer = load_run(options.run)
        check_settings(model, options.lowest)
        check_writable(options.run)
        console = Console(stderr=True)
        windows = thinned(text_of(options, model, tokenizer, console), options.max_tokens)
        name = options.name or options.data or HELD_OUT
        calibration = calibrate(
            model, windows, name, lowest=options.lowest, batch_size=options.batch_size, progress=True
        )
    save_calibration(options.run, calibration)
    if Path(options.run, REPORT_FILE).is_file():
        model.config.calibration = calibration.to_dict()
        write_card(options.run, model.config, model.num_parameters())
    print(to_json(calibration.to_dict()))
    console.print(calibration_table(calibration))
