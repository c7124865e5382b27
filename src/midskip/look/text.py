"""One look at a text: depth, gates, scores, losses, ranks and FLOPs of each of its tokens, in windows of the model.

B windows, T columns, N = B * T tokens of a pass, V vocabulary, L layers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from midskip.cost import LayerWork, Meter, block_flops, head_flops
from midskip.data.token_text import TokenText, token_texts
from midskip.model.config import PARTS, MidskipConfig
from midskip.model.loss import IGNORED, cross_entropy
from midskip.model.modeling import MidskipForCausalLM
from midskip.report import TokenDepth

MOST_LOGITS = 2**24  # of one pass


@dataclass(frozen=True)
class Look:
    """What a model did with a text, under the limits that were in force.

    Attributes:
        tokens: one for each id.
        ids: of the tokens.
        num_layers: L.
        window: tokens of a window; each begins anew, and sees nothing of those before it.
        loss_nats: mean over the tokens that another one follows, of predicting that; None if there is none.
        executed_share: of block-tokens that ran.
        flops, dense_flops: of the forward passes, as they ran, and with nothing skipped.
        kv_bytes, dense_kv_bytes: of the keys and values that a cache in the model's dtype would hold, the same.
        seconds: of the forward passes, as measured; they give all logits, and counting is part of them.
    """

    tokens: list[TokenDepth]
    ids: tuple[int, ...]
    num_layers: int
    window: int
    loss_nats: float | None
    executed_share: float
    flops: float
    dense_flops: float
    kv_bytes: int
    dense_kv_bytes: int
    seconds: float


@torch.no_grad()
def look(
    model: MidskipForCausalLM,
    tokenizer: PreTrainedTokenizerBase | None,
    ids: Sequence[int],
    positions: Sequence[int] | None = None,
) -> Look:
    """Run the model over a text, in windows as long as it takes, none of which overlap.

    The FLOPs of a token are those of the blocks that it ran and of the head. Those of the policy and of skip paths are
    shared evenly among the tokens of a pass. The sum over the tokens is what a `Meter` counts.

    Args:
        tokenizer: without one the text of a token is its id, and no losses and ranks are given: the ids are not what
            is to be predicted.
        positions: of documents in one window, as `position_ids`; only for a text of one window.

    Raises:
        ValueError: no ids.
    """
    if not len(ids):
        raise ValueError("there is no text to look at: give at least one token")
    window = max(len(ids), 1) if positions is not None else model.config.max_position_embeddings
    at_once = max(1, MOST_LOGITS // (window * model.config.vocab_size)) * window
    whole = len(ids) // window * window
    starts = [*range(0, whole, at_once), *([whole] if whole < len(ids) else [])]
    ends = [min(start + at_once, whole) if start < whole else len(ids) for start in starts]
    next_ids = torch.tensor([*ids[1:], IGNORED])
    rows: list[_Rows] = []
    with Meter(model) as meter:
        for start, end in zip(starts, ends, strict=True):
            ids_BT = torch.tensor(ids[start:end]).view(-1, min(window, end - start)).to(model.device)
            position_BT = None if positions is None else torch.tensor([list(positions)], device=model.device)
            rows.append(_run(model, meter, ids_BT, position_BT, next_ids[start:end].to(model.device)))
    texts = [TokenText(f"{token} ") for token in ids] if tokenizer is None else token_texts(tokenizer, ids)
    columns = [[value for one in rows for value in getattr(one, name)] for name in ("gates", "scores", "blocks")]
    flops = [value for one in rows for value in one.flops]
    known = tokenizer is not None
    nats: list[float | None] = [value if known else None for one in rows for value in one.nats]
    ranks: list[int | None] = [value if known else None for one in rows for value in one.ranks]
    nats[-1], ranks[-1] = None, None
    tokens = [
        TokenDepth(text, blocks, loss, gates, part, parts, scores, next_loss, rank, cost)
        for (text, part, parts), gates, scores, blocks, loss, next_loss, rank, cost in zip(
            texts, *columns, [None, *nats[:-1]], nats, ranks, flops, strict=True
        )
    ]
    config, losses = model.config, [loss for loss in nats if loss is not None]
    key_bytes = 2 * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    return Look(
        tokens=tokens, ids=tuple(ids), num_layers=config.num_skip_units, window=window,
        loss_nats=fmean(losses) if losses else None,
        executed_share=fmean(token.blocks for token in tokens) / config.num_skip_units,
        flops=sum(one.total_flops for one in rows), dense_flops=sum(one.dense_flops for one in rows),
        kv_bytes=sum(one.num_keys for one in rows) * key_bytes,
        dense_kv_bytes=len(ids) * config.num_hidden_layers * key_bytes, seconds=sum(one.seconds for one in rows),
    )  # fmt: skip


@dataclass
class _Rows:
    """Of the tokens of one pass, in order."""

    gates: list[tuple[float, ...]]
    scores: list[tuple[float, ...]]
    blocks: list[int]
    nats: list[float]
    ranks: list[int]
    flops: list[float]
    total_flops: float
    dense_flops: float
    num_keys: int
    seconds: float


def _run(
    model: MidskipForCausalLM, meter: Meter, ids_BT: Tensor, position_BT: Tensor | None, target_N: Tensor
) -> _Rows:
    meter.reset()
    _wait(model)
    begin = time.perf_counter()
    output = model(ids_BT, position_ids=position_BT, use_cache=False)
    _wait(model)
    seconds = time.perf_counter() - begin
    logits_NV = output.logits.flatten(0, 1)
    executed_LN = output.executed.flatten(1)
    gates_NL = output.gates.flatten(1).T.tolist()
    own = flops_of_tokens(model.config, meter, executed_LN) + head_flops(model.config, 1).total
    shared = (meter.policy_flops + meter.skip_path_flops) / executed_LN.shape[1]
    return _Rows(
        gates=[tuple(row) for row in gates_NL],
        scores=scores_of_layers(model, output.depth_scores, executed_LN.shape[1]),
        blocks=executed_LN.sum(0).tolist(),
        nats=cross_entropy(logits_NV, target_N).tolist(),
        ranks=ranks_of(logits_NV, target_N).tolist(),
        flops=(own + shared).tolist(),
        total_flops=meter.flops().total,
        dense_flops=meter.dense_flops().total,
        num_keys=sum(meter.cached_rows_L),
        seconds=seconds,
    )


def ranks_of(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    """int64 [N]: 1 where no logit is larger than the target's. One that is no number counts as larger than all."""
    target_N1 = target_N.clamp(min=0)[:, None]
    return (~(logits_NV <= logits_NV.gather(1, target_N1))).sum(1).clamp(max=logits_NV.shape[1] - 1) + 1


