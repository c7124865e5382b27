"""Gated causal attention over packed tokens.

N queries, M keys, H query heads, G key heads, K head width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from midskip.nn.fused import rotate
from midskip.nn.layout import Layout


def gated_attention(
    q_NHK: Tensor, k_MGK: Tensor, v_MGK: Tensor, queries: Layout, keys: Layout, key_gate_M: Tensor | None = None
) -> Tensor:
    """Rotary embedding, then attention of packed queries to packed keys of the same sequence at the same or an
    earlier column.

    a(i, j) = g(j) exp(q_i.k_j / sqrt(K)) / sum over j' of g(j') exp(q_i.k_j' / sqrt(K))   (arXiv 2506.21103)

    The gate enters as log g(j), added to the score by one more feature of q (1) and k (log g(j) sqrt(K)), so that
    any fused causal kernel computes it without a mask.

    Args:
        q_NHK, k_MGK, v_MGK: queries, keys and values; H is a multiple of G.
        queries, keys: who the rows are, with their rotary angles. If they are the same layout, attention is plain
            causal attention of each sequence; otherwise the queries' columns must be among the keys'.
        key_gate_M: float32 [M] in (0, 1], the gate of each key; None means 1.

    Returns:
        [N, H * K], zero rows for zero queries, still connected to q, k and v.
    """
    num_heads, width = q_NHK.shape[1:]
    assert queries.rotary is not None and keys.rotary is not None, "the model sets the angles before the first block"
    if q_NHK.shape[0] == 0:
        unused = k_MGK.sum(0) + v_MGK.sum(0)  # gives the weights that made them a zero gradient, not none
        return (q_NHK + 0 * unused.repeat_interleave(num_heads // k_MGK.shape[1], 0)).flatten(1)
    one_N = log_gate_M = None
    if key_gate_M is not None:
        one_N = q_NHK.new_ones(q_NHK.shape[0])
        wide = torch.promote_types(key_gate_M.dtype, k_MGK.dtype)
        log_gate_M = (key_gate_M.to(wide).log() * math.sqrt(width)).to(k_MGK.dtype)
        v_MGK = F.pad(v_MGK, (0, 1))  # fused kernels want equal widths
    q_NHK, k_MGK = rotate(q_NHK, queries.rotary, one_N), rotate(k_MGK, keys.rotary, log_gate_M)
    scale = 1 / math.sqrt(width)
    if queries is keys and queries.is_even:
        length = queries.lengths[0]
        q, k, v = (x.unflatten(0, (-1, length)) for x in (q_NHK, k_MGK, v_MGK))
        out_NHK = _attend(q, k, v, scale).flatten(0, 1)
    else:
        out_NHK = torch.cat(_attend_each(q_NHK, k_MGK, v_MGK, queries, keys, scale))
    return out_NHK[..., :width].flatten(1)


def _attend_each(
    q_NHK: Tensor, k_MGK: Tensor, v_MGK: Tensor, queries: Layout, keys: Layout, scale: float
) -> list[Tensor]:
    """One call a sequence: cheaper than padding all to the longest."""
    outputs = []
    columns = queries.column_N.split(queries.lengths), keys.column_N.split(keys.lengths)
    rows = zip(
        q_NHK.split(queries.lengths), k_MGK.split(keys.lengths), v_MGK.split(keys.lengths), *columns, strict=True
    )
    for q, k, v, query_columns, key_columns in rows:
        if q.shape[0]:
            # where queries and keys are as many, they are the same tokens
            sees = None if q.shape[0] == k.shape[0] else query_columns[:, None] >= key_columns[None, :]
            outputs.append(_attend(q[None], k[None], v[None], scale, sees)[0])
    return outputs


def _attend(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, scale: float, sees_TS: Tensor | None = None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGK))
    out_BHTK = F.scaled_dot_product_attention(
        q, k, v, attn_mask=sees_TS, is_causal=sees_TS is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out_BHTK.transpose(1, 2)
