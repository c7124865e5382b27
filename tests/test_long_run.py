"""A long run keeps what it learns: 3,000 steps on bytes, about an hour on two cores."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import QUIET

from midskip.train import read_recipe, train

RECIPE = Path(__file__).parent.parent / "recipes" / "bytes-tiny.yaml"
STEPS, WINDOW = 3000, 100


def history(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()]


def means(rows: list[dict[str, Any]], name: str) -> list[float]:
    """Of each `WINDOW` steps after the warm-up."""
    values = [row[name] for row in rows[STEPS // 10 :]]
    return [statistics.fmean(values[start : start + WINDOW]) for start in range(0, len(values), WINDOW)]


@pytest.mark.long
def test_three_thousand_steps_lose_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    changes = [f"--training.max_steps={STEPS}", "--training.eval_steps=500", "--training.report_to=[]"]
    recipe = read_recipe(RECIPE, [f"--output={run}", *changes])
    report = train(recipe, console=QUIET)
    rows, dense = history(run), history(run / "dense-4")
    assert report["training"]["collapse"] == {}
    above_best = report["validation"]["loss"] - report["best"]["loss"]
    assert above_best <= 0.02 * math.log(2), "on held-out text it ends within 0.02 bits of its own best"
    assert abs(report["validation"]["executed_share"] - 0.5) <= 0.02
    assert all(abs(share - 0.5) <= 0.02 for share in means(rows, "executed_share"))
    assert max(means(rows, "gradient_norm")) <= 3 * max(means(dense, "gradient_norm"))
