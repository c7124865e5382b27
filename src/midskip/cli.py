"""The command line: midskip demo | prepare | train | evaluate | generate."""

import argparse
import json
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import transformers
from rich.console import Console

COMMANDS = {
    "demo": "train a gated model and its dense twin in minutes, and compare them",
    "prepare": "turn text into shards of tokens",
    "train": "train a model from a recipe",
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
        {"demo": _demo, "prepare": _prepare, "train": _train, "evaluate": _evaluate, "generate": _generate}[command](
            rest
        )
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
    Console(stderr=True).print(line, style="red", markup=False, highlight=False, emoji=False, soft_wrap=True)
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


def _prepare(arguments: list[str]) -> None:
    parser = _Parser("midskip prepare", description=COMMANDS["prepare"], allow_abbrev=False)
    parser.add_argument(
        "source",
        help="pydocs; .txt, .jsonl (both also .gz or .xz) or .parquet, as files, folders or globs joined by commas; "
        "hub:NAME[:CONFIG[:SPLIT]]",
    )
    parser.add_argument("--output", required=True, help="folder for the shards")
    parser.add_argument(
        "--tokenizer",
        default="bpe",
        help="bpe (byte-level, trained on the text), bytes, or a Hugging Face one by folder or name (default: bpe)",
    )
    parser.add_argument("--vocab_size", type=_at_least_one, help="tokens of bpe (default: 2048)")
    parser.add_argument("--validation", help="held-out text, as SOURCE (default: a share of SOURCE's documents)")
    parser.add_argument("--validation_share", type=float, help="that share (default: 0.05)")
    parser.add_argument("--max_tokens", type=_at_least_one, help="stop after so many training tokens (default: all)")
    parser.add_argument("--max_validation_tokens", type=_at_least_one, help="the same for held-out text")
    parser.add_argument("--text_field", default="text", help="where records have the text (default: %(default)s)")
    parser.add_argument("--shard_tokens", type=_at_least_one, help="tokens of a shard (default: 100 million)")
    options = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    from midskip.data import prepare

    print(json.dumps(prepare(**options).summary, indent=1))


def _train(arguments: list[str]) -> None:
    from midskip.runs import to_json
    from midskip.train.recipe import read_recipe, recipe_parser
    from midskip.train.run import train

    if "-h" in arguments or "--help" in arguments:
        print(
            "usage: midskip train RECIPE.yaml [--resume [--accept_changes]] [--group.setting=value ...]\n\n"
            "  --resume          go on from the newest complete checkpoint in the output folder\n"
            "  --accept_changes  go on although the recipe or the text is not what the run began with\n"
            "\nOn several devices: torchrun --nproc-per-node=N -m midskip.cli train ...\n"
        )
        recipe_parser().print_help()
        return
    switches = ("--resume", "--accept_changes")
    resume, accept_changes = (switch in arguments for switch in switches)
    rest = [argument for argument in arguments if argument not in switches]
    path = rest.pop(0) if rest and not rest[0].startswith("-") else None
    report = train(read_recipe(path, rest), resume, accept_changes)
    if report:  # of the first process
        print(to_json(report))


def _evaluate(arguments: list[str]) -> None:
    parser = _Parser(
        "midskip evaluate",
        description=COMMANDS["evaluate"],
        epilog="On several devices: torchrun --nproc-per-node=N -m midskip.cli evaluate ...",
        allow_abbrev=False,
    )
    parser.add_argument("run", help="run folder")
    parser.add_argument(
        "--data", help="text, as `midskip prepare` takes it, all of it used; by default the run's own held-out text"
    )
    parser.add_argument("--batch_size", type=_at_least_one, default=8, help="windows a pass (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="also write the numbers to this file")
    options = parser.parse_args(arguments)
    from midskip.data import DataError, TokenWindows, encode_source, end_of_text_id, token_bytes
    from midskip.evaluate import evaluate, joined_ranks
    from midskip.runs import RECIPE_FILE, load_run, to_json
    from midskip.train.recipe import DataSettings, read_recipe
    from midskip.train.text import cut_windows, open_text

    with joined_ranks() as rank:
        model, tokenizer = load_run(options.run)
        recipe_file = Path(options.run) / RECIPE_FILE
        if options.data is None and not recipe_file.is_file():
            raise ValueError(f"{options.run!r} has no {RECIPE_FILE} that names its held-out text: give text by --data")
        settings = read_recipe(recipe_file).data if recipe_file.is_file() else DataSettings()
        console = Console(stderr=True, quiet=rank > 0)
        if options.data is None:
            text = open_text(settings, Path(options.run), console)
            windows = cut_windows(text, settings)[1]
        else:
            ids = encode_source(tokenizer, options.data, console=console)
            end_of_text = end_of_text_id(tokenizer) if settings.separate_documents else None
            windows = TokenWindows(ids, model.config.max_position_embeddings, drop_last=False, end_of_text=end_of_text)
        num_bytes = None
        with suppress(DataError):  # not every kind of tokenizer tells
            num_bytes = token_bytes(tokenizer)
        result = evaluate(model, windows, num_bytes, options.batch_size, progress=True)
    if rank:
        return
    numbers = to_json(result)
    print(numbers)
    if options.output:
        options.output.write_text(numbers + "\n", encoding="utf-8")


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
