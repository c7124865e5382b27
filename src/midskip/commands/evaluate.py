"""`midskip evaluate`: its options, and what it does."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from midskip.commands.parser import (
    HELD_OUT,
    Parser,
    add_json,
    add_text,
    at_least_one,
    check_target,
    items_of,
    numbers,
    text_of,
    words,
)

if TYPE_CHECKING:
    from rich.table import Table

    from midskip.budget.calibration import Calibration


def run(arguments: list[str]) -> None:
    parser = Parser(
        "evaluate",
        epilog="On several devices: torchrun --nproc-per-node=N -m midskip.cli evaluate ...",
    )
    add_text(parser)
    parser.add_argument("--output", type=Path, help="file for all numbers (default: evaluated.json in the run folder)")
    add_json(parser)
    parser.add_argument(
        "--budgets",
        type=numbers,
        help="shares of blocks that may run on average, as 0.3,0.5,1: also loss at each, beside the calibration's",
    )
    parser.add_argument("--picture", type=Path, help="with --budgets: also draw loss against the share that ran (PNG)")
    parser.add_argument("--page", type=Path, help="also write passages coloured by depth (HTML), at most four")
    parser.add_argument(
        "--tasks", type=words, help="tasks of lm_eval, as piqa,lambada_openai, instead of text; with --budgets at each"
    )
    parser.add_argument("--include_path", type=Path, help="with --tasks: a folder with tasks of your own")
    parser.add_argument("--limit", type=at_least_one, help="with --tasks: documents of each")
    options = parser.parse_args(arguments)
    for name in ("output", "picture", "page"):
        check_target(name, getattr(options, name))
    if options.tasks:
        _run_tasks(options)
        return
    if options.picture and not options.budgets:
        raise ValueError("--picture draws loss at several budgets: give --budgets too")
    for name in ("include_path", "limit"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name} is of tasks: give --tasks too, or leave it out")
    from midskip.budget.calibrate import beside_calibration, loss_by_budget, scales_for
    from midskip.data import DataError, token_bytes
    from midskip.distributed import joined_ranks
    from midskip.evaluate import evaluate, passages
    from midskip.report import write_curves, write_page
    from midskip.runs import load_any_run

    with joined_ranks() as rank:
        model, tokenizer = load_any_run(options.run, options.trust)
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
            result["as_trained"] = beside_calibration(calibration, 1.0, result)
            result["calibration"] = calibration.fingerprint()
            result["budgets"] = loss_by_budget(model, windows, options.budgets, options.batch_size, progress=True)
    if rank:
        return
    text = options.data or (HELD_OUT if tokenizer else "held-out items of the run")
    result: dict[str, Any] = {"text": text, **result}
    if options.page:
        shown = [(f"passage {number}", tokens) for number, tokens in enumerate(passages(model, tokenizer, windows), 1)]
        ran = {"block-tokens that ran": f"{result['executed_share']:.1%}", "loss": f"{result['loss']:.4f} nats a token"}
        write_page(options.page, f"Depth by token: {text}", shown, model.config.num_skip_units, ran)
    _finish(options, result, lambda console: _print_summary(console, result, calibration, tokenizer is None))
    if calibration and options.picture:
        rows = [(row["executed_share"], row["loss"]) for row in (result["as_trained"], *result["budgets"])]
        there = list(zip(calibration.share, calibration.loss, strict=True))
        as_trained = [calibration.at(1.0), rows[0]]
        write_curves(options.picture, [(calibration.text, there), (text, rows[1:])], as_trained=as_trained)


def _finish(options: argparse.Namespace, result: Any, summary: Callable[[Console], None]) -> None:
    """Write all numbers, and print them or a summary and where they are."""
    from midskip.card import EVALUATED_FILE
    from midskip.report import print_line, print_paths
    from midskip.runs import to_json, write_atomically

    printed, written = to_json(result), Path(options.run, EVALUATED_FILE)
    try:
        if options.output:
            options.output.write_text(printed + "\n", encoding="utf-8")
            written = options.output
        elif not options.json:
            write_atomically(written, printed + "\n")
    except OSError as error:
        print(printed)  # they are not lost
        if options.output:
            raise
        print_line(Console(stderr=True), f"all numbers could not be written and are printed: {error}")
        return
    if options.json:
        print(printed)
        return
    console = Console()
    summary(console)
    named = {name: file for name in ("picture", "page") if (file := getattr(options, name))}
    print_paths(console, named | {"all numbers": written})


def _print_summary(console: Console, result: dict[str, Any], calibration: Calibration | None, labelled: bool) -> None:
    from midskip.report import budget_note, budget_table, print_line, results_table

    shown = {name: value for name, value in result.items() if labelled or name != "accuracy"}
    title = f"{result['text']}: {result['num_tokens']:,} tokens"
    console.print(results_table({"as trained": shown}, title))
    if calibration:
        console.print(budget_table([result["as_trained"], *result["budgets"]], result["text"]))
        print_line(console, budget_note(calibration))


def _run_tasks(options: argparse.Namespace) -> None:
    if options.data or options.picture or options.page:
        raise ValueError("--tasks bring their own text: leave --data, --picture and --page out")
    from midskip.budget.calibrate import scales_for
    from midskip.runs import load_run
    from midskip.tasks import check_tasks, evaluate_tasks

    check_tasks(options.tasks, options.include_path)
    model, tokenizer = load_run(options.run, options.trust)
    if options.budgets:
        scales_for(model, options.budgets)  # what is wrong with them is found before the long job
    rows = evaluate_tasks(
        model, tokenizer, options.tasks, options.budgets, include_path=options.include_path, limit=options.limit,
        batch_size=options.batch_size,
    )  # fmt: skip
    _finish(options, rows, lambda console: console.print(_tasks_table(rows)))


def _tasks_table(rows: list[dict[str, Any]]) -> Table:
    """A column for each budget, a row for each metric of each task."""
    from midskip.report import comparison_table

    columns = ["", *("as trained" if row["budget"] is None else f"budget {row['budget']:g}" for row in rows)]
    cells = [["block-tokens that ran", *(f"{row['executed_share']:.1%}" for row in rows)]]
    for task, found in rows[0]["results"].items():
        for metric, value in found.items():
            if isinstance(value, int | float) and "stderr" not in metric and metric != "sample_len":
                name = f"{task}: {metric.removesuffix(',none')}"
                cells.append([name, *(f"{row['results'][task][metric]:.4f}" for row in rows)])
    return comparison_table(cells, columns, "tasks of lm_eval")
