"""What the commands share: their list, how they read their arguments, and text given by --data."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:  # else `--help` would wait for them
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from midskip.data import TokenWindows
    from midskip.data.labelled import Items
    from midskip.model.modeling import MidskipForCausalLM

COMMANDS = {
    "demo": "train a gated model, and a dense one of its FLOPs, in minutes, and compare them",
    "prepare": "turn text into shards of tokens",
    "train": "train a model from a recipe",
    "retrofit": "have a pretrained model skip, without training or with a little, its price measured at every budget",
    "sweep": "train a grid of recipes, settings and seeds, and go on where it was left",
    "evaluate": "loss and work of a trained model on text",
    "calibrate": "measure what a budget at run time costs, and save it with the model",
    "card": "write the model card of a run or a retrofit, from all that was measured of it",
    "generate": "go on with a prompt, coloured by the depth each token used",
    "app": "see in the browser where a model spends its depth, on any text, as it is typed",
    "serve": "answer completions and chat over HTTP, by the server of transformers, under budgets",
    "frontier": "hold the models of a sweep to the dense ones of the same cost",
    "bench": "time prefill, decode and training against Llama of the same shape, with the work that really ran",
}

HELD_OUT = "held-out text of the run"


class Parser(argparse.ArgumentParser):
    """Of a command; what it cannot read is a ValueError. `parse_args` ends with `quiet_transformers`."""

    def __init__(self, command: str, **more: object):
        super().__init__(f"midskip {command}", description=COMMANDS[command], allow_abbrev=False, **more)  # pyright: ignore[reportArgumentType]

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        parsed = super().parse_args(args, namespace)
        for name, value in vars(parsed).items():
            if isinstance(value, Path):  # a shell leaves `--output=~/x` as it is
                setattr(parsed, name, Path(os.path.expanduser(value)))
        quiet_transformers()
        return parsed

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; `{self.prog} --help` tells more")


def quiet_transformers() -> None:
    """Not before the arguments are read: refusing them should not wait for an import."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # of loading and saving, which take no time here
    logging.set_verbosity_error()


def add_text(parser: argparse.ArgumentParser, more: str = "") -> None:
    parser.add_argument("run", help="run folder")
    parser.add_argument(
        "--data",
        help="text, as `midskip prepare` takes it, all of it used, or the held-out text of a folder that it wrote; by "
        f"default the run's own held-out text{more}",
    )
    add_text_field(parser)
    parser.add_argument("--batch_size", type=at_least_one, default=8, help="windows a pass (default: %(default)s)")
    add_trust(parser)


def add_text_field(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text_field", help="where records of --data have the text (default: where the run's had it)")


def add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust", action="append", default=[], metavar="MODULE",
        help="a module that the run may import its policy, regularizer or labelled data from, as package.module, "
        "installed or in the current folder; may be given several times",
    )  # fmt: skip


def check_target(option: str, file: Path | None) -> None:
    """ValueError if this file cannot be written, so that it is found before a long job."""
    if file and not file.parent.is_dir():
        raise ValueError(f"there is no folder {str(file.parent)!r} for --{option}: make it first")
    if file and file.is_dir():
        raise ValueError(f"--{option} is {str(file)!r}, which is a folder; expected a file")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print all numbers as JSON, and no summary")


def text_of(
    options: argparse.Namespace, model: MidskipForCausalLM, tokenizer: PreTrainedTokenizerBase, console: Console
) -> TokenWindows:
    """The text that the options of `add_text` name."""
    from midskip.data import TokenWindows, encode_source, end_of_text_id, open_prepared
    from midskip.data.prepared import is_prepared
    from midskip.runs import RECIPE_FILE
    from midskip.train.recipe import DataSettings
    from midskip.train.saved import read_saved_recipe
    from midskip.train.text import cut_windows, open_text

    folder = _folder_of_recipe(options.run)
    recipe_file = folder / RECIPE_FILE
    if options.data is None and not recipe_file.is_file():
        raise ValueError(f"{options.run!r} has no {RECIPE_FILE} that names its held-out text: give text by --data")
    settings = read_saved_recipe(recipe_file).data if recipe_file.is_file() else DataSettings()
    if options.data is None:
        return cut_windows(open_text(settings, folder, console), settings)[1]
    length = model.config.max_position_embeddings
    if is_prepared(options.data):
        prepared = open_prepared(options.data)
        if prepared.tokenizer.get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                f"{options.data!r} was prepared with another tokenizer than that of {options.run!r}: give the text "
                f"itself, or prepare it with --tokenizer {options.run}"
            )
        return prepared.windows("validation", length, settings.separate_documents)
    ids = encode_source(tokenizer, options.data, options.text_field or settings.text_field, console)
    end_of_text = end_of_text_id(tokenizer) if settings.separate_documents else None
    return TokenWindows(ids, length, drop_last=False, end_of_text=end_of_text)


def items_of(options: argparse.Namespace, console: Console) -> Items:
    """Those that a run on labelled data holds out."""
    from midskip.plugins import check_saved
    from midskip.runs import RECIPE_FILE
    from midskip.train.saved import read_saved_recipe
    from midskip.train.text import open_windows

    if options.data is not None:
        raise ValueError(f"{options.run!r} is a run on labelled data, and --data names text: leave it out")
    folder = _folder_of_recipe(options.run)
    settings = read_saved_recipe(folder / RECIPE_FILE).data
    check_saved(settings.source, "labelled data", options.trust, f"the recipe in {str(folder)!r}")
    return open_windows(settings, folder, console)[2]


def _folder_of_recipe(run: str) -> Path:
    """The folder of a run; of its best model, which lies within, too."""
    from midskip.runs import BEST_FILE, RECIPE_FILE

    folder = Path(run)
    is_best = (folder / BEST_FILE).is_file() and not (folder / RECIPE_FILE).is_file()
    return folder.resolve().parent if is_best else folder


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def counts(text: str) -> tuple[int, ...]:
    return tuple(at_least_one(part) for part in text.split(","))


def numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected numbers joined by commas, as 0.3,0.5") from None


def at_least_one(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a whole number") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number
