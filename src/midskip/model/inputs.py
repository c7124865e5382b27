"""What a forward pass is given: checked, and made a batch of packed tokens and a cache.

B sequences, T columns, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from midskip.model.cache import IN_GENERATE, SkipCache
from midskip.model.generation import check_kind
from midskip.model.packing import PackedBatch

_WITHOUT_EFFECT = ("cache_position", "token_type_ids")  # what Llama takes and makes no use of
_AS_POSITIONS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")  # tell documents apart


def check_others(others: dict[str, Any], position_ids: Tensor | None) -> None:
    """Arguments that transformers' models take and this one has no use for: they may be given where Llama ignores them,
    where position_ids say the same, or as None or False.

    Raises:
        ValueError: weights of attention are asked for.
        TypeError: an argument that would change the result.
    """
    if others.get("output_attentions"):
        raise ValueError("output_attentions is given: packed attention never holds its weights; leave it out")
    known = _WITHOUT_EFFECT if position_ids is None else (*_WITHOUT_EFFECT, *_AS_POSITIONS)
    for name, value in others.items():
        if name not in known and value is not None and value is not False:
            raise TypeError(f"forward() got an argument {name!r} that this model does not know: leave it out")


def inputs_for(
    model: nn.Module, input_ids: Tensor | None, attention_mask: Tensor | None, position_ids: Tensor | None,
    inputs_embeds: Tensor | None, past_key_values: Any, use_cache: bool | None,
) -> tuple[PackedBatch, SkipCache | None]:  # fmt: skip
    """Check the input; say who is where, and which cache is used: the one given, a new one, or none.

    Arguments and errors are those of `MidskipModel.forward`. Unless told, a pass without gradients makes a cache if
    `config.use_cache` is True, as transformers' models do, but not for a policy that looks back, nor for rows of
    several documents.
    """
    if getattr(model, "_is_replica", False):  # so torch marks them
        raise ValueError(
            "nn.DataParallel runs this model on several GPUs and could not gather what it gives: start the script by "
            "`torchrun` or `accelerate launch`, or let it see one GPU (CUDA_VISIBLE_DEVICES=0)"
        )
    config: Any = model.config
    looks_back: Any = model.policy.looks_back  # pyright: ignore[reportAttributeAccessIssue]
    _check_cache(model, past_key_values, use_cache, looks_back)
    cache: SkipCache | None = past_key_values
    given = _checked(config, input_ids, inputs_embeds, 0 if cache is None else cache.num_columns)
    shape = given.shape[:2]
    if position_ids is not None and position_ids.shape not in (shape, (1, shape[1])):
        raise ValueError(f"position_ids has the shape {list(position_ids.shape)}; expected {list(shape)}")
    may_cache = use_cache is None and config.use_cache and not (looks_back or torch.is_grad_enabled())
    if cache is None and (use_cache or (may_cache and position_ids is None)):
        cache = SkipCache(config)
    if cache is None:
        batch = _packed(given, attention_mask, position_ids, config.max_position_embeddings)
        if not may_cache or batch.document_N is not None:
            return batch, None
        cache = SkipCache(config)
    return cache.admit(model, (shape[0], shape[1]), attention_mask, position_ids, given.device, input_ids), cache


def _packed(given: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, limit: int) -> PackedBatch:
    """Without a cache."""
    shape = given.shape[:2]
    if attention_mask is None:
        valid_BT = torch.ones(shape, dtype=torch.bool, device=given.device)
    elif attention_mask.shape != shape:
        raise ValueError(f"attention_mask has the shape {list(attention_mask.shape)}; expected {list(shape)}")
    else:
        valid_BT = attention_mask.bool()
    batch = PackedBatch.from_rectangle(valid_BT, position_ids, all_valid=attention_mask is None)
    low, high = batch.position_range or (0, 0)
    if low < 0 or high >= limit:
        raise ValueError(f"position_ids reach from {low} to {high}; this model takes 0 to {limit - 1}")
    return batch


def _check_cache(model: nn.Module, cache: Any, use_cache: bool | None, looks_back: bool) -> None:
    """Raises ValueError for a cache that is given or asked for and cannot be used."""
    if cache is None and not use_cache:
        return
    if use_cache is False:
        raise ValueError("past_key_values is given and use_cache is False: leave one of them out")
    check_kind(cache)
    if torch.is_grad_enabled():
        raise ValueError("a cache carries no gradients: run the model under torch.no_grad(), or without a cache")
    if looks_back:
        raise ValueError(
            f"the policy {type(model.policy).__name__} looks at a token's past (looks_back), which a cache does not "
            "hold: run without one (use_cache=False)"
        )


def _checked(config: Any, input_ids: Tensor | None, inputs_embeds: Tensor | None, num_past: int) -> Tensor:
    """The one of the two that is given; ValueError for a shape, a number or an id that the model does not take."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    given = input_ids if inputs_embeds is None else inputs_embeds
    assert given is not None
    wanted = "[B, T]" if inputs_embeds is None else f"[B, T, {config.hidden_size}]"
    trailing = () if inputs_embeds is None else (config.hidden_size,)
    if given.ndim != 2 + len(trailing) or given.shape[2:] != trailing or not given.numel():
        hint = f": {IN_GENERATE}" if num_past else ""
        raise ValueError(
            f"the input has the shape {list(given.shape)}; expected {wanted} with at least one token{hint}"
        )
    num_columns, limit = given.shape[1] + num_past, config.max_position_embeddings
    if num_columns > limit:
        held = ", with those in the cache," if num_past else ""
        raise ValueError(
            f"the input{held} has {num_columns} tokens and this model takes at most {limit} "
            "(max_position_embeddings): shorten it, or train with a larger max_position_embeddings"
        )
    if input_ids is not None and input_ids.device.type == "cpu":
        low, high = (int(x) for x in input_ids.aminmax())
        if low < 0 or high >= config.vocab_size:
            raise ValueError(
                f"input_ids reach from {low} to {high}; this model's vocabulary is 0 to "
                f"{config.vocab_size - 1}: is it the model's own tokenizer?"
            )
    return given
