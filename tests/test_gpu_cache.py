"""The cache on a GPU: the numbers of the CPU, how often the host waits for a step, and how much it launches.

pytest -m gpu tests/test_gpu_cache.py -rA      # -rA also shows what was measured
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_documents import POLICIES
from test_exactness import same
from test_gpu import DEVICE, STEADY, distance, twins, waits
from test_gpu import pytestmark as on_gpu
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import midskip
from midskip import MidskipForCausalLM, SkipCache

pytestmark = on_gpu
Make = Callable[..., MidskipForCausalLM]
CHUNKS = {"token by token": [1] * 9, "in chunks": [4, 1, 3, 1], "prompt and tokens": [6, 1, 1, 1]}


@torch.no_grad()
def by_steps(model: MidskipForCausalLM, ids_BT: Tensor, mask_BT: Tensor, chunks: list[int]) -> dict[str, Tensor]:
    """Outputs of all passes, side by side, brought to the CPU."""
    cache, done, found = SkipCache(model.config), 0, []
    for chunk in chunks:
        done += chunk
        output = model(
            ids_BT[:, done - chunk : done].to(model.device),
            attention_mask=mask_BT[:, :done].to(model.device),
            past_key_values=cache,
        )
        found.append({"logits": output.logits.cpu(), "gates": output.gates.movedim(0, -1).cpu()})
    return {name: torch.cat([one[name] for one in found], 1) for name in found[0]}


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
@pytest.mark.parametrize("policy", POLICIES)
def test_float64_equals_the_cpu(
    make_model: Make, ragged: tuple[Tensor, Tensor], policy: str, skipped_kv: str, chunks: str
) -> None:
    model = make_model(**POLICIES[policy], skipped_kv=skipped_kv, num_hidden_layers=5).eval()
    found = by_steps(twins(model), *ragged, CHUNKS[chunks])
    expected = by_steps(model, *ragged, CHUNKS[chunks])
    for name, tensor in expected.items():
        same(found[name], tensor, name)


@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
@pytest.mark.parametrize("policy", STEADY)
def test_bfloat16_errs_no_more_than_on_the_cpu(
    make_model: Make, ragged: tuple[Tensor, Tensor], policy: str, skipped_kv: str
) -> None:
    model = make_model(**STEADY[policy], skipped_kv=skipped_kv, num_hidden_layers=2).eval()
    exact = by_steps(model, *ragged, CHUNKS["prompt and tokens"])
    found = by_steps(twins(model, torch.bfloat16), *ragged, CHUNKS["prompt and tokens"])
    beside = by_steps(model.to(torch.bfloat16), *ragged, CHUNKS["prompt and tokens"])
    logits = [{"logits": one["logits"]} for one in (found, beside, exact)]
    assert distance(logits[0], logits[2]) < 1.5 * distance(logits[1], logits[2]) + 0.003


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
def test_generation_equals_the_cpu(make_model: Make, skipped_kv: str, settings: dict[str, Any]) -> None:
    model = make_model("mixed", skipped_kv=skipped_kv).eval()
    ids_BT, mask_BT = torch.randint(31, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask_BT[1, :4] = 0
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **settings}
    found = twins(model).generate(ids_BT.to(DEVICE), attention_mask=mask_BT.to(DEVICE), **settings)
    assert torch.equal(found.cpu(), model.generate(ids_BT, attention_mask=mask_BT, **settings))


def test_the_cache_and_the_meter_count_the_same(make_model: Make) -> None:
    model = make_model("mixed", num_hidden_layers=5).eval()
    ids_BT, found = torch.randint(31, (3, 9)), []
    for one in (model, twins(model)):
        cache = SkipCache(one.config)
        with torch.no_grad(), midskip.meter(one) as meter:
            for done in range(9):
                one(ids_BT[:, done : done + 1].to(one.device), past_key_values=cache)
        lengths = [layer.seqlens for layer in cache.layers]
        found.append((lengths, cache.num_bytes(), meter.layers, meter.bytes, meter.dense_bytes()))
    assert found[0] == found[1]


@pytest.mark.parametrize("batch_size", [1, 8])
@torch.no_grad()
def test_what_a_step_waits_for_and_launches(
    make_model: Make, batch_size: int, record_property: Callable[[str, object], None]
) -> None:
    model = twins(make_model("mixed", num_hidden_layers=6).eval(), torch.bfloat16)
    ids_BT = torch.randint(31, (batch_size, 40), device=DEVICE)
    cache = model(ids_BT[:, :30], use_cache=True).past_key_values

    def step() -> None:
        column = cache.get_seq_length()
        model(ids_BT[:, column : column + 1], past_key_values=cache, logits_to_keep=1)

    step()
    found = waits(step)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    launches = sum(one.count for one in profiler.key_averages() if one.key in ("cudaLaunchKernel", "cuLaunchKernelEx"))
    print(batch_size, dict(found), launches)
    record_property("launches", launches)
    # whether the new columns are in order, and how many tokens each of three sets keeps
    assert 0 < sum(found.values()) <= 1 + 3, found


@torch.no_grad()
def test_what_a_prefill_waits_for(make_model: Make) -> None:
    model = twins(make_model("mixed", num_hidden_layers=6).eval(), torch.bfloat16)
    ids_BT = torch.randint(31, (8, 40), device=DEVICE)
    model(ids_BT, use_cache=True)
    found = waits(lambda: model(ids_BT, use_cache=True, logits_to_keep=1))
    assert 0 < sum(found.values()) <= 1 + 3, found
