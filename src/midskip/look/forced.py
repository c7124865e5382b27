"""What one token of a text would gain or lose if it ran more or fewer layers: really run, not estimated.

N packed tokens, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from midskip.cost import Meter
from midskip.look.text import ranks_of
from midskip.model.loss import cross_entropy
from midskip.model.modeling import MidskipForCausalLM
from midskip.policies import Decision


@dataclass(frozen=True)
class Outcome:
    """Of one pass over a window, in which a token was made to run some layers.

    Attributes:
        layers: bool [L], those that it ran.
        next_loss_nats, next_rank: of the prediction that it made; None if it is the last one.
        later_nats: sum of the losses of the predictions that the tokens after it made; they see its keys.
        flops: of the whole pass.
    """

    layers: tuple[bool, ...]
    next_loss_nats: float | None
    next_rank: int | None
    later_nats: float
    flops: int


@torch.no_grad()
def what_if(
    model: MidskipForCausalLM, ids: Sequence[int], column: int, next_id: int | None = None
) -> dict[str, Outcome]:
    """Three passes over the same window, under the limits in force, that differ in what the policy decides about one
    token: `as_it_is`; `everything`, where it runs every layer with gate 1; `one_earlier`, where it also skips the
    last layer that it ran before it left (and that layer's mirror, where layers are mirrored), left out if it ran none.

    Args:
        ids: of the window.
        column: of the token, from 0.
        next_id: what follows the window in the text, if anything does.

    Raises:
        ValueError: a window longer than the model takes, or a column outside it.
    """
    most = model.config.max_position_embeddings
    if not 0 <= column < len(ids) <= most:
        raise ValueError(
            f"column is {column} of a window of {len(ids)} tokens; expected one within it, of at most {most}"
        )
    plain = _pass(model, ids, column, next_id, None)
    num_layers = len(plain.layers)
    found = {"as_it_is": plain, "everything": _pass(model, ids, column, next_id, (True,) * num_layers)}
    earlier = one_earlier(plain.layers, model.model.policy.is_mirrored)
    if earlier is not None:
        found["one_earlier"] = _pass(model, ids, column, next_id, earlier)
    return found


def one_earlier(layers: Sequence[bool], is_mirrored: bool) -> tuple[bool, ...] | None:
    """bool [L]: the layers that are left if a token skips the last one that it ran; where layers are mirrored, the
    innermost and its mirror. None if it ran none."""
    ran = [layer for layer, one in enumerate(layers) if one]
    if not ran:
        return None
    last = len(layers) - 1
    dropped = {ran[-1]}
    if is_mirrored:
        depth = max(min(layer, last - layer) for layer in ran)
        dropped = {depth, last - depth}
    return tuple(one and layer not in dropped for layer, one in enumerate(layers))


def _pass(
    model: MidskipForCausalLM, ids: Sequence[int], column: int, next_id: int | None, layers: tuple[bool, ...] | None
) -> Outcome:
    def change(_: nn.Module, given: tuple[Any, ...], decision: Decision) -> Decision:
        return decision if layers is None else forced(decision, column, given[1], given[0], layers)

    with model.model.policy.register_forward_hook(change), Meter(model) as meter:
        output = model(torch.tensor([list(ids)], device=model.device), use_cache=False)
    known = [*ids[1:], *([] if next_id is None else [next_id])]
    logits_TV, target_T = output.logits[0, : len(known)], torch.tensor(known, device=model.device, dtype=torch.long)
    nats_T, ranks_T = cross_entropy(logits_TV, target_T), ranks_of(logits_TV, target_T)
    has_next = column < len(known)
    return Outcome(
        layers=tuple(output.executed[:, 0, column].tolist()),
        next_loss_nats=nats_T[column].item() if has_next else None,
        next_rank=int(ranks_T[column]) if has_next else None,
        later_nats=nats_T[column + 1 :].double().sum().item(),
        flops=meter.flops().total,
    )


def forced(decision: Decision, row: int, h_ND: Tensor, layer: int, layers: Sequence[bool]) -> Decision:
    """The decision about a layer and these hidden states, changed for the token in one row: it runs if `layers` says
    so, and else does not. Its gate is 1 where it would not have run, or if it now runs all layers. A policy whose
    tokens take one skip path for a span of layers has it taken where the token now leaves."""
    runs, keep_N, gates = layers[layer], decision.keep_N, {}
    if runs and (all(layers) or (keep_N is not None and not keep_N[row])):
        named = {name: getattr(decision, name) for name in ("output_gate_N", "key_gate_N")}
        gates = {name: _put(gate_N, row, 1.0) for name, gate_N in named.items() if gate_N is not None}
    if keep_N is None:
        keep_N = h_ND.new_ones(len(h_ND), dtype=torch.bool)
    path_N = decision.skip_path_N
    if path_N is not None:
        path_N = _put(path_N, row, not runs and (layer == 0 or layers[layer - 1]))
    return replace(decision, keep_N=_put(keep_N, row, runs), skip_path_N=path_N, **gates)


def _put(values_N: Tensor, row: int, value: Any) -> Tensor:
    values_N = values_N.clone()
    values_N[row] = value
    return values_N
