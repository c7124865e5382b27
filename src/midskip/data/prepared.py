"""Text that is ready to train on: shards of tokens, and the tokenizer they were made with."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from .batches import TokenWindows
from .errors import DataError
from .progress import TokenBar
from .shards import check_shards, open_shard
from .sources import find_files
from .split import SIDES
from .tokenizer import end_of_text_id, load_tokenizer, vocabulary_size

SUMMARY_FILE = "prepared.json"  # written last: the folder is complete
TOKENIZER_FOLDER = "tokenizer"
FORMAT = 1


@dataclass(frozen=True)
class Prepared:
    """Shards of training and validation tokens.

    Attributes:
        folder: of `midskip prepare`; None for shards of other origin.
        tokenizer: with an end-of-text token, which every document starts with.
        training: shards, in order.
        validation: shards, in order.
        summary: what is in `prepared.json`: settings, and for each side documents, tokens, UTF-8 bytes and shards.
    """

    folder: Path | None
    tokenizer: PreTrainedTokenizerBase
    training: list[Path]
    validation: list[Path]
    summary: dict[str, Any]

    @property
    def vocab_size(self) -> int:
        """The largest token id + 1, which is what an embedding needs."""
        return vocabulary_size(self.tokenizer)

    @property
    def end_of_text(self) -> int:
        """The id that every document starts with."""
        return end_of_text_id(self.tokenizer)

    def windows(self, side: str, length: int, documents_apart: bool = True) -> TokenWindows:
        """Windows of the side `"training"` or `"validation"`, memory-mapped; see `TokenWindows`."""
        shards = [open_shard(path) for path in getattr(self, side)]
        end = self.end_of_text if documents_apart else None
        return TokenWindows(shards, length, drop_last=side == "training", end_of_text=end)

    def check(self, console: Console | None = None) -> dict[str, list[dict[str, Any]]]:
        """Reads all shards once; gives by side, for each, `{"name", "num_tokens", "crc32"}`, to compare with later.

        Raises `DataError` for a shard that `check_shards` refuses, or that is not the one `midskip prepare` wrote.
        """
        num_all = sum(self.summary[side]["num_tokens"] for side in SIDES)
        found: dict[str, list[dict[str, Any]]] = {}
        with TokenBar("checking tokens", console or Console(stderr=True)) as bar:
            for side in SIDES:
                paths, expected = getattr(self, side), self.summary[side]["shards"]
                found[side] = check_shards(
                    paths, self.vocab_size, lambda num: bar.update(num, (bar.num_tokens + num) / num_all)
                )
                for path, now, then in zip(paths, found[side], expected, strict=True):
                    if now != now | then:
                        raise DataError(
                            f"The shard {str(path)!r} is not what was written there: its tokens have another checksum. "
                            "Expected it unchanged; remove its folder and prepare the text again."
                        )
        return found


def open_prepared(folder: str | Path) -> Prepared:
    """What `midskip prepare` wrote to a folder. Sizes of the shards are checked, their tokens are not read.

    Raises `DataError` if there is nothing prepared, the preparation did not end, or a shard is not whole.
    """
    folder = Path(folder).expanduser()
    file = folder / SUMMARY_FILE
    if not file.is_file():
        what = "was not prepared to its end" if is_begun(folder) else f"holds no {SUMMARY_FILE}"
        raise DataError(
            f"The folder {str(folder)!r} {what}. Expected what `midskip prepare SOURCE --output {folder}` writes; "
            "run it (again)."
        )
    try:
        summary = json.loads(file.read_bytes())
        shards = _shards_of(summary)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"The file {str(file)!r} is not of this version of midskip. Expected it as written; prepare again."
        ) from error
    paths = {side: [folder / shard["name"] for shard in shards[side]] for side in SIDES}
    for side in SIDES:
        for path, shard in zip(paths[side], shards[side], strict=True):
            if len(open_shard(path)) != shard["num_tokens"]:
                raise DataError(
                    f"The shard {str(path)!r} holds {len(open_shard(path))} tokens. Expected {shard['num_tokens']}, as "
                    f"{SUMMARY_FILE} says; remove the folder and prepare the text again."
                )
    tokenizer = load_tokenizer(str(folder / TOKENIZER_FOLDER))
    return Prepared(folder, tokenizer, paths["training"], paths["validation"], summary)


def _shards_of(summary: Any) -> dict[str, list[dict[str, Any]]]:
    """By side, the shards that `prepared.json` counts. Raises an error of some kind if it is not as written."""
    if summary["format"] != FORMAT or not isinstance(summary["settings"], dict):
        raise ValueError
    for side in SIDES:
        for counted in (summary[side], *summary[side]["shards"]):
            if type(counted["num_tokens"]) is not int:
                raise ValueError
        if any(Path(shard["name"]).name != shard["name"] for shard in summary[side]["shards"]):
            raise ValueError  # not in the folder
    return {side: summary[side]["shards"] for side in SIDES}


def open_shards(training: str, validation: str, tokenizer: str) -> Prepared:
    """Shards of any origin: `.bin` files by path, folder or glob, joined by commas, and their tokenizer by name.

    Raises `DataError` if there are none, one is no whole shard, one is on both sides, or there is no such tokenizer.
    """
    if tokenizer == "bpe":
        raise DataError(
            "The tokenizer 'bpe' is trained on text, and shards hold tokens. Expected the tokenizer that the shards "
            "were made with; give its folder, its name on the hub, or 'bytes'."
        )
    names = {"training": training, "validation": validation}
    paths = {side: find_files(name, {".bin"}, "shards of kind .bin") for side, name in names.items()}
    if both := {path.resolve() for path in paths["training"]} & {path.resolve() for path in paths["validation"]}:
        raise DataError(
            f"The shard {str(min(both))!r} is both for training and for validation. Expected different ones; name them "
            "apart, as in 'train_*.bin' and 'val_*.bin'."
        )
    summary: dict[str, Any] = {"format": FORMAT, "settings": {**names, "tokenizer": tokenizer}}
    for side in SIDES:
        shards = [{"name": path.name, "num_tokens": len(open_shard(path))} for path in paths[side]]
        summary[side] = {"num_tokens": sum(shard["num_tokens"] for shard in shards), "shards": shards}
    return Prepared(None, load_tokenizer(tokenizer), paths["training"], paths["validation"], summary)


def is_prepared(source: str) -> bool:
    """Whether a source of text names a folder that `midskip prepare` wrote to its end."""
    return Path(os.path.expanduser(source), SUMMARY_FILE).is_file()


def is_begun(folder: Path) -> bool:
    """Whether a preparation was begun there and has not ended."""
    return (folder / f"{SUMMARY_FILE}.part").is_file() and not (folder / SUMMARY_FILE).is_file()
