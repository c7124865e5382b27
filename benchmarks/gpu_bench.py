"""What the parts of `gpu.py` share: where they run and at which size, times, kernels, and rows, on disk at once."""

from __future__ import annotations

import gc
import itertools
import json
import os
import random
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from core_speed import machine
from torch import Tensor

PEAK = 989e12  # FLOP/s of an H100 SXM or H200, dense bfloat16, by the data sheet
PAPER = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
WIKI_SMALL = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
KERNELS = {  # by words in their names; of the kinds that fit, the first counts
    "attention": "flash|fmha|attention|attn|varlen|flex",
    "optimizer": "multi_tensor|adam",
    "products": "gemm|cutlass|nvjet|cublas|xmma|splitk",
    "loss": "softmax|nll_loss|cross",
    "moving": "memcpy|memset|cat|copy|index|gather|scatter",
    "compiled": "triton",
    "elementwise": "elementwise|reduce",
}


class Bench:
    """Attributes: device; batch, length: of a full batch; count: calls that are timed; backend: of torch.compile."""

    def __init__(self, part: str, folder: Path, tiny: bool):
        self.tiny, self.device = tiny, torch.device("cpu" if tiny else "cuda")
        self.batch, self.length, self.count = (3, 160, 2) if tiny else (32, 1024, 20)
        self.backend = "aot_eager" if tiny else "inductor"
        self.file = folder / f"gpu_{part}.json"
        self.result: dict[str, Any] = {"machine": self._machine(), "rows": []}

    def _machine(self) -> dict[str, Any]:
        found = machine()
        if not self.tiny:
            cuda, cudnn = torch.version.cuda, torch.backends.cudnn.version()
            found |= {"gpu": torch.cuda.get_device_name(), "cuda": cuda, "cudnn": cudnn}
        return found | {"command": " ".join(sys.argv), "commit": found.get("commit") or os.environ.get("COMMIT", "")}

    def shape(self, shape: dict[str, int]) -> dict[str, Any]:
        """Of a model."""
        return TINY | {"vocab_size": 61, "num_hidden_layers": 3} if self.tiny else shape | {
            "vocab_size": 50257, "num_hidden_layers": 12
        }  # fmt: skip

    def tokens(self, vocab_size: int) -> Tensor:
        return torch.randint(vocab_size, (self.batch, self.length), device=self.device)

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16)

    # ---- rows

    def add(self, **row: Any) -> None:
        self.result["rows"].append(row)
        print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
        self.file.write_text(json.dumps(self.result, indent=1) + "\n")

    @contextmanager
    def attempt(self, **what: Any) -> Iterator[None]:
        """Write down what fails, and go on."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.add(**what, failed=f"{type(error).__name__}: {error}"[:2000])
        gc.collect()
        if not self.tiny:
            torch.cuda.empty_cache()

    # ---- times

    def wait(self) -> None:
        if not self.tiny:
            torch.cuda.synchronize()

    def each(self, task: Callable[[int], Any], count: int, warm: int) -> list[float]:
        """Seconds of `count` calls, after `warm` others; nothing waits in between, so that the host may run ahead."""
        for number in range(warm):
            task(number)
        self.wait()
        marks: list[Any] = [self._mark()]
        for number in range(warm, warm + count):
            task(number)
            marks.append(self._mark())
        self.wait()
        return [b - a if self.tiny else a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]

    def _mark(self) -> Any:
        if self.tiny:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def medians(self, tasks: dict[Any, Callable[[int], Any]], rounds: int = 3) -> dict[Any, float]:
        """Median seconds of each, in turns, in shuffled order."""
        seconds: dict[Any, list[float]] = {name: [] for name in tasks}
        for turn in range(rounds):
            for name in random.sample(list(tasks), len(tasks)):
                seconds[name] += self.each(tasks[name], -(-self.count // rounds), 1 if turn else 3)
        return {name: statistics.median(values) for name, values in seconds.items()}

    def kernels(self, task: Callable[[int], Any]) -> dict[str, Any]:
        """Seconds on the device in one call: by kind of kernel, and the longest by name."""
        task(0)
        if self.tiny:
            return {}
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            task(0)
            self.wait()
        found = {event.key: event.self_device_time_total / 1e6 for event in profile.key_averages()}
        sums: dict[str, float] = {}
        for name, seconds in found.items():
            kinds = (kind for kind, words in KERNELS.items() if re.search(words, name, re.IGNORECASE))
            kind = next(kinds, "other")
            sums[kind] = sums.get(kind, 0.0) + seconds
        longest = sorted(found.items(), key=lambda pair: -pair[1])[:8]
        return {"kinds_s": sums, "longest_s": [(name[:90], seconds) for name, seconds in longest]}


def distance(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference, over that of what is expected."""
    return ((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-6)).item()
