"""Sampled skips, learned by policy gradient: the loss and the cost of a token are its reward.

N packed tokens, L layers.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from midskip.model.packing import PackedBatch
from midskip.policies.decision import Decision
from midskip.policies.scored import ScoredPolicy, uniform


class Reinforce(ScoredPolicy):
    """In training a token runs layer l with probability sigmoid(r - b), drawn for it; in evaluation if r is above b.

    The return of a token is R = - nats of its prediction - cost * share of the layers that it ran. The policy's own
    loss is - (R - V) log p summed over layers, with p the probability of what was drawn, and (R - V)^2 for the
    baseline V, a router of its own that reads the embedding (REINFORCE, Williams 1992). What a token's keys are worth
    to others is not in its return.

    Args:
        cost: nats that running all layers is worth; 0 where a regularizer holds the share.
        weight: of the policy's own loss.
        router: `"bottleneck"` or `"linear"`.
    """

    counts_steps = True

    def __init__(
        self, num_layers: int, width: int, initializer_range: float = 0.02, cost: float = 0.0, weight: float = 0.1,
        router: str = "bottleneck",
    ):  # fmt: skip
        for name, value in (("cost", cost), ("weight", weight)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e6:
                raise ValueError(f"{name} is {value!r}; expected a number of at least 0")
        gates = tuple(range(num_layers))
        super().__init__(num_layers, width, initializer_range, gates, num_layers + 1, router, trains_bias=False)
        self.cost, self.weight = float(cost), float(weight)

    def decide(self, layer: int, h_ND: Tensor, state: dict[str, Any], batch: PackedBatch) -> Decision:
        number_N = self.routers[layer](h_ND.detach())
        if layer == 0 and self.training:
            step = int(self.num_steps)  # on a GPU the host waits for it, once a pass
            state.update(step=step, log_p=[], kept=[], value=self.routers[self.num_layers](h_ND.detach()))
        readiness_N = self.readiness(number_N, layer)  # below 1 where r lies above b
        if not self.training:
            return Decision(self.within(readiness_N < 1, state), readiness_N=readiness_N.detach())
        logit_N = -readiness_N.clamp(min=torch.finfo(readiness_N.dtype).tiny).log()
        draw_N = uniform(batch, state["step"] * self.num_layers + layer).to(logit_N.dtype)
        keep_N = self.within(draw_N < torch.sigmoid(logit_N), state)
        state["log_p"].append(torch.where(keep_N, F.logsigmoid(logit_N), F.logsigmoid(-logit_N)))
        state["kept"].append(keep_N)
        return Decision(keep_N)

    def objective(self, state: dict[str, Any], nats_N: Tensor, scored_N: Tensor, asked_nats_M: Tensor) -> Tensor | None:
        share_N = torch.stack(state["kept"]).to(nats_N.dtype).mean(0)
        return_N = -nats_N - self.cost * share_N
        advantage_N = return_N - state["value"]
        log_p_N = torch.stack(state["log_p"]).sum(0)
        loss_N = advantage_N.square() - advantage_N.detach() * log_p_N
        return self.weight * (loss_N * scored_N).sum() / scored_N.sum().clamp(min=1)

    def flops(self, layer: int, state: dict[str, Any], batch: PackedBatch) -> int:
        num_routers = 2 if layer == 0 and self.training else 1  # the baseline is one more
        return num_routers * self.router_flops(layer) * batch.num_tokens
