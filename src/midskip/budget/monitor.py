"""A monitor of live prompts: do they cost and say what the calibration of a budget expects?

N packed tokens, D width, R of the tokens, V vocabulary.
"""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from midskip.budget.calibration import Calibration

ON_DRIFT = ("keep", "as_trained", "error")
SCORED_ROWS = 64  # the most tokens of a pass whose loss the monitor works out


class BudgetDriftError(RuntimeError):
    """Live prompts have left the band of the calibration, and `on_drift` is "error"."""


def check_on_drift(on_drift: str, budget: float | None) -> None:
    """Raises ValueError for what is no reaction to drift, or has none to react to."""
    if on_drift not in ON_DRIFT:
        raise ValueError(f"on_drift is {on_drift!r}; expected one of {', '.join(map(repr, ON_DRIFT))}")
    if budget is None and on_drift != "keep":
        raise ValueError(f"on_drift is {on_drift!r} and there is no budget whose drift to monitor: give a budget too")


class DriftMonitor:
    """Compares live prompts with the calibration, `block_tokens` of them at a time, and acts when they leave its band.

    The model shows it passes without a cache or into an empty one: what comes later are tokens generated, or proposed
    in assisted generation, or later chunks of a prompt. A prompt that `generate()` repeats, for beams say, counts as
    often as it is there.

    Two things are watched, each over blocks of its own: the share of block-tokens that ran, which may leave the band
    on either side, and the loss of predicting the prompts' own tokens, which may leave it above. Under a ceiling, which
    the calibration knew nothing of, a low share is no drift. It costs the head on at most `SCORED_ROWS` tokens of each
    prompt pass, spread evenly over it, and a wait for the device once in a block.

    Args:
        calibration: what is expected.
        factor: at which of its factors.
        ceiling: the ceiling in force, if there is one.
        on_drift: `"keep"` warns once and goes on; `"as_trained"` warns once and calls `fall_back`; `"error"` raises.
        fall_back: drops the budget, from the next pass on.
    """

    def __init__(
        self, calibration: Calibration, factor: float, ceiling: int | None, on_drift: str,
        fall_back: Callable[[], None],
    ):  # fmt: skip
        self.calibration, self.on_drift, self.fall_back = calibration, on_drift, fall_back
        band = calibration.band(factor)
        self.band = band if ceiling is None else replace(band, share_low=0.0)
        self.is_over = False
        self._lengths: list[int] = []
        self._num_tokens = self._num_scored = 0
        self._ran, self._nats = 0.0, torch.zeros(())

    @torch.no_grad()
    def update(
        self, lengths: list[int], share: float, h_ND: Tensor, ids_N: Tensor | None, head: Callable[[Tensor], Tensor]
    ) -> None:
        """Look at a pass. One in which no sequence has two tokens is a step of generation and not looked at; so is
        one that is a token longer in every sequence than the last, as in generation without a cache.

        Args:
            lengths: tokens of each sequence, or of each document.
            share: of block-tokens that ran.
            h_ND: what goes into the head.
            ids_N: int64 [N], the tokens; None where they are not known: the loss is then not watched.
            head: gives logits [R, V] of rows [R, D].

        Raises:
            BudgetDriftError: a block left the band, and `on_drift` is "error".
        """
        if self.is_over or max(lengths, default=0) < 2:
            return
        before, self._lengths = self._lengths, list(lengths)
        if lengths == [length + 1 for length in before]:
            return
        self._num_tokens += sum(lengths)
        self._ran += share * sum(lengths)
        if ids_N is not None:
            rows_R = torch.tensor(_scored_rows(lengths), device=h_ND.device)
            logits_RV = head(h_ND.index_select(0, rows_R)).float()
            nats = F.cross_entropy(logits_RV, ids_N.index_select(0, rows_R + 1), reduction="sum")
            self._nats, self._num_scored = self._nats.to(nats.device) + nats, self._num_scored + len(rows_R)
        self._judge()

    def _judge(self) -> None:
        block, band, found = self.calibration.block_tokens, self.band, []
        if self._num_tokens >= block:
            share, num_tokens = self._ran / self._num_tokens, self._num_tokens
            self._ran, self._num_tokens = 0.0, 0
            if not band.has_share(share):
                expected = f"{max(0, band.share_low):.3f} to {min(1, band.share_high):.3f}"
                found.append(f"{share:.3f} of the blocks ran on the last {num_tokens} tokens, expected {expected}")
        if self._num_scored >= block:
            loss, num_scored = self._nats.item() / self._num_scored, self._num_scored
            self._nats, self._num_scored = torch.zeros(()), 0
            if not band.has_loss(loss):
                expected = f"at most {band.loss_high:.3f}"
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
            self.fall_back()
            message += "; from now on the gates are those of training, without a budget (on_drift: as_trained)"
        else:
            message += "; the budget stays, and this is said once (on_drift: keep)"
        warnings.warn(message, stacklevel=2)


def _scored_rows(lengths: Sequence[int]) -> list[int]:
    """At most `SCORED_ROWS` rows, evenly spaced among those that the same sequence has a token after."""
    before_end = list(accumulate(length - 1 for length in lengths if length))
    count = min(SCORED_ROWS, before_end[-1])
    places = [(2 * number + 1) * before_end[-1] // (2 * count) for number in range(count)]
    return [place + bisect_right(before_end, place) for place in places]  # each sequence before has a last row more
