"""Which tokens gain from depth, and whether a model whose depth goes to them is better than one whose depth is drawn.

    python benchmarks/depth_gain.py --text stories-train.txt --validation stories-valid.txt \\
        [--seed 0] [--steps 700] [--folder runs/learning] [--output benchmarks/results/depth_gain.json]

A trained model cannot be asked which tokens gain from depth: it has learnt to use depth where it had it. So a first
model is trained whose depths are drawn anew for each token in each step (`Fresh`), on it the gain of each pair of a
token and the one before it is measured, on training text, and a second model is trained from the start with depth for
the pairs that gained most (`Measured`). Beside them stands the same model with depth by a hash, of `learning.py`, in
whose folder a stopped run goes on. All keys are kept.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from learning import KV, RUNS, budget, prepared, run_folder, run_one
from safetensors.torch import load_file, save_file
from torch import Tensor

from midskip.bench.results import machine
from midskip.evaluate import batch_of
from midskip.model.packing import PackedBatch
from midskip.policies import Decision
from midskip.policies.difficulty import NUM_KINDS, drawn, kinds
from midskip.policies.middle_out import MiddleOut
from midskip.runs import RECIPE_FILE, load_run, write_atomically
from midskip.train import read_recipe
from midskip.train.text import cut_windows, open_text

WINDOWS = 8  # of a pass
MEASURED_SHARE = 0.4  # of the tokens of a pass; the others have drawn depths
PRIOR = 30.0  # tokens' worth of what is known of the token alone


class Fresh(MiddleOut):
    """Hard gates by a draw that is new for each token in each step.

    Attributes:
        imposed_N: int64 [N], gates that each token of the next pass runs; None: as drawn.
    """

    counts_steps = True

    def __init__(self, num_layers: int, width: int, initializer_range: float = 0.02):
        super().__init__(num_layers, width, initializer_range, gates="hard")
        self.imposed_N: Tensor | None = None

    def priority(self, token_N: Tensor, previous_N: Tensor) -> Tensor:
        return drawn(torch.arange(len(token_N), device=token_N.device), previous_N, int(self.num_steps))

    def decide(self, layer: int, h_ND: Tensor, state: dict[str, Any], layout: PackedBatch) -> Decision:
        if self.imposed_N is None:
            return super().decide(layer, h_ND, state, layout)
        return Decision(self.imposed_N > min(layer, self.num_layers - 1 - layer))


class Measured(MiddleOut):
    """Hard gates by the gains in a file: pairs that gain most stay longest."""

    def __init__(self, num_layers: int, width: int, initializer_range: float = 0.02, file: str = ""):
        super().__init__(num_layers, width, initializer_range, gates="hard")
        self.priority_K = load_file(file)["priority_K"]

    def priority(self, token_N: Tensor, previous_N: Tensor) -> Tensor:
        return self.priority_K.to(token_N.device)[kinds(token_N, previous_N)[1]]


@torch.no_grad()
def measure(run: Path, num_passes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bits of the predictions of tokens at each depth [M, num_gates], and those tokens and the ones before [M]."""
    torch.manual_seed(0)
    model, _ = load_run(run, trust=["depth_gain"])
    recipe, policy = read_recipe(run / RECIPE_FILE), model.eval().model.policy
    training, _ = cut_windows(open_text(recipe.data, run, None), recipe.data)
    found = []
    for start in range(len(training) - num_passes * WINDOWS, len(training), WINDOWS):
        batch = batch_of(training, range(start, start + WINDOWS), model.device)
        labels_BT = batch.pop("labels")
        target_N = F.pad(labels_BT[:, 1:], (0, 1), value=-100).flatten()
        measured_N = torch.rand(target_N.shape) < MEASURED_SHARE
        others_N = torch.randint(1, policy.num_gates + 1, target_N.shape)
        bits = []
        for depth in range(1, policy.num_gates + 1):
            policy.imposed_N = torch.where(measured_N, depth, others_N)
            logits_NV = model(**batch, use_cache=False).logits.flatten(0, 1).float()
            bits.append(F.cross_entropy(logits_NV, target_N, ignore_index=-100, reduction="none") / math.log(2))
        token_N = batch["input_ids"].flatten()
        previous_N = F.pad(batch["input_ids"][:, :-1], (1, 0)).flatten()
        previous_N[batch["position_ids"].flatten() == 0] = -1  # as the model sees it: a document has none before it
        kept_N = measured_N & (target_N != -100)
        found.append((torch.stack(bits, 1)[kept_N], token_N[kept_N], previous_N[kept_N]))
    bits_MG, token_M, previous_M = (torch.cat(parts) for parts in zip(*found, strict=True))
    return bits_MG, token_M, previous_M


