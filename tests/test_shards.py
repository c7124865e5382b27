"""Shards: the format the field shares, written, memory-mapped and checked."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from midskip.data import DataError, ShardWriter, check_shards, open_shard, shards


def write_by_hand(path: Path, ids: list[int], magic: int = 20240520, version: int = 1, letter: str = "H") -> Path:
    """A shard from the format's description alone: 256 int32 of header, then the ids, little-endian."""
    header = [magic, version, len(ids)] + [0] * 253
    path.write_bytes(struct.pack("<256i", *header) + struct.pack(f"<{len(ids)}{letter}", *ids))
    return path


def written(folder: Path, ids: np.ndarray, vocab_size: int, **settings: int) -> list[Path]:
    with ShardWriter(folder, "train", vocab_size, **settings) as writer:
        for part in np.array_split(ids, 7):
            writer.write(part)
    return [folder / shard["name"] for shard in writer.shards]


# Reading


def test_a_published_shard_loads_as_it_is(tmp_path: Path) -> None:
    ids = [50256, 0, 65535, 1, 2, 50256, 40000]
    shard = open_shard(write_by_hand(tmp_path / "fineweb_train_000001.bin", ids))
    assert shard.dtype == np.uint16 and shard.tolist() == ids


def test_a_shard_of_a_larger_vocabulary_is_uint32(tmp_path: Path) -> None:
    ids = [128000, 0, 65536, 2**31]
    shard = open_shard(write_by_hand(tmp_path / "llama.bin", ids, 20240801, 7, "I"))
    assert shard.dtype == np.uint32 and shard.tolist() == ids


def test_a_shard_is_mapped_and_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.bin"
    num_tokens = 2**30
    with path.open("wb") as file:  # 2 GB with a hole, which takes no room
        file.write(struct.pack("<3i", 20240520, 1, num_tokens))
        file.truncate(1024 + 2 * num_tokens)
    resident_before = resident_bytes()
    shard = open_shard(path)
    assert isinstance(shard, np.memmap) and shard.shape == (num_tokens,) and shard[-1] == 0
    assert resident_bytes() - resident_before < 2**20
    with pytest.raises(ValueError, match="read-only"):
        shard[0] = 1


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


# Writing


@pytest.mark.parametrize(
    "vocab_size, dtype, start",
    [(257, "<u2", (20240520, 1)), (65536, "<u2", (20240520, 1)), (65537, "<u4", (20240801, 7))],
)
@pytest.mark.parametrize("num_tokens", [1, 7, 63, 64])
def test_what_is_written_is_what_is_read(
    tmp_path: Path, vocab_size: int, dtype: str, start: tuple[int, int], num_tokens: int
) -> None:
    ids = np.random.default_rng(0).integers(0, vocab_size, num_tokens)
    ids[-1] = vocab_size - 1
    (path,) = written(tmp_path, ids, vocab_size)
    raw = path.read_bytes()
    assert struct.unpack("<256i", raw[:1024]) == (*start, num_tokens, *[0] * 253)
    assert np.array_equal(np.frombuffer(raw[1024:], dtype), ids)
    assert np.array_equal(open_shard(path), ids)


