"""The split of documents into training and validation text, by their text alone."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence

from .errors import DataError

SIDES = ("training", "validation")
_HEAD_DOCUMENTS, _HEAD_CHARACTERS = 1000, 8_000_000  # looked at together, so that no side stays empty


def split_stream(documents: Iterable[str], validation_share: float = 0.05) -> Iterator[tuple[str, str]]:
    """Each document with its side, `"training"` or `"validation"`, in the given order; both sides get some.

    A document goes to validation if a hash of its text falls below `validation_share`, a share of documents, not of
    bytes, in (0, 1). So it keeps its side whatever stands beside it, in any order, under any seed. If that leaves a
    side of the first documents (1000, or 8 million characters) empty, the one with the nearest hash changes sides, and
    its copies do. A single document is cut in two near its end: at a paragraph if one ends about there, else at a line,
    else at a word.

    Raises `DataError` if `validation_share` is not in (0, 1), or there is no text, or no place to cut it.
    """
    _check_share(validation_share)
    return _split(iter(documents), validation_share, _HEAD_DOCUMENTS, _HEAD_CHARACTERS)


def split_documents(documents: Sequence[str], validation_share: float = 0.05) -> tuple[list[str], list[str]]:
    """Training and validation documents; as `split_stream`, with all documents looked at together."""
    _check_share(validation_share)
    sides: dict[str, list[str]] = {side: [] for side in SIDES}
    for side, document in _split(iter(documents), validation_share, len(documents), float("inf")):
        sides[side].append(document)
    return sides["training"], sides["validation"]


def _check_share(share: float) -> None:
    if not 0 < share < 1:
        raise DataError(
            f"validation_share is {share}. Expected a number between 0 and 1, both excluded; 0.05 is usual."
        )


def _split(
    documents: Iterator[str], share: float, head_documents: int, head_characters: float
) -> Iterator[tuple[str, str]]:
    head: list[str] = []
    for document in documents:
        head.append(document)
        head_characters -= len(document)
        if len(head) > 1 and (len(head) >= head_documents or head_characters < 0):
            break
    if not head:
        raise DataError("There are no documents to split. Expected at least one; load some text first.")
    if len(head) == 1:
        cut = _cut(head[0], share)
        yield from zip(SIDES, (head[0][:cut], head[0][cut:]), strict=True)
        return
    shares = [_hash_share(document) for document in head]
    validation = {i for i, value in enumerate(shares) if value < share}
    moved_share = None  # the hash of a text that changes sides, with all its copies
    if len(validation) in (0, len(head)):
        nearest = max(shares) if validation else min(shares)
        moved = {i for i, value in enumerate(shares) if value == nearest}
        if len(moved) < len(head):
            moved_share = nearest
        else:  # all are copies of one text
            moved = {0}
        validation ^= moved
    for i, document in enumerate(head):
        yield SIDES[i in validation], document
    del head
    for document in documents:
        value = _hash_share(document)
        yield SIDES[(value < share) ^ (value == moved_share)], document


def _hash_share(text: str) -> float:
    """A number in [0, 1) that depends on nothing but the text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big") / 2**48


def _cut(text: str, share: float) -> int:
    """Where the last `share` of a text begins, moved by up to half of it to the best boundary there is."""
    target, reach = len(text) * (1 - share), len(text) * share / 2
    first, last = len(text) - len(text.lstrip()), len(text.rstrip())  # cut outside, and one side is blank
    for boundary, limit in ((r"\n\s*\n", reach), (r"\n", reach), (r"\s+", len(text))):
        cuts = (match.end() for match in re.finditer(boundary, text) if first < match.start() < last)
        cut = min(cuts, key=lambda end: abs(end - target), default=None)
        if cut is not None and abs(cut - target) <= limit:
            return cut
    raise DataError(
        f"The text is a single document of {len(text)} characters with no place between two words to "
        "cut it at, so no validation text can be taken from it. Expected two words or more; give more text."
    )
