"""Skip paths and routers in closed form, without a gradient.

N packed tokens, D width, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from midskip.data.labelled import Items
from midskip.data.progress import progress_bar
from midskip.evaluate import batch_of, evaluate, limits_kept
from midskip.model.modeling import MidskipForCausalLM
from midskip.model.skip_path import SkipPath, normalized
from midskip.policies.independent import Independent
from midskip.policies.scored import Router
from midskip.retrofit.moments import Moments
from midskip.retrofit.watch import Watch

SHARES = (0.9, 0.75, 0.6)  # of block-tokens that run, under which the model's own states are looked at
NEVER = 1e4  # a bias at which no token runs; at minus this, all do
SMALLEST_COST = 1e-4  # nats


@dataclass
class FitReport:
    """What the fit found.

    Attributes:
        layers: that may be skipped.
        error: for each, the mean square that its map leaves of what the layer adds, as a share of it.
        predictable: for each, the share of the variance (R squared) of the log of that error that its router explains.
        cost: for each, how much the loss rises in nats if all tokens skip it and take its map; of an order, the loss
            after each.
        order: with `choice="layers"`, which are left out first.
        num_tokens: on which the routers were fitted; the paths are fitted on twice as many.
    """

    layers: list[int]
    error: list[float] = field(default_factory=list)
    predictable: list[float] = field(default_factory=list)
    cost: list[float] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    num_tokens: int = 0


@torch.no_grad()
def fit(
    model: MidskipForCausalLM, windows: Items, *, choice: str = "tokens", share: float = 0.75, ridge: float = 1e-3,
    refits: int = 1, num_cost_windows: int = 3, batch_size: int = 4, progress: bool = False,
) -> FitReport:  # fmt: skip
    """Fit the skip paths and the routers of a model that does not skip yet.

    First on the states of the model as it is: the path of each layer by ridge regression on what the layer adds; then
    the router, by regression of the log of what the path gets wrong of a token. A token runs a layer if that,
    weighed by what the layer's removal costs, is above one threshold, the same for all layers. Then, `refits` times,
    both again on the states of the model that skips, under several shares, with what the layer adds to these states.
    The rest of the model stays as it is.

    With `choice="layers"` a layer is left out for all tokens or for none, the baseline: the one whose
    removal costs least first, then the one that costs least beside it, and so on. The paths are the same.

    Args:
        model: with the policy `independent`, a linear router, and skip paths that are linear or of low rank.
        windows: text, as `evaluate` takes it.
        choice: `"tokens"` or `"layers"`.
        share: of the block-tokens that run as the model is left; other budgets need `midskip.calibrate`.
        ridge: penalty of the regressions, as a share of the mean square of each feature.
        refits: passes over the states of the model that skips.
        num_cost_windows: of `windows`, on which the loss without each layer is measured.
        batch_size: windows of a forward pass.
        progress: show bars in a terminal.

    Raises:
        ValueError: another policy or kind of skip path, or a share out of range.
    """
    fitting = _Fit(model, windows, ridge, batch_size, progress)
    if not fitting.lowest_share < share < 1:
        raise ValueError(
            f"share is {share!r}; expected a share of the blocks above {fitting.lowest_share:.3g}, below 1"
        )
    with limits_kept(model):
        model.model.policy.set_limits(0.0)
        fitting.paths(refit=False)
        some = [windows[row * len(windows) // num_cost_windows] for row in range(num_cost_windows)]
        if choice == "layers":
            fitting.order(some)
        else:
            fitting.errors()
            fitting.costs(some)
            fitting.routers()
        for _ in range(refits):
            fitting.scales()
            fitting.paths(refit=True)
            if choice == "tokens":
                fitting.errors()
                fitting.routers()
        fitting.settle(share)
    return fitting.report


class _Fit:
    def __init__(self, model: MidskipForCausalLM, windows: Items, ridge: float, batch_size: int, progress: bool):
        policy, paths = model.model.policy, model.model.skip_paths
        if not isinstance(policy, Independent) or policy.routers[0].out is not None:
            raise ValueError(
                f"the policy is {model.config.policy!r} with {model.config.policy_settings}; a fit needs 'independent' "
                "with {'router': 'linear'}"
            )
        if model.config.skip_path not in ("linear", "low_rank"):
            raise ValueError(
                f"skip_path is {model.config.skip_path!r}; only 'linear' and 'low_rank' can be fitted without a "
                "gradient"
            )
        self.model, self.policy, self.windows, self.ridge = model, policy, windows, ridge
        self.batch_size, self.progress = batch_size, progress
        self.layers: Sequence[int] = policy.skip_path_layers
        self.path = {layer: _checked(paths[str(layer)]) for layer in self.layers}
        self.report = FitReport(list(self.layers))
        self.lowest_share = 1 - len(self.layers) / policy.num_layers
        self.score_scales: tuple[float, ...] = (0.0,)  # under which the states are looked at
        self.router: dict[int, tuple[Tensor, Tensor]] = {}
        self.mean_error: dict[int, float] = {}

    def paths(self, refit: bool) -> None:
        """Regress what each layer adds; in a refit what the path gets wrong of it, of tokens that skip."""
        width = self.model.config.hidden_size
        moments = {layer: Moments(width, width) for layer in self.layers}
        of_all = {layer: Moments(width, 1) for layer in self.layers} if refit else moments

        def seen(layer: int, h_ND: Tensor, added_ND: Tensor, keep_N: Tensor | None) -> None:
            path = self.path[layer]
            z_ND, rms_N1 = normalized(h_ND, path.eps)
            if refit:
                of_all[layer].add(z_ND, rms_N1)
                if keep_N is None:
                    return
                added_ND = added_ND - path(h_ND)
                z_ND, rms_N1, added_ND = z_ND[~keep_N], rms_N1[~keep_N], added_ND[~keep_N]
            moments[layer].add(z_ND, added_ND / rms_N1)

        self._look("Fitting paths", seen)
        for layer, path in self.path.items():
            if not moments[layer].num_tokens:
                continue
            weight_DD, constant_D = moments[layer].solve(self.ridge, of_all[layer])
            if refit:
                whole = path.weight.double() if path.down is None else path.weight.double() @ path.down.double()
                weight_DD, constant_D = weight_DD + whole.cpu(), constant_D + path.bias.double().cpu()
            _set(path, weight_DD, constant_D, of_all[layer].gram)

    def errors(self) -> None:
        """Regress the log of what each path gets wrong."""
        moments = {layer: Moments(self.model.config.hidden_size, 1) for layer in self.layers}
        wrong, added = dict.fromkeys(self.layers, 0.0), dict.fromkeys(self.layers, 0.0)

        def seen(layer: int, h_ND: Tensor, added_ND: Tensor, keep_N: Tensor | None) -> None:
            path = self.path[layer]
            z_ND, rms_N1 = normalized(h_ND, path.eps)
            error_N1 = ((added_ND - path(h_ND)) / rms_N1).float().square().mean(1, keepdim=True)
            wrong[layer] += error_N1.sum().item()
            added[layer] += (added_ND / rms_N1).float().square().mean(1).sum().item()
            moments[layer].add(z_ND, error_N1.clamp(min=1e-12).log())

        self._look("Fitting routers", seen, every=2)
        self.report.error = [wrong[layer] / max(added[layer], 1e-30) for layer in self.layers]
        self.report.num_tokens = moments[self.layers[0]].num_tokens
        self.report.predictable = []
        for layer in self.layers:
            self.router[layer] = moments[layer].solve(self.ridge)
            self.report.predictable.append(moments[layer].explained(*self.router[layer]).item())
            self.mean_error[layer] = (moments[layer].cross[-1, 0] / moments[layer].num_tokens).item()

    def costs(self, windows: Items) -> None:
        """Measure the loss with each layer left out in turn."""
        self.policy.set_limits(1.0)
        bias_G = self.policy.bias
        bias_G.fill_(-NEVER)
        whole = self._loss(windows)
        for gate in progress_bar(range(len(bias_G)), "Leaving out layers", self.progress):
            bias_G[gate] = NEVER
            self.report.cost.append(self._loss(windows) - whole)
            bias_G[gate] = -NEVER

    def order(self, windows: Items) -> None:
        """Find which layers to leave out first, and let the biases say so."""
        self.policy.set_limits(1.0)
        for router in self.policy.routers:
            assert isinstance(router, Router)
            router.weight.zero_()
        bias_G, gone = self.policy.bias, []
        bias_G.fill_(-NEVER)
        for _ in progress_bar(range(len(bias_G)), "Leaving out layers", self.progress):
            losses = {}
            for gate in range(len(bias_G)):
                if gate not in gone:
                    bias_G[gate] = NEVER
                    losses[gate] = self._loss(windows)
                    bias_G[gate] = -NEVER
            gone.append(min(losses, key=losses.__getitem__))
            self.report.cost.append(losses[gone[-1]])
            bias_G[gone] = NEVER
        bias_G.fill_(-NEVER)
        for place, gate in enumerate(gone):
            bias_G[gate] = -place / 2
        self.report.order = [self.layers[gate] for gate in gone]

    def routers(self) -> None:
        """Write the regressions into the policy, each layer weighed by its cost."""
        for gate, layer in enumerate(self.layers):
            weight_1D, constant_1 = self.router[layer]
            router = self.policy.routers[gate]
            assert isinstance(router, Router)
            router.weight.copy_(weight_1D)
            cost = max(self.report.cost[gate], SMALLEST_COST)
            self.policy.bias[gate] = self.mean_error[layer] - constant_1.item() - math.log(cost)

    def scales(self) -> None:
        """Under which scales of the scores to look at the states of the model that skips."""
        self.score_scales = tuple(self._scales_for(SHARES))

    def settle(self, share: float) -> None:
        """Move the biases so that this share runs."""
        (score_scale,) = self._scales_for((share,))
        self.policy.bias.add_(math.log(score_scale))

    def _scales_for(self, shares: Sequence[float]) -> list[float]:
        """By bisection, on a few windows."""
        count = min(max(1, self.batch_size // 2), len(self.windows))
        windows = [self.windows[row * len(self.windows) // count] for row in range(count)]
        found = []
        for share in shares:
            low, high = -12.0, 12.0
            for _ in range(9):
                middle = (low + high) / 2
                self.policy.set_limits(math.exp(middle))
                is_above = evaluate(self.model, windows, batch_size=self.batch_size)["executed_share"] > share
                low, high = (middle, high) if is_above else (low, middle)
            found.append(math.exp((low + high) / 2))
        self.policy.set_limits(1.0)
        return found

    def _loss(self, windows: Items) -> float:
        return evaluate(self.model, windows, batch_size=self.batch_size)["loss"]

    def _look(self, title: str, seen: Any, every: int = 1) -> None:
        """A pass over all windows, or some of their batches, each under the next of `score_scales`."""
        starts = range(0, len(self.windows), every * self.batch_size)
        with _in_evaluation(self.model), Watch(self.model, self.layers, seen):
            for start, score_scale in zip(progress_bar(starts, title, self.progress), cycle(self.score_scales)):
                self.policy.set_limits(score_scale)
                rows = range(start, min(start + self.batch_size, len(self.windows)))
                batch = batch_of(self.windows, rows, self.model.device)
                given = {name: x for name, x in batch.items() if name not in ("labels", "group")}
                self.model.model(**given, use_cache=False)
        self.policy.set_limits(1.0)


def _checked(path: Any) -> SkipPath:
    assert isinstance(path, SkipPath)
    return path


def _set(path: SkipPath, weight_DD: Tensor, constant_D: Tensor, gram_EE: Tensor) -> None:
    """Set the path to this map, or to the map of its rank that is nearest on the tokens seen."""
    if path.down is not None:
        solved_ED = torch.cat([weight_DD.T, constant_D[None]])
        _, vectors_DD = torch.linalg.eigh(solved_ED.T @ gram_EE @ solved_ED)
        best_DR = vectors_DD[:, -len(path.down) :]
        path.down.copy_(best_DR.T @ weight_DD)
        weight_DD, constant_D = best_DR, best_DR @ (best_DR.T @ constant_D)
    path.weight.copy_(weight_DD)
    path.bias.copy_(constant_D)


@contextmanager
def _in_evaluation(model: MidskipForCausalLM) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
