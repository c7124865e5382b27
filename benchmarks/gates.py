"""How many soft gates of `middle_out` are 0 before the first step, and how many tokens could still move them.

    python benchmarks/gates.py [--output benchmarks/results/gates.json]

For each start, and both kinds of norms: by layer of the first half, which the second mirrors, the share of tokens whose
gate is exactly 0, and the share of tokens whose own score in this layer gets a gradient from the sum of all gates. The
shape is the paper's; random tokens.

N packed tokens that are scored, D width.
"""

import argparse
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from midskip import MidskipConfig, MidskipForCausalLM
from midskip.bench.results import machine
from midskip.policies.middle_out import STARTS
from midskip.runs import to_json, write_atomically

SHAPE: dict[str, Any] = {
    "vocab_size": 50257, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 1024,
}  # fmt: skip
TOKENS = (2, 512)
SEEDS = (0, 1, 2)
MEASURES = ("gates_exactly_0", "tokens_with_gradient")


def measure(shape: dict[str, Any], start: str, norms: str, seed: int) -> dict[str, list[float]]:
    """`MEASURES` of one model, by layer."""
    torch.manual_seed(seed)
    config = MidskipConfig(**shape, norms=norms, skipped_kv="keep", policy_settings={"start": start})
    model = MidskipForCausalLM(config)
    policy: Any = model.model.policy
    before_relu: list[Tensor] = []

    def scored(layer: int, h_ND: Tensor) -> Tensor:
        before_relu.append(F.linear(h_ND, policy.weight[layer : layer + 1], policy.bias[layer : layer + 1])[:, 0])
        before_relu[-1].retain_grad()
        return before_relu[-1].relu()

    policy._score = scored
    gates = model(torch.randint(config.vocab_size, TOKENS), use_cache=False).gates[: policy.num_gates]
    gates.sum().backward()
    moved = [0 if score_N.grad is None else int(score_N.grad.count_nonzero()) for score_N in before_relu]
    return {
        "gates_exactly_0": (gates == 0).double().mean((1, 2)).tolist(),
        "tokens_with_gradient": [count / gates[0].numel() for count in moved],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| start | norms | gates exactly 0, % | overall | tokens with gradient, % | overall |", "| --- " * 6 + "|"]
    for row in rows:
        cells = [f"`{row['start']}`", row["norms"]]
        for name in MEASURES:
            cells += [" ".join(f"{100 * share:.0f}" for share in row[name]), f"{100 * fmean(row[name]):.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = []
    for norms in ("sandwich", "pre"):
        for start in STARTS:
            runs = [measure(SHAPE, start, norms, seed) for seed in SEEDS]
            means = {name: [fmean(shares) for shares in zip(*(run[name] for run in runs))] for name in MEASURES}
            rows.append({"start": start, "norms": norms, "seeds": SEEDS, **means})
            print(table(rows).splitlines()[-1], flush=True)
    if options.output:
        write_atomically(options.output, to_json({"machine": machine(), "shape": SHAPE, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
