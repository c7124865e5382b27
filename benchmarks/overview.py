"""Tables of several arms: who skips, and how far the loss is from that of dense models of equal FLOPs.

    python benchmarks/overview.py [benchmarks/results]

Each cell is a point of a sweep, as `midskip frontier` compares it at inference FLOPs.
"""

import argparse
from pathlib import Path
from typing import Any

from midskip.frontier import frontier

POINTERS, BYTES, PAPER = (f"{name}_sweep.json" for name in ("pointers", "bytes", "paper"))
COLUMNS = {  # title: a sweep's results, and which of its arms' points
    "`pointers`, first budget": (POINTERS, 0),
    "`pointers`, second": (POINTERS, 1),
    "bytes, first": (BYTES, 0),
    "bytes, second": (BYTES, 1),
    "BPE tokens, first": (PAPER, 0),
}
ROWS: dict[str, dict[str, str]] = {  # who skips: the arm in each sweep
    "nested hard gates, by a hash of pairs": {
        POINTERS: "middle out, hash", BYTES: "middle out, hash", PAPER: "hard gates, keys kept",
    },
    "nested hard gates that learn": {
        POINTERS: "middle out, hidden states", BYTES: "middle out, hidden states",
        PAPER: "hard gates by hidden states, keys kept",
    },
    "the paper's soft gates, open start": {
        POINTERS: "middle out, soft", BYTES: "middle out, soft", PAPER: "open start, keys kept",
    },
    "a router in each layer": {POINTERS: "independent", BYTES: "independent"},
    "Mixture of Depths": {POINTERS: "mixture of depths", BYTES: "mixture of depths"},
    "exits by predicted loss": {POINTERS: "early exit, by loss", BYTES: "exits by predicted loss"},
    "exits by a straight-through gate": {POINTERS: "early exit, straight-through", BYTES: "early exit"},
    "`reinforce`": {POINTERS: "reinforce", BYTES: "reinforce"},
    "a rule: the inner layers once a word": {BYTES: "word ends"},
    "control: the true depths": {POINTERS: "oracle"},
    "control: the same layers for all": {POINTERS: "static", BYTES: "static"},
    "control: blocks at random": {POINTERS: "random, independent", BYTES: "random, independent"},
    "feed-forward sublayers, by a hash of pairs": {BYTES: "feed-forward by pair"},
    "control: experts by a hash of pairs, all run equally many": {BYTES: "experts by pair"},
}  # fmt: skip

DECIDERS = {  # who decides about nested layers on bytes: the arm
    "a gate that learns": "middle out, hidden states",
    "a gate that is not trained": "middle out, untrained gate",
    "the list of a trained gate, from the first step on": "middle out, learned list",
    "a list that is drawn at random": "middle out, by token",
    "losses of pairs": "middle out, difficulty",
}


def cell(points: list[dict[str, Any]], number: int) -> str:
    """Of an arm's points that one."""
    if number >= len(points):
        return ""
    found, share = points[number]["against_dense"]["flops"], points[number]["measures"]["executed_share"]
    distance = "" if found["distance"] is None else f"{found['distance']:+.3f}, "
    return f"{distance}{found['verdict']} ({share:.0%})"


def table(folder: Path) -> str:
    """Markdown: nats above dense models of equal FLOPs, the verdict, and the share of block-tokens that ran."""
    sweeps: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for file in (POINTERS, BYTES, PAPER):
        arms: dict[str, list[dict[str, Any]]] = {}
        for point in frontier(folder / file)["points"]:
            arms.setdefault(point["arm"], []).append(point)
        sweeps[file] = arms
    lines = [f"| who skips | {' | '.join(COLUMNS)} |", "| --- " * (1 + len(COLUMNS)) + "|"]
    for row, arms in ROWS.items():
        cells = [cell(sweeps[file][arms[file]], number) if file in arms else "" for file, number in COLUMNS.values()]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def deciders(file: Path) -> str:
    """Markdown: for each of `DECIDERS` the share that ran, the distance and its interval, at the arm's first point."""
    first = {point["arm"]: point for point in reversed(frontier(file)["points"])}
    lines = [
        "| who decides about nested layers | arm | share run | from dense, nats, 90% interval |",
        "| --- " * 4 + "|",
    ]
    for row, arm in DECIDERS.items():
        found, share = first[arm]["against_dense"]["flops"], first[arm]["measures"]["executed_share"]
        low, high = found["interval"]
        lines.append(f"| {row} | `{arm}` | {share:.0%} | {found['distance']:+.3f} ({low:+.3f} to {high:+.3f}) |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent / "results")
    print(table(parser.parse_args().folder))
