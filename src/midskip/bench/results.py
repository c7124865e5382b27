"""From seconds, work and joules of the sides of one case to its rows: figures, and ratios against Llama; and where they
were measured, with no name and no path of the machine."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from midskip.bench.models import Side
from midskip.bench.tasks import Task, Work
from midskip.bench.timing import quantile, spread, stretch_mean

SOURCE = Path(__file__).parents[3]
LLAMA, DENSE = "llama", ("skip 0", "dense twin")  # sides that others are held against, by name


def case_rows(
    case: Mapping[str, Any],
    task: Task,
    sides: Sequence[Side],
    seconds: Mapping[str, list[list[float]]],
    works: Mapping[str, Work],
    joules: Mapping[str, list[float]],
    peaks: Mapping[str, int | None],
    flops_per_s: float | None = None,
) -> list[dict[str, Any]]:
    """One row for each side.

    `time_s` is what ratios are taken of: the median of the repeats, or for decode the mean over the stretch of steps,
    each the median of its repeats (tokens of different depths cost differently, and the mean counts all of them).
    `utilisation` is the share of `flops_per_s`, the device's peak, that the FLOPs done in that time come to.
    """
    rows = []
    for side in sides:
        repeats = seconds[side.name]
        every = [second for repeat in repeats for second in repeat]
        row = dict(case) | {
            "task": task.name, "batch_size": task.batch_size, "num_columns": task.num_columns,
            "num_steps": task.num_steps, "side": side.name, "skip_share": side.skip_share,
            "time_s": stretch_mean(repeats), "repeat_s": spread([statistics.mean(repeat) for repeat in repeats]),
            "step_s": {"median": quantile(every, 0.5), "p95": quantile(every, 0.95), "p99": quantile(every, 0.99)},
            "all_s": repeats, "work": works[side.name].as_dict(),
        }  # fmt: skip
        flops = row["work"]["flops"] / task.num_steps
        row["peak_bytes"] = peaks.get(side.name)
        row["utilisation"] = flops_per_s and flops / row["time_s"] / flops_per_s
        of_unit = joules.get(side.name)
        row["joules"] = of_unit and {"unit": task.unit, **spread(of_unit), "all": of_unit}
        rows.append(row)
    by_name = {row["side"]: row for row in rows}
    llamas = [row for row in rows if row["side"].startswith(LLAMA)]
    against = {"llama": by_name[LLAMA], "fastest_llama": min(llamas, key=lambda row: row["time_s"])}
    if dense := next((by_name[name] for name in DENSE if name in by_name), None):
        against["dense"] = dense
    for row in rows:
        row["ratios"] = {name: _ratios(row, other) for name, other in against.items()}
    return rows


def work_of(row: Mapping[str, Any]) -> int:
    """What the time should follow: bytes that must be read in decode, FLOPs elsewhere."""
    work = row["work"]
    return work["weight_bytes"] + work["cache_bytes"] if row["task"] == "decode" else work["flops"]


def _ratios(row: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    ours, theirs = row["work"], other["work"]
    ratios: dict[str, Any] = {
        "of": other["side"],
        "time": row["time_s"] / other["time_s"],
        "median_time": row["step_s"]["median"] / other["step_s"]["median"],
        "flops": ours["flops"] / theirs["flops"],
        "work": work_of(row) / work_of(other),
    }
    ratios["time_over_work"] = ratios["time"] / ratios["work"]
    for name in ("kv_used_bytes", "kv_allocated_bytes"):
        if ours[name] is not None and theirs[name]:
            ratios[name] = ours[name] / theirs[name]
    if row["peak_bytes"] and other["peak_bytes"]:
        ratios["peak_bytes"] = row["peak_bytes"] / other["peak_bytes"]
    if row["joules"] and other["joules"] and other["joules"]["median"] > 0:
        ratios["joules"] = row["joules"]["median"] / other["joules"]["median"]
    return ratios


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Processor, threads, GPU and versions."""
    found: dict[str, Any] = {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "midskip": sys.modules["midskip"].__version__,
        "commit": commit(SOURCE),
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_bytes": properties.total_memory, "cuda": torch.version.cuda}
        found |= {"cudnn": torch.backends.cudnn.version()}
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit(root: Path) -> str | None:
    """The commit of a checkout with this root, with `-dirty` if files differ from it; None if there is no checkout."""
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "--no-optional-locks", "-C", str(root)]
        command += ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]  # no tags
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
