"""Leave and never return: a token that has left skips all layers to come.

N packed tokens, M of them that have not left, L layers.
"""

from typing import Any

import torch
from torch import Tensor, nn

from midskip.distributed import sum_over_ranks
from midskip.model.packing import PackedBatch
from midskip.names import check_one_of
from midskip.policies.base import check_counts, check_shares
from midskip.policies.decision import Decision
from midskip.policies.scored import ScoredPolicy, uniform

SCORES = ("predicted_loss", "straight_through")
ERROR_WEIGHT = 0.1  # of the router's squared error
MEMORY = 0.5  # of a layer's mean exit loss, from one time that it has its turn to the next


class EarlyExit(ScoredPolicy):
    """A token leaves before the first layer l in which its router's number r(i, l) does not lie above the bias b.

    With `scores="predicted_loss"` r(i, l) is the loss, in nats, that the token's prediction is expected to have if it
    leaves there: a running mean of the layer's, and what the router adds to it. In each step the tokens present in one
    layer, another in each step, are predicted from through the last norm and the head; the router learns to tell that
    loss, by its squared error, and the blocks learn to make it small (an exit loss, as in LayerSkip, arXiv
    2404.16710). A token leaves where little is left to gain, and one number b serves all layers. With
    `scores="straight_through"` r learns by the surrogate gradient of `Decision.hard`, and each layer has a bias of its
    own.

    Args:
        scores: `"predicted_loss"`, which needs the regularizer `target_share`, or `"straight_through"`.
        exit_loss: weight of the exit loss; 0: blocks do not learn from it. Of `"predicted_loss"` alone.
        exit_share: of the tokens present in the layer that has its turn, the share, drawn anew in each step, that are
            predicted from; in (0, 1]. Predicting costs a head each. Of `"predicted_loss"` alone.
        layer_dropout: in training a token leaves before layer l of its own accord with a chance of this times
            l / (L - 1), as LayerSkip's layer dropout, but for the token and not for the sequence.
        router: `"bottleneck"` or `"linear"`.
        first_tokens: positions at the beginning of each sequence whose tokens never leave but by `layer_dropout`.
    """

    counts_steps = True

    def __init__(
        self, num_layers: int, width: int, initializer_range: float = 0.02, scores: str = "predicted_loss",
        exit_loss: float | None = None, exit_share: float = 1.0, layer_dropout: float = 0.0, router: str = "bottleneck",
        first_tokens: int = 0,
    ):  # fmt: skip
        check_one_of("scores", scores, SCORES)
        self.predicts = scores == "predicted_loss"
        if exit_loss is not None and not self.predicts:
            raise ValueError(f"exit_loss is {exit_loss!r}, of scores 'predicted_loss': leave it out")
        gates = (0,) * num_layers if self.predicts else tuple(range(num_layers))
        super().__init__(num_layers, width, initializer_range, gates, num_layers, router, not self.predicts)
        self.exit_loss = 0.1 if exit_loss is None else exit_loss
        for name, value in (("exit_loss", self.exit_loss), ("layer_dropout", layer_dropout)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ValueError(f"{name} is {value!r}; expected a number from 0 to 1")
        check_shares(exit_share=exit_share)
        check_counts(first_tokens=first_tokens)
        self.exit_share, self.first_tokens = exit_share, first_tokens
        self.layer_dropout = layer_dropout
        self.needs_target_share = self.predicts
        self.needs_midskip_trainer = self.predicts or layer_dropout > 0  # whose draw goes by the step
        self.mean_L = nn.Buffer(torch.zeros(num_layers)) if self.predicts else None
        self._new: Tensor | None = None  # sum and count of exit losses in passes not absorbed yet

    def reset_parameters(self, init: Any = nn.init) -> None:
        super().reset_parameters(init)
        if self.mean_L is not None:
            init.zeros_(self.mean_L)

    def skip_path_end(self, layer: int) -> int:
        return self.num_layers

    def share_profile(self, outer: int) -> list[float | None]:
        last = max(1, self.num_layers - 1 - outer)
        depths = [None if layer < outer else (layer - outer) / last for layer in range(self.num_layers)]
        return [depth and 0.0 for depth in depths] if self.predicts else depths

    def decide(self, layer: int, h_ND: Tensor, state: dict[str, Any], batch: PackedBatch) -> Decision:
        if layer == 0:
            state["step"] = int(self.num_steps) if self.training else 0  # on a GPU the host waits for it
        before: Decision | None = state.get("decision")
        if self.max_layers is not None and layer >= self.max_layers:
            nobody_N = torch.zeros(len(h_ND), dtype=torch.bool, device=h_ND.device)
            state["decision"] = Decision(nobody_N, skip_path_N=self._leaving(before, nobody_N))
            return state["decision"]
        indices_N = None if before is None else batch.keep(before.keep_N).indices_N
        state["scored"] = indices_N
        x_MD = h_ND if indices_N is None else h_ND.index_select(0, indices_N)
        if self.training and self.predicts and layer == state["step"] % self.num_layers:
            state["exit"] = (x_MD, indices_N) if self.exit_share == 1 else self._some(h_ND, before, state, batch)
        readiness_N = self.readiness(self._number(layer, x_MD), self.gate_of_layer[layer] or 0)
        if indices_N is not None:
            readiness_N = readiness_N.new_ones(len(h_ND)).index_copy(0, indices_N, readiness_N)
        if self.first_tokens:
            stays_N = batch.position_N < self.first_tokens
            if before is not None and before.keep_N is not None:  # not those that left by `layer_dropout`
                stays_N = stays_N & before.keep_N
            readiness_N = torch.where(stays_N, 0, readiness_N)
        keep_N = readiness_N < 1
        if self.training and self.layer_dropout and layer:
            rate = self.layer_dropout * layer / (self.num_layers - 1)
            keep_N = keep_N & (uniform(batch, state["step"] * self.num_layers + layer) >= rate)
        leaving_N = self._leaving(before, keep_N)
        batch.count([keep_N, leaving_N])
        told_N = readiness_N.detach()
        state["decision"] = (
            Decision(keep_N, skip_path_N=leaving_N, readiness_N=told_N)
            if self.predicts
            else Decision.hard(keep_N, 1 - readiness_N, leaving_N, told_N)
        )
        return state["decision"]

    def _leaving(self, before: Decision | None, keep_N: Tensor) -> Tensor | None:
        """Who takes the skip path, which stands for all layers from here on."""
        return (before or Decision()).leaving(keep_N) if self.has_skip_paths else None

    def _some(
        self, h_ND: Tensor, before: Decision | None, state: dict[str, Any], batch: PackedBatch
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states of a drawn share of the tokens present, and whose they are; None: those of all tokens."""
        keep_N = uniform(batch, state["step"]) < self.exit_share
        if before is not None and before.keep_N is not None:
            keep_N = keep_N & before.keep_N
        indices_N = batch.keep(keep_N).indices_N
        return (h_ND if indices_N is None else h_ND.index_select(0, indices_N)), indices_N

    def asks(self, state: dict[str, Any]) -> tuple[Tensor, Tensor | None] | None:
        if "exit" not in state:
            return None
        x_MD, indices_N = state["exit"]
        return (x_MD if self.exit_loss else x_MD.detach()), indices_N

    def objective(self, state: dict[str, Any], nats_N: Tensor, scored_N: Tensor, asked_nats_M: Tensor) -> Tensor | None:
        if not self.predicts:
            return None
        reached = torch.stack([0 * each.sum() for each in self.routers.parameters()]).sum()  # all have a gradient
        if "exit" not in state:
            return reached
        x_MD, indices_N = state["exit"]
        weight_M = (scored_N if indices_N is None else scored_N.index_select(0, indices_N)).to(nats_N.dtype)
        count = weight_M.sum()
        weight_M = weight_M / count.clamp(min=1)
        error = self._number(state["step"] % self.num_layers, x_MD) - asked_nats_M.detach()
        error = (error.square() * weight_M).sum()
        mean = ((asked_nats_M if self.exit_loss else asked_nats_M.detach()) * weight_M).sum()
        new = torch.stack([mean.detach() * count, count])
        self._new = new if self._new is None else self._new + new
        return reached + ERROR_WEIGHT * error + self.exit_loss * mean

    def _number(self, layer: int, x_MD: Tensor) -> Tensor:
        number_M = self.routers[layer](x_MD.detach())
        return number_M if self.mean_L is None else number_M + self.mean_L[layer].to(number_M.dtype)

    @torch.no_grad()
    def absorb(self) -> None:
        layer = int(self.num_steps) % self.num_layers
        super().absorb()
        if self.mean_L is None or self._new is None:
            return
        sum_over_ranks(self._new)
        count, before = self._new[1], self.mean_L[layer].clone()
        mean = (self._new[0] / count.clamp(min=1)).to(before)
        moved = torch.where(before == 0, mean, MEMORY * before + (1 - MEMORY) * mean)  # 0 before the first
        self.mean_L[layer] = torch.where(count > 0, moved, before)  # nobody reached the layer: nothing is known
        self._new = None

    def flops(self, layer: int, state: dict[str, Any], batch: PackedBatch) -> int:
        if self.max_layers is not None and layer >= self.max_layers:
            return 0
        indices_N = state["scored"]
        return self.router_flops(layer) * (batch.num_tokens if indices_N is None else len(indices_N))
