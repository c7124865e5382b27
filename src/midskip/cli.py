"""The command line: midskip demo | train | evaluate | generate."""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import NoReturn

import transformers
from rich.console import Console

COMMANDS = {
    "demo": "train a gated model and its dense twin in minutes, and compare them",
    "train": "train a model from a recipe and a folder of text",
    "evaluate": "loss and work of a trained model on text",
    "generate": "go on with a prompt, coloured by the depth each token used",
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, 1 for a run that failed, 2 for input that cannot be used."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"  {name:<10} {text}" for name, text in COMMANDS.items()]
        print("usage: midskip COMMAND ...\n\n" + "\n".join(lines) + "\n\n`midskip COMMAND --help` tells more.")
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        return _fail(f"there is no command {command!r}; expected one of {', '.join(COMMANDS)}", 2)
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # a recipe's own policy or controller may lie beside it
    transformers.utils.logging.disable_progress_bar()  # of loading and saving, which take no time here
    transformers.utils.logging.set_verbosity_error()
    try:
        {"demo": _demo, "train": _train, "evaluate": _evaluate, "generate": _generate}[command](rest)
    except (ValueError, OSError) as error:
        return _fail(str(error), 2)
    except FloatingPointError as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    return 0


def _fail(message: str, status: int) -> int:
    from midskip.report.page import visible

    line = visible("midskip: error: " + re.sub(r"\s*\n\s*", " ", message))
    Console(stderr=True).print(line, style="red", markup=False, highlight=False, soft_wrap=True)
    return status


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; `{self.prog} --help` tells more")


def _demo(arguments: list[str]) -> None:
    parser = _Parser("midskip demo", description=COMMANDS["demo"], allow_abbrev=False)
    parser.add_argument("--output", default="runs/demo", help="run folder (default: %(default)s)")
    parser.add_argument("--steps", type=_at_least_one, default=400, help="steps of each model (default: %(default)s)")
    parser.add_argument(
        "--source", default="pydocs", help="pydocs, a text file or a folder of .txt (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    from midskip.demo import demo

    demo(options.output, options.steps, options.source)


def _train(arguments: list[str]) -> None:
    from midskip.train.recipe import read_recipe, recipe_parser
    from midskip.train.run import train

    if "-h" in arguments or "--help" in arguments:
        print("usage: midskip train RECIPE.yaml [--resume] [--group.setting=value ...]\n")
        recipe_parser().print_help()
        return
    resume = "--resume" in arguments
    rest = [argument for argument in arguments if argument != "--resume"]
    path = rest.pop(0) if rest and not rest[0].startswith("-") else None
    report = train(read_recipe(path, rest), resume)
    print(json.dumps(report, indent=1))


def _evaluate(arguments: list[str]) -> None:
    parser = _Parser("midskip evaluate", description=COMMANDS["evaluate"], allow_abbrev=False)
    parser.add_argument("run", help="run folder")
    parser.add_argument("--data", help="a text file or folder, all of it used; by default the run's own held-out text")
    parser.add_argument("--batch_size", type=_at_least_one, default=8, help="windows a pass (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="also write the numbers to this file")
    options = parser.parse_args(arguments)
    from midskip.data import TokenWindows, encode_documents, load_documents, token_bytes
    from midskip.evaluate import evaluate
    from midskip.runs import RECIPE_FILE, load_run
    from midskip.train.recipe import read_recipe
    from midskip.train.run import prepare_data

    model, tokenizer = load_run(options.run)
    if options.data is None:
        recipe = read_recipe(Path(options.run) / RECIPE_FILE)
        windows = prepare_data(recipe.data, tokenizer=tokenizer).validation
    else:
        ids = encode_documents(tokenizer, load_documents(options.data))
        windows = TokenWindows(ids, model.config.max_position_embeddings, drop_last=False)
    result = evaluate(model, windows, token_bytes(tokenizer), options.batch_size, progress=True)
    text = json.dumps(result, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


def _generate(arguments: list[str]) -> None:
    parser = _Parser("midskip generate", description=COMMANDS["generate"], allow_abbrev=False)
    parser.add_argument("run", help="run folder")
    parser.add_argument("--prompt", required=True, help="text to go on with")
    parser.add_argument("--max_new_tokens", type=_at_least_one, default=100, help="default: %(default)s")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0: the most likely token (default: %(default)s)"
    )
    parser.add_argument("--top_k", type=int, default=50, help="draw among the k most likely (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: %(default)s)")
    options = parser.parse_args(arguments)
    from midskip.evaluate import depth_of_tokens
    from midskip.generate import generate
    from midskip.report import depth_text, legend
    from midskip.runs import load_run

    model, tokenizer = load_run(options.run)
    ids = generate(
        model, tokenizer, options.prompt, options.max_new_tokens, options.temperature, options.top_k, options.seed
    )
    console, num_layers = Console(), model.config.num_hidden_layers
    console.print(depth_text(depth_of_tokens(model, tokenizer, ids), num_layers))
    console.print(legend(num_layers))


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
