"""Evaluation by groups of tokens, against a computation by hand."""

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from midskip import MidskipForCausalLM
from midskip.evaluate import evaluate
from midskip.groups import rank_correlation


def items_of(num_items: int = 7) -> list[dict[str, Tensor]]:
    """Labels that are not the ids, some -100; groups -1, 0, 1, 3 and 4; pads on the left."""
    draw = torch.Generator().manual_seed(0)
    found = []
    for number in range(num_items):
        ids_T, labels_T, group_T = (torch.randint(high, (12,), generator=draw) for high in (290, 290, 6))
        found.append(
            {
                "input_ids": ids_T,
                "labels": torch.where(labels_T < 60, -100, labels_T),
                "group": torch.where(group_T == 2, -1, group_T - (group_T == 5).long()),
                "attention_mask": (torch.arange(12) >= number % 3).long(),
            }
        )
    return found


@torch.no_grad()
def test_results_by_group(model: MidskipForCausalLM) -> None:
    items = items_of()
    rows: list[tuple[int, float, bool, int]] = []
    for item in items:
        output = model(item["input_ids"][None], attention_mask=item["attention_mask"][None])
        valid_T = item["attention_mask"].bool()
        for column in range(11):
            target = int(item["labels"][column + 1])
            if valid_T[column] and target != -100:
                logits_V = output.logits[0, column]
                nats = -logits_V.log_softmax(-1)[target].item()
                blocks = int(output.executed[:, 0, column].sum())
                rows.append((int(item["group"][column]), nats, int(logits_V.argmax()) == target, blocks))
    found = [evaluate(model, items, batch_size=size) for size in (1, 3)]
    for result in found:
        for group in range(5):
            own = [row[1:] for row in rows if row[0] == group]
            assert result["num_targets_by_group"][group] == len(own) and bool(own) == (group != 2)
            for name, part in (("loss", 0), ("accuracy", 1), ("blocks", 2)):
                mean = pytest.approx(sum(row[part] for row in own) / len(own), rel=1e-5) if own else None
                assert result[f"{name}_by_group"][group] == mean
        assert len(result["loss_by_group"]) == 5 and result["num_targets"] == len(rows)
        grouped = [row for row in rows if row[0] >= 0]
        expected = by_hand(np.array([row[0] for row in grouped]), np.array([row[3] for row in grouped]))
        assert result["depth_rank_correlation"] == pytest.approx(expected, abs=1e-12)
    assert not any(name.endswith("by_group") for name in evaluate(model, [without(item) for item in items]))


@torch.no_grad()
def test_accuracy_is_of_all_targets(model: MidskipForCausalLM) -> None:
    (item,) = items_of(1)
    best_T = model(item["input_ids"][None]).logits[0].argmax(-1)
    item["labels"][1:] = torch.where(torch.arange(11) < 8, best_T[:11], (best_T[:11] + 1) % 290)
    item["group"] = (torch.arange(12) >= 6).long()
    result = evaluate(model, [item])
    assert result["accuracy"] == 8 / 11 and result["accuracy_by_group"] == [1, 2 / 5]


def without(item: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: values for name, values in item.items() if name != "group"}


def by_hand(left: np.ndarray, right: np.ndarray) -> float:
    ranks = [(np.less.outer(x, x).sum(0) + (np.equal.outer(x, x).sum(0) + 1) / 2) for x in (left, right)]
    return float(np.corrcoef(*ranks)[0, 1])


def test_the_rank_correlation_is_spearmans() -> None:
    assert rank_correlation([[5, 0, 0], [0, 2, 0], [0, 0, 9]]) == 1
    assert rank_correlation([[0, 3], [4, 0]]) == -1
    assert rank_correlation([[1, 2], [2, 4]]) == 0
    for constant in ([], [[3, 1, 0]], [[2, 0], [5, 0]], [[0, 0], [0, 0]]):
        assert rank_correlation(constant) is None
    counts = np.random.default_rng(0).integers(9, size=(4, 5))
    pairs = [pair for pair in product(range(4), range(5)) for _ in range(counts[pair])]
    left, right = np.array(pairs).T
    assert rank_correlation(counts.tolist()) == pytest.approx(by_hand(left, right), abs=1e-12)
    assert rank_correlation((counts * 10**9).tolist()) == pytest.approx(by_hand(left, right), abs=1e-9)


def test_a_group_out_of_range(model: MidskipForCausalLM) -> None:
    item = items_of(1)[0]
    item["group"][3] = 1024
    with pytest.raises(ValueError, match="a token has the group 1024; expected -1 for none, or below 1024"):
        evaluate(model, [item])
