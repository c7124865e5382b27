"""How training went: share of block-tokens that ran, their mean gate, and loss, by step, of runs side by side.

    python benchmarks/curves.py RUN [RUN ...] [--every 25] [--output curves.json] [--picture curves.png]

Each number is the mean of as many steps. Runs whose folders differ only in what follows the last dash, as seeds, are
drawn in one colour. The last picture has each run's loss at its end, by the least share that ran at any time.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from midskip.runs import to_json, write_atomically
from midskip.train.checkpoints import HISTORY_FILE


def curves_of(rows: Sequence[dict[str, Any]], every: int) -> dict[str, list[float]]:
    """Means over stretches of `every` rows of a history; what is left at the end is one more stretch."""
    parts = [rows[start : start + every] for start in range(0, len(rows), every)]
    return {
        "step": [part[-1]["step"] for part in parts],
        "executed_share": [round(fmean(row["executed_share"] for row in part), 4) for part in parts],
        "gate": [round(fmean(map(mean_gate, part)), 4) for part in parts],
        "cross_entropy": [round(fmean(row["cross_entropy"] for row in part), 4) for part in parts],
    }


def mean_gate(row: dict[str, Any]) -> float:
    """Of the block-tokens that ran, the mean of their gates."""
    return sum(row["gate_mean_by_layer"]) / sum(row["share_by_layer"])


def draw(found: dict[str, dict[str, list[float]]], file: Path) -> None:
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    axes = grid.ravel()
    arms = list(dict.fromkeys(name.rpartition("-")[0] for name in found))
    for name, row in found.items():
        arm = name.rpartition("-")[0]
        is_first = next(other for other in found if other.rpartition("-")[0] == arm) == name
        color, label = f"C{arms.index(arm)}", arm if is_first else None
        for axis, what in zip(axes[:3], ("executed_share", "gate", "cross_entropy"), strict=True):
            axis.plot(row["step"], row[what], color=color, label=label, linewidth=1)
        axes[3].plot(min(row["executed_share"]), row["cross_entropy"][-1], "o", color=color)
    axes[0].set(xlabel="step", ylabel="share of block-tokens that ran", ylim=(0, 1.02))
    axes[1].set(xlabel="step", ylabel="mean gate of those that ran", ylim=(0, 1.02))
    axes[2].set(xlabel="step", ylabel="training loss, nats a token", ylim=(3.0, 4.5))
    axes[3].set(xlabel="least share that ran in any stretch", ylabel="training loss at the end", xlim=(0, 1.02))
    axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--every", type=int, default=25)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    found = {}
    for run in options.runs:
        lines = (run / HISTORY_FILE).read_text(encoding="utf-8").splitlines()
        found[run.name] = curves_of([json.loads(line) for line in lines], options.every)
    if options.output:
        write_atomically(options.output, to_json(found) + "\n")
    if options.picture:
        draw(found, options.picture)
    for name, row in found.items():
        print(
            f"{name}: share {min(row['executed_share']):.2f} at its least, {row['executed_share'][-1]:.2f} at the end"
        )


if __name__ == "__main__":
    main()
