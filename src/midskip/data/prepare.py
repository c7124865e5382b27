"""`midskip prepare`: from text to a folder of shards, with everything that can be wrong found as early as it can be."""

from __future__ import annotations

import json
import math
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import transformers
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from midskip.locks import LOCK_FILE, locked, tidy

from .encode import encode_documents, encode_stream
from .errors import DataError
from .prepared import FORMAT, SUMMARY_FILE, TOKENIZER_FOLDER, Prepared, is_begun, open_prepared
from .progress import TokenBar, note
from .shards import SHARD_TOKENS, ShardWriter
from .sources import Source, require_apart
from .split import SIDES, split_stream
from .tokenizer import load_tokenizer, vocabulary_size

_SHARD_NAMES = {"training": "train", "validation": "validation"}
_OURS = re.compile(rf"(train|validation)_\d+\.bin(\.part)?|{re.escape(SUMMARY_FILE)}(\.part)?|{TOKENIZER_FOLDER}")
_SAMPLE_CHARACTERS = 100_000


def prepare(
    source: str,
    output: str | Path,
    *,
    tokenizer: str = "bpe",
    vocab_size: int | None = None,
    pad_token: str | None = None,
    validation: str | None = None,
    validation_share: float | None = None,
    max_tokens: int | None = None,
    max_validation_tokens: int | None = None,
    text_field: str = "text",
    shard_tokens: int = SHARD_TOKENS,
    console: Console | None = None,
) -> Prepared:
    """Tokenize a corpus into shards, on all cores, without ever holding all of it in memory.

    The folder gets `train_000000.bin`, ..., `validation_000000.bin`, ..., a folder `tokenizer`, and, last of all,
    `prepared.json`: without it the preparation has not ended. One that did not end is started afresh, one that did,
    with the same settings and from the same files, is returned as it is.

    Args:
        source: the text; see `Source`.
        output: the folder.
        tokenizer: see `load_tokenizer`; `"bpe"` is trained on the training text.
        vocab_size: of `"bpe"`, 2048 if None.
        pad_token: a special token for padding; the end of text if None. See `load_tokenizer`.
        validation: a source of its own for the validation text.
        validation_share: else the share of the documents of `source` to hold out, 0.05 if None; see `split_stream`.
        max_tokens: stop after the document with which so many training tokens are reached (and there is some
            validation text); None for all.
        max_validation_tokens: leave out validation documents once so many tokens are reached; None for all.
        text_field: of .jsonl, .parquet and data sets, the field that holds the text.
        shard_tokens: tokens a shard.
        console: where progress is shown, stderr if None.

    Raises:
        DataError: the text, a setting or the folder cannot be used, or the disk has no room. All that can be known
            without reading all of the text is found before any is written.
        ValueError: another process prepares text there.
    """
    if validation is not None and validation_share is not None:
        raise DataError(
            f"There are both validation text, {validation!r}, and a share of the source to hold out, validation_share "
            f"{validation_share}. Expected one of them; leave the other out."
        )
    for name, limit in (("max_tokens", max_tokens), ("max_validation_tokens", max_validation_tokens)):
        if limit is not None and limit < 1:
            raise DataError(f"{name} is {limit}. Expected 1 or more, or none for all of the text.")
    share = 0.05 if validation_share is None else validation_share
    settings = {
        "source": source,
        "tokenizer": tokenizer,
        "vocab_size": vocab_size,
        "pad_token": pad_token,
        "validation": validation,
        "validation_share": share if validation is None else None,
        "max_tokens": max_tokens,
        "max_validation_tokens": max_validation_tokens,
        "text_field": text_field,
        "shard_tokens": shard_tokens,
    }
    folder = Path(output).expanduser()
    if (folder / SUMMARY_FILE).is_file():
        tidy(folder)
        return _same(open_prepared(folder), settings)
    _check_folder(folder)
    with locked(folder):
        if (folder / SUMMARY_FILE).is_file():  # by another process, in between
            return _same(open_prepared(folder), settings)
        return _prepare(folder, settings, share, console or Console(stderr=True))


