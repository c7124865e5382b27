"""Results by the group of a token, as labelled data gives it: sums over batches, and what they come to.

N tokens, G groups, L layers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from midskip.data.labelled import MAX_GROUPS


def group_sizes(num_layers: int) -> dict[str, int]:
    """Names and lengths of the sums; `tokens_by_group` holds [G, L + 1] counts of tokens by group and blocks run."""
    return {
        "tokens_by_group": MAX_GROUPS * (num_layers + 1),
        "nats_by_group": MAX_GROUPS,
        "correct_by_group": MAX_GROUPS,
    }


def add_groups(
    sums: dict[str, Tensor], group_N: Tensor, blocks_N: Tensor, loss_N: Tensor, correct_N: Tensor, scored_N: Tensor
) -> None:
    """Adds the predictions of a batch that count to the sums, each by the group of the token that made it.

    Args:
        group_N: int64 [N]; -1 for none.
        blocks_N: int64 [N], blocks that the token ran.
        loss_N: float64 [N], nats.
        correct_N, scored_N: bool [N].

    Raises:
        ValueError: a group of 1024 or more.
    """
    if int(group_N.max()) >= MAX_GROUPS:
        raise ValueError(f"a token has the group {int(group_N.max())}; expected -1 for none, or below {MAX_GROUPS}")
    counted_N = scored_N & (group_N >= 0)
    index_N, one_N = torch.where(counted_N, group_N, 0), counted_N.double()  # who is not counted adds 0
    num_blocks = len(sums["tokens_by_group"]) // MAX_GROUPS
    sums["tokens_by_group"].index_add_(0, index_N * num_blocks + blocks_N, one_N)
    sums["nats_by_group"].index_add_(0, index_N, loss_N * one_N)
    sums["correct_by_group"].index_add_(0, index_N, one_N * correct_N)


def results_by_group(sums: dict[str, Tensor]) -> dict[str, Any]:
    """Of the groups 0, 1, ... up to the last that has a target: see `evaluate`."""
    tokens_GB = sums["tokens_by_group"].unflatten(0, (MAX_GROUPS, -1)).long()
    tokens_G = tokens_GB.sum(1)
    num_groups = int(tokens_G.nonzero().max()) + 1 if tokens_G.any() else 0
    totals = {
        "accuracy_by_group": sums["correct_by_group"],
        "loss_by_group": sums["nats_by_group"],
        "blocks_by_group": (tokens_GB * torch.arange(tokens_GB.shape[1])).sum(1),
    }
    counts = tokens_G[:num_groups].tolist()
    result: dict[str, Any] = {
        name: [n / count if count else None for n, count in zip(total[:num_groups].tolist(), counts, strict=True)]
        for name, total in totals.items()
    }
    result["num_targets_by_group"] = counts
    result["depth_rank_correlation"] = rank_correlation(tokens_GB[:num_groups].tolist())
    return result


def rank_correlation(counts: list[list[int]]) -> float | None:
    """Spearman's, of row and column over tokens that are counted by both; equal ones share their mean rank.

    Worked out in whole numbers up to the last step. None where either is constant.
    """

    def centred(totals: list[int]) -> list[int]:
        """Twice the ranks, less twice their mean."""
        ranks, before = [], 0
        for count in totals:
            ranks.append(2 * before + count - sum(totals))
            before += count
        return ranks

    totals = [[sum(row) for row in counts], [sum(column) for column in zip(*counts, strict=True)]]
    rows, columns = map(centred, totals)
    covariance = sum(
        count * row * column
        for row, of_row in zip(rows, counts, strict=True)
        for column, count in zip(columns, of_row, strict=True)
    )
    squares = [
        sum(count * rank * rank for count, rank in zip(total, ranks, strict=True))
        for total, ranks in zip(totals, (rows, columns), strict=True)
    ]
    if not all(squares):
        return None
    return max(-1.0, min(1.0, covariance / math.sqrt(squares[0] * squares[1])))
