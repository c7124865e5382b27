"""The models that `midskip bench` times: their depths, weights and positions, and the work that each does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_bench import DTYPE, ids, settings, side
from transformers import LlamaForCausalLM

from midskip import MidskipForCausalLM
from midskip.bench.agree import check_ours
from midskip.bench.models import (
    Side,
    build_llama,
    build_ours,
    imposed,
    llama_with_our_equations,
    placed,
    positions,
    with_policy,
)  # fmt: skip
from midskip.bench.settings import CHECKED_COLUMNS, CHECKED_ROWS
from midskip.bench.tasks import Decode, Prefill, Training
from midskip.policies.controls import FixedDepths

pytestmark = pytest.mark.integration


def test_rows_of_a_batch_have_depths_of_their_own() -> None:
    given = settings()
    model = imposed(given, build_ours(given, DTYPE), "fixed")[1]
    with torch.no_grad():
        cache = model.prefilled(ids(), 20)
        gates_LBT = model.call(ids(), use_cache=False).gates
        later_LB = model.call(ids(3, 1), cache, use_cache=True).gates[..., 0]
    assert not torch.equal(gates_LBT[:, 0], gates_LBT[:, 1])
    assert cache.batch_size == 3
    first_B = positions(ids(3, 21), model.stretch)[:, -1]
    policy = model.model.model.policy
    assert isinstance(policy, FixedDepths)
    whole = model.model(torch.zeros(3, 1, dtype=torch.long), position_ids=first_B[:, None]).gates[..., 0]
    assert torch.equal(later_LB > 0, whole > 0)  # decoding goes on with each row's own positions


@pytest.mark.parametrize(
    "sizes",
    [
        {"batch_sizes": (1,), "training_batch_size": 1},
        {"batch_sizes": (1,), "training_batch_size": 1, "prompt_tokens": 100},
        {"batch_sizes": (1, 5), "prompt_tokens": 1},
        {"prompt_batch_size": 4, "tasks": ("prefill",)},
    ],
)
def test_no_two_rows_have_a_position_in_common(sizes: dict[str, Any]) -> None:
    given = settings(**sizes)
    one = imposed(given, build_ours(given, DTYPE), "fixed")[1]
    for rows, columns in (*given.sizes.values(), (CHECKED_ROWS, CHECKED_COLUMNS)):
        position_BT = positions(torch.zeros(rows, columns), one.stretch)
        assert position_BT.unique().numel() == rows * columns
        assert position_BT.max() < one.model.config.max_position_embeddings


def test_llama_has_the_frequencies_of_one_that_was_loaded(tmp_path: Path) -> None:
    llama = build_llama(settings().config(), torch.bfloat16, "cpu")
    assert llama.dtype == torch.bfloat16
    llama.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    expected = dict(loaded.named_buffers())
    assert expected.keys() == dict(llama.named_buffers()).keys() and len(expected) == 2
    for name, buffer in llama.named_buffers():
        assert buffer.dtype == expected[name].dtype == torch.float32 and torch.equal(buffer, expected[name])
    assert {buffer.dtype for buffer in placed(loaded, torch.bfloat16, "cpu").buffers()} == {torch.bfloat16}


def test_training_is_metered_as_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    modes, one = [], side()
    one.model.register_forward_pre_hook(lambda model, _: modes.append(model.training))
    Training(ids(2, 10)).work(one)
    assert modes == [True]


def test_sides_share_their_weights() -> None:
    given = settings()
    dense = build_ours(given, DTYPE)
    sides = imposed(given, dense, "fractional")
    for one in sides:
        for name, parameter in one.model.named_parameters():
            assert parameter.data_ptr() == dense.get_parameter(name).data_ptr(), name
    assert dense.config.policy == "dense" and sides[1].model.config.policy_settings["skip_share"] == 0.5


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75])
def test_hard_gates_skip_what_is_asked_for_and_agree_with_the_plain_twin(share: float) -> None:
    one = side(share, "hard", shape={"num_hidden_layers": 8})
    with torch.no_grad():
        assert abs(1 - Prefill(ids(16, 100)).work(one).executed_share - share) < 0.05
    assert len(check_ours(one, ids(2, 40), gradients=True)) == 5


@pytest.mark.parametrize("kind", [Prefill, Decode, Training])
def test_work_of_llama_is_what_the_meter_counts_on_our_dense_model(kind: Any) -> None:
    given = settings(norms=("pre",))
    dense = Side("ours", with_policy(build_ours(given, DTYPE), "dense", {}))
    llama = Side("llama", build_llama(given.config(), DTYPE, "cpu"))
    task = kind(ids(3, 15), 5) if kind is Decode else kind(ids(3, 15))
    with torch.set_grad_enabled(task.trains):
        ours, theirs = task.work(dense), task.work(llama)
        assert theirs.executed_share == ours.executed_share == 1
        for name in ("flops", "rows_by_layer", "causal_pairs", "weight_bytes"):
            assert getattr(theirs, name) == getattr(ours, name), name
        if kind is Decode:
            assert theirs.cache_bytes == ours.cache_bytes
            step = task.begin(llama)
            cache = [step(number) for number in range(5)][-1].past_key_values
            assert theirs.kv_used_bytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def test_a_stretch_begins_from_the_same_cache_each_time() -> None:
    task, one = Decode(ids(2, 12), 3), side()
    with torch.no_grad():
        first, second = task.begin(one), task.begin(one)
        logits = [first(number).logits for number in range(3)]
        again = [second(number).logits for number in range(3)]
        whole = one.call(task.ids_BT, use_cache=False).logits[:, 9:]
    assert all(torch.equal(a, b) for a, b in zip(logits, again, strict=True))
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_model_with_skip_paths_has_its_llama() -> None:
    """And a dense twin, which takes no path."""
    config = settings().config("pre")
    config.policy, config.skip_path, config.skipped_kv = "independent", "linear", "keep"
    llama, tokens = build_llama(config, torch.float64, "cpu"), torch.arange(9)[None]
    ours = llama_with_our_equations(llama, config)
    # Llama works out its angles in float32
    torch.testing.assert_close(ours(tokens).logits, llama(tokens).logits, rtol=0, atol=1e-6)
    model = MidskipForCausalLM(config).double().eval()
    twin = with_policy(model, "dense", {})
    model.model.policy.set_limits(0.0)
    torch.testing.assert_close(twin(tokens).logits, model(tokens).logits, rtol=0, atol=1e-12)
