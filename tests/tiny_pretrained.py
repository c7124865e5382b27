"""Small models of transformers' Llama family with random weights, and their folder."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

SHAPE: dict[str, Any] = {
    "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "bos_token_id": 1,
    "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
YARN_STRONG = YARN | {"attention_factor": 2.0}
YARN_SET = YARN | {"beta_fast": 4.0, "beta_slow": 0.5, "truncate": False, "mscale": 2.0, "mscale_all_dim": 0.5}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SHAPE, rope_parameters=LLAMA3),
    "llama_biased_wide_heads": LlamaConfig(**SHAPE, head_dim=6, attention_bias=True, rope_parameters=LINEAR),
    "smollm2": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "smollm3": SmolLM3Config(**SHAPE, no_rope_layers=[1, 0, 1], tie_word_embeddings=True, rope_parameters=YARN),
    "smollm3_biased": SmolLM3Config(**SHAPE, no_rope_layer_interval=2, attention_bias=True),
    "mistral": MistralConfig(**SHAPE, sliding_window=None, head_dim=8, rope_parameters=YARN_STRONG),
    "mistral_wide_window": MistralConfig(**SHAPE, sliding_window=64, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SHAPE, rope_parameters=YARN_SET),
    "qwen2_tied": Qwen2Config(**SHAPE, tie_word_embeddings=True, rope_parameters=DYNAMIC),
    "qwen3": Qwen3Config(**SHAPE, head_dim=8, tie_word_embeddings=True),
    "qwen3_biased": Qwen3Config(**SHAPE, head_dim=6, attention_bias=True, rope_parameters=YARN),
}


@torch.no_grad()
def build(config: Any) -> Any:
    """transformers' model with weights so large that each of them shows in the logits."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config))  # saving notes a dtype in it
    for name, parameter in model.named_parameters():
        parameter.normal_(std=0.3)
        if name.endswith("norm.weight"):
            parameter.add_(1)
    return model.eval()


def near(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def write_gguf(gguf: Any, file: Path, model: LlamaForCausalLM, scaling: str | None = None) -> None:
    """A Llama in float32, its queries and keys in the order of rows that llama.cpp has."""
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            tensor = tensor.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.numpy())
    if scaling == "frequencies":  # as in Llama 3.1's
        writer.add_tensor("rope_freqs.weight", torch.ones(2).numpy())
    elif scaling is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
