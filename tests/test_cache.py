"""The cache itself: what it holds, what can be done to it, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import midskip
from midskip import MidskipForCausalLM
from midskip.model.cache import SkipCache

Make = Callable[..., MidskipForCausalLM]
FIXED = "midskip.policies.controls:FixedDepths"


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def prompt(*shape: int) -> Tensor:
    return torch.randint(31, shape)


def held(cache: SkipCache) -> list[Any]:
    """All that a cache holds, as numbers to compare."""
    layers = [
        [buffer[row, :length].tolist() for buffer in layer.buffers]
        for layer in cache.layers
        for row, length in enumerate(layer.seqlens)
    ]
    lengths = [layer.seqlens for layer in cache.layers]
    counts = [cache.batch_size, cache.num_columns, cache.num_valid_tokens, cache.num_block_tokens]
    return [*counts, cache.seqlens, lengths, layers]


# ---- bytes, lengths, columns


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("fractional", [False, True])
@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
def test_it_holds_exactly_the_tokens_that_ran(
    make_model: Make, ragged: tuple[Tensor, Tensor], skipped_kv: str, fractional: bool, dtype: torch.dtype
) -> None:
    ids_BT, mask_BT = ragged
    settings = {"skip_share": 0.5, "fractional": fractional}
    model = make_model(skipped_kv=skipped_kv, policy=FIXED, policy_settings=settings, dtype=dtype).eval()
    cache = SkipCache(model.config)
    gates = [
        model(ids_BT[:, part], attention_mask=mask_BT[:, : part.stop], past_key_values=cache).gates
        for part in (slice(0, 4), slice(4, 5), slice(5, 9))
    ]
    ran_LBT = torch.cat(gates, 2) > 0
    held_LBT = ran_LBT if skipped_kv == "drop" else mask_BT.bool().expand_as(ran_LBT)
    for layer, held_BT in zip(cache.layers, held_LBT, strict=True):
        assert layer.seqlens == held_BT.sum(1).tolist()
        for b, columns_S in enumerate(layer.columns):
            assert columns_S[: layer.seqlens[b]].tolist() == held_BT[b].nonzero().squeeze(1).tolist()
    assert 0 < ran_LBT.sum() < mask_BT.sum() * 4
    size, gate_bytes = dtype.itemsize, max(4, dtype.itemsize) if fractional and skipped_kv == "drop" else 0
    token_bytes = 2 * 2 * 4 * size + 4 + gate_bytes  # key and value of 2 heads of width 4, column, gate
    assert cache.num_bytes().used == int(held_LBT.sum()) * token_bytes
    assert cache.num_bytes().used < cache.num_bytes().allocated
    assert (cache.num_valid_tokens, cache.num_block_tokens) == (int(mask_BT.sum()), int(ran_LBT.sum()))
    assert cache.executed_share == int(ran_LBT.sum()) / (4 * int(mask_BT.sum()))
    assert (cache.batch_size, cache.num_columns, cache.get_seq_length()) == (7, 9, 9)
    assert (len(cache), cache.get_mask_sizes(2), cache.get_max_length(), cache.is_initialized) == (4, (11, 0), -1, True)


def test_what_it_says_of_itself(make_model: Make) -> None:
    for skipped_kv, what in (("keep", "all tokens"), ("drop", "the tokens that ran")):
        cache = SkipCache(make_model("gone", skipped_kv=skipped_kv).config)
        assert repr(cache).startswith(f"SkipCache(of {what}: 0 sequences, 0 columns seen")
        model = make_model("gone", skipped_kv=skipped_kv).eval()
        text = repr(model(prompt(2, 3), use_cache=True).past_key_values)
        tokens = 6 if skipped_kv == "keep" else 0
        assert f"2 sequences, 3 columns seen, tokens held by layer [{tokens}, {tokens}" in text and "allocated" in text


# ---- what can be done to it; see test_cache_states.py too


def test_a_copy_goes_its_own_way(make_model: Make) -> None:
    model, ids_BT = make_model("mixed").eval(), prompt(2, 6)
    cache = model(ids_BT, use_cache=True).past_key_values
    before, results = held(cache), []
    for _ in range(2):
        twin = copy.deepcopy(cache)
        results.append(model(prompt(2, 1).fill_(3), past_key_values=twin).logits)
        assert twin.num_columns == 7 and held(cache) == before
    assert torch.equal(*results)


@pytest.mark.parametrize("num_rows", [1, 2])
def test_what_a_broken_pass_computed_does_not_outlive_a_crop(make_model: Make, num_rows: int) -> None:
    """Not in slots that are free and read, times 0, once the rows differ in length."""
    model, ids_BT = make_model("open").eval(), prompt(num_rows, 3)
    cache = model(ids_BT, use_cache=True).past_key_values
    hook = model.model.layers[0].register_forward_pre_hook(lambda _, given: (given[0] * float("nan"), *given[1:]))
    model(prompt(num_rows, 2), past_key_values=cache)
    hook.remove()
    cache.crop(-2)
    cache.batch_repeat_interleave(2 // num_rows)
    ids_BT = torch.cat([ids_BT.repeat_interleave(2 // num_rows, 0), prompt(2, 2)], 1)
    mask_BT = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 1]])
    expected = model(ids_BT, attention_mask=mask_BT).logits
    for t in (3, 4):
        logits = model(ids_BT[:, t : t + 1], attention_mask=mask_BT[:, : t + 1], past_key_values=cache).logits
        torch.testing.assert_close(logits[:, 0], expected[:, t], rtol=0, atol=1e-12)


@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
def test_training_mode_and_empty_layers(make_model: Make, skipped_kv: str) -> None:
    """There every block is called, with no rows if need be."""
    model = make_model("gone", skipped_kv=skipped_kv).train()
    cache = SkipCache(model.config)
    with midskip.meter(model) as meter:
        for _ in range(2):
            model(prompt(2, 3), past_key_values=cache)
    assert meter.query_rows_L == [0] * 4 and meter.bytes.cache == 0
    assert [layer.num_tokens for layer in cache.layers] == [12 if skipped_kv == "keep" else 0] * 4
    assert (cache.num_bytes().used > 0) == (skipped_kv == "keep")


# ---- refusals


@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
def test_a_cache_has_one_dtype(make_model: Make, skipped_kv: str) -> None:
    model = make_model("kept", skipped_kv=skipped_kv, dtype=torch.float32).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = model(prompt(2, 3), use_cache=True).past_key_values
    before = held(cache)
    with pytest.raises(ValueError, match=r"holds keys of torch.bfloat16 and torch.float32 ones .*inside autocast"):
        model(prompt(2, 1), past_key_values=cache)
    assert held(cache) == before
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(prompt(2, 1), past_key_values=cache)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"use_cache": False}, "past_key_values is given and use_cache is False: leave one of them out"),
        ({"input_ids": prompt(3, 1)}, "the cache holds 2 sequences and 3 are given: give as many, or fit the cache by"),
        (
            {"attention_mask": torch.ones(2, 1)},
            r"attention_mask has the shape \[2, 1\]; expected \[2, 6\]: it covers the 5 columns in the cache and the 1",
        ),
        (
            {"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]] * 2)},
            "attention_mask marks other columns as pads than it did when they were cached: give the same marks",
        ),
        ({"position_ids": torch.tensor([[4]])}, "position_ids do not rise within a row, or do not go on above those"),
        (
            {"input_ids": prompt(2, 2), "position_ids": torch.tensor([[8, 7]])},
            "position_ids do not rise .*with a cache a row is one sequence",
        ),
        ({"position_ids": torch.tensor([[64]])}, "position_ids reach to 64; this model takes 0 to 63"),
        (
            {"input_ids": prompt(2, 60)},
            "the input, with those in the cache, has 65 tokens and this model takes at most 64",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_no_trace(make_model: Make, arguments: dict, message: str) -> None:
    model = make_model("mixed").eval()
    cache = model(prompt(2, 5), use_cache=True).past_key_values
    before = held(cache)
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": prompt(2, 1), "past_key_values": cache} | arguments)
    assert held(cache) == before


def test_another_models_cache_is_refused(make_model: Make) -> None:
    model = make_model().eval()
    cache = model(prompt(1, 3), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="of another model: give each model a cache of its own"):
        make_model().eval()(prompt(1, 1), past_key_values=cache)
    for change in ({"num_hidden_layers": 3}, {"num_key_value_heads": 4}, {"head_dim": 8}, {"skipped_kv": "keep"}):
        with pytest.raises(
            ValueError, match=r"was made for a model with 4 layers, 2 key heads of width 4, skipped_kv='drop'"
        ):
            make_model(**change).eval()(prompt(1, 1), past_key_values=SkipCache(model.config))
    cache.reset()
    make_model().eval()(prompt(2, 1), past_key_values=cache)  # empty, it may serve another


def test_gradients_and_wrong_calls_are_refused(make_model: Make) -> None:
    model = make_model("mixed").eval()
    cache = SkipCache(model.config)
    for more in ({"past_key_values": cache}, {"use_cache": True}):
        with torch.enable_grad(), pytest.raises(ValueError, match=r"a cache carries no gradients: .*torch.no_grad\(\)"):
            model(prompt(1, 3), **more)
    model(prompt(1, 3), past_key_values=cache)
    for number in (1, -4):
        with pytest.raises(ValueError, match=rf"crop\({number}\) of a cache of 3 columns; expected 0 or less"):
            cache.crop(number)
    for nobody in (torch.tensor([]).long(), torch.tensor([False])):
        with pytest.raises(ValueError, match=r"no row of the cache is selected: .*reset\(\)"):
            cache.batch_select_indices(nobody)
    with pytest.raises(TypeError, match="a SkipCache is filled by its model"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)
    cache.activate_past_recording()
    assert cache.is_croppable and not cache.is_compileable and cache.num_columns == 3
