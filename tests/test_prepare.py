"""From text to a folder of shards: what it holds, what happens on the way, and what is refused before it."""

import io
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from transformers import AutoTokenizer

from midskip.cli import main
from midskip.data import (
    END_OF_TEXT,
    DataError,
    ShardWriter,
    bytes_tokenizer,
    encode_documents,
    open_prepared,
    open_shard,
    prepare,
    progress,
    split_documents,
    train_tokenizer,
)


def sample_documents(count: int = 200) -> list[str]:
    return [f"Document {i} says that layer {i * 7 % 11} was left out.\n\nAnd so on, {i}.\n" for i in range(count)]


def write_text(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(f"{document}{END_OF_TEXT}\n" for document in documents))
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt", sample_documents())


def tokens(paths: list[Path]) -> list[int]:
    return np.concatenate([open_shard(path) for path in paths]).tolist()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# What is prepared


def test_what_is_left_out_and_what_is_uneven_is_told(tmp_path: Path) -> None:
    def said(documents: list[str], name: str, **limits: int) -> str:
        (tmp_path / name).mkdir()
        write_text(tmp_path / name / "text.txt", documents)
        (tmp_path / name / "more.md").write_text("more")
        console = Console(file=io.StringIO(), width=80)
        prepare(str(tmp_path / name), tmp_path / f"{name}-out", tokenizer="bytes", console=console, **limits)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    copies = said(["The same.\n"] * 2000, "copies")
    assert "midskip: a file of another kind is left out (.md), " in copies
    assert "midskip: 1 of 2,000 documents are held out, where a share of 0.05 is about 100: copies of a" in copies
    assert "held out" not in said(sample_documents(2000), "different")
    assert "held out" not in said(sample_documents(2000), "limited", max_validation_tokens=10), "that is why"


def test_a_folder_holds_both_sides_their_tokenizer_and_a_summary(text: Path, tmp_path: Path) -> None:
    prepared = prepare(str(text), tmp_path / "out", vocab_size=300, validation_share=0.2, shard_tokens=1000)
    sides = dict(zip(("training", "validation"), split_documents(sample_documents(), 0.2)))
    learnt = train_tokenizer(sides["training"], 300)
    assert prepared.tokenizer.get_vocab() == learnt.get_vocab()
    for side, paths in (("training", prepared.training), ("validation", prepared.validation)):
        assert tokens(paths) == encode_documents(learnt, sides[side]).tolist()
        assert (len(paths) > 1 or side == "validation") and all(len(open_shard(path)) == 1000 for path in paths[:-1])
        facts = prepared.summary[side]
        assert facts["num_documents"] == len(sides[side]) and facts["num_tokens"] == len(tokens(paths))
        assert facts["num_bytes"] == len("".join(sides[side]).encode())
        assert [shard["name"] for shard in facts["shards"]] == [path.name for path in paths]
    assert prepared.check() == {side: prepared.summary[side]["shards"] for side in sides}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        ["prepared.json", "tokenizer", *(path.name for path in prepared.training + prepared.validation)]
    )
    assert (prepared.vocab_size, prepared.end_of_text) == (300, 0)
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer").get_vocab() == learnt.get_vocab()
    assert {"source", "tokenizer", "validation_share", "shard_tokens"} <= prepared.summary["settings"].keys()
    assert {"midskip", "python", "transformers", "tokenizers"} <= prepared.summary["versions"].keys()


def test_a_prepared_folder_opens_as_it_was_prepared_and_gives_windows(text: Path, tmp_path: Path) -> None:
    prepared = prepare(str(text), tmp_path / "out", tokenizer="bytes")
    opened = open_prepared(str(tmp_path / "out"))
    assert opened.summary == prepared.summary == json.loads((tmp_path / "out" / "prepared.json").read_text())
    assert (opened.folder, opened.training, opened.validation) == (
        prepared.folder,
        prepared.training,
        prepared.validation,
    )
    assert opened.tokenizer.get_vocab() == bytes_tokenizer().get_vocab()
    training, validation = opened.windows("training", 16), opened.windows("validation", 16, documents_apart=False)
    assert training[0]["input_ids"].tolist()[:3] == [256, *b"Do"] and "attention_mask" not in training[0]
    assert training[0]["position_ids"].tolist() == list(range(16))
    assert validation[0].keys() == {"input_ids", "labels", "attention_mask"}


def test_the_same_text_gives_the_same_shards(text: Path, tmp_path: Path) -> None:
    one, other = (contents(Path(str(prepare(str(text), tmp_path / name).folder))) for name in ("one", "other"))
    assert one == other and len(one) > 3


