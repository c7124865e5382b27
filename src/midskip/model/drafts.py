"""Lossless drafts in `generate()`: the model proposes tokens under a budget and checks them with all of its blocks.

One set of weights and one cache serve both. B sequences, C columns of ids, T columns of a pass, K drafted tokens,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
)
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import GenerateDecoderOnlyOutput

from midskip.budget.monitor import temporary_limits
from midskip.model.cache import SkipCache

# Processors without a state. Drafts go without all others, which a token that is not accepted could confuse.
STATELESS = (
    MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor, NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor, SuppressTokensLogitsProcessor,
)  # fmt: skip
ENOUGH_TOKENS = 64  # from which on an estimate of the speed is worth a warning


@dataclass
class DraftReport:
    """What the drafts of one call of `generate()` came to. Tokens are columns: one stands for all rows.

    Attributes:
        num_tokens: tokens generated.
        num_passes: passes of the whole model over drafted tokens.
        num_drafted: tokens drafted.
        num_accepted: those of them that the whole model gives too, in all rows.
        num_block_tokens, num_valid_block_tokens: block-tokens that ran in drafts, and those that would have run with
            every block.
    """

    num_tokens: int = 0
    num_passes: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    num_block_tokens: int = 0
    num_valid_block_tokens: int = 0

    @property
    def accepted_share(self) -> float:
        """Share of the drafted tokens that were accepted."""
        return self.num_accepted / max(1, self.num_drafted)

    @property
    def executed_share(self) -> float:
        """Share of the block-tokens that ran in drafts."""
        return self.num_block_tokens / max(1, self.num_valid_block_tokens)

    @property
    def speedup(self) -> float:
        """How many times as fast as without drafts, estimated: (a + 1) / (k c + 1).

        a of k drafted tokens are accepted in a pass, and a share c of the blocks runs in drafts. It takes a draft to
        cost that share of a pass, and a pass over k + 1 columns to cost as much as one over 1.
        """
        cost = self.num_drafted * self.executed_share + self.num_passes
        return (self.num_accepted + self.num_passes) / cost if cost else 1.0


class Drafting:
    """How tokens are drafted, and the decoding loop. Made by `drafting`.

    Args:
        score_scale: of the policy, in drafts.
        num_draft_tokens: the most tokens drafted between two passes of the whole model.
        confidence: drafting ends after a token of lower probability.
    """

    def __init__(self, model: Any, score_scale: float, num_draft_tokens: int, confidence: float):
        self.model, self.policy = model, model.model.policy
        self.score_scale, self.num_draft_tokens, self.confidence = score_scale, num_draft_tokens, confidence
        self.report = DraftReport()

    def check(self, generation_config: Any, mode: str, cache: SkipCache | None) -> None:
        """Refuse what drafts cannot do.

        Raises:
            ValueError: another mode than greedy search, no cache, or hidden states asked for.
        """
        if mode != GenerationMode.GREEDY_SEARCH:
            raise ValueError(
                f"draft_budget is for greedy search and this call asks for {getattr(mode, 'value', mode)!s}: give "
                "do_sample=False, one beam and no other way to propose tokens, or leave draft_budget out"
            )
        if cache is None:
            raise ValueError(
                "draft_budget needs a cache, and use_cache is False or the policy looks back: leave draft_budget out"
            )
        if generation_config.return_dict_in_generate and generation_config.output_hidden_states:
            raise ValueError("draft_budget gives no hidden states: leave out output_hidden_states or draft_budget")

    def decode(
        self, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
        synced_gpus: bool = False, streamer: Any = None, **model_kwargs: Any,
    ) -> Any:  # fmt: skip
        """The loop of `GenerationMixin._sample`, whose logits are those of several columns at a time.

        Processors and stopping criteria are called for each token generated, in order, as there.
        """
        if synced_gpus:
            raise ValueError("draft_budget is for one process: give synced_gpus=False, or leave draft_budget out")
        self.cache: SkipCache = model_kwargs["past_key_values"]
        self.mask: Tensor | None = model_kwargs.get("attention_mask")
        wants = generation_config.return_dict_in_generate
        scores = () if wants and generation_config.output_scores else None
        raw_logits = () if wants and generation_config.output_logits else None
        pad = None  # given to rows that have ended
        if any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria):
            pad = generation_config._pad_token_tensor.to(input_ids.device)
        running_B = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        self.policy.set_limits(0.0)
        outputs = self.model._prefill(input_ids, generation_config, model_kwargs)
        logits_BTV = outputs.logits[:, -1:].to(input_ids.device, torch.float32, copy=True)
        del outputs
        # columns before those of input_ids: cached before, or of inputs_embeds
        self.offset, start = self.cache.num_columns - input_ids.shape[1], input_ids.shape[1]
        drafted_BK = input_ids[:, :0]
        try:
            while True:
                for step, logits_BV in enumerate(logits_BTV.unbind(1)):
                    scores_BV = logits_processor(input_ids, logits_BV)
                    scores = None if scores is None else (*scores, scores_BV)
                    raw_logits = None if raw_logits is None else (*raw_logits, logits_BV)
                    token_B = _padded(scores_BV.argmax(-1), running_B, pad)
                    input_ids = torch.cat([input_ids, token_B[:, None]], 1)
                    accepted = step < drafted_BK.shape[1] and torch.equal(token_B, drafted_BK[:, step])
                    self.report.num_accepted += accepted
                    self.report.num_tokens = input_ids.shape[1] - start
                    running_B = running_B & ~stopping_criteria(input_ids, scores)
                    if streamer is not None:
                        streamer.put(token_B.cpu())
                    if not (accepted and running_B.any()):
                        break
                if not running_B.any():
                    break
                self._forget_after(input_ids)
                most = min(self.num_draft_tokens, generation_config.max_length - input_ids.shape[1] - 1)
                drafted_BK = self._draft(input_ids, logits_processor, running_B, pad, most)
                logits_BTV = self._read(torch.cat([input_ids, drafted_BK], 1))
                self.report.num_passes += drafted_BK.shape[1] > 0
        finally:
            self._forget_after(input_ids)
        if streamer is not None:
            streamer.end()
        if not wants:
            return input_ids
        return GenerateDecoderOnlyOutput(
            sequences=input_ids,  # pyright: ignore[reportArgumentType]
            scores=scores,  # pyright: ignore[reportArgumentType]
            logits=raw_logits,  # pyright: ignore[reportArgumentType]
            past_key_values=self.cache,
        )

    def _draft(self, ids_BC: Tensor, processors: Any, running_B: Tensor, pad: Tensor | None, most: int) -> Tensor:
        """int64 [B, K], up to `most` tokens to go on with, by fewer blocks; the cache is left as it was."""
        cache, num_given = self.cache, ids_BC.shape[1]
        before = cache.num_columns, cache.num_block_tokens, cache.num_valid_tokens
        processors = LogitsProcessorList(processor for processor in processors if type(processor) in STATELESS)
        self.policy.set_limits(self.score_scale)
        try:
            while ids_BC.shape[1] < num_given + most:
                scores_BV = processors(ids_BC, self._read(ids_BC)[:, -1])  # pyright: ignore[reportArgumentType]
                probability_B, token_B = scores_BV.softmax(-1).max(-1)
                ids_BC = torch.cat([ids_BC, _padded(token_B, running_B, pad)[:, None]], 1)
                if (running_B & (probability_B < self.confidence)).any():
                    break
        finally:
            cache.crop(before[0] - cache.num_columns)
            self.policy.set_limits(0.0)
        self.report.num_drafted += ids_BC.shape[1] - num_given
        self.report.num_block_tokens += cache.num_block_tokens - before[1]
        self.report.num_valid_block_tokens += (cache.num_valid_tokens - before[2]) * cache.config.num_skip_units
        return ids_BC[:, num_given:]

    def _read(self, ids_BC: Tensor) -> Tensor:
        """float32 [B, T, V], logits of the columns that the cache does not hold, which it then does."""
        new_BT, device = ids_BC[:, self.cache.num_columns - self.offset :], self.model.device
        mask = self.mask
        if mask is not None:
            ahead = self.offset + ids_BC.shape[1] - mask.shape[1]
            mask = torch.nn.functional.pad(mask, (0, ahead), value=1).to(device)
        outputs = self.model(
            new_BT.to(device), attention_mask=mask, past_key_values=self.cache, use_cache=True, output_gates=False
        )
        return outputs.logits.to(ids_BC.device, torch.float32)

    def _forget_after(self, ids_BC: Tensor) -> None:
        """Take drafted tokens that are not among these ids out of the cache, and the last one, which is not read."""
        self.cache.crop(min(0, self.offset + ids_BC.shape[1] - 1 - self.cache.num_columns))


@contextmanager
def drafting(model: Any, budget: float, num_draft_tokens: int, confidence: float) -> Iterator[Drafting]:
    """What is drafted within is reported in `model.last_drafts`; afterwards the limits of before are in force again.

    Raises:
        ValueError: what `set_budget` refuses, a model whose skipped tokens have no keys, or a setting out of range.
    """
    if (kind := model.config.skipped_kv) != "keep":
        raise ValueError(
            f"draft_budget is for models with skipped_kv='keep' and this one has {kind!r}: its drafts would read keys "
            "that it never sees under a budget; leave draft_budget out, or train a model with 'keep'"
        )
    if not isinstance(num_draft_tokens, int) or isinstance(num_draft_tokens, bool) or num_draft_tokens < 1:
        raise ValueError(f"num_draft_tokens is {num_draft_tokens!r}; expected a whole number of at least 1")
    if not 0 <= confidence <= 1:
        raise ValueError(f"draft_confidence is {confidence!r}; expected a probability from 0 to 1")
    with temporary_limits(model):  # no pass within is under the budget that a monitor looks after
        model.set_budget(budget)
        drafts = Drafting(model, model.model.policy.score_scale, num_draft_tokens, confidence)
        model.last_drafts = drafts.report
        yield drafts


def _padded(token_B: Tensor, running_B: Tensor, pad: Tensor | None) -> Tensor:
    """These tokens, and the pad for rows that have ended."""
    return token_B if pad is None else torch.where(running_B, token_B, pad)
