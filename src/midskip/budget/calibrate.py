"""What a budget costs: loss against the share of blocks that run, on the text to calibrate on and on another.

N tokens, K blocks of consecutive tokens, L layers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from midskip.budget.calibration import GAP, NUM_BUCKETS, RULES, Calibration, bucket_of
from midskip.budget.measured_on import calibration_of, hashes_of, settings_of
from midskip.budget.monitor import temporary_limits
from midskip.data import TokenWindows
from midskip.data.labelled import Items
from midskip.distributed import rank_and_world_size
from midskip.evaluate import evaluate
from midskip.model.modeling import MidskipForCausalLM
from midskip.names import check_one_of
from midskip.runs import write_atomically

CLOSE = 0.01  # scales that differ by no more than this part of them are not told apart
MOST_POINTS = 48
LARGEST_SCALE = 2.0**20
FLAT = 0.01  # a share that is above that at the largest scale by no more than this does not change any more
FEWEST_BLOCKS = 8  # for a standard deviation


def calibrate(
    model: MidskipForCausalLM, windows: Items, text: str = "", *, rule: str | None = None, lowest: float = 0.1,
    block_tokens: int = 256, batch_size: int = 8, progress: bool = False,
) -> Calibration:  # fmt: skip
    """Measure share and loss at scales of the scores from 0 up, and write the curve into `model.config.calibration`.

    The text is read once for each point, some 20 to 40 times. A point is added between two whose shares differ by more
    than `GAP`. Since hidden states change with the scale, the share may also rise for a while. The curve has points at
    which it falls, the model as trained among them (unless it skips nothing), however low its share; those that would
    break this are left out and counted.

    Tokens early in a document have less to go on and a higher loss, so both are also kept by position: a `DriftMonitor`
    then compares short prompts with the beginnings of documents.

    Args:
        windows: held-out text like the prompts to come, as `evaluate` takes it.
        text: what it is, in a few words.
        rule: which scale a budget stands for, see `Calibration`; by default as in the calibration that the model has,
            or `"loss"`.
        lowest: share of block-tokens below which no stricter scale is tried, in (0, 1).
        block_tokens: how many consecutive tokens live prompts are compared by.
        batch_size: windows of a forward pass.
        progress: show a bar in a terminal for each point.

    Returns:
        The calibration, which `MidskipForCausalLM.set_budget` goes by. The budget in force stays as it was.

    Raises:
        ValueError: a policy without a budget, settings out of range, too little text, a text on which no scale sends
            a token away, or several processes.
    """
    rule = rule or str((model.config.calibration or {}).get("rule", "loss"))
    check_settings(model, lowest, block_tokens, rule)
    curve = _Curve(model, windows, lowest, block_tokens, batch_size, progress)
    with temporary_limits(model):
        curve.measure(0.0)
        floor = curve.measure(LARGEST_SCALE)
        if floor == 1:
            raise ValueError(
                "no token leaves on this text, whatever the scale: all scores are 0, and there is nothing to calibrate"
            )
        score_scale = 1.0
        while curve.measure(score_scale) > max(lowest, floor + FLAT) and score_scale < LARGEST_SCALE / 2:
            score_scale *= 2
        del curve.points[LARGEST_SCALE]
        while len(curve.points) < MOST_POINTS and (between := curve.widest_gap()) is not None:
            curve.measure(between)
    calibration = curve.calibration(text, rule)
    model.config.calibration = calibration.to_dict()
    return calibration


def check_settings(model: MidskipForCausalLM, lowest: float = 0.1, block_tokens: int = 256, rule: str = "loss") -> None:
    """Raises ValueError for what `calibrate` refuses before it looks at the text."""
    policy = model.model.policy
    if not policy.adjustable:
        raise ValueError(f"the policy {type(policy).__name__} has no run-time budget: there is nothing to calibrate")
    if not 0 < lowest < 1:
        raise ValueError(f"lowest is {lowest!r}; expected a share of the blocks between 0 and 1")
    if block_tokens < 1:
        raise ValueError(f"block_tokens is {block_tokens!r}; expected at least 1")
    check_one_of("rule", rule, RULES)
    if rank_and_world_size()[1] > 1:
        raise ValueError("calibration runs in one process, and there are several: start it without torchrun")


def save_calibration(folder: str | Path, calibration: Calibration) -> None:
    """Writes the calibration into the config.json of a folder, in which nothing else changes; whole or not at all."""
    file = Path(folder, "config.json")
    values = json.loads(file.read_text(encoding="utf-8")) | {"calibration": calibration.to_dict()}
    write_atomically(file, json.dumps(values, indent=2) + "\n")


def check_writable(folder: str | Path) -> None:
    """Raises ValueError if `save_calibration` could not write to the folder: to be known before the measurement."""
    part = Path(folder, "config.json.part")  # as it will be written
    try:
        part.touch()
        part.unlink()
    except OSError as error:
        raise ValueError(
            f"the calibration could not be saved in {str(folder)!r} ({error.strerror}): expected a run folder that may "
            "be written to; copy it to a place where it may"
        ) from error


def thinned(windows: TokenWindows, max_tokens: int) -> Items:
    """As many of the windows, evenly spaced, as hold about `max_tokens`; all if they hold no more."""
    every = -(-len(windows) * windows.length // max_tokens)
    return windows if every <= 1 else [windows[number] for number in range(0, len(windows), every)]


class _Curve:
    """The points measured, by scale."""

    def __init__(
        self, model: MidskipForCausalLM, windows: Items, lowest: float, block_tokens: int, batch_size: int,
        progress: bool,
    ):  # fmt: skip
        self.model, self.windows, self.lowest, self.block_tokens = model, windows, lowest, block_tokens
        self.batch_size, self.progress = batch_size, progress
        self.points: dict[float, dict[str, Any]] = {}
        self.num_tokens = 0

    def measure(self, score_scale: float) -> float:
        """Add the point at this scale. Gives its share."""
        if score_scale in self.points:
            return self.points[score_scale]["share"]
        batches: list[Tensor] = []
        self.model.model.policy.set_limits(score_scale)
        result = evaluate(
            self.model,
            self.windows,
            batch_size=self.batch_size,
            progress=self.progress,
            title=f"Calibrating, point {len(self.points) + 1}, score_scale {score_scale:.4g}",
            each=lambda *values_N: batches.append(torch.stack(values_N).cpu()),
        )
        self.num_tokens = result["num_tokens"]
        num_blocks = self.num_tokens // self.block_tokens
        if num_blocks < FEWEST_BLOCKS:
            raise ValueError(
                f"the text to calibrate on has {self.num_tokens} tokens; expected at least "
                f"{FEWEST_BLOCKS * self.block_tokens}, {FEWEST_BLOCKS} blocks of {self.block_tokens}: give more text, "
                "or, to `midskip calibrate`, a larger --max_tokens"
            )
        loss_N, blocks_N, position_N = torch.cat(batches, 1)
        buckets = [bucket_of(position) for position in range(self.model.config.max_position_embeddings)]
        bucket_N = torch.tensor(buckets)[position_N.long()]
        share_P, share_std = self._by_bucket(blocks_N / self.model.config.num_skip_units, bucket_N)
        loss_P, loss_std = self._by_bucket(loss_N, bucket_N)
        self.points[score_scale] = {
            "share": result["executed_share"], "share_by_bucket": share_P, "share_std": share_std,
            "loss": result["loss"], "loss_by_bucket": loss_P, "loss_std": loss_std,
        }  # fmt: skip
        return result["executed_share"]

    def _by_bucket(self, values_N: Tensor, bucket_N: Tensor) -> tuple[list[float], float]:
        """The mean at each bucket of positions, NaN left out, and the standard deviation, over blocks, of the mean
        difference to it. A bucket without tokens has the mean of the nearest one before it, or of all."""
        known_N = values_N.isfinite()
        known, bucket = values_N[known_N], bucket_N[known_N]
        sums_P = known.new_zeros(NUM_BUCKETS).index_add(0, bucket, known)
        counts_P = known.new_zeros(NUM_BUCKETS).index_add(0, bucket, torch.ones_like(known))
        means: list[float] = []
        for total, count in zip(sums_P.tolist(), counts_P.tolist(), strict=True):
            means.append(total / count if count else means[-1] if means else known.mean().item())
        excess_N = values_N - torch.tensor(means, dtype=values_N.dtype)[bucket_N]
        num_blocks = len(excess_N) // self.block_tokens
        excess_K = excess_N[: num_blocks * self.block_tokens].unflatten(0, (num_blocks, -1)).nanmean(1)
        return means, excess_K[excess_K.isfinite()].std().item()

    def widest_gap(self) -> float | None:
        """A scale midway between the two neighbours whose shares differ most; None if all are near enough."""
        gaps = [
            (self.points[low]["share"] - self.points[high]["share"], (low + high) / 2)
            for low, high in pairwise(sorted(self.points))
            if high - low > CLOSE * max(low, CLOSE) and self.points[low]["share"] > self.lowest
        ]
        gap, between = max(gaps, default=(0.0, 0.0))
        return between if gap > GAP else None

    def calibration(self, text: str, rule: str) -> Calibration:
        """Of the points those at which the share falls, up to the first below the lowest, or to the model as trained if
        that comes later. The model as trained, where it is often best, is one of them, so before it the share has to
        stay above its."""
        kept, num_dropped, as_trained = [0.0], 0, self.points[1.0]["share"]
        for score_scale in sorted(self.points)[1:]:
            share, before = self.points[score_scale]["share"], self.points[kept[-1]]["share"]
            if before <= self.lowest and score_scale > 1:
                break
            if share < before and (share > as_trained or score_scale >= 1):
                kept.append(score_scale)
            elif share != before:
                num_dropped += 1
        curves = {name: [self.points[score_scale][name] for score_scale in kept] for name in self.points[0.0]}
        counts = {"num_tokens": self.num_tokens, "block_tokens": self.block_tokens, "num_dropped": num_dropped}
        measured = {"weights": hashes_of(self.model), "settings": settings_of(self.model.config)}
        return Calibration.from_dict({"text": text, **counts, "score_scale": kept, **curves, "rule": rule, **measured})


def scales_for(model: MidskipForCausalLM, budgets: Sequence[float]) -> tuple[Calibration, list[float]]:
    """The model's calibration, and the scale of the scores at each budget.

    Raises:
        ValueError: a budget out of range, no calibration or one of other weights or settings, or a policy without a
            budget.
    """
    calibration = calibration_of(model)
    return calibration, [calibration.scale_for(budget) for budget in budgets]


def loss_by_budget(
    model: MidskipForCausalLM, windows: Items, budgets: Sequence[float], batch_size: int = 8, progress: bool = False
) -> list[dict[str, Any]]:
    """Share and loss on a text at each budget, beside those on the text that the model was calibrated on.

    Where `torch.distributed` is initialised every rank has to call this, as `evaluate`.

    Returns:
        For each budget: `budget`; `score_scale`; `executed_share` and `loss` on this text; and under
        `calibration` both as read off the curve, and `in_band`, whether this text as a whole is where blocks of the
        calibration text are.

    Raises:
        ValueError: a budget out of range, no calibration, or nothing to evaluate on.
    """
    calibration, score_scales = scales_for(model, budgets)
    rows = []
    for budget, score_scale in zip(budgets, score_scales, strict=True):
        with temporary_limits(model, score_scale):
            result = evaluate(
                model, windows, batch_size=batch_size, progress=progress, title=f"Evaluating, budget {budget:g}"
            )
        rows.append(beside_calibration(calibration, score_scale, result, budget))
    return rows


def beside_calibration(
    calibration: Calibration, score_scale: float, result: Mapping[str, Any], budget: float | None = None
) -> dict[str, Any]:
    """What `evaluate` gave on a text at this scale, beside the calibration, as a row of `loss_by_budget`. At the scale
    1.0 and without a budget it is that of the model as trained."""
    calibrated_share, calibrated_loss = calibration.at(score_scale)
    counts = [0] * NUM_BUCKETS
    for position, count in enumerate(result["num_targets_by_position"]):
        counts[bucket_of(position)] += count
    low, high = calibration.share_band(score_scale, counts)
    share, loss = result["executed_share"], result["loss"]
    return {
        "budget": budget,
        "score_scale": score_scale,
        "executed_share": share,
        "loss": loss,
        "calibration": {"text": calibration.text, "executed_share": calibrated_share, "loss": calibrated_loss},
        "in_band": low <= share <= high and loss <= calibration.highest_loss(score_scale, counts),
    }
