"""Text as a list of documents: from files, or from the English that every Python interpreter carries."""

import ast
import contextlib
import hashlib
import os
import platform
import re
import sysconfig
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import track

END_OF_TEXT = "<|endoftext|>"  # between documents: a line of a file, a token of a tokenizer
_END_LINE = re.compile(rf"^{re.escape(END_OF_TEXT)}\r?(?:\n|\Z)", re.MULTILINE)
_PYDOCS_FORMAT = 1  # raise it when the text built below changes, so that older cached files are left alone
_SKIPPED_FOLDERS = {"__pycache__", "idle_test", "test", "tests"}
_SHORTEST_DOCSTRING = 40  # characters; below it are mostly "See X." and repeated names

Item = TypeVar("Item")


class DataError(ValueError):
    """Text, tokens or a setting about them that cannot be used; the message says why and what to do."""


def load_documents(source: str, progress: bool = True) -> list[str]:
    """The documents of a corpus, in a fixed order, without the empty ones.

    `source` is `"pydocs"` (2.4 MB of English in the running interpreter: its language reference and the
    docstrings of its standard library), or the path of a UTF-8 text file, or of a folder, of which every
    `*.txt` at any depth is read, sorted by path. A folder that is named pydocs is written `./pydocs`.

    Documents are separated by a line that is exactly `<|endoftext|>`; a file without such a line is one
    document. The text of a document is kept as it is, line endings and outer white space included.

    Raises `DataError` if the path does not exist, a folder holds no `*.txt`, there is nothing but white
    space, or a file is not UTF-8.
    """
    if source == "pydocs":
        return _split(_load_pydocs(progress))
    path = Path(source).expanduser()
    if not source or not path.exists():
        raise DataError(
            f"There is no text at {source!r}: the path does not exist. Expected 'pydocs', a text file, or a "
            f"folder of .txt files. Check the spelling; relative paths start at {str(Path.cwd())!r}."
        )
    files = sorted(file for file in path.rglob("*.txt") if file.is_file()) if path.is_dir() else [path]
    if not files:
        raise DataError(
            f"The folder {source!r} has no .txt file in it or below it. Expected at least one; "
            "give a folder with .txt files, the path of one text file, or 'pydocs'."
        )
    bar = progress_bar(files, "Reading text", progress)
    documents = [document for file in bar for document in _split(_read(file))]
    if not documents:
        raise DataError(
            f"{source!r} holds no text: {len(files)} file(s) read, all empty or nothing but white space. "
            "Expected at least one document; give a source that has some text."
        )
    return documents


def split_documents(documents: Sequence[str], validation_share: float = 0.05) -> tuple[list[str], list[str]]:
    """Training and validation documents, both non-empty, each in the given order.

    A document goes to validation if a hash of its text falls below `validation_share`, a share of
    documents, not of bytes, in (0, 1). So it keeps its side whatever stands beside it, in any order,
    under any seed. If that leaves a side empty, the document with the nearest hash changes sides. A
    single document is cut in two near its end: at a paragraph if one ends about there, else at a line,
    else at a word.

    Raises `DataError` if `validation_share` is not in (0, 1), or there is no text, or no place to cut it.
    """
    if not 0 < validation_share < 1:
        raise DataError(
            f"validation_share is {validation_share}. Expected a number between 0 and 1, both excluded; 0.05 is usual."
        )
    if not documents:
        raise DataError("There are no documents to split. Expected at least one; load some text first.")
    if len(documents) == 1:
        cut = _cut(documents[0], validation_share)
        return [documents[0][:cut]], [documents[0][cut:]]
    shares = [_hash_share(document) for document in documents]
    validation = {i for i, share in enumerate(shares) if share < validation_share}
    if not validation:
        validation.add(shares.index(min(shares)))
    elif len(validation) == len(documents):
        validation.remove(shares.index(max(shares)))
    sides: tuple[list[str], list[str]] = ([], [])
    for i, document in enumerate(documents):
        sides[i in validation].append(document)
    return sides


def progress_bar(items: Sequence[Item], description: str, show: bool) -> Iterable[Item]:
    """Gives `items` one by one; if they are several and stderr is a terminal, with a bar until the end."""
    console = Console(stderr=True)
    disable = not (show and console.is_terminal and len(items) > 1)
    return track(items, description, console=console, transient=True, disable=disable)


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


def _split(text: str) -> list[str]:
    return [document for document in _END_LINE.split(text) if document.strip()]


def _read(file: Path) -> str:
    raw = file.read_bytes()
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(
            f"The file {str(file)!r} is not UTF-8 text: byte {raw[error.start]:#04x} at offset {error.start} "
            "does not belong there. Expected UTF-8; convert the file (iconv does that) or leave it out."
        ) from None


def _load_pydocs(progress: bool) -> str:
    """The embedded corpus, from its cache if that is there; a cache that cannot be used is no error."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "midskip")
    file = folder / f"pydocs-v{_PYDOCS_FORMAT}-python{platform.python_version()}.txt"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if text := file.read_bytes().decode("utf-8"):
            return text
    text = _build_pydocs(progress)
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:  # others see the whole file or none
            written = Path(temporary, file.name)
            written.write_bytes(text.encode("utf-8"))
            os.replace(written, file)
    return text


def _build_pydocs(progress: bool) -> str:
    """The topics of the language reference, then one document a module: its names and their docstrings."""
    documents: list[str] = []
    with contextlib.suppress(ImportError):  # some distributions leave it out
        from pydoc_data.topics import topics

        documents += [topics[name].strip("\n") for name in sorted(topics)]
    seen = set(documents)
    library = Path(sysconfig.get_path("stdlib"))
    for file in progress_bar(_python_files(library), "Building the pydocs corpus", progress):
        sections: list[str] = []
        for name, docstring in _docstrings(file, library):
            if len(docstring) >= _SHORTEST_DOCSTRING and docstring not in seen:
                seen.add(docstring)
                sections.append(f"{name}\n{docstring}")
        documents.append("\n\n".join(sections))
    text = "".join(f"{document}\n{END_OF_TEXT}\n" for document in dict.fromkeys(documents) if document)
    if not text:
        raise DataError(
            f"The corpus 'pydocs' is empty: this Python has no help topics and no source in {str(library)!r}."
            " Expected its standard library as .py files; give a text file or a folder of .txt files instead."
        )
    return text.encode("utf-8", "replace").decode("utf-8")  # a docstring may hold half a surrogate pair


def _python_files(library: Path) -> list[Path]:
    """Sources of the modules in `library`, sorted, without tests and folders that can be no package."""
    files: list[Path] = []
    for folder, subfolders, names in os.walk(library):
        subfolders[:] = [name for name in subfolders if name.isidentifier() and name not in _SKIPPED_FOLDERS]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(files)


def _docstrings(file: Path, library: Path) -> list[tuple[str, str]]:
    """Dotted names and docstrings of one source file, in its order; none if it does not parse."""
    module = ".".join(file.relative_to(library).with_suffix("").parts).removesuffix(".__init__")
    with contextlib.suppress(OSError, SyntaxError, ValueError, RecursionError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(_walk(ast.parse(file.read_bytes()), module))
    return []


def _walk(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        name = name if isinstance(node, ast.Module) else f"{name}.{node.name}"
        yield name, (ast.get_docstring(node) or "").strip()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):  # expressions define no names
            yield from _walk(child, name)
