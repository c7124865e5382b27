"""What a forward pass is given: checked, and made a layout of packed tokens and a cache.

B sequences, T columns, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from midskip.model.cache import IN_GENERATE, SkipCache
from midskip.model.generation import check_kind
from midskip.model.packing import Layout

_WITHOUT_EFFECT = ("cache_position", "token_type_ids")  # what Llama takes and makes no use of


def check_others(others: dict[str, Any]) -> None:
    """Arguments that transformers' models take and this one has no use for: they may be given where Llama ignores them,
    or as None or False.

    Raises:
        ValueError: weights of attention are asked for.
        TypeError: an argument that would change the result.
    """
    if others.get("output_attentions"):
        raise ValueError("output_attentions is given: packed attention never holds its weights; leave it out")
    for name, value in others.items():
        if name not in _WITHOUT_EFFECT and value is not None and value is not False:
            raise TypeError(f"forward() got an argument {name!r} that this model does not know: leave it out")


def cache_for(
    model: nn.Module, past_key_values: Any, use_cache: bool | None, attention_mask: Tensor | None,
    position_ids: Tensor | None,
) -> SkipCache | None:  # fmt: skip
    """The cache to use: the one given, a new one, or none.

    Unless told, a pass without gradients makes one if `config.use_cache` is True, as transformers' models do, but not
    for a policy that looks back, nor for rows of several documents.
    """
    looks_back: Any = model.policy.looks_back  # pyright: ignore[reportAttributeAccessIssue]
    config: Any = model.config
    if past_key_values is None and use_cache is None:
        use_cache = config.use_cache and not (looks_back or torch.is_grad_enabled())
        use_cache = use_cache and not _has_documents(attention_mask, position_ids)
    if past_key_values is None and not use_cache:
        return None
    if use_cache is False:
        raise ValueError("past_key_values is given and use_cache is False: leave one of them out")
    check_kind(past_key_values)
    if torch.is_grad_enabled():
        raise ValueError("a cache carries no gradients: run the model under torch.no_grad(), or without a cache")
    if looks_back:
        raise ValueError(
            f"the policy {type(model.policy).__name__} looks at a token's past (looks_back), which a cache does not "
            "hold: run without one (use_cache=False)"
        )
    return SkipCache(config) if past_key_values is None else past_key_values


def _has_documents(attention_mask: Tensor | None, position_ids: Tensor | None) -> bool:
    """Whether positions tell documents of a row apart. What has a wrong shape is refused later."""
    if position_ids is None or position_ids.ndim != 2:
        return False
    if attention_mask is not None and attention_mask.ndim == 2:
        if attention_mask.shape[1] != position_ids.shape[1] or len(position_ids) not in (1, len(attention_mask)):
            return False
        position_ids = torch.where(attention_mask.bool(), position_ids, -1)
    before = torch.nn.functional.pad(position_ids[:, :-1], (1, 0), value=-1).cummax(1).values
    return bool(((position_ids >= 0) & (position_ids <= before)).any())


def layout_of(
    model: nn.Module, input_ids: Tensor | None, attention_mask: Tensor | None, position_ids: Tensor | None,
    inputs_embeds: Tensor | None, cache: SkipCache | None,
) -> Layout:  # fmt: skip
    """Check the input and say who is where. Arguments and errors are those of `MidskipModel.forward`."""
    config: Any = model.config
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    given = input_ids if inputs_embeds is None else inputs_embeds
    assert given is not None
    wanted = "[B, T]" if inputs_embeds is None else f"[B, T, {config.hidden_size}]"
    trailing = () if inputs_embeds is None else (config.hidden_size,)
    if given.ndim != 2 + len(trailing) or given.shape[2:] != trailing or not given.numel():
        hint = f": {IN_GENERATE}" if cache is not None and cache.num_columns else ""
        raise ValueError(
            f"the input has the shape {list(given.shape)}; expected {wanted} with at least one token{hint}"
        )
    shape, limit = given.shape[:2], config.max_position_embeddings
    num_columns = shape[1] + (0 if cache is None else cache.num_columns)
    if num_columns > limit:
        held = "" if num_columns == shape[1] else ", with those in the cache,"
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
    if position_ids is not None and position_ids.shape not in (shape, (1, shape[1])):
        raise ValueError(f"position_ids has the shape {list(position_ids.shape)}; expected {list(shape)}")
    if cache is not None:
        return cache.admit(model, (shape[0], shape[1]), attention_mask, position_ids, given.device, input_ids)
    if attention_mask is None:
        valid_BT = torch.ones(shape, dtype=torch.bool, device=given.device)
    elif attention_mask.shape != shape:
        raise ValueError(f"attention_mask has the shape {list(attention_mask.shape)}; expected {list(shape)}")
    else:
        valid_BT = attention_mask.bool()
    layout = Layout.from_rectangle(valid_BT, position_ids)
    if position_ids is not None and layout.num_tokens:
        low, high = torch.stack(layout.position_N.aminmax()).tolist()
        if low < 0 or high >= limit:
            raise ValueError(f"position_ids reach from {low} to {high}; this model takes 0 to {limit - 1}")
    return layout
