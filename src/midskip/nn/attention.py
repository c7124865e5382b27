"""Gated causal attention over packed tokens, in two steps: `turn_and_gate` is arithmetic on rows, which torch.compile
may fuse with what stands before it; `attend` knows who belongs to which sequence.

    a(i, j) = g(j) exp(q_i.k_j / sqrt(K)) / sum over j' of g(j') exp(q_i.k_j' / sqrt(K))   (arXiv 2506.21103)

N queries, M keys, H query heads, G key heads, K head width, J features of a head: K, or K + 1 with gates.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from midskip.nn.fused import rotate
from midskip.nn.layout import Layout, Rotary


def turn_and_gate(
    q_NHK: Tensor, k_MGK: Tensor, v_MGK: Tensor, queries: Rotary, keys: Rotary, key_gate_M: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotary embedding of queries and keys, and the gates of the keys.

    The gate enters as log g(j), added to the score by one more feature of q (1) and k (log g(j) sqrt(K)), so that
    any fused causal kernel computes it without a mask.

    Args:
        q_NHK, k_MGK, v_MGK: queries, keys and values; H is a multiple of G.
        queries, keys: their rotary angles.
        key_gate_M: float32 [M] in (0, 1], the gate of each key; None means 1.

    Returns:
        q [N, H, J], k [M, G, J], v [M, G, J], as `attend` takes them.
    """
    one_N = log_gate_M = None
    if key_gate_M is not None:
        one_N = q_NHK.new_ones(q_NHK.shape[0])
        wide = torch.promote_types(key_gate_M.dtype, k_MGK.dtype)
        log_gate_M = (key_gate_M.to(wide).log() * math.sqrt(k_MGK.shape[-1])).to(k_MGK.dtype)
        v_MGK = F.pad(v_MGK, (0, 1))  # fused kernels want equal widths
    return rotate(q_NHK, queries, one_N), rotate(k_MGK, keys, log_gate_M), v_MGK


def attend(q_NHJ: Tensor, k_MGJ: Tensor, v_MGJ: Tensor, queries: Layout, keys: Layout, width: int) -> Tensor:
    """Attention of packed queries to packed keys of the same sequence at the same or an earlier column.

    Args:
        q_NHJ, k_MGJ, v_MGJ: from `turn_and_gate`.
        queries, keys: who the rows are. If they are the same layout, attention is plain causal attention of each
            sequence; otherwise the queries' columns must be among the keys'.
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
        length = queries.lengths[0]
        q, k, v = (x.unflatten(0, (-1, length)) for x in (q_NHJ, k_MGJ, v_MGJ))
        return _attend(q, k, v, scale).flatten(0, 1)
    return torch.cat(_attend_each(q_NHJ, k_MGJ, v_MGJ, queries, keys, scale))


def _attend_each(
    q_NHJ: Tensor, k_MGJ: Tensor, v_MGJ: Tensor, queries: Layout, keys: Layout, scale: float
) -> list[Tensor]:
    """One call a sequence: cheaper than padding all to the longest."""
    outputs = []
    columns = queries.column_N.split(queries.lengths), keys.column_N.split(keys.lengths)
    rows = zip(
        q_NHJ.split(queries.lengths), k_MGJ.split(keys.lengths), v_MGJ.split(keys.lengths), *columns, strict=True
    )
    for q, k, v, query_columns, key_columns in rows:
        if q.shape[0]:
            # where queries and keys are as many, they are the same tokens
            sees = None if q.shape[0] == k.shape[0] else query_columns[:, None] >= key_columns[None, :]
            outputs.append(_attend(q[None], k[None], v[None], scale, sees)[0])
    return outputs


def _attend(q_BTHJ: Tensor, k_BSGJ: Tensor, v_BSGJ: Tensor, scale: float, sees_TS: Tensor | None = None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BTHJ, k_BSGJ, v_BSGJ))
    out_BHTJ = F.scaled_dot_product_attention(
        q, k, v, attn_mask=sees_TS, is_causal=sees_TS is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out_BHTJ.transpose(1, 2)
