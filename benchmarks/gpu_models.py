"""The parts of `gpu.py` about whole models: utilisation of dense ones, what skipping saves, and training."""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from core_speed import executed
from gpu_bench import PAPER, PEAK, WIKI_SMALL, Bench
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import midskip
from midskip.cost import dense_flops
from midskip.model import attention, layers

RECIPES = Path(__file__).parent.parent / "recipes"
STRETCH = 61  # positions between the first tokens of two rows


def ours(bench: Bench, shape: dict[str, int], compiled: bool, **settings: Any) -> Any:
    torch.manual_seed(0)
    positions = bench.length + STRETCH * bench.batch
    config = midskip.MidskipConfig(**bench.shape(shape), max_position_embeddings=positions, **settings)
    with bench.device:
        model = midskip.MidskipForCausalLM(config).train()
    if compiled:
        layers.compile_blocks(model.model.layers, bench.backend)
    return model


def llama(bench: Bench, shape: dict[str, int], compiled: bool) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        **bench.shape(shape), max_position_embeddings=bench.length, attn_implementation="sdpa", use_cache=False
    )
    with bench.device:
        model: Any = LlamaForCausalLM(config).train()
    for layer in model.model.layers if compiled else ():
        layer.compile(dynamic=False, backend=bench.backend)
    return model


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)


# ---- utilisation


class ChunkedLoss(torch.autograd.Function):
    """Head and cross-entropy over a few rows at a time, gradients at once: the logits are never all there."""

    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, weight_VD: Tensor, target_N: Tensor, num_rows: int) -> Tensor:
        count = (target_N != -100).sum().clamp(min=1)
        grad_h_ND, grad_weight_VD = torch.empty_like(h_ND), torch.zeros_like(weight_VD, dtype=torch.float32)
        total = torch.zeros((), device=h_ND.device)
        for start in range(0, len(h_ND), num_rows):
            h, target_C1 = h_ND[start : start + num_rows], target_N[start : start + num_rows, None]
            scored_C1, target_C1 = target_C1 != -100, target_C1.clamp(min=0)
            log_CV = (h @ weight_VD.T).float().log_softmax(-1)
            total -= (log_CV.gather(1, target_C1) * scored_C1).sum()
            grad_CV = log_CV.exp_().scatter_add_(1, target_C1, -torch.ones_like(target_C1, dtype=torch.float32))
            grad_CV = grad_CV.mul_(scored_C1 / count).to(h.dtype)
            grad_h_ND[start : start + num_rows] = grad_CV @ weight_VD
            grad_weight_VD += grad_CV.T @ h
        ctx.save_for_backward(grad_h_ND, grad_weight_VD)
        return total / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_h_ND, grad_weight_VD = ctx.saved_tensors
        return grad_h_ND * grad, grad_weight_VD * grad, None, None


