"""Documents from files, folders, globs and data sets of the hub."""

import gzip
import json
import lzma
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from midskip.data import END_OF_TEXT, DataError, read_documents, sources
from midskip.data.sources import Source


@pytest.fixture(autouse=True)
def _no_cache_at_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def read(source: Any, text_field: str = "text") -> list[str]:
    return list(read_documents(str(source), text_field))


def write_json_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_parquet(path: Path, columns: dict[str, list[Any]], group_rows: int = 1000) -> Path:
    parquet.write_table(pyarrow.table(columns), path, row_group_size=group_rows)
    return path


# Plain text


def test_a_file_without_separator_is_one_document_kept_as_it_is(tmp_path: Path) -> None:
    text = "  first line\r\n\r\nlast line\n"
    (tmp_path / "text.txt").write_bytes(text.encode())
    assert read(tmp_path / "text.txt") == [text]


def test_only_a_whole_separator_line_separates_and_empty_documents_are_dropped(tmp_path: Path) -> None:
    file = tmp_path / "text.TXT"
    inside = f"not {END_OF_TEXT} here\n {END_OF_TEXT}\nand {END_OF_TEXT}\n"
    file.write_bytes(f"{END_OF_TEXT}\none\n{END_OF_TEXT}\r\n\n{END_OF_TEXT}\n{inside}{END_OF_TEXT}".encode())
    assert read(file) == ["one\n", inside]


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "line.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "there"}')
    (tmp_path / "apart.txt").write_bytes(b"\xef\xbb\xbf" + f"{END_OF_TEXT}\nyou".encode())
    assert read(tmp_path) == ["you", "there", "hello"]


@pytest.mark.parametrize("num_bytes", [1, 7, 1000])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_blocks_of_any_size_give_the_same_documents(
    tmp_path: Path, num_bytes: int, line_end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_BLOCK_BYTES", num_bytes)
    texts = [f"é {i}{line_end}" * (i % 5 + 1) + f"{END_OF_TEXT} " * (i % 2) + line_end for i in range(30)]
    joined = f"{END_OF_TEXT}{line_end}".join(texts)
    for start in ("", "\ufeff"):
        for end in ("", END_OF_TEXT, f"{END_OF_TEXT}{line_end}"):
            (tmp_path / "a.txt").write_bytes((start + joined + end).encode())
            assert read(tmp_path) == texts
    (tmp_path / "a.txt").write_bytes(joined.encode() + b"\xff")
    with pytest.raises(DataError, match=rf"offset {len(joined.encode())} "):
        read(tmp_path)


@pytest.mark.parametrize("suffix, pack", [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)])
def test_packed_text_is_the_text(tmp_path: Path, suffix: str, pack: Any) -> None:
    texts = [f"Text {i} 日本語\n" * (i + 1) for i in range(300)]
    (tmp_path / f"a.txt{suffix}").write_bytes(pack(f"{END_OF_TEXT}\n".join(texts).encode()))
    (tmp_path / f"b.jsonl{suffix}").write_bytes(pack(b"\n".join(json.dumps({"text": t}).encode() for t in texts)))
    assert read(tmp_path / f"a.txt{suffix}") == read(tmp_path / f"b.jsonl{suffix}") == texts


def test_a_file_that_is_not_utf8_is_named_with_the_offset(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "latin.txt").write_bytes(f"é\n{END_OF_TEXT}\nn".encode() + "é".encode("latin-1") + b" and on")
    with pytest.raises(DataError, match=r"latin\.txt.*byte 0xe9 at offset 18 .*UTF-8"):
        read(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"\xef\xbb\xbfn\xe9")
    with pytest.raises(DataError, match=r"byte 0xe9 at offset 4 "):
        read(tmp_path)


