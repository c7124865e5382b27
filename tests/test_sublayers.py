"""Attention and feed-forward skipped apart (`skip_unit="sublayer"`)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_exactness import check_equal
from tiny_runs import QUIET, history
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from midskip import MidskipConfig, MidskipForCausalLM, meter
from midskip.testing import check_policy, reference_forward
from midskip.train import Recipe, train

Make = Callable[..., MidskipForCausalLM]
FIXED = "midskip.policies.controls:FixedDepths"
MODELS: dict[str, dict[str, Any]] = {
    "middle_out": {"gates": "mixed"},
    "middle_out, hard": {"gates": "mixed", "policy_settings": {"gates": "hard"}},
    "independent": {"gates": None, "policy": "independent"},
    "fixed": {"policy": FIXED, "policy_settings": {"skip_share": 0.4, "fractional": True}},
}


def build(make_model: Make, kind: str, **changes: Any) -> MidskipForCausalLM:
    model = make_model(**MODELS[kind], skip_unit="sublayer", **changes)
    if kind == "independent":
        nn.init.constant_(model.model.policy.bias, -0.2)  # pyright: ignore[reportArgumentType]
    return model


@pytest.mark.parametrize(("num_layers", "norms"), [(1, "sandwich"), (4, "pre"), (3, "sandwich")])
@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
@pytest.mark.parametrize("kind", MODELS)
def test_they_equal_the_reference(
    make_model: Make, ragged: tuple[Tensor, Tensor], kind: str, skipped_kv: str, num_layers: int, norms: str
) -> None:
    model = build(make_model, kind, num_hidden_layers=num_layers, skipped_kv=skipped_kv, norms=norms)
    packed, _ = check_equal(model, *ragged)
    ran_LN = packed["gates"][:, ragged[1].bool()] > 0
    assert len(ran_LN) == 2 * num_layers == len(packed["hidden_states"]) * 2 - 2
    if num_layers > 1 or kind == "independent":
        assert (ran_LN[0::2] != ran_LN[1::2]).any()  # some token runs one half of a block


@pytest.mark.parametrize(("name", "skipped_kv"), [("independent", "drop"), ("middle_out", "keep")])
@pytest.mark.integration
def test_the_contract(name: str, skipped_kv: str) -> None:
    check_policy(name, num_layers=2, skipped_kv=skipped_kv, skip_unit="sublayer")


@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_cache_holds_what_attended_and_flops_are_torchs(
    make_model: Make, ragged: tuple[Tensor, Tensor], kind: str, skipped_kv: str
) -> None:
    model = build(make_model, kind, skipped_kv=skipped_kv, dtype=torch.float32).eval()
    ids_BT, mask_BT = ragged
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, meter(model) as work:
        output = model(ids_BT, attention_mask=mask_BT, use_cache=False)
    assert work.flops("counter").total == counter.get_total_flops()
    assert work.query_rows_L == output.executed.sum((1, 2)).tolist()
    assert work.executed_share == pytest.approx(output.executed_share)
    keys_L = output.executed.sum((1, 2)) if skipped_kv == "drop" else mask_BT.sum().expand(8)
    assert work.key_rows_L[0::2] == keys_L[0::2].tolist() and work.key_rows_L[1::2] == [0] * 4
    with torch.no_grad():
        cache = model(ids_BT, attention_mask=mask_BT, use_cache=True).past_key_values
    assert [layer.num_tokens for layer in cache.layers] == work.key_rows_L[0::2]
    assert cache.num_block_tokens == sum(work.query_rows_L)
    assert cache.executed_share == pytest.approx(work.executed_share)


def test_weights_are_those_of_blocks(make_model: Make) -> None:
    ids_BT = torch.randint(31, (2, 9))
    blocks = make_model(policy="dense").eval()
    apart = make_model(policy="dense", skip_unit="sublayer", seed=1).eval()
    apart.load_state_dict(blocks.state_dict())
    torch.testing.assert_close(apart(ids_BT).logits, blocks(ids_BT).logits, rtol=0, atol=0)
    with meter(apart) as work:
        apart(ids_BT)
    assert work.flops() == work.dense_flops() and work.bytes == work.dense_bytes()


@torch.no_grad()
def test_a_feed_forward_may_be_left_out_alone(make_model: Make) -> None:
    """Of two layers with the static policy: the attention of both, and the feed-forward of the second."""
    settings = {"layers": [0, 2, 3]}
    model = make_model(policy="static", policy_settings=settings, skip_unit="sublayer", num_hidden_layers=2).eval()
    ids_BT = torch.randint(31, (2, 9))
    with meter(model) as work:
        output = model(ids_BT)
    assert output.executed[:, 0, 0].tolist() == [True, False, True, True]
    torch.testing.assert_close(output.logits, reference_forward(model, ids_BT).logits, rtol=0, atol=1e-12)
    whole = work.dense_flops()
    assert (work.flops().mlp, work.flops().attention) == (whole.mlp // 2, whole.attention)
    assert (
        0
        < work.dense_bytes().weights - work.bytes.weights
        == sum(
            parameter.nbytes
            for module in model.model.layers[0].modules_of("feed_forward")
            for parameter in module.parameters()
        )
    )


@pytest.mark.usefixtures("no_pictures", "on_the_cpu")
@pytest.mark.integration
def test_a_recipe_holds_a_share_of_sublayers(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(
        "target_share", {"target_share": 0.6, "ramp_steps": 10}, max_steps=40, learning_rate=0.003,
        per_device_train_batch_size=4, model={"policy": "independent", "skip_unit": "sublayer"}, dense_layers=[1],
    )  # fmt: skip
    report = train(recipe, console=QUIET)
    shares = report["validation"]["share_by_layer"]
    assert len(shares) == 2 * recipe.model.num_hidden_layers and len(report["dense"]) == 1
    late = sum(row["executed_share"] for row in history(recipe)[-15:]) / 15
    assert late == pytest.approx(0.6, abs=0.06)


def test_another_unit_is_refused() -> None:
    with pytest.raises(ValueError, match="skip_unit is 'head'; expected one of 'block', 'sublayer'"):
        MidskipConfig(skip_unit="head")
