"""How gated models learn, beside dense ones: runs on bytes, several seeds, with the curves that show a collapse.

    python benchmarks/learning.py --text stories-train.txt --validation stories-valid.txt \\
        --runs "hard;dense-4" --seeds 0,1,2 --steps 700 [--folder runs/learning]
    python benchmarks/learning.py --collect benchmarks/results/learning.json [--folder runs/learning]

The recipe is `recipes/bytes-tiny.yaml`, of which each run changes what `RUNS` says. A run that was stopped goes on; one
that is done is not done again. `--collect` puts the rows of all runs in the folder into one file, each in place of an
earlier one of the same run, seed and steps.
"""

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch

from midskip.bench.results import machine
from midskip.budget.calibrate import calibrate, thinned
from midskip.data import prepare, token_bytes
from midskip.evaluate import batch_of, evaluate
from midskip.regularizers.target_share import TargetShare
from midskip.runs import load_run, write_atomically
from midskip.train import read_recipe, train
from midskip.train.text import cut_windows, open_text

RECIPE = Path(__file__).parents[1] / "recipes" / "bytes-tiny.yaml"
ROW_FILE = "row.json"
BUDGETS = (0.3, 0.5, 0.75, 1.0)
UNDER_BUDGETS = ("hard", "hard, sampled budgets")  # runs whose trained model is tried under `BUDGETS`
CURVE_STEPS = 20  # steps that a point of a curve is the mean of
SOFT = ["--model.policy_settings={start: spread}", "--training.gate_learning_rate_scale=0.1"]
FIXED_GAIN = "--regularizer.name=learning:FixedGain"
OLD_BUDGET = "--regularizer.settings={target_share: 0.5, spread: 0.8}"


class FixedGain(TargetShare):
    """A budget whose gain does not adapt: the control for what that is worth."""

    gain_range = (1.0, 1.0)


def dense(num_layers: int) -> list[str]:
    return [
        "--model.policy=dense", "--model.policy_settings={}", f"--model.num_hidden_layers={num_layers}",
        "--regularizer.name=none", "--regularizer.settings={}",
    ]  # fmt: skip


PAPERS_TARGETS = "{mean_target_start: 1.0, mean_target_end: 0.1}"


def paper(name: str, start: str = "open", settings: str = PAPERS_TARGETS) -> list[str]:
    return [
        f"--model.policy_settings={{start: {start}}}", f"--regularizer.name={name}",
        f"--regularizer.settings={settings}", "--training.gate_learning_rate_scale=0.1",
    ]  # fmt: skip


def budget(share: float, **settings: Any) -> list[str]:
    given = {"target_share": share, "outer": 1, **settings}
    return [f"--regularizer.settings={json.dumps(given)}"]


KV = {"keep": ["--model.skipped_kv=keep"], "drop": ["--model.skipped_kv=drop"]}
STATES = ["--model.policy_settings={gates: hard, scores: hidden_states}"]
DIFFICULTY = ["--model.policy_settings={gates: hard, scores: difficulty}"]
REDRAWN = ["--model.policy=midskip.policies.controls:Redrawn", "--model.policy_settings={redraw_steps: 10}"]
RUNS: dict[str, list[str]] = {
    **{f"dense-{num_layers}": dense(num_layers) for num_layers in (2, 3, 4, 5, 6, 8)},
    # the recipe as it is, and what it costs to drop the keys of tokens that skip, to come down slowly, ...
    "hard": budget(0.5) + KV["drop"],
    "hard, keys all": budget(0.5) + KV["keep"],
    "hard, ramp 300": budget(0.5, ramp_steps=300) + KV["drop"],
    "hard, hidden states": budget(0.5) + KV["drop"] + STATES,
    "hard, difficulty": budget(0.5) + KV["drop"] + DIFFICULTY,
    "hard, redrawn every 10 steps": budget(0.5) + KV["drop"] + REDRAWN,
    # one model for many budgets, and twins trained for one
    "hard, sampled budgets": budget(0.5, lowest_share=0.3) + KV["drop"],
    "hard, 0.3": budget(0.3) + KV["drop"],
    "hard, 0.75": budget(0.75) + KV["drop"],
    # the soft gates of the paper
    "soft, budget, keys gated": [*SOFT, OLD_BUDGET, *KV["drop"]],
    "soft, budget, keys all": [*SOFT, OLD_BUDGET, *KV["keep"]],
    "soft, budget, open start": ["--model.policy_settings={start: open}", *SOFT[1:], OLD_BUDGET, *KV["drop"]],
    # why soft gates collapse under a budget: as the recipes had them once, and with one thing changed
    "soft, fixed gain": [*SOFT, OLD_BUDGET, *KV["drop"], FIXED_GAIN],
    "soft, fixed gain, keys all": [*SOFT, OLD_BUDGET, *KV["keep"], FIXED_GAIN],
    "soft, fixed gain, scores not trained": [SOFT[0], "--training.gate_learning_rate_scale=0", OLD_BUDGET, FIXED_GAIN],
    "soft, fixed gain, no norm after a branch": [*SOFT, OLD_BUDGET, FIXED_GAIN, "--model.norms=pre"],
    "soft, proportional": paper("proportional") + KV["drop"],
    "soft, proportional, released": paper("proportional", "released") + KV["drop"],
    "soft, adaptive": paper("adaptive") + KV["drop"],
    "soft, sparsity": paper("sparsity", settings="{}") + KV["drop"],
    "soft, sparsity_variance": paper("sparsity_variance", settings="{}") + KV["drop"],
    "soft, sparsity_variance_l2": paper("sparsity_variance_l2") + KV["drop"],
    "soft, none": paper("none", settings="{}") + KV["drop"],
}  # fmt: skip


