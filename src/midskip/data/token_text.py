"""What each token adds to a text, where a character, as people see it, may be spread over several tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import regex
from transformers import PreTrainedTokenizerBase

from .tokenizer import bytes_of_tokens

MOST_PARTS = 64  # more than any character of a language or emoji takes; a row of accents may have no end


class TokenText(NamedTuple):
    """A token in its text.

    text: of the fewest tokens around this one, itself included, that begin and end between characters.
    part: which of those it is, from 0.
    num_parts: how many they are; 1 for a token of whole characters.
    """

    text: str
    part: int = 0
    num_parts: int = 1


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[TokenText]:
    """Of each token of a text. The texts of those with part 0, joined, are the whole text.

    A character is what Unicode calls an extended grapheme cluster: an accent belongs to its letter, and an emoji of
    several signs is one. Bytes that are no UTF-8 are shown as `<0xE4>`.
    """
    pieces = bytes_of_tokens(tokenizer, ids)
    whole = b"".join(pieces)
    characters = regex.findall(r"\X", whole.decode("utf-8", "surrogateescape"))  # a wrong byte is half a surrogate pair
    between = {0, *accumulate(len(character.encode("utf-8", "surrogateescape")) for character in characters)}
    texts: list[TokenText] = []
    start = end = num_parts = 0
    for piece in pieces:
        end, num_parts = end + len(piece), num_parts + 1
        in_a_sign = end < len(whole) and whole[end] & 0xC0 == 0x80  # of UTF-8, whose further bytes are 10xxxxxx
        if end in between or (num_parts >= MOST_PARTS and not in_a_sign):  # the end of the text is one, too
            text = _shown(whole[start:end])
            texts += [TokenText(text, part, num_parts) for part in range(num_parts)]
            start, num_parts = end, 0
    return texts


def _shown(raw: bytes) -> str:
    text = raw.decode("utf-8", "surrogateescape")
    return regex.sub("[\udc80-\udcff]", lambda byte: f"<0x{ord(byte[0]) - 0xDC00:02X}>", text)
