"""What budgets cost a model: loss above that of the model in which every token runs every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from midskip.budget.calibrate import calibrate
from midskip.data.labelled import Items
from midskip.evaluate import evaluate, limits_kept
from midskip.model.modeling import MidskipForCausalLM

BUDGETS = (0.95, 0.9, 0.83, 0.75, 0.6, 0.5)


def prices(
    model: MidskipForCausalLM, texts: Mapping[str, Items], budgets: Sequence[float] = BUDGETS, batch_size: int = 8
) -> list[dict[str, Any]]:
    """A row a budget, and before them one of 1.0, at which nothing is skipped; the model has to be calibrated.

    Args:
        texts: held-out text by name.
        budgets: shares of block-tokens that may run; those below the range calibrated are left out.

    Returns:
        `budget`, and in `texts`, by name: `loss` in nats a token; `price`, how much that is above budget 1.0;
        `executed_share`, of block-tokens that really ran; `flops_per_token`, head included.
    """
    lowest = model.config.calibration["share"][-1]
    rows: list[dict[str, Any]] = []
    with limits_kept(model):
        for budget in (1.0, *(budget for budget in budgets if budget >= lowest)):
            if budget == 1.0:
                model.model.policy.set_limits(0.0)
            else:
                model.set_budget(budget)
            found = {}
            for name, windows in texts.items():
                result = evaluate(model, windows, batch_size=batch_size)
                whole = rows[0]["texts"][name] if rows else result
                found[name] = {name: result[name] for name in ("loss", "executed_share", "flops_per_token")}
                found[name]["price"] = result["loss"] - whole["loss"]
            rows.append({"budget": budget, "texts": found})
    return rows


def calibrated_prices(
    model: MidskipForCausalLM, windows: Items, texts: Mapping[str, Items], name: str, batch_size: int, progress: bool
) -> list[dict[str, Any]]:
    """Calibrate on `windows`, then `prices`."""
    calibrate(model, windows, name, lowest=0.9 * min(BUDGETS), batch_size=batch_size, progress=progress)
    return prices(model, texts, batch_size=batch_size)
