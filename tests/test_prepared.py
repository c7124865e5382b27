"""Prepared folders and shards of other origin: opened, checked, and refused before a run."""

import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from midskip.data import DataError, bytes_tokenizer, open_prepared, open_shards, prepare

QUIET = Console(file=io.StringIO())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Training tokens in three shards, validation tokens in one."""
    (tmp_path / "text.txt").write_text("some words of training text")
    (tmp_path / "held.txt").write_text("held out")
    prepare(
        str(tmp_path / "text.txt"),
        tmp_path / "out",
        tokenizer="bytes",
        validation=str(tmp_path / "held.txt"),
        shard_tokens=10,
    )
    return tmp_path / "out"


def write_shard(path: Path, ids: list[int]) -> Path:
    path.write_bytes(struct.pack("<256i", 20240520, 1, len(ids), *[0] * 253) + struct.pack(f"<{len(ids)}H", *ids))
    return path


def change(path: Path, old: bytes, new: bytes) -> None:
    raw = path.read_bytes()
    assert raw.count(old) == 1
    path.write_bytes(raw.replace(old, new))


# Prepared folders


@pytest.mark.parametrize(
    "harm, message",
    [
        (lambda folder: (folder / "prepared.json").unlink(), r"holds no prepared\.json\. .*midskip prepare SOURCE"),
        (lambda folder: (folder / "prepared.json").write_text("{"), r"prepared\.json' is not of this version"),
        (lambda folder: (folder / "prepared.json").write_text('{"format": 1}'), r"is not of this version"),
        (lambda folder: change(folder / "prepared.json", b'"format": 1', b'"format": 2'), r"is not of this version"),
        (lambda folder: change(folder / "prepared.json", b'"train_000001', b'"../train_000001'), r"is not of this ver"),
        (
            lambda folder: change(folder / "prepared.json", b'"name": "train_000001', b'"": "train'),
            r"is not of this version",
        ),
        (lambda folder: (folder / "train_000001.bin").unlink(), r"no shard '.*train_000001\.bin'"),
        (lambda folder: (folder / "train_000001.bin").write_bytes(b""), r"train_000001\.bin' is empty: 0 bytes"),
        (
            lambda folder: write_shard(folder / "train_000001.bin", [1] * 9),
            r"train_000001\.bin' holds 9 tokens\. Expected 10, as prepared\.json says",
        ),
        (lambda folder: (folder / "tokenizer" / "tokenizer.json").unlink(), r"tokenizer '.*out/tokenizer' cannot be"),
    ],
)
def test_a_folder_that_is_no_longer_what_was_prepared(folder: Path, harm: Callable[[Path], None], message: str) -> None:
    harm(folder)
    with pytest.raises(DataError, match=message) as caught:
        open_prepared(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there() -> None:
    with pytest.raises(DataError, match=r"'nowhere' holds no prepared\.json"):
        open_prepared("nowhere")


def test_a_token_that_was_changed_is_found(folder: Path) -> None:
    assert [facts["num_tokens"] for facts in open_prepared(folder).check(QUIET)["training"]] == [10, 10, 8]
    write_shard(folder / "train_000001.bin", [1] * 10)
    with pytest.raises(DataError, match=r"train_000001\.bin' is not what was written there: .*checksum.*prepare"):
        open_prepared(folder).check(QUIET)
    write_shard(folder / "train_000001.bin", [257] * 10)
    with pytest.raises(DataError, match=r"train_000001\.bin' holds the token id 257, at place 0 .*below 257"):
        open_prepared(folder).check(QUIET)


# Shards of other origin


def test_published_shards_and_their_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / "fineweb_train_000001.bin", [256, 1, 2, 3, 256, 4])
    write_shard(tmp_path / "fineweb_train_000002.bin", [256, 5])
    write_shard(tmp_path / "fineweb_val_000000.bin", [256, 6, 7])
    monkeypatch.chdir(tmp_path)
    prepared = open_shards("fineweb_train_*.bin", "fineweb_val_*.bin", "bytes")
    assert prepared.folder is None and prepared.tokenizer.get_vocab() == bytes_tokenizer().get_vocab()
    assert [path.name for path in prepared.training] == ["fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    assert prepared.summary["training"]["num_tokens"] == 8 and prepared.summary["validation"]["num_tokens"] == 3
    windows = prepared.windows("training", 3)
    assert [windows[i]["input_ids"].tolist() for i in range(len(windows))] == [[256, 1, 2], [3, 256, 4]]
    assert windows[1]["position_ids"].tolist() == [0, 0, 1]
    facts = prepared.check(QUIET)
    assert [shard["num_tokens"] for shard in facts["training"]] == [6, 2]
    assert facts == prepared.check(QUIET)
    write_shard(tmp_path / "fineweb_train_000002.bin", [256, 6])
    assert facts != prepared.check(QUIET)
    assert open_shards(
        "fineweb_train_000001.bin,fineweb_train_000002.bin", str(tmp_path / "fineweb_val_000000.bin"), "bytes"
    )


def test_shards_that_do_not_fit_their_tokenizer(tmp_path: Path) -> None:
    for name, ids in (("train", [256, 50256]), ("val", [256, 1])):
        write_shard(tmp_path / f"{name}.bin", ids)
    prepared = open_shards(str(tmp_path / "train.bin"), str(tmp_path / "val.bin"), "bytes")
    with pytest.raises(DataError, match=r"train\.bin' holds the token id 50256, at place 1 .*below 257; give the tok"):
        prepared.check(QUIET)


@pytest.mark.parametrize(
    "training, validation, tokenizer, message",
    [
        ("a_*.bin", "gone_*.bin", "bytes", r"nothing at 'gone_\*\.bin'.*shards of kind \.bin"),
        ("a_*.bin", "text.txt", "bytes", r"text\.txt' is of a kind that is not known.*shards of kind \.bin"),
        ("empty", "b.bin", "bytes", r"folder 'empty' holds no file of that kind"),
        ("a_*.bin,cut.bin", "b.bin", "bytes", r"cut\.bin' is truncated"),
        ("a_*.bin", "a_1.bin,b.bin", "bytes", r"a_1\.bin' is both for training and for validation"),
        ("a_*.bin", "b.bin", "bpe", r"'bpe' is trained on text, and shards hold tokens"),
        ("a_*.bin", "b.bin", "./gone", r"no tokenizer at '\./gone'"),
    ],
)
def test_shards_that_cannot_be_used(
    tmp_path: Path, training: str, validation: str, tokenizer: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a_0.bin", "a_1.bin", "b.bin", "cut.bin"):
        write_shard(tmp_path / name, [1, 2, 3])
    (tmp_path / "cut.bin").write_bytes((tmp_path / "cut.bin").read_bytes()[:-2])
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message) as caught:
        open_shards(training, validation, tokenizer)
    assert "\n" not in str(caught.value)


def test_checking_says_how_far_it_is(folder: Path) -> None:
    file = io.StringIO()
    open_prepared(folder).check(Console(file=file, force_terminal=True, width=80))
    assert "checking tokens" in file.getvalue() and "100%, 37 tokens, " in file.getvalue()


def test_windows_read_what_is_in_the_shards(folder: Path) -> None:
    windows = open_prepared(folder).windows("training", 5, documents_apart=False)
    assert len(windows) == 5
    ids = np.concatenate([windows[i]["input_ids"].numpy() for i in range(5)])
    assert ids.tolist() == [256, *b"some words of training t"]
