"""What a recipe trains on: text, prepared and cut into windows, or labelled data."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from midskip.data import DataError, LabelledData, TokenWindows
from midskip.data.labelled import Items, TrainingItems, build_labelled, is_labelled
from midskip.data.prepare import prepare
from midskip.data.prepared import Prepared, is_prepared, open_prepared, open_shards
from midskip.data.tokenizer import DEFAULT_VOCABULARY
from midskip.runs import RECIPE_FILE
from midskip.train.recipe import DataSettings
from midskip.train.saved import read_saved_recipe

TEXT_FOLDER = "text"  # in the run folder: the shards, where the recipe names text
_OF_LABELLED = ("source", "settings", "length")  # all other settings are of text
_OF_SHARDS = ("source", "validation", "tokenizer", "length", "separate_documents")  # all others are of making them


def open_windows(
    settings: DataSettings, folder: Path, console: Console
) -> tuple[Prepared | LabelledData, TokenWindows | TrainingItems, Items]:
    """What `settings.source` is, and its windows or items for training and for validation.

    Raises:
        DataError: text that `open_text` or `cut_windows` refuse, settings that contradict a prepared folder, or
            labelled data that `open_labelled` refuses.
    """
    if is_labelled(settings.source):
        data = open_labelled(settings)
        return data, TrainingItems(data.training), data.validation
    if settings.settings:
        raise DataError(
            f"data.source is {settings.source!r}, text, and data.settings are {settings.settings}. Expected none: they "
            "are of labelled data, which is named 'package.module:Class'; leave them out."
        )
    text = open_text(settings, folder, console)
    if is_prepared(settings.source):
        _check_prepared(settings, text.summary["settings"])
    text.tokenizer.model_max_length = settings.length  # which the model takes at most
    return text, *cut_windows(text, settings)


def _check_prepared(settings: DataSettings, made: dict[str, Any]) -> None:
    """`DataError` for settings that say otherwise than the folder `source` was prepared with; defaults say nothing."""
    given = _given(settings, ["source"])
    made = {"pad_token": None} | made  # which earlier versions did not write
    if made.get("tokenizer") == "bpe":
        made = made | {"vocab_size": made.get("vocab_size") or DEFAULT_VOCABULARY}
    else:  # `vocab_size` is of "bpe", which recipes have for text of their own
        given.pop("vocab_size", None)
    wrong = [
        f"data.{name} is {value!r}, and the folder was prepared with {made[name]!r}"
        for name, value in given.items()
        if name in made and value != made[name]
    ]
    if wrong:
        raise DataError(
            f"data.source is {settings.source!r}, a folder that `midskip prepare` wrote: {'; '.join(wrong)}. Expected "
            "what it was prepared with, or the default; leave the setting out, or prepare the text again."
        )


def _given(settings: DataSettings, free: Collection[str]) -> dict[str, Any]:
    """The settings that are not what they are by default, but for those that are `free`."""
    usual = asdict(DataSettings())
    return {name: value for name, value in asdict(settings).items() if name not in free and value != usual[name]}


def open_labelled(settings: DataSettings) -> LabelledData:
    """The labelled data that `settings.source` names.

    Raises:
        ValueError: no such class, settings that it does not know or that are of text, or items that are too long.
    """
    if given := _given(settings, _OF_LABELLED):
        raise DataError(
            f"data.source is {settings.source!r}, labelled data, and there is data.{next(iter(given))}, a setting of "
            "text. Expected data.settings; leave the other out."
        )
    data = build_labelled(settings.source, settings.settings)
    if data.length > settings.length:
        raise DataError(
            f"An item of {settings.source!r} has {data.length} columns, and data.length is {settings.length}. Expected "
            f"{data.length} or more, what the model takes."
        )
    return data


def open_text(settings: DataSettings, folder: Path, console: Console) -> Prepared:
    """What `settings.source` is: shards, a prepared folder, or text, which is prepared into the run folder first. A run
    within the folder of another that names the same text (a dense model beside it) shares that one's.

    Raises:
        DataError: there is no such text, or it cannot be used.
    """
    if settings.source.endswith(".bin"):
        if settings.validation is None:
            raise DataError(
                f"data.source is {settings.source!r}, shards of tokens, and there is no data.validation. Expected "
                "shards of held-out tokens too; give --data.validation=....bin"
            )
        if given := _given(settings, _OF_SHARDS):
            name, value = next(iter(given.items()))
            raise DataError(
                f"data.source is {settings.source!r}, shards of tokens, and data.{name} is {value!r}, a setting of "
                "text that is made into tokens. Expected none; leave it out."
            )
        return open_shards(settings.source, settings.validation, settings.tokenizer)
    if is_prepared(settings.source):
        return open_prepared(settings.source)
    outer = folder.parent / RECIPE_FILE
    with suppress(ValueError):  # somebody's file, and not of a run
        if outer.is_file() and read_saved_recipe(outer).data == settings:
            folder = folder.parent
    prepare(
        settings.source,
        folder / TEXT_FOLDER,
        tokenizer=settings.tokenizer,
        vocab_size=settings.vocab_size,
        pad_token=settings.pad_token,
        validation=settings.validation,
        validation_share=settings.validation_share,
        max_tokens=settings.max_tokens,
        max_validation_tokens=settings.max_validation_tokens,
        text_field=settings.text_field,
        console=console,
    )
    return open_prepared(folder / TEXT_FOLDER)  # as a resumed run has it: a tokenizer saves whether it was loaded


def cut_windows(text: Prepared, settings: DataSettings) -> tuple[TokenWindows, TokenWindows]:
    """Windows for training and for validation.

    Raises:
        DataError: not enough tokens for one full window of each.
    """
    training, validation = (
        text.windows(side, settings.length, settings.separate_documents) for side in ("training", "validation")
    )
    if not any(len(shard) >= settings.length for shard in validation.shards):
        names = ", ".join(map(str, text.validation))
        raise DataError(
            f"The held-out text has {sum(map(len, validation.shards))} tokens ({names}). "
            f"Expected at least data.length, {settings.length}: raise data.validation_share, give more text as "
            "data.validation, or choose a shorter data.length."
        )
    return training, validation
