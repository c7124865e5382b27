"""Documents from wherever they are, one at a time: files, folders, data sets of the hub, and `pydocs`."""

from __future__ import annotations

import glob
import gzip
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from . import hub
from .errors import END_OF_TEXT, DataError, one_line
from .pydocs import load_pydocs

_KINDS = ".txt, .jsonl (both also .gz or .xz) or .parquet"
_EXPANSION = {".gz": 2.0, ".xz": 3.0}  # about what text unpacks to, at the least
_OPENERS = {".gz": gzip.open, ".xz": lzma.open}
_MARK = re.escape(END_OF_TEXT.encode())
_END_LINE = re.compile(
    rb"%b(?<![^\n]%b)\r?(?:\n|\Z)" % (_MARK, _MARK)
)  # the mark first: ten times faster than a ^ first
_BLOCK_BYTES = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_documents(source: str, text_field: str = "text") -> Iterator[str]:
    """The documents of a corpus; see `Source`. Paths are looked for at once."""
    return iter(Source(source, text_field))


class Source:
    """The documents of a corpus, in a fixed order, without the empty ones; never all of them in memory.

    `source` is one of

    - `"pydocs"`: 2.4 MB of English in the running interpreter, its language reference and the docstrings of its
      standard library;
    - the path of a file, a folder (every file of a known kind at any depth, sorted by path), a glob, or several of
      these joined by commas; a file that is named twice is read once. A folder that is named pydocs is written
      `./pydocs`;
    - `"hub:NAME[:CONFIG[:SPLIT]]"`: a data set by name, or a local folder of one, streamed through `datasets`; the
      split is `train` if none is given.

    In a `.txt` file, UTF-8, documents are separated by a line that is exactly `<|endoftext|>`; a file without such a
    line is one document. The text of a document is kept as it is, line endings and outer white space included. A line
    of a `.jsonl` file, a row of a `.parquet` file or of a data set is a document: its field `text_field`.

    Raises:
        DataError: there is nothing at `source`, or a file is of another kind; and, when iterated, for what cannot be
            had or read, naming file and line, or if there is nothing but white space.
    """

    def __init__(self, source: str, text_field: str = "text") -> None:
        self.name, self.text_field = source, text_field
        self.files: list[Path] = []
        self.is_hub = source.startswith(hub.PREFIX)
        self._pydocs = load_pydocs().encode() if source == "pydocs" else b""
        if not self._pydocs and not self.is_hub:
            self.files = find_files(source, _READERS, f"'pydocs', hub:NAME, or files of kind {_KINDS}")
        self._sizes = [file.stat().st_size for file in self.files]
        self._num_bytes, self._num_bytes_done, self._open_file = sum(self._sizes), 0, None

    @property
    def left_out(self) -> str:
        """What is said of files below its folders that are of another kind, hidden ones aside; nothing if none is."""
        folders = [path for _, paths in _named(self.name) for path in paths if path.is_dir()] if self.files else []
        found = {file for folder in folders for file in _files_below(folder) if not _is_hidden(file, folder)}
        files = sorted(file for file in found if _kind(file)[0] not in _READERS)
        if not files:
            return ""
        kinds = ", ".join(sorted({file.suffix or "without suffix" for file in files})[:5])
        others = f"{len(files):,} files of other kinds are" if len(files) > 1 else "a file of another kind is"
        return f"{others} left out ({kinds}), {str(files[0])!r} for one: what is read is {_KINDS}"

    @property
    def has_fields(self) -> bool:
        """Whether `text_field` matters."""
        return self.is_hub or any(_kind(file)[0] != ".txt" for file in self.files)

    @property
    def num_text_bytes(self) -> float | None:
        """About how much text there is, at the least; None if that is not known."""
        sizes = zip(self.files, self._sizes, strict=True)
        return sum(_EXPANSION.get(file.suffix.lower(), 1) * num_bytes for file, num_bytes in sizes) or None

    @property
    def share_read(self) -> float | None:
        """How far the reading is, in bytes of the files, None if there are none."""
        if self._open_file is None or not self._num_bytes:
            return None
        position = 0 if self._open_file.closed else self._open_file.tell()
        return (self._num_bytes_done + position) / self._num_bytes

    @property
    def state(self) -> str:
        """What changes when the text behind the same name does; of files, a checksum of their names and sizes."""
        lines = [f"{file} {num_bytes}\n" for file, num_bytes in zip(self.files, self._sizes, strict=True)]
        return f"{len(lines)} files, {zlib.crc32(self._pydocs or ''.join(lines).encode(errors='surrogateescape')):08x}"

    def __iter__(self) -> Iterator[str]:
        found = False
        for document in self._read():
            if document and not document.isspace():
                found = True
                yield document
        if not found:
            raise DataError(
                f"{self.name!r} holds no text: it is empty, or nothing but white space. Expected at least one "
                "document; give a source that has some text."
            )

    def _read(self) -> Iterator[str]:
        if self.is_hub:
            for number, row in enumerate(hub.read_data_set(self.name), 1):
                yield _text_of(row, self.text_field, f"row {number} of {self.name!r}")
        elif self._pydocs:
            yield from _read_text(io.BytesIO(self._pydocs), "pydocs", "")
        self._num_bytes_done = 0
        for file, num_bytes in zip(self.files, self._sizes, strict=True):
            with file.open("rb") as self._open_file:
                yield from _read_file(file, self._open_file, self.text_field)
            self._num_bytes_done += num_bytes