def test_validation_text_of_its_own(text: Path, tmp_path: Path) -> None:
    (tmp_path / "held.jsonl").write_text('{"body": "held"}\n{"body": "out"}\n')
    prepared = prepare(
        str(text), tmp_path / "out", tokenizer="bytes", validation=str(tmp_path / "held.jsonl"), text_field="body"
    )
    assert tokens(prepared.validation) == [256, *b"held", 256, *b"out"]
    assert prepared.summary["training"]["num_documents"] == 200
    assert prepared.summary["settings"]["validation_share"] is None


@pytest.mark.parametrize("limit", [1, 100, 1000, 10**9])
def test_reading_stops_with_the_document_that_reaches_the_limit(text: Path, tmp_path: Path, limit: int) -> None:
    prepared = prepare(str(text), tmp_path / "out", tokenizer="bytes", max_tokens=limit, max_validation_tokens=limit)
    for side, documents in zip(("training", "validation"), split_documents(sample_documents())):
        sizes = np.cumsum([len(document) + 1 for document in documents])
        reached = int(np.searchsorted(sizes, limit)) + 1
        found = prepared.summary[side]
        if side == "training":
            assert found["num_documents"] == min(reached, len(documents))
        assert 1 <= found["num_documents"] <= min(reached, len(documents))
        assert found["num_tokens"] == sizes[found["num_documents"] - 1]


@pytest.mark.integration
def test_a_single_document_and_pydocs(tmp_path: Path, pydocs_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(pydocs_cache))
    (tmp_path / "one.txt").write_text("word " * 1000)
    prepared = prepare(str(tmp_path / "one.txt"), tmp_path / "one")
    assert [prepared.summary[side]["num_documents"] for side in ("training", "validation")] == [1, 1]
    prepared = prepare("pydocs", tmp_path / "pydocs", tokenizer="bytes", max_tokens=5000)
    assert 5000 <= prepared.summary["training"]["num_tokens"] < 50_000


# Preparing again


