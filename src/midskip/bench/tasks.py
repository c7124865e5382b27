"""What is timed: prefill of a prompt, its matrix products alone, decoding token by token, forward and backward in
training; and the work that each really does. Whole optimizer steps are in `trainer.py`.

B sequences, T columns.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from midskip.bench.models import Side
from midskip.bench.peak import peak_bytes
from midskip.bench.timing import Clock, interleave
from midskip.cost import Meter, dense_flops


@dataclass(frozen=True)
class Work:
    """What a stretch of one side really did: metered for ours, worked out for Llama, which does everything.

    Attributes:
        executed_share: of block-tokens.
        flops: in the convention "causal", forward, or forward and backward.
        rows_by_layer: rows that went through each block.
        causal_pairs: (query, key) that met, in all layers.
        weight_bytes, cache_bytes: that had to be read; None for training.
        kv_used_bytes, kv_allocated_bytes: of the cache at the end; None for training.
    """

    executed_share: float
    flops: int
    rows_by_layer: list[int]
    causal_pairs: int
    weight_bytes: int | None = None
    cache_bytes: int | None = None
    kv_used_bytes: int | None = None
    kv_allocated_bytes: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Task:
    """A kind of work on given tokens.

    Args:
        ids_BT: int64, all tokens that go in.
        num_steps: timed steps of a stretch.

    Attributes:
        name: as reported.
        unit: what energy is told for one of.
        trains: whether gradients are taken.
        waits: whether the device is waited for before each step.
        compiles: whether torch.compile may take the models; steps over a growing cache would be compiled again and
            again.
    """

    name = unit = ""
    trains = False
    waits = compiles = True

    def __init__(self, ids_BT: Tensor, num_steps: int = 1):
        self.ids_BT, self.num_steps = ids_BT, num_steps
        self.batch_size, self.num_columns = ids_BT.shape

    @property
    def num_units(self) -> int:
        """Units in a stretch."""
        return self.batch_size * self.num_steps

    def is_for(self, side: Side) -> bool:
        """Whether this side is timed: a static cache is for decoding."""
        return not side.static

    def begin(self, side: Side) -> Callable[[int], Any]:
        """Make ready; what is returned takes step number 0, 1, ... and gives what must live until it is over."""
        raise NotImplementedError

    def time(
        self, sides: Sequence[Side], repeats: int, order: random.Random, device: str, tick: Callable[[], None]
    ) -> dict[str, list[list[float]]]:
        """Seconds of each step of each side, [repeats][num_steps], taken in turns."""
        begin = {side.name: lambda side=side: self.begin(side) for side in sides}
        return interleave(begin, self.num_steps, repeats, order, Clock(device, self.waits), tick)

    def peak_bytes(self, side: Side, device: str) -> int | None:
        """The most memory that a step takes above weights and gradients; None but in training."""
        return None

    def work(self, side: Side) -> Work:
        """Of a whole stretch."""
        raise NotImplementedError

    def _metered(self, side: Side, run: Callable[[], Any]) -> Work:
        with Meter(side.model) as meter:
            cache = run()
        works = [work for calls in meter.layers for work in calls]
        size = None if cache is None else cache.num_bytes()
        return Work(
            executed_share=meter.executed_share,
            flops=meter.flops(backward=self.trains).total,
            rows_by_layer=meter.query_rows_L,
            causal_pairs=sum(work.causal_pairs for work in works),
            weight_bytes=None if cache is None else meter.bytes.weights,
            cache_bytes=None if cache is None else meter.bytes.cache,
            kv_used_bytes=size and size.used,
            kv_allocated_bytes=size and size.allocated,
        )

    def _dense(self, side: Side, before: int, after: int, head_rows: int, num_passes: int) -> Work:
        """Llama's, going from `before` to `after` columns of each sequence in so many passes."""
        config, rows = side.model.config, self.batch_size * (after - before)
        begun, ended = ([columns] * self.batch_size for columns in (before, after))
        flops = dense_flops(config, ended, head_rows) + dense_flops(config, begun, 0) * -1
        pairs = self.batch_size * (after * (after + 1) - before * (before + 1)) // 2
        item_bytes = side.model.dtype.itemsize
        token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * item_bytes
        if self.trains:
            return Work(1.0, (flops * 3).total, [rows] * config.num_hidden_layers, pairs * config.num_hidden_layers)
        body = side.model.model
        modules = *body.layers, body.norm, side.model.lm_head
        weight_bytes = sum(parameter.nbytes for module in modules for parameter in module.parameters())
        used = token_bytes * self.batch_size * after
        return Work(
            executed_share=1.0,
            flops=flops.total,
            rows_by_layer=[rows] * config.num_hidden_layers,
            causal_pairs=pairs * config.num_hidden_layers,
            weight_bytes=num_passes * weight_bytes + rows * config.hidden_size * item_bytes,  # and the rows embedded
            cache_bytes=token_bytes * pairs if before else 0,
            kv_used_bytes=used,
            kv_allocated_bytes=used,
        )


