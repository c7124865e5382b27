"""Ways to compute packed gated causal attention on a GPU, for `gpu.py` to hold against each other.

Each goes from queries, keys and values as the projections give them to [N, H, K]: the rotary turn, the gates and
attention itself. What depends on the layout alone is prepared once for each layout: two layers share it.

N packed tokens, H heads (as many for keys), K head width, S sequences, P places a sequence is padded to, Q blocks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.attention.flex_attention as flex
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from midskip.model.attention import attend, rotate_and_gate
from midskip.model.packing import Layout

BLOCK = 128  # rows and columns of the blocks in which FlexAttention leaves work out


class Candidate(NamedTuple):
    """Two steps: `prepare(layout)`, and `run(q_NHK, k_NHK, v_NHK, gate_N, layout, prepared)`, which gives [N, H, K].
    `gate_N` is float32 in (0, 1], or None for gates of 1."""

    prepare: Callable[[Layout], Any]
    run: Callable[[Tensor, Tensor, Tensor, Tensor | None, Layout, Any], Tensor]


def candidates(backend: str | None) -> dict[str, Candidate]:
    """All of them, with what torch.compile is to fuse compiled by `backend`; None: not compiled."""

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        # with dynamic=True the number and the width of heads would not be constants in the kernels
        return function if backend is None else torch.compile(function, backend=backend)

    # FlexAttention apart: compiled with a logarithm before it, it loses the gradient of the gate (torch 2.11, 2.13)
    turn, turn_wide, flexed = compiled(_turn), compiled(_turn_wide), compiled(_flex)

    def each(turn: Callable[..., Any]) -> Candidate:
        def run(q: Tensor, k: Tensor, v: Tensor, gate_N: Tensor | None, layout: Layout, _: None) -> Tensor:
            q_NHJ, k_NHJ, v_NHJ = turn(q, k, v, layout.rotary, gate_N)
            return attend(q_NHJ, k_NHJ, v_NHJ, layout, layout, q.shape[-1])[..., : q.shape[-1]]

        return Candidate(_nothing, run)

    def padded(q: Tensor, k: Tensor, v: Tensor, gate_N: Tensor | None, layout: Layout, where: Any) -> Tensor:
        (place_N, longest), scale = where, q.shape[-1] ** -0.5
        turned = turn_wide(q, k, v, layout.rotary, gate_N)
        rectangles = (
            x.new_zeros(len(layout.lengths) * longest, *x.shape[1:]).index_copy(0, place_N, x) for x in turned
        )
        q_SHPJ, k_SHPJ, v_SHPJ = (x.unflatten(0, (-1, longest)).transpose(1, 2) for x in rectangles)
        # pads stand right of the sequence, where no token looks
        out_SHPJ = F.scaled_dot_product_attention(q_SHPJ, k_SHPJ, v_SHPJ, is_causal=True, scale=scale)
        return out_SHPJ.transpose(1, 2).flatten(0, 1).index_select(0, place_N)[..., : q.shape[-1]]

    def variable(q: Tensor, k: Tensor, v: Tensor, gate_N: Tensor | None, layout: Layout, where: Any) -> Tensor:
        ends, longest = where
        turned = turn_wide(q, k, v, layout.rotary, gate_N)  # the kernel takes no other widths
        function: Any = varlen_attn if q.is_cuda else _varlen_twin
        out_NHJ = function(
            *turned, ends, ends, longest, longest, scale=q.shape[-1] ** -0.5, window_size=(-1, 0)
        )  # -1, 0: all to the left, none to the right
        return out_NHJ[..., : q.shape[-1]]

    def flexible(q: Tensor, k: Tensor, v: Tensor, gate_N: Tensor | None, layout: Layout, mask: Any) -> Tensor:
        q, k, v = turn(q, k, v, layout.rotary, None)
        return flexed(q, k, v, None if gate_N is None else gate_N.log(), mask)

    return {
        "sdpa each": each(turn),  # ours
        "sdpa each, wide": each(turn_wide),  # otherwise SDPA copies to such a width by itself
        "sdpa padded": Candidate(_places, padded),
        "varlen": Candidate(_ends, variable),
        "flex": Candidate(_block_mask, flexible),
    }


def _turn(
    q: Tensor, k: Tensor, v: Tensor, rotary: tuple[Tensor, Tensor], gate_N: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [N, H, J], turned and with the gates as a feature."""
    return rotate_and_gate(q, k, v, rotary, rotary, gate_N)


def _turn_wide(
    q: Tensor, k: Tensor, v: Tensor, rotary: tuple[Tensor, Tensor], gate_N: Tensor | None
) -> tuple[Tensor, ...]:
    """The same with features of 0 up to a multiple of 8."""
    turned = rotate_and_gate(q, k, v, rotary, rotary, gate_N)
    return tuple(F.pad(x, (0, -x.shape[-1] % 8)) for x in turned)


