"""A sweep whose models are told the pair of tokens: the opponent of models whose layers serve pairs of tokens.

    python benchmarks/pair_embedding.py SWEEP.yaml --output FILE [--beside FILE --arms ARM ...]

Who runs a layer that is drawn by pair tells the layer which pair it is. So a part of what such a model gains may come
from that alone. Here every model of a sweep gets it for no FLOPs, by an embedding of hashed bigrams: a second one is
added to that of a token, of the pair of it and the one before, one of 4,096 buckets by a hash. It goes on after it was
killed, as `midskip sweep` does, and in several processes at once if it is started several times. `--output` is a file
that `midskip frontier` reads; `--arms` of the file `--beside` are put into it as well, to be compared with these dense
models.
"""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn

from midskip.frontier.read import keys_of, save_results
from midskip.model import modeling
from midskip.runs import to_json, write_atomically
from midskip.sweep import read_sweep
from midskip.sweep.run import run_sweep

NUM_BUCKETS = 4096


class PairEmbedding(nn.Embedding):
    """An embedding of tokens, int64 [B, T], that knows the one before. The first token of a row takes the last of the
    row before it for that, so it is for training and for text that is evaluated in the same rows."""

    def __init__(self, num_embeddings: int, width: int):
        super().__init__(num_embeddings, width)
        self.pairs = nn.Embedding(NUM_BUCKETS, width)

    def forward(self, input: Tensor) -> Tensor:
        bucket_N = (input.roll(1) * 1_000_003 + input * 7_919) % 2_147_483_647 % NUM_BUCKETS
        return super().forward(input) + self.pairs(bucket_N)


def told_the_pair() -> Any:
    """Where this is entered, models are built with that embedding."""
    return patch.object(modeling, "nn", SimpleNamespace(**vars(nn) | {"Embedding": PairEmbedding}))


def marked(saved: dict[str, Any]) -> dict[str, Any]:
    """What `save_results` wrote, with keys of its own: a plain model of the same recipe has the same key."""
    for arm in saved["sweep"]["arms"]:
        for row in arm["points"]:
            row["seeds"] = {seed: f"{key}-told" for seed, key in row["seeds"].items()}
            for trial in row.get("tuning", ()):
                trial["key"] += "-told"
    for part in ("results", "failed"):
        saved[part] = {f"{key}-told": found for key, found in saved[part].items()}
    return saved


def beside(saved: dict[str, Any], others: dict[str, Any], arms: list[str]) -> dict[str, Any]:
    """With these arms of another file of a sweep.

    Raises:
        ValueError: an arm that the other has not.
    """
    found = [arm for arm in others["sweep"]["arms"] if arm["name"] in arms]
    if missing := set(arms) - {arm["name"] for arm in found}:
        raise ValueError(f"there are no arms {sorted(missing)} beside")
    results = saved["results"] | {key: others["results"][key] for key in keys_of(found) & set(others["results"])}
    return saved | {"sweep": {"arms": saved["sweep"]["arms"] + found}, "results": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--beside", type=Path)
    parser.add_argument("--arms", nargs="+", default=[])
    options = parser.parse_args()
    sweep = read_sweep(options.sweep)
    with told_the_pair():
        run_sweep(sweep)
    save_results(sweep.output, options.output)
    saved = marked(json.loads(options.output.read_text(encoding="utf-8")))
    if options.beside is not None:
        saved = beside(saved, json.loads(options.beside.read_text(encoding="utf-8")), options.arms)
    write_atomically(options.output, to_json(saved) + "\n")


if __name__ == "__main__":
    main()
