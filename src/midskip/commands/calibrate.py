"""`midskip calibrate`: its options, and what it does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from midskip.commands.parser import HELD_OUT, Parser, add_json, add_text, at_least_one, text_of

if TYPE_CHECKING:
    from midskip.budget.calibration import Calibration
    from midskip.model.modeling import MidskipForCausalLM


def run(arguments: list[str]) -> None:
    parser = Parser(
        "calibrate",
        epilog="Windows are as long as the model takes. Prompts much shorter than that have a higher loss than a "
        "calibration on them expects, and look like drift: for those give --data of documents as short, which are kept "
        "apart. The best model of a run (the folder best in it) is calibrated too.",
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
    add_json(parser)
    options = parser.parse_args(arguments)
    from midskip.budget.calibrate import calibrate, check_settings, check_writable, thinned
    from midskip.budget.measured_on import hashes_of
    from midskip.distributed import joined_ranks
    from midskip.report import calibration_table, print_line, print_paths
    from midskip.runs import BEST_FOLDER, load_run, to_json

    best, of_best = Path(options.run, BEST_FOLDER), None
    with joined_ranks():
        model, tokenizer = load_run(options.run, options.trust)
        check_settings(model, options.lowest)
        check_writable(options.run)
        console = Console(stderr=True)
        windows = thinned(text_of(options, model, tokenizer, console), options.max_tokens)
        how: dict[str, Any] = {"lowest": options.lowest, "batch_size": options.batch_size, "progress": True}
        how["text"] = options.name or options.data or HELD_OUT
        calibration = calibrate(model, windows, **how)
        _save(options.run, model, calibration)
        if (best / "config.json").is_file():
            try:
                model, _ = load_run(best, options.trust)
                same = calibration.weights is not None and hashes_of(model) == calibration.weights
                of_best = calibration if same else calibrate(model, windows, rule=calibration.rule, **how)
                _save(best, model, of_best)
            except ValueError as error:  # an early model may have nothing to calibrate
                print_line(console, f"the model in {BEST_FOLDER} was not calibrated: {error}")
    if options.json:
        print(to_json(calibration.to_dict()))
        return
    console = Console()
    console.print(calibration_table(calibration))
    paths = {"calibration": Path(options.run, "config.json")}
    print_paths(console, paths | ({} if of_best is None else {"of the best model": best / "config.json"}))


def _save(folder: str | Path, model: MidskipForCausalLM, calibration: Calibration) -> None:
    """Into the configuration, and onto the model card, if it is that of a run or a retrofit."""
    from midskip.budget.calibrate import save_calibration
    from midskip.card import MEASURED_FILES, write_card
    from midskip.locks import errors_of_the_system

    with errors_of_the_system(Path(folder)):
        save_calibration(folder, calibration)
        if any(Path(folder, name).is_file() for name in MEASURED_FILES):
            model.config.calibration = calibration.to_dict()
            write_card(folder, model)
