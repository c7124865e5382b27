"""Pretrained models that cannot be loaded, and midskip models that cannot be written back, are refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from tiny_pretrained import CONFIGS, SHAPE, build
from transformers import GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, SmolLM3Config

from midskip import MidskipConfig, MidskipForCausalLM
from midskip.convert import pretrained, save_tokenizer, to_transformers


@pytest.mark.parametrize(
    "config, message",
    [
        (GPT2Config(), "has the model_type 'gpt2'; supported are llama, mistral, qwen2, qwen3, smollm3 "),
        (MidskipConfig(), "is a midskip model already: load it with MidskipForCausalLM.from_pretrained"),
        (LlamaConfig(**SHAPE, mlp_bias=True), "mlp_bias is True, which midskip does not have; expected False"),
        (LlamaConfig(**SHAPE, hidden_act="gelu"), "hidden_act is 'gelu', which midskip does not have; expected 'silu'"),
        (LlamaConfig(**SHAPE, quantization_config={"quant_method": "gptq"}), "quantization_config is .*'gptq'"),
        (
            LlamaConfig(**SHAPE, rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
            "a part of each head only",
        ),
        (
            LlamaConfig(
                **SHAPE,
                rope_parameters={
                    "rope_type": "longrope", "factor": 2.0, "short_factor": [1.0, 1.0], "long_factor": [2.0, 2.0],
                    "original_max_position_embeddings": 32,
                },
            ),
            "rope_type is 'longrope'; supported are default, linear, llama3, yarn and dynamic",
        ),
        (MistralConfig(**SHAPE, sliding_window=48), "window of 48 tokens.*pass max_position_embeddings=48, up to"),
        (Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=48, max_window_layers=2), "window of 48 tokens"),
        (Qwen3Config(**SHAPE, use_sliding_window=True, sliding_window=48, max_window_layers=2), "window of 48 tokens"),
        (SmolLM3Config(**SHAPE, use_sliding_window=True, sliding_window=48, no_rope_layers=[1, 0, 1]), "window of 48"),
    ],
)  # fmt: skip
def test_what_midskip_does_not_compute_is_refused(config: Any, message: str, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    build(CONFIGS["qwen2_tied"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"'{tmp_path}' has no tokenizer: put one beside the model"):
        save_tokenizer(tmp_path, tmp_path / "out")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=rf"'{tmp_path}' has a tokenizer that cannot be read: .") as error:
        save_tokenizer(tmp_path, tmp_path / "out")
    assert "\n" not in str(error.value)


def test_dynamic_rope_is_refused_beyond_the_models_own_context(tmp_path: Path) -> None:
    build(CONFIGS["qwen2_tied"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'dynamic' changes the rotary embedding beyond .*, 64, .*leave"):
        pretrained(tmp_path, max_position_embeddings=65)


def test_folders_without_safetensors_are_refused(smollm2: Path) -> None:
    (smollm2 / "model.safetensors").rename(smollm2 / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"has neither model.safetensors .*\.bin files are pickles.*save_pretrained"):
        pretrained(smollm2)
    (smollm2 / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read .*is it whole\? Fetch it again"):
        pretrained(smollm2)
    (smollm2 / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(ValueError, match=r"lacks model-1.safetensors, which its model.safetensors.index.json names"):
        pretrained(smollm2)
    (smollm2 / "config.json").rename(smollm2 / "some.gguf")
    with pytest.raises(ValueError, match=r"has no config.json; .*as gguf_file: some.gguf"):
        pretrained(smollm2)
    with pytest.raises(ValueError, match=r"has no file 'other\.gguf'"):
        pretrained(smollm2, gguf_file="other.gguf")


@pytest.mark.parametrize(
    "name, content",
    [
        ("config.json", "{"),
        ("config.json", '{"model_type": "llama", "hidden_size": "32"}'),
        ("config.json", '{"model_type": "llama", "num_attention_heads": 0}'),
        ("model.safetensors.index.json", "{}"),
        ("generation_config.json", "{"),
    ],
)
def test_a_damaged_file_is_named(smollm2: Path, name: str, content: str) -> None:
    (smollm2 / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name} cannot be read .*is it whole\? Fetch it again") as error:
        pretrained(smollm2)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_hidden_layers": 4}, r"9 missing in the files, among them model.layers.3.input_layernorm.weight"),
        ({"num_hidden_layers": 2}, r"9 in the files that have no place in the model, among them model.layers.2.input"),
        ({"vocab_size": 32}, r"model.embed_tokens.weight has the shape \[31, 16\], expected \[32, 16\]"),
        ({"tie_word_embeddings": False}, "1 missing in the files, among them lm_head.weight"),
    ],
)
def test_weights_that_do_not_fit_are_refused(smollm2: Path, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"the weights do not fit the configuration: {message}"):
        pretrained(smollm2, **change)


def test_a_name_that_the_hub_does_not_give_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"nobody/no-such-model is no folder.*not be fetched.*Check the name") as error:
        pretrained("nobody/no-such-model")
    assert "\n" not in str(error.value)
    for name in ("./nobody", "a/b/c", __file__):
        with pytest.raises(ValueError, match=r"is no folder here; expected one, a \.gguf file, or a name on the hub"):
            pretrained(name)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"policy": "middle_out"}, "policy is 'middle_out', under which .*expected the policy 'dense'"),
        ({"norms": "sandwich"}, "norms are 'sandwich', which no Llama has; expected 'pre'"),
        ({"qk_norm": True, "no_rope_layers": [1, 1, 1, 0]}, "no model of transformers has all of qk_norm=True"),
        ({"intermediate_size": [24, 24, 24, 32]}, r"intermediate_size is \[24, 24, 24, 32\]; expected one number"),
        ({"attention_out_bias": True}, "attention_bias=False, attention_out_bias=True"),
    ],
)
def test_what_transformers_has_not_is_not_written_back(
    tiny: Callable[..., MidskipConfig], changes: dict, message: str
) -> None:
    model = MidskipForCausalLM(tiny(**({"policy": "dense", "norms": "pre"} | changes)))
    with pytest.raises(ValueError, match=message):
        to_transformers(model)