def prepared(text: Path, validation: Path, folder: Path) -> Path:
    """The folder of prepared text, made if it is not there."""
    prepared_text = folder / "text"
    if not (prepared_text / "prepared.json").is_file():
        limits = {"max_tokens": 14_000_000, "max_validation_tokens": 100_000}
        prepare(str(text), prepared_text, tokenizer="bytes", validation=str(validation), **limits)
    return prepared_text


def run_folder(name: str, seed: int, steps: int, folder: Path) -> Path:
    return folder / f"{name.replace(', ', '_').replace(' ', '-')}-{steps}-{seed}"


def run_one(name: str, seed: int, steps: int, text: Path, folder: Path) -> dict[str, Any]:
    """Train one, or go on with it; gives its row, which is also written into its folder."""
    output = run_folder(name, seed, steps, folder)
    if (output / ROW_FILE).is_file():
        return json.loads((output / ROW_FILE).read_text(encoding="utf-8"))
    common = [
        f"--output={output}", f"--data.source={text}", f"--training.seed={seed}", f"--training.max_steps={steps}",
        f"--training.eval_steps={steps // 5}", "--training.save_steps=250", "--training.report_to=[]",
        "--dense_layers=[]",
    ]  # fmt: skip
    recipe = read_recipe(RECIPE, [*common, *RUNS[name]])
    report = train(recipe, resume=output.is_dir(), title=f"{name}, seed {seed}")
    history = [json.loads(line) for line in (output / "history.jsonl").read_text(encoding="utf-8").splitlines()]
    row = {"run": name, "seed": seed, "steps": steps, "settings": RUNS[name], **machine()}
    measured = report["validation"]
    for what in ("bits_per_byte", "executed_share", "share_by_layer", "tokens_by_blocks", "flops_per_token"):
        row[what] = measured[what]
    row |= {"collapse": report["training"]["collapse"], "share_in_training": report["training"]["executed_share"]}
    row |= {"seconds": report["training"]["seconds"], "curves": curves(history)}
    row["above_best_bits"] = (measured["loss"] - report["best"]["loss"]) / math.log(2)
    warm = history[steps // 10 :]
    row["gradient_norm"] = {
        "median": statistics.median(step["gradient_norm"] for step in warm),
        "median_of_last_tenth": statistics.median(step["gradient_norm"] for step in history[-steps // 10 :]),
        "largest": max(step["gradient_norm"] for step in warm),
    }
    row["gradients"] = gradients(output, recipe)
    if name in UNDER_BUDGETS:
        row["budgets"] = under_budgets(output, recipe)
    write_atomically(output / ROW_FILE, json.dumps(row))
    return row


def curves(history: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Points of `CURVE_STEPS` steps each: training bits a byte, share, gradient norm, and by layer of the first half
    the mean and the standard deviation of the gates of the tokens that run."""
    points: dict[str, list[Any]] = {}
    for start in range(0, len(history), CURVE_STEPS):
        part = history[start : start + CURVE_STEPS]
        half = (len(part[0]["share_by_layer"]) + 1) // 2
        present, mean, variance = (
            torch.tensor([step[f"{what}_by_layer"][:half] for step in part]).mean(0)
            for what in ("share", "gate_mean", "gate_variance")
        )
        of_present = mean / present.clamp(min=1e-9)
        spread = ((variance + mean**2) / present.clamp(min=1e-9) - of_present**2).clamp(min=0).sqrt()
        point = {
            "step": part[-1]["step"],
            "bits": round(statistics.fmean(step["cross_entropy"] for step in part) / math.log(2), 4),
            "share": round(statistics.fmean(step["executed_share"] for step in part), 4),
            "gradient_norm": round(statistics.median(step["gradient_norm"] for step in part), 3),
            "gate_mean": [round(x, 4) for x in of_present.tolist()],
            "gate_std": [round(x, 4) for x in spread.tolist()],
        }
        for name, value in point.items():
            points.setdefault(name, []).append(value)
    return points


def gradients(output: Path, recipe: Any) -> dict[str, float]:
    """Of the trained model on eight held-out windows: the norm of the gradient by kind of parameter, and the mean size
    of the weights of the norms that end a branch, 0 without."""
    model, _ = load_run(output)
    _, validation = cut_windows(open_text(recipe.data, output, None), recipe.data)  # pyright: ignore[reportArgumentType]
    batch = batch_of(validation, range(8), model.device)
    model.train()(**batch).loss.backward()
    kinds = {"gates": ".policy.", "branch_norms": ".post_", "embedding": "embed_tokens", "head": "lm_head"}
    found = {kind: [] for kind in (*kinds, "rest")}
    for name, parameter in model.named_parameters():
        kind = next((kind for kind, part in kinds.items() if part in name), "rest")
        found[kind] += [] if parameter.grad is None else [parameter.grad.flatten()]
    norms = {kind: torch.cat(parts).norm().item() if parts else 0.0 for kind, parts in found.items()}
    sizes = [parameter.abs().mean().item() for name, parameter in model.named_parameters() if ".post_" in name]
    return norms | {"size_of_branch_norms": statistics.fmean(sizes) if sizes else 0.0}


def under_budgets(output: Path, recipe: Any) -> list[dict[str, Any]]:
    """Share and bits of the trained model on the held-out text where each of `BUDGETS` is the share that runs, and
    `served` as `set_budget` applies it."""
    model, tokenizer = load_run(output)
    _, validation = cut_windows(open_text(recipe.data, output, None), recipe.data)
    calibration = calibrate(model, thinned(validation, 40_000), lowest=0.25)

    def measured() -> dict[str, float]:
        found = evaluate(model, validation, token_bytes(tokenizer))
        return {what: found[what] for what in ("executed_share", "bits_per_byte")}

    rows = []
    for share in BUDGETS:
        model.model.policy.set_limits(calibration.scale_at(share))
        row: dict[str, Any] = {"budget": share, **measured()}
        model.set_budget(share)
        rows.append(row | {"served": measured()})
    return rows


def collect(folder: Path, file: Path) -> None:
    """Put the rows of all runs in the folder into the file, in the order of `RUNS`."""
    earlier = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob(f"*/{ROW_FILE}")]
    rows = {(row["run"], row["steps"], row["seed"]): row for row in [*earlier, *found]}
    names = list(RUNS)  # without those of `depth_gain.py`
    kept = sorted((key for key in rows if key[0] in names), key=lambda key: (names.index(key[0]), *key[1:]))
    write_atomically(file, json.dumps({"rows": [rows[key] for key in kept]}).replace('{"run"', '\n{"run"') + "\n")
    print(f"{len(kept)} rows in {file}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="text to train on; its first 14 MB, as `midskip prepare` takes it")
    parser.add_argument("--validation", type=Path, help="held-out text, of which 100,000 bytes are used")
    parser.add_argument("--runs", default="hard;dense-4", help=f"of: {'; '.join(RUNS)} (separated by ;)")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, default=Path("runs/learning"))
    parser.add_argument("--collect", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.text:
        text = prepared(options.text, options.validation, options.folder)
        names = [name.strip() for name in options.runs.split(";")]
        for name in names:
            if name not in RUNS:
                parser.error(f"there is no run {name!r}; the runs are: {'; '.join(RUNS)}")
        for seed in map(int, options.seeds.split(",")):
            for name in names:
                row = run_one(name, seed, options.steps, text, options.folder)
                print(
                    {what: row[what] for what in ("run", "seed", "steps", "bits_per_byte", "executed_share")},
                    flush=True,
                )
    if options.collect:
        collect(options.folder, options.collect)


if __name__ == "__main__":
    main()
