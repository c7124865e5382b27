"""`midskip train`: its options, and what it does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from midskip.commands.parser import Parser, add_json, quiet_transformers

if TYPE_CHECKING:
    from midskip.train.recipe import Recipe


def run(arguments: list[str]) -> None:
    from midskip.train.read import read_recipe, recipe_parser

    parser = Parser(
        "train",
        usage="%(prog)s RECIPE.yaml [--resume [--accept_changes]] [--group.setting=value ...]",
        epilog="On several devices: torchrun --nproc-per-node=N -m midskip.cli train ...",
        add_help=False,
    )
    parser.add_argument("recipe", metavar="RECIPE.yaml", help="a YAML file; the folder recipes has some")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest complete checkpoint in the output folder"
    )
    parser.add_argument(
        "--accept_changes",
        action="store_true",
        help="go on although the recipe or the text is not what the run began with",
    )
    add_json(parser)
    if "-h" in arguments or "--help" in arguments:
        parser.print_help()
        print()
        recipe_parser().print_help()
        return
    options, settings = parser.parse_known_args(arguments)
    recipe = read_recipe(options.recipe, settings)
    quiet_transformers()
    from midskip.runs import to_json
    from midskip.train.run import train

    report = train(recipe, options.resume, options.accept_changes)
    if report and options.json:  # of the first process
        print(to_json(report))
    elif report:
        _print_summary(report, recipe)


def _print_summary(report: dict[str, Any], recipe: Recipe) -> None:
    """What a person wants to know first, and where the rest is."""
    from rich.console import Console

    from midskip.report import print_line, print_paths, results_table
    from midskip.runs import BEST_FOLDER, PAGE_FILE, PICTURE_FILE, REPORT_FILE
    from midskip.train.checkpoints import HISTORY_FILE

    console, folder, training = Console(), Path(recipe.output), report["training"]
    found = dict(report["validation"], seconds=training["seconds"])
    if not report.get("labelled"):
        del found["accuracy"]
    models = {f"{recipe.model.policy}, {recipe.model.num_hidden_layers} layers": found}
    for row in report["dense"]:
        models[f"dense, {row['num_hidden_layers']} layers"] = row | {"executed_share": 1.0}
    title = f"{report['text']}, held out, after {training['steps']:,} steps on {training['num_tokens']:,} tokens"
    console.print(results_table(models, title))
    for sign in training["collapse"].values():
        print_line(console, f"a sign of a collapse in training: {sign['what']} (step {sign['step']})")
    paths: dict[str, object] = {"model": folder, "page": folder / PAGE_FILE, "picture": folder / PICTURE_FILE}
    paths |= {"history": folder / HISTORY_FILE, "all numbers": folder / REPORT_FILE}
    best = report.get("best")
    if best is not None and best["loss"] < found["loss"]:
        paths["best model"] = f"{folder / BEST_FOLDER}, of step {best['step']:,}: loss {best['loss']:.4f}"
    print_paths(console, paths)
