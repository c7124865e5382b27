"""`midskip demo`: a gated model, and a dense one of its FLOPs, trained on the same text for equally long."""

from __future__ import annotations

import json
import random
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.panel import Panel
from torch import Tensor

from midskip.cost import Meter
from midskip.data.prepare import prepare
from midskip.data.sources import Source
from midskip.evaluate import depth_of_tokens
from midskip.generate import generate
from midskip.locks import LOCK_FILE, locked
from midskip.model.modeling import MidskipForCausalLM
from midskip.report import comparison_table, depth_text, legend, print_paths
from midskip.runs import PAGE_FILE, PICTURE_FILE, REPORT_FILE, load_run
from midskip.train.recipe import DataSettings, ModelSettings, Recipe, RegularizerSettings, TrainingSettings
from midskip.train.run import train
from midskip.train.text import cut_windows

PROMPT = "The function returns"
STEPS = 500


def demo_recipe(output: str, steps: int = STEPS, source: str = "pydocs") -> Recipe:
    """The recipe of the demo: a gated model of 8 layers, half of whose block-tokens run, and a dense one of 4."""
    return Recipe(
        output=output,
        data=DataSettings(source=source),
        model=ModelSettings(policy_settings={"gates": "hard"}),
        regularizer=RegularizerSettings("target_share", {"target_share": 0.5, "outer": 1}),
        training=TrainingSettings(max_steps=steps, gate_learning_rate_scale=0.3, save_steps=0, report_to=[]),
        dense_layers=[4],
    )


def demo(output: str = "runs/demo", steps: int = STEPS, source: str = "pydocs", console: Console | None = None) -> dict:
    """Train both, compare them, write `report.json`, a picture and a page; returns the report.

    Raises:
        ValueError: the text cannot be used, or the folder holds something else.
    """
    console = console or Console()
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output is {output!r}, which is a file; expected a folder")
    earlier = {path.name for path in folder.iterdir()} - {LOCK_FILE} if folder.exists() else set()
    if earlier - {"text", "gated", REPORT_FILE, PICTURE_FILE, PAGE_FILE} or (earlier and "text" not in earlier):
        raise ValueError(f"output is {output!r}, which holds other files; give a new or empty folder")
    Source(source)  # refuses what cannot be used, while an earlier demo is still there
    with locked(folder):
        for name in earlier:  # an earlier demo
            shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
        return _demo(folder, steps, source, console)


def _demo(folder: Path, steps: int, source: str, console: Console) -> dict[str, Any]:
    """The same, in a folder that is empty and locked."""
    messages = Console(stderr=True, width=console.width)
    prepared = prepare(source, folder / "text", console=messages)
    recipe = demo_recipe(str(folder / "gated"), steps, str(prepared.folder))
    gated = train(recipe, title="gated, 8 layers", console=messages)
    (row,) = gated["dense"]
    folders = {"gated": folder / "gated", "dense": folder / "gated" / row["folder"]}
    dense = json.loads((folders["dense"] / REPORT_FILE).read_text(encoding="utf-8"))
    models = {name: load_run(path)[0] for name, path in folders.items()}
    _, validation = cut_windows(prepared, recipe.data)
    ids = torch.stack([validation[i]["input_ids"] for i in range(min(8, max(1, len(validation) - 1)))])
    prefill = time_prefill(models, ids)
    ids_sample = generate(models["gated"], prepared.tokenizer, PROMPT, max_new_tokens=120)
    report = {
        "gated": gated,
        "dense": dense,
        "prefill": prefill,
        "prefill_shape": list(ids.shape),
        "sample": prepared.tokenizer.decode(ids_sample),
    }
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for name in (PICTURE_FILE, PAGE_FILE):
        shutil.copyfile(folder / "gated" / name, folder / name)
    num_layers = models["gated"].config.num_skip_units
    tokens = depth_of_tokens(models["gated"], prepared.tokenizer, ids_sample)
    title = f"a sample of the gated model, trained for {steps} steps, coloured by depth"
    console.print(Panel(Group(depth_text(tokens, num_layers), legend(num_layers)), title=title))
    console.print(_table(report))
    files = {"numbers": REPORT_FILE, "picture": PICTURE_FILE, "page": PAGE_FILE}
    print_paths(console, {"run folder": folder, **{label: folder / name for label, name in files.items()}})
    return report


@torch.no_grad()
def time_prefill(models: dict[str, MidskipForCausalLM], ids_BT: Tensor, repeats: int = 9) -> dict[str, dict[str, Any]]:
    """Median seconds of the same prefill (head at the last position) of each model, interleaved, and what ran."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    result: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        with Meter(model) as meter:
            model(ids_BT.to(model.device), logits_to_keep=1, use_cache=False)
        result[name] = {"executed_share": meter.executed_share, "flops": meter.flops().total}
    for _ in range(repeats):
        for name in random.sample(list(models), len(models)):
            start = time.perf_counter()
            models[name](ids_BT.to(models[name].device), logits_to_keep=1)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    for name, values in seconds.items():
        result[name]["seconds"] = statistics.median(values)
    return result


def _table(report: dict[str, Any]) -> Any:
    gated, dense = report["gated"]["validation"], report["dense"]["validation"]
    prefill = report["prefill"]

    def row(label: str, pattern: str, name: str) -> tuple[str, str, str]:
        return label, pattern.format(gated[name]), pattern.format(dense[name])

    rows = [
        row("held-out loss (nats a token)", "{:.4f}", "loss"),
        row("bits per byte", "{:.4f}", "bits_per_byte"),
        row("block-tokens that ran", "{:.1%}", "executed_share"),
        ("  by layer, %", _percent(gated["share_by_layer"]), _percent(dense["share_by_layer"])),
        ("tokens by blocks run, %", _percent(gated["tokens_by_blocks"]), _percent(dense["tokens_by_blocks"])),
        row("FLOPs a token, executed", "{:,.0f}", "flops_per_token"),
        (
            f"prefill of {report['prefill_shape'][0]} x {report['prefill_shape'][1]} tokens",
            *(f"{prefill[name]['seconds'] * 1e3:.1f} ms" for name in ("gated", "dense")),
        ),
        ("training", *(f"{report[name]['training']['seconds']:.0f} s" for name in ("gated", "dense"))),
    ]
    layers = [len(side["share_by_layer"]) for side in (gated, dense)]
    columns = ("", f"gated, {layers[0]} layers", f"dense, {layers[1]} layers")
    return comparison_table(rows, columns, "the same text, the same number of steps")


def _percent(shares: list[float]) -> str:
    return " ".join(f"{100 * share:.0f}" for share in shares)
