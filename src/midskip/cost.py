"""What a pass costs: floating-point operations, worked out from who was present, and a meter of what really ran.

A multiply-add is two FLOPs; only matrix products count, as in torch's FlopCounterMode. Two conventions:

- `"causal"`, what we report: attention costs the pairs of query and key that really meet;
- `"counter"`, to compare with FlopCounterMode under the math backend: attention costs the full square of queries and
  keys of each sequence, which that backend computes.

A backward pass costs twice the forward. Bytes are those of weights and of a cache that a pass has to read once.

N queries, M keys, D width, L layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from midskip.model.config import PARTS, MidskipConfig, intermediate_sizes
from midskip.model.layer_cache import LayerCache
from midskip.model.layers import Block
from midskip.model.modeling import MidskipForCausalLM
from midskip.model.packing import PackedBatch
from midskip.model.skip_path import SkipPath
from midskip.policies import Policy

CONVENTIONS = ("causal", "counter")


@dataclass(frozen=True)
class LayerWork:
    """What one layer did in one pass.

    Attributes:
        query_rows: tokens that ran the block.
        key_rows: tokens that made a key and a value.
        causal_pairs: (query, key) with the key at the same or an earlier column, new or in a cache.
        square_pairs: all (query, key) of the same sequence.
        gated: whether keys carried a gate as one more feature of every head.
        cache_tokens: tokens whose keys and values were read from a cache, those just added to it included.
        part: what ran of the block: `"block"`, all of it, `"attention"` or `"feed_forward"`.
    """

    query_rows: int
    key_rows: int
    causal_pairs: int
    square_pairs: int
    gated: bool
    cache_tokens: int = 0
    part: str = "block"

    @classmethod
    def of(cls, queries: PackedBatch, keys: PackedBatch, gated: bool, past: LayerCache | None = None) -> LayerWork:
        """The work of a block on these queries and keys, the latter just added to `past`, if that is given. Waits for
        the device where queries are some of the keys."""
        work, index_sum = cls.without_waiting(queries, keys, gated, past)
        return work if index_sum is None else work.with_index_sum(int(index_sum))

    @classmethod
    def without_waiting(
        cls, queries: PackedBatch, keys: PackedBatch, gated: bool, past: LayerCache | None = None
    ) -> tuple[LayerWork, Tensor | None]:
        """The same in two parts: where queries are some of the keys, `causal_pairs` lacks the sum of their indices
        among the keys, which is the tensor, int64 []."""
        index_sum = None
        if queries is keys or queries.indices_N is None:
            causal = sum(n * (n + 1) // 2 for n in queries.seqlens)
        else:  # a key's place in its sequence is how many keys came before it
            index_sum = queries.indices_N.sum()
            starts = itertools.accumulate(keys.seqlens, initial=0)
            causal = sum(n * (1 - start) for n, start in zip(queries.seqlens, starts))
        seen = past.seqlens if past is not None and past.seqlens else keys.seqlens
        earlier = sum(n * (all_ - m) for n, m, all_ in zip(queries.seqlens, keys.seqlens, seen, strict=True))
        square = sum(n * m for n, m in zip(queries.seqlens, seen, strict=True))
        goes_on = sum(seen) > sum(keys.seqlens)
        read = sum(m for n, m in zip(queries.seqlens, seen, strict=True) if n) if goes_on else 0
        work = cls(queries.num_tokens, keys.num_tokens, causal + earlier, square, gated and not goes_on, read)
        return work, index_sum

    def with_index_sum(self, index_sum: int) -> LayerWork:
        """Whole, of the first part that `without_waiting` gives."""
        return replace(self, causal_pairs=self.causal_pairs + index_sum)


@dataclass(frozen=True)
class Flops:
    """FLOPs by part."""

    projections: int = 0
    attention: int = 0
    mlp: int = 0
    skip_paths: int = 0
    policy: int = 0
    head: int = 0

    @property
    def blocks(self) -> int:
        """All but the head and the policy: what stands for a skipped layer is counted too."""
        return self.projections + self.attention + self.mlp + self.skip_paths

    @property
    def total(self) -> int:
        return self.blocks + self.policy + self.head

    def __add__(self, other: Flops) -> Flops:
        return Flops(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))

    def __mul__(self, times: int) -> Flops:
        return Flops(*(getattr(self, part.name) * times for part in fields(self)))

    def as_dict(self) -> dict[str, int]:
        return {part.name: getattr(self, part.name) for part in fields(self)} | {"total": self.total}


@dataclass(frozen=True)
class Bytes:
    """Bytes that have to be read.

    Attributes:
        weights: of what ran, once a pass: blocks, embeddings of the tokens, norms, policy and head.
        cache: keys, values and gates that a cache held of the sequences that asked.
    """

    weights: int = 0
    cache: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.cache

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(self.weights + other.weights, self.cache + other.cache)


def block_flops(config: MidskipConfig, work: LayerWork, convention: str = "causal", block: int = 0) -> Flops:
    """FLOPs of a block's forward pass; `block` is its number, for its `intermediate_size`."""
    if convention not in CONVENTIONS:
        raise ValueError(f"convention is {convention!r}; expected one of {', '.join(map(repr, CONVENTIONS))}")
    width, heads, key_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    pairs = work.causal_pairs if convention == "causal" else work.square_pairs
    mlp = Flops(mlp=6 * work.query_rows * width * intermediate_sizes(config)[block])
    if work.part == "feed_forward":
        return mlp
    attention = Flops(
        projections=4 * width * config.head_dim * (work.query_rows * heads + work.key_rows * key_heads),
        attention=4 * pairs * heads * (config.head_dim + work.gated),
    )
    return attention if work.part == "attention" else attention + mlp


