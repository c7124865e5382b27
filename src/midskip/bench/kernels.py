"""Other ways to compute the attention of packed tokens, timed beside the library's to find out which is best where.

Each takes what `midskip.model.attention.attend` takes: queries, keys and values that are turned already, with the gates
as one more feature. Without a cache, or into an empty one; a step of decoding always runs the library's.

N packed tokens, H heads (as many for keys), J features of a head, S sequences, P places a sequence is padded to, Q
blocks of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.attention.flex_attention as flex
import torch.nn.functional as F
from torch import Tensor

from midskip.model import attention
from midskip.model.packing import PackedBatch

BLOCK = 128  # rows and columns of the blocks in which FlexAttention leaves work out
BACKEND = "inductor"  # of torch.compile

_prepared: WeakKeyDictionary[PackedBatch, dict[str, Any]] = WeakKeyDictionary()


@contextmanager
def attention_by(name: str) -> Iterator[None]:
    """Models run in here compute attention this way, one of `ATTENTION` in `settings.py`.

    Raises:
        ValueError: queries are not the tokens that own the keys (`skipped_kv="keep"`), which `"auto"` alone takes.
    """
    if name == "auto":
        yield
        return
    library, (prepare, run) = attention.attend, KERNELS[name]

    def attend(
        q_NHJ: Tensor, k_NHJ: Tensor, v_NHJ: Tensor, queries: PackedBatch, keys: PackedBatch, width: int
    ) -> Tensor:  # fmt: skip
        if queries is not keys:
            raise ValueError(f'attention by {name!r} is for skipped_kv="drop": leave it out')
        if not queries.num_tokens:
            return library(q_NHJ, k_NHJ, v_NHJ, queries, keys, width)
        made = _prepared.setdefault(queries, {})  # two layers share a batch
        if name not in made:
            made[name] = prepare(queries)
        return run(q_NHJ, k_NHJ, v_NHJ, made[name], width)

    attention.attend = attend
    try:
        yield
    finally:
        attention.attend = library


# ---- one call, every sequence padded to the longest


def _places(batch: PackedBatch) -> tuple[Tensor, tuple[int, int]]:
    """int64 [N], where each token goes in the flat rectangle; and the sequences and places of that."""
    longest = max(batch.seqlens)
    return batch.sequence_N * longest + batch.index_in_sequence_N, (len(batch.seqlens), longest)


def _padded(q_NHJ: Tensor, k_NHJ: Tensor, v_NHJ: Tensor, places: tuple[Tensor, Any], width: int) -> Tensor:
    place_N, shape = places
    q_SHPJ, k_SHPJ, v_SHPJ = (
        x.new_zeros(math.prod(shape), *x.shape[1:]).index_copy(0, place_N, x).unflatten(0, shape).transpose(1, 2)
        for x in (q_NHJ, k_NHJ, v_NHJ)
    )
    # pads stand right of the sequence, where no token looks
    out_SHPJ = F.scaled_dot_product_attention(q_SHPJ, k_SHPJ, v_SHPJ, is_causal=True, scale=width**-0.5)
    return out_SHPJ.transpose(1, 2).flatten(0, 1).index_select(0, place_N)


# ---- a call of SDPA for each sequence


def _each(q_NHJ: Tensor, k_NHJ: Tensor, v_NHJ: Tensor, batch: PackedBatch, width: int) -> Tensor:
    return torch.cat(attention._attend_each(q_NHJ, k_NHJ, v_NHJ, batch, batch, width**-0.5))


# ---- FlexAttention


def _flex(q_NHJ: Tensor, k_NHJ: Tensor, v_NHJ: Tensor, mask: flex.BlockMask, width: int) -> Tensor:
    log_gate_N = None
    if q_NHJ.shape[-1] > width:
        log_gate_N = k_NHJ[:, 0, width].to(torch.promote_types(k_NHJ.dtype, torch.float32)) / math.sqrt(width)
    return _compiled(BACKEND)(*(x[..., :width] for x in (q_NHJ, k_NHJ, v_NHJ)), log_gate_N, mask)


@cache
def _compiled(backend: str) -> Callable[..., Tensor]:
    return torch.compile(_flex_packed, backend=backend)


def _flex_packed(q: Tensor, k: Tensor, v: Tensor, log_gate_N: Tensor | None, mask: flex.BlockMask) -> Tensor:
    """The packed row as one sequence; the mask keeps documents apart, and scores have the logarithms of gates added."""

    def add_gate(score: Tensor, b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score if log_gate_N is None else score + log_gate_N[key]

    q_1HNK, k_1HNK, v_1HNK = (x.transpose(0, 1)[None] for x in (q, k, v))
    out: Any = flex.flex_attention(
        q_1HNK, k_1HNK, v_1HNK, score_mod=add_gate, block_mask=mask, scale=1 / math.sqrt(q.shape[-1])
    )
    return out[0].transpose(0, 1)


def _block_mask(batch: PackedBatch) -> flex.BlockMask:
    """Causal within each sequence, from the sequences alone: no N x N mask is ever made, and nothing waits.

    Rows are ordered by sequence, so block i of queries sees the blocks of keys from the one in which the sequence of
    its first row starts to itself. Those between, of nothing but the sequence of its last row, are seen as a whole.
    """
    sequence_N, num_tokens = batch.sequence_N, batch.num_tokens
    device, num_blocks = sequence_N.device, -(-num_tokens // BLOCK)
    starts_S = batch.cu_seqlens.long()
    own_Q = torch.arange(num_blocks, device=device)
    last_Q = (own_Q + 1) * BLOCK - 1
    begin_Q = starts_S[sequence_N[own_Q * BLOCK]] // BLOCK
    whole_Q = (starts_S[sequence_N[last_Q.clamp(max=num_tokens - 1)]] + BLOCK - 1) // BLOCK  # from here to itself
    whole_Q = torch.where(last_Q < num_tokens, torch.minimum(whole_Q, own_Q), own_Q)  # a cut block sees parts alone
    slot_Q = torch.arange(num_blocks, device=device)
    num_parts_Q, num_whole_Q = whole_Q - begin_Q + 1, own_Q - whole_Q
    part_QQ = torch.where(slot_Q < num_parts_Q[:, None] - 1, begin_Q[:, None] + slot_Q, own_Q[:, None])
    whole_QQ = (whole_Q[:, None] + slot_Q).clamp(max=num_blocks - 1)

    def sees(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (sequence_N[query] == sequence_N[key])

    counts_and_indices = (x.int()[None, None] for x in (num_parts_Q, part_QQ, num_whole_Q, whole_QQ))
    return flex.BlockMask.from_kv_blocks(
        *counts_and_indices, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(num_tokens, num_tokens)
    )


KERNELS: dict[str, tuple[Callable[[PackedBatch], Any], Callable[..., Tensor]]] = {
    "sdpa": (lambda batch: batch, _each),
    "padded": (_places, _padded),
    "flex": (_block_mask, _flex),
}
