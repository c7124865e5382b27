"""The interface of a policy, which decides who skips: one class each, found by name or by `package.module:Class`.

N packed tokens, L layers, B sequences, T columns.
"""

from __future__ import annotations

import inspect
import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from midskip.model.packing import PackedBatch
from midskip.names import near
from midskip.plugins import load_class
from midskip.policies.decision import Decision, problem_of

BUILT_IN = {
    "dense": "midskip.policies.dense:Dense",
    "middle_out": "midskip.policies.middle_out:MiddleOut",
    "independent": "midskip.policies.independent:Independent",
    "early_exit": "midskip.policies.early_exit:EarlyExit",
    "mixture_of_depths": "midskip.policies.mixture_of_depths:MixtureOfDepths",
    "reinforce": "midskip.policies.reinforce:Reinforce",
    "static": "midskip.policies.static:Static",
    "random": "midskip.policies.random_skips:RandomSkips",
}


class PassState(dict[str, Any]):
    """What a policy keeps during one forward pass. Hooks that move the inputs of a module to its device, as those of
    accelerate's offloading do, copy a plain dict, and what the policy writes would be lost."""

    def to(self, *_: Any, **__: Any) -> PassState:
        return self


class Policy(nn.Module):
    """Decides, layer by layer, which tokens run. Subclass it and give the path of the class as `config.policy`.

    A decision about a token may use that token's hidden state and the past, never a later token or another
    sequence. `midskip.testing.check_policy` checks it.

    Args:
        num_layers: L; with `skip_unit="sublayer"` twice the number of blocks.
        width: D, of the hidden states.
        initializer_range: standard deviation of the model's weights at the start.
        settings: the policy's own, from `config.policy_settings`, as keyword arguments.

    Attributes:
        adjustable: whether `decide` honours `score_scale` and `max_layers`; a subclass that does sets it.
        score_scale, max_layers: the limits in force, of `set_limits`; not saved.
        is_observing: whether training passes are shown to `observe`; False in all but the last of several passes over
            one batch.
        looks_back: whether `decide` reads hidden states of a token's past beside its own; a subclass that does sets it.
            A cache does not hold those, so such a model runs without one.
        is_mirrored: whether a token that skips layer l skips its mirror, layer L - 1 - l, and all between them too.
        is_hard: whether every gate is exactly 0 or 1 (see `Decision.hard`).
        skip_path_layers: layers that have a skip path in models that have any; all by default. See `skip_path_end`.
        has_skip_paths: whether the model has any; set by the model.
        has_linear_gates: whether `set_linear_gate` can be used, as a fit in closed form does.
        closed_layers: layers that no token ever runs, under no limits either: a cache holds no keys there.
        needs_midskip_trainer: whether it is trained by `absorb` or `objective`, which transformers' Trainer leaves out;
            by default whether its class defines either, or counts steps.
        counts_steps: whether it has a buffer `num_steps`, the number of optimizer steps; a subclass that needs it sets
            this, and calls `super()` where it has a `reset_parameters` or `absorb` of its own.
        needs_target_share: whether no gradient opens or closes its gates, so that the regularizer target_share has to.
        gate_of_layer: for each layer the index of the gate that it goes by, whose share of tokens a regularizer may
            set through `bias`; None where it may not. By default there is none. A policy that has some also has
            `bias`, a parameter of one number a gate: what rises with it is the readiness to skip; `open_bias`, at which
            (nearly) every token runs; and `share_profile`.
    """

    adjustable: bool = False
    looks_back: bool = False
    is_mirrored: bool = False
    is_hard: bool = False
    needs_target_share: bool = False
    counts_steps: bool = False

    def __init__(self, num_layers: int, width: int, initializer_range: float = 0.02):
        super().__init__()
        self.num_layers, self.width, self.initializer_range = num_layers, width, initializer_range
        self.score_scale, self.max_layers, self.is_observing = 1.0, None, True
        self.gate_of_layer: tuple[int | None, ...] = (None,) * num_layers
        self.skip_path_layers, self.has_skip_paths = range(num_layers), False
        self.has_linear_gates, self.open_bias = False, 0.0
        self.closed_layers: frozenset[int] = frozenset()
        own = type(self)
        learns = own.absorb is not Policy.absorb or own.objective is not Policy.objective
        self.needs_midskip_trainer = learns or self.counts_steps
        if self.counts_steps:
            self.num_steps = nn.Buffer(torch.tensor(0))

    def reset_parameters(self, init: Any = nn.init) -> None:
        """Set the starting values of the policy's own parameters and buffers, through `init` (`torch.nn.init`, or
        transformers' own, which leaves alone what a checkpoint has set). What is left out has no value at all where a
        checkpoint lacks it. Linear layers inside a policy need none of it."""
        if self.counts_steps:
            init.zeros_(self.num_steps)

    def forward(self, layer: int, h_ND: Tensor, state: dict[str, Any], batch: PackedBatch) -> Decision:
        """`decide`, as a module call, so that hooks (meters, sharded weights) see it."""
        return self.decide(layer, h_ND, state, batch)

    def decide(self, layer: int, h_ND: Tensor, state: dict[str, Any], batch: PackedBatch) -> Decision:
        """Who runs layer `layer`.

        Args:
            layer: 0 to L - 1, called in this order in every forward pass.
            h_ND: hidden states that enter the layer, of all valid tokens.
            state: a dict that is empty at the first layer of a forward pass and the policy's own until its end.
                `state["depth_scores"]`, if set, is a list of [N] tensors that the model returns as
                `output.depth_scores` [len, B, T].
            batch: who the N rows are.
        """
        raise NotImplementedError

    def observe(self, state: dict[str, Any], nats_N: Tensor, scored_N: Tensor) -> None:
        """Note how hard the text was to predict; called at the end of a pass in training with labels. Here: nothing.

        Args:
            state: that of the pass.
            nats_N: float32 or wider [N], the cross-entropy of the prediction that each token made, without gradient.
            scored_N: bool [N], False where a token made none that counts.
        """

    def absorb(self) -> None:
        """Learn from what was observed in the passes of an optimizer step; called after it, on all ranks.

        Here it counts the step, if this policy counts them. Decisions must not change between two calls.
        """
        if self.counts_steps:
            self.num_steps += 1

    def asks(self, state: dict[str, Any]) -> tuple[Tensor, Tensor | None] | None:
        """Hidden states [M, D] from which the next tokens are to be predicted too, through the last norm and the head,
        and which tokens' they are (int64 [M], None for all N); None, as here, for none. Called at the end of a pass in
        training with labels; `objective` gets the losses.
        """

    def objective(self, state: dict[str, Any], nats_N: Tensor, scored_N: Tensor, asked_nats_M: Tensor) -> Tensor | None:
        """A term of the policy's own, a scalar, which training adds to the cross-entropy; None, as here, for none.
        Called at the end of a pass in training with labels, after `observe`.

        Args:
            state, nats_N, scored_N: as in `observe`.
            asked_nats_M: float32 or wider [M], with gradients: the cross-entropy of the predictions that were asked
                for, 0 where none counts; [0] if none were.
        """

    def skip_path_end(self, layer: int) -> int:
        """The first layer that is open again to a token that takes the skip path of `layer`; L if none is. The path
        stands for the layers before it: here for `layer` alone."""
        return layer + 1

    def set_linear_gate(self, gate: int, weight_D: Tensor, bias: float) -> None:
        """From now on a token skips, or leaves, at this gate where exp(bias - weight . h / rms(h)), times the scale in
        force, is 1 or more. For policies with `has_linear_gates`.

        Raises:
            ValueError: this policy, with its settings, has no such gates.
        """
        raise ValueError(f"the policy {type(self).__name__} with its settings has no gates that are a linear map")

    def share_profile(self, outer: int) -> list[float | None]:
        """[L], how soon tokens should leave each layer, from 0 (last) to 1 (first), where a share is to be held by
        layer; None where all run, as in the `outer` first layers and those that mirror them, if there are any.

        Raises:
            ValueError: this policy has no gates that a regularizer can set.
        """
        raise ValueError(
            f"the policy {type(self).__name__} has no gates that a regularizer can set: use another regularizer, or "
            "none"
        )

    def warn_of_plain_trainer(self) -> None:
        """Warn if this policy `needs_midskip_trainer`. The model calls it in a training pass that was given
        `num_items_in_batch`, which tells transformers' Trainer from `MidskipTrainer`."""
        if self.needs_midskip_trainer:
            warnings.warn(
                f"transformers' Trainer trains the cross-entropy alone: what the policy {type(self).__name__} learns "
                "beside it, or draws anew in each step, stays as it is. `midskip train` trains both",
                stacklevel=2,
            )

    def set_limits(self, score_scale: float = 1.0, max_layers: int | None = None) -> None:
        """From now on do more or less work than as trained. Without arguments: as trained.

        A policy that is `adjustable` reads `self.score_scale` and `self.max_layers` in `decide`. The contract: with
        (1.0, None) nothing changes; with scale 0 every token runs every block with gate 1; a larger scale keeps no
        token that a smaller one sends away from the same hidden state; no token runs more blocks than `max_layers`; and
        the decision about a token still depends on that token and its past alone.

        Args:
            score_scale: what the scores, the readiness to skip, are multiplied by; at least 0.
            max_layers: the most blocks that one token may run, 1 to L; None: all of them.

        Raises:
            ValueError: a value out of range, or any limit for a policy that is not adjustable.
        """
        if not isinstance(score_scale, int | float) or isinstance(score_scale, bool) or not 0 <= score_scale < math.inf:
            raise ValueError(f"score_scale is {score_scale!r}; expected a finite number of at least 0")
        whole = isinstance(max_layers, int) and not isinstance(max_layers, bool)
        if max_layers is not None and not (whole and 1 <= max_layers <= self.num_layers):
            raise ValueError(
                f"max_layers is {max_layers!r}; expected a whole number of blocks from 1 to {self.num_layers}, or None"
            )
        if (score_scale, max_layers) != (1.0, None) and not self.adjustable:
            raise ValueError(f"the policy {type(self).__name__} has no run-time budget: its gates run as they are")
        self.score_scale, self.max_layers = float(score_scale), max_layers

    def flops(self, layer: int, state: dict[str, Any], batch: PackedBatch) -> int:
        """FLOPs of the matrix products that `decide`, just called with the same arguments, has cost."""
        return 0


