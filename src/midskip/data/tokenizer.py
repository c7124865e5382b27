"""Tokenizers: byte-level BPE learnt from documents, plain bytes, any of Hugging Face's; and the bytes of a token."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .errors import END_OF_TEXT, DataError
from .hub import refusing

_NAMES = "'bpe', 'bytes', a folder of a Hugging Face tokenizer, or its name on the hub"
_SMALLEST_VOCABULARY = 257  # 256 bytes and the end of text
DEFAULT_VOCABULARY = 2048
_SAMPLE_CHARACTERS = 50_000_000  # of a corpus to learn from
_PIECE_CHARACTERS = 100_000  # of a document, to be learnt from or encoded by one core
_LARGEST_VOCABULARY = 2**24  # the trainer takes memory for all of it at once
_TELLING = {"ByteLevel", "ByteFallback", "Metaspace"}  # decoders of tokens that tell their bytes
_OF_TOKENIZERS = re.compile(r"tokenizer|config\.json|vocab|merges|tekken|.*\.(model|tiktoken)$")  # names of files
_WORD_GAP = re.compile(r"(?<=[A-Za-z]) (?=[A-Za-z])")


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer learnt from `documents`, the same one whenever the documents are the same.

    It has at most `vocab_size` tokens, fewer if the text has not so many pairs to make tokens of;
    `len(tokenizer)` tells. Token 0 is `END_OF_TEXT`, the only special token, for the end of a text and
    for padding. Any text survives: `decode(encode(text)) == text`, also where it spells `<|endoftext|>`:
    that is encoded as plain characters, and the special token is had by its id alone. All this holds
    after saving and loading too.

    Raises `DataError` if `vocab_size` is below 257 or above 2**24, or there is no text.
    """
    if vocab_size < _SMALLEST_VOCABULARY:
        raise DataError(
            f"vocab_size is {vocab_size}. Expected {_SMALLEST_VOCABULARY} or more, for the 256 bytes and the "
            "end of text; 4096 suits a small corpus."
        )
    if vocab_size > _LARGEST_VOCABULARY:
        raise DataError(
            f"vocab_size is {vocab_size}. Expected {_LARGEST_VOCABULARY} or fewer; 50,000 suit a large corpus."
        )
    parts = (piece for document in documents for piece in pieces(document) if piece)
    first = next(parts, None)
    if first is None:
        raise DataError("There is no text to learn a tokenizer from. Expected a document that is not empty.")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer = _byte_level(models.BPE())
    tokenizer.train_from_iterator(chain([first], parts), trainer)
    return _wrap(tokenizer)


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer that has learnt nothing: ids 0 to 255 are the bytes of the text in UTF-8, 256 is `END_OF_TEXT`.

    Any text survives it, as with `train_tokenizer`, also after saving and loading.
    """
    tokenizer = _byte_level(models.BPE(_byte_alphabet(), []), split_words=False)
    tokenizer.add_special_tokens([END_OF_TEXT])
    return _wrap(tokenizer)


def load_tokenizer(
    name: str, documents: Iterable[str] = (), vocab_size: int | None = None, pad_token: str | None = None
) -> PreTrainedTokenizerBase:
    """A tokenizer by name, with an end-of-text token.

    `name` is `"bpe"`, for one that is trained on `documents` (on the first 50 million characters of them) with
    `vocab_size` tokens, 2048 if that is None; `"bytes"`, for plain bytes; else a Hugging Face tokenizer by folder or
    by its name on the hub. A folder may also hold no more than GPT-2's `vocab.json` and `merges.txt`.

    Padding is done with the end of text by default. `pad_token`, as `"<|pad|>"`, is a special token of its own for it,
    the last of the vocabulary; one of the tokens of `"bpe"`, one more of others.

    Raises `DataError` if there is no such tokenizer, it has no end-of-text (eos) token, `vocab_size` is given for one
    that is not trained here, `pad_token` is a token of text, or for what `train_tokenizer` refuses.
    """
    if name == "bpe":
        size = DEFAULT_VOCABULARY if vocab_size is None else vocab_size
        if pad_token is not None and size == _SMALLEST_VOCABULARY:
            raise DataError(
                f"vocab_size is {size}, and there is a pad_token. Expected {_SMALLEST_VOCABULARY + 1} or more, for the "
                "256 bytes, the end of text and the padding; 4096 suits a small corpus."
            )
        return _padded(train_tokenizer(_sample(documents), size - (pad_token is not None)), pad_token)
    if vocab_size is not None:
        raise DataError(
            f"vocab_size is {vocab_size}, and the tokenizer {name!r} has its own size. Expected vocab_size with 'bpe' "
            "alone; leave it out."
        )
    tokenizer = bytes_tokenizer() if name == "bytes" else _load_pretrained(name)
    end_of_text_id(tokenizer)
    return _padded(tokenizer, pad_token)


def end_of_text_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that stands before each document. Raises `DataError` if the tokenizer has no such (eos) token."""
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise DataError(
            "The tokenizer has no end-of-text token to put between documents. Expected one with an "
            "eos_token; set tokenizer.eos_token to one of its tokens."
        )
    return end


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest token id + 1, which is what an embedding needs."""
    return max(tokenizer.get_vocab().values()) + 1


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """UTF-8 bytes of text that each token id stands for, 0 for special ones: int64 [V], V the largest id + 1.

    Summed over the ids of a text it gives the size of the text, so a loss per byte compares models
    whatever their tokenizers. Exact for byte-level BPE. In SentencePiece-style vocabularies `▁` counts as
    one space and `<0xAB>` as one byte; a space that such a tokenizer puts before a text is counted with
    the text.

    Raises `DataError` for other kinds, where tokens do not tell the bytes they stand for.
    """
    kinds = decoder_kinds(tokenizer)
    if not kinds & _TELLING:
        raise DataError(
            f"Bits per byte cannot be computed with this tokenizer (a {type(tokenizer).__name__}, decoder "
            f"{', '.join(sorted(kinds)) or 'unknown'}): its tokens do not tell how many bytes they stand "
            "for. Expected a byte-level or SentencePiece-style one; use one, or the loss per token."
        )
    vocabulary = tokenizer.get_vocab()
    num_bytes = [0] * (max(vocabulary.values()) + 1)
    alphabet = _byte_alphabet()
    for token, token_id in vocabulary.items():
        num_bytes[token_id] = len(_spelt(token, kinds, alphabet))
    for token_id, added in tokenizer.added_tokens_decoder.items():  # these are found in the text as they are
        num_bytes[token_id] = 0 if added.special else len(added.content.encode())
    return torch.tensor(num_bytes)


def bytes_of_tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[bytes]:
    """UTF-8 of what each token of a text stands for; a character may be spread over several. A special token is what
    it is called. Of kinds of tokenizers whose tokens do not tell bytes, it is each token decoded alone.
    """
    kinds, alphabet = decoder_kinds(tokenizer), _byte_alphabet()
    if not kinds & _TELLING:
        return [str(tokenizer.decode([token_id])).encode(errors="surrogatepass") for token_id in ids]
    tokens = tokenizer.convert_ids_to_tokens(list(ids))
    added = tokenizer.added_tokens_decoder
    return [
        added[token_id].content.encode() if token_id in added else _spelt(token or "", kinds, alphabet)
        for token_id, token in zip(ids, tokens, strict=True)
    ]


def _spelt(token: str, kinds: set[str], alphabet: Mapping[str, int]) -> bytes:
    """What an entry of the vocabulary stands for, if the decoder is of kinds that tell."""
    if "ByteLevel" in kinds:  # each character of its alphabet is a byte; what is not of it stands for itself
        return bytes(alphabet[c] for c in token) if alphabet.keys() >= set(token) else token.encode()
    is_byte = re.fullmatch(r"<0x[0-9A-F]{2}>", token)
    return bytes([int(token[3:5], 16)]) if is_byte else token.replace("▁", " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level vocabularies."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    others = iter(token for token in alphabet if ord(token) > 255)  # those that stand for bytes that do not print
    return {chr(byte) if chr(byte) in alphabet else next(others): byte for byte in range(256)}


def pieces(document: str) -> Iterator[str]:
    """The document, in parts if long; byte-level tokenizers start a token at a space between letters."""
    start = 0
    while gap := _WORD_GAP.search(document, start + _PIECE_CHARACTERS):
        yield document[start : gap.start()]
        start = gap.start()
    yield document[start:]


def _byte_level(model: models.Model, split_words: bool = True) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split_words)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def _padded(tokenizer: PreTrainedTokenizerBase, pad_token: str | None) -> PreTrainedTokenizerBase:
    """With that special token for padding, which is added if it is not there."""
    if pad_token is None:
        return tokenizer
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    is_text = pad_token in tokenizer.get_vocab() and pad_token not in added
    if not pad_token.strip() or pad_token == tokenizer.eos_token or is_text:
        raise DataError(
            f"pad_token is {pad_token!r}, which is empty or a token for something else. Expected a special token, as "
            "'<|pad|>'; leave it out to pad with the end of text."
        )
    tokenizer.add_special_tokens({"pad_token": pad_token})
    return tokenizer


def _sample(documents: Iterable[str]) -> Iterator[str]:
    num_left = _SAMPLE_CHARACTERS
    for document in documents:
        yield document[:num_left]
        num_left -= len(document)
        if num_left <= 0:
            return


def _load_pretrained(name: str) -> PreTrainedTokenizerBase:
    folder = Path(name).expanduser()
    if not folder.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise DataError(f"There is no tokenizer at {name!r}: no such folder. Expected {_NAMES}; check the spelling.")
    files = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    if folder.is_dir() and not any(_OF_TOKENIZERS.match(file) for file in files):
        raise DataError(f"There is no tokenizer in the folder {name!r}. Expected {_NAMES}; give another folder.")
    described = not files.isdisjoint({"tokenizer.json", "tokenizer_config.json", "config.json"})
    kind = AutoTokenizer if described or not {"vocab.json", "merges.txt"} <= files else GPT2Tokenizer
    with refusing(f"The tokenizer {name!r} cannot be loaded", f"{_NAMES}; check the name and the network"):
        return kind.from_pretrained(folder if files else name, trust_remote_code=False)


def decoder_kinds(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Names of the steps that turn tokens into text; none for a tokenizer written in Python."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return set()
    decoder = {} if backend.decoder is None else json.loads(backend.decoder.__getstate__())
    return {step["type"] for step in decoder.get("decoders", [decoder]) if step}
