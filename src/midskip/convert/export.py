"""Dense midskip models as plain models of transformers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from midskip.convert.configs import SAME
from midskip.convert.load import their_name
from midskip.model.config import SKIPPING_WEIGHTS, MidskipConfig
from midskip.model.modeling import MidskipForCausalLM
from midskip.policies.dense import Dense


def to_transformers(model: MidskipForCausalLM) -> PreTrainedModel:
    """The same function as a Llama, Qwen2, Qwen3 or SmolLM3 of transformers, the first that has what is needed.

    Returns:
        A model in evaluation mode whose weights are those of `model`, in the same memory, for `save_pretrained` or to
        run. Training one trains the other.

    Raises:
        ValueError: the model skips, has the norms of the paper, or what none of those models has.
    """
    config = model.config
    if not isinstance(model.model.policy, Dense):
        raise ValueError(
            f"the model's policy is {config.policy!r}, under which tokens may skip, and transformers has no such "
            "model; expected the policy 'dense'"
        )
    if config.norms != "pre":
        raise ValueError(f"the model's norms are {config.norms!r}, which no Llama has; expected 'pre'")
    their_class, theirs = _theirs(config)
    theirs.dtype = model.dtype
    with torch.device("meta"):
        plain: Any = their_class(theirs)
    plain.model.rotary_emb = type(plain.model.rotary_emb)(config=theirs).to(model.device)
    weights = {their_name(name): x for name, x in model.state_dict().items() if not name.startswith(SKIPPING_WEIGHTS)}
    plain.load_state_dict(weights, assign=True)
    plain.tie_weights()
    plain.generation_config = copy.deepcopy(model.generation_config)
    return plain.eval()


def _theirs(config: MidskipConfig) -> tuple[Any, Any]:
    """The model's class and its configuration."""
    if isinstance(config.intermediate_size, list):
        raise ValueError(
            f"intermediate_size is {config.intermediate_size}; expected one number: Llama's blocks are all alike"
        )
    settings: dict[str, Any] = {name: getattr(config, name) for name in (*SAME, "head_dim")}
    settings["rope_parameters"] = dict(config.rope_parameters)
    is_all_or_none = config.attention_bias == config.attention_out_bias
    has_rope = config.no_rope_layers is None or all(config.no_rope_layers)
    if config.qk_norm and is_all_or_none and has_rope:
        return Qwen3ForCausalLM, Qwen3Config(**settings, attention_bias=config.attention_bias)
    if not config.qk_norm and is_all_or_none and has_rope:
        return LlamaForCausalLM, LlamaConfig(**settings, attention_bias=config.attention_bias)
    if not config.qk_norm and config.attention_bias and has_rope:
        return Qwen2ForCausalLM, Qwen2Config(**settings)
    if not config.qk_norm and is_all_or_none:
        return SmolLM3ForCausalLM, SmolLM3Config(
            **settings, attention_bias=config.attention_bias, no_rope_layers=config.no_rope_layers
        )
    raise ValueError(
        f"no model of transformers has all of qk_norm={config.qk_norm}, attention_bias={config.attention_bias}, "
        f"attention_out_bias={config.attention_out_bias} and no_rope_layers={config.no_rope_layers}; expected what "
        "Llama, Qwen2, Qwen3 or SmolLM3 has"
    )
