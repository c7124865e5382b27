"""The seam for who skips: one class a policy, found by name or by `package.module:Class`.

N packed tokens, L layers, B sequences, T columns.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from midskip.nn.layout import Layout
from midskip.plugins import load_class

BUILT_IN = {"dense": "midskip.policies.dense:Dense", "middle_out": "midskip.policies.middle_out:MiddleOut"}


@dataclass(frozen=True, eq=False)
class Decision:
    """Which tokens run a layer, and how much.

    Attributes:
        keep_N: bool [N], True where the token is present; None means all are.
        output_gate_N: float32 [N] in [0, 1], factor of what the layer adds; None means 1. Read only where kept.
        key_gate_N: float32 [N], above 0 and up to 1, factor of the token's key; None means 1. Read only where kept,
            and only with `keys="gated"`.

    A policy that keeps the same tokens in two layers returns the same tensor `keep_N`, best the same `Decision`:
    what follows from it (rows, positions, angles) is then worked out once.
    """

    keep_N: Tensor | None = None
    output_gate_N: Tensor | None = None
    key_gate_N: Tensor | None = None


class Policy(nn.Module):
    """Decides, layer by layer, which tokens run. Subclass it and give the path of the class as `config.policy`.

    A decision about a token may use that token's hidden state and the past, never a later token or another
    sequence. `midskip.testing.check_policy` runs the laws on it.

    Args:
        num_layers: L.
        width: D, of the hidden states.
        initializer_range: standard deviation of the model's weights at the start.
        settings: the policy's own, from `config.policy_settings`, as keyword arguments.
    """

    def __init__(self, num_layers: int, width: int, initializer_range: float = 0.02):
        super().__init__()
        self.num_layers, self.width, self.initializer_range = num_layers, width, initializer_range

    def reset_parameters(self, init: Any = nn.init) -> None:
        """Set the starting values of the policy's own parameters, through `init` (`torch.nn.init`, or transformers'
        own, which leaves alone what a checkpoint has set). Linear layers inside a policy need none of it."""

    def forward(self, layer: int, h_ND: Tensor, state: dict[str, Any], layout: Layout) -> Decision:
        """`decide`, as a module call, so that hooks (meters, sharded weights) see it."""
        return self.decide(layer, h_ND, state, layout)

    def decide(self, layer: int, h_ND: Tensor, state: dict[str, Any], layout: Layout) -> Decision:
        """Who runs layer `layer`.

        Args:
            layer: 0 to L - 1, called in this order in every forward pass.
            h_ND: hidden states that enter the layer, of all valid tokens.
            state: a dict that is empty at the first layer of a forward pass and the policy's own until its end.
                `state["depth_scores"]`, if set, is a list of [N] tensors that the model returns as
                `output.depth_scores` [len, B, T].
            layout: who the N rows are.
        """
        raise NotImplementedError

    def flops(self, layer: int, state: dict[str, Any], layout: Layout) -> int:
        """FLOPs of the matrix products that `decide`, just called with the same arguments, has cost."""
        return 0


def build_policy(path: str, num_layers: int, width: int, initializer_range: float, settings: dict) -> Policy:
    """Build the policy that a configuration names.

    Raises:
        ValueError: an unknown policy, or a setting that it does not know.
    """
    policy = load_class(BUILT_IN.get(path, path), Policy, "policy", tuple(BUILT_IN))
    signature = inspect.signature(policy)
    known = [name for name in signature.parameters if name not in ("num_layers", "width", "initializer_range")]
    for name in settings:
        if name not in known:
            raise ValueError(
                f"policy {path!r} does not know the setting {name!r}; it knows {', '.join(map(repr, known)) or 'none'}"
            )
    return policy(num_layers, width, initializer_range, **settings)
