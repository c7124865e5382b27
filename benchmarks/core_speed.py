"""Time and memory of the packed forward on CPU, as ratios in one run.

    python benchmarks/core_speed.py [--repeats 9] [--output benchmarks/results/core_speed.json]

Every ratio is of medians of interleaved runs, in shuffled order. Shape: 12 layers, d 768, 12 heads, feed-forward 3072,
vocabulary 50,257. Prefill: one sequence of 1024, head at the last position. Training step: forward and backward of 2
sequences of 512. Skipping is imposed by `midskip.policies.controls:FixedDepths` (random nested depths, uneven from
sequence to sequence); "executed" is what `Meter` counted, causal pairs, head included.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import midskip
from midskip.bench import results
from midskip.cost import Meter

SHAPE = {
    "vocab_size": 50257, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 1024,
}  # fmt: skip
FIXED = "midskip.policies.controls:FixedDepths"
SHARES = (0.25, 0.5, 0.75)


def ours(dtype: torch.dtype, norms: str = "sandwich", policy: str = FIXED, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    config = midskip.MidskipConfig(**SHAPE, norms=norms, policy=policy, policy_settings=settings)
    return midskip.MidskipForCausalLM(config).to(dtype)


def llama(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation="sdpa")).to(dtype)


def half_gated(dtype: torch.dtype) -> nn.Module:
    """`middle_out` itself, its scores set so that about half of the block-tokens are skipped."""
    model = ours(dtype, policy="middle_out", start="released")
    with torch.no_grad():
        model.model.policy.bias.fill_(-0.02)
    return model


def prefill(model: nn.Module) -> None:
    with torch.no_grad():
        model.eval()(PREFILL, logits_to_keep=1, use_cache=False)


def training_step(model: nn.Module) -> None:
    model.train()(TRAIN, position_ids=POSITIONS, labels=TRAIN).loss.backward()
    model.zero_grad()


def medians(task: Callable[[nn.Module], None], models: dict[str, nn.Module], repeats: int) -> dict[str, float]:
    """Median seconds of each, interleaved, after one warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(repeats + 1):
        for name in random.sample(list(models), len(models)):
            start = time.perf_counter()
            task(models[name])
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def executed(task: Callable[[nn.Module], None], model: nn.Module, backward: bool) -> tuple[float, int]:
    with Meter(model) as meter:
        task(model)
    return meter.executed_share, meter.flops(backward=backward).total


