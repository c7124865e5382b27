"""Why a trained model that skips is as good as it is: does its gate know, and does a gradient reach it?

    python benchmarks/reasons.py RUN [RUN ...] [--output reasons.json] [--picture reasons.png] [--trust MODULE]

For each run folder, on held-out text:

- *exchanged*: in one layer, some tokens that ran it skip it, and as many that skipped it run it, so that the share
  stays. If the gate knows who needs the layer, the loss rises. A model whose tokens skip at random is the control: it
  says what an exchange costs where there is nothing to know. Each half is measured alone too.
- *gradient*: of the loss by the output gate of a token that ran, in nats; below 0 where the layer helped the loss.
- *constant*: share of tokens that run the most frequent number of layers; and the share of the variance of that number
  which the token alone, whatever its place, explains.
- norms of hidden states and of what each layer adds, and the loss by number of layers run.
- *words*, of text: layers run and loss of the next token, by place in a word: its first token, its second, and so on.

N packed tokens, L layers.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from agreement import WINDOWS, batches_of, mean_by_token
from rich.console import Console
from torch import Tensor

from midskip import MidskipForCausalLM
from midskip.bench.results import machine
from midskip.commands.parser import add_trust, items_of, text_of
from midskip.data.labelled import Items
from midskip.evaluate import batch_of, evaluate
from midskip.policies import Decision
from midskip.runs import load_any_run, to_json, write_atomically

MOST = 0.1  # of the tokens of a pass, that are exchanged
LAST_PLACE = 8  # in a word, and all that come after
HALVES = {"exchanged": (True, True), "skipped": (True, False), "run": (False, True)}


@contextmanager
def changed(model: MidskipForCausalLM, change: Callable[[int, Decision], Decision]) -> Iterator[None]:
    """Within, `change` gets each layer's decision and gives the one that is taken instead."""
    hook = model.model.policy.register_forward_hook(lambda _, given, decision: change(given[0], decision))
    try:
        yield
    finally:
        hook.remove()


def exchange(decision: Decision, out: bool, into: bool, generator: torch.Generator) -> tuple[Decision, int]:
    """Tokens drawn among those that are kept leave (`out`), as many of the others come (`into`), with the mean gate of
    those kept; they take no skip path. Also how many these are on each side: 0 where all are kept, or none."""
    keep_N = decision.keep_N
    if keep_N is None:
        return decision, 0
    sides = [side.nonzero().flatten() for side in (keep_N, ~keep_N)]
    count = min(*map(len, sides), int(MOST * len(keep_N)))
    if not count:
        return decision, 0
    leave_M, come_M = (side[torch.randperm(len(side), generator=generator).to(side.device)[:count]] for side in sides)
    new_N = keep_N.clone()
    changes = {}
    if out:
        new_N[leave_M] = False
    if into:
        new_N[come_M] = True
        for name in ("output_gate_N", "key_gate_N"):
            if (gate_N := getattr(decision, name)) is not None:
                changes[name] = gate_N.index_fill(0, come_M, gate_N[keep_N].mean().item())
    if decision.skip_path_N is not None:
        changes["skip_path_N"] = decision.skip_path_N & ~new_N
    return replace(decision, keep_N=new_N, **changes), count


@torch.no_grad()
def loss_exchanged(model: MidskipForCausalLM, windows: Items, layer: int, half: str) -> tuple[float, int]:
    """The loss in nats if tokens are exchanged in one layer, and how many were."""
    generator, counts = torch.Generator().manual_seed(layer), [0]

    def change(at: int, decision: Decision) -> Decision:
        if at != layer:
            return decision
        decision, count = exchange(decision, *HALVES[half], generator)
        counts[0] += count
        return decision

    with changed(model, change):
        return evaluate(model, windows, batch_size=WINDOWS)["loss"], counts[0]


