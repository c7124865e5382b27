"""How alive the gates of `middle_out` are at step 0, for each way to start them.

    python benchmarks/gates.py [--output benchmarks/results/gates.json]

By layer of the first half: the share of tokens whose gate is exactly 0, and the share whose own score gets a gradient
from the sum of the gates. Shape: the paper's (12 layers, d 768, 12 heads, sandwich norms), random tokens, 3 seeds.
"""

import argparse
import json
from pathlib import Path

import torch
from core_speed import SHAPE, machine

import midskip


def measure(start: str, norms: str, seed: int) -> dict:
    """Shares by layer for one model, from one forward pass and the slope of each gate in its own score."""
    torch.manual_seed(seed)
    config = midskip.MidskipConfig(**SHAPE, norms=norms, skipped_kv="keep", policy_settings={"start": start})
    model = midskip.MidskipForCausalLM(config).train()
    policy, scores = model.model.policy, []

    def score(layer: int, h_nd: torch.Tensor) -> torch.Tensor:
        pre_n = torch.nn.functional.linear(h_nd, policy.weight[layer : layer + 1], policy.bias[layer : layer + 1])[:, 0]
        scores.append(pre_n)
        pre_n.retain_grad()
        return pre_n.relu()

    policy._score = score
    output = model(torch.randint(0, SHAPE["vocab_size"], (2, 512)))
    output.gates.sum().backward()
    half = SHAPE["num_hidden_layers"] // 2
    return {
        "gates_exactly_0": (output.gates[:half] == 0).float().mean((1, 2)).tolist(),
        "tokens_with_gradient": [(pre_n.grad != 0).float().mean().item() for pre_n in scores],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows = []
    for norms in ("sandwich", "pre"):
        for start in ("open", "spread", "released"):
            runs = [measure(start, norms, seed) for seed in range(3)]
            row = {"start": start, "norms": norms, "seeds": [0, 1, 2]}
            for name in runs[0]:
                by_layer = [sum(values) / len(runs) for values in zip(*(run[name] for run in runs))]
                row[name] = [round(value, 4) for value in by_layer]
                row[f"{name}_overall"] = round(sum(by_layer) / len(by_layer), 4)
            print(row, flush=True)
            rows.append(row)
    if arguments.output:
        arguments.output.write_text(json.dumps({"machine": machine(), "shape": SHAPE, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
