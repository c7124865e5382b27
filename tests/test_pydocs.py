"""The corpus that every Python interpreter carries."""

import os
import sys
import warnings
from pathlib import Path

import pytest

from midskip.data import DataError, pydocs, read_documents, split_documents


def documents_of_pydocs() -> list[str]:
    return list(read_documents("pydocs"))


def make_library(folder: Path) -> None:
    """A small standard library with everything the builder must read or leave alone."""
    long = "A docstring that is long enough to be kept in the corpus: "
    sources = {
        "mod.py": f'"""{long}module."""\nif True:\n  class C:\n    """{long}class."""\n'
        f'    async def f(self):\n      """{long}method.\n\n         Indented.\n      """\n'
        f'      def inner():\n        """Short."""\ndef g():\n  """{long}module."""\n',
        "pack/__init__.py": f'"""{long}package."""',
        "pack/deep.py": f'r"""{long}half a pair \\d."""\nx = "\\d"\ndef h():\n  "{long}half \\ud800"\n',
        "broken.py": f'"""{long}broken."""\ndef (:\n',
        "null.py": "\0",
        "bare.py": "x = 1\n",
    }
    for skipped in ("test", "pack/tests", "site-packages", "__pycache__", "config-3"):
        sources[f"{skipped}/skipped.py"] = f'"""{long}skipped."""'
    for name, source in sources.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(source)


@pytest.fixture
def small_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_library(tmp_path / "library")
    monkeypatch.setattr(pydocs.sysconfig, "get_path", lambda name: str(tmp_path / "library"))
    monkeypatch.setattr("pydoc_data.topics.topics", {"b": "Topic b\n", "a": "\nTopic a\n", "c": "Topic b\n"})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_pydocs_holds_topics_and_docstrings(small_library: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        documents = documents_of_pydocs()
    kept = "A docstring that is long enough to be kept in the corpus: "
    assert documents == [
        "Topic a\n",
        "Topic b\n",
        f"mod\n{kept}module.\n\nmod.C\n{kept}class.\n\nmod.C.f\n{kept}method.\n\nIndented.\n",
        f"pack\n{kept}package.\n",
        f"pack.deep\n{kept}half a pair \\d.\n\npack.deep.h\n{kept}half ?\n",
    ]


def test_pydocs_is_cached_whole_and_built_again_when_the_cache_is_bad(small_library: Path) -> None:
    documents = documents_of_pydocs()
    (cached,) = (small_library / "cache" / "midskip").iterdir()
    (small_library / "library" / "mod.py").unlink()
    assert documents_of_pydocs() == documents
    for bad in (b"", b"\xff"):
        cached.write_bytes(bad)
        assert len(documents_of_pydocs()) == len(documents) - 1
    assert list(cached.parent.iterdir()) == [cached]


def test_pydocs_needs_no_cache(small_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (small_library / "cache").write_text("a file where the folder should be")
    assert len(documents_of_pydocs()) == 5

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setenv("XDG_CACHE_HOME", str(small_library / "elsewhere"))
    monkeypatch.setattr(os, "replace", refuse)
    assert len(documents_of_pydocs()) == 5
    assert not list((small_library / "elsewhere" / "midskip").iterdir())


def test_pydocs_cache_is_in_the_home_folder_by_default(small_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(small_library / "home"))
    monkeypatch.setenv("USERPROFILE", str(small_library / "home"))
    documents_of_pydocs()
    (cached,) = (small_library / "home" / ".cache" / "midskip").iterdir()
    assert pydocs.platform.python_version() in cached.name


def test_pydocs_without_any_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pydocs.sysconfig, "get_path", lambda name: str(tmp_path / "nothing"))
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(DataError, match=r"'pydocs' is empty.*folder of \.txt files instead"):
        documents_of_pydocs()


@pytest.mark.integration
def test_pydocs_of_this_interpreter(pydocs_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(pydocs_cache))
    documents = documents_of_pydocs()
    assert len(documents) > 300 and sum(map(len, documents)) > 1_000_000
    assert any(document.startswith("json\nJSON ") for document in documents)
    training, validation = split_documents(documents)
    assert 0.02 < len(validation) / len(documents) < 0.09
    assert len(training) + len(validation) == len(documents)
