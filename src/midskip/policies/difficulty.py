"""What the kind of a token, and of the one before it, decides: by a hash, or by how hard such tokens have been.

N packed tokens, K kinds.
"""

from typing import Any

import torch
from torch import Tensor, nn

from midskip.distributed import sum_over_ranks

NUM_KINDS = 2**14  # tokens, and pairs of tokens, are told apart by a hash into so many kinds
PRIOR = 20.0  # tokens' worth of what is known of the wider kind
MEMORY = 0.999  # of what was seen, kept from one step to the next


class Difficulty(nn.Module):
    """The mean of how far the loss of a token's prediction lies above that of its step, for each kind of token.

    The kind is the token together with the one before it; where few of a pair have been seen, the token alone counts,
    and where few of those, nothing is known: 0. It is a running mean and has no gradient, and changes slowly.
    """

    def __init__(self) -> None:
        super().__init__()
        wide = torch.promote_types(torch.get_default_dtype(), torch.float32)  # half precision cannot count so far
        self.seen = nn.Buffer(torch.zeros(2, 2, NUM_KINDS, dtype=wide))  # by token, by pair: sum of excess nats, count
        self._new: Tensor | None = None  # the same, of passes not absorbed yet; no buffer: each rank has its own

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        kept = self.seen
        super()._apply(fn, recurse)
        if self.seen.dtype.itemsize < kept.dtype.itemsize:
            self.seen = kept.to(self.seen.device)
        return self

    def forward(self, token_N: Tensor, previous_N: Tensor) -> Tensor:
        """float32 or wider [N], nats above the mean that are expected of the prediction that each token makes.

        Args:
            token_N: int64, ids.
            previous_N: int64, those of the tokens before; -1 where there is none.
        """
        expected_N = torch.zeros_like(token_N, dtype=torch.promote_types(self.seen.dtype, torch.float32))
        for seen_2K, kind_N in zip(self.seen, kinds(token_N, previous_N)):
            sum_N, count_N = seen_2K.index_select(1, kind_N).to(expected_N.dtype)
            expected_N = (sum_N + PRIOR * expected_N) / (count_N + PRIOR)
        return expected_N

    @torch.no_grad()
    def observe(self, token_N: Tensor, previous_N: Tensor, nats_N: Tensor, scored_N: Tensor) -> None:
        """Note the losses [N] of a pass, of those predictions that count (bool [N]); `absorb` then takes them in."""
        if self._new is None:
            self._new = torch.zeros_like(self.seen)
        counted_2N = torch.stack([nats_N * scored_N, scored_N]).to(self.seen.dtype)
        for new_2K, kind_N in zip(self._new, kinds(token_N, previous_N)):
            new_2K.index_add_(1, kind_N, counted_2N)

    @torch.no_grad()
    def absorb(self) -> None:
        """Take in what all ranks have noted since the last time."""
        if self._new is None:
            return
        sum_over_ranks(self._new)
        nats_K, count_K = self._new.unbind(1)
        nats_K -= count_K * (nats_K.sum(1, keepdim=True) / count_K.sum(1, keepdim=True).clamp(min=1))
        self.seen.mul_(MEMORY).add_(self._new)
        self._new = None


def kinds(token_N: Tensor, previous_N: Tensor) -> tuple[Tensor, Tensor]:
    """int64 [N] twice, the kind of each token alone and of its pair, below `NUM_KINDS`."""
    return token_N % NUM_KINDS, pair_hash(token_N, previous_N) % NUM_KINDS


def pair_hash(token_N: Tensor, previous_N: Tensor, seed: int = 0) -> Tensor:
    """int64 [N] from 0 to below 2**31, drawn evenly for each pair of a token and the one before it (-1: none)."""
    mixed_N = (token_N + 1) * 2654435761 + (previous_N + 2) * 2246822519 + seed * 3266489917
    for multiplier in (668265263, 374761393):
        mixed_N = mixed_N % 2**31
        mixed_N = (mixed_N ^ (mixed_N >> 15)) * multiplier
    mixed_N = mixed_N % 2**31
    return mixed_N ^ (mixed_N >> 13)


def drawn(token_N: Tensor, previous_N: Tensor, seed: int = 0) -> Tensor:
    """float32 [N] from -2 to below 2, drawn evenly for each pair, and always the same; no rounding is in it."""
    return (pair_hash(token_N, previous_N, seed) >> 11).to(torch.float32) * 2**-18 - 2
