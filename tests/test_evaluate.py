"""Evaluation, depth by token, generation, and reading a run: each against a computation by hand."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from midskip import MidskipForCausalLM
from midskip.data import TokenWindows, encode_documents, token_bytes, train_tokenizer
from midskip.evaluate import depth_of_tokens, evaluate
from midskip.generate import generate
from midskip.runs import load_run

LENGTH = 13  # of the windows; the text leaves a last one of 5 tokens
DOCUMENTS = [f"Naïve café {i}: the cat sat on mat {i % 5}, 日本語, and saw it.\n" for i in range(8)]
MakeModel = Callable[..., MidskipForCausalLM]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(DOCUMENTS, 290)


@pytest.fixture(scope="module")
def windows(tokenizer: PreTrainedTokenizerFast) -> TokenWindows:
    ids = encode_documents(tokenizer, DOCUMENTS, progress=False)
    ids = ids[: len(ids) // LENGTH * LENGTH - LENGTH + 5]
    return TokenWindows(ids, LENGTH, drop_last=False)


@pytest.fixture
def model(make_model: MakeModel, tokenizer: PreTrainedTokenizerFast) -> MidskipForCausalLM:
    """A tiny model, float32 and in evaluation mode, whose gates are 0, 1 and between."""
    return make_model("mixed", torch.float32, vocab_size=len(tokenizer)).eval()


def tokens_of(windows: TokenWindows) -> list[Tensor]:
    """The valid tokens of each window."""
    return [window["input_ids"][window["attention_mask"].bool()] for window in windows]  # pyright: ignore[reportGeneralTypeIssues]


def all_of(windows: TokenWindows) -> list[dict[str, Tensor]]:
    return [windows[i] for i in range(len(windows))]


@torch.no_grad()
def gates_of(model: MidskipForCausalLM, windows: TokenWindows) -> list[Tensor]:
    """[L, n] of each window, run alone and without its padding."""
    return [model(ids[None]).gates[:, 0] for ids in tokens_of(windows)]


# Evaluation


@torch.no_grad()
def test_loss_and_bits_per_byte_are_those_of_all_tokens(
    model: MidskipForCausalLM, tokenizer: PreTrainedTokenizerFast, windows: TokenWindows
) -> None:
    sequences = tokens_of(windows)
    assert [len(ids) for ids in sequences[-2:]] == [LENGTH, 5], "the last window is padded"
    nats, targets, num_bytes = 0.0, 0, 0
    for ids in sequences:
        logits = model(ids[None]).logits[0, :-1].double()
        nats += F.cross_entropy(logits, ids[1:], reduction="sum").item()
        targets += len(ids) - 1
        for token in tokenizer.convert_ids_to_tokens(ids[1:].tolist()):
            num_bytes += 0 if token == tokenizer.eos_token else len(token)  # a character stands for a byte
    for batch_size in (1, 2, 3, 100):
        result = evaluate(model, windows, token_bytes(tokenizer), batch_size)
        assert result["loss"] == pytest.approx(nats / targets, rel=1e-6)
        assert result["perplexity"] == pytest.approx(math.exp(nats / targets), rel=1e-5)
        assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-6)
        assert result["num_tokens"] == sum(map(len, sequences)) == len(windows.token_ids)
    assert "bits_per_byte" not in evaluate(model, windows)


def test_shares_and_depths_are_those_of_the_gates(model: MidskipForCausalLM, windows: TokenWindows) -> None:
    present_LN = torch.cat(gates_of(model, windows), 1) > 0
    blocks_N = present_LN.sum(0)
    histogram = [(blocks_N == blocks).float().mean().item() for blocks in range(5)]
    assert 0.1 < present_LN.float().mean() < 0.9 and sum(share > 0 for share in histogram) >= 3
    for batch_size in (1, 4):
        result = evaluate(model, windows, batch_size=batch_size)
        assert result["share_by_layer"] == pytest.approx(present_LN.float().mean(1).tolist())
        assert result["tokens_by_blocks"] == pytest.approx(histogram)
        assert result["executed_share"] == pytest.approx(present_LN.float().mean().item())


@pytest.mark.parametrize("policy", ["middle_out", "dense"])
def test_flops_are_those_of_what_ran(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, windows: TokenWindows, policy: str
) -> None:
    model = make_model("mixed", torch.float32, vocab_size=len(tokenizer), policy=policy)
    width, inner, heads, key_heads, head_width, vocabulary = 16, 24, 4, 2, 4, len(tokenizer)
    gated = policy == "middle_out"

    def block(num_tokens: int, gated: bool) -> int:
        pairs = num_tokens * (num_tokens + 1) // 2
        projections = 4 * width * head_width * num_tokens * (heads + key_heads)
        return projections + 4 * pairs * heads * (head_width + gated) + 6 * num_tokens * width * inner

    ran = dense = total = 0
    for gates_LT in gates_of(model, windows):
        num_tokens = gates_LT.shape[1]
        head = 2 * num_tokens * width * vocabulary
        present_L = (gates_LT > 0).sum(1).tolist()
        ran += head + sum(block(count, gated) for count in present_L)
        ran += 2 * (num_tokens + present_L[0]) * width * gated  # scores, of the tokens that have not left
        dense += head + 4 * block(num_tokens, False)
        total += num_tokens
    result = evaluate(model, windows, batch_size=3)
    assert result["flops_per_token"] == pytest.approx(ran / total, rel=1e-12)
    assert result["dense_flops_per_token"] == pytest.approx(dense / total, rel=1e-12)
    assert ran < 0.9 * dense if gated else ran == dense


@pytest.mark.parametrize("training", [False, True])
def test_evaluation_leaves_the_model_as_it_was(
    model: MidskipForCausalLM, windows: TokenWindows, training: bool
) -> None:
    model.train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes: list[bool] = []
    hook = model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    evaluate(model, windows)
    hook.remove()
    assert set(modes) == {False}
    assert all(module.training is training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_hopeless_model_has_a_finite_perplexity(make_model: MakeModel, tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model(None, torch.float32, vocab_size=len(tokenizer))
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    result = evaluate(model, TokenWindows(np.arange(20), LENGTH, drop_last=False))
    assert result["loss"] > 700 and math.isfinite(result["perplexity"])
    json.dumps(result, allow_nan=False)


# Depth by token


@torch.no_grad()
def test_depth_of_tokens_is_that_of_the_gates(
    model: MidskipForCausalLM, tokenizer: PreTrainedTokenizerFast, windows: TokenWindows
) -> None:
    ids = windows[1]["input_ids"]
    output = model(ids[None], labels=ids[None])
    tokens = depth_of_tokens(model, tokenizer, ids.tolist())
    assert [token.text for token in tokens] == [tokenizer.decode([int(i)]) for i in ids]
    assert [token.blocks for token in tokens] == (output.gates[:, 0] > 0).sum(0).tolist()
    assert len({token.blocks for token in tokens}) >= 2
    torch.testing.assert_close(torch.tensor([token.gates for token in tokens]).T, output.gates[:, 0])
    assert tokens[0].loss_nats is None
    losses = [token.loss_nats for token in tokens[1:]]
    expected = F.cross_entropy(output.logits[0, :-1], ids[1:], reduction="none")
    assert losses == pytest.approx(expected.tolist(), rel=1e-5)
    assert depth_of_tokens(model, tokenizer, [3])[0].loss_nats is None


# Generation


@torch.no_grad()
def test_without_temperature_each_token_is_the_most_likely(
    model: MidskipForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = tokenizer("the cat")["input_ids"]
    prompt_length = len(ids)
    for _ in range(8):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert tokenizer.eos_token_id not in ids
    for seed in (0, 1):
        assert generate(model, tokenizer, "the cat", 8, temperature=0, seed=seed) == ids
    assert generate(model, tokenizer, "the cat", 8, temperature=1.0, top_k=1, seed=5) == ids
    assert len(set(ids[prompt_length:])) > 1


def test_the_seed_decides_the_draw(model: MidskipForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    def draw(seed: int, **settings: Any) -> list[int]:
        torch.rand(5)  # the caller's generator is no part of it
        return generate(model, tokenizer, "the cat", 12, seed=seed, **settings)

    assert draw(3) == draw(3)
    assert len({tuple(draw(seed)) for seed in range(4)}) == 4
    assert draw(3, temperature=0.001, top_k=0) == generate(model, tokenizer, "the cat", 12, temperature=0)
    prompt = tokenizer("the cat")["input_ids"]
    assert draw(3)[: len(prompt)] == prompt and len(draw(3)) <= len(prompt) + 12


@torch.no_grad()
def test_a_text_may_end_before_its_limit(model: MidskipForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight[:1].expand(len(tokenizer), -1))
    state_D = model.model(torch.tensor([[5, 6, 7]])).last_hidden_state[0, 0]  # the same whatever the tokens
    model.lm_head.weight.zero_()[tokenizer.eos_token_id] = state_D
    ids = generate(model, tokenizer, "the cat", 8, temperature=0)
    assert ids == [*tokenizer("the cat")["input_ids"], tokenizer.eos_token_id]


def test_a_prompt_of_the_greatest_length_is_taken(
    model: MidskipForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompt = "z" * 63  # as many tokens, and the model takes 64
    assert len(tokenizer(prompt)["input_ids"]) == 63
    assert len(generate(model, tokenizer, prompt, 1)) == 64
    message = r"the prompt has 63 tokens and 2 more .* at most 64 together: shorten the prompt or ask for at most 1"
    with pytest.raises(ValueError, match=message):
        generate(model, tokenizer, prompt, 2)
    with pytest.raises(ValueError, match=r"the prompt has 70 tokens .* ask for at most 0"):
        generate(model, tokenizer, "z" * 70, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": ""}, "the prompt is empty; give at least one character"),
        ({"prompt": "a\udcff"}, "the prompt is not Unicode text"),
        ({"max_new_tokens": 0}, r"max_new_tokens is 0 .*expected at least 1"),
        ({"top_k": -1}, r"top_k -1; expected at least 1 and 0"),
        ({"temperature": -0.5}, r"temperature is -0\.5; expected 0, or a number from 0\.001 up"),
        ({"temperature": 1e-40}, "temperature is 1e-40; expected"),
        ({"temperature": math.nan}, "temperature is nan; expected"),
        ({"temperature": math.inf}, "temperature is inf; expected"),
        ({"seed": -1}, r"seed is -1; expected a number from 0"),
        ({"seed": 2**63}, r"seed is 9223372036854775808; expected"),
    ],
)
def test_what_cannot_be_generated_is_refused(
    model: MidskipForCausalLM, tokenizer: PreTrainedTokenizerFast, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model, tokenizer, **({"prompt": "the cat"} | settings))


# A run folder


@pytest.fixture
def folder(model: MidskipForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "run")
    tokenizer.save_pretrained(tmp_path / "run")
    return tmp_path / "run"


def test_a_run_is_read_as_it_was_written(
    folder: Path, model: MidskipForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    read, its_tokenizer = load_run(folder)
    assert not read.training
    ids = tokenizer(DOCUMENTS[0])["input_ids"][:20]
    assert its_tokenizer(DOCUMENTS[0])["input_ids"][:20] == ids
    assert torch.equal(read.cpu()(torch.tensor([ids])).logits, model(torch.tensor([ids])).logits)


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, r"there is no folder '.*run'; expected a run folder, as `midskip train` writes it"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"lacks model\.safetensors\): give a run folder"),
        (lambda folder: cut(folder / "model.safetensors"), "run' cannot be read: "),
        (lambda folder: cut(folder / "config.json"), "run' cannot be read: "),
        (lambda folder: cut(folder / "tokenizer.json"), "run' cannot be read: "),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "run' cannot be read: "),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'),
            "its model is of the type 'llama'; expected 'midskip'",
        ),
        (
            lambda folder: change_weights(folder, lambda weights: weights.pop("lm_head.weight")),
            r"model\.safetensors lacks lm_head\.weight of the shape",
        ),
        (
            lambda folder: change_weights(folder, lambda weights: weights.update({"model.norm.weight": torch.ones(3)})),
            r"model\.safetensors lacks model\.norm\.weight of the shape",
        ),
    ],
)
def test_a_run_that_is_not_whole_is_refused(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=message):
        load_run(folder)


def test_a_run_that_is_not_finished_says_how_to_go_on(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    for make in ((folder / "checkpoint-2").mkdir, (folder / "recipe.yaml").touch):
        make()
        with pytest.raises(ValueError, match=r"holds no finished run .*: go on with `midskip train \.\.\. --resume`"):
            load_run(folder)
        shutil.rmtree(folder / "checkpoint-2", ignore_errors=True)


def test_a_tokenizer_of_another_model_is_refused(folder: Path) -> None:
    train_tokenizer([*DOCUMENTS, "entirely other words in there"], 300).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"has 300 tokens and its model 290: they do not belong together"):
        load_run(folder)
