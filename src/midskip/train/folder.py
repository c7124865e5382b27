"""The folder of a run: what it may hold before, and what it began with, which must be the same when it goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from midskip.data import LabelledData, Prepared
from midskip.locks import LOCK_FILE
from midskip.regularizers import Regularizer
from midskip.runs import BEST_FILE, BEST_FOLDER, PAGE_FILE, RECIPE_FILE, write_atomically
from midskip.train.checkpoints import REGULARIZER_FILE, step_of
from midskip.train.recipe import Recipe, changes
from midskip.train.saved import read_saved_recipe
from midskip.train.text import TEXT_FOLDER

START_FILE = "start.json"  # in the run folder: what else must be the same when it goes on
OUTDATED = "resume with what is in the folder, give another --output, or accept it with --accept_changes"


def check_folder(folder: Path, recipe: Recipe, resume: bool, accept_changes: bool) -> None:
    """Refuses a folder that holds something else, or another run."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output is {str(folder)!r}, which is a file; expected a folder")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / RECIPE_FILE).is_file():
        if {path.name for path in folder.iterdir()} <= {TEXT_FOLDER, f"{RECIPE_FILE}.part", LOCK_FILE}:
            return  # it did not come to its first step
        raise ValueError(f"output is {str(folder)!r}, which holds other files; give a new or empty folder")
    if not resume:
        raise ValueError(f"{str(folder)!r} already holds a run; go on with it by --resume, or give another --output")
    changed = changes(before := read_saved_recipe(folder / RECIPE_FILE), recipe)
    if changed and (folder / PAGE_FILE).is_file():
        told = f"the run is finished, with another recipe ({'; '.join(changed)})"
        if not is_extension(before, recipe):
            raise ValueError(f"{told}: give another --output; --accept_changes allows more training.max_steps alone")
        if not accept_changes:
            raise ValueError(f"{told}: give another --output, or train it for longer with --accept_changes")
        if not any(folder.glob("checkpoint-*")):
            raise ValueError(f"{told}, and has no checkpoint to go on from: give another --output")
    elif changed and not accept_changes:
        raise ValueError(f"the recipe is not the one this run began with ({'; '.join(changed)}): {OUTDATED}")
    if fixed := [change for change in changed if change.startswith("model.")]:
        raise ValueError(f"the shape of a model cannot change in a run ({'; '.join(fixed)}): give another --output")


def is_extension(before: Recipe, recipe: Recipe) -> bool:
    """Whether nothing but the number of steps differs, and rises."""
    more = before.training.max_steps < recipe.training.max_steps
    return more and len(changes(before, recipe)) == 1


def is_finished(folder: Path, recipe: Recipe) -> bool:
    """Whether the run in a folder that was checked came to its recipe's end. The page is written last."""
    return (folder / PAGE_FILE).is_file() and not is_extension(read_saved_recipe(folder / RECIPE_FILE), recipe)


def check_start(folder: Path, start: dict[str, Any], accept_changes: bool) -> None:
    """Refuses other text or data, or another number of processes, than the run began with."""
    if (folder / START_FILE).is_file() and not accept_changes:
        try:
            changed = _differences(json.loads((folder / START_FILE).read_text(encoding="utf-8")), start)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{str(folder / START_FILE)!r} cannot be read ({error}); expected what this run began with, as midskip "
                "writes it: put it back, or go on without it by --accept_changes"
            ) from error
        if changed:
            raise ValueError(f"this run did not begin like that ({'; '.join(changed)}): {OUTDATED}")


def load_regularizer(checkpoint: Path | None, recipe: Recipe, regularizer: Regularizer, vocab_size: int) -> None:
    """The regularizer gets its state in the checkpoint, if there is one. Refuses what cannot go on from there."""
    if checkpoint is None:
        return
    place = f"{checkpoint.name} of {str(checkpoint.parent)!r}"
    if step_of(checkpoint) > (wanted := recipe.training.max_steps):
        raise ValueError(
            f"{place} has more steps than training.max_steps, which is {wanted}: give at least {step_of(checkpoint)}, "
            "or another --output"
        )
    trained = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    if (wanted := recipe.build_config(vocab_size).vocab_size) != trained:
        raise ValueError(
            f"{place} has a model of {trained} tokens, and with the text {recipe.data.source!r} it would need "
            f"{wanted}: the vocabulary cannot change in a run; give text with its tokenizer, or another --output"
        )
    state = json.loads((checkpoint / REGULARIZER_FILE).read_text(encoding="utf-8"))
    try:
        regularizer.load_state_dict(state)
    except (ValueError, KeyError, TypeError) as error:  # those of other authors raise what they like
        raise ValueError(
            f"{place} cannot go on with the regularizer {recipe.regularizer.name!r} ({error}): give the one it began "
            "with, or another --output"
        ) from error


@contextmanager
def unless_refused(folder: Path, recipe: Recipe) -> Iterator[None]:
    """Text that was prepared into the folder of a run, for what is then refused, goes again; of a new run only if it
    may be of another tokenizer than the weights that it starts from."""
    text = folder / TEXT_FOLDER
    is_new = not text.exists() and ((folder / RECIPE_FILE).is_file() or recipe.model.init_from is not None)
    try:
        yield
    except ValueError:
        if is_new:
            shutil.rmtree(text, ignore_errors=True)
        raise


def begin(
    folder: Path, recipe: Recipe, text: Prepared | LabelledData, start: dict[str, Any], first_step: int
) -> None:  # fmt: skip
    """Write down what the run begins with, or goes on with after `first_step`."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / BEST_FOLDER).exists() and _best_is_of_another(folder, recipe, start, first_step):
        shutil.rmtree(folder / BEST_FOLDER)
    (folder / PAGE_FILE).unlink(missing_ok=True)  # of a shorter run; from now on this one is not finished
    recipe.save(folder / RECIPE_FILE)  # first of all it writes: it makes the folder that of a run
    write_atomically(folder / START_FILE, json.dumps(start, indent=1))
    if text.tokenizer is not None:
        text.tokenizer.save_pretrained(folder)


def _best_is_of_another(folder: Path, recipe: Recipe, start: dict[str, Any], first_step: int) -> bool:
    """Whether the best model was measured on other text, or by another recipe in a step that is taken again."""
    try:
        before = read_saved_recipe(folder / RECIPE_FILE)
        step = json.loads((folder / BEST_FOLDER / BEST_FILE).read_text(encoding="utf-8"))["step"]
        began = json.loads((folder / START_FILE).read_text(encoding="utf-8"))
        differs = bool(changes(before, recipe) or _differences(began, start))
        shards, windows = began["shards"], (before.data.length, before.data.separate_documents)
    except (OSError, ValueError, LookupError, TypeError):  # who cannot tell keeps none
        return True
    other_text = shards != start["shards"] or windows != (recipe.data.length, recipe.data.separate_documents)
    return other_text or (step > first_step and differs)


def _differences(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is not as it was, in words."""
    found = []
    if earlier["num_processes"] != now["num_processes"]:
        found.append(f"{earlier['num_processes']} processes and now {now['num_processes']}")
    if "init_from" in now and earlier.get("init_from") != now["init_from"]:  # they may be gone, and are not needed then
        found.append("other weights in model.init_from")
    for side in now["shards"]:
        before, after = ({shard["name"]: shard for shard in start["shards"][side]} for start in (earlier, now))
        if other := [name for name in {**before, **after} if before.get(name) != after.get(name)]:
            found.append(f"other {side} data: {', '.join(other[:3])}{', ...' * (len(other) > 3)}")
    return found
