"""PackedBatch: packing, keeping and putting back, against plain indexing."""

import gc
import weakref

import pytest
import torch
from torch import Tensor

from midskip.model.packing import PackedBatch


def test_pack_and_unpack_are_inverse(ragged: tuple[Tensor, Tensor]) -> None:
    valid_BT = ragged[1].bool()
    batch = PackedBatch.from_rectangle(valid_BT)
    x_BTD = torch.randn(*valid_BT.shape, 3)
    x_ND = batch.pack(x_BTD)
    assert torch.equal(x_ND, x_BTD[valid_BT])
    assert torch.equal(batch.unpack(x_ND), x_BTD * valid_BT[..., None])
    assert torch.equal(batch.pack(batch.unpack(x_ND)), x_ND)
    assert torch.equal(batch.unpack(batch.pack(ragged[0])), ragged[0] * valid_BT)
    assert batch.unpack(x_ND[:, 0] > 0).dtype == torch.bool


def test_who_is_where(ragged: tuple[Tensor, Tensor]) -> None:
    valid_BT = ragged[1].bool()
    batch = PackedBatch.from_rectangle(valid_BT)
    assert batch.num_tokens == valid_BT.sum() and (batch.batch_size, batch.num_columns) == valid_BT.shape
    assert batch.seqlens == valid_BT.sum(1).tolist() == [9, 6, 5, 4, 1, 0, 7]
    rows = valid_BT.nonzero()
    assert torch.equal(batch.sequence_N, rows[:, 0])
    assert torch.equal(batch.column_N, rows[:, 0] * 9 + rows[:, 1])
    assert torch.equal(batch.absolute_column_N, rows[:, 1].int())
    assert batch.position_N.tolist() == [n for length in batch.seqlens for n in range(length)]
    given_BT = torch.randint(50, valid_BT.shape)
    assert torch.equal(PackedBatch.from_rectangle(valid_BT, given_BT).position_N, given_BT[valid_BT])
    shared = PackedBatch.from_rectangle(valid_BT, given_BT[:1])
    assert torch.equal(shared.position_N, given_BT[:1].expand(7, 9)[valid_BT])


def test_even_lengths_are_seen() -> None:
    assert PackedBatch.from_rectangle(torch.ones(3, 4).bool()).is_even
    assert PackedBatch.from_rectangle(torch.tensor([[1, 1, 0], [0, 1, 1]]).bool()).is_even
    assert not PackedBatch.from_rectangle(torch.tensor([[1, 1, 0], [0, 0, 1]]).bool()).is_even
    assert PackedBatch.from_rectangle(torch.zeros(2, 3).bool()).is_even


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_keep_is_indexing(ragged: tuple[Tensor, Tensor], share: float) -> None:
    valid_BT = ragged[1].bool()
    batch = PackedBatch.from_rectangle(valid_BT)
    batch.rotary = torch.randn(batch.num_tokens, 1, 4), torch.randn(batch.num_tokens, 1, 2)
    batch.first_column, batch.past_seqlens = 4, [1, 2, 3, 4, 0, 1, 2]
    keep_N = torch.rand(batch.num_tokens) < share
    kept = batch.keep(keep_N)
    assert (kept.first_column, kept.past_seqlens) == (batch.first_column, batch.past_seqlens)
    assert kept.num_tokens == keep_N.sum() == len(kept.indices_N)
    assert torch.equal(kept.indices_N, keep_N.nonzero()[:, 0])
    assert torch.equal(kept.column_N, batch.column_N[keep_N])
    assert torch.equal(kept.position_N, batch.position_N[keep_N])
    assert torch.equal(kept.sequence_N, batch.sequence_N[keep_N])
    assert kept.seqlens == [int((batch.sequence_N[keep_N] == b).sum()) for b in range(7)]
    assert all(torch.equal(got, full[keep_N]) for got, full in zip(kept.rotary, batch.rotary, strict=True))
    x_ND = torch.randn(batch.num_tokens, 3)
    expected_BTD = batch.unpack(x_ND * keep_N[:, None])
    assert torch.equal(kept.unpack(x_ND[keep_N]), expected_BTD)
    assert torch.equal(kept.pack(expected_BTD), x_ND[keep_N])


def test_put_back_restores_the_others(ragged: tuple[Tensor, Tensor]) -> None:
    batch = PackedBatch.from_rectangle(ragged[1].bool())
    h_ND = torch.randn(batch.num_tokens, 3)
    keep_N = torch.rand(batch.num_tokens) < 0.5
    kept = batch.keep(keep_N)
    back_ND = h_ND.index_copy(0, kept.indices_N, h_ND.index_select(0, kept.indices_N) + 1)
    assert torch.equal(back_ND, h_ND + keep_N[:, None])


def test_keeping_all_is_the_batch_itself() -> None:
    batch = PackedBatch.from_rectangle(torch.ones(2, 3).bool())
    assert batch.keep(None) is batch
    assert batch.keep(torch.ones(6).bool()) is batch
    assert batch.indices_N is None


def test_the_same_tensor_is_worked_out_once() -> None:
    batch = PackedBatch.from_rectangle(torch.ones(2, 3).bool())
    keep_N = torch.tensor([1, 0, 1, 1, 1, 0]).bool()
    assert batch.keep(keep_N) is batch.keep(keep_N)
    assert batch.keep(keep_N.clone()) is not batch.keep(keep_N)
    # remembered by its identity: it must live on, or a new tensor at its address is mistaken for it
    alive = weakref.ref(keep_N)
    del keep_N
    assert alive() is not None


def test_a_batch_does_not_hold_on_to_itself() -> None:
    batch = PackedBatch.from_rectangle(torch.ones(2, 3).bool())
    assert batch.keep(torch.ones(6).bool()) is batch
    batch.keep(torch.arange(6) > 2)
    alive = weakref.ref(batch)
    gc.disable()
    try:
        del batch
        assert alive() is None, "its memory goes with it, and not when garbage is next collected"
    finally:
        gc.enable()


def test_nobody_at_all() -> None:
    batch = PackedBatch.from_rectangle(torch.zeros(2, 3).bool())
    assert batch.num_tokens == 0 and batch.seqlens == [0, 0]
    assert torch.equal(batch.unpack(torch.zeros(0, 5)), torch.zeros(2, 3, 5))
    assert batch.pack(torch.randn(2, 3, 5)).shape == (0, 5)
    assert batch.keep(torch.zeros(0).bool()) is batch
