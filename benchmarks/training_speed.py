"""Whole optimizer steps in the Trainer: what skipping saves, against dense models of ours and of transformers.

    python benchmarks/training_speed.py runs/wiki-tiny-gated runs/wiki-tiny-dense [--output FILE.json]

Takes a gated run and its dense twin, with the shape, text, batch and regularizer of their recipes, and trains all
models on in turns: the gated one from its trained weights, so at the share that its gates really reach, and with its
regularizer; the others from scratch. Llama is transformers' `LlamaForCausalLM` with SDPA, in transformers' own Trainer,
with the same optimizer and arguments. A time is that of an optimizer step with its batch, its gradient norm and
everything that the Trainer's callbacks do; medians of all steps but the first two of each turn. Executed FLOPs are what
`Meter` counted in logged steps, forward and backward, head included.

In turns of the first kind documents see each other, as Llama needs for its plain causal attention; in those of the
second, ours alone, they are kept apart if the recipe says so.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from core_speed import machine
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback
from transformers.utils import logging

from midskip.data import TokenWindows
from midskip.model.modeling import MidskipForCausalLM
from midskip.runs import RECIPE_FILE, load_run
from midskip.train.optimizer import build_optimizer
from midskip.train.recipe import Recipe, read_recipe
from midskip.train.run import training_arguments
from midskip.train.text import cut_windows, open_text
from midskip.train.trainer import MidskipTrainer

WARM_UP_STEPS = 2


class StepTimes(TrainerCallback):
    """Seconds from the end of one step to the end of the next."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_end(self, *arguments: Any, **more: Any) -> None:
        now_s = time.perf_counter()
        if hasattr(self, "last_s"):
            self.seconds.append(now_s - self.last_s)
        self.last_s = time.perf_counter()


def turn(
    model: nn.Module, recipe: Recipe, windows: TokenWindows, tokenizer: Any, regularizer: Any
) -> tuple[list[float], list[dict]]:
    """Train on for a few steps; seconds of each but the first ones, and our history."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(recipe.training, Path(folder))
        common: dict[str, Any] = {"model": model, "args": arguments, "train_dataset": windows}
        if isinstance(model, MidskipForCausalLM):
            trainer: Trainer = MidskipTrainer(regularizer, recipe.training, lambda module: {}, tokenizer, 1.0, **common)
        else:
            arguments.max_grad_norm = recipe.training.max_grad_norm
            trainer = Trainer(optimizers=(build_optimizer(model, recipe.training), None), **common)
        times = StepTimes()
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(times)
        trainer.train()
    return times.seconds[WARM_UP_STEPS - 1 :], getattr(trainer, "history", [])


def loader_seconds(windows: TokenWindows, batch_size: int, repeats: int = 50) -> float:
    """Median seconds to make one batch."""
    order = torch.randperm(len(windows)).tolist()
    batches = iter(DataLoader(windows, batch_size, sampler=order))
    seconds = []
    for _ in range(min(repeats, len(windows) // batch_size)):
        start_s = time.perf_counter()
        next(batches)
        seconds.append(time.perf_counter() - start_s)
    return statistics.median(seconds)


def llama(recipe: Recipe, vocab_size: int) -> LlamaForCausalLM:
    shape = recipe.model
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.num_hidden_layers,
            num_attention_heads=shape.num_attention_heads,
            num_key_value_heads=shape.num_key_value_heads,
            max_position_embeddings=recipe.data.length,
            attn_implementation="sdpa",
            use_cache=False,
        )
    )


def compare(
    models: dict[str, tuple[nn.Module, Recipe, Any]], windows: TokenWindows, tokenizer: Any, rounds: int
) -> dict[str, dict[str, Any]]:
    """Median step seconds, and what ran, of each model."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    ran: dict[str, list[dict]] = {name: [] for name in models}
    for _ in range(rounds):
        for name in random.sample(list(models), len(models)):
            model, recipe, regularizer = models[name]
            times, history = turn(model, recipe, windows, tokenizer, regularizer)
            seconds[name] += times
            ran[name] += history
    rows = {}
    for name in models:
        row: dict[str, Any] = {"step_seconds": statistics.median(seconds[name]), "num_steps": len(seconds[name])}
        if ran[name]:
            row["executed_share"] = statistics.mean(row["executed_share"] for row in ran[name])
            row["flops_per_token"] = statistics.mean(
                row["flops_per_token"] for row in ran[name] if "flops_per_token" in row
            )
        rows[name] = row
        print(name, row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gated", type=Path)
    parser.add_argument("dense", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    recipes = {name: read_recipe(getattr(arguments, name) / RECIPE_FILE) for name in ("gated", "dense")}
    for recipe in recipes.values():
        # steady: no warm-up, next to no change, one logged step a turn
        recipe.training = replace(
            recipe.training, steps=arguments.steps, warmup_ratio=0.0, learning_rate=1e-6, eval_steps=0,
            save_steps=0, logging_steps=arguments.steps, report_to=[],
        )  # fmt: skip
    text = open_text(recipes["gated"].data, arguments.gated, Console(stderr=True))
    apart, _ = cut_windows(text, recipes["gated"].data)
    together, _ = cut_windows(text, replace(recipes["gated"].data, separate_documents=False))
    gated, tokenizer = load_run(arguments.gated)
    regularizer = recipes["gated"].build_regularizer()
    trained = sorted(arguments.gated.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[-1]
    regularizer.load_state_dict(json.loads((trained / "regularizer.json").read_text()))
    sandwich, pre = recipes["dense"], replace(recipes["dense"], model=replace(recipes["dense"].model, norms="pre"))
    ours = {
        "gated, trained": (gated, recipes["gated"], regularizer),
        "dense twin": (
            MidskipForCausalLM(sandwich.build_config(len(tokenizer))),
            sandwich,
            sandwich.build_regularizer(),
        ),
    }
    others = {
        "dense, pre-norm": (MidskipForCausalLM(pre.build_config(len(tokenizer))), pre, pre.build_regularizer()),
        "llama": (llama(sandwich, len(tokenizer)), sandwich, None),
    }
    result: dict[str, Any] = {"machine": machine(), "threads": torch.get_num_threads(), "steps_a_turn": arguments.steps}
    for kind, models, windows in (
        ("documents together", ours | others, together),
        ("as the recipe says", ours, apart),
    ):
        rows = result[kind] = compare(models, windows, tokenizer, arguments.rounds)
        ran, twin = rows["gated, trained"], rows["dense twin"]
        ran["flops_of_twin"] = ran["flops_per_token"] / twin["flops_per_token"]
        ran["time_of_twin"] = ran["step_seconds"] / twin["step_seconds"]
        ran["time_of_flops"] = ran["time_of_twin"] / ran["flops_of_twin"]
        for name in rows if "llama" in rows else ():
            rows[name]["time_of_llama"] = rows[name]["step_seconds"] / rows["llama"]["step_seconds"]
        loading_s = loader_seconds(windows, sandwich.training.batch_size)
        twin["loader_share"] = loading_s * sandwich.training.gradient_accumulation_steps / twin["step_seconds"]
        print(kind, json.dumps(rows, indent=1), flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
