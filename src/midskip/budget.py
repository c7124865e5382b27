"""A compute budget at run time: what it costs in loss, measured on text, and a watch over live prompts.

N packed tokens, D width, R of the tokens, V vocabulary.
"""

from __future__ import annotations

import math
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ON_DRIFT = ("keep", "as_trained", "error")
TOLERANCE = 0.02  # of a budget, by which the share of a point that serves it may be above
BAND_STDS = 4  # half the width of the band that blocks of live prompts have to stay in
SCORED_ROWS = 64  # the most tokens of a pass whose loss the watch works out
_CURVES = ("factor", "share", "loss", "share_std", "loss_std")


class BudgetDriftError(RuntimeError):
    """Live prompts have left the band of the calibration, and `on_drift` is "error"."""


@dataclass(frozen=True)
class Calibration:
    """What factors of the scores cost and save on a text. Entry k of each list is the k-th point of the curve.

    Attributes:
        text: what the text is, in a few words of the user's.
        num_tokens: how much of it went in.
        block_tokens: how many consecutive tokens the standard deviations are over.
        num_dropped: points that were measured and left out, so that the share falls from each to the next.
        factor: of the scores, from 0 up.
        share: of block-tokens that ran, from 1 down.
        loss: nats a token.
        share_std, loss_std: standard deviation of both over blocks of `block_tokens`.

    `Calibration.from_dict` checks what it is given; this constructor does not.
    """

    text: str
    num_tokens: int
    block_tokens: int
    num_dropped: int
    factor: list[float]
    share: list[float]
    loss: list[float]
    share_std: list[float]
    loss_std: list[float]

    @classmethod
    def from_dict(cls, values: Any) -> Calibration:
        """From the `calibration` of a config.json.

        Raises:
            ValueError: a field that is missing, unknown or impossible.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(values, Mapping) or set(values) != set(names):
            got = sorted(map(str, values)) if isinstance(values, Mapping) else repr(values)
            raise _broken("calibration", got, f"a dictionary of {', '.join(names)}")
        if not isinstance(values["text"], str):
            raise _broken("calibration['text']", repr(values["text"]), "a string")
        for name, least in (("num_tokens", 1), ("block_tokens", 1), ("num_dropped", 0)):
            value = values[name]
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise _broken(f"calibration[{name!r}]", repr(value), f"a whole number of at least {least}")
        for name in _CURVES:
            curve = values[name]
            if not isinstance(curve, list | tuple) or len(curve) < 2 or not all(map(_is_amount, curve)):
                raise _broken(f"calibration[{name!r}]", repr(curve), "two or more finite numbers of at least 0")
            if len(curve) != len(values["factor"]):
                raise _broken(f"calibration[{name!r}]", f"{len(curve)} numbers", f"{len(values['factor'])}, as factor")
        if values["factor"][0] != 0 or any(after <= before for before, after in pairwise(values["factor"])):
            raise _broken("calibration['factor']", repr(values["factor"]), "0 and then rising numbers")
        if values["share"][0] != 1 or any(after >= before for before, after in pairwise(values["share"])):
            raise _broken("calibration['share']", repr(values["share"]), "1 and then falling numbers")
        return cls(**{**values, **{name: [float(value) for value in values[name]] for name in _CURVES}})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def factor_for(self, budget: float) -> float:
        """The factor of the lowest loss, of those at which no more than this share of block-tokens ran, in (0, 1].

        So a larger budget never gives a larger loss on the text of the calibration. Candidates are the points measured,
        whose share may be above the budget by a `TOLERANCE` (so that the model as trained serves the budget it was
        trained for), and the place on the curve where the share is the budget. The largest factor for less than ever
        ran.

        Raises:
            ValueError: a budget that is no share.
        """
        if not _is_amount(budget) or not 0 < budget <= 1:
            raise ValueError(f"budget is {budget!r}; expected a share of the blocks, above 0 and up to 1, or None")
        exact = self.factor_at(budget)
        served = [f for f, share in zip(self.factor, self.share, strict=True) if share <= budget * (1 + TOLERANCE)]
        share_and_loss = {factor: self.at(factor) for factor in (*served, exact)}
        return min(share_and_loss, key=lambda factor: share_and_loss[factor][::-1])  # of equal losses the least work

    def factor_at(self, share: float) -> float:
        """The factor at which this share of block-tokens ran, on the line between the points measured."""
        return _interpolated(-share, [-measured for measured in self.share], self.factor)

    def at(self, factor: float) -> tuple[float, float]:
        """Share and loss at a factor, on the line between the points measured."""
        return _interpolated(factor, self.factor, self.share), _interpolated(factor, self.factor, self.loss)

    def band(self, factor: float) -> Band:
        """Where blocks are expected at a factor: mean and `BAND_STDS` standard deviations of the points on either side
        of it (of one, where it was measured), the wider ones."""
        last = len(self.factor) - 1
        after = min(bisect_left(self.factor, factor), last)
        before = after if after == 0 or self.factor[after] <= factor else after - 1
        points = range(before, after + 1)
        return Band(
            min(self.share[point] - BAND_STDS * self.share_std[point] for point in points),
            max(self.share[point] + BAND_STDS * self.share_std[point] for point in points),
            max(self.loss[point] + BAND_STDS * self.loss_std[point] for point in points),
        )


@dataclass(frozen=True)
class Band:
    """Where a block of tokens is expected to be; a low loss is welcome."""

    share_low: float
    share_high: float
    loss_high: float

    def has_share(self, share: float) -> bool:
        return self.share_low - 1e-9 <= share <= self.share_high + 1e-9  # all blocks may have had the same share

    def has_loss(self, loss: float) -> bool:
        return loss <= self.loss_high


def check_on_drift(on_drift: str, budget: float | None) -> None:
    """Raises ValueError for what is no reaction to drift, or has none to react to."""
    if on_drift not in ON_DRIFT:
        raise ValueError(f"on_drift is {on_drift!r}; expected one of {', '.join(map(repr, ON_DRIFT))}")
    if budget is None and on_drift != "keep":
        raise ValueError(f"on_drift is {on_drift!r} and there is no budget whose drift to watch: give a budget too")


def calibration_in(values: Any, adjustable: bool) -> Calibration:
    """The calibration that a configuration holds as `values`.

    Raises:
        ValueError: there is none, it is broken, or the policy is not adjustable.
    """
    if not adjustable:
        raise ValueError("the policy of this model has no run-time budget: its gates run as they are; give no budget")
    if values is None:
        raise ValueError(
            "the model has no calibration, which says what a budget means for it: run `midskip calibrate` on its run "
            "folder, or midskip.calibrate.calibrate on the model"
        )
    return Calibration.from_dict(values)


def _is_amount(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _broken(what: str, got: object, expected: str) -> ValueError:
    return ValueError(f"{what} is {got}; expected {expected}: run `midskip calibrate` again, or remove the calibration")


def _interpolated(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """On the straight lines between the points, `xs` rising; beyond the ends the value there."""
    after = bisect_left(xs, x)
    if after == 0:
        return ys[0]
    if after == len(xs):
        return ys[-1]
    way = (x - xs[after - 1]) / (xs[after] - xs[after - 1])
    return ys[after - 1] + way * (ys[after] - ys[after - 1])


class DriftWatch:
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
    def see(
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
