"""Nothing is timed whose results are wrong: every side is held to the plain twin first, and so is Llama.

Each of our sides is compared twice. Its float64 copy with `naive_forward`: there a wrong gate, key or position has
nowhere to hide. Then the model as it is timed, in its own dtype on its own device, with the same float64 truth, up to
what rounding does. Both without a cache, with one (a prefix, then token by token), and where training is timed, in the
loss and every gradient (float64). Llama is held to the truth of our model with its weights and norms, nothing skipped.

The bound on rounding is derived and not tuned. How strongly this model passes errors on is measured: the truth is
taken again with every weight moved at random by a share of itself, which is one rounding of every product. A result
goes through about 16 roundings a layer (norms, products, turn, gates, sums), and if a product is summed in its own
dtype (half precision is summed in float32), through one for each term; independent errors add up by squares (Higham and
Mary 2019, doi 10.1137/18M1226312).

B sequences, T columns, V vocabulary, L layers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from midskip.bench.models import Side, llama_with_our_equations, placed, positions
from midskip.config import MidskipConfig
from midskip.model import MidskipForCausalLM
from midskip.testing import naive_forward

NUM_ROWS, NUM_COLUMNS, NUM_PREFILLED = 2, 14, 9
ROUNDINGS = 16  # a layer
MOVED = 2.0**-26  # small enough for float64 to be linear, large enough to be seen


class DisagreementError(ValueError):
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
class _Truth:
    """What is right, in float64: logits [B, T, V], gates [L, B, T]; and how strongly errors are passed on."""

    logits: Tensor
    gates: Tensor
    condition: float
    config: MidskipConfig


def bound(dtype: torch.dtype, config: MidskipConfig, condition: float) -> float:
    """The largest relative difference that rounding explains.

    Args:
        condition: relative change of the result over that of the weights, moved at random.
    """
    roundings = ROUNDINGS
    if dtype.itemsize >= 4:
        roundings += 6 * config.hidden_size + config.intermediate_size  # terms of q, k, v, o, gate, up; down
    return torch.finfo(dtype).eps / 2 * max(1.0, condition) * math.sqrt(roundings)


@torch.no_grad()
def check_ours(side: Side, ids_BT: Tensor, gradients: bool = False) -> list[Agreement]:
    """Hold one of our sides to the plain twin, on some tokens.

    Raises:
        DisagreementError: they differ by more than rounding.
    """
    ids_BT = ids_BT[:NUM_ROWS, :NUM_COLUMNS]
    ids_cpu_BT = ids_BT.cpu()
    exact = Side(side.name, _exact(side.model), stretch=side.stretch)
    results = [
        (one, what, run(one, ids)) for one, ids in ((exact, ids_cpu_BT), (side, ids_BT)) for what, run in RUNS.items()
    ]
    packed = _gradients(exact.model, lambda: exact.call(ids_cpu_BT, labels=ids_cpu_BT).loss) if gradients else {}
    position_BT = positions(ids_cpu_BT, side.stretch) if side.stretch else None
    truth, naive, moved = _truth(exact.model, ids_cpu_BT, position_BT, gradients)
    found = [_compare(one, what, got, truth) for one, what, got in results]
    if gradients:
        found.append(_compare_gradients(exact, packed, naive, moved, ids_BT.numel()))
    return found


@torch.no_grad()
def check_llama(side: Side, config: MidskipConfig, ids_BT: Tensor) -> list[Agreement]:
    """Hold Llama, and ours with Llama's weights and norms, to the plain twin of that.

    Raises:
        DisagreementError: they differ by more than rounding.
    """
    ids_BT = ids_BT[:NUM_ROWS, :NUM_COLUMNS]
    ours = Side("ours with Llama's weights", llama_with_our_equations(side.model, config))
    truth, *_ = _truth(_exact(ours.model), ids_BT.cpu(), None, gradients=False)
    return [_compare(one, what, run(one, ids_BT), truth) for one in (side, ours) for what, run in RUNS.items()]


def _exact(model: MidskipForCausalLM) -> MidskipForCausalLM:
    return placed(copy.deepcopy(model), torch.float64, "cpu")


def _whole(side: Side, ids_BT: Tensor) -> tuple[Tensor, Tensor | None]:
    """Logits [B, T, V] and gates [L, B, T] of one pass."""
    output = side.call(ids_BT, use_cache=False)
    return output.logits, getattr(output, "gates", None)


def _cached(side: Side, ids_BT: Tensor) -> tuple[Tensor, Tensor | None]:
    """The same of the first tokens at once and the others one by one, as decoding runs."""
    cache = side.empty_cache(ids_BT.shape[1])
    parts = ids_BT.split([NUM_PREFILLED] + [1] * (ids_BT.shape[1] - NUM_PREFILLED), 1)
    outputs = []
    for part_BT in parts:
        outputs.append(side.call(part_BT, cache, use_cache=True))
        cache = outputs[-1].past_key_values
    gates = [output.gates for output in outputs] if side.is_ours else []
    return torch.cat([output.logits for output in outputs], 1), torch.cat(gates, 2) if gates else None


RUNS: dict[str, Callable[[Side, Tensor], tuple[Tensor, Tensor | None]]] = {"whole": _whole, "with its cache": _cached}
Gradients = dict[str, Tensor]


def _truth(
    exact: MidskipForCausalLM, ids_BT: Tensor, position_BT: Tensor | None, gradients: bool
) -> tuple[_Truth, Gradients, Gradients]:
    """What is right, with its gradients, and the gradients of the model with its weights moved, as it is afterwards."""

    def loss() -> Tensor | None:
        return naive_forward(exact, ids_BT, labels=ids_BT, position_ids=position_BT).loss

    right = naive_forward(exact, ids_BT, position_ids=position_BT)
    naive = _gradients(exact, loss) if gradients else {}
    generator = torch.Generator().manual_seed(0)
    for parameter in exact.parameters():
        share = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.mul_(1 + MOVED * (2 * share - 1))
    away = naive_forward(exact, ids_BT, position_ids=position_BT)
    change, _ = _largest(away.logits, right.logits, away.gates, right.gates)
    moved = _gradients(exact, loss) if gradients else {}
    return _Truth(right.logits, right.gates, change / MOVED, exact.config), naive, moved


def _largest(
    got_BTV: Tensor, expected_BTV: Tensor, gates_LBT: Tensor | None, true_gates_LBT: Tensor
) -> tuple[float, int]:
    """The largest difference of a token as a share of its logits, and how many tokens were compared.

    A learned gate may round to the other side of 0 and moves all that comes after: up to there they are compared.
    """
    difference_BT = (got_BTV.cpu().double() - expected_BTV).norm(dim=-1) / expected_BTV.norm(dim=-1)
    if gates_LBT is not None:
        same_BT = ((gates_LBT.cpu() > 0) == (true_gates_LBT > 0)).all(0)
        difference_BT = difference_BT[same_BT.long().cummin(1).values.bool()]
    return (difference_BT.max().item() if difference_BT.numel() else math.inf), difference_BT.numel()


def _compare(side: Side, what: str, got: tuple[Tensor, Tensor | None], truth: _Truth) -> Agreement:
    logits_BTV, gates_LBT = got
    dtype = logits_BTV.dtype
    if dtype == torch.float64:
        gates_LBT = None  # nothing rounds over
    largest, num_tokens = _largest(logits_BTV, truth.logits, gates_LBT, truth.gates)
    allowed = bound(dtype, truth.config, truth.condition)
    _demand(side, what, dtype, "logits differ", largest, allowed)
    return Agreement(side.name, what, _name(dtype), largest, allowed, num_tokens)


@torch.enable_grad()
def _gradients(model: MidskipForCausalLM, loss: Callable[[], Tensor | None]) -> Gradients:
    """The loss and its gradient with respect to every parameter."""
    model.train().zero_grad()
    value = loss()
    assert value is not None
    value.backward()
    gradients = {"loss": value.detach()}
    gradients |= {
        name: torch.zeros(()) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }
    model.eval().zero_grad()
    return gradients


def _compare_gradients(side: Side, packed: Gradients, naive: Gradients, moved: Gradients, num_tokens: int) -> Agreement:
    """The comparison that comes closest to its bound."""
    found = []
    for name, expected in naive.items():
        norm = expected.norm().item() or 1.0
        difference, change = ((got[name] - expected).norm().item() / norm for got in (packed, moved))
        # a gradient goes back through the roundings of results that went through as many
        allowed = 2**0.5 * bound(torch.float64, side.model.config, change / MOVED)
        _demand(side, "training", torch.float64, f"gradient of {name} differs", difference, allowed)
        found.append(Agreement(side.name, f"training, {name}", "float64", difference, allowed, num_tokens))
    return max(found, key=lambda one: one.difference / one.bound)


def _demand(side: Side, what: str, dtype: torch.dtype, who: str, largest: float, allowed: float) -> None:
    if not largest <= allowed:  # not a number is no agreement
        raise DisagreementError(
            f"{side.name} ({what}, {_name(dtype)}) does not compute what it should and is not timed: its {who} by "
            f"{largest:.2e} of their size, and rounding explains {allowed:.2e}. This is an error in midskip, or in "
            "torch on this machine: please report it"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
