"""`benchmarks/agreement.py` and `benchmarks/listed_depths.py`: what seeds of a gate have in common, and its list."""

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch

from midskip import MidskipForCausalLM
from midskip.testing import check_policy

Make = Callable[..., MidskipForCausalLM]
TOKENS, LAYERS = torch.tensor([3, 4, 3, 4, 5, 3]), torch.tensor([2, 6, 4, 6, 2, 6]).double()


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))


def test_agreement_is_by_place_and_by_token_id() -> None:
    script = import_module("agreement")
    by_token_N = script.mean_by_token(TOKENS, LAYERS)
    assert by_token_N.tolist() == [4, 6, 4, 6, 2, 4]
    assert script.correlation(LAYERS, 3 - LAYERS) == pytest.approx(-1)
    assert script.correlation(LAYERS, torch.full_like(LAYERS, 4)) is None
    row = {"layers": [6.0, 5.95], "by_token": [0.5, None, 0.1], "all": [None]}
    assert script.table({"a": row}).splitlines()[-1] == "| a | 6.0 6.0 | +0.30 (+0.10 to +0.50) |  |"


def test_a_list_says_which_gates_a_token_passes(make_model: Make, tmp_path: Path) -> None:
    lists = tmp_path / "lists.json"
    lists.write_text(json.dumps({"mine": [token % 3 + 1 for token in range(64)]}))
    settings = {"file": str(lists), "name": "mine"}
    model = make_model(policy="listed_depths:ListedDepths", policy_settings=settings, num_hidden_layers=6).eval()
    executed_LBT = model(torch.tensor([[3, 4, 5]])).executed
    assert executed_LBT[:, 0].T.tolist() == [
        [True, False, False, False, False, True],
        [True, True, False, False, True, True],
        [True] * 6,
    ]
    check_policy("listed_depths:ListedDepths", settings, num_layers=5, skipped_kv="keep")
    with pytest.raises(ValueError, match="has numbers from 1 to 3; expected 1 to 2"):
        make_model(policy="listed_depths:ListedDepths", policy_settings=settings, num_hidden_layers=4)
