"""Do the seeds of a model learn the same about who runs? If the gate finds the tokens that need depth, they should.

    python benchmarks/agreement.py --runs 'NAME=RUN,RUN,RUN' ['NAME=...' ...] [--windows 32] [--output agreement.json]

On the same held-out text, for each pair of runs of a name: the correlation of the number of layers that a token runs in
the one and in the other, over all tokens of the text; and that of its mean by token id, each as often as it occurs. It
is 1 for a hash or a table that all seeds share, and about 0 for what each seed draws for itself.

N tokens of the text, V vocabulary.
"""

import argparse
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from midskip import MidskipForCausalLM
from midskip.bench.results import machine
from midskip.commands.parser import text_of
from midskip.data.labelled import Items
from midskip.evaluate import batch_of
from midskip.runs import load_run, to_json, write_atomically

WINDOWS = 8  # of a pass


def batches_of(model: MidskipForCausalLM, windows: Items) -> Iterator[dict[str, Tensor]]:
    """What the model is given of them, pass by pass: their documents stay apart."""
    for start in range(0, len(windows), WINDOWS):
        batch = batch_of(windows, range(start, min(start + WINDOWS, len(windows))), model.device)
        yield {name: x for name, x in batch.items() if name not in ("labels", "group")}


@torch.no_grad()
def layers_run(model: MidskipForCausalLM, windows: Items) -> tuple[Tensor, Tensor]:
    """int64 [N], the tokens of the text, and float64 [N], how many layers each of them ran."""
    tokens, layers = [], []
    for batch in batches_of(model, windows):
        tokens.append(batch["input_ids"].flatten())
        layers.append(model(**batch, use_cache=False).executed.sum(0).flatten())
    return torch.cat(tokens), torch.cat(layers).double()


def mean_by_token(token_N: Tensor, layers_N: Tensor) -> Tensor:
    """float64 [N]: of each token of the text the mean of all that have its id."""
    return (torch.bincount(token_N, layers_N) / torch.bincount(token_N).clamp(min=1))[token_N]


def correlation(left_N: Tensor, right_N: Tensor) -> float | None:
    """None where one of them is the same for all."""
    if not (left_N.var() and right_N.var()):
        return None
    return torch.corrcoef(torch.stack([left_N, right_N]))[0, 1].item()


def with_held_out_text(run: Path) -> tuple[MidskipForCausalLM, Items]:
    """The model of a run, and windows of its held-out text."""
    model, tokenizer = load_run(run)
    given = argparse.Namespace(run=str(run), data=None, trust=[])
    return model, text_of(given, model, tokenizer, Console(stderr=True))


def agreement(runs: list[Path], num_windows: int) -> dict[str, Any]:
    """Of each pair of the runs."""
    seen: list[tuple[Tensor, Tensor]] = []
    for run in runs:
        model, windows = with_held_out_text(run)
        seen.append(layers_run(model, [windows[row] for row in range(num_windows)]))
        if not torch.equal(seen[0][0], seen[-1][0]):
            raise ValueError(f"{str(run)!r} has another held-out text than {str(runs[0])!r}")
    pairs = list(combinations(seen, 2))
    return {
        "tokens": len(seen[0][0]),
        "layers": [layers_N.mean().item() for _, layers_N in seen],
        "all": [correlation(left_N, right_N) for (_, left_N), (_, right_N) in pairs],
        "by_token": [correlation(mean_by_token(*left), mean_by_token(*right)) for left, right in pairs],
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown: mean and range of the pairs."""
    lines = ["| model | layers run | by token id | all |", "| --- " * 4 + "|"]
    for name, row in found.items():
        layers = " ".join(f"{one:.1f}" for one in row["layers"])
        lines.append(f"| {name} | {layers} | {_range(row['by_token'])} | {_range(row['all'])} |")
    return "\n".join(lines)


def _range(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{fmean(known):+.2f} ({min(known):+.2f} to {max(known):+.2f})" if known else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", required=True, metavar="NAME=RUN,RUN")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    for given in options.runs:
        name, _, runs = given.partition("=")
        found[name] = agreement([Path(run) for run in runs.split(",")], options.windows)
        print(table({name: found[name]}).splitlines()[-1], flush=True)
        if options.output:
            write_atomically(options.output, to_json({"machine": machine(), "runs": found}) + "\n")


if __name__ == "__main__":
    main()
