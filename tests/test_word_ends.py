"""`benchmarks/word_ends.py`: inner layers that run once a word."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from midskip import MidskipForCausalLM
from midskip.testing import check_policy

Make = Callable[..., MidskipForCausalLM]
PATH = "word_ends:WordEnds"
TEXT = "Ah, so!\n\n2 cafés "


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))


def test_inner_layers_run_once_a_word(make_model: Make) -> None:
    settings = {"outer": 2}
    model = make_model(policy=PATH, policy_settings=settings, num_hidden_layers=6, vocab_size=257).eval()
    ids_BT = torch.tensor([[*TEXT.encode(), 256]])
    executed_LBT = model(ids_BT).executed
    assert executed_LBT[[0, 1, 4, 5]].all()
    for layer in (2, 3):
        assert executed_LBT[layer, 0].tolist() == [place in (0, 2, 6, 10, 17) for place in range(19)]
    check_policy(PATH, settings, num_layers=5, skipped_kv="keep")


@pytest.mark.parametrize("outer", [0, 3])
def test_what_it_refuses(make_model: Make, outer: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        make_model(policy=PATH, policy_settings={"outer": outer}, num_hidden_layers=6)
