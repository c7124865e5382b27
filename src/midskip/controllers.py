"""Gate regularisers: how much of its depth a model may spend.

A controller adds a term to the training loss that pushes the gates of each layer, and may change the weights
of that term after each optimizer step. The released ones are those of *Learning to Skip the Middle Layers of
Transformers* (Lawson and Aitchison 2025, arXiv 2506.21103), in three families: fixed coefficients,
coefficients that follow an error, a distance from targets. `build_controller` makes one by name, or your own
by import path.

Letters in tensor names: L layers, B sequences, T positions; 2 stands for (mean, variance), in that order.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from midskip.plugins import load_class
from midskip.policies.base import Policy
from midskip.policies.middle_out import MiddleOut

OPEN_BIAS = 0.1  # the budget starts where the gates of an open start do
SLOW_STEPS = 10  # time constant of the slow average of errors; that of the fast one is 1: the newest error


class Controller:
    """A gate regulariser, and the seam for your own: subclass it, give the import path to `build_controller`.

    A subclass is made as `Class(num_layers, **settings)` and calls `super().__init__(num_layers)`. It defines
    `update` if it learns from what it sees, and `loss` if its term is not the one here. Tensors that change
    over a run are attributes of fixed shape, named in `changing`, and so saved and restored.

    Attributes:
        num_layers: L, at least 1.
        mean_coefficients: float32 [L] on the CPU, the weight of each layer's mean gate; [0] if none.
        variance_coefficients: the same for the variance.
        changing: names of the float32 CPU tensors that `update` changes.
    """

    changing: tuple[str, ...] = ()

    def __init__(self, num_layers: int) -> None:
        if isinstance(num_layers, bool) or not isinstance(num_layers, int) or num_layers < 1:
            raise ValueError(f"num_layers must be a whole number of at least 1, got {num_layers!r}")
        self.num_layers = num_layers
        self.mean_coefficients = _floats([])
        self.variance_coefficients = _floats([])

    def loss(self, gates_LBT: Tensor, valid_BT: Tensor | None = None) -> Tensor:
        """The term to add to the cross-entropy: a scalar, differentiable in the gates.

        Here: mean over layers of (mean coefficient * mean gate) + mean over layers of (variance coefficient *
        variance of the gates). Arguments, dtypes and errors are those of `moments`.
        """
        mean_L, variance_L = self.moments(gates_LBT, valid_BT)
        total = 0 * mean_L.sum()  # not a bare 0: the loss has a graph to the gates whatever the coefficients
        if len(self.mean_coefficients):
            total = total + (self.mean_coefficients.to(mean_L) * mean_L).mean()
        if len(self.variance_coefficients):
            total = total + (self.variance_coefficients.to(mean_L) * variance_L).mean()
        return total

    def update(self, mean_L: Tensor, variance_L: Tensor, share_L: Tensor | None = None) -> None:
        """Learns from one optimizer step, and is called after it; here it does nothing.

        All are floating point [L], over the valid tokens of the whole step: all its batches, all ranks. They
        are mean and variance of the gates, and, where known, the share of tokens present (gate above 0), in
        [0, 1].
        """

    def steer(self, policy: Policy) -> None:
        """Sets what the policy leaves to its controller; called before the first step and after each `update`.

        Here it does nothing. ValueError if the policy has not what this controller steers.
        """

    def state_dict(self) -> dict[str, Any]:
        """What `changing` names, as floats and (nested) lists of floats; JSON carries them without loss."""
        return {name: getattr(self, name).tolist() for name in self.changing}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a `state_dict`: the run then goes on bit for bit as if it had never stopped.

        ValueError, with nothing changed, if names, shapes or values are not those of this controller.
        """
        if set(state) != set(self.changing):
            raise ValueError(
                f"the state of this {type(self).__name__} has the keys {sorted(self.changing)}, got "
                f"{sorted(state)}; load it into a controller like the one that saved it"
            )
        loaded: dict[str, Tensor] = {}
        for name in self.changing:
            shape = list(getattr(self, name).shape)
            try:
                loaded[name] = _floats(state[name])
                fits = list(loaded[name].shape) == shape and bool(loaded[name].isfinite().all())
            except (TypeError, ValueError, RuntimeError):
                fits = False
            if not fits:
                raise ValueError(f"state {name!r} must be finite numbers of shape {shape}, got {state[name]!r}")
        for name, value in loaded.items():
            setattr(self, name, value)

    def moments(self, gates_LBT: Tensor, valid_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance of each layer's gates over the valid tokens, differentiable, each [L].

        Args:
            gates_LBT: floating point [L, B, T], in [0, 1]. The result is float32, or float64 if they are.
            valid_BT: bool [B, T], true where there is a token; None for everywhere. The result is as if the
                other positions did not exist; their gates may be anything, NaN included.

        One valid token has variance 0; with no valid token both are 0 and carry no gradient.

        Raises:
            ValueError: another shape or dtype.
        """
        if gates_LBT.dim() != 3 or len(gates_LBT) != self.num_layers or not gates_LBT.is_floating_point():
            raise ValueError(
                f"gates must be floating point [{self.num_layers} layers, sequences, positions], "
                f"got {gates_LBT.dtype} {list(gates_LBT.shape)}"
            )
        if valid_BT is None:
            valid_BT = torch.ones(gates_LBT.shape[1:], dtype=torch.bool, device=gates_LBT.device)
        elif valid_BT.dtype != torch.bool or valid_BT.shape != gates_LBT.shape[1:]:
            raise ValueError(
                f"valid must be torch.bool {list(gates_LBT.shape[1:])}, to go with the gates, "
                f"got {valid_BT.dtype} {list(valid_BT.shape)}"
            )
        gates_LBT = gates_LBT.to(torch.promote_types(gates_LBT.dtype, torch.float32))
        # Sums of what `where` leaves, not an index: for that the CPU must wait for a GPU to count tokens.
        count = valid_BT.sum()
        mean_L = gates_LBT.where(valid_BT, 0.0).sum((1, 2)) / count.clamp(min=1)
        deviation_LBT = (gates_LBT - mean_L[:, None, None]).where(valid_BT, 0.0)
        return mean_L, deviation_LBT.square().sum((1, 2)) / (count - 1).clamp(min=1)


class FixedController(Controller):
    """The same coefficients for every layer and step. None leaves a term out; without both the loss is 0."""

    def __init__(
        self,
        num_layers: int,
        *,
        mean_coefficient: float | None = None,
        variance_coefficient: float | None = None,
    ) -> None:
        super().__init__(num_layers)
        if mean_coefficient is not None:
            self.mean_coefficients = _floats([_number("mean_coefficient", mean_coefficient)] * num_layers)
        if variance_coefficient is not None:
            beta = _number("variance_coefficient", variance_coefficient)
            self.variance_coefficients = _floats([beta] * num_layers)


class DistanceController(FixedController):
    """Pulls straight at the targets: a |means - targets| + b |variances - targets|, Euclidean over layers.

    Unlike a mean over layers this grows with their number, and pulls as hard near the targets as far from
    them. At a distance of exactly 0 the gradient is 0.
    """

    def __init__(
        self,
        num_layers: int,
        *,
        mean_coefficient: float,
        variance_coefficient: float,
        mean_target_start: float | None = None,
        mean_target_end: float | None = None,
        mean_targets: Sequence[float] | None = None,
        var_target_delta: float = 0.0,
    ) -> None:
        super().__init__(
            num_layers,
            mean_coefficient=_number("mean_coefficient", mean_coefficient),
            variance_coefficient=_number("variance_coefficient", variance_coefficient),
        )
        self.targets_2L = gate_targets(num_layers, mean_target_start, mean_target_end, mean_targets, var_target_delta)

    def loss(self, gates_LBT: Tensor, valid_BT: Tensor | None = None) -> Tensor:
        """The weighted distances; arguments, dtypes and errors as in `moments`."""
        moments_2L = torch.stack(self.moments(gates_LBT, valid_BT))
        distances_2 = torch.linalg.vector_norm(moments_2L - self.targets_2L.to(moments_2L), dim=1)
        coefficients_2 = torch.stack([self.mean_coefficients[0], self.variance_coefficients[0]])
        return (coefficients_2.to(distances_2) * distances_2).sum()


class FeedbackController(Controller):
    """Coefficients that start from 0, rise while a moment is above its target and fall while it is below.

    With error = measured - target, an update adds coef_update_multiplier * error (rule "sign": the sign of
    the error) to each coefficient whose |error| is above `delta_min`, then clamps to [coef_min, coef_max].
    Rule "growing" adds only where error * (error - slow average of errors) > 0, that is while the error
    moves away from 0. The average has a time constant of 10 steps, includes the newest error and starts at
    the first: that update adds nothing.
    """

    def __init__(
        self,
        num_layers: int,
        *,
        rule: Literal["sign", "error", "growing"],
        coef_update_multiplier: float,
        mean_target_start: float | None = None,
        mean_target_end: float | None = None,
        mean_targets: Sequence[float] | None = None,
        var_target_delta: float = 0.0,
        coef_max: float = math.inf,
        coef_min: float = -math.inf,
        delta_min: float = 0.01,
    ) -> None:
        super().__init__(num_layers)
        self.targets_2L = gate_targets(num_layers, mean_target_start, mean_target_end, mean_targets, var_target_delta)
        if rule not in ("sign", "error", "growing"):
            raise ValueError(f"rule must be 'sign', 'error' or 'growing', got {rule!r}")
        self.rule = rule
        self.multiplier = _number("coef_update_multiplier", coef_update_multiplier, 0)
        self.coef_max = _number("coef_max", coef_max, 0, math.inf)  # they start from 0: it is inside
        self.coef_min = _number("coef_min", coef_min, -math.inf, 0)
        self.delta_min = _number("delta_min", delta_min, 0)
        self.mean_coefficients, self.variance_coefficients = _floats([[0.0] * num_layers] * 2)
        self.changing = ("mean_coefficients", "variance_coefficients")
        if rule == "growing":
            self.slow_errors, self.started = _floats([[0.0] * num_layers] * 2), _floats(0.0)
            self.changing += ("slow_errors", "started")

    def update(self, mean_L: Tensor, variance_L: Tensor, share_L: Tensor | None = None) -> None:
        """As in `Controller`; the share is not used. ValueError if a statistic is not [L] or not finite."""
        for name, value_L in (("mean", mean_L), ("variance", variance_L)):
            if list(value_L.shape) != [self.num_layers] or not value_L.isfinite().all():
                raise ValueError(f"{name}_L must be {self.num_layers} finite numbers, got {value_L.tolist()}")
        errors_2L = torch.stack([mean_L, variance_L]).detach().to("cpu", torch.float32) - self.targets_2L
        moves_2L = errors_2L.abs() > self.delta_min
        if self.rule == "growing":
            # A step towards the error, not a weighted sum: rounding then never parts it from a steady error.
            slow_2L = self.slow_errors + (errors_2L - self.slow_errors) / SLOW_STEPS
            self.slow_errors = slow_2L if self.started else errors_2L
            self.started = _floats(1.0)
            moves_2L &= errors_2L * (errors_2L - self.slow_errors) > 0
        steps_2L = self.multiplier * (errors_2L.sign() if self.rule == "sign" else errors_2L)
        moved_2L = torch.stack([self.mean_coefficients, self.variance_coefficients]) + moves_2L * steps_2L
        self.mean_coefficients, self.variance_coefficients = moved_2L.clamp(self.coef_min, self.coef_max)


class BudgetController(Controller):
    """Holds the share of block-tokens that run, by moving the bias of each layer's score in `middle_out`.

    The regularisers above push gates through the loss, where a gate that is flat at 0 no longer feels them. This one
    adds nothing to the loss: after each step it adds gain * (share present - target) to the bias of each layer of
    the first half, so that the gradient decides which tokens leave and the controller how many. The layers' targets
    fall evenly by 2 d, d = spread * min(target_share, 1 - target_share), around a mean over all layers of
    target_share, and are approached from 1 over `ramp_steps`. The idea is that of load balancing without a loss (Wang
    et al. 2024, arXiv 2408.15664), there between experts.
    """

    changing = ("bias", "num_updates")

    def __init__(
        self, num_layers: int, *, target_share: float, spread: float = 0.8, gain: float = 0.5, ramp_steps: int = 50
    ) -> None:
        super().__init__(num_layers)
        target = _number("target_share", target_share, 0, 1)
        reach = _number("spread", spread, 0, 1) * min(target, 1 - target)
        self.gain = _number("gain", gain, 0)
        self.ramp_steps = _number("ramp_steps", ramp_steps, 1)
        num_gates = (num_layers + 1) // 2
        # mirrored layers count twice, the middle one of an odd depth once: their mean is the target
        weights = _floats([2.0] * (num_layers // 2) + [1.0] * (num_layers % 2))
        slope = torch.linspace(1, -1, num_gates) if num_gates > 1 else torch.zeros(1)
        slope = slope - (slope * weights).sum() / weights.sum()
        self.targets = (target + reach * slope / slope.abs().max().clamp(min=1)).clamp(0, 1)
        self.bias = torch.full((num_gates,), OPEN_BIAS / num_gates)
        self.num_updates = _floats(0.0)

    def update(self, mean_L: Tensor, variance_L: Tensor, share_L: Tensor | None = None) -> None:
        """As in `Controller`; only the share is used, and must be given."""
        if share_L is None or list(share_L.shape) != [self.num_layers] or not share_L.isfinite().all():
            raise ValueError(f"share_L must be {self.num_layers} finite numbers, got {share_L}")
        self.num_updates = self.num_updates + 1
        ramp = (self.num_updates / self.ramp_steps).clamp(max=1)
        targets = 1 - (1 - self.targets) * ramp
        self.bias = self.bias + self.gain * (share_L[: len(self.bias)].detach().to("cpu", torch.float32) - targets)

    def steer(self, policy: Policy) -> None:
        """Sets the bias of a `MiddleOut`, and takes it out of the optimizer's hands."""
        if not isinstance(policy, MiddleOut):
            raise ValueError(f"the budget controller steers the policy 'middle_out', got {type(policy).__name__}")
        if policy.num_layers != self.num_layers:
            raise ValueError(f"the budget is for {self.num_layers} layers and the model has {policy.num_layers}")
        policy.bias.requires_grad_(False).copy_(self.bias)


def gate_targets(
    num_layers: int,
    mean_target_start: float | None,
    mean_target_end: float | None,
    mean_targets: Sequence[float] | None,
    var_target_delta: float,
) -> Tensor:
    """Targets of mean and variance for each layer, float32 [2, L].

    Mean targets run linearly from start (layer 0) to end over the first ceil(L / 2) layers, or are that many
    numbers in `mean_targets`. The other layers mirror them; for odd L the middle layer has one of its own.
    The variance target is max(0, m (1 - m) + delta); m (1 - m) is the variance of gates that are only 0 or 1.

    Raises:
        ValueError: mean targets given both ways or neither, too many or few, or outside [0, 1]; start and end
            that differ where one layer or two have room for a single target.
    """
    num_targets = (num_layers + 1) // 2
    if mean_targets is None and mean_target_start is not None and mean_target_end is not None:
        start = _number("mean_target_start", mean_target_start, 0, 1)
        end = _number("mean_target_end", mean_target_end, 0, 1)
        if num_targets == 1 and start != end:
            raise ValueError(
                f"{num_layers} layers have room for one mean target, so mean_target_start and "
                f"mean_target_end must be equal, got {start} and {end}"
            )
        half = [start + (end - start) * layer / max(num_targets - 1, 1) for layer in range(num_targets)]
    elif mean_targets is not None and mean_target_start is None and mean_target_end is None:
        if not isinstance(mean_targets, list | tuple) or len(mean_targets) != num_targets:
            raise ValueError(
                f"mean_targets must be a list of {num_targets} numbers, one for each layer of the first "
                f"half of {num_layers} (a middle one included), got {mean_targets!r}"
            )
        half = [_number("each of mean_targets", target, 0, 1) for target in mean_targets]
    else:
        raise ValueError(
            "give mean_target_start and mean_target_end, or mean_targets instead of them; got "
            f"{mean_target_start=}, {mean_target_end=}, {mean_targets=}"
        )
    mean_L = _floats(half + half[: num_layers // 2][::-1])
    variance_L = mean_L * (1 - mean_L) + _number("var_target_delta", var_target_delta, -1, 1)
    return torch.stack([mean_L, variance_L.clamp(min=0)])


def _number(name: str, value: Any, low: float = -1e6, high: float = 1e6) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{name} must be a number from {low:g} to {high:g}, got {value!r}")
    return float(value)


def _floats(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device="cpu")  # whatever torch's defaults are


# Name: the family, the settings that make it this one, defaults of settings left to the user.
_CONTROLLERS: dict[str, tuple[type[Controller], dict[str, Any], dict[str, Any]]] = {
    "none": (FixedController, {"mean_coefficient": None, "variance_coefficient": None}, {}),
    "sparsity": (FixedController, {"variance_coefficient": None}, {"mean_coefficient": 0.01}),
    "sparsity_variance": (FixedController, {}, {"mean_coefficient": 0.01, "variance_coefficient": -0.01}),
    "sparsity_variance_l2": (DistanceController, {}, {"mean_coefficient": 0.1, "variance_coefficient": 0.1}),
    "adaptive": (FeedbackController, {"rule": "sign"}, {"coef_update_multiplier": 1e-3}),
    "proportional": (FeedbackController, {"rule": "error"}, {"coef_update_multiplier": 1e-3}),
    "proportional_derivative": (FeedbackController, {"rule": "growing"}, {"coef_update_multiplier": 1e-2}),
    "budget": (BudgetController, {}, {}),
}


def build_controller(name: str, num_layers: int, **settings: Any) -> Controller:
    """A gate regulariser for a model of `num_layers` layers, odd or even.

    `name` is a released one or `"package.module:Class"` for a subclass of `Controller` elsewhere. The
    released names, their settings and the released code's defaults:

    - `none` (there: `dummy`, accepted too): no term and no setting.
    - `sparsity`: mean_coefficient 0.01, on every layer.
    - `sparsity_variance`: mean_coefficient 0.01, variance_coefficient -0.01.
    - `sparsity_variance_l2`: mean_coefficient 0.1 and variance_coefficient 0.1, times the distances from
      targets. Targets are set by mean_target_start and mean_target_end, or mean_targets; and
      var_target_delta, 0.
    - `adaptive`, `proportional`, `proportional_derivative`: targets as above; coef_update_multiplier 1e-3,
      1e-3 and 1e-2; delta_min 0.01; coef_min and coef_max, unbounded. The first goes by the sign of the
      error, the second by the error (an integral controller, for the coefficients add it up), the third only
      while the error grows.

    And one of our own:

    - `budget`: target_share, the share of block-tokens that run; spread 0.8, gain 0.5, ramp_steps 50.

    Raises:
        ValueError: a name that is not known; a setting the controller does not have, lacks or cannot take.
    """
    family, fixed, defaults = _CONTROLLERS.get("none" if name == "dummy" else name, (None, {}, {}))
    if family is None:
        family = load_class(name, Controller, "controller", tuple(_CONTROLLERS))
    signature = inspect.signature(family)
    arguments = {**defaults, **settings, **fixed}
    try:
        if taken := sorted(set(settings) & set(fixed)):
            raise TypeError(f"{', '.join(taken)} cannot be set")
        signature.bind(num_layers, **arguments)
    except TypeError as error:
        known = [parameter for parameter in signature.parameters if parameter not in fixed][1:]
        raise ValueError(
            f"controller {name!r} got {settings}: {error}; its settings are: {', '.join(known) or 'none'}"
        ) from error
    return family(num_layers, **arguments)
