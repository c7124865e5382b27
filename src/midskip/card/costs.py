"""Parts of the model card about budgets and speed: what was measured, and what that does not say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from midskip.budget.calibration import Calibration
from midskip.card.markdown import plain, source_name, table
from midskip.model.config import MidskipConfig


def calibrated(calibration: Calibration) -> list[str]:
    """The curve of `midskip calibrate`."""
    rows = [
        (f"{share:.3f}", f"{loss:.4f}", f"{score_scale:.4g}")
        for share, loss, score_scale in zip(calibration.share, calibration.loss, calibration.score_scale, strict=True)
    ]
    share = min(calibration.share, key=lambda share: abs(share - 0.5))  # one that it can run
    budget = f"{math.ceil(100 * share) / 100:g}"
    intro = (
        f"`model.set_budget({budget})` lets the model run at most {budget} of its block-tokens on average, by this "
        f"curve, measured on {calibration.num_tokens:,} tokens of {plain(source_name(calibration.text))}."
    )
    return [
        "## A budget at run time",
        intro,
        table(("share that ran", "loss, nats a token", "scale of the scores"), rows),
    ]


def evaluated(found: Mapping[str, Any]) -> list[str]:
    """The table of `midskip evaluate --budgets`."""
    rows = [("as trained", found["as_trained"]), *((f"{row['budget']:g}", row) for row in found["budgets"])]
    cells = [(name, f"{row['executed_share']:.1%}", f"{row['loss']:.4f}") for name, row in rows]
    intro = f"On {plain(source_name(str(found['text'])))}, {found['num_tokens']:,} tokens:"
    return ["### Measured on text", intro, table(("budget", "block-tokens that ran", "loss, nats a token"), cells)]


def retrofitted(found: Mapping[str, Any]) -> list[str]:
    """What budgets cost after the last stage of a retrofit."""
    settings, stages = found["settings"], found["stages"]
    last = list(stages)[-1]
    prices = stages[last]["prices"]
    rows = []
    for name in prices[0]["texts"]:
        whole = prices[0]["texts"][name]["flops_per_token"]
        for row in prices:
            one = row["texts"][name]
            rows.append(
                (
                    plain(name), f"{row['budget']:g}", f"{one['executed_share']:.1%}",
                    f"{one['flops_per_token'] / whole:.1%}", f"{one['loss']:.4f}", f"{one['price']:+.4f}",
                )
            )  # fmt: skip
    done = [f"a fit on {settings['fit_tokens']:,} tokens of {plain(source_name(settings['data']))}"]
    done += [f"{plain(name)} on {stages[name]['tokens']:,} tokens" for name in stages if name != "fit"]
    texts = ", ".join(f"{plain(name)} ({plain(source_name(text))})" for name, text in settings["validation"].items())
    intro = (
        f"`midskip retrofit` made this model of {plain(source_name(settings['model']))}, which skips nothing: "
        f"{', '.join(done)}. Held-out text: {texts}. The last column is the loss above that of the original; a budget "
        "of 1.00 skips nothing."
    )
    columns = ("text", "budget", "block-tokens that ran", "FLOPs, of those at 1.00", "loss, nats a token", "above")
    return ["## What budgets cost", intro, table(columns, rows)]


def speed(found: Mapping[str, Any]) -> list[str]:
    """Times of `midskip bench --run`."""
    machine, rows = found["machine"], []
    for row in found["rows"]:
        against = row["ratios"]["llama"]
        rows.append(
            (
                plain(row["task"]), f"{row['batch_size']:,}", f"{row['num_columns']:,}", plain(row["side"]),
                f"{1e3 * row['time_s']:,.2f}", _ratio(against.get("time")), _ratio(against.get("flops")),
                f"{row['work']['executed_share']:.1%}",
            )
        )  # fmt: skip
    place = f"{plain(machine.get('gpu') or machine.get('cpu'))}, torch {plain(machine.get('torch'))}"
    as_trained = found["limits"] == {"score_scale": 1.0, "max_layers": None}
    under = "As trained" if as_trained else "Under a budget or `max_layers`"
    intro = f"{under}, beside transformers' Llama of the same shape, in one run on {place}."
    columns = ("task", "batch", "tokens", "side", "ms", "time, of Llama", "FLOPs, of Llama", "block-tokens that ran")
    return ["## Speed", intro, table(columns, rows)]


def limits(config: MidskipConfig, has_numbers: bool, has_budgets: bool) -> list[str]:
    """What the numbers of the page do not say."""
    items = [f"It takes at most {config.max_position_embeddings:,} tokens."]
    if has_numbers:
        items.append("The numbers are of one run with one seed; on other text they differ.")
    if has_budgets:
        items.append(
            "A budget is an average over text like that of its calibration: one prompt may run more or fewer blocks."
        )
    items.append("Nobody has checked what it writes: whether it is true, fit for people or free of bias.")
    return ["## Limits", "\n".join(f"- {item}" for item in items)]


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
