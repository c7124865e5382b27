"""What a compute budget at run time costs in loss, as it was measured on text."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from itertools import pairwise
from statistics import fmean
from typing import Any

TOLERANCE = 0.02  # of a budget, by which the share of a point that serves it may be above
BAND_STDS = 4  # half the width of the band that blocks of live prompts have to stay in
GAP = 0.05  # the most that the shares of two neighbouring points should differ by
RULES = ("loss", "share")  # which scale a budget stands for
ON_DRIFT = ("keep", "as_trained", "error")  # what a monitor does when prompts leave the band
SETTINGS = ("policy", "policy_settings", "skipped_kv", "skip_unit")  # that a curve depends on, besides weights
NUM_BUCKETS = 12  # buckets of positions: 0, 1, 2 to 3, 4 to 7, and so on; the last one from 1024 on
_CURVES = ("score_scale", "share", "loss", "share_std", "loss_std")
_BY_BUCKET = ("share_by_bucket", "loss_by_bucket")


@dataclass(frozen=True)
class Calibration:
    """What scales of the scores cost and save on a text. Entry k of each list is the k-th point of the curve.

    Attributes:
        text: what the text is, in a few words of the user's.
        num_tokens: how much of it went in.
        block_tokens: how many consecutive tokens the standard deviations are over.
        num_dropped: points that were measured and left out, so that the share falls from each to the next.
        score_scale: what the scores are multiplied by, from 0 up.
        share: of block-tokens that ran, from 1 down.
        loss: nats a token.
        share_by_bucket, loss_by_bucket: lists of both for tokens at positions 0, 1, 2 to 3, 4 to 7, ... of their
            document: `NUM_BUCKETS` numbers for each point. Early tokens have less to go on, and a higher loss.
        share_std, loss_std: standard deviation, over blocks of `block_tokens`, of the mean difference to those.
        rule: which scale a budget stands for: that of the lowest loss within the budget (`"loss"`), or the one at which
            that share ran (`"share"`), for a model that is best where all runs, as a retrofitted one.
        weights: hashes of the weights that it was measured on, see `midskip.budget.measured_on`; None if not known.
        settings: the `SETTINGS` of the configuration that it was measured with; None if not known.

    `Calibration.from_dict` checks what it is given; this constructor does not.
    """

    text: str
    num_tokens: int
    block_tokens: int
    num_dropped: int
    score_scale: list[float]
    share: list[float]
    loss: list[float]
    share_by_bucket: list[list[float]]
    loss_by_bucket: list[list[float]]
    share_std: list[float]
    loss_std: list[float]
    rule: str = "loss"
    weights: dict[str, str] | None = None
    settings: dict[str, Any] | None = None

    def fingerprint(self) -> str:
        """SHA-256 of all of it, by which one calibration is told from another."""
        return sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @classmethod
    def from_dict(cls, values: Any) -> Calibration:
        """From the `calibration` of a config.json.

        Raises:
            ValueError: a field that is missing, unknown or impossible.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(values, Mapping) or set(values) | {"rule", "weights", "settings"} != set(names):
            got = sorted(map(str, values)) if isinstance(values, Mapping) else repr(values)
            raise _broken("calibration", got, f"a dictionary of {', '.join(names)}")
        if not isinstance(values["text"], str):
            raise _broken("calibration['text']", repr(values["text"]), "a string")
        if values.get("rule", "loss") not in RULES:
            raise _broken("calibration['rule']", repr(values["rule"]), " or ".join(map(repr, RULES)))
        hashes = values.get("weights")
        known = hashes is None or (isinstance(hashes, Mapping) and all(isinstance(x, str) for x in hashes.values()))
        if not known:
            raise _broken("calibration['weights']", repr(hashes), "hashes by name of a dtype, or None")
        settings = values.get("settings")
        if settings is not None and (not isinstance(settings, Mapping) or set(settings) != set(SETTINGS)):
            raise _broken("calibration['settings']", repr(settings), f"a dictionary of {', '.join(SETTINGS)}, or None")
        for name, least in (("num_tokens", 1), ("block_tokens", 1), ("num_dropped", 0)):
            value = values[name]
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise _broken(f"calibration[{name!r}]", repr(value), f"a whole number of at least {least}")
        for name in _CURVES:
            curve = values[name]
            if not isinstance(curve, list | tuple) or len(curve) < 2 or not all(map(_is_amount, curve)):
                raise _broken(f"calibration[{name!r}]", repr(curve), "two or more finite numbers of at least 0")
            if len(curve) != len(values["score_scale"]):
                expected = f"{len(values['score_scale'])}, as score_scale"
                raise _broken(f"calibration[{name!r}]", f"{len(curve)} numbers", expected)
        for name in _BY_BUCKET:
            curve, expected = values[name], f"{len(values['score_scale'])} lists of {NUM_BUCKETS} numbers of at least 0"
            if not isinstance(curve, list | tuple) or len(curve) != len(values["score_scale"]):
                raise _broken(f"calibration[{name!r}]", repr(curve), expected)
            for point in curve:
                if not isinstance(point, list | tuple) or len(point) != NUM_BUCKETS or not all(map(_is_amount, point)):
                    raise _broken(f"calibration[{name!r}]", repr(curve), expected)
        if values["score_scale"][0] != 0 or any(after <= before for before, after in pairwise(values["score_scale"])):
            raise _broken("calibration['score_scale']", repr(values["score_scale"]), "0 and then rising numbers")
        if values["share"][0] != 1 or any(after >= before for before, after in pairwise(values["share"])):
            raise _broken("calibration['share']", repr(values["share"]), "1 and then falling numbers")
        return cls(**{**values, **{name: [float(value) for value in values[name]] for name in _CURVES}})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def scale_for(self, budget: float) -> float:
        """The scale that a budget stands for, a share of block-tokens in (0, 1].

        By the rule `"share"` the one at which it ran, so that 1.0 runs all. By the rule `"loss"` that of the lowest
        loss at which no more ran, so that a larger budget never gives a larger loss on the text of the calibration.
        Candidates are the points measured, whose share may be above the budget by a `TOLERANCE` (so that the model as
        trained serves the budget it was trained for), and the place on the curve where the share is the budget. The
        largest scale for less than ever ran.

        Raises:
            ValueError: a budget that is no share.
        """
        if not _is_amount(budget) or not 0 < budget <= 1:
            raise ValueError(f"budget is {budget!r}; expected a share of the blocks, above 0 and up to 1, or None")
        exact = self.scale_at(budget)
        if self.rule == "share":  # where the share falls by a step, the lower one
            around = self._around(exact)
            before, after = around[0], around[-1]
            return self.score_scale[after] if self.share[before] - self.share[after] > GAP else exact
        most = budget * (1 + TOLERANCE)
        served = [scale for scale, share in zip(self.score_scale, self.share, strict=True) if share <= most]
        share_and_loss = {scale: self.at(scale) for scale in (*served, exact)}
        return min(share_and_loss, key=lambda scale: share_and_loss[scale][::-1])  # of equal losses the least work

    def scale_at(self, share: float) -> float:
        """The scale at which this share of block-tokens ran, on the line between the points measured."""
        return _interpolated(-share, [-measured for measured in self.share], self.score_scale)

    def at(self, score_scale: float) -> tuple[float, float]:
        """Share and loss at a scale, on the line between the points measured."""
        scales = self.score_scale
        return _interpolated(score_scale, scales, self.share), _interpolated(score_scale, scales, self.loss)

    def share_band(self, score_scale: float, counts: Sequence[float]) -> tuple[float, float]:
        """Lowest and highest share that a block of tokens should have at a scale.

        Args:
            counts: tokens of the block in each bucket of positions, `NUM_BUCKETS` numbers; see `bucket_counts`.

        Returns:
            The mean at those positions, and `BAND_STDS` standard deviations on either side, of the points measured on
            either side of the scale (of one, where it was measured): the widest.
        """
        means = [(fmean(self.share_by_bucket[point], counts), point) for point in self._around(score_scale)]
        rounding = 1e-6  # where every block had the same share
        return (
            min(mean - BAND_STDS * self.share_std[point] for mean, point in means) - rounding,
            max(mean + BAND_STDS * self.share_std[point] for mean, point in means) + rounding,
        )

    def highest_loss(self, score_scale: float, counts: Sequence[float]) -> float:
        """The highest loss that a block of tokens should have at a scale; a low one is welcome. As `share_band`."""
        return max(
            fmean(self.loss_by_bucket[point], counts) + BAND_STDS * self.loss_std[point]
            for point in self._around(score_scale)
        )

    def _around(self, score_scale: float) -> range:
        """The points on either side of a scale."""
        last = len(self.score_scale) - 1
        after = min(bisect_left(self.score_scale, score_scale), last)
        before = after if after == 0 or self.score_scale[after] <= score_scale else after - 1
        return range(before, after + 1)


def bucket_of(position: int) -> int:
    """The bucket of positions that one belongs to, 0 to NUM_BUCKETS - 1."""
    return min(position.bit_length(), NUM_BUCKETS - 1)


def bucket_counts(seqlens: Sequence[int]) -> list[int]:
    """How many tokens of documents of these lengths are in each bucket of positions."""
    starts = [0, *(2**bucket for bucket in range(NUM_BUCKETS - 1))]
    ends = [*starts[1:], max(seqlens, default=0)]
    return [sum(max(0, min(length, end) - start) for length in seqlens) for start, end in zip(starts, ends)]


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
            "folder, or midskip.budget.calibrate.calibrate on the model"
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
