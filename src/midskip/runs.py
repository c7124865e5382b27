"""A run folder: a model, its tokenizer and its reports, as `save_pretrained` leaves them."""

import json
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from midskip.card import RECIPE_FILE as RECIPE_FILE
from midskip.card import REPORT_FILE as REPORT_FILE
from midskip.card import read_run
from midskip.data.labelled import is_labelled
from midskip.locks import errors_of_the_system
from midskip.model.config import SKIPPING_WEIGHTS
from midskip.model.modeling import MidskipForCausalLM

PICTURE_FILE, PAGE_FILE = "picture.png", "page.html"
BEST_FOLDER, BEST_FILE = "best", "evaluation.json"  # the model that evaluated best in training, and how
PART_FOLDER = "save.part"  # in a folder to which a model is being saved


def to_json(values: Any) -> str:
    """JSON for people too: indented, and a list of numbers on one line."""
    text = json.dumps(values, indent=1)
    lists = r"\[\n[^][{}\"]+\]"  # a string has no line break of its own, so none is taken for a list
    return re.sub(lists, lambda numbers: "[" + " ".join(numbers[0].strip("[]").split()) + "]", text)


def write_atomically(path: Path, text: str) -> None:
    """Write a file that others see whole or not at all. An OSError names it."""
    part = path.with_name(path.name + ".part")
    with errors_of_the_system(path):
        part.write_text(text, encoding="utf-8")
        part.replace(path)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """transformers says nothing of weights that are in no file and begin at random, as routers and skip paths do."""
    shown = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(shown)


def save_whole(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, **more: Any
) -> None:
    """`save_pretrained` of both, each file replaced as a whole. What a process left that died meanwhile goes, also the
    file of another name to which safetensors writes first.

    Args:
        more: arguments of the model's `save_pretrained`.
    """
    part = folder / PART_FOLDER
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part, **more)
    if tokenizer is not None:
        tokenizer.save_pretrained(part)
    for file in part.iterdir():
        file.replace(folder / file.name)
    part.rmdir()


def load_run(folder: str | Path, trust: Collection[str] = ()) -> tuple[MidskipForCausalLM, PreTrainedTokenizerBase]:
    """The trained model, in evaluation mode on a GPU if there is one, and its tokenizer.

    Args:
        trust: modules that a policy may be imported from because the folder says so: `["package.module"]`.

    Raises:
        ValueError: the folder does not exist, holds no finished run, has files that are not whole, names a policy that
            is neither built in, nor offered by an installed package, nor in `trust`; or the run is on labelled data,
            which has no tokenizer.
    """
    model, tokenizer = load_any_run(folder, trust)
    if tokenizer is None:
        raise ValueError(
            f"the run in {str(folder)!r} is on labelled data and has no tokenizer, which text needs: give a run on "
            "text, or load the model alone with MidskipForCausalLM.from_pretrained"
        )
    return model, tokenizer


def load_any_run(
    folder: str | Path, trust: Collection[str] = ()
) -> tuple[MidskipForCausalLM, PreTrainedTokenizerBase | None]:
    """As `load_run`; the tokenizer is None if the recipe in the folder names labelled data."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {str(folder)!r}; expected a run folder, as `midskip train` writes it")
    is_sharded = (folder / SAFE_WEIGHTS_INDEX_NAME).is_file()
    weights = SAFE_WEIGHTS_INDEX_NAME if is_sharded else SAFE_WEIGHTS_NAME
    lacking = [name for name in ("config.json", weights, "tokenizer.json") if not (folder / name).is_file()]
    recipe = read_run(folder)[1] if lacking else None
    labelled = recipe is not None and is_labelled(str(recipe["data"].get("source")))
    if labelled:
        lacking = [name for name in lacking if name != "tokenizer.json"]
    if lacking:
        unfinished = any(folder.glob("checkpoint-*")) or (folder / RECIPE_FILE).is_file()
        remedy = "go on with `midskip train ... --resume`" if unfinished else "give a run folder"
        raise ValueError(f"{str(folder)!r} holds no finished run (it lacks {', '.join(lacking)}): {remedy}")
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        if kind != "midskip":
            raise ValueError(f"its model is of the type {kind!r}; expected 'midskip'")
        model, found = MidskipForCausalLM.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, trust=trust
        )
        if wrong := sorted([*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])]):
            raise ValueError(f"the weights lack {', '.join(wrong)} of the shape in config.json")
        if unused := sorted(name for name in found["unexpected_keys"] if not name.startswith(SKIPPING_WEIGHTS)):
            raise ValueError(f"config.json has no place for the weights {', '.join(unused)}: it is of another model")
        tokenizer = (
            None if labelled else AutoTokenizer.from_pretrained(folder, config=model.config, trust_remote_code=False)
        )
        if tokenizer is not None:
            tokenizer("a")  # settings that make no sense are noticed when it is used
    except Exception as error:  # json, safetensors, transformers and tokenizers each raise their own kinds
        raise ValueError(f"the run in {str(folder)!r} cannot be read: {error}") from error
    if tokenizer is not None and len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer of {str(folder)!r} has {len(tokenizer)} tokens and its model {model.config.vocab_size}: "
            "they do not belong together"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)  # pyright: ignore[reportArgumentType, reportCallIssue]
    return model.eval(), tokenizer
