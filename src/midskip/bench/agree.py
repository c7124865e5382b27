"""Nothing is timed whose results are wrong: every side is held to the reference implementation first, and so is Llama.

Each of our sides is compared twice. Its float64 copy with `reference_forward`: there a wrong gate, key or position has
nowhere to hide. Then the model as it is timed, in its own dtype on its own device, with the same float64 reference, up
to what rounding does. Both without a cache, with one (a prefix, then steps in which it grows), and where training is
timed, in the loss and every gradient (float64). Llama is held to the reference of our model with its weights and norms,
nothing skipped.

Another way to compute attention has gradients of its own: they are compared with the same reference in the dtype that
is timed. What torch.compile made is held to the same in its logits; the float64 copy is not compiled.

The bound on rounding is derived and not tuned. How strongly this model passes errors on is measured: the reference is
taken again with every weight moved at random by a share of itself, which is one rounding of every product. Gradients
are taken a third time, with the result of every operation of the backward pass moved so: those of queries and keys are
differences of numbers that nearly cancel. The larger change counts. A result goes through about 16 roundings a layer
(norms, products, turn, gates, sums), and if a product is summed in its own dtype (half precision is summed in float32),
through one for each term; independent errors add up by squares (Higham and Mary 2019, doi 10.1137/18M1226312).

A learned gate may round to the other side of 0 and moves all that comes after: its sequence is compared up to there.
That is accepted only where the true depth score (a router's readiness to skip) is as close to 1, and the wrong gate, if
it is no hard one, to 0, as rounding explains, by a bound that is derived in the same way.

B sequences, T columns, V vocabulary, L layers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from midskip.bench.models import Side, llama_with_our_equations, placed, positions
from midskip.bench.settings import CHECKED_COLUMNS, CHECKED_ROWS, CHECKED_STEPS
from midskip.model.config import MidskipConfig, intermediate_sizes
from midskip.model.modeling import MidskipForCausalLM
from midskip.testing import ReferenceOutput, reference_forward

ROUNDINGS = 16  # a layer
MOVED = 2.0**-26  # small enough for float64 to be linear, large enough to be seen


class DisagreementError(RuntimeError):
    """A side computes something else than the model's equations; it is not timed."""


@dataclass(frozen=True)
class Agreement:
    """One comparison: the largest difference, of the norm of a token's logits or of a gradient, as a share of it."""

    side: str
    what: str
    dtype: str
    difference: float
    bound: float
    num_tokens: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Reference:
    """What is right, in float64: logits [B, T, V], gates and depth scores [L, B, T] (of routers the readiness to skip,
    of policies that tell neither 1 - gate); and how strongly errors are passed on to logits and to depth scores.

    by_score: gates are 0 or 1, and the score alone says how far a token is from where that changes.
    """

    logits: Tensor
    gates: Tensor
    depth_scores: Tensor
    condition: float
    depth_condition: float
    config: MidskipConfig
    by_score: bool = False


def bound(dtype: torch.dtype, config: MidskipConfig, condition: float) -> float:
    """The largest relative difference that rounding explains.

    Args:
        condition: relative change of the result over that of the weights, moved at random.
    """
    roundings = ROUNDINGS
    if dtype.itemsize >= 4:
        roundings += 6 * config.hidden_size + max(intermediate_sizes(config))  # terms of q, k, v, o, gate, up; down
    return torch.finfo(dtype).eps / 2 * max(1.0, condition) * math.sqrt(roundings)


@torch.no_grad()
def check_ours(side: Side, ids_BT: Tensor, gradients: bool = False) -> list[Agreement]:
    """Hold one of our sides to the reference implementation, on some tokens.

    Raises:
        DisagreementError: they differ by more than rounding.
    """
    ids_BT = ids_BT[:CHECKED_ROWS, :CHECKED_COLUMNS]
    exact = Side(side.name, _exact(side.model), stretch=side.stretch)
    results = [(one, what, run(one, ids_BT)) for one in (exact, side) for what, run in RUNS.items()]
    packed = _gradients(exact.model, lambda: exact.call(ids_BT, labels=ids_BT).loss) if gradients else {}
    position_BT = positions(ids_BT, side.stretch) if side.stretch else None
    with ids_BT.device:  # where the reference implementation makes its tensors
        reference, expected, moved = _reference(exact.model, ids_BT, position_BT, gradients)
    found = [_compare(one, what, got, reference) for one, what, got in results]
    if gradients:
        found.append(_compare_gradients(exact, packed, expected, moved, ids_BT.numel()))
    if gradients and (side.attention != "auto" or ids_BT.is_cuda):
        own = _gradients(side.model, lambda: side.call(ids_BT, labels=ids_BT).loss)
        found.append(_compare_gradients(side, own, expected, moved, ids_BT.numel()))
    return found


