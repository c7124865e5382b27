"""A lossless tokenizer learnt from documents, documents to token ids, and the bytes a token id stands for."""

import json
import re
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .corpus import END_OF_TEXT, DataError, progress_bar

_SMALLEST_VOCABULARY = 257  # 256 bytes and the end of text
_PIECE_CHARACTERS = 100_000  # of a document: a core of its own for each piece
_BATCH_CHARACTERS = 1_000_000  # of pieces: enough to keep all cores busy, and some 150 MB of memory
_WORD_GAP = re.compile(r"(?<=[A-Za-z]) (?=[A-Za-z])")


def train_tokenizer(documents: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer learnt from `documents`, the same one whenever the documents are the same.

    It has at most `vocab_size` tokens, fewer if the text has not so many pairs to make tokens of;
    `len(tokenizer)` tells. Token 0 is `END_OF_TEXT`, the only special token, for the end of a text and
    for padding. Any text survives: `decode(encode(text)) == text`, also where it spells `<|endoftext|>`:
    that is encoded as plain characters, and the special token is had by its id alone. All this holds
    after saving and loading too.

    Raises `DataError` if `vocab_size` is below 257 or there is no text.
    """
    if vocab_size < _SMALLEST_VOCABULARY:
        raise DataError(
            f"vocab_size is {vocab_size}. Expected {_SMALLEST_VOCABULARY} or more, for the 256 bytes and the "
            "end of text; 4096 suits a small corpus."
        )
    if not any(documents):
        raise DataError("There is no text to learn a tokenizer from. Expected a document that is not empty.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for document in documents for piece in _pieces(document)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def encode_documents(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], progress: bool = True) -> np.ndarray:
    """Token ids of all documents in a row, each followed by the end-of-text id: int32, one dimension.

    Text that spells a special token is encoded as plain characters, and no other special tokens are
    added. Where the tokenizer is byte-level, a document of more than 100,000 characters is encoded in
    pieces, cut between two plain words, where such tokenizers cut anyway; in one piece it would keep one
    core busy and take a hundred times its size in memory.

    Raises `DataError` if the tokenizer has no end-of-text (eos) token.
    """
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise DataError(
            "The tokenizer has no end-of-text token to put between documents. Expected one with an "
            "eos_token; set tokenizer.eos_token to one of its tokens."
        )
    byte_level = "ByteLevel" in _decoder_kinds(tokenizer)
    encoded = [np.empty(0, np.int32)]
    for batch in progress_bar(_batches(documents, byte_level), "Encoding text", progress):
        texts = [text for text, _ in batch]
        encoding = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)
        for ids, (_, is_last) in zip(encoding["input_ids"], batch, strict=True):
            encoded.append(np.array([*ids, end] if is_last else ids, np.int32))
    return np.concatenate(encoded)


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """UTF-8 bytes of text that each token id stands for, 0 for special ones: int64 [V], V the largest id + 1.

    Summed over the ids of a text it gives the size of the text, so a loss per byte compares models
    whatever their tokenizers. Exact for byte-level BPE. In SentencePiece-style vocabularies `▁` counts as
    one space and `<0xAB>` as one byte; a space that such a tokenizer puts before a text is counted with
    the text.

    Raises `DataError` for other kinds, where tokens do not tell the bytes they stand for.
    """
    kinds = _decoder_kinds(tokenizer)
    if not kinds & {"ByteLevel", "ByteFallback", "Metaspace"}:
        raise DataError(
            f"Bits per byte cannot be computed with this tokenizer (a {type(tokenizer).__name__}, decoder "
            f"{', '.join(sorted(kinds)) or 'unknown'}): its tokens do not tell how many bytes they stand "
            "for. Expected a byte-level or SentencePiece-style one; use one, or the loss per token."
        )
    vocabulary = tokenizer.get_vocab()
    num_bytes = [0] * (max(vocabulary.values()) + 1)
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    for token, token_id in vocabulary.items():
        if "ByteLevel" in kinds:  # each character of its alphabet is a byte; what is not of it stands for itself
            num_bytes[token_id] = len(token) if alphabet.issuperset(token) else len(token.encode())
        else:
            is_byte = re.fullmatch(r"<0x[0-9A-F]{2}>", token)
            num_bytes[token_id] = 1 if is_byte else len(token.replace("▁", " ").encode())
    for token_id, added in tokenizer.added_tokens_decoder.items():  # these are found in the text as they are
        num_bytes[token_id] = 0 if added.special else len(added.content.encode())
    return torch.tensor(num_bytes)


def _pieces(document: str) -> Iterator[str]:
    """The document, in parts if long; byte-level tokenizers start a token at a space between letters."""
    start = 0
    while gap := _WORD_GAP.search(document, start + _PIECE_CHARACTERS):
        yield document[start : gap.start()]
        start = gap.start()
    yield document[start:]


def _batches(documents: Sequence[str], cut: bool) -> list[list[tuple[str, bool]]]:
    """Pieces of documents, and whether each ends its document, in lists of about equal size."""
    batches: list[list[tuple[str, bool]]] = [[]]
    num_characters = 0
    for document in documents:
        pieces = list(_pieces(document)) if cut else [document]
        for i, piece in enumerate(pieces):
            if num_characters and num_characters + len(piece) > _BATCH_CHARACTERS:
                batches.append([])
                num_characters = 0
            batches[-1].append((piece, i + 1 == len(pieces)))
            num_characters += len(piece)
    return [batch for batch in batches if batch]


def _decoder_kinds(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Names of the steps that turn tokens into text; none for a tokenizer written in Python."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return set()
    decoder = json.loads(backend.to_str())["decoder"] or {}
    return {step["type"] for step in decoder.get("decoders", [decoder]) if step}
