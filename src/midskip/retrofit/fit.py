"""Skip paths and routers in closed form, without a gradient.

N packed tokens, D width, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle, pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from midskip.budget.monitor import temporary_limits
from midskip.cost import meter
from midskip.data.labelled import Items
from midskip.data.progress import progress_bar
from midskip.evaluate import batch_of, evaluate, in_evaluation
from midskip.model.modeling import MidskipForCausalLM
from midskip.model.skip_path import SkipPath, normalized
from midskip.names import check_one_of
from midskip.retrofit.moments import Moments
from midskip.retrofit.watch import Seen, look

SHARES = (0.9, 0.75, 0.6)  # of block-tokens that run, under which the model's own states are looked at
NEVER = 1e4  # a bias at which no token runs; at minus this, all do
SMALLEST_COST = 1e-4  # nats
ORDERS = ("loss", "influence", "adjacent")
REACH = 12.0  # of the logs of scales
CLOSE, MOST_POINTS = 0.04, 14  # shares of neighbouring points where a scale is looked for, and how many there may be


@dataclass
class FitReport:
    """What the fit found.

    Attributes:
        layers: that may be skipped, or at which a token may leave for a span.
        error: for each, the mean square that its map leaves of what is to be added, as a share of it; not of an order.
        predictable: for each, the share of the variance (R squared) of the log of that error that its router explains.
        cost: for each, how much the loss rises in nats if all tokens skip it, or leave there, and take its map; of an
            order, the loss after each.
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
    model: MidskipForCausalLM, windows: Items, *, choice: str = "tokens", order: str = "loss", outer: int = 0,
    share: float = 0.75, ridge: float = 1e-3, refits: int = 1, num_cost_windows: int = 3, batch_size: int = 4,
    progress: bool = False,
) -> FitReport:  # fmt: skip
    """Fit the skip paths and the routers of a model that does not skip yet.

    First on the states of the model as it is: the path of each layer by ridge regression on what the layer adds; then
    the router, by regression of the log of what the path gets wrong of a token. A token runs a layer if that,
    weighed by what the layer's removal costs, is above one threshold, the same for all layers. Then, `refits` times,
    both again on the states of the model that skips, under several shares, with what the layer adds to these states.
    The rest of the model stays as it is.

    Where tokens stay away for a span of layers (`middle_out`, `early_exit`) one path stands for the span. It is fitted
    to lead to the state that the token has behind the span in the model as it is, and what leaving costs is taken for
    each layer of the span.

    With `choice="layers"` a layer is left out for all tokens or for none, the baseline. The paths are the same.

    Args:
        model: with a policy that `has_linear_gates` (`independent` or `early_exit` with `router: linear`, `middle_out`
            with `scores: linear`), and skip paths that are linear or of low rank.
        windows: text, as `evaluate` takes it.
        choice: `"tokens"` or `"layers"`.
        order: which layers are left out first. `"loss"`: the one without which the loss is lowest, then the one without
            which it is lowest beside it, and so on. `"adjacent"`: the same among the neighbours of those that are left
            out. `"influence"`: the one whose input and output point most nearly the same way (1 minus the mean of their
            cosines, as ShortGPT's block influence).
        outer: first layers that every token runs, and of `middle_out` as many last ones; `independent` has its own.
        share: of the block-tokens that run as the model is left; other budgets need `midskip calibrate`.
        ridge: penalty of the regressions, as a share of the mean square of each feature.
        refits: passes over the states of the model that skips.
        num_cost_windows: of `windows`, on which the loss without each layer is measured.
        batch_size: windows of a forward pass.
        progress: show bars in a terminal, and a line now and then elsewhere.

    Raises:
        ValueError: no window; another policy, kind of skip path, choice or order; a share out of range.
    """
    check_one_of("choice", choice, ("tokens", "layers"))
    check_one_of("order", order, ORDERS)
    if not len(windows):
        raise ValueError("there is no window to fit on: give more text")
    fitting = _Fit(model, windows, outer, ridge, batch_size, progress)
    if choice == "layers" and fitting.has_spans:
        raise ValueError("choice is 'layers'; expected 'tokens', since skip paths of this policy stand for spans")
    if not fitting.lowest_share < share < 1:
        raise ValueError(
            f"share is {share!r}; expected a share of the blocks above {fitting.lowest_share:.3g}, below 1"
        )
    with temporary_limits(model), in_evaluation(model):
        model.model.policy.set_limits(0.0)
        fitting.paths(refit=False)
        some = [windows[row * len(windows) // num_cost_windows] for row in range(num_cost_windows)]
        if choice == "layers":
            fitting.leave_out(some, order)
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
    def __init__(
        self, model: MidskipForCausalLM, windows: Items, outer: int, ridge: float, batch_size: int, progress: bool
    ):
        policy, paths = model.model.policy, model.model.skip_paths
        if not policy.has_linear_gates:
            raise ValueError(
                f"the policy is {model.config.policy!r} with {model.config.policy_settings}; a fit needs linear gates: "
                "'independent' or 'early_exit' with {'router': 'linear'}, or 'middle_out' with {'scores': 'linear'}"
            )
        if model.config.skip_path not in ("linear", "low_rank"):
            raise ValueError(
                f"skip_path is {model.config.skip_path!r}; only 'linear' and 'low_rank' can be fitted without a "
                "gradient"
            )
        self.model, self.policy, self.windows, self.ridge = model, policy, windows, ridge
        self.batch_size, self.progress = batch_size, progress
        self.layers = [layer for layer in policy.skip_path_layers if layer >= outer]
        self.gate = {layer: gate for layer in self.layers if (gate := policy.gate_of_layer[layer]) is not None}
        self.span = {layer: policy.skip_path_end(layer) - layer for layer in self.layers}
        self.has_spans = set(self.span.values()) != {1}
        self.path = {layer: _checked(paths[str(layer)]) for layer in self.layers}
        self.report = FitReport(self.layers)
        closed = {other for layer in self.layers for other in range(layer, layer + self.span[layer])}
        self.lowest_share = 1 - len(closed) / policy.num_layers
        self.score_scales: tuple[float, ...] = (0.0,)  # under which the states are looked at
        self.router: dict[int, tuple[Tensor, Tensor]] = {}
        self.mean_error: dict[int, float] = {}

    def paths(self, refit: bool) -> None:
        """Regress what is to be added; in a refit what the path gets wrong of it, of tokens that take it."""
        width = self.model.config.hidden_size
        moments = {layer: Moments(width, width) for layer in self.layers}
        of_all = {layer: Moments(width, 1) for layer in self.layers} if refit else moments

        def seen(layer: int, h_MD: Tensor, added_MD: Tensor, taking_M: Tensor | None) -> None:
            path = self.path[layer]
            z_MD, rms_M1 = normalized(h_MD, path.eps)
            if refit:
                of_all[layer].add(z_MD, rms_M1)
                if taking_M is None:
                    return
                added_MD = added_MD - path(h_MD)
                z_MD, rms_M1, added_MD = z_MD[taking_M], rms_M1[taking_M], added_MD[taking_M]
            moments[layer].add(z_MD, added_MD / rms_M1)

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

        def seen(layer: int, h_MD: Tensor, added_MD: Tensor, taking_M: Tensor | None) -> None:
            path = self.path[layer]
            z_MD, rms_M1 = normalized(h_MD, path.eps)
            error_M1 = ((added_MD - path(h_MD)) / rms_M1).float().square().mean(1, keepdim=True)
            wrong[layer] += error_M1.sum().item()
            added[layer] += (added_MD / rms_M1).float().square().mean(1).sum().item()
            moments[layer].add(z_MD, error_M1.clamp(min=1e-12).log())

        self._look("Fitting routers", seen, every=2)
        self.report.error = [wrong[layer] / max(added[layer], 1e-30) for layer in self.layers]
        self.report.num_tokens = moments[self.layers[0]].num_tokens
        self.report.predictable = []
        for layer in self.layers:
            self.router[layer] = moments[layer].solve(self.ridge)
            self.report.predictable.append(moments[layer].explained(*self.router[layer]).item())
            self.mean_error[layer] = (moments[layer].cross[-1, 0] / moments[layer].num_tokens).item()

    def costs(self, windows: Items) -> None:
        """Measure the loss when all tokens skip a layer, or leave there, for each layer in turn."""
        whole = self._loss_without((), windows)
        for layer in progress_bar(self.layers, "Leaving out layers", self.progress):
            self.report.cost.append(self._loss_without((layer,), windows) - whole)

    def leave_out(self, windows: Items, order: str) -> None:
        """Find which layers to leave out first, and let the biases say so."""
        gone: list[int] = []
        influence = self._influences() if order == "influence" else {}
        for _ in progress_bar(self.layers, "Leaving out layers", self.progress):
            left = [layer for layer in self.layers if layer not in gone]
            if influence:
                left = [min(left, key=influence.__getitem__)]
            elif order == "adjacent" and gone:
                left = [layer for layer in left if {layer - 1, layer + 1} & set(gone)]
            losses = {layer: self._loss_without((*gone, layer), windows) for layer in left}
            gone.append(min(losses, key=losses.__getitem__))
            self.report.cost.append(losses[gone[-1]])
        self._open_all()
        for place, layer in enumerate(gone):
            self.policy.bias[self.gate[layer]] = -place * min(0.5, 10 / len(gone))  # within `REACH`
        self.report.order = gone

    def _influences(self) -> dict[int, float]:
        """Of each layer, the sum over tokens of 1 minus the cosine of its input and output."""
        found = dict.fromkeys(self.layers, 0.0)

        def seen(layer: int, h_MD: Tensor, added_MD: Tensor, taking_M: Tensor | None) -> None:
            found[layer] += (1 - F.cosine_similarity(h_MD, h_MD + added_MD)).double().sum().item()

        self._look("Comparing inputs and outputs", seen, every=2)
        return found

    def _open_all(self) -> None:
        """Every gate open, whatever the token."""
        for gate in range(len(self.policy.bias)):
            self.policy.set_linear_gate(gate, torch.zeros(self.policy.width), -NEVER)

    def _loss_without(self, layers: Sequence[int], windows: Items) -> float:
        """The loss when all tokens skip these layers, or leave there, and take their paths."""
        self._open_all()
        self.policy.set_limits(1.0)
        for layer in layers:
            self.policy.bias[self.gate[layer]] = NEVER
        return evaluate(self.model, windows, batch_size=self.batch_size)["loss"]

    def routers(self) -> None:
        """Write the regressions into the policy, each layer weighed by its cost, that of a span by its length."""
        self._open_all()
        for layer, cost in zip(self.layers, self.report.cost, strict=True):
            weight_1D, constant_1 = self.router[layer]
            weight = math.log(max(cost, SMALLEST_COST) / self.span[layer])
            bias = self.mean_error[layer] - constant_1.item() - weight
            self.policy.set_linear_gate(self.gate[layer], weight_1D[0], bias)

    def scales(self) -> None:
        """Under which scales of the scores to look at the states of the model that skips."""
        self.score_scales = tuple(self._scales_for(SHARES, max(1, self.batch_size // 2)))

    def settle(self, share: float) -> None:
        """Move the biases so that this share runs."""
        (score_scale,) = self._scales_for((share,), self.batch_size)
        self.policy.bias.add_(math.log(score_scale))

    def _scales_for(self, shares: Sequence[float], count: int) -> list[float]:
        """Read off straight lines between points, measured on so many windows, that lie close around each share."""
        rows = range(min(count, len(self.windows)))
        windows = [self.windows[row * len(self.windows) // len(rows)] for row in rows]
        found = {at: self._share(at, windows) for at in (-REACH, REACH)}
        shares = [min(max(share, found[REACH]), found[-REACH]) for share in shares]
        for _ in range(MOST_POINTS):
            gap, middle = max(
                (found[low] - found[high], (low + high) / 2)
                for low, high in pairwise(sorted(found))
                if any(found[high] <= share <= found[low] for share in shares)
            )
            if gap < CLOSE:
                break
            found[middle] = self._share(middle, windows)
        logs = sorted(found, reverse=True)
        rising = np.maximum.accumulate([found[at] for at in logs])
        return np.exp(np.interp(shares, rising, logs)).tolist()

    def _share(self, log_scale: float, windows: Items) -> float:
        """Of block-tokens, that run under a scale."""
        self.policy.set_limits(math.exp(log_scale))
        with meter(self.model) as work:
            for start in range(0, len(windows), self.batch_size):
                self.model.model(**self._given(windows, start), use_cache=False)
        self.policy.set_limits(1.0)
        return work.executed_share

    def _look(self, title: str, seen: Seen, every: int = 1) -> None:
        """A pass over all windows, or some of their batches, each under the next of `score_scales`."""
        starts = range(0, len(self.windows), every * self.batch_size)
        for start, score_scale in zip(progress_bar(starts, title, self.progress), cycle(self.score_scales)):
            self.policy.set_limits(score_scale)
            look(self.model, self._given(self.windows, start), self.layers, seen)
        self.policy.set_limits(1.0)

    def _given(self, windows: Items, start: int) -> dict[str, Tensor]:
        """A batch, as the model takes it."""
        batch = batch_of(windows, range(start, min(start + self.batch_size, len(windows))), self.model.device)
        return {name: x for name, x in batch.items() if name not in ("labels", "group")}


def _checked(path: nn.Module) -> SkipPath:
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
