"""Documents to token ids, on all cores, in order, a bounded amount of text at a time."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
from rich.console import Console
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from .progress import TokenBar, note
from .sources import Source
from .threads import in_order
from .tokenizer import bytes_tokenizer, decoder_kinds, end_of_text_id, pieces

_BATCH_CHARACTERS = 1_000_000  # of pieces: enough to keep all cores busy, and some 150 MB of memory
_NUM_THREADS = 2  # a batch is begun before the one ahead has ended, so that no core waits


class Piece(NamedTuple):
    """A document, or a part of a long one."""

    side: str  # what the document was given with
    starts: bool  # whether it is the first of its document
    text: str


class Encoded(NamedTuple):
    """A piece as token ids; with the end-of-text id first, if it starts its document."""

    side: str
    starts: bool
    ids: np.ndarray
    num_bytes: int  # of its text in UTF-8


def encode_stream(tokenizer: PreTrainedTokenizerBase, documents: Iterable[tuple[str, str]]) -> Iterator[Encoded]:
    """Token ids of documents given as (side, text), in order; read, encoded and handed out at the same time.

    The end-of-text id stands before each document: it predicts the first token, and the last token predicts the end.
    Text that spells a special token is encoded as plain characters, and no other special tokens are added. Where the
    tokenizer is byte-level, a long document is encoded in pieces, cut between two plain words, where such tokenizers
    cut anyway; in one piece it would keep one core busy and take a hundred times its size in memory.

    Raises `DataError` if the tokenizer has no end-of-text (eos) token.
    """
    end, encode = np.array([end_of_text_id(tokenizer)], np.int32), _encoder(tokenizer)
    is_byte_level = "ByteLevel" in decoder_kinds(tokenizer)

    def encode_batch(batch: list[Piece]) -> list[Encoded]:
        return [
            Encoded(
                piece.side, piece.starts, np.concatenate([end, ids]) if piece.starts else ids, len(piece.text.encode())
            )
            for piece, ids in zip(batch, encode([piece.text for piece in batch]), strict=True)
        ]

    batches = _batches((Piece(side, *part) for side, text in documents for part in _parts(text, is_byte_level)))
    return (encoded for batch in in_order(encode_batch, batches, _NUM_THREADS) for encoded in batch)


def encode_documents(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str]) -> np.ndarray:
    """Token ids of all documents in a row, as `encode_stream` gives them: int32, one dimension."""
    parts = [encoded.ids for encoded in encode_stream(tokenizer, (("", document) for document in documents))]
    return np.concatenate([np.empty(0, np.int32), *parts])


def encode_source(
    tokenizer: PreTrainedTokenizerBase, source: str, text_field: str = "text", console: Console | None = None
) -> np.ndarray:
    """Token ids of all documents of a source (see `Source`), in a row, in memory: int32, one dimension."""
    documents, parts = Source(source, text_field), [np.empty(0, np.int32)]
    console = console or Console(stderr=True)
    note(documents.left_out, console)
    with TokenBar("encoding text", console) as bar:
        for encoded in encode_stream(tokenizer, (("", document) for document in documents)):
            parts.append(encoded.ids)
            bar.update(len(encoded.ids), documents.share_read)
    return np.concatenate(parts)


def _parts(document: str, cut: bool) -> Iterator[tuple[bool, str]]:
    return ((not i, piece) for i, piece in enumerate(pieces(document) if cut else [document]))


def _batches(items: Iterable[Piece]) -> Iterator[list[Piece]]:
    """The pieces in lists of about equal size."""
    batch: list[Piece] = []
    num_characters = 0
    for piece in items:
        if num_characters and num_characters + len(piece.text) > _BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
        batch.append(piece)
        num_characters += len(piece.text)
    if batch:
        yield batch


def _encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[str]], Iterable[np.ndarray]]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):  # written in Python
        plain = partial(tokenizer, add_special_tokens=False, split_special_tokens=True, verbose=False)
        return lambda texts: (np.array(ids, np.int32) for ids in plain(texts)["input_ids"])
    if _is_plain_bytes(backend):  # ten times faster
        return lambda texts: (np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts)
    backend.no_padding()  # all three are set again by whatever calls the tokenizer itself
    backend.no_truncation()
    backend.encode_special_tokens = True
    encode = backend.encode_batch_fast
    return lambda texts: (np.array(encoding.ids, np.int32) for encoding in encode(texts, add_special_tokens=False))


def _is_plain_bytes(backend: Tokenizer) -> bool:
    plain = bytes_tokenizer().backend_tokenizer
    return (
        backend.get_vocab_size() == plain.get_vocab_size()
        and backend.get_vocab() == plain.get_vocab()
        and backend.normalizer is None
    )