def require_apart(training: Source, validation: Source, what_to_do: str) -> None:
    """`DataError` if some text is on both sides."""
    both = {file.resolve() for file in training.files} & {file.resolve() for file in validation.files}
    if both or training.name == validation.name:
        raise DataError(
            f"The text of {str(min(both, default=training.name))!r} is both for training and for validation. Expected "
            f"different text; {what_to_do}."
        )


def find_files(source: str, kinds: Container[str], expected: str) -> list[Path]:
    """Files of some kinds at paths, globs and folders joined by commas, each once.

    Raises `DataError`, saying what was `expected`, if there are none or a file is of another kind.
    """
    files: dict[Path, Path] = {}  # by where they really lie
    for part, paths in _named(source):
        if not paths or not part.strip():  # an empty path is that of the working folder
            raise DataError(
                f"There is nothing at {part!r}: the path does not exist. Expected {expected}, by path, folder or glob. "
                f"Check the spelling; relative paths start at {str(Path.cwd())!r}."
            )
        found = [file for path in paths for file in _below(path, kinds, expected)]
        if not found:
            raise DataError(
                f"The folder {part!r} holds no file of that kind, at any depth. Expected {expected}; give another."
            )
        for file in found:
            files.setdefault(file.resolve(), file)
    return list(files.values())