@torch.no_grad()
def check_llama(side: Side, config: MidskipConfig, ids_BT: Tensor) -> list[Agreement]:
    """Hold Llama, and ours with Llama's weights and norms, to the reference implementation of that.

    Raises:
        DisagreementError: they differ by more than rounding.
    """
    ids_BT = ids_BT[:CHECKED_ROWS, :CHECKED_COLUMNS]
    ours = Side("ours with Llama's weights", llama_with_our_equations(side.model, config))
    with ids_BT.device:
        reference, *_ = _reference(_exact(ours.model), ids_BT, None, gradients=False)
    return [_compare(one, what, run(one, ids_BT), reference) for one in (side, ours) for what, run in RUNS.items()]


def _exact(model: MidskipForCausalLM) -> MidskipForCausalLM:
    exact = placed(copy.deepcopy(model), torch.float64, str(model.device))
    for block in exact.model.layers:
        block.backend = None  # pyright: ignore[reportAttributeAccessIssue]
    return exact


def _whole(side: Side, ids_BT: Tensor) -> tuple[Tensor, Tensor | None]:
    """Logits [B, T, V] and gates [L, B, T] of one pass."""
    output = side.call(ids_BT, use_cache=False)
    return output.logits, getattr(output, "gates", None)


def _cached(side: Side, ids_BT: Tensor) -> tuple[Tensor, Tensor | None]:
    """The same of the first tokens at once and the others in steps, as decoding runs."""
    cache = side.empty_cache(ids_BT.shape[1])
    outputs = []
    with torch.compiler.set_stance("force_eager"):  # as decoding is timed
        for part_BT in ids_BT.tensor_split(tuple(accumulate(CHECKED_STEPS)), 1):
            if not part_BT.numel():
                break
            outputs.append(side.call(part_BT, cache, use_cache=True))
            cache = outputs[-1].past_key_values
    gates = [output.gates for output in outputs] if side.is_ours else []
    return torch.cat([output.logits for output in outputs], 1), torch.cat(gates, 2) if gates else None


RUNS: dict[str, Callable[[Side, Tensor], tuple[Tensor, Tensor | None]]] = {"whole": _whole, "with its cache": _cached}
Gradients = dict[str, Tensor]


