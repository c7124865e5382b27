"""Pretrained models of the Llama family: the same function here, saved and loaded, and written back."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pretrained import CONFIGS, LLAMA3, SHAPE, YARN, build, near, write_gguf
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from midskip import MidskipConfig, MidskipForCausalLM
from midskip.convert import load, pretrained, save_tokenizer, to_transformers
from midskip.convert.configs import midskip_settings
from midskip.model.layers import RotaryEmbedding


@pytest.fixture(scope="module", params=CONFIGS)
def original(request: pytest.FixtureRequest) -> Any:
    return build(CONFIGS[request.param])


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
def test_paths_of_layers_that_nobody_skips_are_left_out(make_model: Callable[..., MidskipForCausalLM]) -> None:
    model = make_model(policy="dense", norms="pre", skip_path="linear").eval()
    ids_BT = torch.randint(31, (2, 9))
    near(to_transformers(model)(ids_BT).logits, model(ids_BT).logits)


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


# ---- settings


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
    half = pretrained(tmp_path / "half")
    assert half.config.dtype == to_transformers(half).config.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="dtype is 'int8'; expected a floating-point type"):
        pretrained(smollm2, dtype="int8")


def test_frequencies_that_old_files_hold_are_left_out(smollm2: Path) -> None:
    file = smollm2 / "model.safetensors"
    weights = load_file(file)
    save_file(weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}, file)
    assert torch.equal(pretrained(smollm2).lm_head.weight, weights["model.embed_tokens.weight"])


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


LONG: dict[str, Any] = {"rope_type": "yarn", "rope_theta": 1e5, "factor": 8.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 5e5},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
        {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.5},
        LLAMA3 | {"original_max_position_embeddings": 512},
        LONG,
        LONG | {"truncate": False},
        LONG | {"beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.25},
        LONG | {"mscale": 0.7, "mscale_all_dim": 0.3},
        LONG | {"mscale": 0, "mscale_all_dim": 1.0, "beta_fast": None, "attention_factor": None},
        LONG | {"factor": None},
        LONG | {"factor": 1.0},
        LONG | {"factor": 0.5},
        LONG | {"original_max_position_embeddings": 4},  # no wave turns that often
    ],
)
def test_rotary_frequencies_are_transformers(rope: dict) -> None:
    config = LlamaConfig(**SHAPE | {"head_dim": 64, "max_position_embeddings": 2048}, rope_parameters=rope)
    expected = LlamaRotaryEmbedding(config)
    ours = RotaryEmbedding(64, MidskipConfig(**midskip_settings(config)).rope_parameters)
    torch.testing.assert_close(ours.inv_freq, expected.inv_freq, rtol=1e-5, atol=0)
    assert ours.attention_factor == pytest.approx(expected.attention_scaling)


@pytest.mark.parametrize(
    "written, expected",
    [
        (  # as SmolLM2's
            {
                "model_type": "llama", "is_llama_config": True, "rope_interleaved": False, "rope_scaling": None,
                "rope_theta": 1e5, "torch_dtype": "bfloat16", "pretraining_tp": 1,
            },
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}, "head_dim": 4, "qk_norm": False},
        ),
        (  # as Qwen2.5's where its context is stretched
            {
                "model_type": "qwen2", "rope_theta": 1e6, "use_sliding_window": False, "sliding_window": 32,
                "max_window_layers": 3, "rope_scaling": {name: YARN[name] for name in YARN if name != "rope_theta"},
            },
            {"rope_parameters": YARN | {"rope_theta": 1e6}, "attention_bias": True, "attention_out_bias": False},
        ),
        (
            {
                "model_type": "qwen2", "rope_theta": 1e6,
                "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
            },
            {"rope_parameters": YARN | {"rope_theta": 1e6}},
        ),
        (  # as SmolLM3's
            {
                "model_type": "smollm3", "rope_theta": 5e6, "rope_scaling": None, "use_sliding_window": False,
                "sliding_window": None, "layer_types": ["full_attention"] * 3, "no_rope_layers": [1, 1, 0, 1],
            },
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}, "no_rope_layers": [1, 1, 0]},
        ),
    ],
)  # fmt: skip
def test_configurations_of_older_files_are_read(written: dict, expected: dict, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | written))
    settings = midskip_settings(AutoConfig.from_pretrained(tmp_path))
    assert {name: settings[name] for name in expected} == expected
    assert MidskipConfig(**settings).rope_parameters == expected["rope_parameters"]


def test_a_head_of_its_own_in_the_files_counts(tmp_path: Path, ids_BT: Tensor) -> None:
    original = build(CONFIGS["llama"])
    original.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    near(pretrained(tmp_path)(ids_BT).logits, original(ids_BT).logits)


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


# ---- GGUF, and real weights


@torch.no_grad()
def test_gguf_is_read_as_transformers_reads_it(tmp_path: Path, ids_BT: Tensor) -> None:
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    original = build(LlamaConfig(**SHAPE))
    file = tmp_path / "tiny.gguf"
    write_gguf(gguf, file, original)
    ours = pretrained(file)
    near(ours(ids_BT).logits, original(ids_BT).logits)
    assert ours.num_parameters() == original.num_parameters()
    assert pretrained(tmp_path, gguf_file="tiny.gguf", dtype="bfloat16").dtype == torch.bfloat16
    write_gguf(gguf, file, original, scaling="none")
    near(pretrained(file)(ids_BT).logits, original(ids_BT).logits)
    for scaling in ("yarn", "frequencies"):
        write_gguf(gguf, file, original, scaling)
        with pytest.raises(
            ValueError, match=r"tiny\.gguf scales its rotary embedding, which transformers does not read"
        ):
            pretrained(file)
    assert pretrained(file, rope_parameters=LLAMA3).config.rope_parameters == LLAMA3


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
