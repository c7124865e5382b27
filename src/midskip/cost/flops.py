"""What a pass costs: floating-point operations and bytes, worked out from who was present.

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

from torch import Tensor

from midskip.model.config import MidskipConfig, intermediate_sizes
from midskip.model.layer_cache import LayerCache
from midskip.model.packing import PackedBatch
from midskip.names import check_one_of

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
    check_one_of("convention", convention, CONVENTIONS)
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