@pytest.mark.parametrize("shard_tokens", [1, 7, 10, 99, 100, 1000])
def test_shards_rotate_when_they_are_full(tmp_path: Path, shard_tokens: int) -> None:
    ids = np.arange(100)
    paths = written(tmp_path, ids, 257, shard_tokens=shard_tokens)
    assert [path.name for path in paths] == [f"train_{i:06}.bin" for i in range(-(-100 // shard_tokens))]
    assert sorted(tmp_path.iterdir()) == paths
    parts = [open_shard(path) for path in paths]
    assert np.array_equal(np.concatenate(parts), ids)
    assert all(len(part) == shard_tokens for part in parts[:-1])


def test_a_shard_has_its_name_and_its_header_only_when_it_is_whole(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, "train", 257, shard_tokens=10) as writer:
        writer.write(np.arange(15))
        raise KeyboardInterrupt
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train_000000.bin", "train_000001.bin.part"]
    cut = (tmp_path / "train_000001.bin.part").rename(tmp_path / "renamed.bin")
    with pytest.raises(DataError, match="is no shard of tokens"):
        open_shard(cut)


def test_nothing_written_is_no_shard(tmp_path: Path) -> None:
    assert written(tmp_path, np.arange(0), 257) == list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shard_tokens", [0, 2**31])
def test_a_size_that_no_header_can_count(tmp_path: Path, shard_tokens: int) -> None:
    with pytest.raises(DataError, match=rf"shard_tokens is {shard_tokens}\. Expected 1 to 2147483647"):
        ShardWriter(tmp_path, "train", 257, shard_tokens)


# What is no whole shard


def spoil(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(change(path.read_bytes())) and None


@pytest.mark.parametrize(
    "harm, message",
    [
        (spoil(lambda raw: b""), r"is empty: 0 bytes\. Expected 1024 bytes of header.*again"),
        (spoil(lambda raw: raw[:1000]), r"is cut off within its header: 1000 bytes"),
        (spoil(lambda raw: raw[:1024]), r"is truncated: 1024 bytes\. Expected 1034, for the 5 tokens.*again"),
        (spoil(lambda raw: raw[:-1]), r"is truncated: 1033 bytes\. Expected 1034"),
        (spoil(lambda raw: raw + b"\0\0"), r"is longer than its header says: 1036 bytes\. Expected 1034"),
        (spoil(lambda raw: raw[:8] + b"\6" + raw[9:]), r"is truncated: 1034 bytes\. Expected 1036, for the 6 tokens"),
        (spoil(lambda raw: raw[:8] + bytes(4) + raw[12:1024]), r"is empty: its header counts 0 tokens.*leave it out"),
        (spoil(lambda raw: raw[:8] + b"\xff" * 4 + raw[12:]), r"is empty: its header counts -1 tokens"),
        (spoil(lambda raw: b"\x89PNG" + raw[4:]), r"is no shard of tokens: .*midskip prepare"),
        (
            spoil(lambda raw: raw[:4] + b"\2" + raw[5:]),
            r"is no shard .* 20240520 and 2\. Expected 20240520 and 1 or 2024",
        ),
        (Path.unlink, r"There is no shard .*spelling"),
    ],
)
def test_a_file_that_is_no_whole_shard(tmp_path: Path, harm: Callable[[Path], None], message: str) -> None:
    path = write_by_hand(tmp_path / "harmed.bin", [1, 2, 3, 4, 5])
    harm(path)
    for read in (open_shard, lambda path: check_shards([path], 100)):
        with pytest.raises(DataError, match=message) as caught:
            read(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


# Checking the tokens


def test_every_token_is_checked_and_the_content_has_a_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_SCAN_TOKENS", 4)
    ids = np.arange(30, dtype=np.uint16)
    paths = written(tmp_path, ids, 257, shard_tokens=11)
    seen: list[int] = []
    facts = check_shards(paths, 30, seen.append)
    assert [one["name"] for one in facts] == ["train_000000.bin", "train_000001.bin", "train_000002.bin"]
    assert [one["num_tokens"] for one in facts] == seen == [11, 11, 8]
    assert [one["crc32"] for one in facts] == [zlib.crc32(ids[i : i + 11].tobytes()) for i in (0, 11, 22)]


def test_the_writer_knows_the_fingerprints(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "train", 70000, shard_tokens=10) as writer:
        for start in range(0, 33, 3):
            writer.write(np.arange(start, start + 3))
    paths = sorted(tmp_path.iterdir())
    assert check_shards(paths, 70000) == writer.shards and writer.num_tokens == 33
    raw = bytearray(paths[0].read_bytes())
    raw[1024] ^= 1
    paths[0].write_bytes(raw)
    assert check_shards(paths, 70000)[0]["crc32"] != writer.shards[0]["crc32"]


@pytest.mark.parametrize("place", [0, 5, 10])
def test_an_id_outside_the_vocabulary_is_named_with_its_place(
    tmp_path: Path, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_SCAN_TOKENS", 4)
    ids = [7] * 11
    ids[place] = 50257
    path = write_by_hand(tmp_path / "other.bin", ids)
    with pytest.raises(
        DataError, match=rf"other\.bin' holds the token id 50257, at place {place} .*ids below 50257.*tokenizer"
    ):
        check_shards([path], 50257)
    assert check_shards([path], 50258)
