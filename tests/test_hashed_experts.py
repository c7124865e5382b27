"""`benchmarks/hashed_experts.py`: of each group of sublayers a token runs one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from midskip import MidskipForCausalLM
from midskip.testing import check_policy

Make = Callable[..., MidskipForCausalLM]
PATH = "hashed_experts:HashedExperts"


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))


def test_of_each_group_a_token_runs_one(make_model: Make) -> None:
    settings: Any = {"groups": [[1, 3, 5], [7, 9]], "closed": [2, 4, 8]}
    model = make_model(policy=PATH, policy_settings=settings, skip_unit="sublayer", num_hidden_layers=5).eval()
    ids_BT = torch.randint(0, 8, (4, 64), generator=torch.Generator().manual_seed(0))
    gates_LBT = model(ids_BT).gates
    assert (gates_LBT[[0, 6]] == 1).all() and (gates_LBT[settings["closed"]] == 0).all()
    for group in settings["groups"]:
        assert (gates_LBT[group].sum(0) == 1).all()
        assert torch.allclose(gates_LBT[group].mean((1, 2)), torch.tensor(1 / len(group)), atol=0.15)
    pairs: dict[tuple[int, int], Any] = {}
    for row, ids_T in enumerate(ids_BT.tolist()):
        for place in range(1, 64):
            seen_L = gates_LBT[:, row, place].tolist()
            assert pairs.setdefault((ids_T[place - 1], ids_T[place]), seen_L) == seen_L
    assert len(set(map(tuple, pairs.values()))) == 6
    check_policy(PATH, {"groups": [[1, 2], [3, 4]], "closed": [0]}, num_layers=5, skipped_kv="keep")


@pytest.mark.parametrize("settings", [{"groups": [[1, 2], [2, 3]]}, {"groups": [[1], []]}, {"closed": [5]}])
def test_sublayers_that_cannot_be(make_model: Make, settings: Any) -> None:
    with pytest.raises(ValueError, match="expected numbers from 0 to 4, each once"):
        make_model(policy=PATH, policy_settings=settings, num_hidden_layers=5)
