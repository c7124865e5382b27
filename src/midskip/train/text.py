"""The tokens a recipe names: prepared if they are text, and cut into windows."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from midskip.data import DataError, TokenWindows
from midskip.data.prepare import prepare
from midskip.data.prepared import SUMMARY_FILE, Prepared, open_prepared, open_shards
from midskip.runs import RECIPE_FILE
from midskip.train.recipe import DataSettings, read_recipe

TEXT_FOLDER = "text"  # in the run folder: the shards, where the recipe names text


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
        return open_shards(settings.source, settings.validation, settings.tokenizer)
    if Path(settings.source, SUMMARY_FILE).is_file():
        return open_prepared(settings.source)
    outer = folder.parent / RECIPE_FILE
    if outer.is_file() and read_recipe(outer).data == settings:
        folder = folder.parent
    prepare(
        settings.source,
        folder / TEXT_FOLDER,
        tokenizer=settings.tokenizer,
        vocab_size=settings.vocab_size,
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
