"""The interface: what every gate regularizer has, and a subclass of yours needs.

Letters in tensor names: L layers, B sequences, T positions; 2 stands for (mean, variance), in that order.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from midskip.layer_statistics import valid_of
from midskip.policies.base import Policy


class Regularizer:
    """A gate regularizer, and the base class for your own: subclass it, give the import path to `build_regularizer`.

    A subclass is made as `Class(num_layers, **settings)` and calls `super().__init__(num_layers)`. It defines
    `update` if it learns from what it sees, and `loss` if its term is not the one here. Tensors that change
    over a run are attributes of fixed shape, named in `changing`, and so saved and restored.

    Attributes:
        num_layers: L, at least 1.
        mean_coefficients: float32 [L] on the CPU, the weight of each layer's mean gate; [0] if none.
        variance_coefficients: the same for the variance.
        targets_2L: float32 [2, L] on the CPU, what mean and variance should be; [2, 0] if none.
        changing: names of the CPU tensors that `update` changes.
    """

    changing: tuple[str, ...] = ()

    def __init__(self, num_layers: int) -> None:
        if isinstance(num_layers, bool) or not isinstance(num_layers, int) or num_layers < 1:
            raise ValueError(f"num_layers must be a whole number of at least 1, got {num_layers!r}")
        self.num_layers = num_layers
        self.mean_coefficients = floats([])
        self.variance_coefficients = floats([])
        self.targets_2L = floats([[], []])

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
        """Sets what the policy leaves to its regularizer; called before the first step and after each `update`.

        Here there is nothing to set. ValueError if the policy has not what this regularizer steers, or needs one that
        steers.
        """
        if policy.needs_target_share:
            raise ValueError(
                f"the gates of this {type(policy).__name__} have no gradient, so a regularizer has to say how many "
                f"tokens run; got {type(self).__name__}: use the regularizer 'target_share', or settings of the policy "
                "whose gates learn"
            )

    @property
    def expected_share(self) -> float | None:
        """The share of block-tokens that the step to come should run; None if the regularizer has no such target."""
        return None

    @property
    def score_scales(self) -> tuple[float, ...]:
        """Scales of the scores (`Policy.set_limits`) for the step to come.

        Each batch runs once under each of them, and the mean of the losses is learnt from. `update` hears of the last
        of these passes alone. Here there is one, as trained.
        """
        return (1.0,)

    def curves(self) -> dict[str, Tensor]:
        """What to draw beside the gates while training: tensors of a value for each layer, by name.

        Here: coefficients and targets, as far as there are any.
        """
        drawn = {
            "mean_coefficient": self.mean_coefficients,
            "variance_coefficient": self.variance_coefficients,
            "mean_target": self.targets_2L[0],
            "variance_target": self.targets_2L[1],
        }
        return {name: values_L for name, values_L in drawn.items() if len(values_L)}

    def state_dict(self) -> dict[str, Any]:
        """What `changing` names, as numbers and (nested) lists of numbers; JSON carries them without loss."""
        return {name: getattr(self, name).tolist() for name in self.changing}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a `state_dict`: the run then goes on bit for bit as if it had never stopped.

        ValueError, with nothing changed, if names, shapes or values are not those of this regularizer.
        """
        if set(state) != set(self.changing):
            raise ValueError(
                f"the state of this {type(self).__name__} has the keys {sorted(self.changing)}, got "
                f"{sorted(state)}; load it into a regularizer like the one that saved it"
            )
        loaded: dict[str, Tensor] = {}
        for name in self.changing:
            shape = list(getattr(self, name).shape)
            try:
                loaded[name] = torch.tensor(state[name], dtype=getattr(self, name).dtype, device="cpu")
                fits = list(loaded[name].shape) == shape and bool(loaded[name].isfinite().all())
                fits = fits and (loaded[name].is_floating_point() or loaded[name].tolist() == state[name])
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
        valid_BT = valid_of(gates_LBT, valid_BT)
        gates_LBT = gates_LBT.to(torch.promote_types(gates_LBT.dtype, torch.float32))
        # Sums of what `where` leaves, not an index: for that the CPU must wait for a GPU to count tokens.
        count = valid_BT.sum()
        mean_L = gates_LBT.where(valid_BT, 0.0).sum((1, 2)) / count.clamp(min=1)
        deviation_LBT = (gates_LBT - mean_L[:, None, None]).where(valid_BT, 0.0)
        return mean_L, deviation_LBT.square().sum((1, 2)) / (count - 1).clamp(min=1)


def number(name: str, value: Any, low: float = -1e6, high: float = 1e6) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{name} must be a number from {low:g} to {high:g}, got {value!r}")
    return float(value)


def floats(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device="cpu")  # whatever torch's defaults are
