"""A regularizer that holds a share of work. L: layers."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from midskip.policies.base import Policy
from midskip.policies.middle_out import nested
from midskip.regularizers.base import Regularizer, floats, number

NUM_KNOTS = 9  # shares whose scale of the scores is tracked; between them it is straight in its logarithm
SCALE_GAIN = 2  # gain of a scale of the scores, as a multiple of `gain`: each hears of its own shares alone
FASTER, SLOWER = 1.2, 0.6  # what a layer's gain is multiplied by while its error keeps its sign, and when it turns
LARGEST_LOG_SCALE = 10.0
GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples, less their whole parts, spread evenly however many are taken


class TargetShare(Regularizer):
    """Holds the share of block-tokens that run, by moving the bias of each gate of a policy that has gates to set.

    The paper's regularizers push gates through the loss, where a gate that is flat at 0 no longer feels them. This one
    adds nothing to the loss: after each step it adds gain * (share present - target) to the bias of each gate, so that
    the policy decides which tokens leave and the regularizer how many. The gain of a gate grows while its error keeps
    its sign, since nobody knows where the scores will lie. As trained, the first `outer` layers and their mirrors run
    for every token; not so in `early_exit` by predicted loss, where one bias serves all layers. The targets of the
    others fall, in the order that the policy says (`Policy.share_profile`), by up to 2 d, d = spread * min(m, 1 - m),
    around the mean m with which all layers together have target_share, and are approached from 1 over `ramp_steps`. The
    idea is that of load balancing without a loss (Wang et al. 2024, arXiv 2408.15664), there between experts.

    With `lowest_share` one model learns to serve every share from there to 1. After the ramp each batch runs three
    times: with everything, at the lowest share, and at a third one, which is `target_share` in every second step, and
    drawn evenly from [lowest_share, 1] in the others. (The two ends in every step are the sandwich rule of slimmable
    networks, Yu and Huang 2019, arXiv 1903.05134.) The scale of the scores that each share takes, as at run time, is
    tracked by the share that ran.
    """

    changing = ("bias", "gains", "errors", "num_updates")
    gain_range = (0.2, 20.0)  # of the product of `FASTER` and `SLOWER`

    def __init__(
        self, num_layers: int, *, target_share: float, lowest_share: float | None = None, outer: int = 0,
        spread: float = 0.8, gain: float = 0.5, ramp_steps: int = 50,
    ) -> None:  # fmt: skip
        super().__init__(num_layers)
        self.target_share = number("target_share", target_share, 0, 1)
        self.gain = number("gain", gain, 0)
        self.ramp_steps = number("ramp_steps", ramp_steps, 1)
        self.spread = number("spread", spread, 0, 1)
        num_gates = (num_layers + 1) // 2
        if isinstance(outer, bool) or not isinstance(outer, int) or not 0 <= outer < num_gates:
            raise ValueError(f"outer must be a whole number from 0 to {num_gates - 1}, got {outer!r}")
        self.outer = outer
        self._aimed_at: tuple[tuple[int | None, ...], list[float | None]] | None = None
        self._set_targets(*nested(num_layers, outer), known=False)  # until `steer` has seen the policy
        self._begin(len(self.targets))
        self.num_updates = floats(0.0)
        self.lowest_share = None if lowest_share is None else number("lowest_share", lowest_share, 0.01, 0.99)
        if self.lowest_share is not None:
            if self.lowest_share >= self.target_share:
                raise ValueError(
                    f"lowest_share is {lowest_share} and target_share {target_share}; expected the first below the "
                    "second: lower it, or leave it out"
                )
            self.log_scales = torch.zeros(NUM_KNOTS)
            self.changing = (*self.changing, "log_scales")

    def _set_targets(
        self, gate_of_layer: tuple[int | None, ...], profile_L: list[float | None], known: bool = True
    ) -> None:
        """Targets for these gates; `known` if they are those of the policy."""
        inner = [layer for layer, depth in enumerate(profile_L) if depth is not None]
        mean = 1 - (1 - self.target_share) * self.num_layers / max(1, len(inner))
        if mean < 0 and known:  # other policies may have fewer outer layers
            raise ValueError(
                f"target_share is {self.target_share} and the layers that run for every token alone are "
                f"{1 - len(inner) / self.num_layers:.3g} of the blocks: raise it, or lower outer"
            )
        slope = 1 - 2 * floats([profile_L[layer] for layer in inner])
        slope = slope - slope.mean() if inner else slope
        mean = max(0.0, mean)
        reach = self.spread * min(mean, 1 - mean)
        targets_L = torch.ones(self.num_layers)
        if inner:
            targets_L[inner] = (mean + reach * slope / slope.abs().max().clamp(min=1)).clamp(0, 1)
        gates = sorted({gate for gate in gate_of_layer if gate is not None})
        self._layers = [[layer for layer, other in enumerate(gate_of_layer) if other == gate] for gate in gates]
        self.targets = torch.stack([targets_L[layers].mean() for layers in self._layers])

    def _begin(self, num_gates: int) -> None:
        """The search for the biases of so many gates, from its start."""
        self.bias = torch.zeros(num_gates)  # beside that of an open start
        self.gains, self.errors = torch.ones(num_gates), torch.zeros(num_gates)  # the former times `gain`

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As in `Regularizer`; before the first `steer` the gates may be as many as the state is of."""
        before = self.bias, self.gains, self.errors
        if self._aimed_at is None and isinstance(state.get("bias"), list):
            self._begin(len(state["bias"]))
        try:
            super().load_state_dict(state)
        except ValueError:
            self.bias, self.gains, self.errors = before
            raise

    @property
    def drawn_share(self) -> float | None:
        """The share drawn for the step to come; None if it runs as trained, as every even step does, counted from 1."""
        step = int(self.num_updates)
        if self.lowest_share is None or step % 2:
            return None
        return self.lowest_share + (1 - self.lowest_share) * (step * GOLDEN % 1)

    @property
    def expected_share(self) -> float:
        """The share of block-tokens that the step to come should run in its last pass."""
        drawn = self.drawn_share
        return 1 - (1 - (self.target_share if drawn is None else drawn)) * self._ramp()

    @property
    def score_scales(self) -> tuple[float, ...]:
        """As in `Regularizer`: with `lowest_share` and after the ramp three."""
        if self.lowest_share is None:
            return (1.0,)
        last = 1.0 if self.drawn_share is None else self._scale(self.drawn_share)
        return (last,) if self._ramp() < 1 else (0.0, self._scale(self.lowest_share), last)

    def update(self, mean_L: Tensor, variance_L: Tensor, share_L: Tensor | None = None) -> None:
        """As in `Regularizer`; only the share is used, and must be given."""
        if share_L is None or list(share_L.shape) != [self.num_layers] or not share_L.isfinite().all():
            raise ValueError(f"share_L must be {self.num_layers} finite numbers, got {share_L}")
        share_L = share_L.detach().to("cpu", torch.float32)
        if self.drawn_share is None:
            share_G = torch.stack([share_L[layers].mean() for layers in self._layers])
            errors = share_G - (1 - (1 - self.targets) * self._ramp())
            turned = torch.where(errors * self.errors > 0, FASTER, SLOWER)
            self.gains = (self.gains * turned).clamp(*self.gain_range)
            self.bias = self.bias + self.gain * self.gains * errors
            self.errors = errors
        else:
            error = share_L.mean() - self.expected_share
            moved = SCALE_GAIN * self.gain * error * self._knots(self.drawn_share)
            self.log_scales = (self.log_scales + moved).clamp(-LARGEST_LOG_SCALE, LARGEST_LOG_SCALE)
        self.num_updates = self.num_updates + 1

    def _ramp(self) -> float:
        """How far the targets of the step to come have come down, from 0 to 1."""
        return min(1.0, (float(self.num_updates) + 1) / self.ramp_steps)

    def _knots(self, share: float) -> Tensor:
        """[NUM_KNOTS], the weights of the shares that stand around this one."""
        assert self.lowest_share is not None
        place = (share - self.lowest_share) / (1 - self.lowest_share) * (NUM_KNOTS - 1)
        return (1 - (torch.arange(NUM_KNOTS) - place).abs()).clamp(min=0)

    def _scale(self, share: float) -> float:
        """Of the scores, at which this share runs."""
        return float((self._knots(share) * self.log_scales).sum().exp())

    def curves(self) -> dict[str, Tensor]:
        """The biases, and the targets they are moved towards; 0 and 1 where a layer has no gate."""
        bias_L, target_L = torch.zeros(self.num_layers), torch.ones(self.num_layers)
        for layers, bias, target in zip(self._layers, self.bias, self.targets, strict=True):
            bias_L[layers], target_L[layers] = bias, target
        return {"bias": bias_L, "share_target": target_L}

    def steer(self, policy: Policy) -> None:
        """Sets the bias of each gate of the policy, which no optimizer then moves."""
        if policy.num_layers != self.num_layers:
            raise ValueError(f"target_share is for {self.num_layers} layers and the model has {policy.num_layers}")
        aim = policy.gate_of_layer, policy.share_profile(self.outer)
        if aim != self._aimed_at:
            is_first = self._aimed_at is None
            self._set_targets(*aim)
            fits = len(self.bias) == len(self.targets)
            if is_first and not fits and self.num_updates > 0:
                raise ValueError(
                    f"the state that was loaded is of {len(self.bias)} gates and the policy has {len(self.targets)}: "
                    "load the state of this policy's run"
                )
            if not (is_first and fits):
                self._begin(len(self.targets))
            self._aimed_at = aim
        bias: Tensor = policy.bias.requires_grad_(False)  # pyright: ignore[reportAssignmentType, reportCallIssue]
        values = policy.open_bias + self.bias
        if isinstance(bias, DTensor):  # sharded weights
            values = distribute_tensor(values.to(bias.device), bias.device_mesh, bias.placements)
        bias.copy_(values)
