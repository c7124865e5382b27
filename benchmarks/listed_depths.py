"""A policy by import path: nested layers whose depth for each token is a list, made of what a trained gate does.

    python benchmarks/listed_depths.py NAME=RUN [NAME=RUN ...] --output lists.json
    --model.policy=listed_depths:ListedDepths --model.policy_settings='{file: lists.json, name: NAME}'

A gate that learns moves while the layers learn. Trained anew with its list from the first step on, a model tells
whether what such a gate costs is its choice of tokens or that it moved.

N packed tokens, G gates, V vocabulary.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from agreement import batches_of, with_held_out_text
from torch import Tensor, nn

from midskip.model.packing import PackedBatch
from midskip.policies import Decision, Policy
from midskip.runs import to_json, write_atomically


class ListedDepths(Policy):
    """A token passes the first gates of G, as many as the list says of its id, from the outer layers inwards.

    Args:
        file: JSON, an object of lists of V whole numbers from 1 to G.
        name: which of them.
    """

    is_mirrored = True

    def __init__(self, num_layers: int, width: int, initializer_range: float = 0.02, file: str = "", name: str = ""):
        super().__init__(num_layers, width, initializer_range)
        self.num_gates = (num_layers + 1) // 2
        depths = json.loads(Path(file).read_text(encoding="utf-8"))[name]
        if not 1 <= min(depths) <= max(depths) <= self.num_gates:
            raise ValueError(
                f"the list {name!r} has numbers from {min(depths)} to {max(depths)}; expected 1 to {self.num_gates}"
            )
        self.depth_V = nn.Buffer(torch.tensor(depths))

    def decide(self, layer: int, h_ND: Tensor, state: dict[str, Any], batch: PackedBatch) -> Decision:
        if layer == 0:
            assert batch.token_N is not None
            depth_N = self.depth_V[batch.token_N]
            state["keeps"] = [depth_N > gate for gate in range(self.num_gates)]
            batch.count(state["keeps"])
        return Decision(state["keeps"][min(layer, self.num_layers - 1 - layer)])


@torch.no_grad()
def listed(run: Path) -> list[int]:
    """Of each token id the gates that most of its tokens pass, on held-out text; 1 where there are none."""
    model, windows = with_held_out_text(run)
    num_gates, size = (model.config.num_skip_units + 1) // 2, model.config.vocab_size
    passed_GV, seen_V = torch.zeros(num_gates, size), torch.zeros(size)
    for batch in batches_of(model, windows):
        ids_BT = batch["input_ids"]
        ran_GN = model(**batch, use_cache=False).executed[:num_gates].flatten(1).float()
        passed_GV.index_add_(1, ids_BT.flatten(), ran_GN)
        seen_V += torch.bincount(ids_BT.flatten(), minlength=size)
    return ((passed_GV >= 0.5 * seen_V) & (seen_V > 0)).sum(0).clamp(min=1).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    named = (given.partition("=") for given in options.runs)
    lists = {name: listed(Path(run)) for name, _, run in named}
    write_atomically(options.output, to_json(lists) + "\n")


if __name__ == "__main__":
    main()
