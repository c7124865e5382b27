"""Tasks of lm_eval on a model, as it is or under budgets. Needs the extra `tasks`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from midskip.budget.monitor import temporary_limits
from midskip.cost import meter
from midskip.model.modeling import MidskipForCausalLM


def check_tasks(tasks: Sequence[str], include_path: Path | None = None) -> Any:
    """lm_eval's manager of tasks.

    Raises:
        ValueError: lm_eval is not installed, the folder does not exist, or a task is not known.
    """
    if include_path is not None and not include_path.is_dir():
        raise ValueError(f"there is no folder {str(include_path)!r} of tasks")
    try:
        manager = importlib.import_module("lm_eval.tasks").TaskManager(
            include_path=None if include_path is None else str(include_path)
        )
    except ImportError as error:
        raise ValueError("tasks are those of lm_eval, which is not installed: pip install 'midskip[tasks]'") from error
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise ValueError(
            f"lm_eval knows no task {', '.join(map(repr, unknown))}; `lm_eval ls tasks` lists them, and a folder with "
            "tasks of your own is given by include_path"
        )
    return manager


def evaluate_tasks(
    model: MidskipForCausalLM, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[str],
    budgets: Sequence[float] | None = None, *, include_path: Path | None = None, limit: int | None = None,
    batch_size: int = 8,
) -> list[dict[str, Any]]:  # fmt: skip
    """What lm_eval measures.

    Args:
        tasks: by lm_eval's names.
        budgets: as `set_budget` takes them, None for as trained, which is the default.
        include_path: a folder with tasks of your own, as YAML.
        limit: documents of each task; all by default.
        batch_size: of lm_eval.

    Returns:
        A row for each budget: `budget`, None as trained; `results`, lm_eval's by task and metric; `executed_share`, of
        the block-tokens of all requests.

    Raises:
        ValueError: as `check_tasks` and `MidskipForCausalLM.set_budget` do.
    """
    manager = check_tasks(tasks, include_path)
    wrapped = importlib.import_module("lm_eval.models.huggingface").HFLM
    rows = []
    for budget in budgets or [None]:
        with temporary_limits(model):
            if budget is not None:
                model.set_budget(budget)
            with meter(model) as work:
                found = importlib.import_module("lm_eval").simple_evaluate(
                    wrapped(pretrained=model, tokenizer=tokenizer, batch_size=batch_size), tasks=list(tasks),
                    task_manager=manager, limit=limit, bootstrap_iters=0,
                )  # fmt: skip
            rows.append({"budget": budget, "results": found["results"], "executed_share": work.executed_share})
    return rows
