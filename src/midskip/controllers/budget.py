"""A controller that holds a share of work. L: layers."""

import torch
from torch import Tensor

from midskip.controllers.base import Controller, floats, number
from midskip.policies.base import Policy
from midskip.policies.middle_out import MiddleOut

OPEN_BIAS = 0.1  # the budget starts where the gates of an open start do


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
        target = number("target_share", target_share, 0, 1)
        reach = number("spread", spread, 0, 1) * min(target, 1 - target)
        self.gain = number("gain", gain, 0)
        self.ramp_steps = number("ramp_steps", ramp_steps, 1)
        num_gates = (num_layers + 1) // 2
        # mirrored layers count twice, the middle one of an odd depth once: their mean is the target
        weights = floats([2.0] * (num_layers // 2) + [1.0] * (num_layers % 2))
        slope = torch.linspace(1, -1, num_gates) if num_gates > 1 else torch.zeros(1)
        slope = slope - (slope * weights).sum() / weights.sum()
        self.targets = (target + reach * slope / slope.abs().max().clamp(min=1)).clamp(0, 1)
        self.bias = torch.full((num_gates,), OPEN_BIAS / num_gates)
        self.num_updates = floats(0.0)

    def update(self, mean_L: Tensor, variance_L: Tensor, share_L: Tensor | None = None) -> None:
        """As in `Controller`; only the share is used, and must be given."""
        if share_L is None or list(share_L.shape) != [self.num_layers] or not share_L.isfinite().all():
            raise ValueError(f"share_L must be {self.num_layers} finite numbers, got {share_L}")
        self.num_updates = self.num_updates + 1
        ramp = (self.num_updates / self.ramp_steps).clamp(max=1)
        targets = 1 - (1 - self.targets) * ramp
        self.bias = self.bias + self.gain * (share_L[: len(self.bias)].detach().to("cpu", torch.float32) - targets)

    def curves(self) -> dict[str, Tensor]:
        """The biases, and the targets they are moved towards."""
        drawn = {"bias": self.bias, "share_target": self.targets}  # of the first half; the other mirrors it
        return {name: torch.cat([half, half[: self.num_layers // 2].flip(0)]) for name, half in drawn.items()}

    def steer(self, policy: Policy) -> None:
        """Sets the bias of a `MiddleOut`, and takes it out of the optimizer's hands."""
        if not isinstance(policy, MiddleOut):
            raise ValueError(f"the budget controller steers the policy 'middle_out', got {type(policy).__name__}")
        if policy.num_layers != self.num_layers:
            raise ValueError(f"the budget is for {self.num_layers} layers and the model has {policy.num_layers}")
        policy.bias.requires_grad_(False).copy_(self.bias)
