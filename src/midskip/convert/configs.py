"""What the configurations of transformers' Llama family are as a `MidskipConfig`."""

from __future__ import annotations

from typing import Any

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
SAME = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "initializer_range", "tie_word_embeddings",
    "use_cache", "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip


def check_model_type(model_type: object, source: object) -> None:
    """Raises ValueError if models of this type cannot be loaded."""
    if model_type == "midskip":
        raise ValueError(f"{source} is a midskip model already: load it with MidskipForCausalLM.from_pretrained")
    if model_type not in SUPPORTED:
        raise ValueError(
            f"{source} has the model_type {model_type!r}; supported are {', '.join(SUPPORTED)} (SmolLM and SmolLM2 are "
            "of the type llama, Qwen2.5 of the type qwen2)"
        )


def midskip_settings(config: Any, max_position_embeddings: int | None = None) -> dict[str, Any]:
    """Keyword arguments for `MidskipConfig`: the shape of the model, and what stands in its blocks.

    Args:
        config: of transformers, of a `model_type` in `SUPPORTED`.
        max_position_embeddings: instead of the model's own.

    Raises:
        ValueError: the model has what a midskip model cannot compute.
    """
    kind = config.model_type
    context = max_position_embeddings or config.max_position_embeddings
    for name, expected in (("hidden_act", "silu"), ("mlp_bias", False), ("quantization_config", None)):
        value = getattr(config, name, expected)
        if value != expected:
            raise ValueError(f"the model's {name} is {value!r}, which midskip does not have; expected {expected!r}")
    _check_window(config, context)
    has_bias = kind == "qwen2" or bool(getattr(config, "attention_bias", False))
    no_rope_layers = getattr(config, "no_rope_layers", None) if kind == "smollm3" else None
    if no_rope_layers is not None:
        no_rope_layers = [int(bool(value)) for value in no_rope_layers[: config.num_hidden_layers]]
    return {name: getattr(config, name) for name in SAME} | {
        "max_position_embeddings": context,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "rope_parameters": _rope_parameters(config, context),
        "attention_bias": has_bias,
        "attention_out_bias": has_bias and kind != "qwen2",
        "qk_norm": kind == "qwen3",
        "no_rope_layers": None if no_rope_layers is None or all(no_rope_layers) else no_rope_layers,
        "norms": "pre",
    }


def _check_window(config: Any, context: int) -> None:
    window = getattr(config, "sliding_window", None)
    if config.model_type == "mistral":
        slides = True
    elif config.model_type == "llama":
        slides = False
    else:
        slides = "sliding_attention" in config.layer_types
    if slides and window is not None and window < context:
        raise ValueError(
            f"the model attends within a sliding window of {window} tokens, which midskip does not have, and its "
            f"max_position_embeddings is {context}: pass max_position_embeddings={window}, up to which the window "
            "changes nothing"
        )


def _rope_parameters(config: Any, context: int) -> dict[str, Any]:
    rope = {name: value for name, value in config.rope_parameters.items() if value is not None and name != "type"}
    kind = rope["rope_type"]
    if rope.pop("partial_rotary_factor", 1) != 1:
        raise ValueError("the model turns a part of each head only (partial_rotary_factor); midskip turns whole heads")
    if kind == "dynamic":
        if context > config.max_position_embeddings:
            raise ValueError(
                "rope_type 'dynamic' changes the rotary embedding beyond the model's max_position_embeddings, "
                f"{config.max_position_embeddings}, which midskip does not do: leave max_position_embeddings as it is"
            )
        return {"rope_type": "default", "rope_theta": rope["rope_theta"]}  # the same up to there
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise ValueError(f"the model's rope_type is {kind!r}; supported are default, linear, llama3, yarn and dynamic")
    if kind == "yarn":
        rope.setdefault("factor", config.max_position_embeddings / rope["original_max_position_embeddings"])
        rope = {name: value for name, value in rope.items() if value or name == "truncate"}  # 0 is unset there
    return rope
