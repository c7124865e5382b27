"""Pretrained models of the Llama family: the same function here, saved and loaded, and written back."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

import midskip
from midskip import MidskipConfig, MidskipForCausalLM
from midskip.convert import load, pretrained, save_tokenizer, to_transformers
from midskip.reference import reference_forward

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


@pytest.fixture(scope="module", params=CONFIGS)
def original(request: pytest.FixtureRequest) -> Any:
    return build(CONFIGS[request.param])


def near(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.fixture
def ids_BT() -> Tensor:
    return torch.randint(1, 31, (2, 40))


@torch.no_grad()
def test_the_same_logits_in_files_and_with_a_cache(original: Any, ids_BT: Tensor, tmp_path: Path) -> None:
    original.save_pretrained(tmp_path / "theirs", max_shard_size="8KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file()
    ours = pretrained(tmp_path / "theirs")
    assert type(ours) is MidskipForCausalLM and not ours.training and ours.dtype == torch.float32
    assert (ours.config.policy, ours.config.norms, ours.config.skipped_kv) == ("dense", "pre", "keep")
    assert ours.config.tie_word_embeddings == (ours.lm_head.weight is ours.model.embed_tokens.weight)
    assert ours.num_parameters() == original.num_parameters()
    expected = original(ids_BT).logits
    assert expected.std() > 0.5 and (expected[:, 1:] - original(ids_BT[:, 1:]).logits).abs().max() > 0.05
    near(ours(ids_BT).logits, expected)

    first = ours(ids_BT[:, :30], use_cache=True)
    steps = [first.logits]
    for column in range(30, 40):
        steps.append(ours(ids_BT[:, column : column + 1], past_key_values=first.past_key_values).logits)
    near(torch.cat(steps, 1), expected)

    ours.save_pretrained(tmp_path / "ours")
    assert torch.equal(MidskipForCausalLM.from_pretrained(tmp_path / "ours")(ids_BT).logits, ours(ids_BT).logits)

    back = to_transformers(ours)
    near(back(ids_BT).logits, expected)
    same_kind = original.config.model_type if original.config.model_type != "mistral" else "llama"
    assert back.config.model_type == same_kind and back.num_parameters() == original.num_parameters()
    back.save_pretrained(tmp_path / "back")
    near(AutoModelForCausalLM.from_pretrained(tmp_path / "back")(ids_BT).logits, expected)


@torch.no_grad()
def test_the_same_logits_and_tokens_of_a_padded_batch(original: Any, ids_BT: Tensor, tmp_path: Path) -> None:
    original.save_pretrained(tmp_path)
    ours = pretrained(tmp_path)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :7] = 0
    position_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    expected = original(ids_BT, attention_mask=mask_BT, position_ids=position_BT).logits
    got = ours(ids_BT, attention_mask=mask_BT).logits
    near(got[mask_BT.bool()], expected[mask_BT.bool()])
    arguments: dict[str, Any] = {"attention_mask": mask_BT, "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(ours.generate(ids_BT, **arguments), original.generate(ids_BT, **arguments))


# ---- the same blocks where tokens skip

BLOCKS: dict[str, dict[str, Any]] = {
    "bias": {"attention_bias": True, "attention_out_bias": True, "rope_parameters": LINEAR},
    "qk_norm": {"qk_norm": True, "attention_bias": True, "head_dim": 6},
    "no_rope": {"no_rope_layers": [1, 0, 1, 0], "rope_parameters": YARN},
}


@pytest.mark.parametrize("changes", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
def test_packed_loss_and_gradients_are_the_references(
    make_model: Callable[..., MidskipForCausalLM], changes: dict, skipped_kv: str
) -> None:
    model = make_model(norms="pre", skipped_kv=skipped_kv, **changes)
    disturb(model)
    ids_BT, mask_BT = torch.randint(31, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    mask_BT[0, :4] = 0
    results = []
    for forward in (model, lambda *arguments, **named: reference_forward(model, *arguments, **named)):
        model.zero_grad()
        output = forward(ids_BT, attention_mask=mask_BT, labels=ids_BT)
        output.loss.backward()
        results.append([output.loss, *(parameter.grad.clone() for parameter in model.parameters())])
        gates = output.gates[:, mask_BT.bool()]
        assert (gates == 0).any() and (gates > 0).any()
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    new = [grad for (name, _), grad in zip(model.named_parameters(), results[1][1:], strict=True) if is_new(name)]
    assert all(grad.abs().max() > 1e-6 for grad in new)


@pytest.mark.parametrize("changes", BLOCKS.values(), ids=BLOCKS)
@torch.no_grad()
def test_compiled_blocks_give_the_same(make_model: Callable[..., MidskipForCausalLM], changes: dict) -> None:
    model = make_model(norms="pre", **changes).eval()
    disturb(model)
    ids_BT = torch.randint(31, (2, 12))
    expected = model(ids_BT).logits
    midskip.model.layers.compile_blocks(model.model.layers, backend="eager")
    torch.testing.assert_close(model(ids_BT).logits, expected)
    torch._dynamo.reset()


def is_new(name: str) -> bool:
    """Whether a weight is one that Llama without biases does not have. A bias of keys alone changes no softmax."""
    return ("bias" in name and "policy" not in name and "k_proj" not in name) or "q_norm" in name or "k_norm" in name


@torch.no_grad()
def disturb(model: MidskipForCausalLM) -> None:
    """Biases and norms of heads start where they do nothing."""
    for name, parameter in model.named_parameters():
        if is_new(name) or "k_proj.bias" in name:
            parameter.add_(torch.randn_like(parameter) * 0.3)


@torch.no_grad()
def test_bytes_have_all_weights_and_flops_only_products(make_model: Callable[..., MidskipForCausalLM]) -> None:
    ids_BT = torch.randint(31, (1, 9))
    flops = []
    for changes in ({}, {"attention_bias": True, "attention_out_bias": True, "qk_norm": True}):
        model = make_model(norms="pre", policy="dense", skipped_kv="keep", **changes).eval()
        with midskip.meter(model) as work:
            model(ids_BT)
        table = model.model.embed_tokens.weight
        weights = sum(parameter.nbytes for parameter in model.parameters()) - table.nbytes + 9 * 16 * 8
        assert work.bytes.weights == weights
        flops.append(work.flops().total)
    assert flops[0] == flops[1]
    block = model.model.layers[0]
    keys = sum(parameter.nbytes for module in block.modules_of("keys") for parameter in module.parameters())
    attention = block.self_attn
    wanted = [block.input_layernorm, attention.k_proj, attention.v_proj, attention.k_norm]
    assert keys == sum(parameter.nbytes for module in wanted for parameter in module.parameters())


# ---- settings


@pytest.fixture
def smollm2(tmp_path: Path) -> Path:
    build(CONFIGS["smollm2"]).save_pretrained(tmp_path / "smollm2")
    return tmp_path / "smollm2"


def test_policy_and_other_settings_are_taken(smollm2: Path) -> None:
    model = pretrained(
        smollm2, policy="middle_out", policy_settings={"start": "open"}, skipped_kv="drop", skip_unit="sublayer",
        max_position_embeddings=48,
    )  # fmt: skip
    config = model.config
    assert (config.policy, config.policy_settings, config.skipped_kv) == ("middle_out", {"start": "open"}, "drop")
    assert (config.skip_unit, config.max_position_embeddings) == ("sublayer", 48)
    gates = model(torch.randint(31, (1, 8))).gates
    assert len(gates) == 6 and ((gates > 0.89) & (gates <= 1)).all()  # as that policy begins
    with pytest.raises(ValueError, match="does not know the setting 'hidden_siz'; did you mean 'hidden_size'"):
        pretrained(smollm2, hidden_siz=16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_dtype_is_what_was_asked_for_or_that_of_the_files(smollm2: Path, tmp_path: Path, dtype: Any) -> None:
    model = pretrained(smollm2, dtype=dtype, policy="middle_out")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary.inv_freq.dtype == torch.float32
    build(CONFIGS["llama"]).bfloat16().save_pretrained(tmp_path / "half")
    assert pretrained(tmp_path / "half").dtype == pretrained(tmp_path / "half", dtype="auto").dtype == torch.bfloat16
    with pytest.raises(ValueError, match="dtype is 'int8'; expected a floating-point type"):
        pretrained(smollm2, dtype="int8")


def test_weights_do_not_depend_on_the_files_afterwards(smollm2: Path) -> None:
    model = pretrained(smollm2)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    file = smollm2 / "model.safetensors"
    with file.open("r+b") as opened:
        start = 8 + int.from_bytes(opened.read(8), "little")  # of the numbers
        opened.seek(start)
        opened.write(bytes(file.stat().st_size - start))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert not any(x.any() for x in pretrained(smollm2).state_dict().values())


def test_generation_settings_are_kept(tmp_path: Path) -> None:
    original = build(CONFIGS["qwen3"])
    original.generation_config.update(do_sample=True, temperature=0.6, top_k=7, eos_token_id=[3, 4])
    original.save_pretrained(tmp_path / "theirs")
    ours = pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    for model in (ours, MidskipForCausalLM.from_pretrained(tmp_path / "ours"), to_transformers(ours)):
        settings = model.generation_config
        assert (settings.temperature, settings.top_k, settings.eos_token_id) == (0.6, 7, [3, 4])


def test_tokenizer_is_copied_with_its_chat_template(
    smollm2: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(smollm2)
    pretrained(smollm2).save_pretrained(tmp_path / "ours")
    save_tokenizer(smollm2, tmp_path / "ours")
    copied = AutoTokenizer.from_pretrained(tmp_path / "ours")
    chat = [{"role": "user", "content": "Which names?"}]
    assert copied.apply_chat_template(chat, tokenize=False) == "<user> Which names?"
    assert copied("The function returns")["input_ids"] == tokenizer("The function returns")["input_ids"]


def test_the_code_of_the_page_runs_as_printed(
    smollm2: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.save_pretrained(smollm2)
    monkeypatch.setattr(load, "snapshot_download", lambda name, **others: str(smollm2))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    page = (Path(__file__).parent.parent / "docs" / "retrofit.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        exec(compile(block, "retrofit.md", "exec"), names)
    assert type(names["plain"]) is LlamaForCausalLM and Path("smollm2", "tokenizer_config.json").is_file()
    assert (names["gated"](torch.ones(1, 3, dtype=torch.long)).gates == 1).all()


# ---- what is refused


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


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SHAPE, sliding_window=32),
        Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=32, max_window_layers=0),
    ],
)
def test_a_context_within_the_sliding_window_is_accepted(config: Any, ids_BT: Tensor, tmp_path: Path) -> None:
    original = build(config)
    original.save_pretrained(tmp_path)
    ours = pretrained(tmp_path, max_position_embeddings=32)
    near(ours(ids_BT[:, :32]).logits, original(ids_BT[:, :32]).logits)
    with pytest.raises(ValueError, match="32"):
        ours(ids_BT)


def test_windows_that_are_not_in_force_are_accepted(tmp_path: Path) -> None:
    shape = SHAPE | {"sliding_window": 16}
    for config in (Qwen2Config(**shape), Qwen3Config(**shape, use_sliding_window=True, max_window_layers=3)):
        build(config).save_pretrained(tmp_path)
        assert pretrained(tmp_path).config.max_position_embeddings == 64


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


def test_a_head_of_its_own_in_the_files_counts(tmp_path: Path, ids_BT: Tensor) -> None:
    original = build(CONFIGS["llama"])
    original.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    near(pretrained(tmp_path)(ids_BT).logits, original(ids_BT).logits)


def test_a_name_that_the_hub_does_not_give_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"nobody/no-such-model is no folder.*not be fetched.*Check the name") as error:
        pretrained("nobody/no-such-model")
    assert "\n" not in str(error.value)
    for name in ("./nobody", "a/b/c", __file__):
        with pytest.raises(ValueError, match=r"is no folder here; expected one, a \.gguf file, or a name on the hub"):
            pretrained(name)


def test_a_name_is_fetched_from_the_hub(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def fetch(name: str, **others: Any) -> str:
        asked.append((name, others["revision"], others["allow_patterns"]))
        return str(smollm2)

    monkeypatch.setattr(load, "snapshot_download", fetch)
    assert pretrained("someone/some-model", revision="v2").num_parameters() > 0
    ((name, revision, patterns),) = asked
    assert (name, revision) == ("someone/some-model", "v2")
    assert {"*.json", "model*.safetensors"} <= set(patterns) and not any(".bin" in pattern for pattern in patterns)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"policy": "middle_out"}, "policy is 'middle_out', under which .*expected the policy 'dense'"),
        ({"norms": "sandwich"}, "norms are 'sandwich', which no Llama has; expected 'pre'"),
        ({"qk_norm": True, "no_rope_layers": [1, 1, 1, 0]}, "no model of transformers has all of qk_norm=True"),
        ({"attention_out_bias": True}, "attention_bias=False, attention_out_bias=True"),
    ],
)
def test_what_transformers_has_not_is_not_written_back(
    tiny: Callable[..., MidskipConfig], changes: dict, message: str
) -> None:
    model = MidskipForCausalLM(tiny(**({"policy": "dense", "norms": "pre"} | changes)))
    with pytest.raises(ValueError, match=message):
        to_transformers(model)


# ---- GGUF, and real weights


@torch.no_grad()
def test_gguf_is_read_as_transformers_reads_it(tmp_path: Path, ids_BT: Tensor) -> None:
    gguf = pytest.importorskip("gguf")
    original = build(LlamaConfig(**SHAPE))
    file = tmp_path / "tiny.gguf"
    write_gguf(gguf, file, original)
    ours = pretrained(file)
    near(ours(ids_BT).logits, original(ids_BT).logits)
    assert ours.num_parameters() == original.num_parameters()
    assert pretrained(tmp_path, gguf_file="tiny.gguf", dtype="bfloat16").dtype == torch.bfloat16
    write_gguf(gguf, file, original, torch.ones(2))
    with pytest.raises(ValueError, match=r"tiny\.gguf scales its rotary embedding, which transformers does not read"):
        pretrained(file)
    assert pretrained(file, rope_parameters=LLAMA3).config.rope_parameters == LLAMA3


def write_gguf(gguf: Any, file: Path, model: LlamaForCausalLM, rope_freqs: Tensor | None = None) -> None:
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
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
@torch.no_grad()
def test_smollm2_gives_the_same_logits_and_text(tmp_path: Path) -> None:
    folder = os.environ.get("MIDSKIP_SMOLLM2")
    if not folder:
        pytest.skip("MIDSKIP_SMOLLM2 names no folder of SmolLM2's weights")
    ours, original = pretrained(folder, dtype="float32"), AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids_BT = tokenizer("Transformers whose tokens skip layers are", return_tensors="pt")["input_ids"]
    torch.testing.assert_close(ours(ids_BT).logits, original(ids_BT).logits, rtol=0, atol=1e-3)
    tokens = [model.generate(ids_BT, max_new_tokens=20, do_sample=False) for model in (ours, original)]
    assert torch.equal(*tokens)
