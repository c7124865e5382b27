"""`generate()` of transformers over a SkipCache: what it needs of a model, and what is refused before it begins."""

from __future__ import annotations

import warnings
from typing import Any

from transformers.generation.utils import GenerationMixin

from midskip.model.cache import SkipCache
from midskip.model.config import MidskipConfig
from midskip.model.drafts import ENOUGH_TOKENS, Drafting, DraftReport, drafting


def check_kind(past_key_values: Any) -> None:
    """Refuse a cache that is not ours."""
    if not isinstance(past_key_values, SkipCache | None):
        raise ValueError(
            f"past_key_values is a {type(past_key_values).__name__}; midskip's own caches hold only the tokens that "
            "ran: give a SkipCache(model.config), or use_cache=True and no cache"
        )


class CachedGeneration(GenerationMixin):
    """`GenerationMixin`, over a `SkipCache`. (transformers wants its own mixin named beside it.)"""

    config: MidskipConfig
    model: Any
    last_drafts: DraftReport | None = None  # of the last call with draft_budget
    _warned_of_drafts = False

    def generate(
        self,
        inputs: Any = None,
        generation_config: Any = None,
        *args: Any,
        draft_budget: float | None = None,
        num_draft_tokens: int = 4,
        draft_confidence: float = 0.7,
        **kwargs: Any,
    ) -> Any:
        """`generate()` of transformers, with a `SkipCache`.

        With `draft_budget` the model drafts tokens under that budget and verifies them, in one pass, with every block
        run. The tokens are those of greedy search with every block run, whatever budget is set, which is in force again
        afterwards. A token is accepted if it is right in all rows, so drafts pay most for one row. A row that has ended
        does not count. `model.last_drafts` says what was drafted and accepted. A warning, once, says if it did not pay.

        Args:
            draft_budget: share of the block-tokens that may run in drafts, in (0, 1], as in `set_budget`; None: no
                drafts. For greedy search with a model of `skipped_kv="keep"`.
            num_draft_tokens: the most tokens drafted between two passes of the whole model.
            draft_confidence: drafting ends after a token to which a row that still runs gives a lower probability.

        Raises:
            ValueError: beside what transformers refuses: another kind of cache, more tokens than the model takes, or
                drafts where they cannot be.
        """

        def asked(name: str) -> Any:
            """What is set by that name for this call, by the configuration that is given, or by the model's own."""
            given = kwargs.get(name) or getattr(generation_config, name, None)
            return given or getattr(self.generation_config, name, None)

        if kind := asked("cache_implementation"):
            raise ValueError(
                f"cache_implementation is {kind!r}; midskip has one kind of cache, which holds only the tokens that "
                "ran: leave cache_implementation out"
            )
        if asked("assistant_early_exit"):
            raise ValueError(
                "assistant_early_exit drafts with the first layers alone, which is not how tokens of this model skip: "
                "leave it out, or give draft_budget"
            )
        cache = kwargs.get("past_key_values")
        check_kind(cache)
        mask, counts = kwargs.get("attention_mask"), [kwargs.get("max_new_tokens")]
        counts.append(getattr(generation_config, "max_new_tokens", None))
        if cache is not None and mask is not None and (num_new := counts[0] or counts[1]):
            self._check_room(mask.shape[1] + num_new)  # transformers counts what is given, not what is in the cache
        mixin: Any = super()
        if draft_budget is None:
            return mixin.generate(inputs, generation_config, *args, **kwargs)
        if kwargs.get("custom_generate") is not None:
            raise ValueError("custom_generate decodes in a way of its own: leave it or draft_budget out")
        with drafting(self, draft_budget, num_draft_tokens, draft_confidence) as drafts:
            output = mixin.generate(inputs, generation_config, *args, drafts=drafts, **kwargs)
        report = drafts.report
        if report.num_tokens >= ENOUGH_TOKENS and report.speedup < 1 and not self._warned_of_drafts:
            self._warned_of_drafts = True
            warnings.warn(
                f"drafts do not pay: {report.accepted_share:.0%} of them were accepted and {report.executed_share:.0%} "
                f"of the blocks ran in them, which makes about {report.speedup:.2f} times the speed of generation "
                "without: leave draft_budget out, lower it, or draft fewer tokens",
                stacklevel=2,
            )
        return output

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse it, and `generate_batch` with it: it pages a cache in which every layer has every token."""
        raise ValueError(
            "generate_batch and continuous batching of transformers need a paged cache with every token in every "
            "layer, and midskip's holds the tokens that ran: give generate() a padded batch, or use `midskip serve`"
        )

    def _sample(self, *args: Any, drafts: Drafting | None = None, **kwargs: Any) -> Any:
        """Where transformers decodes token by token, by greedy search or sampling."""
        mixin: Any = super()
        return mixin._sample(*args, **kwargs) if drafts is None else drafts.decode(*args, **kwargs)

    def prepare_inputs_for_generation(
        self, *args: Any, inputs_embeds: Any = None, drafts: Any = None, tokenizer: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Those of transformers, which looks whether `inputs_embeds` and what else `generate()` takes is named here.

        No gates, since nobody reads them, and neither the drafts nor the tokenizer of stop strings.
        """
        mixin: Any = super()
        inputs = mixin.prepare_inputs_for_generation(*args, inputs_embeds=inputs_embeds, **kwargs)
        return {"output_gates": False} | inputs

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict, generation_mode: Any, batch_size: int, max_cache_length: int
    ) -> Any:
        """Give `generate()` a `SkipCache`, and refuse what it cannot do before it begins."""
        self._check_room(max_cache_length + 1)
        mask = model_kwargs.get("attention_mask")
        if mask is not None and mask.ndim == 2 and not bool(mask[:, -1].all()):
            raise ValueError(
                "attention_mask marks the last token of a row as a pad, and generate() goes on from the last column: "
                "pad on the left (tokenizer.padding_side = 'left')"
            )
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            cache._is_user_defined = True  # transformers then hands it back as it would be after the last step
        elif generation_config.use_cache is not False and not self.model.policy.looks_back:
            model_kwargs["past_key_values"] = SkipCache(self.config)
        else:
            if model_kwargs.get("inputs_embeds") is not None:  # without a cache, transformers drops them after a step
                raise ValueError(
                    "give input_ids: the policy looks back and runs without a cache, and without one nothing goes on "
                    "from inputs_embeds"
                )
            generation_config.use_cache = model_kwargs["use_cache"] = False
        if (drafts := model_kwargs.get("drafts")) is not None:
            drafts.check(generation_config, generation_mode, model_kwargs.get("past_key_values"))

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """That of transformers, whose drafts may go on beyond the tokens that are asked for: no more than fit."""
        mixin: Any = super()
        generator = mixin._get_candidate_generator(*args, **kwargs)
        draw, limit = generator.get_candidates, self.config.max_position_embeddings

        def get_candidates(input_ids: Any, *more: Any, **kwargs: Any) -> Any:
            ids_BT, logits_BMV = draw(input_ids, *more, **kwargs)
            room = max(0, limit - input_ids.shape[1])
            return ids_BT[:, : input_ids.shape[1] + room], None if logits_BMV is None else logits_BMV[:, :room]

        generator.get_candidates = get_candidates
        return generator

    def _check_room(self, num_tokens: int) -> None:
        """Refuse more tokens than the model can read; the last new one is not read."""
        if num_tokens - 1 > (limit := self.config.max_position_embeddings):
            raise ValueError(
                f"prompt and new tokens make {num_tokens} tokens; this model takes at most {limit} and one more that "
                "it gives and does not read (max_position_embeddings): shorten the prompt, or ask for fewer"
            )
