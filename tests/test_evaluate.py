"""Evaluation, and depth by token: each against a computation by hand."""

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sample_text import DOCUMENTS
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from midskip import MidskipForCausalLM
from midskip.cost import dense_flops
from midskip.data import TokenWindows, encode_documents, token_bytes, token_texts
from midskip.evaluate import depth_of_tokens, evaluate, passages

LENGTH = 13  # of the windows; the text leaves a last one of 5 tokens
MakeModel = Callable[..., MidskipForCausalLM]


@pytest.fixture(scope="module")
def windows(tokenizer: PreTrainedTokenizerFast) -> TokenWindows:
    ids = encode_documents(tokenizer, DOCUMENTS)
    stride = LENGTH - 1  # each window starts with the last token of the one before
    ids = ids[: (len(ids) - 5) // stride * stride + 5]
    return TokenWindows(ids, LENGTH, drop_last=False)


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


@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
def test_bytes_of_keys_and_values_are_those_of_a_cache(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, windows: TokenWindows, skipped_kv: str
) -> None:
    model = make_model("mixed", torch.float32, vocab_size=len(tokenizer), skipped_kv=skipped_kv)
    present = sum(int((gates_LT > 0).sum()) for gates_LT in gates_of(model, windows))
    result = evaluate(model, windows, batch_size=3)
    entries = 4.0 if skipped_kv == "keep" else present / result["num_tokens"]
    assert 0 < present < 4 * result["num_tokens"]
    assert result["kv_bytes_per_token"] == pytest.approx(entries * 2 * 2 * 4 * 4, rel=1e-12)
    model.set_budget(max_layers=2)  # two layers that nobody runs: with keys kept a cache holds those of all there
    result = evaluate(model, windows, batch_size=3)
    ids_BT = windows[0]["input_ids"][None]
    with torch.no_grad():
        cache = model(ids_BT, use_cache=True).past_key_values
    held = sum(layer.num_tokens for layer in cache.layers) / ids_BT.numel()
    assert result["share_by_layer"][1:3] == [0, 0]
    if skipped_kv == "keep":
        assert held == 4 and result["kv_bytes_per_token"] == pytest.approx(held * 2 * 2 * 4 * 4, rel=1e-12)


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


def test_passages_are_of_windows_that_have_tokens(
    model: MidskipForCausalLM, tokenizer: PreTrainedTokenizerFast, windows: TokenWindows
) -> None:
    whole = all_of(windows)[:2]
    pads = whole[0] | {"attention_mask": torch.zeros_like(whole[0]["attention_mask"])}
    assert passages(model, tokenizer, [pads, pads, *whole], 2) == passages(model, tokenizer, [whole[0]])
    assert len(passages(model, tokenizer, [pads, *whole, pads])) == 2


@torch.no_grad()
def test_depth_of_tokens_is_that_of_the_gates(
    model: MidskipForCausalLM, tokenizer: PreTrainedTokenizerFast, windows: TokenWindows
) -> None:
    ids = windows[1]["input_ids"]
    output = model(ids[None], labels=ids[None])
    tokens = depth_of_tokens(model, tokenizer, ids.tolist())
    assert [token.text for token in tokens] == [token.text for token in token_texts(tokenizer, ids.tolist())]
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
