"""The data set `pointers`: what stands in its items, and how many hops each token needs."""

from typing import Any

import pytest
import torch
from torch import Tensor

from midskip.data import DataError
from midskip.data.pointers import Pointers, hops

VALUES, WINDOW = 16, 16


def stacked(data: Pointers, side: str, count: int) -> dict[str, Tensor]:
    items = [getattr(data, side)[number] for number in range(count)]
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


@pytest.mark.parametrize("settings", [{}, {"filler": 0.3, "num_chains": 4}, {"window": 3, "num_chains": 9}])
def test_a_token_gives_what_the_one_it_points_to_gives_and_no_two_point_to_the_same(settings: dict[str, Any]) -> None:
    data = Pointers(**settings)
    window = settings.get("window", WINDOW)
    batch = stacked(data, "training", 50)
    assert int(batch["input_ids"].max()) == data.vocab_size - 1
    num_tokens = 0
    for ids, labels, hop in zip(*(batch[name].tolist() for name in ("input_ids", "labels", "group")), strict=True):
        assert len(ids) == data.length and (labels[0], ids[-1], hop[-1]) == (-100, VALUES + window, -1)
        parents = []
        for column, token in enumerate(ids[:-1]):
            answer, offset = labels[column + 1], token - VALUES + 1
            if offset < 1:
                assert (hop[column], answer) == (0, token)
            elif offset <= window:
                parent = column - offset
                assert parent >= 0 and (hop[column], answer) == (hop[parent] + 1, labels[parent + 1])
                parents.append(parent)
            else:
                assert (hop[column], answer) == (-1, -100)
        assert len(set(parents)) == len(parents)
        assert max(hop) <= 8
        num_tokens += sum(one >= 0 for one in hop)
    assert num_tokens == pytest.approx(50 * 64 * (1 - settings.get("filler", 0)), rel=0.05)
    assert torch.equal(hops(batch["input_ids"], VALUES, window), batch["group"])


def test_every_hop_is_common() -> None:
    hop = stacked(Pointers(), "training", 400)["group"]
    share = torch.bincount(hop[hop >= 0], minlength=9) / (hop >= 0).sum()
    assert len(share) == 9 and (share.diff() < 0).all()
    assert share[0] == pytest.approx(0.16, abs=0.01) and share[8] == pytest.approx(0.08, abs=0.01)


def test_an_item_goes_by_seed_side_and_number() -> None:
    data, again, other = Pointers(num_training=8, num_validation=8), Pointers(), Pointers(seed=1)
    assert (len(data.training), len(again.training), len(again.validation)) == (8, 64_000, 1024)
    assert torch.equal(data.training[7]["input_ids"], again.training[7]["input_ids"])
    items = [data.training[7], data.training[6], data.validation[7], other.training[7]]
    assert len({tuple(item["input_ids"].tolist()) for item in items}) == 4
    with pytest.raises(IndexError, match="no item 8: there are 8"):
        data.training[8]


def test_offsets_that_lead_nowhere_are_no_hops() -> None:
    assert hops(torch.tensor([[VALUES, VALUES + 1, VALUES, 3, VALUES]])).tolist() == [[0, 0, 1, 0, 1]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_chains": 0}, "num_chains of pointers is 0. Expected 1 or more"),
        ({"length": 1}, "length of pointers is 1. Expected 2 or more"),
        ({"seed": -1}, "seed of pointers is -1. Expected 0 or more"),
        ({"seed": 0.5}, r"seed of pointers is 0\.5\. Expected 0 or more, below 2"),
        ({"num_training": None}, "num_training of pointers is None. Expected 1 or more"),
        ({"num_validation": 2**63}, f"num_validation of pointers is {2**63}. Expected 1 or more, below 2"),
        ({"window": "wide"}, "window of pointers is 'wide'. Expected 1 or more"),
        ({"num_hops": [1]}, r"num_hops of pointers is \[1\]. Expected 1 or more"),
        ({"num_chains": 65}, "num_chains of pointers is 65. Expected fewer than the 65 columns"),
        ({"filler": None}, "filler of pointers is None. Expected a probability"),
        ({"filler": 1.0}, "filler of pointers is 1.0. Expected a probability"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Pointers(**settings)