def scores_of_layers(
    model: MidskipForCausalLM, depth_scores_GBT: Tensor | None, num_tokens: int
) -> list[tuple[float, ...]]:
    """Of each token its score in each layer, by the gate that the layer goes by; empty where there are none."""
    gates = model.model.policy.gate_of_layer
    if depth_scores_GBT is None or None in gates:
        return [()] * num_tokens
    scores_NG = depth_scores_GBT.flatten(1).T.tolist()
    return [tuple(row[gate] for gate in gates if gate is not None) for row in scores_NG]


def flops_of_tokens(config: MidskipConfig, meter: Meter, executed_LN: Tensor) -> Tensor:
    """float64 [N]: FLOPs of each token of the one pass that was metered, in the blocks alone (causal convention)."""
    parts = PARTS[config.skip_unit]
    num_tokens = executed_LN.shape[1]
    flops_N = torch.zeros(num_tokens, dtype=torch.float64)
    for layer, ran_N in enumerate(executed_LN.cpu()):
        if not meter.layers[layer]:
            continue  # nobody reached it, and it was not called
        part, gated = parts[layer % len(parts)], meter.layers[layer][0].gated
        key_N = torch.ones_like(ran_N) if config.skipped_kv == "keep" else ran_N
        if part == "feed_forward":
            key_N = torch.zeros_like(ran_N)
        pairs_N = torch.cat([keys.cumsum(0) for keys in key_N.split(meter.seqlens)]) * ran_N
        row, key, pair = (
            block_flops(config, LayerWork(*counts, 0, gated, part=part), block=layer // len(parts)).total
            for counts in ((1, 0, 0), (0, 1, 0), (0, 0, 1))
        )
        flops_N += row * ran_N + key * key_N + pair * pairs_N
    return flops_N


def _wait(model: MidskipForCausalLM) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