def _named(source: str) -> Iterator[tuple[str, list[Path]]]:
    """The parts of a source, and the files and folders that each of them names."""
    for part in [source] if Path(os.path.expanduser(source)).exists() else source.split(","):
        path = Path(os.path.expanduser(part.strip()))
        yield part, [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _below(path: Path, kinds: Container[str], expected: str) -> list[Path]:
    if path.is_dir():
        return [file for file in _files_below(path) if _kind(file)[0] in kinds]
    kind, compression = _kind(path)
    if kind not in kinds:
        raise DataError(
            f"The file {str(path)!r} is of a kind that is not known, {kind + compression or 'without suffix'!r}. "
            f"Expected {expected}; convert or rename it, or leave it out."
        )
    return [path]


def _files_below(folder: Path) -> list[Path]:
    """At any depth, in linked folders too, sorted; a folder that can be reached twice is entered once."""
    found: list[Path] = []
    entered: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        if os.path.realpath(place) in entered:
            folders.clear()
            continue
        entered.add(os.path.realpath(place))
        found += [file for name in names if (file := Path(place, name)).is_file()]
    return sorted(found)


def _kind(file: Path) -> tuple[str, str]:
    """What a file holds and how it is packed, both by suffix: (".txt", ".xz")."""
    suffix = file.suffix.lower()
    if suffix in _OPENERS and (inner := Path(file.stem).suffix.lower()) != ".parquet":
        return inner, suffix
    return suffix, ""


def _read_file(file: Path, opened: BinaryIO, text_field: str) -> Iterator[str]:
    kind, compression = _kind(file)
    try:
        if compression:  # a buffer of our own, since theirs gives lines slowly
            opened = io.BufferedReader(_OPENERS[compression](opened))  # pyright: ignore[reportArgumentType]
        yield from _READERS[kind](opened, str(file), text_field)
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise DataError(
            f"The file {str(file)!r} is no whole {compression} file: {error}. Expected one that unpacks to its end; "
            "fetch or pack it again."
        ) from None


def _read_text(file: BinaryIO, name: str, _: str) -> Iterator[str]:
    parts: list[bytes] = []  # of the document that has begun
    offset = begun = 0  # in the file: of the block, and of that document
    while block := file.read(_BLOCK_BYTES) + file.readline():  # whole lines
        if not offset and block.startswith(_BYTE_ORDER_MARK):
            offset = begun = len(_BYTE_ORDER_MARK)
            block = block[offset:]
        end = 0
        for match in _END_LINE.finditer(block):
            yield _decode(b"".join([*parts, block[end : match.start()]]), name, begun)
            parts, end = [], match.end()
            begun = offset + end
        parts.append(block[end:])
        offset += len(block)
    yield _decode(b"".join(parts), name, begun)


def _decode(raw: bytes, name: str, offset: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"The file {name!r} is not UTF-8 text: byte {raw[error.start]:#04x} at offset {offset + error.start} does "
            "not belong there. Expected UTF-8; convert the file (iconv does that) or leave it out."
        ) from None


def _read_json_lines(lines: BinaryIO, name: str, text_field: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.isspace():
            where = f"line {number} of {name!r}"
            try:
                record = json.loads(line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line)
            except (ValueError, RecursionError) as error:  # of JSON or of UTF-8; nested too deeply
                raise DataError(
                    f"There is no JSON in {where}: {error}. Expected an object on each line; correct it."
                ) from None
            yield _text_of(record, text_field, where)


def _read_parquet(file: BinaryIO, name: str, text_field: str) -> Iterator[str]:
    from pyarrow import ArrowException, parquet

    try:
        table = parquet.ParquetFile(file)
        if text_field not in table.schema_arrow.names:
            raise _no_field(text_field, table.schema_arrow.names, repr(name))
        number = 0
        for group in range(table.num_row_groups):  # one by one, since a reader of several fetches them all ahead
            for batch in table.iter_batches(1000, row_groups=[group], columns=[text_field]):
                for record in batch.to_pylist():
                    number += 1
                    yield _text_of(record, text_field, f"row {number} of {name!r}")
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"The file {name!r} cannot be read as Parquet: {one_line(error)}. Expected a whole .parquet file; fetch "
            "it again or leave it out."
        ) from None


_READERS = {".txt": _read_text, ".jsonl": _read_json_lines, ".parquet": _read_parquet}


def _text_of(record: Any, text_field: str, where: str) -> str:
    if not isinstance(record, dict) or text_field not in record:
        raise _no_field(text_field, record if isinstance(record, dict) else (), where)
    text = record[text_field]
    if not isinstance(text, str):
        raise DataError(
            f"The field {text_field!r} in {where} is of type {type(text).__name__}. Expected a string; correct it, or "
            "name the field that holds the text (text_field)."
        )
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell what is no text
        raise DataError(f"The text in {where} holds half of a surrogate pair. Expected Unicode; correct it.") from None
    return text


def _no_field(text_field: str, fields: Iterable[str], where: str) -> DataError:
    return DataError(
        f"There is no field {text_field!r} in {where}. Its fields: {', '.join(fields) or 'none'}. Name the one that "
        "holds the text (text_field)."
    )