class Prefill(Task):
    """A prompt through the model into a new cache, with the logits of its last token: the time to the first token."""

    name, unit = "prefill", "prompt"

    def begin(self, side: Side) -> Callable[[int], Any]:
        side.model.eval()
        return lambda step: side.call(self.ids_BT, use_cache=True, logits_to_keep=1)

    def work(self, side: Side) -> Work:
        if side.is_ours:
            return self._metered(side, lambda: self.begin(side)(0).past_key_values)
        return self._dense(side, 0, self.num_columns, self.batch_size, 1)


class Products(Prefill):
    """Nothing but the matrix products with weights of a prefill, each with as many rows as it really takes: what
    skipping cannot go below with this library on this machine."""

    name = "products"

    def __init__(self, ids_BT: Tensor):
        super().__init__(ids_BT)
        self._products: dict[str, list[tuple[Tensor, int]]] = {}  # of each side: weight, and how many rows it took

    def is_for(self, side: Side) -> bool:
        return super().is_for(side) and side.attention == "auto"

    def begin(self, side: Side) -> Callable[[int], Any]:
        products, model = self._of(side), side.model
        inputs = {
            size: torch.randn(size, dtype=model.dtype, device=model.device)
            for size in {(rows, weight.shape[1]) for weight, rows in products}
        }
        return lambda step: [F.linear(inputs[rows, weight.shape[1]], weight) for weight, rows in products][-1]

    def work(self, side: Side) -> Work:
        flops = sum(2 * rows * weight.numel() for weight, rows in self._of(side))
        return replace(Prefill(self.ids_BT).work(side), flops=flops, causal_pairs=0)

    def _of(self, side: Side) -> list[tuple[Tensor, int]]:
        """Read off a prefill, once: attention and feed-forward may have other rows, and keys others than queries."""
        if side.name not in self._products:
            with torch.compiler.set_stance("force_eager"), _LinearCalls() as found:
                super().begin(side)(0)
            self._products[side.name] = found.products
        return self._products[side.name]


class _LinearCalls(TorchFunctionMode):
    """Notes each call of `F.linear` while it is entered: its weight, and how many rows it took."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[Tensor, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            rows_ND, weight = args[:2]
            if rows := rows_ND.numel() // weight.shape[1]:
                self.products.append((weight, rows))
        return func(*args, **(kwargs or {}))


class Decode(Task):
    """Token by token after a context; the tokens are given, so that all sides see the same."""

    name, unit = "decode", "token"
    compiles = False

    def __init__(self, ids_BT: Tensor, num_steps: int):
        super().__init__(ids_BT, num_steps)
        self.num_context = self.num_columns - num_steps
        self._prefilled: dict[str, Any] = {}

    def is_for(self, side: Side) -> bool:
        return side.attention == "auto"  # against a cache there is no other

    def begin(self, side: Side) -> Callable[[int], Any]:
        side.model.eval()
        if side.name not in self._prefilled:
            self._prefilled[side.name] = side.prefilled(self.ids_BT[:, : self.num_context], self.num_columns)
        cache = copy.deepcopy(self._prefilled[side.name])
        return lambda step: self._step(side, cache, step)

    def _step(self, side: Side, cache: Any, step: int) -> Any:
        column = self.num_context + step
        return side.step(self.ids_BT[:, column : column + 1], cache)

    def work(self, side: Side) -> Work:
        if side.is_ours:
            step = self.begin(side)
            return self._metered(side, lambda: [step(n) for n in range(self.num_steps)][-1].past_key_values)
        return self._dense(side, self.num_context, self.num_columns, self.batch_size * self.num_steps, self.num_steps)


class Training(Task):
    """Forward and backward of a batch; the optimizer's step, the same for all sides, is left out."""

    name, unit = "training", "step"
    trains, waits = True, False

    @property
    def num_units(self) -> int:
        return 1

    def begin(self, side: Side) -> Callable[[int], Any]:
        side.model.train()
        return lambda step: self._step(side)

    def _step(self, side: Side) -> None:
        unread = {"output_logits": False} if side.is_ours else {}  # as our trainer asks; Llama has no such way
        side.call(self.ids_BT, labels=self.ids_BT, use_cache=False, **unread).loss.backward()
        side.model.zero_grad()

    def peak_bytes(self, side: Side, device: str) -> int | None:
        for parameter in side.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        step = self.begin(side)
        return peak_bytes(lambda: step(0), device)

    def work(self, side: Side) -> Work:
        if side.is_ours:
            return self._metered(side, lambda: Training.begin(self, side)(0))
        return self._dense(side, 0, self.num_columns, self.batch_size * self.num_columns, 1)
