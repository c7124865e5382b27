"""The curves and the report of runs, in one file small enough to keep.

    python benchmarks/curves.py runs/wiki-tiny-gated runs/wiki-tiny-dense --output FILE.json [--note TEXT]

Of each run: its recipe, its report, and of its history every row in which the curves by layer were logged.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from midskip.bench.results import machine
from midskip.runs import RECIPE_FILE, REPORT_FILE, to_json
from midskip.train.checkpoints import HISTORY_FILE
from midskip.train.recipe import read_recipe


def rounded(value: Any) -> Any:
    """Numbers with five digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return {name: rounded(item) for name, item in value.items()} if isinstance(value, dict) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--note", default="")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "note": arguments.note}
    for run in arguments.runs:
        rows = [json.loads(line) for line in (run / HISTORY_FILE).read_text(encoding="utf-8").splitlines()]
        result[run.name] = {
            "recipe": asdict(read_recipe(run / RECIPE_FILE)),
            "report": json.loads((run / REPORT_FILE).read_text(encoding="utf-8")),
            "history": rounded([row for row in rows if "tokens_per_s" in row]),
        }
    arguments.output.write_text(to_json(result) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
