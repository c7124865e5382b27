"""One run, from text to a folder with a model, its numbers, its picture and its page."""

from __future__ import annotations

import json
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainingArguments, set_seed

from midskip.card import source_name, try_card
from midskip.data import DataError, LabelledData, token_bytes
from midskip.distributed import first_goes_first
from midskip.evaluate import evaluate
from midskip.locks import locked, tidy
from midskip.model.layers import compile_blocks
from midskip.model.modeling import MidskipForCausalLM
from midskip.policies.base import check_first_pass
from midskip.regularizers import Regularizer
from midskip.report import print_line
from midskip.runs import BEST_FILE, BEST_FOLDER, REPORT_FILE, save_whole, to_json
from midskip.train.arguments import check_reporters, training_arguments
from midskip.train.checkpoints import (
    HISTORY_FILE,
    check_disk,
    find_checkpoint,
    history_until,
    put_aside,
    remove_old,
    step_of,
)
from midskip.train.checks import check_memory, check_model, check_regularizer
from midskip.train.folder import begin, check_folder, check_start, is_finished, load_regularizer, unless_refused
from midskip.train.fsdp import whole_state
from midskip.train.initial import initial_weights, start_of
from midskip.train.peak import peak_flops
from midskip.train.progress import ProgressBar
from midskip.train.recipe import Recipe
from midskip.train.report import report_of, write_pages
from midskip.train.text import open_windows
from midskip.train.trainer import MidskipTrainer


def train(
    recipe: Recipe,
    resume: bool = False,
    accept_changes: bool = False,
    title: str = "training",
    console: Console | None = None,
) -> dict[str, Any]:
    """Train what the recipe says and write its folder; returns what is in `report.json`.

    Under `torchrun` each process calls this, and the first one writes.

    Args:
        resume: go on from the newest complete checkpoint in the folder; a run that is finished stays as it is.
        accept_changes: go on although the recipe, the text or the number of processes is not the one it began with; a
            finished run only if nothing but `max_steps` changed, to more.
        title: of the progress bar.

    Raises:
        ValueError: something in the recipe, the text or the folder does not fit, or another process writes to the
            folder; found before training starts.
        FloatingPointError: the loss, a gradient or a weight is no longer finite.
    """
    folder, settings = Path(recipe.output), recipe.training
    for one in (recipe, *dense_recipes(recipe)):
        check_memory(one)
    regularizer = recipe.build_regularizer()
    check_regularizer(regularizer)
    check_model(recipe, regularizer)  # what is wrong with the model is found before the text is read
    check_reporters(settings.report_to)
    arguments = training_arguments(settings, folder)
    is_first = arguments.process_index == 0
    console = console or Console(stderr=True)
    console = console if is_first else Console(quiet=True)
    with ExitStack() as held:
        with first_goes_first():
            if is_first:
                for one in (recipe, *dense_recipes(recipe)):
                    check_folder(Path(one.output), one, resume, accept_changes)
            if resume and is_finished(folder, recipe):
                tidy(folder)
                return json.loads((folder / REPORT_FILE).read_text(encoding="utf-8")) if is_first else {}
            if is_first:
                held.enter_context(locked(folder))
        return _train(recipe, regularizer, arguments, resume, accept_changes, title, console)


