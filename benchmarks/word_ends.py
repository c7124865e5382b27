"""A policy by import path, for models of bytes: the inner layers run once a word.

    --model.policy=word_ends:WordEnds --model.policy_settings='{outer: 2}'

The rule is that of SpaceByte (arXiv 2404.14408): from the byte that ends a word the next word has to be told. With
`skipped_kv="drop"` the inner layers are a model of words, as there; with `"keep"` they see all bytes.

N packed tokens.
"""

from typing import Any

from torch import Tensor

from midskip.model.packing import PackedBatch
from midskip.policies import Decision, Policy


class WordEnds(Policy):
    """The first and the last `outer` layers run for every byte. Those between run for the first byte of a text and for
    each byte that is in no word and follows one that is. The letters and digits of ASCII are in words, and all bytes
    that are not ASCII.

    Args:
        outer: layers at each end, at least 1 and fewer than half of all.
    """

    def __init__(self, num_layers: int, width: int, initializer_range: float = 0.02, outer: int = 1):
        super().__init__(num_layers, width, initializer_range)
        if not 1 <= outer < num_layers / 2:
            raise ValueError(f"outer is {outer!r}; expected 1 or more, and fewer than half of {num_layers} layers")
        self.inner_layers = range(outer, num_layers - outer)

    def decide(self, layer: int, h_ND: Tensor, state: dict[str, Any], batch: PackedBatch) -> Decision:
        if layer == 0:
            assert batch.token_N is not None
            ends_N = in_word(batch.previous_token_N) & ~in_word(batch.token_N)
            state["inner"] = Decision(ends_N | (batch.previous_token_N < 0))
            batch.count([state["inner"].keep_N])
        return state["inner"] if layer in self.inner_layers else Decision()


def in_word(byte_N: Tensor) -> Tensor:
    """bool [N] for token ids, int64 [N], of the tokenizer `bytes`; ids from 256 on and below 0 are in no word."""
    in_word_N = (byte_N >= 128) & (byte_N < 256)
    for first, last in ("09", "AZ", "az"):
        in_word_N |= (byte_N >= ord(first)) & (byte_N <= ord(last))
    return in_word_N