def head_flops(config: MidskipConfig, rows: int) -> Flops:
    """FLOPs of the head's forward pass on `rows` tokens."""
    return Flops(head=2 * rows * config.hidden_size * config.vocab_size)


def dense_flops(
    config: MidskipConfig, seqlens: Sequence[int], head_rows: int | None = None, convention: str = "causal",
    past_seqlens: Sequence[int] | None = None,
) -> Flops:  # fmt: skip
    """FLOPs of a forward pass in which nothing is skipped and no key is gated.

    Args:
        seqlens: valid tokens of each sequence, or of each document where positions tell several in one row apart.
        head_rows: tokens that the head runs on; all by default.
        past_seqlens: tokens of each sequence that a cache holds; none by default.
    """
    held = sum(n * past for n, past in zip(seqlens, past_seqlens, strict=True)) if past_seqlens else 0
    causal, square = held + sum(n * (n + 1) // 2 for n in seqlens), held + sum(n * n for n in seqlens)
    work = LayerWork(sum(seqlens), sum(seqlens), causal, square, gated=False)
    blocks = (block_flops(config, work, convention, block) for block in range(config.num_hidden_layers))
    return sum(blocks, Flops()) + head_flops(config, sum(seqlens) if head_rows is None else head_rows)


class Meter:
    """Counts what a model really runs and reads, from the tensors that go into its blocks; made by `meter`.

    Forward passes count, and what gradient checkpointing runs again in a backward pass does not.

    Attributes:
        query_rows_L: rows that went through each block, or, if tokens skip sublayers, through each of those.
        layers: for each layer, or sublayer, the `LayerWork` of each of its calls, in order.
        seqlens, past_seqlens: tokens of each sequence (or document) that entered layer 0, and of those before them in a
            cache.
        num_tokens: the sum of `seqlens`.
        head_rows: rows that went through the head.
        bytes: `Bytes` read.
    """

    def __init__(self, model: MidskipForCausalLM):
        self.model, self.config = model, model.config
        self._hooks: list[Any] = []
        self.reset()

    def reset(self) -> None:
        """Forget what was counted."""
        self._layers: list[list[LayerWork]] = [[] for _ in range(self.config.num_skip_units)]
        self._index_sums: list[tuple[int, int, Tensor]] = []  # layer, call, and what its work still lacks
        self.seqlens: list[int] = []
        self.past_seqlens: list[int] = []
        self.policy_flops = self.skip_path_flops = self.head_rows = 0
        self.bytes, self._dense_bytes = Bytes(), Bytes()

    def __enter__(self) -> Meter:
        body = self.model.model
        self._hooks = [block.register_forward_hook(self._on_block(layer)) for layer, block in enumerate(body.layers)]
        self._hooks += [
            body.policy.register_forward_hook(self._on_policy),
            *(path.register_forward_hook(self._on_skip_path) for path in body.skip_paths.values()),
            body.embed_tokens.register_forward_hook(self._on_embedding),
            self.model.lm_head.register_forward_pre_hook(self._on_head),  # so that it cannot hold the logits
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    @property
    def layers(self) -> list[list[LayerWork]]:
        if self._index_sums:  # looked at now, all at once, and not while the passes ran
            sums = torch.stack([index_sum for _, _, index_sum in self._index_sums]).tolist()
            for (layer, call, _), index_sum in zip(self._index_sums, sums, strict=True):
                self._layers[layer][call] = self._layers[layer][call].with_index_sum(index_sum)
            self._index_sums = []
        return self._layers

    @property
    def num_tokens(self) -> int:
        return sum(self.seqlens)

    @property
    def query_rows_L(self) -> list[int]:
        return [sum(work.query_rows for work in calls) for calls in self._layers]

    @property
    def key_rows_L(self) -> list[int]:
        """Tokens that made a key and a value in each layer."""
        return [sum(work.key_rows for work in calls) for calls in self._layers]

    @property
    def executed_share(self) -> float:
        """Share of block-tokens that ran, of valid tokens times layers."""
        return sum(self.query_rows_L) / max(1, self.num_tokens * len(self._layers))

    def flops(self, convention: str = "causal", backward: bool = False) -> Flops:
        """FLOPs of all that was counted, forward alone or forward and backward."""
        total = Flops(policy=self.policy_flops, skip_paths=self.skip_path_flops)
        total += head_flops(self.config, self.head_rows)
        for unit, calls in enumerate(self.layers):
            for work in calls:
                total += block_flops(self.config, work, convention, unit // len(PARTS[self.config.skip_unit]))
        return total * 3 if backward else total

    def dense_flops(self, convention: str = "causal") -> Flops:
        """FLOPs of the same forward passes with nothing skipped and no key gated, the head as it ran."""
        return dense_flops(self.config, self.seqlens, self.head_rows, convention, self.past_seqlens)

    def dense_bytes(self) -> Bytes:
        """Bytes that the same forward passes would read with nothing skipped and no key gated."""
        return self._dense_bytes

    def _on_block(self, layer: int) -> Any:
        parts = PARTS[self.config.skip_unit]

        def count(block: Block, arguments: tuple[Any, ...], output: Tensor) -> None:
            if is_backward():
                return
            x_ND, others_MD, queries, keys, _, key_gate_M, past, part = arguments
            if part == "feed_forward":
                work, index_sum = LayerWork(queries.num_tokens, 0, 0, 0, gated=False, part=part), None
            else:
                work, index_sum = LayerWork.without_waiting(queries, keys, key_gate_M is not None, past)
                work = replace(work, part=part)
            key_rows = 0 if part == "feed_forward" else len(x_ND if others_MD is None else others_MD)
            if (rows := (len(x_ND), key_rows)) != (work.query_rows, work.key_rows):
                raise RuntimeError(f"block {layer} ran on {rows} rows and its packed batches say {work}")
            unit = layer * len(parts) + parts.index(part)
            if index_sum is not None:
                self._index_sums.append((unit, len(self._layers[unit]), index_sum))
            self._layers[unit].append(work)
            read = block.modules_of(part) if work.query_rows else block.modules_of("keys") if work.key_rows else ()
            weights = sum(map(_bytes_of, read))
            # what a cache notes of columns is for cropping, and is not read
            token_bytes = past.token_bytes - past.columns.element_size() if past and work.cache_tokens else 0
            self.bytes += Bytes(weights, work.cache_tokens * token_bytes)

        return count

    def _on_policy(self, policy: Policy, arguments: tuple[Any, ...], output: Any) -> None:
        if is_backward():
            return
        layer, h_ND, state, batch = arguments
        self.policy_flops += policy.flops(layer, state, batch)
        if layer:
            return
        past = batch.past_seqlens or [0] * len(batch.seqlens)
        self.seqlens += batch.seqlens
        self.past_seqlens += past
        body = self.model.model
        others = sum(map(_bytes_of, (body.embed_layernorm, body.norm)))
        self.bytes += Bytes(others + _bytes_of(policy))
        seen = sum(n + held for n, held in zip(batch.seqlens, past, strict=True) if n) if any(past) else 0
        key_width, device = self.config.num_key_value_heads * self.config.head_dim, h_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h_ND.dtype
        a_token = 2 * key_width * dtype.itemsize * len(body.layers)
        self._dense_bytes += Bytes(others + sum(map(_bytes_of, body.layers)), seen * a_token)

    def _on_skip_path(self, path: SkipPath, arguments: tuple[Any, ...], output: Tensor) -> None:
        if not is_backward():
            self.skip_path_flops += path.flops * len(output)
            self.bytes += Bytes(_bytes_of(path) if len(output) else 0)

    def _on_embedding(self, embedding: nn.Embedding, arguments: tuple[Any, ...], output: Tensor) -> None:
        self._both(0 if is_backward() else output.numel() * embedding.weight.element_size())

    def _on_head(self, head: nn.Module, arguments: tuple[Any, ...]) -> None:
        if not is_backward():
            self.head_rows += arguments[0].shape[:-1].numel()
            self._both(_bytes_of(head))

    def _both(self, weights: int) -> None:
        self.bytes += Bytes(weights)
        self._dense_bytes += Bytes(weights)


def meter(model: MidskipForCausalLM) -> Meter:
    """A meter of what `model` really runs and reads.

    with midskip.meter(model) as work:
        model.generate(input_ids)
    work.executed_share, work.flops().total, work.bytes.total
    """
    return Meter(model)


def _bytes_of(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def is_backward() -> bool:
    """Whether this runs within a backward pass, as what gradient checkpointing runs again does."""
    return torch._C._current_graph_task_id() != -1
