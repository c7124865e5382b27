"""What the tests share: seeds, tiny models, and gates set to what a test needs."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.utils import logging

from midskip import MidskipConfig, MidskipForCausalLM
from midskip.policies.middle_out import MiddleOut

TINY: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


@pytest.fixture(autouse=True)
def _seeded_and_quiet() -> Iterator[None]:
    torch.manual_seed(0)
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture
def tiny() -> Callable[..., MidskipConfig]:
    """tiny(**changes): the configuration of a model small enough to test with."""
    return lambda **changes: MidskipConfig(**(TINY | changes))


@pytest.fixture
def make_model() -> Callable[..., MidskipForCausalLM]:
    """make_model(gates="mixed", dtype=float64, **changes): a tiny model in training mode; see `set_gates`."""

    def make(gates: str | None = "mixed", dtype: torch.dtype = torch.float64, **changes: Any) -> MidskipForCausalLM:
        torch.manual_seed(changes.pop("seed", 0))
        model = MidskipForCausalLM(MidskipConfig(**(TINY | changes))).to(dtype)
        if gates is not None and isinstance(model.model.policy, MiddleOut):
            set_gates(model.model.policy, gates, scale=1.5 if model.config.norms == "sandwich" else 5.0)
        return model.train()

    return make


@torch.no_grad()
def set_gates(policy: MiddleOut, gates: str, scale: float) -> None:
    """Give `middle_out` weights, of scores as large as `scale` times the hidden states, with which the gates are

    - "kept": all exactly 1;
    - "open": all between 0 and 1;
    - "mixed": some exactly 1, some exactly 0, some between;
    - "one": depth scores of exactly 1 at the last gate, the sum of equal parts (of powers of 2);
    - "late": mixed in layer 0 and 0 in all others;
    - "gone": all exactly 0.
    """
    count, width = policy.weight.shape
    policy.weight.zero_()
    if gates == "kept":
        policy.bias.fill_(-1)
    elif gates == "open":
        policy.weight.normal_(std=0.01)
        policy.bias.fill_(0.5 / count)
    elif gates == "mixed":
        policy.weight.normal_(std=scale * width**-0.5)
        policy.bias.zero_()
    elif gates == "one":
        parts = [0.5**gate for gate in range(1, count)]
        policy.bias.copy_(torch.tensor([*parts, 1 - sum(parts)]))
    elif gates == "late":
        policy.weight[0].normal_(std=scale * width**-0.5)
        policy.bias.fill_(2)
        policy.bias[0] = 0
    elif gates == "gone":
        policy.bias.fill_(2)
    else:
        raise ValueError(gates)


@pytest.fixture
def ragged() -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask [7, 9]: all, pads left, right, on both sides, one token, none, a hole."""
    mask_BT = torch.tensor(
        [
            [1, 1, 1, 1, 1, 1, 1, 1, 1],
            [0, 0, 0, 1, 1, 1, 1, 1, 1],
            [1, 1, 1, 1, 1, 0, 0, 0, 0],
            [0, 0, 1, 1, 1, 1, 0, 0, 0],
            [0, 0, 0, 0, 1, 0, 0, 0, 0],
            [0, 0, 0, 0, 0, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 1, 1, 1, 1],
        ]
    )
    return torch.randint(TINY["vocab_size"], mask_BT.shape), mask_BT
