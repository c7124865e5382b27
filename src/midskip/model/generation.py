"""`generate()` of transformers over a SkipCache: what it needs of a model, and what is refused before it begins."""

from __future__ import annotations

from typing import Any

from transformers.generation.utils import GenerationMixin

from midskip.model.cache import SkipCache
from midskip.model.config import MidskipConfig


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

    def generate(self, inputs: Any = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """`generate()` of transformers, with a `SkipCache`.

        Raises:
            ValueError: beside what transformers refuses: another kind of cache, or more tokens than the model takes.
        """
        kinds = kwargs.get("cache_implementation"), getattr(generation_config, "cache_implementation", None)
        if kind := kinds[0] or kinds[1] or getattr(self.generation_config, "cache_implementation", None):
            raise ValueError(
                f"cache_implementation is {kind!r}; midskip has one kind of cache, which holds only the tokens that "
                "ran: leave cache_implementation out"
            )
        cache = kwargs.get("past_key_values")
        check_kind(cache)
        mask, counts = kwargs.get("attention_mask"), [kwargs.get("max_new_tokens")]
        counts.append(getattr(generation_config, "max_new_tokens", None))
        if cache is not None and mask is not None and (num_new := counts[0] or counts[1]):
            self._check_room(mask.shape[1] + num_new - 1)  # transformers counts what is given, not what is in the cache
        return super().generate(inputs, generation_config, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def prepare_inputs_for_generation(self, *args: Any, inputs_embeds: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Those of transformers, which looks whether `inputs_embeds` is named here, and no gates: nobody reads them."""
        mixin: Any = super()
        inputs = mixin.prepare_inputs_for_generation(*args, inputs_embeds=inputs_embeds, **kwargs)
        return {"output_gates": False} | inputs

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict, generation_mode: Any, batch_size: int, max_cache_length: int
    ) -> Any:
        """Give `generate()` a `SkipCache`, and refuse what it cannot do before it begins."""
        self._check_room(max_cache_length)
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

    def _check_room(self, num_read: int) -> None:
        """Refuse more tokens than the model can read; the last new one is not read."""
        if num_read > (limit := self.config.max_position_embeddings):
            raise ValueError(
                f"prompt and new tokens make {num_read + 1} tokens; this model takes at most {limit} and one more that "
                "it gives and does not read (max_position_embeddings): shorten the prompt, or ask for fewer"
            )
