"""The English that every Python interpreter carries: its language reference and its docstrings."""

import ast
import contextlib
import os
import platform
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from .errors import END_OF_TEXT, DataError
from .progress import progress_bar

_FORMAT = 1  # raise it when the text built below changes, so that older cached files are left alone
_SKIPPED_FOLDERS = {"__pycache__", "idle_test", "test", "tests"}
_SHORTEST_DOCSTRING = 40  # characters; below it are mostly "See X." and repeated names


def load_pydocs() -> str:
    """The corpus `pydocs`, 2.4 MB, each document followed by a line `<|endoftext|>`.

    It is kept in the user's cache, by version of Python; a cache that cannot be used is no error.

    Raises `DataError` if this Python has neither help topics nor the source of its standard library.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "midskip")
    file = folder / f"pydocs-v{_FORMAT}-python{platform.python_version()}.txt"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if text := file.read_bytes().decode("utf-8"):
            return text
    text = _build()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:  # others see the whole file or none
            written = Path(temporary, file.name)
            written.write_bytes(text.encode("utf-8"))
            os.replace(written, file)
    return text


def _build() -> str:
    """The topics of the language reference, then one document a module: its names and their docstrings."""
    documents: list[str] = []
    with contextlib.suppress(ImportError):  # some distributions leave it out
        from pydoc_data.topics import topics

        documents += [topics[name].strip("\n") for name in sorted(topics)]
    seen = set(documents)
    library = Path(sysconfig.get_path("stdlib"))
    for file in progress_bar(_python_files(library), "Building the pydocs corpus", show=True):
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