def gradients(model: MidskipForCausalLM, windows: Items) -> list[dict[str, float]]:
    """By layer, of the loss of a pass (its sum over tokens) by the output gates of those that ran."""
    gates: dict[int, tuple[Tensor, Tensor]] = {}

    def watch(layer: int, decision: Decision) -> Decision:
        ones_N = torch.ones(num_tokens, device=model.device)  # windows have no pads
        kept_N = ones_N.bool() if decision.keep_N is None else decision.keep_N
        gate_N = (ones_N if decision.output_gate_N is None else decision.output_gate_N.detach()).requires_grad_()
        gates[layer] = gate_N, kept_N
        return replace(decision, output_gate_N=gate_N)

    batch = batch_of(windows, range(min(WINDOWS, len(windows))), model.device)
    batch.pop("group", None)
    num_tokens = batch["input_ids"].numel()
    with changed(model, watch):
        output = model(**batch, num_items_in_batch=1, use_cache=False)
    output.loss.backward()
    model.zero_grad()
    found = []
    for gate_N, kept_N in gates.values():
        slope_M = torch.zeros(0) if gate_N.grad is None else gate_N.grad[kept_N]
        found.append({
            "mean": slope_M.mean().item() if len(slope_M) else 0.0,
            "root_mean_square": slope_M.square().mean().sqrt().item() if len(slope_M) else 0.0,
        })  # fmt: skip
    return found


@torch.no_grad()
def constancy_and_norms(model: MidskipForCausalLM, windows: Items) -> dict[str, Any]:
    """How far the number of layers that a token runs differs at all, and norms by layer."""
    tokens, blocks, norms = [], [], []
    for batch in batches_of(model, windows):
        output = model(**batch, output_hidden_states=True, use_cache=False)
        tokens.append(batch["input_ids"].flatten())
        blocks.append(output.executed.sum(0).flatten())
        hidden = output.hidden_states[:-1]  # the last is after the norm
        norms.append([
            (after.float().square().mean().sqrt().item(), (after - before).float().square().mean().sqrt().item())
            for before, after in pairwise(hidden)
        ])  # fmt: skip
    token_N, blocks_N = torch.cat(tokens), torch.cat(blocks).double()
    variance = blocks_N.var(unbiased=False).item()
    told = mean_by_token(token_N, blocks_N).var(unbiased=False).item()
    state, added = torch.tensor(norms).mean(0).T.tolist()
    return {
        "most_frequent": blocks_N.long().bincount().max().item() / len(blocks_N),
        "told_by_token": told / variance if variance > 0 else None,
        "rms_of_states": state,
        "rms_of_added": added,
    }


