"""The gate regularizers of *Learning to Skip the Middle Layers of Transformers* (Lawson and Aitchison 2025, arXiv
2506.21103), in three families: fixed coefficients, coefficients that follow an error, a distance from targets.

Letters in tensor names: L layers, B sequences, T positions; 2 stands for (mean, variance), in that order.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from midskip.regularizers.base import Regularizer, floats, number

SLOW_STEPS = 10  # time constant of the slow average of errors; that of the fast one is 1: the newest error


class FixedRegularizer(Regularizer):
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
            self.mean_coefficients = floats([number("mean_coefficient", mean_coefficient)] * num_layers)
        if variance_coefficient is not None:
            beta = number("variance_coefficient", variance_coefficient)
            self.variance_coefficients = floats([beta] * num_layers)


class DistanceRegularizer(FixedRegularizer):
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
            mean_coefficient=number("mean_coefficient", mean_coefficient),
            variance_coefficient=number("variance_coefficient", variance_coefficient),
        )
        self.targets_2L = gate_targets(num_layers, mean_target_start, mean_target_end, mean_targets, var_target_delta)

    def loss(self, gates_LBT: Tensor, valid_BT: Tensor | None = None) -> Tensor:
        """The weighted distances; arguments, dtypes and errors as in `moments`."""
        moments_2L = torch.stack(self.moments(gates_LBT, valid_BT))
        distances_2 = torch.linalg.vector_norm(moments_2L - self.targets_2L.to(moments_2L), dim=1)
        coefficients_2 = torch.stack([self.mean_coefficients[0], self.variance_coefficients[0]])
        return (coefficients_2.to(distances_2) * distances_2).sum()


class FeedbackRegularizer(Regularizer):
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
        self.multiplier = number("coef_update_multiplier", coef_update_multiplier, 0)
        self.coef_max = number("coef_max", coef_max, 0, math.inf)  # they start from 0: it is inside
        self.coef_min = number("coef_min", coef_min, -math.inf, 0)
        self.delta_min = number("delta_min", delta_min, 0)
        self.mean_coefficients, self.variance_coefficients = floats([[0.0] * num_layers] * 2)
        self.changing = ("mean_coefficients", "variance_coefficients")
        if rule == "growing":
            self.slow_errors, self.started = floats([[0.0] * num_layers] * 2), floats(0.0)
            self.changing += ("slow_errors", "started")

    def update(self, mean_L: Tensor, variance_L: Tensor, share_L: Tensor | None = None) -> None:
        """As in `Regularizer`; the share is not used. ValueError if a statistic is not [L] or not finite."""
        for name, value_L in (("mean", mean_L), ("variance", variance_L)):
            if list(value_L.shape) != [self.num_layers] or not value_L.isfinite().all():
                raise ValueError(f"{name}_L must be {self.num_layers} finite numbers, got {value_L.tolist()}")
        errors_2L = torch.stack([mean_L, variance_L]).detach().to("cpu", torch.float32) - self.targets_2L
        moves_2L = errors_2L.abs() > self.delta_min
        if self.rule == "growing":
            # A step towards the error, not a weighted sum: rounding then never parts it from a steady error.
            slow_2L = self.slow_errors + (errors_2L - self.slow_errors) / SLOW_STEPS
            self.slow_errors = slow_2L if self.started else errors_2L
            self.started = floats(1.0)
            moves_2L &= errors_2L * (errors_2L - self.slow_errors) > 0
        steps_2L = self.multiplier * (errors_2L.sign() if self.rule == "sign" else errors_2L)
        moved_2L = torch.stack([self.mean_coefficients, self.variance_coefficients]) + moves_2L * steps_2L
        self.mean_coefficients, self.variance_coefficients = moved_2L.clamp(self.coef_min, self.coef_max)


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
        start = number("mean_target_start", mean_target_start, 0, 1)
        end = number("mean_target_end", mean_target_end, 0, 1)
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
        half = [number("each of mean_targets", target, 0, 1) for target in mean_targets]
    else:
        raise ValueError(
            "give mean_target_start and mean_target_end, or mean_targets instead of them; got "
            f"{mean_target_start=}, {mean_target_end=}, {mean_targets=}"
        )
    mean_L = floats(half + half[: num_layers // 2][::-1])
    variance_L = mean_L * (1 - mean_L) + number("var_target_delta", var_target_delta, -1, 1)
    return torch.stack([mean_L, variance_L.clamp(min=0)])
