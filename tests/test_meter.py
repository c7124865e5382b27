"""The meter with a cache: rows, pairs and FLOPs against hooks and torch's counter, bytes against a plain account."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import midskip
from midskip import MidskipForCausalLM, SkipCache
from midskip.cost import Flops, Meter, dense_flops

Make = Callable[..., MidskipForCausalLM]
FIXED = "midskip.policies.controls:FixedDepths"
RUNS = {
    "dense": {"policy": "dense"},
    "open": {"gates": "open"},
    "mixed": {"gates": "mixed"},
    "gone": {"gates": "gone"},
    "fixed": {"policy": FIXED, "policy_settings": {"skip_share": 0.4, "fractional": True}},
}
CHUNKS = {"token by token": [5, 1, 1, 1, 1], "in chunks": [4, 3, 2]}


def passes(model: MidskipForCausalLM, ids_BT: Tensor, chunks: list[int]) -> SkipCache:
    cache, done = SkipCache(model.config), 0
    for chunk in chunks:
        model(ids_BT[:, done : done + chunk], past_key_values=cache, logits_to_keep=1)
        done += chunk
    return cache


@pytest.mark.parametrize(
    ("run", "chunks"), [*((run, "token by token") for run in RUNS), ("mixed", "in chunks"), ("fixed", "in chunks")]
)
@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
@torch.no_grad()
def test_flops_are_those_of_torchs_counter(make_model: Make, run: str, chunks: str, skipped_kv: str) -> None:
    model = make_model(**RUNS[run], skipped_kv=skipped_kv, num_hidden_layers=5, dtype=torch.float32).eval()
    ids_BT = torch.randint(31, (1, 9))
    with midskip.meter(model) as meter, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        passes(model, ids_BT, CHUNKS[chunks])
    assert meter.flops("counter").total == counter.get_total_flops()
    assert meter.num_tokens == 9 and meter.head_rows == len(CHUNKS[chunks])
    if run == "dense":
        assert meter.flops() == meter.dense_flops() and meter.flops("counter") == meter.dense_flops("counter")


@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
@pytest.mark.parametrize("run", RUNS)
@torch.no_grad()
def test_pairs_do_not_depend_on_how_a_text_is_cut(
    make_model: Make, ragged: tuple[Tensor, Tensor], run: str, skipped_kv: str
) -> None:
    model = make_model(**RUNS[run], skipped_kv=skipped_kv, num_hidden_layers=5).eval()
    ids_BT, mask_BT = ragged
    with midskip.meter(model) as whole:
        model(ids_BT, attention_mask=mask_BT)
    with midskip.meter(model) as parts:
        cache, done = SkipCache(model.config), 0
        for chunk in (3, 1, 4, 1):
            done += chunk
            model(ids_BT[:, done - chunk : done], attention_mask=mask_BT[:, :done], past_key_values=cache)
    assert parts.query_rows_L == whole.query_rows_L and parts.executed_share == whole.executed_share
    for calls, call in zip(parts.layers, whole.layers, strict=True):
        assert sum(work.causal_pairs for work in calls) == sum(work.causal_pairs for work in call)
    assert parts.dense_flops() == whole.dense_flops() == dense_flops(model.config, mask_BT.sum(1).tolist())


@pytest.mark.parametrize("run", RUNS)
@torch.no_grad()
def test_rows_are_what_enters_the_blocks(make_model: Make, run: str) -> None:
    model, ids_BT = make_model(**RUNS[run]).eval(), torch.randint(31, (4, 9))
    rows = [0] * len(model.model.layers)
    for layer, block in enumerate(model.model.layers):
        block.mlp.register_forward_pre_hook(
            lambda _, arguments, layer=layer: rows.__setitem__(layer, rows[layer] + arguments[0].shape[0])
        )
    with midskip.meter(model) as meter:
        cache = passes(model, ids_BT, [2, 1, 1, 4, 1])
    assert meter.query_rows_L == rows == [layer.num_tokens for layer in cache.layers]
    assert meter.executed_share == cache.executed_share


def bytes_of(module: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


@pytest.mark.parametrize(("run", "dtype"), [*((run, torch.float32) for run in RUNS), ("mixed", torch.bfloat16)])
@torch.no_grad()
def test_bytes_of_a_step(make_model: Make, run: str, dtype: torch.dtype) -> None:
    model, ids_BT = make_model(**RUNS[run], dtype=dtype).eval(), torch.randint(31, (3, 9))
    cache, body = passes(model, ids_BT[:, :8], [8]), model.model
    with midskip.meter(model) as meter:
        gates_LB = model(ids_BT[:, 8:], past_key_values=cache).gates.squeeze(2)
    weights = bytes_of(body.embed_layernorm) + bytes_of(body.norm) + bytes_of(body.policy) + bytes_of(model.lm_head)
    weights += 3 * 16 * dtype.itemsize  # three rows of the embedding
    ran_L = (gates_LB > 0).any(1).tolist()
    blocks = sum(bytes_of(block) for block, ran in zip(body.layers, ran_L, strict=True) if ran)
    read = 0
    for layer, gate_B in zip(cache.layers, gates_LB, strict=True):
        a_token = 2 * 2 * 4 * dtype.itemsize + (0 if not layer.seqlens or layer.log_gates is None else 4)
        read += sum(length * a_token for length, gate in zip(layer.seqlens or [0] * 3, gate_B.tolist()) if gate)
    assert (meter.bytes.weights, meter.bytes.cache) == (weights + blocks, read)
    assert meter.bytes.total == weights + blocks + read
    dense = meter.dense_bytes()
    policy = bytes_of(body.policy)
    assert dense.weights == weights - policy + sum(map(bytes_of, body.layers))
    assert dense.cache == 4 * 3 * 9 * 2 * 2 * 4 * dtype.itemsize


@torch.no_grad()
def test_bytes_with_keys_of_all_tokens(make_model: Make) -> None:
    model, ids_BT = make_model("gone", skipped_kv="keep").eval(), torch.randint(31, (3, 9))
    cache = passes(model, ids_BT[:, :8], [8])
    with midskip.meter(model) as meter:
        model(ids_BT[:, 8:], past_key_values=cache)
    assert meter.query_rows_L == [0] * 4 and [calls[0].key_rows for calls in meter.layers] == [3] * 4
    of_keys = 8 * (16 + 2 * 8 * 16)  # a norm, and the projections to keys and values
    others = (model.model.embed_layernorm, model.model.norm, model.model.policy, model.lm_head)
    assert meter.bytes.weights == 4 * of_keys + sum(map(bytes_of, others)) + 3 * 16 * 8
    assert meter.bytes.cache == 0, "nobody asked"


@torch.no_grad()
def test_a_prefill_reads_no_cache(make_model: Make) -> None:
    model, ids_BT = make_model().eval(), torch.randint(31, (2, 9))
    with midskip.meter(model) as cached:
        model(ids_BT, use_cache=True)
    with midskip.meter(model) as plain:
        model(ids_BT)
    assert cached.flops() == plain.flops() and cached.bytes == plain.bytes and cached.bytes.cache == 0
    assert cached.dense_bytes().cache == 0


def test_under_generate(make_model: Make) -> None:
    model, ids_BT = make_model(dtype=torch.float32).eval(), torch.randint(31, (2, 5))
    with midskip.meter(model) as cached:
        generated_BT = model.generate(ids_BT, max_new_tokens=3, do_sample=False)
    with midskip.meter(model) as uncached:
        assert torch.equal(model.generate(ids_BT, max_new_tokens=3, do_sample=False, use_cache=False), generated_BT)
    assert cached.num_tokens == 2 * (5 + 1 + 1) and uncached.num_tokens == 2 * (5 + 6 + 7)
    assert cached.head_rows == uncached.head_rows == 2 * 3
    expected = Flops()
    for length in (5, 6, 7):  # without a cache each step is a full pass, the head at the last token
        with Meter(model) as step, torch.no_grad():
            model(generated_BT[:, :length], logits_to_keep=1)
        expected += step.flops()
    assert uncached.flops() == expected


def test_training_reads_no_cache(make_model: Make) -> None:
    model, ids_BT = make_model().train(), torch.randint(31, (2, 9))
    with midskip.meter(model) as meter:
        model(ids_BT, labels=ids_BT).loss.backward()
    assert meter.bytes.cache == meter.dense_bytes().cache == 0 and meter.past_seqlens == [0, 0]
