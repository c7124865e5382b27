"""Signs that a gated run collapses, read off its history: a run that loses what it had learnt says so."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable
from typing import Any

WINDOW = 100  # steps that a sign is read off
LOSS_RISE = 0.2  # nats a token above the best window before
NORM_RISE = 5.0  # times the lowest gradient norm of a window before
SMALLEST_GATE = 0.1  # of the tokens that run
SHARE_ERROR = 0.1  # between the share of block-tokens that runs and the one the regularizer wants

REMEDY = "a lower training.learning_rate, a longer training.warmup_ratio, or training.max_grad_norm"
REMEDY_OF_SOFT_GATES = (
    "hard gates, which have no size to lose (--model.policy_settings='{gates: hard}' with the regularizer "
    "target_share); with soft gates, start: open and the paper's proportional regularizer, or a lower "
    "training.gate_learning_rate_scale"
)


class Health:
    """Looks at the rows of a history, in order.

    Args:
        num_warmup: steps in which the learning rate still rises, which are not looked at.
        rows: of the steps taken before.

    Attributes:
        signs: by name (`loss`, `gradient_norm`, `gates`, `share`), the step at which the sign was first seen, and what
            was seen.
    """

    def __init__(self, num_warmup: int, rows: Iterable[dict[str, Any]] = ()):
        self.num_warmup = num_warmup
        self.signs: dict[str, dict[str, Any]] = {}
        self._rows: deque[dict[str, Any]] = deque(maxlen=WINDOW)
        self._lowest_loss = self._lowest_norm = float("inf")
        for row in rows:
            self.add(row)

    def add(self, row: dict[str, Any]) -> None:
        """Look at one more step; `signs` then has what is new."""
        if row["step"] <= self.num_warmup:
            return
        self._rows.append(row)
        if row["step"] % (WINDOW // 10) or len(self._rows) < WINDOW:
            return
        loss = statistics.fmean(row["cross_entropy"] for row in self._rows)
        if loss > self._lowest_loss + LOSS_RISE:
            self._found("loss", f"the loss of {WINDOW} steps rose from {self._lowest_loss:.3f} to {loss:.3f} nats")
        norm = statistics.median(row["gradient_norm"] for row in self._rows)
        if norm > NORM_RISE * self._lowest_norm:
            self._found("gradient_norm", f"the norm of the gradient rose from {self._lowest_norm:.3g} to {norm:.3g}")
        ran, gates = (sum(sum(row[name]) for row in self._rows) for name in ("share_by_layer", "gate_mean_by_layer"))
        if gates < SMALLEST_GATE * ran:
            self._found("gates", f"the mean gate of the tokens that run sank to {gates / ran:.3f}")
        if all("expected_share" in row for row in self._rows):
            error = statistics.fmean(row["executed_share"] - row["expected_share"] for row in self._rows)
            if abs(error) > SHARE_ERROR:
                self._found("share", f"the share of block-tokens that ran is off by {error:+.3f}")
        self._lowest_loss, self._lowest_norm = min(self._lowest_loss, loss), min(self._lowest_norm, norm)

    def _found(self, name: str, what: str) -> None:
        self.signs.setdefault(name, {"step": self._rows[-1]["step"], "what": what})

    def warning(self, is_hard: bool) -> str:
        """All signs so far, and what helps a model whose gates are all 0 or 1, or soft ones."""
        found = "; ".join(f"{sign['what']} (step {sign['step']})" for sign in self.signs.values())
        return f"this run seems to collapse: {found}. What may help: {REMEDY if is_hard else REMEDY_OF_SOFT_GATES}"
