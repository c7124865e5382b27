"""`midskip evaluate`: its options, and what it does."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from rich.console import Console

from midskip.commands.parser import HELD_OUT, Parser, add_text, items_of, numbers, text_of


def run(arguments: list[str]) -> None:
    parser = Parser(
        "evaluate",
        epilog="On several devices: torchrun --nproc-per-node=N -m midskip.cli evaluate ...",
    )
    add_text(parser)
    parser.add_argument("--output", type=Path, help="also write the numbers to this file")
    parser.add_argument(
        "--budgets", type=numbers, help="shares of blocks, as 0.3,0.5,1: also loss at each, beside the calibration's"
    )
    parser.add_argument("--picture", type=Path, help="with --budgets: also draw loss against the share that ran (PNG)")
    options = parser.parse_args(arguments)
    if options.picture and not options.budgets:
        raise ValueError("--picture draws loss at several budgets: give --budgets too")
    if options.picture and not options.picture.parent.is_dir():
        raise ValueError(f"there is no folder {str(options.picture.parent)!r} to draw the picture into: make it first")
    from midskip.budget.calibrate import loss_by_budget, scales_for
    from midskip.data import DataError, token_bytes
    from midskip.distributed import joined_ranks
    from midskip.evaluate import evaluate
    from midskip.report import budget_table, write_curves
    from midskip.runs import load_any_run, to_json

    with joined_ranks() as rank:
        model, tokenizer = load_any_run(options.run)
        calibration = scales_for(model, options.budgets)[0] if options.budgets else None
        console = Console(stderr=True, quiet=rank > 0)
        num_bytes = None
        if tokenizer is None:
            windows = items_of(options, console)
        else:
            windows = text_of(options, model, tokenizer, console)
            with suppress(DataError):  # not every kind of tokenizer tells
                num_bytes = token_bytes(tokenizer)
        result = evaluate(model, windows, num_bytes, options.batch_size, progress=True)
        if calibration:
            result["budgets"] = loss_by_budget(model, windows, options.budgets, options.batch_size, progress=True)
    if rank:
        return
    printed = to_json(result)
    print(printed)
    if options.output:
        options.output.write_text(printed + "\n", encoding="utf-8")
    if calibration:
        console.print(budget_table(result["budgets"], options.data or HELD_OUT))
    if calibration and options.picture:
        here = [(row["executed_share"], row["loss"]) for row in result["budgets"]]
        there = list(zip(calibration.share, calibration.loss, strict=True))
        write_curves(options.picture, [(calibration.text, there), (options.data or HELD_OUT, here)])