@pytest.mark.parametrize("suffix, pack", [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_packed_files_that_are_broken(tmp_path: Path, suffix: str, pack: Any) -> None:
    packed = pack(b"".join(b"%d " % i for i in range(9999)))
    file = tmp_path / f"text.txt{suffix}"
    for harmed in (packed[:-20], packed[:5], b"no such file", packed[:30] + b"\xff" * 9 + packed[39:]):
        file.write_bytes(harmed)
        with pytest.raises(DataError, match=rf"text\.txt\{suffix}' is no whole \{suffix} file: .*again") as caught:
            read(file)
        assert "\n" not in str(caught.value)


# Records


def test_records_give_the_field_that_is_asked_for(tmp_path: Path) -> None:
    records = [{"id": i, "text": f"text {i}", "body": f"body {i}\r\n"} for i in range(25)]
    columns = {name: [record[name] for record in records] for name in records[0]}
    lines = write_json_lines(tmp_path / "a.jsonl", records)
    lines.write_text(lines.read_text().replace("\n", "\n \n", 3))  # blank lines are no records
    table = write_parquet(tmp_path / "b.parquet", columns, group_rows=7)
    assert read(lines) == read(table) == columns["text"]
    assert read(lines, "body") == read(table, "body") == columns["body"]


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"text": "a"', r"no JSON in line 2 of '.*a\.jsonl': .*correct it"),
        ("{text}", r"no JSON in line 2"),
        ('["text"]', r"no field 'text' in line 2 .*Its fields: none"),
        ('{"body": "a", "id": 1}', r"no field 'text' in line 2 .*Its fields: body, id\. .*text_field"),
        ('{"text": 5}', r"field 'text' in line 2 .* is of type int\. Expected a string"),
        ('{"text": null}', r"field 'text' in line 2 .* is of type NoneType"),
        ('{"text": "\\ud800"}', r"text in line 2 .* half of a surrogate pair"),
        (b'{"text": "\xe9"}', r"no JSON in line 2 .*utf-8"),
        (b"[" * 100_000, r"no JSON in line 2 .*recursion"),
    ],
)
def test_lines_that_cannot_be_used(tmp_path: Path, line: str | bytes, message: str) -> None:
    raw = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n' + raw + b'\n{"text": "good"}\n')
    documents = read_documents(str(tmp_path))
    assert next(documents) == "good"
    with pytest.raises(DataError, match=message):
        next(documents)


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"body": ["a"], "id": [1]}, r"no field 'text' in '.*a\.parquet'\. Its fields: body, id\."),
        ({"text": [1, 2]}, r"field 'text' in row 1 of .* is of type int"),
        ({"text": ["a", "b", None]}, r"field 'text' in row 3 of .* is of type NoneType"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path: Path, columns: dict[str, list[Any]], message: str) -> None:
    write_parquet(tmp_path / "a.parquet", columns, group_rows=2)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize("harm", [lambda raw: raw[:-9], lambda raw: b"", lambda raw: b"PAR1" + raw[4:40] + b"PAR1"])
def test_a_table_that_is_not_whole(tmp_path: Path, harm: Any) -> None:
    file = write_parquet(tmp_path / "a.parquet", {"text": ["a", "b"]})
    file.write_bytes(harm(file.read_bytes()))
    with pytest.raises(DataError, match=r"a\.parquet' cannot be read as Parquet: .*again or leave it out"):
        read(file)


# Which files


def test_folders_globs_and_lists_of_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.txt", "a/z.txt", "a/b/c.txt", "a/ignored.md", "odd [1].txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    write_json_lines(tmp_path / "a/m.jsonl", [{"text": "line"}])
    (tmp_path / "a/empty.txt").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read(tmp_path) == ["a/b/c.txt", "line", "a/z.txt", "b.txt", "odd [1].txt"]
    assert read("*.txt") == ["b.txt", "odd [1].txt"]
    assert read("a/**/*.txt") == ["a/b/c.txt", "a/z.txt"]
    assert read("odd [1].txt") == ["odd [1].txt"], "a path that is there is no pattern"
    assert read("b.txt, a/*.jsonl,a/b") == ["b.txt", "line", "a/b/c.txt"]
    assert read("b.txt,*.txt,a,a/b") == ["b.txt", "odd [1].txt", "a/b/c.txt", "line", "a/z.txt"], "each once"
    assert read("~/b.txt") == ["b.txt"]
    (tmp_path / "linked").mkdir()
    for name, where in (("linked/a", "a"), ("linked/up", "linked"), ("linked/same.txt", "b.txt")):
        (tmp_path / name).symlink_to(tmp_path / where)
    assert read("linked") == ["a/b/c.txt", "line", "a/z.txt", "b.txt"], "in linked folders too, each entered once"
    assert read(f"b.txt,{tmp_path / 'b.txt'},linked/same.txt,a/../b.txt") == ["b.txt"], "each file once"
    assert Source("linked").left_out.startswith("a file of another kind is left out (.md)")
    (tmp_path / "pydocs").mkdir()
    (tmp_path / "pydocs/x,y.txt").write_text("comma")
    assert read("./pydocs") == read("pydocs/x,y.txt") == ["comma"]
    (tmp_path / "pydocs" / os.fsdecode(b"caf\xe9.txt")).write_text("Latin-1")
    assert Source("./pydocs").state.startswith("2 files, ") and read("./pydocs") == ["Latin-1", "comma"]