class _EveryResultMoved(TorchDispatchMode):
    """While it is entered, what any operation gives is moved at random by a share of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_view = any(one.alias_info is not None for one in func._schema.returns)
        if is_view or not isinstance(result, Tensor) or not result.is_floating_point():
            return result
        return result * _near_one(result, self.generator)


def _near_one(like: Tensor, generator: torch.Generator) -> Tensor:
    """Random factors that move a tensor like this one by a share of itself, `MOVED` at most."""
    share = torch.rand(like.shape, generator=generator, dtype=torch.float64, device="cpu")
    return (1 + MOVED * (2 * share - 1)).to(like)


def _reference(
    exact: MidskipForCausalLM, ids_BT: Tensor, position_BT: Tensor | None, gradients: bool
) -> tuple[_Reference, Gradients, list[Gradients]]:
    """What is right, with its gradients; and the gradients with the results of the backward pass moved, and those with
    the weights moved, as they are afterwards."""

    def loss() -> Tensor | None:
        return reference_forward(exact, ids_BT, labels=ids_BT, position_ids=position_BT).loss

    right = reference_forward(exact, ids_BT, position_ids=position_BT)
    expected = _gradients(exact, loss) if gradients else {}
    moved = [_gradients(exact, loss, _EveryResultMoved())] if gradients else []
    generator = torch.Generator().manual_seed(0)
    for parameter in exact.parameters():
        parameter.mul_(_near_one(parameter, generator))
    away = reference_forward(exact, ids_BT, position_ids=position_BT)
    depth_scores_LBT, same_BT = _depth_scores(right), _before_a_flip(away.gates, right.gates)
    change, _ = _largest(away.logits, right.logits, same_BT)
    depth_change_LBT = (_depth_scores(away) - depth_scores_LBT).abs() / depth_scores_LBT.clamp(min=1)
    depth_change = depth_change_LBT[:, same_BT].max().item() if same_BT.any() else math.inf
    moved += [_gradients(exact, loss)] if gradients else []
    conditions = change / MOVED, depth_change / MOVED
    is_told = right.depth_scores is not None or right.readiness is not None
    by_score = exact.model.policy.is_hard and is_told
    return _Reference(right.logits, right.gates, depth_scores_LBT, *conditions, exact.config, by_score), expected, moved


def _depth_scores(output: ReferenceOutput) -> Tensor:
    """[L, B, T], of the mirrored layers too."""
    if output.depth_scores is None:
        return 1 - output.gates if output.readiness is None else output.readiness
    num_layers = len(output.gates)
    return output.depth_scores[[min(layer, num_layers - 1 - layer) for layer in range(num_layers)]]


def _before_a_flip(gates_LBT: Tensor, true_gates_LBT: Tensor) -> Tensor:
    """bool [B, T], which tokens come before the first of their sequence that is present where it should not be, or not
    present where it should."""
    return ((gates_LBT > 0) == (true_gates_LBT > 0)).all(0).long().cummin(1).values.bool()


def _largest_flip(gates_LBT: Tensor, reference: _Reference) -> float:
    """How far a token is from where it leaves or comes back, at most, whose gate is on the wrong side of 0. A gate that
    another such gate has moved, of the same token or an earlier one in a layer before, is not looked at."""
    flips_LBT = (gates_LBT > 0) != (reference.gates > 0)
    seen_LBT = flips_LBT.long().cummax(2).values
    first_LBT = flips_LBT & (seen_LBT.cumsum(0) == seen_LBT)
    far_LBT = (reference.depth_scores - 1).abs()
    if not reference.by_score:
        far_LBT = far_LBT.maximum((gates_LBT - reference.gates).abs())
    return far_LBT[first_LBT].max().item() if first_LBT.any() else 0.0


def _largest(got_BTV: Tensor, expected_BTV: Tensor, compared_BT: Tensor | None = None) -> tuple[float, int]:
    """The largest difference of a token as a share of its logits, and how many tokens were compared: by default all."""
    difference_BT = (got_BTV.double() - expected_BTV).norm(dim=-1) / expected_BTV.norm(dim=-1)
    if compared_BT is not None:
        difference_BT = difference_BT[compared_BT]
    return (difference_BT.max().item() if difference_BT.numel() else math.inf), difference_BT.numel()


def _compare(side: Side, what: str, got: tuple[Tensor, Tensor | None], reference: _Reference) -> Agreement:
    logits_BTV, gates_LBT = got
    dtype, compared_BT = logits_BTV.dtype, None
    if gates_LBT is not None and dtype != torch.float64:  # there nothing rounds over
        gates_LBT = gates_LBT.double()
        far, allowed = _largest_flip(gates_LBT, reference), bound(dtype, reference.config, reference.depth_condition)
        found = f"a token is present or not that is {far:.2e} away from where that changes"
        _demand(side, what, dtype, found, far, allowed)
        compared_BT = _before_a_flip(gates_LBT, reference.gates)
    largest, num_tokens = _largest(logits_BTV, reference.logits, compared_BT)
    allowed = bound(dtype, reference.config, reference.condition)
    _demand(side, what, dtype, f"its logits differ by {largest:.2e} of their size", largest, allowed)
    return Agreement(side.name, what, _name(dtype), largest, allowed, num_tokens)


@torch.enable_grad()
def _gradients(
    model: MidskipForCausalLM, loss: Callable[[], Tensor | None], during: AbstractContextManager[Any] | None = None
) -> Gradients:
    """The loss and its gradient with respect to every parameter; `during` is entered for the backward pass."""
    model.train().zero_grad()
    value = loss()
    assert value is not None
    with during or nullcontext():
        value.backward()
    gradients = {"loss": value.detach()}
    gradients |= {
        name: value.new_zeros(()) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }
    model.eval().zero_grad()
    return gradients


def _compare_gradients(
    side: Side, packed: Gradients, expected: Gradients, moved: list[Gradients], num_tokens: int
) -> Agreement:
    """The comparison that comes closest to its bound.

    A gradient that is no larger than what rounding makes of 0 (that of a query which sees one key alone, say) has no
    size that a difference could be a part of. It is compared as a part of the largest gradient.
    """
    found, dtype = [], side.model.dtype
    largest = max((right.norm().item() for right in expected.values()), default=0.0)
    nothing = largest * 2**0.5 * bound(torch.float64, side.model.config, 1.0)
    for name, right in expected.items():
        norm = right.norm().item()
        norm = (largest if norm <= nothing else norm) or 1.0
        difference, *changes = ((got[name].double() - right).norm().item() / norm for got in (packed, *moved))
        # a gradient goes back through the roundings of results that went through as many
        allowed = 2**0.5 * bound(dtype, side.model.config, max(changes) / MOVED)
        what = f"its gradient of {name} differs by {difference:.2e} of its size"
        _demand(side, "training", dtype, what, difference, allowed)
        found.append(Agreement(side.name, f"training, {name}", _name(dtype), difference, allowed, num_tokens))
    return max(found, key=lambda one: one.difference / one.bound)


def _demand(side: Side, what: str, dtype: torch.dtype, found: str, largest: float, allowed: float) -> None:
    if not largest <= allowed < math.inf:  # not a number is no agreement, nor is nothing to compare
        raise DisagreementError(
            f"{side.name} ({what}, {_name(dtype)}) does not compute what it should and is not timed: {found}, and "
            f"rounding explains {allowed:.2e}. This is an error in midskip, or in torch on this machine: please report "
            "it"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
