"""What happens to a cache around the passes: counts, inference mode, other processes, a watch."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from test_cache import held
from torch import Tensor

import midskip
from midskip import MidskipForCausalLM, SkipCache
from midskip.budget.monitor import BudgetDriftError, DriftMonitor

Make = Callable[..., MidskipForCausalLM]


def prompt(*shape: int) -> Tensor:
    return torch.randint(31, shape)


# ---- what is counted of it


@torch.no_grad()
def test_lengths_are_those_of_what_is_left(make_model: Make, ragged: tuple[Tensor, Tensor]) -> None:
    ids_BT, mask_BT = ragged
    model = make_model("mixed").eval()
    cache = model(ids_BT, attention_mask=mask_BT, use_cache=True).past_key_values
    assert cache.seqlens == mask_BT.sum(1).tolist()
    cache.crop(-4)
    assert cache.seqlens == mask_BT[:, :5].sum(1).tolist()
    model(ids_BT[:, 5:6], attention_mask=mask_BT[:, :6], past_key_values=cache)
    assert cache.seqlens == mask_BT[:, :6].sum(1).tolist()


def test_the_dense_side_of_the_meter_under_assisted_generation(make_model: Make) -> None:
    model, ids_1T = make_model(policy="dense").eval(), prompt(1, 4).repeat(1, 3)
    with midskip.meter(model) as meter:
        model.generate(ids_1T, max_new_tokens=20, do_sample=False, pad_token_id=0, prompt_lookup_num_tokens=4)
    assert max(meter.seqlens[1:]) > 1, "else nothing was proposed"
    assert meter.flops() == meter.dense_flops() and meter.bytes == meter.dense_bytes()


@pytest.mark.parametrize("autocast", [True, False])
@torch.no_grad()
def test_bytes_under_autocast(make_model: Make, autocast: bool) -> None:
    model = make_model(policy="dense", dtype=torch.float32).eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        cache = model(prompt(1, 5), use_cache=True).past_key_values
        with midskip.meter(model) as meter:
            model(prompt(1, 1), past_key_values=cache)
    assert meter.bytes.cache == meter.dense_bytes().cache == 4 * 6 * 2 * 2 * 4 * (2 if autocast else 4)


# ---- inference mode, other processes


@pytest.mark.parametrize("inside", [True, False])
def test_inference_mode_and_without(make_model: Make, inside: bool) -> None:
    """A cache filled in one is cropped, rearranged and gone on with in the other."""
    model, ids_BT, new_BT = make_model("mixed").eval(), prompt(3, 9), prompt(3, 2)
    with torch.inference_mode(inside), torch.no_grad():
        cache = model(ids_BT, use_cache=True).past_key_values
    with torch.inference_mode(not inside), torch.no_grad():
        cache.crop(-2)
        cache.batch_select_indices(torch.tensor([2, 0, 0]))
        logits = [model(new_BT[:, n : n + 1], past_key_values=cache).logits for n in range(2)]
        expected = model(torch.cat([ids_BT[[2, 0, 0], :7], new_BT], 1)).logits[:, -2:]
        torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_it_can_be_sent_and_copied_with_its_model(make_model: Make) -> None:
    model, new_BT = make_model("mixed").eval(), prompt(2, 1)
    cache = model(prompt(2, 6), use_cache=True).past_key_values
    sent = pickle.loads(pickle.dumps(cache))
    assert held(sent) == held(cache)
    twin, copied = copy.deepcopy((model, cache))
    expected = model(new_BT, past_key_values=cache).logits
    assert torch.equal(model(new_BT, past_key_values=sent).logits, expected)
    assert torch.equal(twin(new_BT, past_key_values=copied).logits, expected)


# ---- room, and a watch over live prompts


def test_room_counts_what_the_cache_holds(make_model: Make) -> None:
    model, ids_BT = make_model("mixed").eval(), prompt(1, 60)
    with torch.no_grad():
        cache = model(ids_BT, use_cache=True).past_key_values
    before, mask_BT = held(cache), torch.ones(1, 63, dtype=torch.long)
    options = {"attention_mask": mask_BT, "past_key_values": cache, "pad_token_id": 0, "do_sample": False}
    with pytest.raises(ValueError, match="prompt and new tokens make 83 tokens; this model takes at most 64"):
        model.generate(prompt(1, 3), max_new_tokens=20, **options)
    assert held(cache) == before
    assert model.generate(prompt(1, 3), max_new_tokens=2, **options).shape == (1, 5)


@pytest.fixture
def strict(make_model: Make) -> MidskipForCausalLM:
    """A model that raises when it has seen 20 tokens of prompts, whatever they are."""
    model = make_model("mixed").eval()
    curve = {"score_scale": [0.0, 1.0], "share": [1.0, 0.5], "share_std": [1.0, 1.0]}
    curve |= {"loss": [0.0, 0.0], "loss_std": [0.0, 0.0]}
    curve |= {"share_by_bucket": [[1.0] * 12, [0.5] * 12], "loss_by_bucket": [[0.0] * 12] * 2}
    model.config.calibration = {"text": "x", "num_tokens": 99, "block_tokens": 20, "num_dropped": 0, **curve}
    model.set_budget(0.5)
    DriftMonitor(model, "error").attach()
    return model


def test_proposed_tokens_are_no_prompts(strict: MidskipForCausalLM) -> None:
    options = {"do_sample": False, "pad_token_id": 0, "prompt_lookup_num_tokens": 4}
    with midskip.meter(strict) as meter:
        strict.generate(prompt(1, 3).repeat(1, 4), max_new_tokens=40, **options)
    assert sum(length for length in meter.seqlens[1:] if length > 1) > 20, "else nothing was proposed"
    with pytest.raises(BudgetDriftError, match="loss"):
        strict.generate(prompt(1, 30), max_new_tokens=5, **options)


@torch.no_grad()
def test_a_drift_that_raises_leaves_the_cache_as_it_was(strict: MidskipForCausalLM) -> None:
    cache = SkipCache(strict.config)
    with pytest.raises(BudgetDriftError):
        strict(prompt(1, 30), past_key_values=cache)
    assert cache.num_columns == 0 and cache.seqlens == [] and cache.num_valid_tokens == 0
