"""Gated causal attention over packed tokens: projections, rotary embedding, key gates, the kernel, the output.

    a(i, j) = g(j) exp(q_i.k_j / sqrt(K)) / sum over j' of g(j') exp(q_i.k_j' / sqrt(K))   (arXiv 2506.21103)

B sequences, T columns, S slots of a cache, N queries, M keys, D width, H query heads, G key heads, K head width, J
features of a head: K, or K + 1 with gates.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from midskip.model.layer_cache import NO_COLUMN, LayerCache
from midskip.model.ops import rotate
from midskip.model.packing import PackedBatch, Rotary

MOST_PADDED = 8  # times as many places as tokens


class Attention(nn.Module):
    """Its three methods run in this order. The first and the last are arithmetic on rows, which torch.compile may fuse
    with what stands around; only the second knows who belongs to which sequence.

    Args:
        bias, out_bias: whether the projections of queries, keys and values, and that of the output, have one.
        rope: whether queries and keys are turned by their rotary angles.
        q_norm, k_norm: what normalises each head's queries and keys over K before that; None: nothing.
    """

    def __init__(
        self, width: int, num_heads: int, num_key_heads: int, head_width: int, bias: bool = False,
        out_bias: bool = False, rope: bool = True, q_norm: nn.Module | None = None, k_norm: nn.Module | None = None,
    ):  # fmt: skip
        super().__init__()
        self.head_width, self.rope = head_width, rope
        self.q_proj = nn.Linear(width, num_heads * head_width, bias=bias)
        self.k_proj = nn.Linear(width, num_key_heads * head_width, bias=bias)
        self.v_proj = nn.Linear(width, num_key_heads * head_width, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_width, width, bias=out_bias)
        self.q_norm, self.k_norm = q_norm, k_norm

    def project(
        self, x_ND: Tensor, y_MD: Tensor, queries: Rotary, keys: Rotary, key_gate_M: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of x [N, H, J], keys and values of y [M, G, J], normalised, turned by their rotary angles and gated.

        Args:
            key_gate_M: float32 [M] in (0, 1], the gate of each key; None means 1.
        """
        q_NHK = self.q_proj(x_ND).unflatten(-1, (-1, self.head_width))
        k_MGK = self.k_proj(y_MD).unflatten(-1, (-1, self.head_width))
        v_MGK = self.v_proj(y_MD).unflatten(-1, (-1, self.head_width))
        if self.q_norm is not None and self.k_norm is not None:
            q_NHK, k_MGK = self.q_norm(q_NHK), self.k_norm(k_MGK)
        if not self.rope:
            return rotate_and_gate(q_NHK, k_MGK, v_MGK, None, None, key_gate_M)
        return rotate_and_gate(q_NHK, k_MGK, v_MGK, queries, keys, key_gate_M)

    def attend(
        self, q_NHJ: Tensor, k_MGJ: Tensor, v_MGJ: Tensor, queries: PackedBatch, keys: PackedBatch,
        key_gate_M: Tensor | None = None, past: LayerCache | None = None,
    ) -> Tensor:  # fmt: skip
        """[N, H, J]: what each query finds among the keys of its sequence at the same or an earlier column, those of a
        cache too, to which the new ones are added. Arguments as in `Block.forward`."""
        width = self.head_width
        if past is None:
            return attend(q_NHJ, k_MGJ, v_MGJ, queries, keys, width)
        was_empty = not past.num_tokens
        past.append(k_MGJ[..., :width], v_MGJ[..., :width], key_gate_M, keys)
        if was_empty:
            return attend(q_NHJ, k_MGJ, v_MGJ, queries, keys, width)
        return attend_past(q_NHJ, queries, past)

    def output(self, out_NHJ: Tensor) -> Tensor:
        """[N, D]: what is added to the hidden states."""
        return self.o_proj(out_NHJ[..., : self.head_width].flatten(1))


