"""Prompts whose answers can be checked, under budgets: which of those that the original passes are still passed.

    python benchmarks/prompts.py FOLDER OUTPUT.json --budgets 0.9 0.8 0.6

FOLDER holds a model that `midskip retrofit` wrote. A prompt is passed if one of its expected texts is among the first
new tokens of greedy search. The original is the model under budget 1.0.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from midskip import MidskipForCausalLM
from midskip.bench.results import machine
from midskip.budget.monitor import temporary_limits
from midskip.generate import blocks_counted, generate
from midskip.runs import to_json

PROMPTS = Path(__file__).with_name("prompts.json")
NEW_TOKENS = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("output", type=Path)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.9, 0.8, 0.6])
    options = parser.parse_args()
    model = MidskipForCausalLM.from_pretrained(options.folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    prompts = json.loads(PROMPTS.read_text(encoding="utf-8"))
    passed = under_budget(model, tokenizer, prompts, 1.0)["passed"]
    theirs = [prompt for prompt in prompts if prompt["prompt"] in passed]
    found: dict[str, Any] = {"machine": machine(), "asked": len(prompts), "passed_by_the_original": passed}
    found["budgets"] = [under_budget(model, tokenizer, theirs, budget) for budget in options.budgets]
    options.output.write_text(to_json(found) + "\n", encoding="utf-8")
    for row in found["budgets"]:
        shares = f"{row['share_of_prompts']:.1%} of the blocks ran in prompts, {row['share_of_new_tokens']:.1%} after"
        print(f"budget {row['budget']}: {len(row['passed'])} of {len(theirs)} passed; {shares}")


def under_budget(
    model: MidskipForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: list[dict[str, Any]], budget: float
) -> dict[str, Any]:
    """Prompts passed, and the shares of blocks that ran for tokens of prompts and for new ones."""
    passed, of_prompts, of_new = [], [], []
    with temporary_limits(model):
        model.set_budget(budget)
        for prompt in prompts:
            length = len(tokenizer(prompt["prompt"])["input_ids"])
            with blocks_counted(model) as blocks:
                ids = generate(model, tokenizer, prompt["prompt"], NEW_TOKENS, temperature=0)
            answer = tokenizer.decode(ids[length:])
            if any(expected in answer for expected in prompt["expect"]):
                passed.append(prompt["prompt"])
            of_prompts += blocks[:length]
            of_new += blocks[length:]
    layers = model.config.num_skip_units
    return {
        "budget": budget,
        "passed": passed,
        "share_of_prompts": sum(of_prompts) / len(of_prompts) / layers,
        "share_of_new_tokens": sum(of_new) / len(of_new) / layers,
    }


if __name__ == "__main__":
    main()