def check_first_pass(policy: Policy) -> None:
    """From now on, until its first forward pass has ended, what it decides is checked; ValueError in that pass."""
    policy.register_forward_hook(_check_decision)


def _check_decision(policy: Any, arguments: tuple[Any, ...], decision: Any) -> None:
    layer, h_ND = arguments[:2]
    if problem := problem_of(decision, len(h_ND)):
        raise ValueError(f"the policy {type(policy).__name__}, asked about layer {layer}: {problem}")
    if layer == policy.num_layers - 1:  # of a copy, too
        for key in [key for key, hook in policy._forward_hooks.items() if hook is _check_decision]:
            del policy._forward_hooks[key]


def check_counts(**counts: Any) -> None:
    """Raises ValueError for one that is no whole number of at least 0, or that int64 cannot hold."""
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
            raise ValueError(f"{name} is {value!r}; expected a whole number of at least 0, below 2**63")


def check_shares(**shares: Any) -> None:
    """Raises ValueError for one that is no number above 0 and up to 1."""
    for name, value in shares.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 1:
            raise ValueError(f"{name} is {value!r}; expected a number above 0 and up to 1")


def build_policy(path: str, num_layers: int, width: int, initializer_range: float, settings: dict) -> Policy:
    """Build the policy that a configuration names.

    Raises:
        ValueError: an unknown policy, or a setting that it does not know.
    """
    policy = load_class(BUILT_IN.get(path, path), Policy, "policy", tuple(BUILT_IN))
    known = _settings_of(policy)
    for name in settings:
        if name not in known:
            raise ValueError(
                f"policy {path!r} does not know the setting {name!r}; it knows {', '.join(map(repr, known)) or 'none'}"
                f"{near(name, known)}"
            )
    return policy(num_layers, width, initializer_range, **settings)


def _settings_of(policy: type[Policy]) -> list[str]:
    """Names that its constructor takes, and those of its parents as far as it hands `**settings` on."""
    known: dict[str, None] = {}
    for one in policy.__mro__:
        if "__init__" in vars(one):
            parameters = list(inspect.signature(one.__init__).parameters.values())[1:]
            known |= {
                each.name: None for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
            }
            if not any(each.kind is each.VAR_KEYWORD for each in parameters):
                break
    return [name for name in known if name not in ("num_layers", "width", "initializer_range")]
