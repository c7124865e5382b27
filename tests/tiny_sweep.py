"""Sweeps of tiny runs, and a stand-in for training: what the tests of sweeps share."""

import math
from pathlib import Path
from typing import Any

import yaml

from midskip.sweep.plan import Run, Sweep

RECIPE = {
    "data": {"source": "text", "length": 16, "vocab_size": 300, "validation_share": 0.3},
    "model": {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "policy": "dense",
    },
    "training": {
        "max_steps": 2, "per_device_train_batch_size": 2, "save_steps": 1, "logging_steps": 1, "peak_flops": 1e12,
        "report_to": [],
    },
}  # fmt: skip
DENSE: dict[str, Any] = {"name": "dense", "recipe": "recipe.yaml", "grid": {"model.num_hidden_layers": [1, 2]}}
TUNED = DENSE | {"learning_rates": [0.001, "2e-3", 0.004]}


def write_sweep(folder: Path, *arms: dict[str, Any], **more: Any) -> Path:
    """A sweep's file of these arms, and `recipe.yaml` beside it."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    given = {"output": str(folder / "out"), "seeds": [0, 1], "arms": list(arms or [DENSE])}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(given | more))
    return folder / "sweep.yaml"


def stand_in(sweep: Sweep, run: Run) -> dict[str, Any]:
    """The report of a run that was not trained: fewer layers and a learning rate far from 0.002 are worse."""
    training = run.recipe.training
    loss = 2 / run.recipe.model.num_hidden_layers + abs(math.log(training.learning_rate / 0.002)) + training.seed / 100
    return {"validation": {"loss": loss}, "training": {"flops": 7.0, "seconds": 2.0}}
