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
from midskip.cli import main
from midskip.cost import dense_flops
from midskip.data import TokenWindows, encode_documents, token_bytes, train_tokenizer
from midskip.evaluate import depth_of_tokens, evaluate
from midskip.generate import blocks_counted, generate
from midskip.runs import load_run

LENGTH = 13  # of the windows; the text leaves a last one of 5 tokens
DOCUMENTS = [f"Naïve café {i}: the cat sat on mat {i % 5}, 日本語, and saw it.\n" for i in range(8)]
MakeModel = Callable[..., MidskipForCausalLM]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(DOCUMENTS, 290)


@pytest.fixture(scope="module")
def windows(tokenizer: PreTrainedTokenizerFast) -> TokenWindows:
    ids = encode_documents(tokenizer, DOCUMENTS)
    stride = LENGTH - 1  # each window starts with the last token of the one before
    ids = ids[: (len(ids) - 5) // stride * stride + 5]
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
        assert result["num_tokens"] == sum(map(len, sequences))
        assert result["num_targets"] == targets == len(windows.shards[0]) - 1, "each token once, but the first"
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


def documents(seed: int = 0) -> list[dict[str, Tensor]]:
    """Five windows [11] of several documents each, with pads, holes, gaps in positions, and targets left out."""
    draw = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(290, (5, 11), generator=draw)
    position_BT = torch.tensor(
        [
            [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10],
            [0, 1, 0, 1, 2, 3, 0, 0, 1, 2, 3],
            [-1, -1, 0, 1, 2, 0, 1, 2, 3, -1, -1],
            [0, 4, 5, 9, 14, 0, 1, 2, 3, 4, 5],
            [0, 1, -1, 2, 3, 0, 1, 2, -1, -1, 99],
        ]
    )
    mask_BT = ((position_BT >= 0) & (position_BT < 99)).long()
    labels_BT = torch.where(torch.rand(5, 11, generator=draw) < 0.2, -100, ids_BT)  # some at pads are not -100
    names = "input_ids", "attention_mask", "position_ids", "labels"
    return [dict(zip(names, rows, strict=True)) for rows in zip(ids_BT, mask_BT, position_BT, labels_BT, strict=True)]


@torch.no_grad()
@pytest.mark.parametrize("given", ["positions", "mask", "ids"])
def test_loss_by_position_and_by_blocks(model: MidskipForCausalLM, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model.double()
    items = documents()
    for item in items:
        if given != "positions":
            del item["position_ids"]
        if given == "ids":
            del item["attention_mask"]
    by_position: list[list[float]] = [[] for _ in range(15)]
    by_blocks: list[list[float]] = [[] for _ in range(5)]
    for item in items:
        output = model(**{name: x[None] for name, x in item.items() if name != "labels"})
        valid_T = item.get("attention_mask", torch.ones(11)).bool()
        position_T = item.get("position_ids", valid_T.cumsum(0) - 1)
        for t in range(10):
            if valid_T[t] and valid_T[t + 1] and item["labels"][t + 1] != -100:
                nats = F.cross_entropy(output.logits[0, t], item["labels"][t + 1]).item()
                by_position[int(position_T[t])].append(nats)
                by_blocks[int((output.gates[:, 0, t] > 0).sum())].append(nats)
    if given != "positions":  # as many as there are columns, or as far as positions reach
        assert by_position[11:] == [[]] * 4
        del by_position[11:]
    assert sum(map(bool, by_blocks)) >= 3 and [] in by_blocks, "the gates of this model are symmetric"
    num_targets = sum(map(len, by_blocks))
    for chunk in (2**24, 3 * 290, 1):
        monkeypatch.setattr("midskip.model.loss.CHUNK_LOGITS", chunk)
        result = evaluate(model, items, batch_size=2)
        for name, values in (("position", by_position), ("blocks", by_blocks)):
            for loss, found in zip(result[f"loss_by_{name}"], values, strict=True):
                assert loss == (pytest.approx(sum(found) / len(found), rel=1e-12) if found else None)
            assert result[f"num_targets_by_{name}"] == [len(v) for v in values]
        assert result["num_targets"] == num_targets
        assert result["loss"] == pytest.approx(sum(map(sum, by_blocks)) / num_targets, rel=1e-12)
    assert json.loads(json.dumps(result, allow_nan=False)) == result


@torch.no_grad()
def test_the_loss_is_the_models_own(model: MidskipForCausalLM) -> None:
    items = documents()
    batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    assert evaluate(model, items, batch_size=5)["loss"] == pytest.approx(model(**batch).loss.item(), rel=1e-6)


def test_documents_count_as_they_are_attended(model: MidskipForCausalLM) -> None:
    result = evaluate(model, documents(), batch_size=2)
    lengths = [11, 2, 4, 1, 4, 3, 4, 5, 6, 4, 3]
    assert result["num_tokens"] == sum(lengths)
    expected = dense_flops(model.config, lengths).total / sum(lengths)
    assert result["dense_flops_per_token"] == pytest.approx(expected, rel=1e-12)
    assert 0 < result["flops_per_token"] < expected


def test_nothing_to_evaluate_on_is_refused(model: MidskipForCausalLM) -> None:
    with pytest.raises(ValueError, match="there is no window to evaluate on: give more text"):
        evaluate(model, [])
    ids_T = torch.arange(5)
    for item in ({"labels": ids_T * 0 - 100}, {"labels": ids_T, "attention_mask": torch.tensor([0, 1, 0, 1, 0])}):
        with pytest.raises(ValueError, match="hold no token to predict, only pads or labels of -100"):
            evaluate(model, [{"input_ids": ids_T, **item}])
    assert not model.training
    with pytest.raises(ValueError, match="vocabulary"):
        evaluate(model.train(), [{"input_ids": ids_T + 290, "labels": ids_T}])
    assert model.training and not any(module._forward_hooks for module in model.modules())


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
    apart = depth_of_tokens(model, tokenizer, [*ids.tolist(), *ids.tolist()], [*range(len(ids))] * 2)
    for again, once in zip(apart[len(ids) :], tokens, strict=True):
        assert again.gates == pytest.approx(once.gates, rel=1e-5)


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


@torch.no_grad()
def test_a_token_with_the_pads_id_is_no_pad(model: MidskipForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """As in models without a pad of their own, where 0 or any token may stand for it."""
    ids = tokenizer("the cat")["input_ids"]
    model.config.pad_token_id, model.generation_config.eos_token_id = ids[-1], None
    expected = list(ids)
    for _ in range(3):
        expected.append(int(model(torch.tensor([expected])).logits[0, -1].argmax()))
    assert generate(model, tokenizer, "the cat", 3, temperature=0) == expected


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


@pytest.mark.parametrize("use_cache", [True, False])
def test_blocks_are_counted_as_the_text_is_made(
    model: MidskipForCausalLM, tokenizer: PreTrainedTokenizerFast, use_cache: bool
) -> None:
    ids_1T = torch.tensor([tokenizer("the cat")["input_ids"]])
    with blocks_counted(model) as blocks:
        whole = model.generate(ids_1T, max_new_tokens=8, do_sample=False, pad_token_id=0, use_cache=use_cache)  # pyright: ignore[reportAttributeAccessIssue]
    expected = [token.blocks for token in depth_of_tokens(model, tokenizer, whole[0].tolist())]
    assert blocks == expected[:-1] and len(set(blocks)) > 1
    with pytest.raises(ValueError, match="blocks are counted of one sequence, and a pass has 2"), blocks_counted(model):
        model(ids_1T.expand(2, -1))


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


def test_the_command_takes_any_text(
    folder: Path, model: MidskipForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("<|endoftext|>\n".join(DOCUMENTS), encoding="utf-8")
    options = ["--data", str(tmp_path / "text.txt"), "--output", str(tmp_path / "numbers.json")]
    assert main(["evaluate", str(folder), *options]) == 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "numbers.json").read_text()
    assert len(printed.splitlines()) < 20, "a list is one line"
    read, tokenizer = load_run(folder)
    ids = encode_documents(tokenizer, DOCUMENTS)
    apart = TokenWindows(ids, 64, drop_last=False, end_of_text=tokenizer.eos_token_id)
    expected = evaluate(read, apart, token_bytes(tokenizer))
    assert json.loads(printed) == expected
    longest = max(np.diff(np.append(np.flatnonzero(ids == tokenizer.eos_token_id), len(ids))))
    reached = [position for position, count in enumerate(expected["num_targets_by_position"]) if count]
    assert max(reached) < longest < 64, "documents are kept apart"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "the path does not exist"),
        (b"", "holds no text"),
        (b"d\xe9j\xe0 vu", "is not UTF-8 text: byte 0xe9 at offset 1"),
    ],
)
def test_text_that_cannot_be_evaluated_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: bytes | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "some.txt").write_bytes(text)
    assert main(["evaluate", str(folder), "--data", str(tmp_path / "some.txt")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("midskip: error: ") and message in err and "some.txt" in err
    assert main(["evaluate", str(folder)]) == 2
    assert "has no recipe.yaml that names its held-out text: give text by --data" in capsys.readouterr().err


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
