"""What each layer would add to each token, beside what the model really ran.

N packed tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from midskip.model.config import PARTS
from midskip.model.layers import Block
from midskip.model.modeling import MidskipForCausalLM
from midskip.policies import Decision

# layer; h_ND, which enters it; what it adds to every token, [N, D]; bool [N], who runs it in this pass
Seen = Callable[[int, Tensor, Tensor, Tensor | None], None]


class Watch:
    """While it is entered, calls `seen` in each layer of `layers` of each pass in evaluation.

    What a layer adds to a token that skips it is worked out beside the pass, which goes on as if nobody looked: with
    `skipped_kv="keep"` exactly as the token would have run it, with `"drop"` as if all tokens had.
    """

    def __init__(self, model: MidskipForCausalLM, layers: Collection[int], seen: Seen):
        self.model, self.layers, self.seen = model, layers, seen
        self._now: tuple[int, Tensor, Tensor | None] | None = None
        self._hooks: list[Any] = []

    def __enter__(self) -> Watch:
        body = self.model.model
        self._hooks = [body.policy.register_forward_hook(self._on_policy)]
        self._hooks += [block.register_forward_hook(self._on_block) for block in body.layers]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def _on_policy(self, policy: nn.Module, arguments: tuple[Any, ...], decision: Decision) -> None:
        layer, h_ND, _, batch = arguments
        self._now = None
        if layer not in self.layers:
            return
        if batch.keep(decision.keep_N).num_tokens == batch.num_tokens:  # the block is about to work it out
            self._now = layer, h_ND, decision.keep_N
            return
        parts = PARTS[self.model.config.skip_unit]
        block, part = self.model.model.layers[layer // len(parts)], parts[layer % len(parts)]
        assert isinstance(block, Block)
        output_ND = block.forward(h_ND, None, batch, batch, part=part)  # which no hook sees
        self.seen(layer, h_ND, output_ND - h_ND, decision.keep_N)

    def _on_block(self, block: nn.Module, arguments: tuple[Any, ...], output_ND: Tensor) -> None:
        if self._now is not None:
            layer, h_ND, keep_N = self._now
            self.seen(layer, h_ND, output_ND - h_ND, keep_N)
