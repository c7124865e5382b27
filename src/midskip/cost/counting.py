"""A meter of what a model really ran and read.

D width, L layers, M keys, N queries.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from midskip.cost.flops import Bytes, Flops, LayerWork, block_flops, dense_flops, head_flops
from midskip.model.config import PARTS
from midskip.model.layers import Block
from midskip.model.modeling import MidskipForCausalLM
from midskip.model.skip_path import SkipPath
from midskip.policies import Policy


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
        self._bytes_of = cache(_bytes_of)
        self._hooks = [block.register_forward_hook(self._on_block(layer)) for layer, block in enumerate(body.layers)]
        self._hooks += [
            body.policy.register_forward_hook(self._on_policy),
            *(path.register_forward_hook(self._on_skip_path) for path in body.skip_paths.values()),
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
    def cached_rows_L(self) -> list[int]:
        """Tokens whose key and value a cache of these passes holds in each layer: with `skipped_kv="keep"` all, also
        where nobody runs the layer. Then they are made only if there is a cache, and `key_rows_L` lacks them."""
        if self.config.skipped_kv == "drop":
            return self.key_rows_L
        parts, closed = PARTS[self.config.skip_unit], self.model.model.policy.closed_layers
        units = range(len(self._layers))
        has_keys = [parts[unit % len(parts)] != "feed_forward" and unit not in closed for unit in units]
        return [self.num_tokens * has for has in has_keys]

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
            weights = sum(map(self._bytes_of, read))
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
        others = sum(map(self._bytes_of, (body.embed_layernorm, body.norm)))
        if batch.token_N is not None:  # of pads nothing has to be read
            others += batch.num_tokens * body.embed_tokens.weight[0].nbytes
        self.bytes += Bytes(others + self._bytes_of(policy))
        seen = sum(n + held for n, held in zip(batch.seqlens, past, strict=True) if n) if any(past) else 0
        key_width, device = self.config.num_key_value_heads * self.config.head_dim, h_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h_ND.dtype
        a_token = 2 * key_width * dtype.itemsize * len(body.layers)
        self._dense_bytes += Bytes(others + sum(map(self._bytes_of, body.layers)), seen * a_token)

    def _on_skip_path(self, path: SkipPath, arguments: tuple[Any, ...], output: Tensor) -> None:
        if not is_backward():
            self.skip_path_flops += path.flops * len(output)
            self.bytes += Bytes(self._bytes_of(path) if len(output) else 0)

    def _on_head(self, head: nn.Module, arguments: tuple[Any, ...]) -> None:
        if not is_backward():
            self.head_rows += arguments[0].shape[:-1].numel()
            weights = Bytes(self._bytes_of(head))
            self.bytes, self._dense_bytes = self.bytes + weights, self._dense_bytes + weights


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