def means_by_pair(value_M: Tensor, token_M: Tensor, previous_M: Tensor) -> tuple[Tensor, Tensor]:
    """Means [NUM_KINDS] by kind of pair, where few were seen close to that of the token alone; and their counts."""
    single_M, pair_M = kinds(token_M, previous_M)

    def sums(kind_M: Tensor, added_M: Tensor) -> Tensor:
        return torch.zeros(NUM_KINDS).index_add_(0, kind_M, added_M)

    ones_M, overall = torch.ones_like(value_M), value_M.mean()
    single_K = (sums(single_M, value_M) + PRIOR * overall) / (sums(single_M, ones_M) + PRIOR)
    expected_M, count_K = single_K[single_M], sums(pair_M, ones_M)
    expected_K = sums(pair_M, expected_M) / count_K.clamp(min=1)
    mean_K = expected_K + sums(pair_M, value_M - expected_M) / (count_K + PRIOR)
    return torch.where(count_K > 0, mean_K, overall), count_K


def to_priorities(gain_K: Tensor, count_K: Tensor) -> Tensor:
    """Spread evenly over [-2, 2) among tokens, in the order of the gains."""
    order = gain_K.argsort()
    share_K = count_K[order] + 1e-3
    place_K = torch.empty(NUM_KINDS)
    place_K[order] = (share_K.cumsum(0) - share_K / 2) / share_K.sum()
    return 4 * place_K - 2


def told_by(guess_M: Tensor, gain_M: Tensor) -> dict[str, float]:
    """How well a guess tells which tokens gain: the gain of those with the higher and the lower half of it."""
    order = guess_M.argsort(descending=True)
    higher, lower = gain_M[order].tensor_split(2)
    correlation = torch.corrcoef(torch.stack([guess_M, gain_M]))[0, 1].item()
    return {"correlation": correlation, "higher_half": higher.mean().item(), "lower_half": lower.mean().item()}


def describe(bits_MG: Tensor, token_M: Tensor, previous_M: Tensor) -> dict[str, Any]:
    """What `measure` found: mean bits by depth, what tells the gain of other tokens, and the most frequent pairs."""
    gain_M = bits_MG[:, 0] - bits_MG[:, -1]
    half = torch.arange(len(gain_M)) % 2 == 0
    guesses = {"gain of the pair": gain_M, "difficulty of the pair": bits_MG[:, 0]}
    told = {}
    for name, value_M in guesses.items():
        means_K, _ = means_by_pair(value_M[half], token_M[half], previous_M[half])
        told[name] = told_by(means_K[kinds(token_M, previous_M)[1]][~half], gain_M[~half])
    pairs, place_M, counts = torch.stack([previous_M, token_M], 1).unique(
        dim=0, return_inverse=True, return_counts=True
    )
    sums = torch.zeros(len(pairs), bits_MG.shape[1]).index_add_(0, place_M, bits_MG)
    frequent = counts.argsort(descending=True)[:60]
    return {
        "num_tokens": len(gain_M),
        "bits_by_gates_run": bits_MG.mean(0).tolist(),
        "gain_told_on_other_tokens_by": told,
        "frequent_pairs": [
            {"pair": pairs[i].tolist(), "count": int(counts[i]), "bits_by_gates_run": (sums[i] / counts[i]).tolist()}
            for i in frequent.tolist()
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--validation", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--passes", type=int, default=100, help="of 8 windows, to measure on")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, default=Path("runs/learning"))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    text = prepared(options.text, options.validation, options.folder)
    common = budget(0.5) + KV["keep"]
    first, second = "hard, drawn anew for each token, keys all", "hard, by measured gain, keys all"
    RUNS[first] = [*common, "--model.policy=depth_gain:Fresh", "--model.policy_settings={}"]
    rows = [run_one(first, options.seed, options.steps, text, options.folder)]
    run = run_folder(first, options.seed, options.steps, options.folder)
    bits_MG, token_M, previous_M = measure(run, options.passes)
    gain_K, count_K = means_by_pair(bits_MG[:, 0] - bits_MG[:, -1], token_M, previous_M)
    file = options.folder / f"gain-{options.steps}-{options.seed}.safetensors"
    save_file({"priority_K": to_priorities(gain_K, count_K)}, file)
    settings = json.dumps({"file": str(file.resolve())})
    RUNS[second] = [*common, "--model.policy=depth_gain:Measured", f"--model.policy_settings={settings}"]
    rows += [run_one(name, options.seed, options.steps, text, options.folder) for name in (second, "hard, keys all")]
    for row in rows:
        del row["settings"]  # of the second with a path of this machine
    found = {"machine": machine(), "gain": describe(bits_MG, token_M, previous_M), "rows": rows}
    if options.output:
        write_atomically(options.output, json.dumps(found).replace('{"run"', '\n{"run"') + "\n")
    for row in rows:
        print({what: row[what] for what in ("run", "seed", "steps", "bits_per_byte", "executed_share")})
    print(found["gain"]["bits_by_gates_run"], found["gain"]["gain_told_on_other_tokens_by"])


if __name__ == "__main__":
    main()
