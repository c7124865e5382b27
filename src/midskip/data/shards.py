"""Token ids in files: the shards that llm.c, nanoGPT's successors and the published FineWeb tokens share.

A shard is 256 int32 of header, then token ids, all little-endian. The header starts with a magic number, a version
and the number of tokens; which magic and version says how wide the ids are (uint16 or uint32).
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from .errors import DataError
from .threads import in_order

HEADER_BYTES = 1024
SHARD_TOKENS = 100_000_000
_LARGEST_SHARD_TOKENS = 2**31 - 1  # the count is an int32
_UINT16, _UINT32 = (20240520, 1), (20240801, 7)  # magic and version
_TYPES = {_UINT16: np.dtype("<u2"), _UINT32: np.dtype("<u4")}
_SCAN_TOKENS = 1 << 22  # at a time


class ShardWriter:
    """Writes token ids to `{name}_000000.bin`, `{name}_000001.bin`, ... in a folder.

    A shard is written as `.bin.part`, and gets its header and its name when it is whole: what a killed process leaves
    is never taken for a shard. Ids are uint16 where `vocab_size` is at most 65,536, else uint32.

    Attributes:
        num_tokens: written so far.
        shards: `fingerprint` of each whole shard.

    Raises:
        DataError: `shard_tokens` is below 1 or more than a header can count.
    """

    def __init__(self, folder: Path, name: str, vocab_size: int, shard_tokens: int = SHARD_TOKENS) -> None:
        if not 1 <= shard_tokens <= _LARGEST_SHARD_TOKENS:
            raise DataError(
                f"shard_tokens is {shard_tokens}. Expected 1 to {_LARGEST_SHARD_TOKENS}, which is what the header of "
                f"a shard can count; {SHARD_TOKENS} is usual."
            )
        self.folder, self.name, self.shard_tokens = folder, name, shard_tokens
        self.kind = _UINT16 if vocab_size <= 2**16 else _UINT32
        self.num_tokens = 0
        self.shards: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None
        self._num_in_file = self._crc32 = 0

    def write(self, ids: np.ndarray) -> None:
        """Append token ids, one dimension; goes on in a new shard wherever one is full."""
        ids = ids.astype(_TYPES[self.kind], copy=False)
        self.num_tokens += len(ids)
        while len(ids):
            if self._file is None:
                self._open()
            assert self._file is not None
            part = ids[: self.shard_tokens - self._num_in_file]
            ids = ids[len(part) :]
            self._file.write(part.data)
            self._crc32 = zlib.crc32(part.data, self._crc32)
            self._num_in_file += len(part)
            if self._num_in_file == self.shard_tokens:
                self._finish()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._file is not None:
            if kind is None:
                self._finish()
            else:
                self._file.close()

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.name}_{len(self.shards):06}.bin"

    def _open(self) -> None:
        self._file = self._path.with_suffix(".bin.part").open("wb")
        self._file.write(bytes(HEADER_BYTES))
        self._num_in_file = self._crc32 = 0

    def _finish(self) -> None:
        assert self._file is not None
        with self._file as file:
            file.seek(0)
            file.write(struct.pack("<3i", *self.kind, self._num_in_file))
        self._file = None
        path = self._path
        path.with_suffix(".bin.part").replace(path)
        self.shards.append({"name": path.name, "num_tokens": self._num_in_file, "crc32": self._crc32})


def open_shard(path: str | Path) -> np.memmap:
    """The token ids of a shard as a memory map: uint16 or uint32, one dimension. Nothing but the header is read.

    Raises `DataError` if the file is empty, shorter or longer than its header says, or no such shard.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"There is no shard {str(path)!r}. Expected a .bin file; check the spelling.")
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(12)
    remedy = "fetch or prepare it again"
    if num_bytes < HEADER_BYTES:
        what = "is empty" if not num_bytes else "is cut off within its header"
        raise DataError(
            f"The shard {str(path)!r} {what}: {num_bytes} bytes. Expected {HEADER_BYTES} bytes of header and tokens "
            f"after it; {remedy}."
        )
    magic, version, num_tokens = struct.unpack("<3i", header)
    dtype = _TYPES.get((magic, version))
    if dtype is None:
        raise DataError(
            f"The file {str(path)!r} is no shard of tokens: it starts with the numbers {magic} and {version}. Expected "
            f"{' or '.join(f'{magic} and {version}' for magic, version in _TYPES)}; leave it out, or prepare its text "
            "with `midskip prepare`."
        )
    if num_tokens < 1:
        raise DataError(
            f"The shard {str(path)!r} is empty: its header counts {num_tokens} tokens. Expected 1 or more; leave it "
            f"out, or {remedy}."
        )
    expected_bytes = HEADER_BYTES + num_tokens * dtype.itemsize
    if num_bytes != expected_bytes:
        what = "is truncated" if num_bytes < expected_bytes else "is longer than its header says"
        raise DataError(
            f"The shard {str(path)!r} {what}: {num_bytes} bytes. Expected {expected_bytes}, for the {num_tokens} "
            f"tokens that its header counts; {remedy}."
        )
    return np.memmap(path, dtype, mode="r", offset=HEADER_BYTES, shape=(num_tokens,))


def check_shards(
    paths: Iterable[str | Path], vocab_size: int, report: Callable[[int], None] = lambda num_tokens: None
) -> list[dict[str, Any]]:
    """Reads every shard once, and gives for each `{"name", "num_tokens", "crc32"}`, to compare with later.

    `report` is called with the number of tokens of each shard that is done. The CRC-32 is that of the ids' bytes.

    Raises `DataError` for what `open_shard` refuses, and for an id outside the vocabulary.
    """
    found: list[dict[str, Any]] = []
    for facts in in_order(partial(_check_shard, vocab_size), map(Path, paths), os.cpu_count() or 1):
        report(facts["num_tokens"])
        found.append(facts)
    return found


def _check_shard(vocab_size: int, path: Path) -> dict[str, Any]:
    ids, crc32 = open_shard(path), 0
    for start in range(0, len(ids), _SCAN_TOKENS):
        part = np.asarray(ids[start : start + _SCAN_TOKENS])
        if part.max() >= vocab_size:
            place = start + int(np.argmax(part >= vocab_size))
            raise DataError(
                f"The shard {str(path)!r} holds the token id {ids[place]}, at place {place} counted from 0, which is "
                f"outside the vocabulary. Expected ids below {vocab_size}; give the tokenizer it was made with."
            )
        crc32 = zlib.crc32(part.data, crc32)
    return {"name": path.name, "num_tokens": len(ids), "crc32": crc32}