def _train(
    recipe: Recipe, regularizer: Regularizer, arguments: TrainingArguments, resume: bool, accept_changes: bool,
    title: str, console: Console,
) -> dict[str, Any]:  # fmt: skip
    """The same, in a folder that is checked and locked."""
    folder, settings = Path(recipe.output), recipe.training
    is_first = arguments.process_index == 0
    with first_goes_first(), unless_refused(folder, recipe):
        checkpoint, broken = find_checkpoint(folder) if resume else (None, {})
        first_step = 0 if checkpoint is None else step_of(checkpoint)
        initial = initial_weights(recipe, checkpoint)
        text, training, validation = open_windows(recipe.data, folder, console)
        if initial is not None:
            initial.check(recipe, text)
        per_device = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
        training.require(per_device * arguments.world_size)
        load_regularizer(checkpoint, recipe, regularizer, text.vocab_size)
        if is_first:  # all that can be refused, of the dense models too, comes before anything is written
            start = {"num_processes": arguments.world_size, "shards": text.check(console)}
            for one in (recipe, *dense_recipes(recipe)):
                check_memory(one, text.vocab_size)
                check_start(Path(one.output), start | start_of(initial if one is recipe else None), accept_changes)
            for dense in dense_recipes(recipe):
                found, _ = find_checkpoint(Path(dense.output))
                load_regularizer(found, dense, dense.build_regularizer(), text.vocab_size)
            num_parameters = check_model(recipe, regularizer, text.vocab_size)
            num_checkpoints = settings.save_total_limit if settings.save_steps else 0
            check_disk(folder, num_parameters, num_checkpoints, best=bool(settings.eval_steps))
            put_aside(broken, partial(print_line, console))
            if checkpoint is not None:
                remove_old(folder, settings.save_total_limit)  # one that was half removed
            begin(folder, recipe, text, start | start_of(initial), first_step)
    dense = train_dense(recipe, resume, accept_changes, console)
    trained = checkpoint is not None and first_step >= settings.max_steps
    set_seed(settings.seed)
    pad: Any = None if text.tokenizer is None else text.tokenizer.pad_token_id
    config = recipe.build_config(text.vocab_size, text.end_of_text, pad)  # and not the one in the folder
    if checkpoint is None and initial is not None:
        model = initial.load(config)
    else:
        model = MidskipForCausalLM.from_pretrained(checkpoint, config=config) if trained else MidskipForCausalLM(config)
    regularizer.steer(model.model.policy)
    check_first_pass(model.model.policy)
    if settings.gradient_checkpointing:
        # transformers 5.23 renamed it and warns of the old name
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    if settings.torch_compile:
        compile_blocks(model.model.layers)
    num_bytes = None if text.tokenizer is None else _token_bytes(text.tokenizer)

    measure = partial(
        evaluate, windows=validation, token_bytes=num_bytes, batch_size=settings.per_device_train_batch_size,
        progress=not console.is_terminal, console=console,  # a terminal shows one bar at a time
    )  # fmt: skip
    peak, peak_source = (settings.peak_flops, "the recipe") if settings.peak_flops else peak_flops(arguments)
    windows = {"train_dataset": training, "eval_dataset": validation}
    trainer = MidskipTrainer(
        regularizer, settings, measure, text.tokenizer, peak, model=model, args=arguments, **windows
    )
    trainer.remove_callback(PrinterCallback)
    progress = ProgressBar(title, trainer.history, console)
    trainer.add_callback(progress)
    trainer.history += history_until(folder / HISTORY_FILE, first_step) if is_first else []
    if trained:  # the Trainer would add a step
        trainer.state.global_step = first_step
    else:
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            progress.bar.stop()
        trainer.check_weights()
    metrics = trainer.metrics()
    if settings.eval_steps:
        trainer.keep_best(metrics["loss"])
    state = whole_state(trainer)
    if not is_first:
        return {}
    save_whole(folder, trainer.bare_model, state_dict=state)
    model = trainer.bare_model
    if state is not None:  # the other processes are gone, and with them their parts of the weights
        model = MidskipForCausalLM.from_pretrained(folder, config=model.config)
        model.to(trainer.args.device)  # pyright: ignore[reportArgumentType, reportCallIssue]
    report = report_of(recipe, model, metrics, trainer.history, {"flops_per_s": peak, "from": peak_source}, dense)
    report |= {"labelled": True} if isinstance(text, LabelledData) else {}
    prepared = text.summary.get("settings", {})
    held_out = prepared.get("validation") or recipe.data.validation
    report["text"] = source_name(held_out or prepared.get("source") or recipe.data.source)
    if (folder / BEST_FOLDER / BEST_FILE).is_file():
        report["best"] = json.loads((folder / BEST_FOLDER / BEST_FILE).read_text(encoding="utf-8"))
    (folder / REPORT_FILE).write_text(to_json(report) + "\n", encoding="utf-8")
    try_card(folder, model)
    write_pages(folder, model, text.tokenizer, validation, report, trainer.history)
    return report


def dense_recipes(recipe: Recipe) -> list[Recipe]:
    """Of the dense models that the recipe wants beside its own: the same but for policy, regularizer and layers."""
    return [
        Recipe(
            output=str(Path(recipe.output, f"dense-{num_layers}")),
            data=recipe.data,
            model=replace(
                recipe.model,
                policy="dense",
                policy_settings={},
                skip_unit="block",
                skip_path="none",
                skip_path_rank=None,
                init_from=None,
                num_hidden_layers=num_layers,
            ),
            training=recipe.training,
        )
        for num_layers in recipe.dense_layers
    ]


def train_dense(recipe: Recipe, resume: bool, accept_changes: bool, console: Console) -> list[dict[str, Any]]:
    """Train the dense models that the recipe wants beside its own, each into a folder within the run's, on its text.

    Returns:
        A row a model, on the first process: `num_hidden_layers`; `folder`; of the held-out text `loss`,
        `bits_per_byte` (None where the tokenizer does not tell bytes) and `flops_per_token`; `num_parameters`;
        `seconds` of training.
    """
    rows = []
    for dense in dense_recipes(recipe):
        num_layers = dense.model.num_hidden_layers
        report = train(dense, resume, accept_changes, f"dense, {num_layers} layers", console)
        if report:
            measured = report["validation"]
            rows.append(
                {
                    "num_hidden_layers": num_layers,
                    "folder": Path(dense.output).name,
                    "loss": measured["loss"],
                    "bits_per_byte": measured.get("bits_per_byte"),
                    "flops_per_token": measured["flops_per_token"],
                    "num_parameters": report["num_parameters"],
                    "seconds": report["training"]["seconds"],
                }
            )
    return rows


def _token_bytes(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor | None:
    with suppress(DataError):  # not every kind of tokenizer tells
        return token_bytes(tokenizer)
    return None
