"""What each layer, or span of layers, would add to each token, beside what the model really ran.

N packed tokens, M of them that have not left before a layer, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from midskip.budget.monitor import temporary_limits
from midskip.model.config import PARTS
from midskip.model.layers import Block
from midskip.model.modeling import MidskipForCausalLM
from midskip.policies import Decision

# layer; h_MD, which enters it; what is to be added to each of these tokens, [M, D]; bool [M], who takes the skip path
# of the layer in this pass, or None for nobody
Seen = Callable[[int, Tensor, Tensor, Tensor | None], None]


def look(model: MidskipForCausalLM, given: dict[str, Tensor], layers: Collection[int], seen: Seen) -> None:
    """A pass over a batch, which calls `seen` in each layer of `layers`.

    Where a skip path stands for its layer alone, what the layer adds to a token that skips it is worked out beside the
    pass: with `skipped_kv="keep"` exactly as the token would have run it, with `"drop"` as if all tokens had. Where it
    stands for a span, what is to be added is what leads from the token's state to the one that it has behind the span
    if every token runs every layer.
    """
    policy = model.model.policy
    if all(policy.skip_path_end(layer) == layer + 1 for layer in layers):
        with _layers_seen(model, layers, seen):
            model.model(**given, use_cache=False)
        return
    whole: list[Tensor] = []
    with temporary_limits(model, score_scale=0.0), _states_seen(model, lambda layer, h_ND, _: whole.append(h_ND)):
        model.model(**given, use_cache=False)

    def in_pass(layer: int, h_ND: Tensor, decision: Decision | None) -> None:
        if layer not in layers or decision is None:
            return
        added_ND = whole[policy.skip_path_end(layer)] - h_ND
        if decision.keep_N is None or decision.skip_path_N is None:
            seen(layer, h_ND, added_ND, None)
        else:
            present_N = decision.keep_N | decision.skip_path_N
            seen(layer, h_ND[present_N], added_ND[present_N], decision.skip_path_N[present_N])

    with _states_seen(model, in_pass):
        model.model(**given, use_cache=False)


@contextmanager
def _states_seen(model: MidskipForCausalLM, seen: Callable[[int, Tensor, Decision | None], None]) -> Iterator[None]:
    """Calls `seen` with the hidden states that enter each layer and its decision; at last with those that leave."""
    policy, norm = model.model.policy, model.model.norm
    with (
        policy.register_forward_hook(lambda _, given, decision: seen(given[0], given[1], decision)),
        norm.register_forward_pre_hook(lambda _, given: seen(policy.num_layers, given[0], None)),
    ):
        yield


@contextmanager
def _layers_seen(model: MidskipForCausalLM, layers: Collection[int], seen: Seen) -> Iterator[None]:
    body, parts = model.model, PARTS[model.config.skip_unit]
    running: list[tuple[int, Tensor]] = []  # a layer that all tokens are about to run

    def on_policy(policy: nn.Module, given: tuple[Any, ...], decision: Decision) -> None:
        layer, h_ND, _, batch = given
        running.clear()
        if layer not in layers:
            return
        if batch.keep(decision.keep_N).num_tokens == batch.num_tokens:
            running.append((layer, h_ND))
            return
        block, part = body.layers[layer // len(parts)], parts[layer % len(parts)]
        assert isinstance(block, Block) and decision.keep_N is not None
        output_ND = block.forward(h_ND, None, batch, batch, part=part)  # which no hook sees
        seen(layer, h_ND, output_ND - h_ND, ~decision.keep_N)

    def on_block(block: nn.Module, given: tuple[Any, ...], output_ND: Tensor) -> None:
        for layer, h_ND in running:
            seen(layer, h_ND, output_ND - h_ND, None)

    with ExitStack() as hooks:
        hooks.enter_context(body.policy.register_forward_hook(on_policy))
        for block in body.layers:
            hooks.enter_context(block.register_forward_hook(on_block))
        yield
