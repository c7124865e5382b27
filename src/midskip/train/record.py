"""What is known of one optimizer step: over all its forward passes, and all ranks.

B sequences, T columns, N tokens, D width, L layers; 3 is (count, sum, sum of squares).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from midskip.cost import Meter, is_backward
from midskip.distributed import sum_over_ranks
from midskip.layer_statistics import LayerStatistics
from midskip.model.modeling import MidskipForCausalLM


class StepRecord:
    """Adds up on the device, without waiting for it, and comes to the host once a step, in `reduce`. Where a batch runs
    several times, under different scales of the scores, the last of these passes is what is looked at; a `Profiler`
    looks at all of them.

    Attributes, after `reduce`:
        cross_entropy, regularizer, auxiliary: means over the passes of all ranks; the last is the policy's own loss.
        statistics: of the gates by layer; with a `Profiler` that looks at norms, also of those.
        num_tokens: valid tokens.
        flops: executed in all passes, forward and backward; 0 without a `Profiler`.
    """

    def __init__(self) -> None:
        self.statistics = LayerStatistics()
        self._losses: list[Tensor] = []
        self.cross_entropy = self.regularizer = self.auxiliary = math.nan
        self.num_tokens = 0
        self.flops = 0.0

    def add(
        self, cross_entropy: Tensor, regularizer: Tensor, auxiliary: Tensor, gates_LBT: Tensor, executed_LBT: Tensor,
        valid_BT: Tensor | None,
    ) -> None:  # fmt: skip
        """Counts in one forward pass."""
        self._losses.append(torch.stack([cross_entropy.detach(), regularizer.detach(), auxiliary.detach()]).double())
        self.statistics.add("gate", gates_LBT, valid_BT)
        self.statistics.add("executed", executed_LBT, valid_BT)

    def reduce(self) -> None:
        """Sum over passes and ranks, in one exchange; called by all ranks."""
        sums = self.statistics.sums()
        device = self._losses[0].device
        parts = [torch.stack(self._losses).sum(0), torch.tensor([len(self._losses), self.flops], device=device)]
        flat = torch.cat([part.double().to(device).flatten() for part in (*parts, *sums.values())])
        sum_over_ranks(flat)
        *losses, num_passes, self.flops = flat[:5].tolist()
        self.cross_entropy, self.regularizer, self.auxiliary = (loss / num_passes for loss in losses)
        self.statistics = LayerStatistics()
        rest = flat[5:].cpu()
        for name, sums_3L in sums.items():
            part, rest = rest[: sums_3L.numel()], rest[sums_3L.numel() :]
            self.statistics.add_sums({name: part.view(sums_3L.shape)})
        self.num_tokens = int(self.statistics.sums()["gate"][0, 0])

    def share_by_layer(self) -> Tensor:
        """Share of the valid tokens that ran, float64 [L]."""
        return self.statistics.mean("executed")


class Profiler:
    """Looks into the blocks: FLOPs of every step, and in some steps the norms of the hidden states that go into the
    blocks and come out.

    Used as a context around the passes of one step; `update` then adds what was seen to that step's record.

    Attributes:
        norms: whether the next step's norms are looked at.
    """

    def __init__(self, model: MidskipForCausalLM):
        self.meter = Meter(model)
        self.layers = model.model.layers
        self.norms = False
        self._hooks: list[Any] = []

    def __enter__(self) -> Profiler:
        self.meter.reset()
        self.meter.__enter__()
        self._sums_2L: list[list[list[Tensor]]] = [[[] for _ in self.layers] for _ in range(2)]
        if self.norms:
            blocks = enumerate(self.layers)
            self._hooks = [block.register_forward_hook(self._on_block(layer)) for layer, block in blocks]
        return self

    def __exit__(self, *error: Any) -> None:
        self.meter.__exit__(None, None, None)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def update(self, record: StepRecord) -> None:
        """Add what was seen to the record, before its `reduce`."""
        record.flops = float(self.meter.flops(backward=True).total)
        if not self.norms:
            return
        for name, sums_L in zip(("norm_in", "norm_out"), self._sums_2L, strict=True):
            sums_3L = torch.stack([torch.stack(passes).sum(0) for passes in sums_L], 1)
            record.statistics.add_sums({name: sums_3L})

    def _on_block(self, layer: int) -> Any:
        @torch.no_grad()
        def look(block: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            if is_backward():
                return
            part, (sums_in_L, sums_out_L) = arguments[-1], self._sums_2L
            if part != "feed_forward":  # where sublayers skip apart the block is called for each: attention first,
                sums_in_L[layer].append(_sums_of_norms(arguments[0]))
            if part != "attention":  # and feed-forward last
                sums_out_L[layer].append(_sums_of_norms(output))

        return look


def _sums_of_norms(h_ND: Tensor) -> Tensor:
    """float64 [3], over the N tokens."""
    norm_N = torch.linalg.vector_norm(h_ND.detach(), dim=-1, dtype=torch.float32).double()
    return torch.stack([norm_N.new_tensor(float(norm_N.numel())), norm_N.sum(), norm_N.square().sum()])
