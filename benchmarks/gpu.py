"""What only a GPU can show: attention, blocks, utilisation, skipping and training there.

    python benchmarks/gpu.py --output FOLDER --parts attention,blocks           # some 6 minutes
    python benchmarks/gpu.py --output FOLDER --parts utilisation,skipping       # some 7 minutes
    python benchmarks/gpu.py --output FOLDER --parts train --text PREPARED [--recipes wiki-small-gated] [--compile]
    python benchmarks/gpu.py --output FOLDER --tiny [--parts ...]   # in miniature on a CPU, to find what is wrong

Each part is a process with a time limit of its own and writes `gpu_PART.json`, row by row: what fails or is cut short
is written down, and the rest goes on. Numbers are compared before anything is timed. Times are medians of CUDA events.
FLOPs are those of matrix products by the causal convention, a backward pass twice the forward; the peak is 989 TFLOP/s.
Shapes: "paper" is 12 layers, d 768, 12 heads, feed-forward 3072, vocabulary 50,257, batch 32 x 1024; "wiki-small" has
d 512, 8 heads, feed-forward 2048.

It needs torch 2.11, transformers 5.17 and src on PYTHONPATH; `train` needs jsonargparse[signatures] too, and a folder
that `midskip prepare` wrote with the recipes' tokenizer (a million held-out tokens are enough).
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import attention_candidates
import torch
from gpu_bench import PAPER, PEAK, WIKI_SMALL, Bench, distance
from torch import Tensor, nn
from transformers.utils import logging

import midskip
from midskip.cost import LayerWork, block_flops
from midskip.model.layers import Block, RotaryEmbedding, compile_blocks
from midskip.model.packing import Layout

LIMITS_S = {"attention": 300, "blocks": 240, "utilisation": 320, "skipping": 240, "train": 580}
BFLOAT16_ERROR = 0.03  # as in tests/test_documents.py
WARM = 4  # layouts that are seen before any is timed


def draw_layout(bench: Bench, width: int, documents: bool, share: float, draw: torch.Generator) -> Layout:
    """A full batch, in documents of about 250 tokens or not; of each row another share is kept."""
    shape = bench.batch, bench.length
    position_BT = None
    if documents:
        begins_BT = torch.rand(shape, generator=draw) < 4 / bench.length
        column_T = torch.arange(bench.length)
        position_BT = (column_T - torch.where(begins_BT, column_T, 0).cummax(1).values).to(bench.device)
    layout = Layout.from_rectangle(torch.ones(shape, dtype=torch.bool, device=bench.device), position_BT)
    rotary = RotaryEmbedding(width, {"rope_theta": 10000.0}).to(bench.device)
    layout.rotary = rotary(layout.position_N, torch.float32)
    if share == 1:
        return layout
    kept_B1 = share * (0.5 + torch.rand(bench.batch, 1, generator=draw))  # from half the share to one and a half
    return layout.keep(layout.pack((torch.rand(shape, generator=draw) < kept_B1).to(bench.device)))


# ---- attention

CASES = {  # documents, share kept, gates
    "nothing skipped, no gates": (False, 1.0, False),
    "nothing skipped": (False, 1.0, True),
    "half skipped": (False, 0.5, True),
    "three quarters skipped": (False, 0.25, True),
    "documents, no gates": (True, 1.0, False),
    "documents, half skipped": (True, 0.5, True),
}


def attention(bench: Bench) -> None:
    """Each candidate, on layouts that it has not seen before, as every training step has them."""
    if bench.tiny:  # FlexAttention refuses gradients on a CPU, though what it computes there has them
        attention_candidates.flex._validate_device = lambda *_: None
    found = attention_candidates.candidates(bench.backend)
    for case in CASES:
        _attention(bench, case, found)


def _attention(bench: Bench, case: str, found: dict[str, attention_candidates.Candidate]) -> None:
    shape, (documents, share, gated) = bench.shape(PAPER), CASES[case]
    heads, width = shape["num_attention_heads"], shape["hidden_size"] // shape["num_attention_heads"]
    draw, size = torch.Generator().manual_seed(0), bench.batch * bench.length
    layouts = [draw_layout(bench, width, documents, share, draw) for _ in range(bench.count + WARM)]
    dtype = torch.float32 if bench.tiny else torch.bfloat16
    base = [torch.randn(size, heads, width, generator=draw).to(bench.device, dtype) for _ in range(4)]
    base.append((0.05 + 0.95 * torch.rand(size, generator=draw)).to(bench.device))
    given = [[x[: one.num_tokens].detach().requires_grad_() for x in (*base[:3], base[4])] for one in layouts]

    def forward(i: int, run: Any, prepared: list[Any]) -> Tensor:
        q, k, v, gate_N = given[i]
        return run(q, k, v, gate_N if gated else None, layouts[i], prepared[i])

    def both(i: int, run: Any, prepared: list[Any]) -> list[Tensor]:
        out_NHK = forward(i, run, prepared)
        ahead_NHK = base[3][: layouts[i].num_tokens].to(out_NHK.dtype)
        wanted = given[i] if gated else given[i][:3]
        return [out_NHK.detach(), *torch.autograd.grad(out_NHK, wanted, ahead_NHK)]

    lengths = [[n for n in layout.lengths if n] for layout in layouts]
    pairs = statistics.mean(sum(n * (n + 1) // 2 for n in one) for one in lengths)
    common = {
        "case": case,
        "mean_tokens": statistics.mean(map(sum, lengths)),
        "mean_sequences": statistics.mean(map(len, lengths)),
    }
    names = ("out", "q", "k", "v", "gate")
    truths = both(0, lambda *inputs: attention_candidates.reference(*inputs[:5]), layouts)
    for name, (prepare, run) in found.items():
        with bench.attempt(**common, candidate=name):
            start_s = time.perf_counter()
            prepared = [prepare(layout) for layout in layouts]
            got = both(0, run, prepared)
            bench.wait()
            first_s = time.perf_counter() - start_s
            errors = {part: distance(*pair) for part, *pair in zip(names, got, truths, strict=False)}
            del got
            if not max(errors.values()) < (1e-5 if bench.tiny else BFLOAT16_ERROR):
                bench.add(**common, candidate=name, wrong=errors)
                continue
            tasks = {
                "forward_s": functools.partial(forward, run=run, prepared=prepared),
                "forward_backward_s": functools.partial(both, run=run, prepared=prepared),
                "prepare_s": lambda i, prepare=prepare: prepare(layouts[i]),
            }
            seconds = {part: statistics.median(bench.each(task, bench.count, WARM)) for part, task in tasks.items()}
            rate = 3 * 4 * pairs * heads * width / seconds["forward_backward_s"]
            kernels = bench.kernels(tasks["forward_backward_s"])
            bench.add(
                **common, candidate=name, **seconds, tflops=rate / 1e12, first_s=first_s, errors=errors, **kernels
            )


# ---- blocks


def blocks(bench: Bench) -> None:
    """One block, forward and backward, plain and compiled."""
    shapes = {"paper": PAPER, "wiki-small": WIKI_SMALL}
    for name, case in itertools.product(shapes, CASES):
        with bench.attempt(shape=name, case=case):
            _block(bench, name, bench.shape(shapes[name]), case)


def _block(bench: Bench, name: str, shape: dict[str, Any], case: str) -> None:
    config, (documents, share, gated) = midskip.MidskipConfig(**shape), CASES[case]
    draw = torch.Generator().manual_seed(0)
    layouts = [draw_layout(bench, config.head_dim, documents, share, draw) for _ in range(bench.count + WARM)]
    size, width = bench.batch * bench.length, config.hidden_size
    h_ND, ahead_ND = (torch.randn(size, width, generator=draw).to(bench.device) for _ in range(2))
    gate_N = (0.05 + 0.95 * torch.rand(size, generator=draw)).to(bench.device)
    torch.manual_seed(0)
    heads = config.num_attention_heads
    plain = Block(width, config.intermediate_size, heads, heads, config.head_dim, 1e-6, "sandwich").to(bench.device)
    compiled = Block(width, config.intermediate_size, heads, heads, config.head_dim, 1e-6, "sandwich").to(bench.device)
    compiled.load_state_dict(plain.state_dict())
    compile_blocks([compiled], bench.backend)

    def step(i: int, block: nn.Module) -> list[Tensor]:
        layout, num_tokens = layouts[i], layouts[i].num_tokens
        x_ND = h_ND[:num_tokens].detach().requires_grad_()
        gate = gate_N[:num_tokens].detach().requires_grad_() if gated else None
        with bench.autocast():
            out_ND = block(x_ND, None, layout, layout, gate, gate)
        wanted = [x for x in (x_ND, gate, *block.parameters()) if x is not None]
        return [out_ND.detach(), *torch.autograd.grad(out_ND, wanted, ahead_ND[:num_tokens])]

    start_s = time.perf_counter()
    got = step(0, compiled)
    bench.wait()
    compile_s = time.perf_counter() - start_s
    errors = list(map(distance, got, step(0, plain)))
    del got
    tasks = {"plain": functools.partial(step, block=plain), "compiled": functools.partial(step, block=compiled)}
    seconds = bench.medians(tasks)
    flops = 3 * statistics.mean(block_flops(config, LayerWork.of(one, one, gated)).total for one in layouts)
    for key in tasks:
        bench.add(
            shape=name, case=case, block=key, seconds=seconds[key], tflops=flops / seconds[key] / 1e12,
            utilisation=flops / seconds[key] / PEAK, of_plain=seconds[key] / seconds["plain"], first_s=compile_s,
            largest_error=max(errors), graphs_so_far=torch._dynamo.utils.counters["stats"]["unique_graphs"],
            **bench.kernels(tasks[key]),
        )  # fmt: skip


# ---- the parts


def supervise(arguments: argparse.Namespace) -> int:
    """Each part in a process of its own, ended when its time is over; how many failed."""
    failures = 0
    for part in arguments.parts.split(","):
        start_s, limit_s = time.perf_counter(), arguments.limit_s or LIMITS_S[part]
        file = arguments.output / f"gpu_{part}.json"
        file.unlink(missing_ok=True)
        process = subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--part", part], start_new_session=True)
        try:
            status: Any = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            status = f"cut short after {limit_s} s"
        result = json.loads(file.read_text()) if file.is_file() else {"rows": []}
        result |= {"status": status, "seconds": time.perf_counter() - start_s}
        file.write_text(json.dumps(result, indent=1) + "\n")
        failed = sum("failed" in row or "wrong" in row for row in result["rows"])
        print(f"== {part}: status {status}, {failed} rows failed, {result['seconds']:.0f} s", flush=True)
        failures += status != 0 or failed > 0
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--parts", default="attention,blocks,utilisation,skipping")
    parser.add_argument("--limit_s", type=float, help="of each part")
    parser.add_argument("--text", type=Path, help="a folder that `midskip prepare` wrote")
    parser.add_argument("--recipes", default="wiki-small-gated,wiki-small-dense")
    parser.add_argument("--steps", type=int, help="instead of the recipes' own, and without evaluations on the way")
    parser.add_argument("--compile", action="store_true", help="train with compiled blocks")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.part is None:
        return supervise(arguments)
    from gpu_models import skipping, train, utilisation

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    random.seed(0)
    torch.manual_seed(0)
    bench = Bench(arguments.part, arguments.output, arguments.tiny)
    if arguments.part == "train":
        train(bench, arguments.text, arguments.recipes.split(","), arguments.steps, arguments.compile)
    else:
        parts = {"attention": attention, "blocks": blocks, "utilisation": utilisation, "skipping": skipping}
        parts[arguments.part](bench)
    return 0


if __name__ == "__main__":
    sys.exit(main())
