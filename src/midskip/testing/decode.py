"""What a model gives in steps, with a cache.

B sequences, T columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from midskip.model.cache import SkipCache
from midskip.model.modeling import MidskipForCausalLM


@torch.no_grad()
def in_steps(model: MidskipForCausalLM, ids_BT: Tensor, valid_BT: Tensor, num_columns: int) -> Iterator[Any]:
    """The outputs, hidden states too, of passes over `num_columns` columns each, with one cache for all of them.

    Args:
        ids_BT: int64 [B, T].
        valid_BT: bool [B, T], False for pads.
    """
    cache = SkipCache(model.config)
    for start in range(0, ids_BT.shape[1], num_columns):
        stop = start + num_columns
        yield model(ids_BT[:, start:stop], valid_BT[:, :stop], past_key_values=cache, output_hidden_states=True)
