"""What budgets cost a model: loss above that of the original."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from midskip.budget.calibrate import calibrate
from midskip.budget.monitor import temporary_limits
from midskip.data.labelled import Items
from midskip.evaluate import evaluate
from midskip.model.modeling import MidskipForCausalLM

BUDGETS = (0.95, 0.9, 0.83, 0.75, 0.6, 0.5)


def prices(
    model: MidskipForCausalLM, texts: Mapping[str, Items], original: Mapping[str, float] | None = None,
    budgets: Sequence[float] = BUDGETS,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row a budget, and before them one of 1.0, at which nothing is skipped; the model has to be calibrated.

    Args:
        texts: held-out text by name.
        original: loss of the original on each; by default that of this model at 1.0.
        budgets: shares of block-tokens that may run; those below the range calibrated are left out.

    Returns:
        `budget`, and in `texts`, by name: `loss` in nats a token; `price`, how much that is above the original's;
        `executed_share`, of block-tokens that really ran; `flops_per_token`, head included.
    """
    lowest = model.config.calibration["share"][-1]
    rows: list[dict[str, Any]] = []
    for budget in (1.0, *(budget for budget in budgets if budget >= lowest)):
        with temporary_limits(model):
            model.set_budget(budget)
            results = {name: evaluate(model, windows) for name, windows in texts.items()}
        original = original or {name: result["loss"] for name, result in results.items()}
        found = {}
        for name, result in results.items():
            found[name] = {key: result[key] for key in ("loss", "executed_share", "flops_per_token")}
            found[name]["price"] = result["loss"] - original[name]
        rows.append({"budget": budget, "texts": found})
    return rows


def calibrated_prices(
    model: MidskipForCausalLM, windows: Items, texts: Mapping[str, Items], name: str,
    original: Mapping[str, float] | None, shares: Sequence[float],
) -> list[dict[str, Any]]:  # fmt: skip
    """Calibrate on `windows` down to the lowest of `shares` or a little less, then `prices`, at these shares too."""
    calibrate(model, windows, name, rule="share", lowest=0.9 * min(shares), progress=True)
    return prices(model, texts, original, sorted({*BUDGETS, *shares} - {1.0}, reverse=True))
