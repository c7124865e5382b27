"""A dense model that is told the pair of tokens: the opponent of models whose layers serve pairs of tokens.

    python benchmarks/pair_embedding.py SWEEP.yaml --output FILE [--arm dense] [--settings 'num_hidden_layers=6']
                                        [--learning_rates 0.006] [--seeds 0 1 2] [--runs FOLDER]

Who runs a layer that is drawn by pair tells the layer which pair it is. So a part of what such a model gains may come
from that alone. Here the dense model of a sweep gets it for no FLOPs: a second embedding is added to that of a token,
of the pair of it and the one before, one of `--buckets` by a hash. Each run is trained as the sweep trains; one that
has ended is not run again.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from rich.console import Console
from torch import Tensor, nn

from midskip.model import modeling
from midskip.runs import RECIPE_FILE, to_json, write_atomically
from midskip.sweep import read_sweep
from midskip.sweep.plan import Run
from midskip.sweep.work import result_of
from midskip.train.run import train

BUCKETS = 4096


def with_pairs(num_buckets: int) -> type[nn.Embedding]:
    """An embedding of tokens, int64 [N] in their order, that knows the one before. The first token of a row takes the
    last of the row before it for that."""

    class PairEmbedding(nn.Embedding):
        def __init__(self, num_embeddings: int, width: int):
            super().__init__(num_embeddings, width)
            self.pairs = nn.Embedding(num_buckets, width)

        def forward(self, input: Tensor) -> Tensor:
            bucket_N = (input.roll(1) * 1_000_003 + input * 7_919) % 2_147_483_647 % num_buckets
            return super().forward(input) + self.pairs(bucket_N)

    return PairEmbedding


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--arm", default="dense")
    parser.add_argument("--settings", default="num_hidden_layers=6")
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[0.006])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--buckets", type=int, default=BUCKETS)
    parser.add_argument("--runs", type=Path, default=Path("runs/pair-embedding"))
    options = parser.parse_args()
    wanted = f"{options.arm} {options.settings}"
    points = [point for point in read_sweep(options.sweep).points if point.label == wanted]
    if len(points) != 1:
        parser.error(f"the sweep has {len(points)} points {wanted!r}; expected one")
    results: list[dict[str, Any]] = []
    embedding = SimpleNamespace(**vars(nn) | {"Embedding": with_pairs(options.buckets)})
    for seed in options.seeds:
        for rate in options.learning_rates:
            run = points[0].run(seed, rate)
            folder = options.runs / f"{run.key}-{options.buckets}"
            recipe = replace(run.recipe, output=str(folder), dense_layers=[])
            with patch.object(modeling, "nn", embedding):
                report = train(recipe, resume=(folder / RECIPE_FILE).is_file(), console=Console(stderr=True))
            named = Run(run.recipe, f"{run.key}-pairs-{options.buckets}", run.label)
            results.append(result_of(named, report) | {"learning_rate": rate, "buckets": options.buckets})
            write_atomically(options.output, to_json({"settings": wanted, "results": results}) + "\n")


if __name__ == "__main__":
    main()
