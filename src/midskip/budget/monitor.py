"""A monitor of live prompts: do they cost and say what the calibration of a budget expects?

N packed tokens, D width, R of the tokens, V vocabulary.
"""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import accumulate
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from midskip.budget.calibration import NUM_BUCKETS, ON_DRIFT, bucket_counts, bucket_of
from midskip.budget.measured_on import calibration_of
from midskip.names import check_one_of

SCORED_ROWS = 64  # the most tokens of a pass whose loss the monitor works out
_is_live: ContextVar[bool] = ContextVar("is_live", default=True)


class BudgetDriftError(RuntimeError):
    """Live prompts have left the band of the calibration, and `on_drift` is "error"."""


@contextmanager
def not_live() -> Iterator[None]:
    """Passes within are measurements and no use: no monitor looks at them."""
    token = _is_live.set(False)
    try:
        yield
    finally:
        _is_live.reset(token)


@contextmanager
def temporary_limits(model: Any, score_scale: float | None = None, max_layers: int | None = None) -> Iterator[Any]:
    """Gives the model under these limits of `Policy.set_limits`, and afterwards restores those of before. Without
    arguments they stay as they are until something within sets others; `max_layers` alone keeps the scale. A scale of 0
    runs every layer for every token. What is run within is not live: no monitor looks at it."""
    policy = model.model.policy
    before = policy.score_scale, policy.max_layers
    try:
        with not_live():
            if score_scale is not None or max_layers is not None:
                policy.set_limits(before[0] if score_scale is None else score_scale, max_layers)
            yield model
    finally:
        policy.set_limits(*before)


