"""What is written of a run that has ended: its numbers, its picture and its page."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from midskip.data.labelled import Items
from midskip.evaluate import passages
from midskip.model.modeling import MidskipForCausalLM
from midskip.report import write_page, write_picture
from midskip.runs import PAGE_FILE, PICTURE_FILE, RECIPE_FILE
from midskip.train.health import Health
from midskip.train.optimizer import num_warmup_steps
from midskip.train.recipe import Recipe


def report_of(
    recipe: Recipe,
    model: MidskipForCausalLM,
    metrics: dict[str, Any],
    history: list[dict[str, Any]],
    peak: dict[str, Any],
    dense: list[dict[str, Any]],
) -> dict[str, Any]:
    """What `report.json` holds of every run: of the held-out text, of training, of dense models beside it."""
    logged = [row for row in history if "tokens_per_s" in row]
    speed = {
        name: statistics.median(row[name] for row in logged) if logged else None
        for name in ("tokens_per_s", "utilisation")
    }
    return {
        "validation": metrics,
        "training": {
            "steps": history[-1]["step"],
            "num_tokens": sum(row["num_tokens"] for row in history),
            "flops": sum(row["flops"] for row in history),
            "seconds": history[-1]["seconds"],
            "executed_share": sum(row["executed_share"] for row in history) / len(history),
            **speed,
            "peak": peak,
            "collapse": Health(num_warmup_steps(recipe.training), history).signs,
        },
        "dense": dense,
        "num_parameters": model.num_parameters(),
        "recipe": RECIPE_FILE,
    }


def write_pages(
    folder: Path,
    model: MidskipForCausalLM,
    tokenizer: PreTrainedTokenizerBase | None,
    validation: Items,
    report: dict[str, Any],
    history: list[dict[str, Any]],
) -> None:
    """The picture of shares over training, and the page of held-out text, or of ids of items, coloured by depth."""
    metrics = report["validation"]
    drawn = history[:: max(1, len(history) // 500)]
    shares = [(row["step"], row["share_by_layer"]) for row in drawn]
    write_picture(folder / PICTURE_FILE, metrics["share_by_layer"], shares, f"Share of tokens that ran: {folder.name}")
    kind = "held-out text, passage" if tokenizer is not None else "held-out item"
    shown = [(f"{kind} {number}", tokens) for number, tokens in enumerate(passages(model, tokenizer, validation), 1)]
    pattern = "{loss:.4f} nats a token, {flops_per_token:,.0f} FLOPs"
    summary = {"validation": pattern.format(**metrics), "block-tokens that ran": f"{metrics['executed_share']:.1%}"}
    summary |= {f"dense, {row['num_hidden_layers']} layers": pattern.format(**row) for row in report["dense"]}
    if not report["dense"] and model.config.policy != "dense":
        summary["dense model of fewer layers"] = "none was trained (dense_layers)"
    part = folder / f"{PAGE_FILE}.part"
    write_page(part, f"Depth by token: {folder.name}", shown, model.config.num_skip_units, summary)
    part.replace(folder / PAGE_FILE)  # whole or not there: it marks the run as finished
