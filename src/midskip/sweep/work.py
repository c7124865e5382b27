"""What a worker does: runs of the sweep, one after the other, until none is left. Any number of workers share a sweep,
and no run has two of them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from midskip.bench.results import machine
from midskip.data.labelled import is_labelled
from midskip.plugins import search_folder
from midskip.runs import RECIPE_FILE
from midskip.sweep.plan import Run, Sweep, decides, user_code
from midskip.sweep.store import Store, strip
from midskip.train.recipe import Recipe
from midskip.train.run import train
from midskip.train.text import TEXT_FOLDER, open_text

PAUSE_S = 1.0  # where all that is left is others'


def work(sweep: Sweep) -> None:
    """Do runs until all have ended or failed, here or elsewhere. A worker that finds a run taken goes on with the next,
    and comes back."""
    store = Store(sweep.output)
    while todo := left(sweep, store):
        if not any(attempt(sweep, store, run) for run in todo):
            time.sleep(PAUSE_S)


def work_elsewhere(sweep: Sweep, num_threads: int) -> None:
    """`work` in a process of its own, perhaps on another machine with the same files."""
    os.chdir(sweep.folder)
    search_folder(sweep.folder)  # as the command line does
    torch.set_num_threads(num_threads)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    work(sweep)


def left(sweep: Sweep, store: Store) -> list[Run]:
    """Runs that have neither ended nor failed."""
    runs = sweep.runs(store.losses(sweep))
    return [run for run in runs if store.result(run.key) is None and store.failure(run.key) is None]


def attempt(sweep: Sweep, store: Store, run: Run) -> bool:
    """Do this run, unless another process has it; whether anything was done."""
    with store.claimed(run.key) as is_ours:
        if not is_ours:
            return False
        if store.result(run.key) is not None or store.failure(run.key) is not None:
            return True  # by another process, in between
        note = store.path("running", run.key)
        note.touch()
        try:
            code = user_code(run.recipe)  # before the run, during which its file may change
            report = train_run(sweep, run)
            store.write_result(run.key, result_of(run, report) | {"user_code": code})
            if not sweep.keep_runs:
                strip(store.path("runs", run.key))
        except Exception as error:  # torch, drivers and plugins raise what they like; the others go on
            store.write_failure(run.key, error)
        finally:
            note.unlink(missing_ok=True)
    return True


def result_of(run: Run, report: dict[str, Any]) -> dict[str, Any]:
    """What the result's file says."""
    return {
        "key": run.key,
        "recipe": decides(run.recipe),
        "seed": run.seed,
        "report": report,
        "training_flops": report["training"]["flops"],
        "seconds": report["training"]["seconds"],
        "machine": machine("cuda" if torch.cuda.is_available() else "cpu"),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def train_run(sweep: Sweep, run: Run) -> dict[str, Any]:
    """Train it, from where an earlier process left it; gives its report."""
    folder = Store(sweep.output).path("runs", run.key)
    recipe = replace(run.recipe, output=str(folder), dense_layers=[])
    share_text(sweep, recipe)
    return train(recipe, resume=(folder / RECIPE_FILE).is_file(), console=Console(quiet=True))


def share_text(sweep: Sweep, recipe: Recipe) -> None:
    """Prepare text once for all runs that name it: each run's folder has a link to it. Labelled data need none."""
    if is_labelled(recipe.data.source):
        return
    settings = json.dumps(asdict(recipe.data), sort_keys=True)
    name = hashlib.sha256(settings.encode()).hexdigest()[:16]
    shared, own = sweep.output / "text" / name, Path(recipe.output, TEXT_FOLDER)
    if own.is_dir():
        return
    with Store(sweep.output).alone(f"text-{name}"):
        open_text(recipe.data, shared, Console(quiet=True))
    if (shared / TEXT_FOLDER).is_dir():  # else it was prepared before
        own.parent.mkdir(parents=True, exist_ok=True)
        if own.is_symlink():  # to what is no longer there
            own.unlink()
        with contextlib.suppress(OSError):  # a file system without links: the run prepares its own
            own.symlink_to((shared / TEXT_FOLDER).resolve(), target_is_directory=True)
