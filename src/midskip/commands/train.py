"""`midskip train`: its options, and what it does."""

from __future__ import annotations

from midskip.commands.parser import Parser, quiet_transformers


def run(arguments: list[str]) -> None:
    from midskip.train.recipe import read_recipe, recipe_parser

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
    if report:  # of the first process
        print(to_json(report))
