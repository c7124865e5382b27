"""`pointers`: chains of relative offsets, a task of which it is known how many hops each token needs.

B items, T columns.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .batches import IGNORED_LABEL
from .errors import DataError
from .labelled import LabelledData

NUM_VALUES, WINDOW = 16, 16


class Pointers(LabelledData):
    """Interleaved chains. A chain begins with a token that is a value; each further token is the offset back to the one
    before it in its chain. What a token has to give is the value that its chain began with.

    The *hop* of a token is its number in its chain, from 0, and so the number of offsets that have to be followed; it
    is the `group` of the token (-1 for a filler). No two tokens point to the same one. The answer is never an input.

    Ids: 0 to num_values - 1 are values, then come the offsets 1 to window, and last the filler. At each column a chain
    is drawn, one that would leave the window before the others. It goes on, or begins anew if it has ended, has not
    begun or is out of the window. The last column is a filler, since labels stand one column to the right of their
    tokens.

    Args:
        num_chains: chains at a time.
        num_hops: hop of the last token of a chain.
        num_values: values to begin with.
        window: the largest offset.
        filler: probability that a column is a filler, which has no label.
        length: columns of an item, T.
        num_training, num_validation: items.
        seed: of all items; number and side of an item do the rest.

    Raises:
        DataError: a setting out of range.
    """

    def __init__(
        self, num_chains: int = 6, num_hops: int = 8, num_values: int = NUM_VALUES, window: int = WINDOW,
        filler: float = 0.0, length: int = 65, num_training: int = 64_000, num_validation: int = 1024, seed: int = 0,
    ) -> None:  # fmt: skip
        counts = {"num_chains": num_chains, "num_hops": num_hops, "num_values": num_values, "window": window}
        counts |= {"num_training": num_training, "num_validation": num_validation}
        lowest = dict.fromkeys(counts, 1) | {"length": 2, "seed": 0}
        for name, value in (counts | {"length": length, "seed": seed}).items():
            if isinstance(value, bool) or not isinstance(value, int) or not lowest[name] <= value < 2**32:
                raise DataError(f"{name} of pointers is {value!r}. Expected {lowest[name]} or more, below 2**32.")
        if num_chains >= length:
            raise DataError(
                f"num_chains of pointers is {num_chains}. Expected fewer than the {length} columns (length)."
            )
        if isinstance(filler, bool) or not isinstance(filler, int | float) or not 0 <= filler < 1:
            raise DataError(f"filler of pointers is {filler!r}. Expected a probability, from 0 to below 1.")
        self.vocab_size, self.length = num_values + window + 1, length
        shape = _Shape(num_chains, num_hops, num_values, window, filler, length)
        self.training = _PointerItems(shape, num_training, (seed, 0))
        self.validation = _PointerItems(shape, num_validation, (seed, 1))


class _Shape(NamedTuple):
    num_chains: int
    num_hops: int
    num_values: int
    window: int
    filler: float
    length: int


class _PointerItems(Dataset[dict[str, Tensor]]):
    """Those of one side, each drawn when it is asked for."""

    def __init__(self, shape: _Shape, num_items: int, stream: tuple[int, int]) -> None:
        self.shape, self.num_items, self.stream = shape, num_items, stream

    def __len__(self) -> int:
        return self.num_items

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.num_items:
            raise IndexError(f"There is no item {index}: there are {self.num_items}, counted from 0.")
        num_chains, num_hops, num_values, window, filler, length = self.shape
        rng = np.random.default_rng([*self.stream, index])
        drawn_chains = rng.integers(num_chains, size=length - 1).tolist()
        drawn_values = rng.integers(num_values, size=length - 1).tolist()
        fillers = (rng.random(length - 1) < filler).tolist()
        ids, labels, hops = [num_values + window] * length, [IGNORED_LABEL] * length, [-1] * length
        value, hop, last = [0] * num_chains, [num_hops] * num_chains, [0] * num_chains  # at first all have ended
        for column in range(length - 1):
            if fillers[column]:
                continue
            leaving = [
                (last[chain], chain)
                for chain in range(num_chains)
                if hop[chain] < num_hops and window - 1 <= column - last[chain] <= window
            ]
            chain = min(leaving)[1] if leaving else drawn_chains[column]
            offset = column - last[chain]
            if hop[chain] == num_hops or offset > window:
                value[chain], hop[chain] = drawn_values[column], 0
                ids[column] = value[chain]
            else:
                hop[chain] += 1
                ids[column] = num_values + offset - 1
            last[chain] = column
            labels[column + 1], hops[column] = value[chain], hop[chain]
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "group": torch.tensor(hops)}


def hops(input_ids_BT: Tensor, num_values: int = NUM_VALUES, window: int = WINDOW) -> Tensor:
    """The hop of each token, int64 [B, T], from the ids alone, by following the offsets; -1 for a filler.

    Args:
        input_ids_BT: int64 [B, T], of items of `Pointers`.
        num_values, window: those of the items.
    """
    num_columns = input_ids_BT.shape[1]
    column_BT = torch.arange(num_columns, device=input_ids_BT.device).expand_as(input_ids_BT)
    offset_BT = input_ids_BT - num_values + 1
    points_BT = (offset_BT >= 1) & (offset_BT <= window) & (offset_BT <= column_BT)
    hop_BT, target_BT = points_BT.long(), torch.where(points_BT, column_BT - offset_BT, column_BT)
    for _ in range(num_columns.bit_length()):  # each round follows twice as many offsets
        hop_BT, target_BT = hop_BT + hop_BT.gather(1, target_BT), target_BT.gather(1, target_BT)
    return torch.where(offset_BT > window, -1, hop_BT)