def plain_loss(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    return F.cross_entropy(logits_NV.float(), target_N, ignore_index=-100)


def losses(bench: Bench) -> dict[str, Callable[[Any, Tensor], Tensor]]:
    """The loss as the library has it; with torch.compile at it; in chunks; and none, without the head."""
    compiled_loss = torch.compile(plain_loss, dynamic=False, backend=bench.backend)

    def shifted(ids_BT: Tensor) -> Tensor:
        return F.pad(ids_BT[:, 1:], (0, 1), value=-100).flatten()

    def library(model: Any, ids_BT: Tensor) -> Tensor:
        return model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss

    def compiled(model: Any, ids_BT: Tensor) -> Tensor:
        return compiled_loss(model.lm_head(model.model.run(ids_BT).h_ND), shifted(ids_BT))

    def chunked(model: Any, ids_BT: Tensor) -> Tensor:
        h_ND, weight_VD = (x.to(torch.bfloat16) for x in (model.model.run(ids_BT).h_ND, model.lm_head.weight))
        return ChunkedLoss.apply(h_ND, weight_VD, shifted(ids_BT), 32 if bench.tiny else 4096)  # pyright: ignore[reportReturnType]

    def none(model: Any, ids_BT: Tensor) -> Tensor:
        return model.model.run(ids_BT).h_ND.float().square().mean()

    return {"library": library, "compiled": compiled, "chunked": chunked, "none": none}


def utilisation(bench: Bench) -> None:
    """Training steps of dense models: share of the peak, and where the time goes."""
    ids_BT = bench.tokens(bench.shape(PAPER)["vocab_size"])
    flops = 3 * dense_flops(midskip.MidskipConfig(**bench.shape(PAPER)), [bench.length] * bench.batch).total
    kinds = losses(bench)
    dense = {"policy": "dense"}

    def measure(name: str, compiled: bool, model: Any, loss: str = "library") -> None:
        optimizer = optimizer_of(model)

        def ahead(_: int) -> Tensor:
            with bench.autocast():
                return kinds[loss](model, ids_BT)

        def step(i: int) -> Tensor:
            value = ahead(i)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            return value

        start_s = time.perf_counter()
        value = step(0).item()
        first_s, memory = time.perf_counter() - start_s, 0
        if not bench.tiny:
            torch.cuda.reset_peak_memory_stats()
        seconds = statistics.median(bench.each(step, bench.count // 2, 3))
        if not bench.tiny:
            memory = torch.cuda.max_memory_allocated()
        row = {"model": name, "compiled": compiled, "loss": loss}
        rates = {"utilisation": flops / seconds / PEAK, "tokens_per_s": ids_BT.numel() / seconds}
        kernels = bench.kernels(step)
        bench.add(**row, seconds=seconds, **rates, value=value, first_s=first_s, peak_gib=memory / 2**30, **kernels)
        if (name, loss) == ("ours", "library"):
            ahead(0).backward()
            alone = bench.each(lambda _: optimizer.step(), bench.count // 2, 1)
            bench.add(model=name, compiled=compiled, only="optimizer", seconds=statistics.median(alone))
            with torch.no_grad():
                passes = bench.each(ahead, bench.count // 2, 2)
            bench.add(model=name, compiled=compiled, only="forward", seconds=statistics.median(passes))

    whole = attention.attend
    for compiled in (False, True):
        for name, build in {
            "ours": partial(ours, bench, PAPER, compiled, **dense),
            "llama": partial(llama, bench, PAPER, compiled),
            "ours, norms as in llama": partial(ours, bench, PAPER, compiled, **dense, norms="pre"),
        }.items():
            with bench.attempt(model=name, compiled=compiled):
                measure(name, compiled, build())
    for loss in ("compiled", "chunked", "none"):
        with bench.attempt(model="ours", compiled=True, loss=loss):
            measure("ours", True, ours(bench, PAPER, True, **dense), loss)
    with bench.attempt(model="ours, attention left out", compiled=True):
        attention.attend = lambda q, k, v, *_: q + k + v
        try:
            measure("ours, attention left out", True, ours(bench, PAPER, True, **dense))
        finally:
            attention.attend = whole
    with bench.attempt(model="ours, all gates open", compiled=True):
        measure("ours, all gates open", True, ours(bench, PAPER, True, policy="middle_out"))


# ---- skipping


def skipping(bench: Bench) -> None:
    """Time over executed FLOPs, of training steps and of prefills, all rows uneven."""
    ids_BT = bench.tokens(bench.shape(WIKI_SMALL)["vocab_size"])
    # another stretch of the draw for each row: from position 0 all rows would keep the same columns
    row_B1, column_T = (torch.arange(n, device=bench.device) for n in (bench.batch, bench.length))
    given = {"input_ids": ids_BT, "position_ids": STRETCH * row_B1[:, None] + column_T}

    def training(model: Any) -> None:
        with bench.autocast():
            loss = model.train()(**given, labels=ids_BT).loss
        loss.backward()
        model.optimizer.step()
        model.optimizer.zero_grad()

    def prefill(model: Any) -> None:
        with torch.no_grad(), bench.autocast():
            model.eval()(**given, logits_to_keep=1, use_cache=False)

    for compiled, fractional in itertools.product((False, True), (True, False)):
        models: dict[float, Any] = {}
        for share in (0.0, 0.25, 0.5, 0.75):
            settings = {"skip_share": share, "fractional": fractional, "seed": 1}
            models[share] = ours(
                bench, WIKI_SMALL, compiled, policy="midskip.policies.controls:FixedDepths", policy_settings=settings
            )
            models[share].optimizer = optimizer_of(models[share])
        for task in (training, prefill):
            what = {"task": task.__name__, "fractional": fractional, "compiled": compiled}
            with bench.attempt(**what):
                work = {share: executed(task, model, task is training) for share, model in models.items()}
                tasks = {share: lambda _, model=model, task=task: task(model) for share, model in models.items()}
                seconds = bench.medians(tasks)
                for share, (block_tokens, flops) in work.items():
                    time_share, flops_share = seconds[share] / seconds[0.0], flops / work[0.0][1]
                    bench.add(
                        **what, skip_share=share, executed_block_tokens=block_tokens, flops=flops,
                        seconds=seconds[share], utilisation=flops / seconds[share] / PEAK, time_share=time_share,
                        flops_share=flops_share, time_over_flops=time_share / flops_share,
                    )  # fmt: skip


# ---- training


def train(bench: Bench, text: Path | None, recipes: list[str], steps: int | None, compiled: bool) -> None:
    """The recipes on prepared text; report and history, thinned, beside this part's own file."""
    if text is None:
        raise SystemExit("--text is missing; expected a folder that `midskip prepare` wrote")
    for name in recipes:
        with bench.attempt(recipe=name):
            _train(bench, name, text, steps, compiled)
    rows = {row["recipe"]: row for row in bench.result["rows"] if "step_seconds" in row}
    gated, dense = (next((row for name, row in rows.items() if kind in name), None) for kind in ("gated", "dense"))
    if gated and dense:
        time_share, flops_share = (gated[name] / dense[name] for name in ("step_seconds", "flops_per_token"))
        bench.add(time_share=time_share, flops_share=flops_share, time_over_flops=time_share / flops_share)


def _train(bench: Bench, name: str, text: Path, steps: int | None, compiled: bool) -> None:
    from midskip.train import read_recipe
    from midskip.train import train as run
    from midskip.train.recipe import DataSettings

    recipe = read_recipe(RECIPES / f"{name}.yaml")
    data = recipe.data
    recipe.data = DataSettings(str(text), length=data.length, separate_documents=data.separate_documents)
    changes: dict[str, Any] = {"save_steps": 0, "report_to": [], "torch_compile": compiled}
    if steps is not None:
        changes |= {"steps": steps, "eval_steps": 0}
    if bench.tiny:
        shape = {key: value for key, value in bench.shape(WIKI_SMALL).items() if key != "vocab_size"}
        recipe.model, recipe.data.length = replace(recipe.model, **shape), 16
        changes |= {"steps": 4, "batch_size": 2, "logging_steps": 1, "eval_steps": 0}
    recipe.training = replace(recipe.training, **changes)
    with tempfile.TemporaryDirectory() as folder:
        recipe.output = str(Path(folder, "run"))
        start_s = time.perf_counter()
        report = run(recipe, title=name)
        seconds = time.perf_counter() - start_s
        lines = Path(recipe.output, "history.jsonl").read_text(encoding="utf-8").splitlines()
        kept: dict[str, Any] = {"report": report, "recipe": Path(recipe.output, "recipe.yaml").read_text()}
    rows = [json.loads(line) for line in lines]
    settled = rows[len(rows) // 2 :]
    bench.add(
        recipe=name, compiled=compiled, seconds=seconds, loss=report["validation"]["loss"],
        executed_share=report["validation"]["executed_share"],
        step_seconds=statistics.median(row["step_seconds"] for row in settled),
        flops_per_token=statistics.mean(row["flops_per_token"] for row in settled if "flops_per_token" in row),
    )  # fmt: skip
    logged = [row for row in rows if "flops_per_token" in row]
    steps_kept = {row["step"] for some in (rows, logged) for row in some[:: max(1, len(some) // 150)]}
    kept["history"] = [_rounded(row) for row in rows if row["step"] in steps_kept]
    (bench.file.parent / f"gpu_{name}.json").write_text(json.dumps(bench.result["machine"] | kept) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
