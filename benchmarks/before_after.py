"""Whether a change made prefill, decoding or training slower: the package at two commits, timed in turns.

    python benchmarks/before_after.py OLD [NEW] [--rounds 9] [--output benchmarks/results/before_after.json]

Each commit is checked out beside the other and imported by a process of its own. Both build the same model (12 layers,
d 768, vocabulary 50,257; nothing skipped, and half of the block-tokens by depths drawn for positions) and take turns of
a few seconds, so that what else the machine does falls on both. A ratio is of two turns that stand side by side: NEW
over OLD, above 1 is slower. Names of packages that have moved since are looked up where they were.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHARES = (0.0, 0.5)  # of block-tokens that are skipped
DTYPES = ("float32", "bfloat16")
TASKS = ("prefill", "decode", "training")
PROMPT, CONTEXT, NEW_TOKENS, WINDOW = 512, 256, 12, 192  # tokens
FIXED_DEPTHS = ("midskip.policies.controls", "midskip.testing.policies")  # where the policy is, and where it was


def build(share: float, dtype: str) -> Any:
    package = importlib.import_module("midskip")
    module = next(name for name in FIXED_DEPTHS if importlib.util.find_spec(name))
    torch.manual_seed(0)
    policy = (
        {"policy": f"{module}:FixedDepths", "policy_settings": {"skip_share": share}} if share else {"policy": "dense"}
    )
    return package.MidskipForCausalLM(package.MidskipConfig(**policy)).to(getattr(torch, dtype))


def task_of(name: str, model: Any, ids_BT: Tensor) -> Callable[[], float]:
    """What is timed once, in seconds."""

    @torch.no_grad()
    def prefill() -> float:
        begun = time.perf_counter()
        model.eval()(ids_BT[:, :PROMPT], use_cache=True, logits_to_keep=1)
        return time.perf_counter() - begun

    @torch.no_grad()
    def decode() -> float:
        cache = model.eval()(ids_BT[:, :CONTEXT], use_cache=True, logits_to_keep=1).past_key_values
        begun = time.perf_counter()
        for column in range(CONTEXT, CONTEXT + NEW_TOKENS):
            model(ids_BT[:, column : column + 1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - begun

    def training() -> float:
        model.train().zero_grad(set_to_none=True)
        begun = time.perf_counter()
        model(ids_BT[:, :WINDOW], labels=ids_BT[:, :WINDOW]).loss.backward()
        return time.perf_counter() - begun

    return {"prefill": prefill, "decode": decode, "training": training}[name]


def work() -> None:
    """The process of a commit: for each line `task dtype share` it prints the seconds of one turn."""
    models: dict[tuple[str, str], Any] = {}
    ids_BT = torch.randint(50257, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    for line in sys.stdin:
        task, dtype, share = line.split()
        if (dtype, share) not in models:
            models.clear()  # one at a time
            models[dtype, share] = build(float(share), dtype)
        print(task_of(task, models[dtype, share], ids_BT)(), flush=True)


def start(commit: str, folder: Path) -> subprocess.Popen:
    path = folder / commit
    subprocess.run(["git", "worktree", "add", "--detach", str(path), commit], check=True, capture_output=True)
    variables = os.environ | {"PYTHONPATH": str(path / "src")}
    command = [sys.executable, __file__, "--work"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables)


def turn(process: subprocess.Popen, line: str) -> float:
    assert process.stdin and process.stdout
    process.stdin.write(line + "\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def compare(old: str, new: str, rounds: int) -> dict[str, Any]:
    from midskip.bench.results import machine
    from midskip.bench.timing import spread

    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        processes = {commit: start(commit, Path(folder)) for commit in (old, new)}
        try:
            for dtype in DTYPES:
                for share in SHARES:
                    for task in TASKS:
                        times: dict[str, list[float]] = {old: [], new: []}
                        for number in range(rounds + 1):
                            order = (old, new) if number % 2 else (new, old)
                            for commit in order:
                                times[commit].append(turn(processes[commit], f"{task} {dtype} {share}"))
                        ratios = [after / before for before, after in zip(times[old][1:], times[new][1:], strict=True)]
                        name = f"{task}, {dtype}, {share:g} skipped"
                        rows[name] = {"ratio": spread(ratios), "new_s": spread(times[new][1:])}
                        print(f"{name}: {rows[name]['ratio']['median']:.3f}", flush=True)
        finally:
            for commit, process in processes.items():
                process.kill()
                subprocess.run(["git", "worktree", "remove", "--force", f"{folder}/{commit}"], check=False)
    return {"machine": machine(), "old": old, "new": new, "rounds": rounds, "rows": rows}


def main() -> None:
    if sys.argv[1:] == ["--work"]:
        return work()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("new", nargs="?", default="HEAD")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/before_after.json"))
    arguments = parser.parse_args()
    old, new = (
        subprocess.run(["git", "rev-parse", "--short", name], check=True, capture_output=True, text=True).stdout.strip()
        for name in (arguments.old, arguments.new)
    )
    result = compare(old, new, arguments.rounds)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