def compare_dense(dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    models = {
        "llama": llama(dtype),
        "pre-norm, dense": ours(dtype, norms="pre", policy="dense"),
        "sandwich, gates of 1": ours(dtype, skip_share=0.0),
        "sandwich, fractional gates": ours(dtype, policy="middle_out"),
    }
    rows = []
    for task in (prefill, training_step):
        seconds = medians(task, models, repeats)
        rows += [
            {"dtype": str(dtype), "task": task.__name__, "model": name, "seconds": seconds[name],
             "time_of_llama": seconds[name] / seconds["llama"]}
            for name in models
        ]  # fmt: skip
        show(rows[-len(models) :])
    return rows


def compare_skipping(dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    rows = []
    for fractional in (False, True):
        models = {f"{share}": ours(dtype, skip_share=share, fractional=fractional, seed=1) for share in (0.0, *SHARES)}
        for task in (prefill, training_step):
            seconds = medians(task, models, repeats)
            work = {name: executed(task, model, task is training_step) for name, model in models.items()}
            for name in models:
                time_share, flops_share = seconds[name] / seconds["0.0"], work[name][1] / work["0.0"][1]
                rows.append(
                    {"dtype": str(dtype), "task": task.__name__, "gates": "fractional" if fractional else "0 and 1",
                     "skip_share": float(name), "executed_block_tokens": work[name][0], "seconds": seconds[name],
                     "time_share": time_share, "flops_share": flops_share, "time_over_flops": time_share / flops_share}
                )  # fmt: skip
            show(rows[-len(models) :])
    return rows


def deciding(dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Seconds in the policy, in the blocks, and in all else but the head, of one prefill that skips about half."""
    model = half_gated(dtype)
    spent: dict[str, float] = {}
    begun: list[float] = []

    def watch(module: nn.Module, name: str) -> None:
        module.register_forward_pre_hook(lambda *_: begun.append(time.perf_counter()))
        module.register_forward_hook(
            lambda *_: spent.__setitem__(name, spent.get(name, 0.0) + time.perf_counter() - begun.pop())
        )

    watch(model.model.policy, "policy")
    watch(model.lm_head, "head")
    for block in model.model.layers:
        watch(block, "blocks")
    passes = []
    for _ in range(repeats + 1):
        spent.clear()
        start = time.perf_counter()
        prefill(model)
        passes.append({**spent, "all": time.perf_counter() - start})
    row = {name: statistics.median(one[name] for one in passes[1:]) for name in passes[0]}
    row["moving_rows"] = row.pop("all") - sum(row.values())
    row["policy_over_blocks"] = row["policy"] / row["blocks"]
    row["moving_over_blocks"] = row["moving_rows"] / row["blocks"]
    result = {"dtype": str(dtype), "executed_block_tokens": executed(prefill, model, False)[0], **row}
    show([result])
    return result


def matmul_floor(dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    """Seconds of nothing but the matrix products with weights in a prefill, of the rows that really run each layer and
    of the head's one: what skipping cannot go below with this library on this machine."""
    model = ours(dtype, skip_share=0.0)
    products = {}
    for share in (0.0, *SHARES):
        with Meter(ours(dtype, skip_share=share, seed=1)) as meter:
            prefill(meter.model)
        rows_L, total = meter.query_rows_L, meter.flops().total
        linears = [
            (weight, rows) for block, rows in zip(model.model.layers, rows_L, strict=True)
            for weight in (module.weight for module in block.modules() if isinstance(module, nn.Linear)) if rows
        ]  # fmt: skip
        products[share] = [*linears, (model.lm_head.weight, 1)], rows_L, total
    inputs = {
        (rows, weight.shape[1]): torch.randn(rows, weight.shape[1], dtype=dtype)
        for linears, *_ in products.values()
        for weight, rows in linears
    }
    seconds: dict[float, list[float]] = {share: [] for share in products}
    with torch.no_grad():
        for repeat in range(repeats + 1):
            for share in random.sample(list(products), len(products)):
                start = time.perf_counter()
                for weight, rows in products[share][0]:
                    torch.nn.functional.linear(inputs[rows, weight.shape[1]], weight)
                if repeat:
                    seconds[share].append(time.perf_counter() - start)
    dense_s, dense_flops = statistics.median(seconds[0.0]), products[0.0][2]
    rows = []
    for share, (_, rows_L, total) in products.items():
        time_share, flops_share = statistics.median(seconds[share]) / dense_s, total / dense_flops
        rows.append(
            {"dtype": str(dtype), "skip_share": share, "rows_by_layer": rows_L, "seconds": dense_s * time_share,
             "time_share": time_share, "flops_share": flops_share, "time_over_flops": time_share / flops_share}
        )  # fmt: skip
    show(rows)
    return rows


def peak_memory(skip_share: float) -> int:
    """Bytes that the resident set of a fresh process rises to in a training step, above weights and gradients."""
    model = ours(torch.float32, skip_share=skip_share, fractional=True, seed=1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    loss = model.train()(TRAIN[:, :8], labels=TRAIN[:, :8]).loss  # what torch and its libraries allocate once
    loss.backward()
    del loss
    Path("/proc/self/clear_refs").write_text("5")
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    before = int(status["VmRSS"].split()[0])
    model(TRAIN, position_ids=POSITIONS, labels=TRAIN).loss.backward()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return (int(status["VmHWM"].split()[0]) - before) * 1024


def compare_memory(repeats: int) -> list[dict[str, Any]]:
    rows = []
    for share in (0.0, 0.5):
        command = [sys.executable, __file__, "--peak-memory", str(share)]
        peaks = [int(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(repeats)]
        rows.append({"dtype": "torch.float32", "skip_share": share, "peak_bytes": statistics.median(peaks)})
    for row in rows:
        row["of_nothing_skipped"] = row["peak_bytes"] / rows[0]["peak_bytes"]
    show(rows)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)


def machine() -> dict[str, Any]:
    return results.machine() | {"command": " ".join([Path(sys.executable).name, *sys.argv])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--parts", default="dense,skipping,deciding,floor,memory")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--peak-memory", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_memory is not None:
        print(peak_memory(arguments.peak_memory))
        return
    random.seed(0)
    parts, result = arguments.parts.split(","), {"machine": machine(), "shape": SHAPE}
    for name in arguments.dtypes.split(","):
        dtype = getattr(torch, name)
        if "dense" in parts:
            result.setdefault("dense", []).extend(compare_dense(dtype, arguments.repeats))
        if "skipping" in parts:
            result.setdefault("skipping", []).extend(compare_skipping(dtype, arguments.repeats))
        if "floor" in parts:
            result.setdefault("floor", []).extend(matmul_floor(dtype, arguments.repeats))
        if "deciding" in parts:
            result.setdefault("deciding", []).append(deciding(dtype, arguments.repeats))
    if "memory" in parts:
        result["memory"] = compare_memory(3)
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


torch.manual_seed(0)
PREFILL = torch.randint(0, SHAPE["vocab_size"], (1, 1024))
TRAIN = torch.randint(0, SHAPE["vocab_size"], (2, 512))
POSITIONS = torch.arange(1024).view(2, 512)  # `FixedDepths` goes by them: other tokens leave in each sequence

if __name__ == "__main__":
    main()