def rotate_and_gate(
    q_NHK: Tensor, k_MGK: Tensor, v_MGK: Tensor, queries: Rotary | None, keys: Rotary | None,
    key_gate_M: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Rotary embedding of queries and keys (None: they stay as they are), and the gates of the keys.

    The gate enters as log g(j), added to the score by one more feature of q (1) and k (log g(j) sqrt(K)), so that
    any fused causal kernel computes it without a mask.
    """
    one_N = log_gate_M = None
    if key_gate_M is not None:
        one_N = q_NHK.new_ones(q_NHK.shape[0])
        wide = torch.promote_types(key_gate_M.dtype, k_MGK.dtype)
        log_gate_M = (key_gate_M.to(wide).log() * math.sqrt(k_MGK.shape[-1])).to(k_MGK.dtype)
        v_MGK = F.pad(v_MGK, (0, 1))  # fused kernels want equal widths
    return rotate(q_NHK, queries, one_N), rotate(k_MGK, keys, log_gate_M), v_MGK


def attend(q_NHJ: Tensor, k_MGJ: Tensor, v_MGJ: Tensor, queries: PackedBatch, keys: PackedBatch, width: int) -> Tensor:
    """Attention of packed queries to packed keys of the same sequence at the same or an earlier column.

    Args:
        q_NHJ, k_MGJ, v_MGJ: from `rotate_and_gate`.
        queries, keys: who the rows are. If they are the same batch, attention is plain causal attention of each
            sequence; otherwise the queries are kept from the keys.
        width: K; scores are divided by its root.

    Returns:
        [N, H, J], of which the first K features count; zero rows for zero queries, still connected to q, k and v.
    """
    num_heads, num_key_heads = q_NHJ.shape[1], k_MGJ.shape[1]
    if q_NHJ.shape[0] == 0:
        unused = k_MGJ.sum(0) + v_MGJ.sum(0)  # gives the weights that made them a zero gradient, not none
        return q_NHJ + 0 * unused.repeat_interleave(num_heads // num_key_heads, 0)
    scale = 1 / math.sqrt(width)
    if queries is keys and queries.is_even:
        length = queries.seqlens[0]
        q, k, v = (x.unflatten(0, (-1, length)) for x in (q_NHJ, k_MGJ, v_MGJ))
        return _attend(q, k, v, scale).flatten(0, 1)
    in_one = _has_varlen(q_NHJ)
    if not in_one and (_alone_is_cheaper(q_NHJ.device) or _is_mostly_pads(keys)):
        return torch.cat(_attend_each(q_NHJ, k_MGJ, v_MGJ, queries, keys, scale))
    if queries is keys:
        return (_attend_varlen if in_one else _attend_padded)(q_NHJ, k_MGJ, v_MGJ, keys, scale)
    assert queries.indices_N is not None, "queries are kept from the keys"
    # a query at the place of its own key; nobody reads the other places
    q_MHJ = q_NHJ.new_zeros(keys.num_tokens, *q_NHJ.shape[1:]).index_copy(0, queries.indices_N, q_NHJ)
    return attend(q_MHJ, k_MGJ, v_MGJ, keys, keys, width).index_select(0, queries.indices_N)


def _has_varlen(x: Tensor) -> bool:
    """Whether torch's kernel for sequences of any length runs there: on a GPU, in half precision."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def _attend_varlen(q_NHJ: Tensor, k_NGJ: Tensor, v_NGJ: Tensor, batch: PackedBatch, scale: float) -> Tensor:
    """One launch for all sequences: a launch each costs the host more than the GPU, and each new length is planned."""
    num_features, group = q_NHJ.shape[2], q_NHJ.shape[1] // k_NGJ.shape[1]
    if group > 1:
        k_NGJ, v_NGJ = (x.repeat_interleave(group, 1) for x in (k_NGJ, v_NGJ))
    q, k, v = (F.pad(x, (0, -num_features % 8)) for x in (q_NHJ, k_NGJ, v_NGJ))  # the kernel takes no other widths
    kernel: Any = varlen_attn
    ends, longest = batch.cu_seqlens, max(batch.seqlens)
    # -1, 0: all to the left, none to the right
    return kernel(q, k, v, ends, ends, longest, longest, scale=scale, window_size=(-1, 0))[..., :num_features]


def _is_mostly_pads(batch: PackedBatch) -> bool:
    """Whether sequences that are padded to the longest would take much more memory than their tokens."""
    return len(batch.seqlens) * max(batch.seqlens) > MOST_PADDED * batch.num_tokens


def _attend_padded(q_NHJ: Tensor, k_NGJ: Tensor, v_NGJ: Tensor, batch: PackedBatch, scale: float) -> Tensor:
    """One launch for all sequences, padded to the longest: for dtypes that torch's kernel does not take."""
    num_features = q_NHJ.shape[2]
    # fused kernels take no other widths
    q, k, v = (batch.pad(F.pad(x, (0, -num_features % 8))) for x in (q_NHJ, k_NGJ, v_NGJ))
    # pads stand behind, where nobody looks
    return _attend(q, k, v, scale).flatten(0, 1).index_select(0, batch.padded_index_N)[..., :num_features]


def _attend_each(
    q_NHJ: Tensor, k_MGJ: Tensor, v_MGJ: Tensor, queries: PackedBatch, keys: PackedBatch, scale: float
) -> list[Tensor]:
    """One call a sequence: on a CPU cheaper than padding all to the longest."""
    outputs = []
    columns = queries.column_N.split(queries.seqlens), keys.column_N.split(keys.seqlens)
    rows = zip(
        q_NHJ.split(queries.seqlens), k_MGJ.split(keys.seqlens), v_MGJ.split(keys.seqlens), *columns, strict=True
    )
    for q, k, v, query_columns, key_columns in rows:
        if q.shape[0]:
            # where queries and keys are as many, they are the same tokens
            sees = None if q.shape[0] == k.shape[0] else query_columns[:, None] >= key_columns[None, :]
            outputs.append(_attend(q[None], k[None], v[None], scale, sees)[0])
    return outputs


def attend_past(q_NHK: Tensor, queries: PackedBatch, past: LayerCache) -> Tensor:
    """Attention of packed queries to what a layer's cache holds of their sequences, at the same or an earlier column.

    Gates of the keys are added to the scores as logarithms: where attention goes by positions a bias costs nothing
    more, and the cache holds a number a token for it and no wider heads.

    Args:
        q_NHK: queries, turned.
        queries: who they are. Their own keys are in the cache already.

    Returns:
        [N, H, K]; zero rows for zero queries.
    """
    if not queries.num_tokens:
        return q_NHK
    column_N = None if queries.num_columns == 1 else queries.absolute_column_N  # a last column sees all
    if queries.is_even:  # all sequences ask
        q_BTHK = q_NHK.unflatten(0, (queries.batch_size, -1))
        column_BT = None if column_N is None else column_N.view(queries.batch_size, -1)
        return _attend_slots(q_BTHK, column_BT, past).flatten(0, 1)
    if _alone_is_cheaper(q_NHK.device):
        return torch.cat(_attend_past_each(q_NHK, column_N, queries, past))
    # one launch for all, with queries in the places of those that do not ask
    column_BT = None if column_N is None else queries.pad(column_N)
    out_BTHK = _attend_slots(queries.pad(q_NHK), column_BT, past)
    return out_BTHK.flatten(0, 1).index_select(0, queries.padded_index_N)


def _alone_is_cheaper(device: torch.device) -> bool:
    """Whether a call for each sequence costs less than one for all that is padded to the longest."""
    return device.type == "cpu"


def _attend_past_each(q_NHK: Tensor, column_N: Tensor | None, queries: PackedBatch, past: LayerCache) -> list[Tensor]:
    """One call for each sequence that asks: the others' keys, and slots that are free, are not read."""
    outputs, start = [], 0
    for row, length in enumerate(queries.seqlens):
        if length:
            rows = slice(start, start + length)
            column_BT = None if column_N is None else column_N[None, rows]
            outputs.append(_attend_slots(q_NHK[None, rows], column_BT, past, row)[0])
            start += length
    return outputs


def _attend_slots(q_BTHK: Tensor, column_BT: Tensor | None, past: LayerCache, row: int | None = None) -> Tensor:
    """Attention of queries to the slots of all sequences, or of one, up to the queries' columns if given."""
    if row is None:
        rows, num_slots, even = slice(None), max(past.seqlens), past.is_even
    else:
        rows, num_slots, even = slice(row, row + 1), past.seqlens[row], True
    k_BSGK, v_BSGK, column_BS, *gates = (buffer[rows, :num_slots] for buffer in past.buffers)
    bias = gates[0][:, None] if gates else None
    if column_BT is not None or not even:
        sees_BTS = column_BS[:, None] < NO_COLUMN if column_BT is None else column_BS[:, None] <= column_BT[:, :, None]
        bias = sees_BTS if bias is None else torch.where(sees_BTS, bias, -math.inf)
    if bias is not None:
        bias = bias[:, None]  # the same for all heads
        if q_BTHK.device.type != "cpu" and bias.is_floating_point():
            bias = bias.to(q_BTHK.dtype)  # as fused kernels there want it
    return _attend(q_BTHK, k_BSGK, v_BSGK, 1 / math.sqrt(q_BTHK.shape[-1]), bias, causal=False)


def _attend(
    q_BTHJ: Tensor, k_BSGJ: Tensor, v_BSGJ: Tensor, scale: float, bias: Tensor | None = None, causal: bool = True
) -> Tensor:
    """Attention of T queries to S keys; `bias` as torch's `attn_mask`, or causal without one."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHJ, k_BSGJ, v_BSGJ))
    out_BHTJ = F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, is_causal=causal and bias is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out_BHTJ.transpose(1, 2)