def test_what_is_prepared_is_left_as_it_is(text: Path, tmp_path: Path) -> None:
    first = prepare(str(text), tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    again = prepare(str(text), tmp_path / "out")
    assert again.summary == first.summary
    text.unlink()  # its shards are still there
    assert prepare(str(text), tmp_path / "out").training == first.training
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == times


def test_other_settings_or_other_text_are_refused(text: Path, tmp_path: Path) -> None:
    prepare(str(text), tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(
        DataError, match=r"otherwise: tokenizer was 'bpe' and is 'bytes', max_tokens was None and is 9\."
    ):
        prepare(str(text), tmp_path / "out", tokenizer="bytes", max_tokens=9)
    write_text(text, sample_documents(201))
    with pytest.raises(DataError, match=r"otherwise: the text has changed.*give another output, or remove"):
        prepare(str(text), tmp_path / "out")
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("stage", ["save_pretrained", "write", "_finish", "replace"])
def test_a_preparation_that_was_stopped_is_no_whole_one_and_starts_afresh(
    text: Path, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = contents(Path(str(prepare(str(text), tmp_path / "whole", shard_tokens=500).folder)))
    owner: Any = {"save_pretrained": type(train_tokenizer("ab", 257)), "replace": Path}.get(stage, ShardWriter)
    original, num_left = getattr(owner, stage), 1 if stage == "save_pretrained" else 3

    def stop(*arguments: Any) -> Any:
        nonlocal num_left
        num_left -= 1
        if not num_left:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, stage, stop)
        prepare(str(text), tmp_path / "out", shard_tokens=500)
    assert (tmp_path / "out" / "prepared.json.part").is_file()
    with pytest.raises(DataError, match=r"was not prepared to its end.*midskip prepare.*run it \(again\)"):
        open_prepared(tmp_path / "out")
    prepare(str(text), tmp_path / "out", shard_tokens=500)
    assert contents(tmp_path / "out") == expected


@pytest.mark.integration
def test_a_killed_process_leaves_nothing_that_looks_whole(text: Path, tmp_path: Path) -> None:
    program = (
        "import sys, time\n"
        "from midskip.data import ShardWriter, prepare\n"
        "write = ShardWriter.write\n"
        "def slow(self, ids):\n"
        "    write(self, ids)\n"
        "    if len(self.shards) == 3:\n"
        "        print('writing', flush=True)\n"
        "        time.sleep(60)\n"
        "ShardWriter.write = slow\n"
        "prepare(sys.argv[1], sys.argv[2], shard_tokens=500)\n"
    )
    command = [sys.executable, "-c", program, str(text), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert {"train_000002.bin", "prepared.json.part"} <= set(left) and "prepared.json" not in left
    with pytest.raises(DataError, match="not prepared to its end"):
        open_prepared(tmp_path / "out")
    prepare(str(text), tmp_path / "out", shard_tokens=500)
    assert contents(tmp_path / "out") == contents(
        Path(str(prepare(str(text), tmp_path / "o", shard_tokens=500).folder))
    )


# Found before


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"source": "gone.txt"}, r"nothing at 'gone\.txt'"),
        ({"validation": "gone.txt"}, r"nothing at 'gone\.txt'"),
        ({"source": "bad.jsonl"}, r"no field 'text' in line 1"),
        ({"validation": "bad.jsonl"}, r"no field 'text' in line 1"),
        ({"tokenizer": "./gone"}, r"no tokenizer at '\./gone'"),
        ({"tokenizer": "bytes", "vocab_size": 300}, r"vocab_size is 300, .*own size"),
        ({"vocab_size": 10}, r"vocab_size is 10\. Expected 257"),
        ({"validation_share": 1.5}, r"validation_share is 1\.5"),
        ({"validation": "text.txt"}, r"text\.txt' is both for training and for validation"),
        ({"validation": "other.txt", "validation_share": 0.1}, r"both validation text, 'other\.txt', and .* 0\.1"),
        ({"max_tokens": 0}, r"max_tokens is 0\. Expected 1"),
        ({"max_validation_tokens": -1}, r"max_validation_tokens is -1\. Expected 1"),
        ({"shard_tokens": 0}, r"shard_tokens is 0\. Expected 1"),
        ({"text_field": "body"}, r"text_field is 'body', and the text has no fields"),
    ],
)
def test_nothing_is_written_when_a_setting_cannot_be_used(
    tmp_path: Path, settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "text.txt", sample_documents())
    write_text(tmp_path / "other.txt", ["other"])
    (tmp_path / "bad.jsonl").write_text('{"body": "text"}\n')
    with pytest.raises(DataError, match=message):
        prepare(**({"source": "text.txt", "output": "out"} | settings))
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_files_is_refused_and_left_alone(text: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"which is a file"):
        prepare(str(text), text)
    out = tmp_path / "out"
    out.mkdir()
    prepare(str(text), out)  # an empty one is fine
    shutil.rmtree(out)
    out.mkdir()
    for name in ("train_000000.bin", "notes.md"):  # shards of someone else's are not ours to remove
        (out / name).write_text("mine")
        with pytest.raises(DataError, match=rf"holds other files, '{name}' for one"):
            prepare(str(text), out)
        (out / "prepared.json.part").write_text("{}")
        if name == "notes.md":
            with pytest.raises(DataError, match=r"holds other files, 'notes\.md' for one"):
                prepare(str(text), out)
        assert (out / name).read_text() == "mine"
        shutil.rmtree(out)
        out.mkdir()


def test_a_disk_without_room_is_found_before(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 1000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - free, free))
    with pytest.raises(DataError, match=r"has 0\.0 GB free, and the shards will take about 0\.0 GB\. .*max_tokens"):
        prepare(str(text), tmp_path / "far" / "out", tokenizer="bytes")
    assert not (tmp_path / "far").exists()
    prepare(str(text), tmp_path / "far" / "out", tokenizer="bytes", max_tokens=400)


# Progress and the command


def test_progress_is_a_bar_in_a_terminal_and_lines_elsewhere(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def printed(name: str, **settings: Any) -> str:
        file = io.StringIO()
        prepare(str(text), tmp_path / name, tokenizer="bytes", console=Console(file=file, width=80, **settings))
        return file.getvalue()

    assert printed("quick") == ""
    assert "100%, 12,398 tokens, " in printed("terminal", force_terminal=True)
    monkeypatch.setattr(progress, "LINE_S", 0.0)
    lines = printed("lines").splitlines()
    assert len(lines) > 10 and lines[-1].startswith("preparing text: 100%, 12,398 tokens, ")
    assert all("/s, " in line and line.endswith("s left") for line in lines)


def test_the_command_prepares_and_prints_the_summary(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["prepare", str(text), "--output", str(out), "--tokenizer", "bytes", "--max_tokens", "500"]
    assert main([*arguments, "--validation_share", "0.3", "--shard_tokens", "200"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary == open_prepared(out).summary
    assert (
        summary["settings"] | {"max_tokens": 500, "validation_share": 0.3, "shard_tokens": 200} == summary["settings"]
    )
    assert main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["prepare", str(text)]) == 2 and "--output" in capsys.readouterr().err
