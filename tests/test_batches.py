"""Windows of tokens, and the order they come in."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, DataLoader

from midskip.data import DataError, ShardWriter, TokenWindows, WindowOrder, open_shard

END = 50256

# Windows


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_training_windows_are_whole(dtype: type[np.integer]) -> None:
    windows = TokenWindows(np.arange(65520, 65520 + 15).astype(dtype), length=4)
    assert len(windows) == 3
    items = list(windows)  # pyright: ignore[reportArgumentType]  # the old iteration protocol, by IndexError
    assert [set(item) for item in items] == [{"input_ids", "labels"}] * 3
    assert torch.cat([item["input_ids"] for item in items]).tolist() == list(range(65520, 65532))
    for item in items:
        assert item["input_ids"].dtype == item["labels"].dtype == torch.int64
        assert torch.equal(item["input_ids"], item["labels"])
        assert item["input_ids"].data_ptr() != item["labels"].data_ptr()


def test_no_training_window_crosses_from_one_shard_to_the_next() -> None:
    shards = [np.arange(10), np.arange(100, 103), np.arange(200, 208)]
    windows = TokenWindows(shards, length=4)
    assert [windows[i]["input_ids"].tolist() for i in range(len(windows))] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [200, 201, 202, 203],
        [204, 205, 206, 207],
    ]


@pytest.mark.parametrize("length", [2, 3, 7, 63])
@pytest.mark.parametrize("sizes", [[2], [7], [8, 9], [63, 1, 64, 2, 0, 65], [200, 5]])
def test_validation_windows_predict_every_token_but_the_first_of_a_shard_once(length: int, sizes: list[int]) -> None:
    starts = np.cumsum([1, *sizes])
    shards = [np.arange(start, start + size) for start, size in zip(starts, sizes)]
    windows = TokenWindows(shards, length, drop_last=False)
    targets, width = Counter(), 0
    for i in range(len(windows)):
        item = windows[i]
        assert all(value.dtype == torch.int64 and value.shape == (length,) for value in item.values())
        valid = item["attention_mask"].bool()
        num_valid = int(valid.sum())
        assert num_valid >= 2 and valid[:num_valid].all(), "every window predicts something, and pads stand last"
        assert torch.equal(item["input_ids"][valid], item["labels"][valid])
        assert (item["labels"][~valid] == -100).all() and (item["input_ids"][~valid] == 0).all()
        targets.update(item["labels"][valid][1:].tolist())
        width += num_valid
    assert targets == Counter(token for shard in shards for token in shard[1:].tolist())
    assert width == len(windows) + sum(targets.values()), "windows overlap by one token"


@pytest.mark.parametrize("drop_last", [True, False])
def test_positions_start_again_at_each_document(drop_last: bool) -> None:
    ids = np.array([END, 5, 6, END, END, 7, 8, 9, 3, 4, END, 2, 1], np.uint16)
    windows = TokenWindows(ids, 6, drop_last=drop_last, end_of_text=END)
    positions = [windows[i]["position_ids"].tolist() for i in range(len(windows))]
    if drop_last:
        assert positions == [[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 0, 1]]
    else:
        assert positions == [[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 0], [0, 1, 2, 0, 0, 0]]
        assert windows[2]["attention_mask"].tolist() == [1, 1, 1, 0, 0, 0]
    assert windows[0]["position_ids"].dtype == torch.int64
    assert "position_ids" not in TokenWindows(ids, 6, drop_last=drop_last)[0]


def test_changing_an_item_changes_nothing_else() -> None:
    token_ids = np.arange(8)
    for drop_last in (True, False):
        windows = TokenWindows(token_ids, 4, drop_last=drop_last)
        item = windows[0]
        item["input_ids"][0] = 77
        assert item["labels"][0] == 0 and windows[0]["input_ids"][0] == 0 and token_ids[0] == 0


@pytest.mark.parametrize("index", [-1, 2])
def test_a_window_that_is_not_there(index: int) -> None:
    with pytest.raises(IndexError, match=rf"no window {index}: there are 2"):
        TokenWindows(np.arange(8), 4)[index]


@pytest.mark.parametrize(
    "sizes, drop_last, message",
    [
        ([3], True, r"3 tokens \(text in memory\), which make 0 windows of 4 tokens\. Expected 1 .*shorter length"),
        ([3, 3, 3], True, r"9 tokens \(text in memory and 2 more\), which make 0 windows"),
        ([1], False, r"1 tokens .* make 0 windows"),
        ([], False, r"0 tokens \(no shard\)"),
    ],
)
def test_too_little_text_for_a_window(sizes: list[int], drop_last: bool, message: str) -> None:
    with pytest.raises(DataError, match=message):
        TokenWindows([np.arange(size) for size in sizes], 4, drop_last=drop_last)


def test_too_few_windows_for_a_batch_name_the_file(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "validation", 100) as writer:
        writer.write(np.arange(20))
    windows = TokenWindows([open_shard(tmp_path / "validation_000000.bin")], 4, drop_last=False)
    windows.require(7)
    with pytest.raises(
        DataError, match=r"20 tokens \(/.*validation_000000\.bin\), which make 7 windows .* 8 windows.*smaller batch"
    ):
        windows.require(8)


@pytest.mark.parametrize("token_ids", [np.zeros((2, 8), np.int64), np.zeros(8)])
def test_token_ids_that_are_no_row_of_integers(token_ids: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"token ids has shape .* type .*one dimension of integers"):
        TokenWindows([np.arange(8), token_ids], 4)


def test_a_length_without_anything_to_predict() -> None:
    with pytest.raises(DataError, match="length is 1 tokens"):
        TokenWindows(np.arange(8), 1)


# Their order


def test_each_epoch_is_a_shuffle_of_all_windows_of_its_own() -> None:
    order = list(WindowOrder(num_windows=50, num_samples=170, seed=3))
    epochs = [order[start : start + 50] for start in range(0, 170, 50)]
    assert [len(set(epoch)) for epoch in epochs] == [50, 50, 50, 20]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs[:3])
    assert len({tuple(epoch[:20]) for epoch in epochs}) == 4
    assert sorted(epochs[0]) != epochs[0]


def test_the_order_depends_on_the_seed_and_not_on_how_long_it_goes_on() -> None:
    order = WindowOrder(50, 170, seed=3)
    assert len(order) == 170
    assert list(order) == list(order), "it can be gone through again, as a resumed run does"
    assert list(WindowOrder(50, 70, seed=3)) == list(order)[:70]
    assert list(WindowOrder(50, 170, seed=4)) != list(order)
    assert all(type(index) is int for index in order)


def test_nothing_to_order() -> None:
    with pytest.raises(DataError, match="no windows"):
        WindowOrder(0, 10, seed=0)


def test_ranks_share_the_windows_of_an_epoch_without_overlap_or_repetition() -> None:
    batches = BatchSampler(WindowOrder(num_windows=48, num_samples=96, seed=0), batch_size=4, drop_last=True)
    ranks = [[i for batch in BatchSamplerShard(batches, 3, rank) for i in batch] for rank in range(3)]
    for epoch in range(2):
        seen = [index for rank in ranks for index in rank[epoch * 16 : (epoch + 1) * 16]]
        assert sorted(seen) == list(range(48))


def test_a_loader_with_workers_gives_what_one_without_gives(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "train", 100, shard_tokens=30) as writer:
        writer.write(np.arange(100))
    windows = TokenWindows([open_shard(path) for path in sorted(tmp_path.iterdir())], 4, end_of_text=50)
    order = WindowOrder(len(windows), 40, seed=1)
    expected, found = (list(DataLoader(windows, 4, sampler=order, num_workers=workers)) for workers in (0, 2))
    assert len(expected) == len(found) == 10
    for one, other in zip(expected, found, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