class DriftMonitor:
    """Compares the prompts that a model is given with its calibration, and acts when they leave the band of that.

        model.set_budget(0.5)
        with DriftMonitor(model, on_drift="error"):
            model.generate(**prompt)

    It looks from outside, by hooks, while it is attached: at passes in evaluation mode without a cache or into an empty
    one. What comes later are tokens generated, or proposed in assisted generation, or later chunks of a prompt. Prompts
    of any length are pooled until they are `block_tokens` of the calibration together. A prompt that `generate()`
    repeats, for beams say, counts as often as it is there.

    Two things are compared with what the calibration measured at the same positions: the share of block-tokens that
    ran, which may leave the band on either side, and the loss of predicting the prompts' own tokens, which may leave it
    above. Under `max_layers`, which the calibration knew nothing of, a low share is no drift. A monitor costs the head
    on at most `SCORED_ROWS` tokens of each prompt pass, spread evenly over it, which meters do not count, and a wait
    for the device once in a block. If the limits change (`set_budget`), pooling starts again.

    Args:
        model: a calibrated `MidskipForCausalLM`.
        on_drift: `"keep"` warns once and goes on; `"as_trained"` warns once and drops budget and `max_layers`, from the
            next pass on; `"error"` raises `BudgetDriftError` in the pass, which takes back what it added to a cache.

    Raises:
        ValueError: another `on_drift`, or a model without a calibration of its weights or a policy that has budgets.
    """

    def __init__(self, model: nn.Module, on_drift: str = "keep"):
        check_one_of("on_drift", on_drift, ON_DRIFT)
        self.model: Any = model
        self.policy: Any = self.model.model.policy
        self.calibration = calibration_of(self.model)
        self.on_drift, self.is_over = on_drift, False
        self._hooks: list[Any] = []
        self._batch: Any = None  # of the pass that is looked at
        self._num_ran = 0
        self._seqlens: list[int] = []
        self._limits: Any = None
        self._start()

    def _start(self) -> None:
        self._forget_share()
        self._forget_loss()

    def _forget_share(self) -> None:
        self._ran, self._buckets = 0.0, [0] * NUM_BUCKETS

    def _forget_loss(self) -> None:
        self._nats, self._scored_buckets = torch.zeros(()), [0] * NUM_BUCKETS

    def attach(self) -> DriftMonitor:
        """Look at every pass from now on; gives itself."""
        if not self._hooks:
            self._hooks = [
                self.policy.register_forward_hook(self._on_policy),
                self.model.model.norm.register_forward_hook(self._on_norm),
            ]
        return self

    def detach(self) -> None:
        """Look no more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> DriftMonitor:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def _on_policy(self, policy: nn.Module, arguments: tuple[Any, ...], decision: Any) -> None:
        layer, _, _, batch = arguments
        if layer == 0:
            is_prompt = not (policy.training or batch.first_column) and _is_live.get()
            self._batch, self._num_ran = batch if is_prompt else None, 0
        if self._batch is not None:
            self._num_ran += batch.keep(decision.keep_N).num_tokens

    def _on_norm(self, norm: nn.Module, arguments: tuple[Any, ...], h_ND: Tensor) -> None:
        batch, self._batch = self._batch, None
        if batch is not None and batch.num_tokens:
            share = self._num_ran / (batch.num_tokens * self.policy.num_layers)
            self.look(batch.seqlens, share, h_ND, batch.token_N)

    @torch.no_grad()
    def look(self, seqlens: Sequence[int], share: float, h_ND: Tensor, ids_N: Tensor | None) -> None:
        """Look at a pass. One in which no sequence has two tokens is a step of generation and not looked at; so is
        one that is a token longer in every sequence than the last, as in generation without a cache.

        Args:
            seqlens: tokens of each sequence, or of each document.
            share: of block-tokens that ran.
            h_ND: what goes into the head.
            ids_N: int64 [N], the tokens; None where they are not known: the loss is then not compared.

        Raises:
            BudgetDriftError: a block left the band, and `on_drift` is "error".
        """
        if self.is_over or max(seqlens) < 2:
            return
        before, self._seqlens = self._seqlens, list(seqlens)
        if self._seqlens == [length + 1 for length in before]:
            return
        if self._limits != (limits := (self.policy.score_scale, self.policy.max_layers)):
            self._limits = limits
            self._start()
        self._ran += share * sum(seqlens)
        self._buckets = [a + b for a, b in zip(self._buckets, bucket_counts(seqlens), strict=True)]
        if ids_N is not None:
            rows, positions = _scored(seqlens)
            rows_R = torch.tensor(rows, device=h_ND.device)
            # not as a module call: that is what meters count
            logits_RV = self.model.lm_head.forward(h_ND.index_select(0, rows_R)).float()
            nats = F.cross_entropy(logits_RV, ids_N.index_select(0, rows_R + 1), reduction="sum")
            self._nats = self._nats.to(nats.device) + nats
            for position in positions:
                self._scored_buckets[bucket_of(position)] += 1
        self._judge()

    def _judge(self) -> None:
        block, (score_scale, max_layers), found = self.calibration.block_tokens, self._limits, []
        if (num_tokens := sum(self._buckets)) >= block:
            share, (low, high) = self._ran / num_tokens, self.calibration.share_band(score_scale, self._buckets)
            self._forget_share()
            if share > high or (share < low and max_layers is None):
                expected = f"{0 if max_layers else max(0, low):.3f} to {min(1, high):.3f}"
                found.append(f"{share:.3f} of the blocks ran on the last {num_tokens} tokens, expected {expected}")
        if (num_scored := sum(self._scored_buckets)) >= block:
            loss = self._nats.item() / num_scored
            highest = self.calibration.highest_loss(score_scale, self._scored_buckets)
            self._forget_loss()
            if not loss <= highest:
                expected = f"at most {highest:.3f}"
                found.append(f"the loss of {num_scored} of the last tokens was {loss:.3f} nats, expected {expected}")
        if found:
            text = self.calibration.text
            self._act(f"live prompts have left the band of the calibration on {text!r}: {' and '.join(found)}")

    def _act(self, message: str) -> None:
        if self.on_drift == "error":
            raise BudgetDriftError(
                f"{message}; calibrate on text like the prompts, or set on_drift to keep or as_trained"
            )
        self.is_over = True
        if self.on_drift == "as_trained":
            self.policy.set_limits()
            message += "; from now on the gates are those of training, without a budget (on_drift: as_trained)"
        else:
            message += "; the budget stays, and this is said once (on_drift: keep)"
        warnings.warn(message, stacklevel=2)


def _scored(seqlens: Sequence[int]) -> tuple[list[int], list[int]]:
    """At most `SCORED_ROWS` rows, evenly spaced among those that the same sequence has a token after, and the position
    of each in its sequence."""
    before_end = list(accumulate(length - 1 for length in seqlens if length))
    count = min(SCORED_ROWS, before_end[-1])
    places = [(2 * number + 1) * before_end[-1] // (2 * count) for number in range(count)]
    sequences = [bisect_right(before_end, place) for place in places]
    rows = [place + sequence for place, sequence in zip(places, sequences)]  # each sequence before has a last row more
    starts = [0, *before_end]
    return rows, [place - starts[sequence] for place, sequence in zip(places, sequences)]