def _prepare(folder: Path, settings: Mapping[str, Any], share: float, console: Console) -> Prepared:
    """The same, in a folder that is checked and locked."""
    streams = _open(settings["source"], settings["validation"], share, settings["text_field"])
    for stream in streams:
        note(stream.source.left_out, console)
    with console.status("preparing the tokenizer"):
        chosen = load_tokenizer(
            settings["tokenizer"], streams[0].training_text(), settings["vocab_size"], settings["pad_token"]
        )
    num_ids = vocabulary_size(chosen)
    size = settings["shard_tokens"]
    writers = {side: ShardWriter(folder, name, num_ids, size) for side, name in _SHARD_NAMES.items()}
    limits = {"training": settings["max_tokens"], "validation": settings["max_validation_tokens"]}
    _clear(folder)
    _check_space(folder, chosen, streams, limits, 2 if num_ids <= 2**16 else 4)

    part = folder / f"{SUMMARY_FILE}.part"  # there from the first file to the last
    part.write_text(json.dumps({"settings": settings}), encoding="utf-8")
    chosen.save_pretrained(folder / TOKENIZER_FOLDER)
    summary: dict[str, Any] = {"format": FORMAT, "settings": settings, "state": _state(settings)}
    for stream in streams:
        summary |= _write(stream, chosen, writers, limits, console)
    if len(streams) == 1 and not any(limits.values()):
        num_training, num_held_out = (summary[side]["num_documents"] for side in SIDES)
        note(_uneven(num_training, num_held_out, share), console)
    summary["versions"] = {"midskip": sys.modules["midskip"].__version__, "python": platform.python_version()}
    summary["versions"] |= {module.__name__: module.__version__ for module in (transformers, tokenizers)}
    part.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    part.replace(folder / SUMMARY_FILE)
    paths = {side: [folder / shard["name"] for shard in writers[side].shards] for side in SIDES}
    return Prepared(folder, chosen, paths["training"], paths["validation"], summary)


class _Stream(NamedTuple):
    """A source, and the sides that its documents go to."""

    source: Source
    sides: Sequence[str]
    share: float

    def documents(self) -> Iterator[tuple[str, str]]:
        if len(self.sides) > 1:
            return split_stream(self.source, self.share)
        return ((self.sides[0], document) for document in self.source)

    def training_text(self) -> Iterator[str]:
        return (document for side, document in self.documents() if side == "training")


def _open(source: str, validation: str | None, share: float, text_field: str) -> list[_Stream]:
    """The streams of text: one for both sides, or one for each."""
    sources = [Source(name, text_field) for name in (source, validation) if name is not None]
    if text_field != "text" and not any(source.has_fields for source in sources):
        raise DataError(f"text_field is {text_field!r}, and the text has no fields. Expected none; leave it out.")
    if validation is None:
        return [_Stream(sources[0], SIDES, share)]
    require_apart(sources[0], sources[1], "leave validation out to hold out a share of the documents")
    return [_Stream(source, (side,), share) for source, side in zip(sources, SIDES, strict=True)]


def _write(
    stream: _Stream,
    tokenizer: PreTrainedTokenizerBase,
    writers: Mapping[str, ShardWriter],
    limits: Mapping[str, int | None],
    console: Console,
) -> dict[str, dict[str, Any]]:
    """Fills the shards of the stream's sides; gives, for each of them, what the summary says of it."""
    counts = {side: {"num_documents": 0, "num_tokens": 0, "num_bytes": 0} for side in stream.sides}
    main, kept = stream.sides[0], False
    limit = limits[main] or math.inf
    with ExitStack() as stack:
        bar = stack.enter_context(TokenBar(f"preparing {'text' if len(counts) > 1 else main + ' text'}", console))
        for side in stream.sides:
            stack.enter_context(writers[side])
        for encoded in encode_stream(tokenizer, stream.documents()):
            count = counts[encoded.side]
            if encoded.starts:
                full = {side for side in counts if counts[side]["num_tokens"] >= (limits[side] or math.inf)}
                if main in full and all(counts[side]["num_tokens"] for side in counts):
                    break
                kept = encoded.side not in full
            if kept:
                writers[encoded.side].write(encoded.ids)
                count["num_documents"] += encoded.starts
                count["num_tokens"] += len(encoded.ids)
                count["num_bytes"] += encoded.num_bytes
            share = max(stream.source.share_read or 0, counts[main]["num_tokens"] / limit)
            bar.update(len(encoded.ids) if kept else 0, min(share, 1.0) or None)
    return {side: {**counts[side], "shards": writers[side].shards} for side in counts}


