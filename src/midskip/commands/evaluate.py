"""`midskip evaluate`: its options, and what it does."""

from __future__ import annotations

import argparse
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from midskip.commands.parser import HELD_OUT, Parser, add_text, at_least_one, items_of, numbers, text_of, words


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
    parser.add_argument(
        "--tasks", type=words, help="tasks of lm_eval, as piqa,lambada_openai, instead of text; with --budgets at each"
    )
    parser.add_argument("--include_path", type=Path, help="with --tasks: a folder with tasks of your own")
    parser.add_argument("--limit", type=at_least_one, help="with --tasks: documents of each")
    options = parser.parse_args(arguments)
    if options.tasks:
        _run_tasks(options)
        return
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


def _run_tasks(options: argparse.Namespace) -> None:
    if options.data or options.picture:
        raise ValueError("--tasks bring their own text: leave --data and --picture out")
    from midskip.budget.calibrate import scales_for
    from midskip.runs import load_run, to_json
    from midskip.tasks import check_tasks, evaluate_tasks

    check_tasks(options.tasks, options.include_path)
    model, tokenizer = load_run(options.run)
    if options.budgets:
        scales_for(model, options.budgets)  # what is wrong with them is found before the long job
    rows = evaluate_tasks(
        model, tokenizer, options.tasks, options.budgets, include_path=options.include_path, limit=options.limit,
        batch_size=options.batch_size,
    )  # fmt: skip
    printed = to_json(rows)
    print(printed)
    if options.output:
        options.output.write_text(printed + "\n", encoding="utf-8")
