"""LayerCache: keys and values of the tokens that ran one layer, and of no others.

B sequences, M new tokens, R chosen sequences, S slots a sequence, G key heads, K head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from midskip.model.packing import PackedBatch

NO_COLUMN = torch.iinfo(torch.int32).max  # of a slot that is free: later than any that asks
SPARE, ROUND = 8, 16  # an eighth more slots than needed, in steps: a token is copied a few times, not at every step


def writable(buffers: list[Tensor]) -> list[Tensor]:
    """The same, or copies of what was made in `torch.inference_mode()` and may not be written to outside."""
    if torch.is_inference_mode_enabled():
        return buffers
    return [buffer.clone() if buffer.is_inference() else buffer for buffer in buffers]


class LayerCache:
    """One layer's part of a cache. Sequence b fills its first `seqlens[b]` slots, in the order of its columns.

    Attributes:
        seqlens: tokens held of each sequence, on the host; empty while nothing came.
        buffers: keys, values, columns and, once gates were given, their logarithms, each [B, S, ...]; empty likewise.
            Keys and values of a head lie side by side in memory, [B, G, S, K], as attention reads them.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything, and give its memory back."""
        self.seqlens: list[int] = []
        self._length_B: Tensor | None = None  # `seqlens` on the device, while it is known there
        self.buffers: list[Tensor] = []

    @property
    def keys(self) -> Tensor:
        """[B, S, G, K], with their rotary embedding and without their gates."""
        return self.buffers[0]

    @property
    def values(self) -> Tensor:
        """[B, S, G, K]."""
        return self.buffers[1]

    @property
    def columns(self) -> Tensor:
        """int32 [B, S], column of each token in its row; `NO_COLUMN` in slots that are free."""
        return self.buffers[2]

    @property
    def log_gates(self) -> Tensor | None:
        """float32 (float64 for float64 keys) [B, S], logarithms of the keys' gates; None while none were given."""
        return self.buffers[3] if len(self.buffers) > 3 else None

    @property
    def num_tokens(self) -> int:
        """Tokens held, of all sequences."""
        return sum(self.seqlens)

    @property
    def is_even(self) -> bool:
        """Whether it holds equally many tokens of all sequences."""
        return len(set(self.seqlens)) <= 1

    @property
    def token_bytes(self) -> int:
        """Bytes that one token takes: key, value, column and gate."""
        return sum(buffer[0, 0].nbytes for buffer in self.buffers)

    @property
    def allocated_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)

    def append(self, k_MGK: Tensor, v_MGK: Tensor, key_gate_M: Tensor | None, new: PackedBatch) -> None:
        """Add keys and values of the tokens of `new`, each after those that its sequence has.

        Args:
            k_MGK, v_MGK: keys, turned, and values.
            key_gate_M: float32 [M], gates of the keys in (0, 1]; None means 1.

        Raises:
            ValueError: keys of another dtype than those held.
        """
        if not new.num_tokens:
            return
        if self.buffers and self.keys.dtype != k_MGK.dtype:
            raise ValueError(
                f"the cache holds keys of {self.keys.dtype} and {k_MGK.dtype} ones come: run all passes over a cache "
                "in one dtype, and all inside autocast or all outside"
            )
        before = self.seqlens or [0] * new.batch_size
        after = [held + more for held, more in zip(before, new.seqlens, strict=True)]
        self.buffers = writable(self.buffers)
        self._make_room(after, k_MGK, gated=key_gate_M is not None)
        news = [k_MGK, v_MGK, new.absolute_column_N]
        if self.log_gates is not None:
            dtype = self.log_gates.dtype
            news.append(self.log_gates.new_zeros(()) if key_gate_M is None else key_gate_M.to(dtype).log())
        if new.is_even and self.is_even:
            start, stop = before[0], after[0]
            for buffer, tensor in zip(self.buffers, news, strict=True):
                buffer[:, start:stop] = tensor.view(new.batch_size, -1, *tensor.shape[1:]) if tensor.ndim else tensor
            self._length_B = None
        else:
            slot_M = self._slots(before, new)
            for buffer, tensor in zip(self.buffers, news, strict=True):
                buffer[new.sequence_N, slot_M] = tensor
        self.seqlens = after

    def _make_room(self, seqlens: list[int], like_MGK: Tensor, gated: bool) -> None:
        if not self.buffers or max(seqlens) > self.columns.shape[1]:
            num_slots = max(seqlens) * (SPARE + 1) // SPARE
            shape = len(seqlens), num_slots + -num_slots % ROUND
            num_heads, width = like_MGK.shape[1:]  # G and K
            grown = [
                *(like_MGK.new_empty(shape[0], num_heads, shape[1], width).transpose(1, 2) for _ in range(2)),
                like_MGK.new_full(shape, NO_COLUMN, dtype=torch.int32),
                *(gates.new_empty(shape) for gates in self.buffers[3:]),
            ]
            for buffer in grown[:2] + grown[3:]:
                buffer[:, min(seqlens) :] = 0  # free slots may be read, and what they hold is multiplied by 0
            used = slice(0, max(self.seqlens, default=0))
            for buffer, old in zip(grown, self.buffers):
                buffer[:, used] = old[:, used]
            self.buffers = grown
        if gated and self.log_gates is None:
            wide = torch.promote_types(torch.float32, like_MGK.dtype)
            self.buffers.append(self.columns.new_zeros(self.columns.shape, dtype=wide))

    def _slots(self, before: list[int], new: PackedBatch) -> Tensor:
        """int64 [M], the slot of each new token in its sequence."""
        row_M = new.sequence_N
        if self._length_B is None:  # zeros need no copy from the host, for which a GPU is waited
            zeros_B = row_M.new_zeros(len(before))
            self._length_B = torch.tensor(before, device=row_M.device) if any(before) else zeros_B
        slot_M = self._length_B.index_select(0, row_M) + new.index_in_sequence_N
        self._length_B = self._length_B.index_add(0, row_M, torch.ones_like(row_M))
        return slot_M

    def select(self, row_R: Tensor, rows: list[int]) -> None:
        """Make sequence r what sequence `rows[r]` was; `row_R` says the same on the device."""
        if self.seqlens:
            was_alone = len(self.seqlens) == 1
            kept = [buffer.transpose(1, 2).index_select(0, row_R).transpose(1, 2) for buffer in self.buffers[:2]]
            self.buffers = kept + [buffer.index_select(0, row_R) for buffer in self.buffers[2:]]
            self.seqlens = [self.seqlens[row] for row in rows]
            self._length_B = None if self._length_B is None else self._length_B.index_select(0, row_R)
            if was_alone:
                self._clear_free_slots()

    def seqlens_before(self, column: int) -> Tensor:
        """int64 [B], tokens held of each sequence whose column is earlier than this one."""
        return (self.columns < column).sum(1)

    def crop(self, column: int, seqlens: list[int]) -> None:
        """Forget the tokens from a column on; `seqlens` is what `seqlens_before` gives of it."""
        self.buffers = writable(self.buffers)
        self.columns.masked_fill_(self.columns >= column, NO_COLUMN)
        self.seqlens, self._length_B = seqlens, None
        self._clear_free_slots()

    def _clear_free_slots(self) -> None:
        """Of several sequences they may be read, and what they hold is multiplied by 0: which NaN would survive."""
        if len(self.seqlens) > 1:
            free_BS = self.columns[:, min(self.seqlens) :] == NO_COLUMN
            for buffer in self.buffers[:2] + self.buffers[3:]:
                buffer[:, min(self.seqlens) :].masked_fill_(free_BS.view(*free_BS.shape, *[1] * (buffer.ndim - 2)), 0)
