"""The contract that a policy must keep, whoever wrote it.

B sequences, T columns, N packed tokens, L layers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from midskip.model.config import SKIPPED_KV
from midskip.model.modeling import MidskipForCausalLM
from midskip.policies import Decision
from midskip.policies.decision import problem_of
from midskip.reference import reference_forward
from midskip.testing.decode import in_steps
from midskip.testing.limits import broken_limits, limits
from midskip.testing.trial import NUM_COLUMNS, VALID_BT, Trial, by_token, distance_of


def check_policy(
    policy: str,
    settings: dict[str, Any] | None = None,
    *,
    num_layers: int | None = None,
    skipped_kv: str | None = None,
    skip_unit: str = "block",
    skip_path: str = "none",
    seed: int = 0,
) -> None:
    """Check a policy, in tiny models in float64, as it starts and with its parameters moved at random.

    The checks, in their order:

    - *gates*: `decide` returns a `Decision` whose `keep_N` is bool [N] and whose gates are float32 or wider [N], in a
      bfloat16 model too, and in [0, 1] where kept (a key's gate above 0), and what the model reports is 0 where a token
      was not kept;
    - *repeatable*: in evaluation the same input gives the same output;
    - *untouched*: no tensor that a module was given or gave is written to afterwards, so that a policy may keep
      hidden states in `state`, and a hook what it saw; and asking for hidden states changes nothing;
    - *no future leak*: in evaluation, changing a token changes nothing before it;
    - *batch*: a batch gives what its members give alone, in any order, with pads on any side;
    - *prefix*: a sequence fed as growing prefixes gives what it gives at once;
    - *decode*: a sequence fed in steps, with a cache, gives what it gives at once; not of a policy that `looks_back`,
      which runs without one;
    - *finite gradients*: in training every parameter gets a gradient, and a finite one;
    - *packed = reference*: the same values and gradients as `reference_forward`, which asks the policy about one
      sequence at a time and multiplies gates in;
    - *state*: after two steps of training a saved and loaded model gives the same outputs, and after two more;
    - *budget*, of a policy that is `adjustable`: what `Policy.set_limits` says, and the checks from *no future leak* to
      *packed = reference* under a scale and `max_layers`.

    Args:
        policy, settings: as `policy` and `policy_settings` in `MidskipConfig`.
        num_layers: L; 1, 4 and 5 by default.
        skipped_kv: as in `MidskipConfig`; both by default.
        skip_unit, skip_path: as in `MidskipConfig`.
        seed: of weights, tokens and the random move.

    Raises:
        AssertionError: the first check that failed, by name, with where it was seen.
        ValueError: the policy cannot be built.
    """
    for layers in (1, 4, 5) if num_layers is None else (num_layers,):
        for kv in SKIPPED_KV if skipped_kv is None else (skipped_kv,):
            for moved in (False, True):
                trial = Trial.make(policy, dict(settings or {}), layers, kv, skip_unit, skip_path, moved, seed)
                for check in (
                    _gates, _repeatable, _untouched, _no_future_leak, _batch, _prefix, _decode, _finite,
                    _packed_is_reference, _state, _budget,
                ):  # fmt: skip
                    check(trial)


def _gates(trial: Trial) -> None:
    decisions: list[Decision] = []

    def look(module: torch.nn.Module, arguments: tuple[Any, ...], decision: Any) -> None:
        layer, h_ND = arguments[:2]
        if problem := problem_of(decision, h_ND.shape[0]):
            raise trial.failed("gates", f"{problem}, in layer {layer}")
        decisions.append(decision)

    with torch.random.fork_rng():
        half = replace(trial, model=MidskipForCausalLM(trial.model.config).bfloat16().eval())
    half.model.load_state_dict(trial.model.state_dict())
    try:
        with half.model.model.policy.register_forward_hook(look):
            half.run(trial.ids_BT, VALID_BT)
    except AssertionError:
        raise
    except Exception as error:
        raise trial.failed("gates", f"a pass in bfloat16 fails: {error}") from error
    with trial.model.model.policy.register_forward_hook(look):
        for training in (True, False):
            decisions.clear()
            gates_BTL = replace(trial, model=trial.model.train(training)).run(trial.ids_BT, VALID_BT)["gates"]
    for layer, decision in enumerate(decisions):
        gate_N = gates_BTL[..., layer][VALID_BT]
        present_N = torch.ones_like(gate_N, dtype=torch.bool) if decision.keep_N is None else decision.keep_N
        if gate_N[~present_N].any() or gates_BTL[~VALID_BT].any():
            raise trial.failed("gates", f"a gate is not 0 where no token is present, in layer {layer}")
        if trial.model.model.policy.is_hard and not (gate_N[present_N] == 1).all():
            raise trial.failed("gates", f"is_hard is True and a gate is neither 0 nor 1, in layer {layer}")


def _repeatable(trial: Trial) -> None:
    first = trial.run(trial.ids_BT, VALID_BT)
    trial.same("repeatable", trial.run(trial.ids_BT, VALID_BT), first, "the same input twice in evaluation")


@torch.no_grad()
def _untouched(trial: Trial) -> None:
    held: list[tuple[str, Tensor, Tensor]] = []

    def hold(module: torch.nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        tensors = [x for x in (*arguments, output) if isinstance(x, Tensor)]
        held.extend((type(module).__name__, x, x.clone()) for x in tensors)

    with ExitStack() as hooks:
        for module in trial.model.modules():
            hooks.enter_context(module.register_forward_hook(hold))
        output = trial.model(trial.ids_BT, attention_mask=VALID_BT, use_cache=False)
    for name, now, then in held:
        if not torch.equal(now, then):
            raise trial.failed("untouched", f"a tensor that {name} was given or gave is written to afterwards")
    expected = trial.run(trial.ids_BT, VALID_BT)
    trial.same("untouched", {"logits": output.logits}, {"logits": expected["logits"]}, "without and with hidden states")


def _no_future_leak(trial: Trial) -> None:
    columns = range(1, NUM_COLUMNS)
    changed = [trial.ids_BT.clone() for _ in columns]
    for column, ids_BT in zip(columns, changed, strict=True):
        move_B = torch.randint(1, trial.model.config.vocab_size, (len(ids_BT),), generator=trial.generator)
        ids_BT[:, column] = (ids_BT[:, column] + move_B) % trial.model.config.vocab_size
    before, after = trial.run(trial.ids_BT.repeat(len(columns), 1)), trial.run(torch.cat(changed))
    for number, column in enumerate(columns):
        rows = slice(number * len(trial.ids_BT), (number + 1) * len(trial.ids_BT))
        trial.same(
            "no future leak",
            {name: x[rows, :column] for name, x in after.items()},
            {name: x[rows, :column] for name, x in before.items()},
            f"token {column} was changed and the results before it changed",
        )


def _batch(trial: Trial) -> None:
    ids_BT, valid_BT = trial.ids_BT, VALID_BT
    together = trial.run(ids_BT, valid_BT)
    backwards = {name: x.flip(0) for name, x in trial.run(ids_BT.flip(0), valid_BT.flip(0)).items()}
    trial.same("batch", backwards, together, "the same sequences in another order")
    for pads in ((2, 0), (0, 3)):
        wide_ids_BT, wide_valid_BT = (torch.nn.functional.pad(x, pads) for x in (ids_BT, valid_BT))
        columns = slice(pads[0], pads[0] + NUM_COLUMNS)
        padded = {name: x[:, columns] for name, x in trial.run(wide_ids_BT, wide_valid_BT).items()}
        trial.same("batch", padded, together, f"{pads[0]} more pads on the left and {pads[1]} on the right")
    for b in range(len(ids_BT)):
        if valid_BT[b].any():
            alone = trial.run(ids_BT[b : b + 1, valid_BT[b]])
            members = {name: x[b : b + 1, valid_BT[b]] for name, x in together.items()}
            trial.same("batch", members, alone, f"sequence {b} of a batch, and the same alone without pads")


def _prefix(trial: Trial) -> None:
    """All prefixes are one batch with pads on the right, since a batch gives what its members give alone."""
    at_once, count = trial.run(trial.ids_BT), len(trial.ids_BT)
    lengths = torch.arange(1, NUM_COLUMNS)
    valid_BT = (torch.arange(NUM_COLUMNS) < lengths[:, None]).repeat_interleave(count, 0)
    prefixes = trial.run(trial.ids_BT.repeat(len(lengths), 1), valid_BT)
    for number, length in enumerate(lengths.tolist()):
        rows = slice(number * count, (number + 1) * count)
        prefix, expected = ({name: x[:, :length] for name, x in found.items()} for found in (
            {name: x[rows] for name, x in prefixes.items()}, at_once,
        ))  # fmt: skip
        trial.same("prefix", prefix, expected, f"the first {length} of {NUM_COLUMNS} tokens alone, and among all")


def _decode(trial: Trial) -> None:
    if trial.model.model.policy.looks_back:
        return
    at_once = trial.run(trial.ids_BT, VALID_BT)
    for columns in (1, 3):
        what = f"{columns} columns at a time with a cache, and all at once"
        advice = "if the policy reads the past, set looks_back = True"
        try:
            steps = [by_token(output) for output in in_steps(trial.model, trial.ids_BT, VALID_BT, columns)]
        except Exception as error:
            raise trial.failed("decode", f"{what}: the former fails: {error}; {advice}") from error
        together = {name: torch.cat([step[name] for step in steps], 1) for name in steps[0]}
        trial.same("decode", together, at_once, f"{what} ({advice})")


def _gradients(trial: Trial, forward: Callable[..., Any]) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """Results by token, and the gradient of every parameter of a sum that reaches all of them."""
    labels_BT = trial.ids_BT
    trial.model.zero_grad()
    output = forward(labels_BT)
    generator = torch.Generator().manual_seed(0)
    tensors = by_token(output)
    total = output.loss + sum(
        (tensors[name] * torch.randn(tensors[name].shape, generator=generator, dtype=torch.float64)).mean()
        for name in ("gates", "hidden states", "logits")
    )
    if getattr(output, "auxiliary_loss", None) is not None:
        total = total + output.auxiliary_loss
    total.backward()
    parameters = {name: x for name, x in trial.model.named_parameters() if x.requires_grad}
    results = {name: x.detach() for name, x in tensors.items()} | {"loss": output.loss.detach()}
    return results, {name: x.grad for name, x in parameters.items()}


def _packed(trial: Trial) -> Callable[..., Any]:
    return lambda ids_BT: trial.model(ids_BT, attention_mask=VALID_BT, labels=ids_BT, output_hidden_states=True)


def _finite(trial: Trial) -> None:
    trial.model.train()
    try:
        _, gradients = _gradients(trial, _packed(trial))
    finally:
        trial.model.eval()
    for name, gradient in gradients.items():
        if gradient is None:
            raise trial.failed("finite gradients", f"{name} gets no gradient in training, not even 0")
        if not gradient.isfinite().all():
            raise trial.failed("finite gradients", f"{name} gets a gradient that is not finite in training")


def _packed_is_reference(trial: Trial) -> None:
    # in evaluation: in training a policy may draw at random
    packed, packed_gradients = _gradients(trial, _packed(trial))
    reference, reference_gradients = _gradients(
        trial, lambda ids_BT: reference_forward(trial.model, ids_BT, VALID_BT, labels=ids_BT)
    )
    trial.same("packed = reference", packed, reference, "the packed pass and the plain one")
    for name, expected in reference_gradients.items():
        got = packed_gradients[name]
        got, expected = (torch.zeros(()) if x is None else x for x in (got, expected))
        if distance := distance_of(got, expected):
            raise trial.failed(
                "packed = reference",
                f"the gradients of {name} in the packed pass and in the plain one differ by {distance}",
            )


def _budget(trial: Trial) -> None:
    policy = trial.model.model.policy
    if not policy.adjustable:
        return
    if problem := broken_limits(policy, lambda: trial.run(trial.ids_BT, VALID_BT)["gates"], VALID_BT):
        raise trial.failed("budget", problem)
    for score_scale, max_layers in ((3.0, None), (0.5, max(1, policy.num_layers - 2))):
        limited = replace(trial, where=f"{trial.where}, score_scale {score_scale}, max_layers {max_layers}")
        with limits(policy, score_scale, max_layers):
            for check in (_no_future_leak, _batch, _prefix, _decode, _packed_is_reference):
                check(limited)


def _absorb(trial: Trial) -> None:
    """Steps of training, as far as they change the policy without its parameters; drawn alike each time."""
    model = trial.model.train()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(trial.generator.initial_seed())
            for _ in range(2):
                model(trial.ids_BT, attention_mask=VALID_BT, labels=trial.ids_BT, use_cache=False).loss.backward()
                model.zero_grad()
                model.model.policy.absorb()
    except Exception as error:
        raise trial.failed("state", f"a pass of training, or `absorb` after it, fails: {error}") from error
    finally:
        model.eval()


def _state(trial: Trial) -> None:
    _absorb(trial)
    before = trial.run(trial.ids_BT, VALID_BT)
    with tempfile.TemporaryDirectory() as folder, _quiet(), torch.random.fork_rng():
        torch.manual_seed(trial.generator.initial_seed() + 1)
        try:
            trial.model.save_pretrained(folder)
            loaded = MidskipForCausalLM.from_pretrained(folder, dtype=torch.float64, trust=[trial.model.config.policy])
            again = replace(trial, model=loaded.eval())
            after = again.run(trial.ids_BT, VALID_BT)
        except Exception as error:
            raise trial.failed("state", f"a saved and loaded model fails: {error}") from error
    trial.same("state", after, before, "a model, and the same saved and loaded")
    for one in (trial, again):
        _absorb(one)
    before, after = (one.run(trial.ids_BT, VALID_BT) for one in (trial, again))
    trial.same("state", after, before, "a model and the same saved and loaded, trained on")


@contextmanager
def _quiet() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