def _nothing(layout: Layout) -> None:
    return None


# ---- one call, padded


def _places(layout: Layout) -> tuple[Tensor, int]:
    """int64 [N], where each token goes in the flat rectangle of sequences padded to the longest; and that length."""
    longest, sequence_N = max(layout.lengths), layout.sequence_N
    starts_S = _starts(layout, torch.int64)[:-1]
    index_in_sequence_N = torch.arange(layout.num_tokens, device=sequence_N.device) - starts_S[sequence_N]
    return sequence_N * longest + index_in_sequence_N, longest


def _starts(layout: Layout, dtype: torch.dtype) -> Tensor:
    """[S + 1], the row each sequence starts at, and N."""
    starts = [0, *itertools.accumulate(layout.lengths)]
    return torch.tensor(starts, dtype=dtype).to(layout.column_N.device, non_blocking=True)


# ---- variable lengths


def _ends(layout: Layout) -> tuple[Tensor, int]:
    return _starts(layout, torch.int32), max(layout.lengths)


def _varlen_twin(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, ends_k: Tensor, longest: int, longest_k: int, *, scale: float,
    window_size: tuple[int, int],
) -> Tensor:  # fmt: skip
    """What `varlen_attn` says it computes, where its kernel does not run."""
    assert ends is ends_k and longest == longest_k and window_size == (-1, 0) and ends.dtype == torch.int32
    assert q.shape[-1] % 8 == 0 and int(ends.diff().max()) == longest
    sequences = zip(*(x.transpose(0, 1).split(ends.diff().tolist(), 1) for x in (q, k, v)), strict=True)
    outs = [F.scaled_dot_product_attention(*heads, is_causal=True, scale=scale) for heads in sequences]
    return torch.cat(outs, 1).transpose(0, 1)


# ---- FlexAttention


def _flex(q: Tensor, k: Tensor, v: Tensor, log_gate_N: Tensor | None, mask: flex.BlockMask) -> Tensor:
    """The packed row as one sequence; the mask keeps documents apart, and scores have the logarithms of gates added."""

    def add_gate(score: Tensor, b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score if log_gate_N is None else score + log_gate_N[key]

    q_1HNK, k_1HNK, v_1HNK = (x.transpose(0, 1)[None] for x in (q, k, v))
    out_1HNK: Any = flex.flex_attention(
        q_1HNK, k_1HNK, v_1HNK, score_mod=add_gate, block_mask=mask, scale=1 / math.sqrt(q.shape[-1])
    )
    return out_1HNK[0].transpose(0, 1)


def _block_mask(layout: Layout) -> flex.BlockMask:
    """Causal within each sequence, from the sequences alone: no N x N mask is ever made, and nothing waits.

    Rows are ordered by sequence, so block i of queries sees the blocks of keys from the one in which the sequence of
    its first row starts to itself. Those between, of nothing but the sequence of its last row, are seen as a whole.
    """
    sequence_N, num_tokens = layout.sequence_N, layout.num_tokens
    device, num_blocks = sequence_N.device, -(-num_tokens // BLOCK)
    starts_S = _starts(layout, torch.int64)
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


# ---- the truth


def reference(q: Tensor, k: Tensor, v: Tensor, gate_N: Tensor | None, layout: Layout) -> Tensor:
    """Sequence by sequence, in float32 (or wider) and plain operations."""
    wide = torch.promote_types(q.dtype, torch.float32)
    assert layout.rotary is not None
    cos, sin = (angle.to(wide) for angle in layout.rotary)
    half = q.shape[-1] // 2
    turned = []
    for x in (q.to(wide), k.to(wide)):
        first, second = x[..., :half], x[..., half:]
        cos_half = cos[..., :half]
        turned.append(torch.cat((first * cos_half - second * sin, second * cos_half + first * sin), -1))
    outs = []
    gates = [None] * len(layout.lengths) if gate_N is None else gate_N.to(wide).split(layout.lengths)
    for q_n, k_n, v_n, gate_n in zip(*(x.split(layout.lengths) for x in (*turned, v.to(wide))), gates, strict=True):
        score = torch.einsum("nhk,mhk->hnm", q_n, k_n) / math.sqrt(q.shape[-1])
        weight = score.masked_fill(torch.ones_like(score[0]).triu(1).bool(), -math.inf).softmax(-1)
        weight = weight if gate_n is None else weight * gate_n
        outs.append(torch.einsum("hnm,mhk->nhk", weight / weight.sum(-1, keepdim=True), v_n))
    return torch.cat(outs)