def _uneven(num_training: int, num_held_out: int, share: float) -> str:
    """What is said of a split that chance does not explain: five standard deviations away."""
    total = num_training + num_held_out
    if abs(num_held_out - share * total) <= 5 * math.sqrt(share * (1 - share) * total):
        return ""
    return (
        f"{num_held_out:,} of {total:,} documents are held out, where a share of {share:g} is about "
        f"{share * total:,.0f}: copies of a document are all on one side. Remove them, or name held-out text."
    )


def _same(prepared: Prepared, settings: Mapping[str, Any]) -> Prepared:
    """What is prepared already, if it is what is asked for."""
    earlier, state = prepared.summary["settings"], _state(settings)
    changes = [
        f"{name} was {earlier.get(name)!r} and is {settings[name]!r}"
        for name in settings
        if earlier.get(name) != settings[name]
    ]
    if not changes and state not in (None, prepared.summary["state"]):
        changes = [f"the text has changed, from {prepared.summary['state']} to {state}"]
    if changes:
        raise DataError(
            f"The folder {str(prepared.folder)!r} holds text that was prepared otherwise: {', '.join(changes)}. "
            "Expected the same settings and unchanged files; give another output, or remove that folder: a run then "
            "goes on with the new text under --resume --accept_changes."
        )
    return prepared


def _state(settings: Mapping[str, Any]) -> list[str] | None:
    """Of the text (see `Source`); None if it is gone, which does no harm to its shards."""
    try:
        return [Source(settings[name]).state for name in ("source", "validation") if settings[name] is not None]
    except DataError:
        return None


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise DataError(f"output is {str(folder)!r}, which is a file. Expected a folder; give another.")
    names = {path.name for path in folder.iterdir()} - {LOCK_FILE} if folder.exists() else set()
    foreign = {name for name in names if not _OURS.fullmatch(name)} if is_begun(folder) else names
    if foreign:
        raise DataError(
            f"The folder {str(folder)!r} holds other files, {min(foreign)!r} for one. Expected a new or empty folder, "
            "or one that an earlier preparation left; give another."
        )


def _clear(folder: Path) -> None:
    """Remove what a preparation left that did not end; what marks it as one last, so that it can be killed here too."""
    marker = f"{SUMMARY_FILE}.part"
    for path in sorted(folder.glob("*"), key=lambda path: path.name == marker):
        if path.name != LOCK_FILE:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _check_space(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    streams: Sequence[_Stream],
    limits: Mapping[str, int | None],
    id_bytes: int,
) -> None:
    """`DataError` if the shards will clearly not fit on the disk, judged by the size and the start of the text."""
    num_bytes = 0
    for stream in streams:
        sample = next(iter(stream.source))[:_SAMPLE_CHARACTERS]
        tokens_per_byte = len(encode_documents(tokenizer, [sample])) / len(sample.encode())
        num_tokens = min(
            (stream.source.num_text_bytes or math.inf) * tokens_per_byte, limits[stream.sides[0]] or math.inf
        )
        num_bytes += int(id_bytes * num_tokens) if num_tokens < math.inf else 0
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    num_free = shutil.disk_usage(place).free
    if num_bytes > num_free:
        raise DataError(
            f"The disk of {str(folder)!r} has {num_free / 1e9:.1f} GB free, and the shards will take about "
            f"{num_bytes / 1e9:.1f} GB. Expected room for them; free some, give another output, or set max_tokens."
        )
