"""What policies with routers share: hard gates that go by a score, whose share of tokens a bias holds.

N packed tokens, D width, L layers, G gates.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from midskip.model.packing import PackedBatch
from midskip.names import check_one_of
from midskip.policies.base import Policy
from midskip.policies.decision import Decision
from midskip.policies.difficulty import drawn
from midskip.policies.middle_out import LARGEST_EXPONENT

ROUTERS = ("linear", "bottleneck")
BOTTLENECK = 16  # hidden features of a router
OPEN_BIAS = -4.0  # at which nearly every token runs: routers start with numbers of about normal spread


class Router(nn.Module):
    """A number for each token, from its hidden state divided by its root mean square; float32 or wider.

    `linear` is w . h; `bottleneck` is a network with one hidden layer of `BOTTLENECK` features and SiLU.
    """

    def __init__(self, width: int, kind: str):
        super().__init__()
        shape = (1, width) if kind == "linear" else (BOTTLENECK, width)
        self.weight = nn.Parameter(torch.empty(shape))
        self.out = None if kind == "linear" else nn.Parameter(torch.empty(1, BOTTLENECK))

    def reset_parameters(self, init: Any) -> None:
        init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
        if self.out is not None:
            init.normal_(self.out, std=2 * BOTTLENECK**-0.5)

    def forward(self, h_ND: Tensor) -> Tensor:
        wide = torch.promote_types(h_ND.dtype, torch.float32)
        with torch.autocast(h_ND.device.type, enabled=False):
            out_NK = F.linear(F.rms_norm(h_ND.to(wide), h_ND.shape[-1:]), self.weight.to(wide))
            if self.out is not None:
                out_NK = F.linear(F.silu(out_NK), self.out.to(wide))
        return out_NK.squeeze(1)

    @property
    def flops(self) -> int:
        """Of one token."""
        return 2 * (self.weight.numel() + (0 if self.out is None else self.out.numel()))


class ScoredPolicy(Policy):
    """Hard gates: a token runs where its readiness to skip, exp(b - r), is below 1, that is, where its router's number
    r lies above the bias b of the gate. Routers read hidden states without a gradient to them.

    A subclass says in `gate_of_layer` which gate, and so which bias, each layer goes by; several layers with routers of
    their own may share one.
    """

    adjustable = True
    is_hard = True

    def __init__(
        self, num_layers: int, width: int, initializer_range: float, gate_of_layer: tuple[int | None, ...],
        num_routers: int, router: str, trains_bias: bool = True,
    ):  # fmt: skip
        super().__init__(num_layers, width, initializer_range)
        check_one_of("router", router, ROUTERS)
        self.gate_of_layer, self.open_bias = gate_of_layer, OPEN_BIAS
        self.routers = nn.ModuleList(Router(width, router) for _ in range(num_routers))
        num_gates = len({gate for gate in gate_of_layer if gate is not None})
        self.bias = nn.Parameter(torch.empty(num_gates), requires_grad=trains_bias)
        self.has_linear_gates = router == "linear" and trains_bias and num_routers == num_gates

    def reset_parameters(self, init: Any = nn.init) -> None:
        super().reset_parameters(init)
        init.constant_(self.bias, self.open_bias)
        for router in self.routers:
            router.reset_parameters(init)  # pyright: ignore[reportCallIssue]

    def share_profile(self, outer: int) -> list[float | None]:
        """The same share in all layers that have a gate, but the outer ones."""
        inner = range(outer, self.num_layers - outer)
        return [0.0 if layer in inner and gate is not None else None for layer, gate in enumerate(self.gate_of_layer)]

    def readiness(self, number_N: Tensor, gate: int) -> Tensor:
        """To skip, above 0: what is compared with 1, under the scale in force. Of what a router gave."""
        score_N = (self.bias[gate].to(number_N.dtype) - number_N).clamp(max=LARGEST_EXPONENT).exp()
        return score_N if self.score_scale == 1.0 else self.score_scale * score_N

    @torch.no_grad()
    def set_linear_gate(self, gate: int, weight_D: Tensor, bias: float) -> None:
        if not self.has_linear_gates:
            super().set_linear_gate(gate, weight_D, bias)
        self.routers[gate].weight.copy_(weight_D[None])  # pyright: ignore[reportCallIssue]
        self.bias[gate] = bias

    def within(self, keep_N: Tensor, state: dict[str, Any]) -> Tensor:
        """Those of the tokens kept that have not run `max_layers` blocks yet, and notes that these now run one."""
        if self.max_layers is None:
            return keep_N
        run_N = state.setdefault("run_N", torch.zeros_like(keep_N, dtype=torch.int64))
        keep_N = keep_N & (run_N < self.max_layers)
        state["run_N"] = run_N + keep_N
        return keep_N

    def ungated(self, state: dict[str, Any], batch: PackedBatch) -> Decision:
        """About a layer without a gate: all tokens run it, but those that have run `max_layers` blocks."""
        if self.max_layers is None:
            return Decision()
        return Decision(self.within(torch.ones_like(batch.column_N, dtype=torch.bool), state))

    def router_flops(self, index: int) -> int:
        """Of one token and one router."""
        router = self.routers[index]
        assert isinstance(router, Router)
        return router.flops

    def decision(self, keep_N: Tensor, readiness_N: Tensor) -> Decision:
        """With the surrogate gradient (`Decision.hard`)."""
        return Decision.hard(keep_N, 1 - readiness_N, None, readiness_N.detach())


DRAWN_BY = ("position", "pair", "token")


def uniform(batch: PackedBatch, seed: int, by: str = "position") -> Tensor:
    """float32 [N] in [0, 1), drawn for each token from its id, the one before it and its position, by `"pair"` not from
    the last, by `"token"` from its id alone; always the same for the same seed: what is drawn does not depend on who
    shares the batch. Without ids by position alone."""
    if batch.token_N is None:
        token_N, previous_N = batch.position_N, torch.zeros_like(batch.position_N)
    else:
        token_N, previous_N = batch.token_N, batch.previous_token_N
    if by == "token":
        previous_N = torch.zeros_like(token_N)
    elif by == "position":
        token_N = token_N + 1_000_003 * batch.position_N
    return (drawn(token_N, previous_N, seed) + 2) / 4
