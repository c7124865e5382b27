"""What a pass costs: floating-point operations, worked out from who was present, and a meter of what really ran.

A multiply-add is two FLOPs; only matrix products count, as in torch's FlopCounterMode. Two conventions:

- `"causal"`, what we report: attention costs the pairs of query and key that really meet;
- `"counter"`, to compare with FlopCounterMode under the math backend: attention costs the full square of queries and
  keys of each sequence, which that backend computes.

A backward pass costs twice the forward. N queries, M keys, D width, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from midskip.config import MidskipConfig
from midskip.model import MidskipForCausalLM
from midskip.nn.layers import Block
from midskip.nn.layout import Layout
from midskip.policies import Policy

CONVENTIONS = ("causal", "counter")


@dataclass(frozen=True)
class LayerWork:
    """What one layer did in one pass.

    Attributes:
        query_rows: tokens that ran the block.
        key_rows: tokens that made a key and a value.
        causal_pairs: (query, key) with the key at the same or an earlier column.
        square_pairs: all (query, key) of the same sequence.
        gated: whether keys carried a gate, which widens every head by one feature.
    """

    query_rows: int
    key_rows: int
    causal_pairs: int
    square_pairs: int
    gated: bool

    @classmethod
    def of(cls, queries: Layout, keys: Layout, gated: bool) -> LayerWork:
        """The work of a block on these queries and keys."""
        if queries is keys:
            causal = sum(n * (n + 1) // 2 for n in queries.lengths)
        else:  # a key's place in its sequence is how many keys came before it
            starts = torch.tensor([0, *keys.lengths[:-1]]).cumsum(0).repeat_interleave(torch.tensor(queries.lengths))
            rows = torch.arange(keys.num_tokens) if queries.rows_N is None else queries.rows_N.cpu()
            causal = int((rows - starts + 1).sum())
        square = sum(n * m for n, m in zip(queries.lengths, keys.lengths, strict=True))
        return cls(queries.num_tokens, keys.num_tokens, causal, square, gated)


@dataclass(frozen=True)
class Flops:
    """FLOPs by part."""

    projections: int = 0
    attention: int = 0
    mlp: int = 0
    policy: int = 0
    head: int = 0

    @property
    def blocks(self) -> int:
        """All but the head and the policy."""
        return self.projections + self.attention + self.mlp

    @property
    def total(self) -> int:
        return self.blocks + self.policy + self.head

    def __add__(self, other: Flops) -> Flops:
        return Flops(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))

    def __mul__(self, times: int) -> Flops:
        return Flops(*(getattr(self, part.name) * times for part in fields(self)))

    def as_dict(self) -> dict[str, int]:
        return {part.name: getattr(self, part.name) for part in fields(self)} | {"total": self.total}


def block_flops(config: MidskipConfig, work: LayerWork, convention: str = "causal") -> Flops:
    """FLOPs of one block's forward pass."""
    if convention not in CONVENTIONS:
        raise ValueError(f"convention is {convention!r}; expected one of {', '.join(map(repr, CONVENTIONS))}")
    width, heads, key_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    pairs = work.causal_pairs if convention == "causal" else work.square_pairs
    return Flops(
        projections=4 * width * config.head_dim * (work.query_rows * heads + work.key_rows * key_heads),
        attention=4 * pairs * heads * (config.head_dim + work.gated),
        mlp=6 * work.query_rows * width * config.intermediate_size,
    )


def head_flops(config: MidskipConfig, rows: int) -> Flops:
    """FLOPs of the head's forward pass on `rows` tokens."""
    return Flops(head=2 * rows * config.hidden_size * config.vocab_size)


def dense_flops(
    config: MidskipConfig, lengths: Sequence[int], head_rows: int | None = None, convention: str = "causal"
) -> Flops:
    """FLOPs of a forward pass in which nothing is skipped and no key is gated.

    Args:
        lengths: valid tokens of each sequence, or of each document where positions tell several in one row apart.
        head_rows: tokens that the head runs on; all by default.
    """
    causal, square = sum(n * (n + 1) // 2 for n in lengths), sum(n * n for n in lengths)
    work = LayerWork(sum(lengths), sum(lengths), causal, square, gated=False)
    blocks = block_flops(config, work, convention) * config.num_hidden_layers
    return blocks + head_flops(config, sum(lengths) if head_rows is None else head_rows)


class Meter:
    """Counts what the blocks of a model really run, from the tensors that go into them.

        with Meter(model) as meter:
            model(input_ids)
        meter.flops().total

    Forward passes count, and what gradient checkpointing runs again in a backward pass does not.

    Attributes:
        query_rows_L: rows that went through each block.
        layers: for each layer, the `LayerWork` of each of its calls, in order.
        lengths: tokens of each sequence (or document) that entered layer 0.
        num_tokens: their sum.
        head_rows: rows that went through the head.
    """

    def __init__(self, model: MidskipForCausalLM):
        self.model, self.config = model, model.config
        self._hooks: list[Any] = []
        self.reset()

    def reset(self) -> None:
        """Forget what was counted."""
        self.layers: list[list[LayerWork]] = [[] for _ in range(self.config.num_hidden_layers)]
        self.lengths: list[int] = []
        self.policy_flops = self.head_rows = 0

    def __enter__(self) -> Meter:
        body = self.model.model
        self._hooks = [block.register_forward_hook(self._on_block(layer)) for layer, block in enumerate(body.layers)]
        self._hooks += [
            body.policy.register_forward_hook(self._on_policy),
            self.model.lm_head.register_forward_hook(self._on_head),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def query_rows_L(self) -> list[int]:
        return [sum(work.query_rows for work in calls) for calls in self.layers]

    @property
    def executed_share(self) -> float:
        """Share of block-tokens that ran, of valid tokens times layers."""
        return sum(self.query_rows_L) / max(1, self.num_tokens * len(self.layers))

    def flops(self, convention: str = "causal", backward: bool = False) -> Flops:
        """FLOPs of all that was counted, forward alone or forward and backward."""
        total = head_flops(self.config, self.head_rows) + Flops(policy=self.policy_flops)
        for calls in self.layers:
            for work in calls:
                total += block_flops(self.config, work, convention)
        return total * 3 if backward else total

    def dense_flops(self, convention: str = "causal") -> Flops:
        """FLOPs of the same forward passes with nothing skipped and no key gated, the head as it ran."""
        return dense_flops(self.config, self.lengths, self.head_rows, convention)

    def _on_block(self, layer: int) -> Any:
        def count(block: Block, arguments: tuple[Any, ...], output: Tensor) -> None:
            if is_backward():
                return
            x_ND, others_MD, queries, keys, _, key_gate_M = arguments
            work = LayerWork.of(queries, keys, key_gate_M is not None)
            rows = x_ND.shape[0], x_ND.shape[0] if others_MD is None else others_MD.shape[0]
            if rows != (work.query_rows, work.key_rows):
                raise RuntimeError(f"block {layer} ran on {rows} rows and its layouts say {work}")
            self.layers[layer].append(work)

        return count

    def _on_policy(self, policy: Policy, arguments: tuple[Any, ...], output: Any) -> None:
        if is_backward():
            return
        layer, _, state, layout = arguments
        self.lengths += layout.lengths if layer == 0 else []
        self.policy_flops += policy.flops(layer, state, layout)

    def _on_head(self, head: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        self.head_rows += 0 if is_backward() else output.shape[:-1].numel()


def is_backward() -> bool:
    """Whether this runs within a backward pass, as what gradient checkpointing runs again does."""
    return torch._C._current_graph_task_id() != -1
