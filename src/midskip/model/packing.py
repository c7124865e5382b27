"""PackedBatch: which sequence and position every packed token has.

B rows of a rectangle, T columns, N packed tokens, M of them kept. A sequence is what attention stays within: a row or,
where positions tell several documents in it apart, a document.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

Rotary = tuple[Tensor, Tensor]


class PackedBatch:
    """Who is where: N packed tokens, ordered by row, then by column, and so by sequence.

    No dataclass: wrappers that shard weights take those apart, and it matters which of two equal batches this is.

    Attributes:
        batch_size, num_columns: the B and T of the rectangle that the tokens were packed from.
        column_N: int64 [N], place of each token in the flattened [B * T] rectangle, rising.
        position_N: int64 [N], position of each token in its sequence, as the rotary embedding sees it.
        seqlens: tokens of each sequence, in order, on the host: numbers that add up to N, one for each row or, with
            positions given, for each document.
        document_N: int64 [N], which document each token belongs to, counted over all rows, rising; None if each row
            is one sequence.
        rotary: cosines [N, 1, K] and sines [N, 1, K/2] of each token's rotary angles; set by the model.
        indices_N: int64 [N], index of each token in the batch that this one was kept from; None if not kept from one.
        first_column: columns that stand before this rectangle, in a cache.
        past_seqlens: tokens of each sequence that stand there, pads not counted; None without a cache.
        past_token_B: int64 [B], the last token of each of those, -1 if there is none; None without a cache.
        position_range: lowest and highest position, on the host, if positions were given.
        token_N: int64 [N], ids; set by the model if it was given ids. None in a batch that was kept from another.
    """

    def __init__(
        self,
        batch_size: int,
        num_columns: int,
        column_N: Tensor,
        position_N: Tensor,
        seqlens: list[int],
        document_N: Tensor | None = None,
        rotary: Rotary | None = None,
        indices_N: Tensor | None = None,
        first_column: int = 0,
        past_seqlens: list[int] | None = None,
        past_token_B: Tensor | None = None,
    ):
        self.batch_size, self.num_columns = batch_size, num_columns
        self.column_N, self.position_N, self.document_N = column_N, position_N, document_N
        self.seqlens, self.rotary, self.indices_N = seqlens, rotary, indices_N
        self.first_column, self.past_seqlens, self.past_token_B = first_column, past_seqlens, past_token_B
        self.token_N: Tensor | None = None
        self.position_range: tuple[int, int] | None = None
        self._kept: dict[int, tuple[Tensor, PackedBatch | None]] = {}

    @classmethod
    def from_rectangle(
        cls, valid_BT: Tensor, position_BT: Tensor | None = None, all_valid: bool = False
    ) -> PackedBatch:
        """The batch of the valid tokens of a rectangle. The host waits for the device once for a mask and once for
        positions.

        Args:
            valid_BT: bool [B, T], False for pads, which may stand anywhere.
            position_BT: int64 [B or 1, T], positions, of which those of valid tokens are read; counted from the first
                valid token of each row by default. A valid token whose position is not greater than that of the
                valid token before it in its row starts a new document.
            all_valid: `valid_BT` is known to be True everywhere, so that nobody need count.
        """
        batch_size, num_columns = valid_BT.shape
        seqlens = [num_columns] * batch_size if all_valid else valid_BT.sum(1).tolist()
        if all_valid:
            column_N = torch.arange(valid_BT.numel(), device=valid_BT.device)
        else:
            column_N = torch.nonzero_static(valid_BT.flatten(), size=sum(seqlens)).squeeze(1)
        if position_BT is None:
            position_N = (valid_BT.long().cumsum(1) - 1).flatten().index_select(0, column_N)
            return cls(batch_size, num_columns, column_N, position_N, seqlens)
        position_N = position_BT.expand(batch_size, num_columns).reshape(-1).index_select(0, column_N)
        if not sum(seqlens):
            return cls(batch_size, num_columns, column_N, position_N, seqlens)
        row_N = column_N // num_columns
        starts_N = torch.ones_like(column_N, dtype=torch.bool)
        torch.logical_or(position_N[1:] <= position_N[:-1], row_N[1:] != row_N[:-1], out=starts_N[1:])
        facts = torch.cat([torch.stack(position_N.aminmax()), starts_N.long()]).cpu()  # all that the host has to know
        starts = facts[2:].nonzero().squeeze(1).tolist()
        document_N = None
        if len(starts) > sum(length > 0 for length in seqlens):
            seqlens = [end - start for start, end in zip(starts, [*starts[1:], column_N.shape[0]])]
            document_N = starts_N.cumsum(0) - 1
        batch = cls(batch_size, num_columns, column_N, position_N, seqlens, document_N)
        batch.position_range = tuple(facts[:2].tolist())
        return batch

    @property
    def num_tokens(self) -> int:
        return self.column_N.shape[0]

    @property
    def sequence_N(self) -> Tensor:
        """int64 [N], the sequence each token belongs to, an index into `seqlens`."""
        return self.column_N // self.num_columns if self.document_N is None else self.document_N

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """int32 [S + 1], the row each sequence starts at, and N, as kernels for sequences of any length want it."""
        starts = torch.tensor([0, *itertools.accumulate(self.seqlens)], dtype=torch.int32)
        return starts.to(self.column_N.device, non_blocking=True)

    @cached_property
    def absolute_column_N(self) -> Tensor:
        """int32 [N], column of each token in its row, those in a cache counted too."""
        return (self.column_N % self.num_columns + self.first_column).int()

    @cached_property
    def index_in_sequence_N(self) -> Tensor:
        """int64 [N], tokens of its sequence in this batch that stand before each token."""
        if max(self.seqlens, default=0) <= 1:
            return torch.zeros_like(self.column_N)
        sequence_N = self.sequence_N
        length_S = self.column_N.new_zeros(len(self.seqlens)).index_add_(0, sequence_N, torch.ones_like(sequence_N))
        start_S = length_S.cumsum(0) - length_S
        return torch.arange(self.num_tokens, device=sequence_N.device) - start_S.index_select(0, sequence_N)

    @cached_property
    def padded_index_N(self) -> Tensor:
        """int64 [N], index of each token if every sequence is padded at its end to the longest."""
        return self.sequence_N * max(self.seqlens) + self.index_in_sequence_N

    def pad(self, x_N: Tensor) -> Tensor:
        """[S, longest, ...] of [N, ...]: a row for each sequence, zeros behind."""
        shape = len(self.seqlens), max(self.seqlens)
        flat = x_N.new_zeros(shape[0] * shape[1], *x_N.shape[1:])
        return flat.index_copy_(0, self.padded_index_N, x_N).unflatten(0, shape)

    @cached_property
    def previous_token_N(self) -> Tensor:
        """int64 [N], the token before each one in its sequence, one in a cache too; -1 where there is none."""
        assert self.token_N is not None, "the model was given no ids"
        before_N = torch.nn.functional.pad(self.token_N[:-1], (1, 0), value=-1)
        first_N = -1 if self.past_token_B is None else self.past_token_B.index_select(0, self.sequence_N)
        return torch.where(self.index_in_sequence_N == 0, first_N, before_N)

    @property
    def is_even(self) -> bool:
        """Whether all sequences have the same number of tokens, so that packed rows view as a rectangle."""
        return len(set(self.seqlens)) <= 1

    def keep(self, keep_N: Tensor | None) -> PackedBatch:
        """The batch of the tokens where `keep_N` (bool [N]) is True; this batch itself if that is all of them.

        Remembered by the identity of `keep_N`: layers that keep the same tokens share one batch.
        """
        if keep_N is None:
            return self
        if id(keep_N) not in self._kept:
            self.count([keep_N])
        return self._kept[id(keep_N)][1] or self

    def count(self, keeps: Sequence[Tensor | None]) -> None:
        """Work out at once what `keep` will give for each of these.

        `seqlens` are on the host, which has to wait for the device to know them. A policy that knows its decisions of
        all layers in the first one calls this, and the host waits once.
        """
        new = {id(keep_N): keep_N for keep_N in keeps if keep_N is not None and id(keep_N) not in self._kept}
        if not new:
            return
        keep_EN = torch.stack(list(new.values()))  # E of them
        count_ES = keep_EN.new_zeros(len(new), len(self.seqlens), dtype=torch.int64)
        counts = count_ES.index_add_(1, self.sequence_N, keep_EN.long()).tolist()
        for keep_N, seqlens in zip(new.values(), counts, strict=True):
            self._kept[id(keep_N)] = keep_N, self._keep(keep_N, seqlens)

    def _keep(self, keep_N: Tensor, seqlens: list[int]) -> PackedBatch | None:
        num_kept = sum(seqlens)
        if num_kept == self.num_tokens:
            return None  # all: not this batch, which would then hold on to itself and its memory
        indices_M = torch.nonzero_static(keep_N, size=num_kept).squeeze(1)
        column_M = self.column_N.index_select(0, indices_M)
        document_M = None if self.document_N is None else self.document_N.index_select(0, indices_M)
        position_M = self.position_N.index_select(0, indices_M)
        rotary = self.rotary and (self.rotary[0].index_select(0, indices_M), self.rotary[1].index_select(0, indices_M))
        return PackedBatch(
            self.batch_size, self.num_columns, column_M, position_M, seqlens, document_M, rotary, indices_M,
            self.first_column, self.past_seqlens,
        )  # fmt: skip

    def pack(self, x_BT: Tensor) -> Tensor:
        """[B, T, ...] to [N, ...]: the rows of the tokens in this batch."""
        flat = x_BT.flatten(0, 1)
        return flat if self.num_tokens == flat.shape[0] else flat.index_select(0, self.column_N)

    def unpack(self, x_N: Tensor) -> Tensor:
        """[N, ...] to [B, T, ...], zero where no token is."""
        shape = (self.batch_size, self.num_columns, *x_N.shape[1:])
        size = self.batch_size * self.num_columns
        if self.num_tokens == size:
            return x_N.reshape(shape)
        return x_N.new_zeros(size, *x_N.shape[1:]).index_copy(0, self.column_N, x_N).reshape(shape)
