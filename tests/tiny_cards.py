"""What can lie beside a model for its card, made up by hand; and what was pushed to a hub."""

from __future__ import annotations

from typing import Any

from tiny_curve import CURVE

from midskip.budget.calibration import Calibration


def retrofitted(text: str = "stories") -> dict[str, Any]:
    """A retrofit.json of two budgets on a text of that name."""
    price = {"loss": 3.5, "price": 0.25, "executed_share": 0.5, "flops_per_token": 5e5}
    prices = [
        {"budget": 1.0, "texts": {text: price | {"loss": 3.25, "price": 0.0, "flops_per_token": 1e6}}},
        {"budget": 0.5, "texts": {text: price}},
    ]
    settings = {"model": text, "data": text, "validation": {text: text}, "fit_tokens": 22_000}
    stages = {"fit": {"prices": []}, "distil": {"tokens": 64_000, "prices": prices}}
    return {"settings": settings, "from_hub": False, "stages": stages}


def evaluated(text: str = "news") -> dict[str, Any]:
    row = {"budget": 0.5, "executed_share": 0.49, "loss": 2.75}
    more = {"calibration": Calibration.from_dict(CURVE).fingerprint(), "budgets": [row | {"loss": 2.875}]}
    return {"text": text, "num_tokens": 4096, "as_trained": row} | more


def timed(text: str = "trained", weights: dict[str, str] | None = None) -> dict[str, Any]:
    row = {"task": "prefill", "batch_size": 1, "num_columns": 512, "side": text, "time_s": 0.0525}
    row |= {"ratios": {"llama": {"time": 0.75, "flops": 0.625}}, "work": {"executed_share": 0.5}}
    machine = {"cpu": text, "torch": "2.13.0"}
    limits = {"score_scale": 1.0, "max_layers": None}
    return {"machine": machine, "rows": [row], "weights": weights or {}, "limits": limits}


def pushed_card(hub: dict[str, Any]) -> str:
    return hub["files"]["README.md"].decode()
