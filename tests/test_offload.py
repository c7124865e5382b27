"""Weights that wait elsewhere, and are brought when a module runs: `device_map`, and accelerate's offloading."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload

from midskip import MidskipForCausalLM

Make = Callable[..., MidskipForCausalLM]


@pytest.mark.parametrize(
    ("policy", "settings", "max_layers"),
    [
        ("middle_out", {}, 4),
        ("middle_out", {"gates": "hard"}, None),
        ("middle_out", {"gates": "hard", "scores": "hidden_states"}, None),
        ("early_exit", {}, None),
        ("independent", {}, 2),
        ("mixture_of_depths", {}, 2),
        ("reinforce", {}, 2),
        ("static", {"share": 0.5}, None),
        ("random", {"share": 0.5}, None),
    ],
)
@torch.no_grad()
def test_offloaded_weights_change_nothing(
    make_model: Make, policy: str, settings: dict[str, Any], max_layers: int | None
) -> None:
    model = make_model(policy=policy, policy_settings=settings).eval()
    if hasattr(model.model.policy, "bias"):
        model.model.policy.bias.uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    model.set_budget(max_layers=max_layers)
    ids_BT = torch.randint(31, (2, 16), generator=torch.Generator().manual_seed(0))
    expected = model(ids_BT)
    assert 0 < expected.executed_share < 1
    found = cpu_offload(model, torch.device("cpu"))(ids_BT)
    assert torch.equal(found.gates, expected.gates) and torch.equal(found.logits, expected.logits)
