"""Layout: which sequence and position every packed token has.

B sequences, T columns, N packed tokens, M of them kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

Rotary = tuple[Tensor, Tensor]


@dataclass(eq=False)
class Layout:
    """Who is where: N packed tokens, ordered by sequence, then by column.

    Attributes:
        batch_size, num_columns: the B and T of the rectangle that the tokens were packed from.
        column_N: int64 [N], place of each token in the flattened [B * T] rectangle, rising.
        position_N: int64 [N], position of each token in its sequence, as the rotary embedding sees it.
        lengths: tokens of each sequence, on the host (B numbers that add up to N).
        rotary: cosines [N, 1, K] and sines [N, 1, K/2] of each token's rotary angles; set by the model.
        rows_N: int64 [N], row of each token in the layout that this one was kept from; None if not kept from one.
    """

    batch_size: int
    num_columns: int
    column_N: Tensor
    position_N: Tensor
    lengths: list[int]
    rotary: Rotary | None = None
    rows_N: Tensor | None = None
    _kept: dict[int, tuple[Tensor, Layout]] = field(default_factory=dict, repr=False)

    @classmethod
    def from_rectangle(cls, valid_BT: Tensor, position_BT: Tensor | None = None) -> Layout:
        """The layout of the valid tokens of a rectangle.

        Args:
            valid_BT: bool [B, T], False for pads, which may stand anywhere.
            position_BT: int64 [B, T], positions; counted from the first valid token of each sequence by default.
        """
        batch_size, num_columns = valid_BT.shape
        column_N = valid_BT.flatten().nonzero().squeeze(1)
        if position_BT is None:
            position_BT = valid_BT.long().cumsum(1) - 1
        position_N = position_BT.expand(batch_size, num_columns).reshape(-1)[column_N]
        return cls(batch_size, num_columns, column_N, position_N, valid_BT.sum(1).tolist())

    @property
    def num_tokens(self) -> int:
        return self.column_N.shape[0]

    @property
    def sequence_N(self) -> Tensor:
        """int64 [N], the sequence each token belongs to."""
        return self.column_N // self.num_columns

    @property
    def is_even(self) -> bool:
        """Whether all sequences have the same number of tokens, so that packed rows view as a rectangle."""
        return min(self.lengths) == max(self.lengths)

    def keep(self, keep_N: Tensor | None) -> Layout:
        """The layout of the tokens where `keep_N` (bool [N]) is True; this layout itself if that is all of them.

        Remembered by the identity of `keep_N`: layers that keep the same tokens share one layout.
        """
        if keep_N is None:
            return self
        known = self._kept.get(id(keep_N))
        if known is None:
            known = self._kept[id(keep_N)] = (keep_N, self._keep(keep_N))
        return known[1]

    def _keep(self, keep_N: Tensor) -> Layout:
        rows_M = keep_N.nonzero().squeeze(1)
        if rows_M.shape[0] == self.num_tokens:
            return self
        column_M = self.column_N.index_select(0, rows_M)
        lengths = torch.bincount(column_M // self.num_columns, minlength=self.batch_size).tolist()
        position_M = self.position_N.index_select(0, rows_M)
        rotary = self.rotary and (self.rotary[0].index_select(0, rows_M), self.rotary[1].index_select(0, rows_M))
        return Layout(self.batch_size, self.num_columns, column_M, position_M, lengths, rotary, rows_M)

    def pack(self, x_BT: Tensor) -> Tensor:
        """[B, T, ...] to [N, ...]: the rows of the tokens in this layout."""
        flat = x_BT.flatten(0, 1)
        return flat if self.num_tokens == flat.shape[0] else flat.index_select(0, self.column_N)

    def unpack(self, x_N: Tensor) -> Tensor:
        """[N, ...] to [B, T, ...], zero where no token is."""
        shape = (self.batch_size, self.num_columns, *x_N.shape[1:])
        size = self.batch_size * self.num_columns
        if self.num_tokens == size:
            return x_N.reshape(shape)
        return x_N.new_zeros(size, *x_N.shape[1:]).index_copy(0, self.column_N, x_N).reshape(shape)
