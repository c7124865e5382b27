"""Folders as `midskip sweep` writes them, with numbers made up by hand."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def point(
    losses: Sequence[float | None], flops: float | Sequence[float], dense: bool = False, **more: Any
) -> dict[str, Any]:
    """A point with a loss for each seed 0, 1, ...; None where the result is missing.

    `flops` are of all seeds or of each. `more`: settings, trials, tuned_at, first_seed, and of the results
    training_flops, seconds, kv_bytes, machine, num_tokens, num_targets.
    """
    return {"losses": losses, "flops": flops, "dense": dense, **more}


def write_sweep(folder: Path, arms: Mapping[str, Sequence[Mapping[str, Any]]]) -> Path:
    (folder / "results").mkdir(parents=True)
    listed = []
    for arm_number, (arm, points) in enumerate(arms.items()):
        rows = []
        for number, given in enumerate(points):
            seeds = {}
            for place, loss in enumerate(given["losses"]):
                seed, key = place + given.get("first_seed", 0), f"run-{arm_number}-{number}-{place}"
                seeds[str(seed)] = key
                if loss is not None:
                    flops = given["flops"][place] if isinstance(given["flops"], Sequence) else given["flops"]
                    result = _result(given, key, seed, loss, flops)
                    (folder / "results" / f"{key}.json").write_text(json.dumps(result), encoding="utf-8")
            row = {"settings": given.get("settings", {"model.size": number}), "seeds": seeds, "learning_rate": None}
            rows.append(row | {name: given[name] for name in ("trials", "tuned_at") if name in given})
        listed.append({"name": arm, "points": rows})
    (folder / "sweep.json").write_text(json.dumps({"arms": listed}), encoding="utf-8")
    return folder


def _result(given: Mapping[str, Any], key: str, seed: int, loss: float, flops: float) -> dict[str, Any]:
    validation = {"loss": loss, "executed_share": 1.0 if given["dense"] else 0.5, "flops_per_token": flops}
    validation |= {"num_targets": given.get("num_targets", 999)}
    if "kv_bytes" in given:
        validation["kv_bytes_per_token"] = given["kv_bytes"]
    return {
        "key": key,
        "recipe": {"model": {"policy": "dense" if given["dense"] else "middle_out", "num_hidden_layers": 4}},
        "seed": seed,
        "report": {
            "validation": validation,
            "training": {"seconds": given.get("seconds", 60.0), "num_tokens": given.get("num_tokens", 10**6)},
        },
        "training_flops": given.get("training_flops", flops * 3e6),
        "seconds": 70.0,
        "machine": given.get("machine", {"cpu": "one"}),
    }
