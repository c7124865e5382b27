"""How often the host waits for the device in a forward pass; on a GPU torch itself counts, in test_gpu.py."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from midskip import MidskipForCausalLM

HASH = {"policy_settings": {"gates": "hard"}}
FIXED = {"policy": "midskip.policies.controls:FixedDepths"}


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls that bring numbers of a tensor to the host. (On a CPU ids are looked at too: not counted.)"""
    found: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        real = getattr(Tensor, name)
        return lambda *args, **kwargs: (found.append(name), real(*args, **kwargs))[1]

    for name in ("tolist", "item", "cpu", "__bool__", "numpy"):
        monkeypatch.setattr(Tensor, name, counted(name))
    return found


@pytest.mark.parametrize(
    ("settings", "of_the_policy"),
    [({"policy": "dense"}, 0), (FIXED, 1), (HASH, 1), ({}, 3)],  # middle_out by hidden states: one for each set
    ids=["dense", "fixed", "hash", "middle_out"],
)
def test_waits_for_what_the_host_must_know(
    make_model: Callable[..., MidskipForCausalLM], ragged: tuple[Tensor, Tensor], waits: list[str],
    settings: dict[str, Any], of_the_policy: int,
) -> None:  # fmt: skip
    model = make_model(num_hidden_layers=6, **settings)
    ids_BT, valid_BT = ragged
    position_BT = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    on_the_host = 2  # documents: what was brought there is read
    for given, of_the_batch in (
        ({}, 0),
        ({"attention_mask": valid_BT}, 1),
        ({"position_ids": position_BT}, 1 + on_the_host),
        ({"attention_mask": valid_BT, "position_ids": position_BT}, 2 + on_the_host),
    ):
        waits.clear()
        model(ids_BT, labels=ids_BT, **given).loss.backward()
        assert len(waits) == of_the_batch + of_the_policy, (list(given), waits)


@torch.no_grad()
def test_a_pass_that_makes_a_cache_counts_its_tokens_once(
    make_model: Callable[..., MidskipForCausalLM], ragged: tuple[Tensor, Tensor], waits: list[str]
) -> None:
    model = make_model(num_hidden_layers=6, **HASH).eval()
    ids_BT, valid_BT = ragged
    waits.clear()
    assert model(ids_BT, attention_mask=valid_BT).past_key_values is not None
    assert len(waits) == 2, waits  # and the policy's


@torch.no_grad()
def test_a_step_of_generation_waits_for_its_columns_and_the_policy(
    make_model: Callable[..., MidskipForCausalLM], waits: list[str]
) -> None:
    model = make_model(num_hidden_layers=6, **HASH).eval()
    cache = model(torch.randint(31, (3, 5))).past_key_values
    for _ in range(2):
        waits.clear()
        model(torch.randint(31, (3, 1)), past_key_values=cache)
        assert len(waits) == 2, waits