@torch.no_grad()
def by_place_in_word(model: MidskipForCausalLM, tokenizer: Any, windows: Items) -> list[dict[str, Any]]:
    """Layers run, and the loss in nats of the prediction made there, by place in a word; place 0 is of no word."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    blocks: dict[int, list[float]] = {}
    nats: dict[int, list[float]] = {}
    for batch in batches_of(model, windows):
        tokens_BT, output = batch["input_ids"], model(**batch, use_cache=False)
        blocks_BT = output.executed.sum(0)
        logits_BVT = output.logits.float().movedim(2, 1)
        nats_BT = torch.nn.functional.cross_entropy(logits_BVT[..., :-1], tokens_BT[:, 1:], reduction="none")
        for tokens, of_blocks, of_nats in zip(tokens_BT.tolist(), blocks_BT.tolist(), nats_BT.tolist(), strict=True):
            place = 0
            for token, num_blocks, loss in zip(tokens, of_blocks, of_nats, strict=False):
                letters = texts[token].lstrip()
                before = place if letters == texts[token] else 0  # a space begins a word
                place = min(before + 1, LAST_PLACE) if letters.isalpha() else 0
                blocks.setdefault(place, []).append(num_blocks)
                nats.setdefault(place, []).append(loss)
    return [
        {"place": at, "tokens": len(blocks[at]), "layers": fmean(blocks[at]), "loss": fmean(nats[at])}
        for at in sorted(blocks)
    ]


def reasons(run: Path, num_windows: int, trust: Sequence[str] = ()) -> dict[str, Any]:
    """All of it, of one run."""
    model, tokenizer = load_any_run(run, trust)
    given, console = argparse.Namespace(run=str(run), data=None, trust=trust), Console(stderr=True)
    windows: Items = items_of(given, console) if tokenizer is None else text_of(given, model, tokenizer, console)
    windows = [windows[row] for row in range(min(num_windows, len(windows) - 1))]
    plain = evaluate(model, windows, batch_size=WINDOWS)
    layers = []
    for layer in range(model.config.num_skip_units):
        row: dict[str, Any] = {"share": plain["share_by_layer"][layer]}
        for half in HALVES:
            loss, count = loss_exchanged(model, windows, layer, half)
            row[half] = (loss - plain["loss"]) * plain["num_targets"] / count if count else None  # nats a token
        layers.append(row)
    names = ("loss", "executed_share", "flops_per_token", "loss_by_blocks", "num_targets_by_blocks")
    return {
        "policy": model.config.policy,
        "settings": model.config.policy_settings,
        "skipped_kv": model.config.skipped_kv,
        **{name: plain[name] for name in names},
        "layers": layers,
        "gradients": gradients(model, windows),
        **constancy_and_norms(model, windows),
        "words": None if tokenizer is None else by_place_in_word(model, tokenizer, windows),
    }


def draw(found: dict[str, dict[str, Any]], file: Path) -> None:
    """A panel each for exchanges, gradients, shares, and loss by layers run."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for name, row in found.items():
        depth = [(at + 1) / len(row["layers"]) for at in range(len(row["layers"]))]
        blocks = [(at, loss) for at, loss in enumerate(row["loss_by_blocks"]) if loss is not None]
        run = [
            (x, at, slope) for x, at, slope in zip(depth, row["layers"], row["gradients"], strict=True) if at["share"]
        ]
        for axis, points in (
            (axes[0, 0], [(x, at["exchanged"]) for x, at, _ in run if at["exchanged"] is not None]),
            (axes[0, 1], [(x, -slope["mean"]) for x, _, slope in run]),
            (axes[1, 0], [(x, at["share"]) for x, at, _ in run]),
            (axes[1, 1], blocks),
        ):
            axis.plot(*zip(*points, strict=True) if points else ([], []), marker="o", markersize=3, label=name)
    for axis, title, what in zip(
        axes.flat,
        ("Tokens exchanged in one layer", "What a layer is worth, by its gradient", "Tokens that run a layer", "Loss"),
        ("nats for each exchanged token", "nats for each token that ran", "share", "nats"),
        strict=True,
    ):
        axis.set(title=title, ylabel=what, xlabel="layers run" if title == "Loss" else "depth, of all layers")
    figure.legend(*axes[0, 1].get_legend_handles_labels(), loc="outside lower center", fontsize=8, ncols=3)
    figure.savefig(file, dpi=120)


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown: what exchanges cost, the mean of the layers in which they are possible, weighted by how many tokens are
    exchanged in each; the share of the variance of the number of layers that is told by the token; and layers run by
    place in a word: outside of words, the first token of a word, and the third."""
    lines = [
        "| run | exchanged | only skipped | only run | variance told by the token | "
        "layers run: no word, first, third |",
        "| --- " * 6 + "|",
    ]
    for name, row in found.items():
        costs = {half: [(at["share"], at[half]) for at in row["layers"] if at[half] is not None] for half in HALVES}
        told = [f"{_weighted(of):+.2f}" if of else "" for of in costs.values()]
        by_token = "" if row["told_by_token"] is None else f"{row['told_by_token']:.0%}"
        places = {of["place"]: of["layers"] for of in row["words"] or ()}
        layers = ", ".join(f"{places[place]:.1f}" for place in (0, 1, 3) if place in places)
        lines.append(f"| {' | '.join([name, *told, by_token, layers])} |")
    return "\n".join(lines)


def _weighted(of_layers: list[tuple[float, float]]) -> float:
    """Mean of (share that ran, cost) of layers, weighted by the share of tokens that an exchange moves there."""
    weights = [min(MOST, share, 1 - share) for share, _ in of_layers]
    return sum(weight * cost for weight, (_, cost) in zip(weights, of_layers, strict=True)) / sum(weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--picture", type=Path)
    add_trust(parser)
    options = parser.parse_args()
    found = {run.name: reasons(run, options.windows, options.trust) for run in options.runs}
    if options.output:
        write_atomically(options.output, to_json({"machine": machine(), "runs": found}) + "\n")
    if options.picture:
        draw(found, options.picture)
    print(table(found))


if __name__ == "__main__":
    main()
