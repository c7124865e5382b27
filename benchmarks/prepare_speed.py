"""`midskip prepare` against the bare tokenizer on the same text, and what a window costs to load.

    python benchmarks/prepare_speed.py TEXT [--tokenizer FOLDER] [--output benchmarks/results/prepare_speed.json]

TEXT is a source as `midskip prepare` takes it. Both sides use all cores. The bare tokenizer gets the same pieces of
text in the same batches, from memory, and its result is thrown away; `prepare` starts at the file and ends with the
shards on disk. They take turns; the medians are compared.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import tokenizers
import torch
from core_speed import machine
from rich.console import Console

from midskip.data import WindowOrder, load_tokenizer, prepare, read_documents
from midskip.data.encode import Piece, _batches, pieces
from midskip.data.prepared import Prepared


def timed(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(source: str, name: str, folder: str, repeats: int) -> tuple[dict[str, Any], Prepared]:
    """Seconds of both sides, and what was prepared."""
    console, encode = Console(quiet=True), load_tokenizer(name).backend_tokenizer.encode_batch_fast
    batches = [
        [piece.text for piece in batch]
        for batch in _batches(Piece("", True, part) for text in read_documents(source) for part in pieces(text))
    ]
    seconds: dict[str, list[float]] = {"bare": [], "prepare": []}
    prepared = None
    for repeat in range(repeats):
        for side in random.sample(list(seconds), 2):
            if side == "bare":
                seconds[side].append(timed(lambda: [encode(batch, add_special_tokens=False) for batch in batches]))
                continue
            output = Path(folder, str(repeat))
            start = time.perf_counter()
            prepared = prepare(source, output, tokenizer=name, console=console)
            seconds[side].append(time.perf_counter() - start)
    assert prepared is not None
    bare_s, prepare_s = (statistics.median(seconds[side]) for side in ("bare", "prepare"))
    num_bytes = sum(prepared.summary[side]["num_bytes"] for side in ("training", "validation"))
    num_tokens = sum(prepared.summary[side]["num_tokens"] for side in ("training", "validation"))
    result = {
        "source": source,
        "tokenizer": name,
        "text_bytes": num_bytes,
        "tokens": num_tokens,
        "bare_s": bare_s,
        "prepare_s": prepare_s,
        "speed_of_bare": bare_s / prepare_s,
        "prepare_tokens_per_s": num_tokens / prepare_s,
        "all_bare_s": seconds["bare"],
        "all_prepare_s": seconds["prepare"],
    }
    return result, prepared


def loading(prepared: Prepared, length: int, batch_size: int, documents_apart: bool) -> dict[str, Any]:
    """Median microseconds of a window, and of a batch of shuffled ones as the training loop gets it."""
    windows = prepared.windows("training", length, documents_apart)
    order = list(WindowOrder(len(windows), batch_size * 200, seed=0))
    items = [timed(lambda index=index: windows[index]) for index in order]
    loader = torch.utils.data.DataLoader(windows, batch_size, sampler=WindowOrder(len(windows), len(order), seed=1))
    iterator = iter(loader)
    batches = [timed(lambda: next(iterator)) for _ in range(len(loader))]
    return {
        "length": length,
        "batch_size": batch_size,
        "documents_apart": documents_apart,
        "window_us": 1e6 * statistics.median(items),
        "batch_us": 1e6 * statistics.median(batches),
        "batch_us_90_percent": 1e6 * float(np.quantile(batches, 0.9)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--tokenizer", default="bytes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        speed, prepared = compare(arguments.text, arguments.tokenizer, folder, arguments.repeats)
        print(speed, flush=True)
        rows = [loading(prepared, length, 8, apart) for length in (256, 1024) for apart in (False, True)]
        print(*rows, sep="\n", flush=True)
    versions = {module.__name__: module.__version__ for module in (tokenizers, datasets)}
    result = {"machine": machine() | versions, "rayon_threads": os.environ.get("RAYON_NUM_THREADS", "all cores")}
    if arguments.output:
        arguments.output.write_text(json.dumps(result | {"prepare": speed, "loading": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
