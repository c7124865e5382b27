"""Whether the budget controller holds its target on the demo's model.

    python benchmarks/budget.py [--steps 400] [--output benchmarks/results/budget.json]

For each target: the largest distance between the target and the executed share averaged over any 100 consecutive
steps of the last half of the run, and the model on held-out text.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

from core_speed import machine

from midskip.demo import demo_recipe
from midskip.train.run import train

WINDOW_STEPS = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.4, 0.6, 0.8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows = []
    for target in arguments.targets:
        for seed in arguments.seeds:
            with tempfile.TemporaryDirectory() as folder:
                recipe = replace(demo_recipe(folder, arguments.steps), dense_layers=[])
                recipe.controller.settings["target_share"] = target
                recipe.training.seed = seed
                report = train(recipe, title=f"target {target}, seed {seed}")
                history = [json.loads(line) for line in (Path(folder) / "history.jsonl").read_text().splitlines()]
            shares = [row["executed_share"] for row in history][arguments.steps // 2 :]
            windows = [
                sum(shares[start : start + WINDOW_STEPS]) / WINDOW_STEPS
                for start in range(len(shares) - WINDOW_STEPS + 1)
            ]
            validation = report["validation"]
            rows.append(
                {
                    "target_share": target,
                    "seed": seed,
                    "largest_distance": max(abs(share - target) for share in windows),
                    "largest_distance_of_one_step": max(abs(share - target) for share in shares),
                    **{name: validation[name] for name in ("executed_share", "share_by_layer", "bits_per_byte")},
                }
            )
            print(rows[-1], flush=True)
    if arguments.output:
        result = {"machine": machine(), "steps": arguments.steps, "window_steps": WINDOW_STEPS, "rows": rows}
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