@pytest.mark.parametrize(
    "source", ["nowhere/to/be.txt", "", "*.none", "there.txt,gone.txt", "there.txt,", "~no body/x"]
)
def test_a_path_that_does_not_exist(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.txt").write_text("text")
    with pytest.raises(DataError, match=r"nothing at '.*does not exist.*'pydocs'.*relative paths start at"):
        read_documents(source)


@pytest.mark.integration
def test_files_of_other_kinds_are_mentioned(tmp_path: Path) -> None:
    for name in ("a.txt", "b.md", "deep/c.PDF", "deep/d", ".git/e", "deep/.f.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    for source in (str(tmp_path), f"{tmp_path},{tmp_path / 'a.txt'}"):
        said = f"3 files of other kinds are left out (.PDF, .md, without suffix), {str(tmp_path / 'b.md')!r} for one"
        assert Source(source).left_out.startswith(said)
    assert Source(str(tmp_path / "a.txt")).left_out == Source("pydocs").left_out == ""


def test_a_folder_without_text(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("text")
    with pytest.raises(DataError, match=r"holds no file of that kind, at any depth. Expected .*\.txt, \.jsonl"):
        read_documents(str(tmp_path))


@pytest.mark.parametrize("name", ["notes.md", "text", "text.xz", "table.parquet.gz", "a.txt.zip"])
def test_a_file_of_another_kind_is_refused_before_any_is_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "first.txt").write_bytes(b"\xff")
    (tmp_path / name).write_text("text")
    for source in (tmp_path / name, f"{tmp_path / 'first.txt'},{tmp_path / name}"):
        with pytest.raises(DataError, match=rf"{name}' is of a kind that is not known.*leave it out"):
            read_documents(str(source))


@pytest.mark.parametrize("text", ["", " \n\t\n", f"\n{END_OF_TEXT}\n \n{END_OF_TEXT}\n"])
def test_nothing_but_white_space(tmp_path: Path, text: str) -> None:
    (tmp_path / "blank.txt").write_text(text)
    write_json_lines(tmp_path / "blank.jsonl", [{"text": " \n"}])
    for source in (tmp_path / "blank.txt", tmp_path / "blank.jsonl", tmp_path):
        with pytest.raises(DataError, match=r"holds no text"):
            read(source)


# Streaming


def test_files_are_read_as_they_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_BLOCK_BYTES", 1000)
    (tmp_path / "a.txt").write_text(f"{END_OF_TEXT}\n".join(f"document {i}\n" * 1000 for i in range(50)))
    (tmp_path / "b.txt").write_bytes(b"\xff")
    source = Source(str(tmp_path))
    assert source.share_read is None
    documents = iter(source)
    shares = []
    for document in islice(documents, 49):
        assert document.startswith("document")
        shares.append(source.share_read)
    assert shares == sorted(shares) and shares[0] < 0.1 and shares[-1] > 0.9
    next(documents)
    with pytest.raises(DataError, match=r"b\.txt' is not UTF-8"):
        next(documents)
    assert next(iter(source)).startswith("document 0"), "a source can be read again"


# The hub


def test_a_data_set_is_streamed(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(20)]
    for split, count in (("train", 20), ("test", 3)):
        write_parquet(tmp_path / f"{split}.parquet", {"text": texts[:count], "body": texts[:count]})
    assert read(f"hub:{tmp_path}") == texts
    assert read(f"hub:{tmp_path}:default") == texts
    assert read(f"hub:{tmp_path}::test", "body") == texts[:3]


@pytest.mark.parametrize(
    "source, text_field, message",
    [
        ("hub:{}:other", "text", r"cannot be opened: .*'other' not found.*check its name"),
        ("hub:{}::test", "text", r"cannot be opened: .*Bad split: test"),
        ("hub:{}/nowhere", "text", r"cannot be opened: .*hub:NAME\[:CONFIG\[:SPLIT\]\]"),
        ("hub:", "text", r"names no data set"),
        ("hub:a:b:c:d", "text", r"names no data set"),
        ("hub:{}", "words", r"no field 'words' in row 1 of 'hub:.*Its fields: text\."),
    ],
)
def test_data_sets_that_cannot_be_used(tmp_path: Path, source: str, text_field: str, message: str) -> None:
    write_parquet(tmp_path / "train.parquet", {"text": ["text"]})
    with pytest.raises(DataError, match=message) as caught:
        read(source.format(tmp_path), text_field)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [ConnectionError("no\nnetwork."), ValueError("x"), RuntimeError("x"), OSError("x")])
def test_whatever_goes_wrong_at_the_hub_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    def rows(*_: Any, **__: Any) -> Iterator[dict[str, str]]:
        yield {"text": "good"}
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        DataError, match=rf"^The data set 'hub:some' cannot be opened: {type(error).__name__}: .*network"
    ):
        read("hub:some")
    monkeypatch.setattr(datasets, "load_dataset", rows)
    documents = read_documents("hub:some")
    assert next(documents) == "good"
    with pytest.raises(DataError, match=rf"^Reading 'hub:some' failed: {type(error).__name__}: .*try again"):
        next(documents)
