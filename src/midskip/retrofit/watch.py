"""What each layer would add to each token, beside what the model really ran.

N packed tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from midskip.model.layers import Block
from midskip.model.modeling import MidskipForCausalLM
from midskip.model.packing import PackedBatch
from midskip.policies import Decision

# layer; h_ND, which enters it; what it adds to every token, [N, D]; bool [N], who runs it in this pass
Seen = Callable[[int, Tensor, Tensor, Tensor | None], None]


class Watch:
    """While it is entered, calls `seen` in each layer of `layers` of each pass in evaluation.

    What a layer adds to a token that skips it is worked out beside the pass, which goes on as if nobody looked: with
    `skipped_kv="keep"` exactly as the token would have run it, with `"drop"` as if all tokens had.
    """

    def __init__(self, model: MidskipForCausalLM, layers: range, seen: Seen):
        self.model, self.layers, self.seen = model, layers, seen
        self._now: tuple[int, Tensor, PackedBatch, Decision] | None = None
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
        self._now = layer, h_ND, batch, decision

    def _on_block(self, block: Block, arguments: tuple[Any, ...], output_ND: Tensor) -> None:
        assert self._now is not None
        layer, h_ND, batch, decision = self._now
        if layer not in self.layers:
            return
        x_ND, part = arguments[0], arguments[-1]
        if len(x_ND) < batch.num_tokens:  # `forward`, which no hook sees
            output_ND = block.forward(h_ND, None, batch, batch, part=part)
        self.seen(layer, h_ND, output_ND - h_ND, decision.keep_N)
