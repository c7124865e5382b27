"""What each policy costs: its training step at half of the block-tokens beside a dense one, and the time of deciding.

    python benchmarks/policy_cost.py [--output benchmarks/results/policy_cost.json] [--tokens 256] [--repeats 9]

Every policy runs on the same weights: 12 blocks of width 768, sandwich norms, keys dropped, vocabulary 50,257 (the
paper's shape), drawn and not trained. Biases are first moved by `target_share` until half of the block-tokens run on
the tokens that are then timed; `mixture_of_depths` gets the smallest capacity, since half of its blocks run for all.
Two figures each:

- `step_ratio`: forward and backward in training mode, with all losses of the policy, over the same of the dense model:
  the median over the median of steps taken in turns.
- `deciding`: seconds inside the policy over seconds inside the blocks, in a forward pass without gradients, and in the
  forward half of the training step.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from midskip import MidskipForCausalLM, build_regularizer, meter
from midskip.bench.models import build_ours, with_policy
from midskip.bench.results import machine
from midskip.bench.settings import BenchSettings
from midskip.bench.timing import Clock, interleave, spread
from midskip.runs import write_atomically

SHARE = 0.5
POLICIES: dict[str, tuple[str, dict[str, Any]]] = {
    "middle_out, hash": ("middle_out", {"gates": "hard"}),
    "middle_out, hidden states": ("middle_out", {"gates": "hard", "scores": "hidden_states"}),
    "middle_out, soft": ("middle_out", {"start": "open"}),
    "independent, bottleneck": ("independent", {}),
    "independent, linear": ("independent", {"router": "linear"}),
    "early_exit, predicted loss": ("early_exit", {}),
    "early_exit, predicted loss, from a share": ("early_exit", {"exit_share": 0.125}),
    "early_exit, straight-through": ("early_exit", {"scores": "straight_through"}),
    "mixture_of_depths": ("mixture_of_depths", {"capacity": 0.01, "ramp_steps": 1}),
    "reinforce": ("reinforce", {}),
    "random": ("random", {"share": SHARE}),
    "static": ("static", {"share": SHARE}),
}
STEERED = 20  # steps in which biases are moved


@torch.no_grad()
def steer(model: MidskipForCausalLM, ids_BT: Tensor) -> None:
    """Move the biases of the gates until about half of the block-tokens run in training mode."""
    policy = model.model.policy
    if policy.gate_of_layer == (None,) * policy.num_layers:
        return
    regularizer = build_regularizer("target_share", policy.num_layers, target_share=SHARE, ramp_steps=1)
    for _ in range(STEERED):
        regularizer.steer(policy)
        output = model.model(ids_BT, use_cache=False)
        gates_LN, executed_LN = (x.flatten(1) for x in (output.gates, output.executed))
        regularizer.update(gates_LN.mean(1), gates_LN.var(1), executed_LN.float().mean(1))


def step_of(model: MidskipForCausalLM, ids_BT: Tensor) -> Callable[[int], Any]:
    """A forward and backward pass, as the trainer runs it."""
    model.zero_grad(set_to_none=True)

    def run(_: int) -> None:
        output = model(ids_BT, labels=ids_BT, output_logits=False)
        loss = output.loss if output.auxiliary_loss is None else output.loss + output.auxiliary_loss
        loss.backward()

    return run


@contextmanager
def seconds_within(model: MidskipForCausalLM) -> Iterator[dict[str, float]]:
    """Seconds spent in the policy and in the blocks; on a CPU, where nothing runs ahead."""
    found, begun, hooks = {"policy": 0.0, "blocks": 0.0}, [0.0], []

    def watch(module: nn.Module, name: str) -> None:
        def begin(*_: Any) -> None:
            begun[0] = time.perf_counter()

        def end(*_: Any) -> None:
            found[name] += time.perf_counter() - begun[0]

        hooks.extend((module.register_forward_pre_hook(begin), module.register_forward_hook(end)))

    watch(model.model.policy, "policy")
    for block in model.model.layers:
        watch(block, "blocks")
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def deciding(model: MidskipForCausalLM, ids_BT: Tensor, repeats: int, trains: bool) -> dict[str, float]:
    """Median and quartiles of the time in the policy as a share of that in the blocks."""
    model.train(trains)
    shares = []
    for _ in range(repeats + 1):
        with torch.set_grad_enabled(trains), seconds_within(model) as seconds:
            model(ids_BT, labels=ids_BT if trains else None, output_logits=not trains, use_cache=False)
        shares.append(seconds["policy"] / seconds["blocks"])
    return spread(shares[1:])


def measure(name: str, dense: MidskipForCausalLM, ids_BT: Tensor, repeats: int) -> dict[str, Any]:
    policy, settings = POLICIES[name]
    torch.manual_seed(0)
    model = with_policy(dense, policy, settings).train()
    model.model.policy.reset_parameters()
    steer(model, ids_BT)
    with meter(model) as work:
        step_of(model, ids_BT)(0)
    with meter(dense) as whole:
        step_of(dense, ids_BT)(0)
    sides = {side: lambda of=of: step_of(of, ids_BT) for side, of in (("skipping", model), ("dense", dense))}
    times = interleave(sides, 1, repeats, random.Random(0), Clock(), lambda: None)
    seconds = {side: spread([one[0] for one in times[side]]) for side in sides}
    return {
        "policy": policy,
        "policy_settings": settings,
        "executed_share": work.executed_share,
        "flops_ratio": work.flops().total / whole.flops().total,
        "policy_flops_share": work.flops().policy / work.flops().blocks,
        "step_ratio": seconds["skipping"]["median"] / seconds["dense"]["median"],
        "step_s": seconds,
        "deciding": deciding(model, ids_BT, repeats, trains=False),
        "deciding_in_training": deciding(model, ids_BT, repeats, trains=True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/policy_cost.json"))
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), choices=list(POLICIES), metavar="NAME")
    arguments = parser.parse_args()
    bench = BenchSettings.of(
        "paper", tasks=("training",), context_tokens=arguments.tokens, training_batch_size=1, device="cpu"
    )
    dense = build_ours(bench, torch.float32).train()
    ids_BT = torch.randint(dense.config.vocab_size, (1, arguments.tokens), generator=torch.Generator().manual_seed(0))
    rows = {}
    for name in arguments.policies:
        rows[name] = measure(name, dense, ids_BT, arguments.repeats)
        row = rows[name]
        print(
            f"{name}: {row['executed_share']:.3f} of block-tokens, step {row['step_ratio']:.3f} of dense "
            f"({row['flops_ratio']:.3f} of FLOPs), deciding {row['deciding']['median']:.4f} of the blocks, "
            f"{row['deciding_in_training']['median']:.4f} in training",
            flush=True,
        )
        result = {"machine": machine(), "tokens": arguments.tokens, "repeats": arguments.repeats, "shape": bench.shape}
        write_atomically(arguments.output, json.dumps(result | {"policies": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
