"""Mutants of the core's code that no test notices, from what `make mutants` has found so far.

    python benchmarks/mutants.py [--output benchmarks/results/mutants.json]
    python benchmarks/mutants.py --sample 80    (prints names, for `make mutants ONLY="..."`)

A mutant is the code with one change: another operator, number or argument. It is killed if a test of those that call
the changed function fails, or does not end. `mutmut` makes them and runs the tests, as `[tool.mutmut]` in
`pyproject.toml` says; it leaves out functions with a decorator other than `classmethod` and `staticmethod`, and the
wording of messages is left out by that setting.
"""

import argparse
import json
import random
import re
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.stats import status_by_exit_code

from midskip.bench.results import machine

KILLED = ("killed", "timeout", "segfault", "caught by type check")


def place_of(diff: str, source: str, function: str) -> tuple[int, str]:
    """The line of the source that a mutant changes, and how."""
    lines = source.splitlines()
    removed, added = (
        [line[1:] for line in diff.splitlines() if line.startswith(sign) and not line.startswith(3 * sign)]
        for sign in "-+"
    )
    start = next(number for number, line in enumerate(lines) if re.match(rf"\s*def {re.escape(function)}\b", line))
    found = (number for number in range(start, len(lines)) if lines[number].strip() == removed[0].strip())
    return next(found, start) + 1, f"{' '.join(map(str.strip, removed))} -> {' '.join(map(str.strip, added))}"


def report_of(path: Path) -> dict[str, Any]:
    """Of one module: how many mutants there are, and those that survived."""
    meta = json.loads(Path("mutants", f"{path}.meta").read_text(encoding="utf-8"))
    source = path.read_text(encoding="utf-8")
    statuses = {name: status_by_exit_code[code] for name, code in meta["exit_code_by_key"].items()}
    counts, survivors = Counter(statuses.values()), []
    for name, status in statuses.items():
        if status in (*KILLED, "not checked"):
            continue
        function = re.sub(r"__mutmut_\d+$", "", name.rpartition(".")[2]).removeprefix("x_").split("ǁ")[-1]
        line, mutation = place_of(get_diff_for_mutant(name, path=path), source, function)
        survivors.append({"line": line, "status": status, "mutation": mutation})
    num_checked = len(statuses) - counts["not checked"]
    num_killed = sum(counts[status] for status in KILLED)
    return {
        "num_mutants": len(statuses),
        "num_checked": num_checked,
        "num_killed": num_killed,
        "share_killed": round(num_killed / num_checked, 4) if num_checked else None,
        "survivors": sorted(survivors, key=lambda survivor: (survivor["line"], survivor["mutation"])),
    }


def sample_of(path: Path, size: int) -> list[str]:
    """Names of so many mutants of one module, drawn at random, the same ones each time."""
    names = sorted(json.loads(path.read_text(encoding="utf-8"))["exit_code_by_key"])
    return random.Random(0).sample(names, min(size, len(names)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/mutants.json"))
    parser.add_argument("--sample", type=int, metavar="N", help="print the names of N mutants of each module")
    arguments = parser.parse_args()
    metas = sorted(Path("mutants").rglob("*.py.meta"))
    if arguments.sample:
        if not metas:
            raise SystemExit("there are no mutants to draw from: start `make mutants` once, which makes them first")
        print(*(name for path in metas for name in sample_of(path, arguments.sample)))
        return
    modules = {str(path): report_of(path) for path in (meta.relative_to("mutants").with_suffix("") for meta in metas)}
    modules = {name: report for name, report in modules.items() if report["num_checked"]}
    checked, killed = (sum(report[name] for report in modules.values()) for name in ("num_checked", "num_killed"))
    result = {
        "command": "make mutants",
        "machine": machine(),
        "mutmut": version("mutmut"),
        "num_checked": checked,
        "num_killed": killed,
    }
    arguments.output.write_text(json.dumps(result | {"modules": modules}, indent=1, ensure_ascii=False) + "\n")
    for name, report in modules.items():
        print(f"{name}: {report['num_killed']} of {report['num_checked']} killed, of {report['num_mutants']} in all")


if __name__ == "__main__":
    main()
