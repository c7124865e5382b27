"""Who skips: the built-in policies against their equations, and the contract that every policy must keep."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from midskip import MidskipForCausalLM
from midskip.model.packing import PackedBatch
from midskip.policies import Decision, Policy, build_policy
from midskip.policies.base import check_first_pass
from midskip.policies.controls import FixedDepths
from midskip.policies.dense import Dense
from midskip.policies.middle_out import STARTS, MiddleOut
from midskip.testing import check_policy

Make = Callable[..., MidskipForCausalLM]
FIXED = "midskip.policies.controls:FixedDepths"


def rectangle(*shape: int) -> PackedBatch:
    return PackedBatch.from_rectangle(torch.ones(shape).bool())


def decide_all(policy: Policy, h_LND: Tensor, batch: PackedBatch) -> tuple[list[Decision], dict[str, Any]]:
    state: dict[str, Any] = {}
    return [policy(layer, h_ND, state, batch) for layer, h_ND in enumerate(h_LND)], state


# ---- built-in


@pytest.mark.parametrize("num_layers", [1, 2, 5, 6])
def test_middle_out_is_the_papers_equations(num_layers: int) -> None:
    policy = MiddleOut(num_layers, 8)
    nn.init.normal_(policy.weight, std=0.2)
    nn.init.normal_(policy.bias, std=0.1)
    h_LND = torch.randn(num_layers, 63, 8)
    batch = rectangle(7, 9)
    decisions, state = decide_all(policy, h_LND, batch)
    num_gates = (num_layers + 1) // 2
    assert len(state["depth_scores"]) == num_gates == len(policy.weight)
    total_N = torch.zeros(63)
    for layer in range(num_gates):
        total_N = total_N + (h_LND[layer] @ policy.weight[layer] + policy.bias[layer]).relu()
        decision, mirrored = decisions[layer], decisions[num_layers - 1 - layer]
        gate_N = 1 - total_N.clamp(0, 1)
        assert torch.equal(decision.keep_N, gate_N > 0)
        torch.testing.assert_close(decision.output_gate_N, gate_N)
        assert decision.key_gate_N is decision.output_gate_N
        assert mirrored is decision
        assert decision.output_gate_N.dtype == torch.float32
        if layer:  # who left stays away
            assert not (decision.keep_N & ~decisions[layer - 1].keep_N).any()
            torch.testing.assert_close(state["depth_scores"][layer].clamp(max=1), total_N.clamp(max=1))
        scored = int(decisions[layer - 1].keep_N.sum()) if layer else 63  # who left is not scored again
        assert policy.flops(layer, state, batch) == 2 * 8 * scored
    assert policy.flops(num_layers, state, batch) == 0


def test_a_score_past_one_no_longer_grows() -> None:
    policy = MiddleOut(6, 4)
    with torch.no_grad():
        policy.weight.zero_()
        policy.bias.copy_(torch.tensor([0.25, 0.75, 0.5]))
    _, state = decide_all(policy, torch.randn(6, 3, 4), rectangle(1, 3))
    assert torch.stack(state["depth_scores"])[:, 0].tolist() == [0.25, 1.0, 1.0]
    for scores in (state["depth_scores"][1], state["depth_scores"][2]):
        gate_N = torch.where(scores < 1, 1 - scores, 0)
        (slope,) = torch.autograd.grad(gate_N.sum(), policy.bias, retain_graph=True)
        assert (slope == 0).all()  # at exactly 1 the slope is 0


def test_middle_out_scores_in_float32_at_least() -> None:
    policy = MiddleOut(4, 8, start="released").bfloat16()
    policy.reset_parameters()
    h_ND = torch.randn(7, 8).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decision = policy(0, h_ND, {}, rectangle(1, 7))
    exact_N = (1 - (h_ND.double() @ policy.weight[0].double()).relu()).clamp(min=0)
    assert decision.output_gate_N.dtype == torch.float32
    torch.testing.assert_close(decision.output_gate_N.double(), exact_N, rtol=0, atol=1e-6)
    assert policy.double()(0, h_ND.double(), {}, rectangle(1, 7)).output_gate_N.dtype == torch.float64


@pytest.mark.parametrize("num_layers", [1, 4, 5])
def test_open_start(num_layers: int) -> None:
    policy = MiddleOut(num_layers, 8)
    policy.reset_parameters()
    decisions, _ = decide_all(policy, torch.randn(num_layers, 7, 8), rectangle(1, 7))
    middle = decisions[(num_layers - 1) // 2]
    torch.testing.assert_close(middle.output_gate_N, torch.full((7,), 0.9))
    for decision in decisions:
        assert decision.keep_N.all() and ((decision.output_gate_N >= 0.899) & (decision.output_gate_N < 1)).all()


def test_starts_differ_in_weight_and_bias() -> None:
    spreads = {}
    for start, bias in (("open", 0.1 / 6), ("spread", 0.1 / 6), ("released", 0.0)):
        policy = MiddleOut(12, 768, initializer_range=0.02, start=start)
        policy.reset_parameters()
        torch.testing.assert_close(policy.bias.detach(), torch.full((6,), bias))
        spreads[start] = policy.weight.std().item()
    assert spreads["open"] == 0 and spreads["released"] == pytest.approx(0.02, rel=0.05)
    assert 0 < spreads["spread"] < spreads["released"]


def test_dense_keeps_everybody() -> None:
    decision = Dense(3, 8)(1, torch.randn(5, 8), {}, rectangle(1, 5))
    assert decision.keep_N is decision.output_gate_N is decision.key_gate_N is None


@pytest.mark.parametrize(("num_layers", "skip_share"), [(4, 0.25), (5, 0.5), (12, 0.75), (12, 0.0), (5, 1.0)])
def test_fixed_depths_skip_the_share_asked_for(skip_share: float, num_layers: int) -> None:
    policy = FixedDepths(num_layers, 8, skip_share=skip_share)
    decisions, _ = decide_all(policy, torch.zeros(num_layers, 4000, 8), rectangle(2, 2000))
    keep_LN = torch.stack([torch.ones(4000).bool() if d.keep_N is None else d.keep_N for d in decisions])
    if num_layers % 2 == 0:
        assert keep_LN.float().mean() == pytest.approx(1 - skip_share, abs=0.02)
    assert torch.equal(keep_LN, keep_LN.flip(0))
    assert not (keep_LN[1 : num_layers // 2] & ~keep_LN[: num_layers // 2 - 1]).any()  # nested
    assert torch.equal(keep_LN[:, :2000], keep_LN[:, 2000:])  # by position alone
    assert all(decision.output_gate_N is None for decision in decisions)


def test_fixed_depths_refuse_a_share_that_is_none() -> None:
    for share in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"skip_share is {share}; expected a number from 0 to 1"):
            FixedDepths(4, 8, skip_share=share)


class HandsOn(MiddleOut):
    def __init__(self, *sizes: Any, every: int = 2, **settings: Any) -> None:
        super().__init__(*sizes, **settings)
        self.every = every


def test_a_subclass_may_hand_settings_on() -> None:
    path = f"{__name__}:HandsOn"
    policy = build_policy(path, 4, 8, 0.02, {"every": 3, "gates": "hard"})
    assert isinstance(policy, HandsOn) and policy.every == 3 and policy.is_hard and policy.initializer_range == 0.02
    with pytest.raises(ValueError, match=r"does not know the setting 'gate'; it knows 'every', 'start'.*mean 'gates'"):
        build_policy(path, 4, 8, 0.02, {"gate": "hard"})


def test_the_first_pass_alone_is_checked(make_model: Callable[..., MidskipForCausalLM]) -> None:
    model = make_model()
    check_first_pass(model.model.policy)
    copy = deepcopy(model)
    for one in (model, copy):
        assert one.model.policy._forward_hooks
        one(torch.tensor([[1, 2, 3]]))
        assert not one.model.policy._forward_hooks


def test_build_policy_passes_the_settings_on() -> None:
    policy = build_policy(FIXED, 6, 8, 0.1, {"skip_share": 0.25, "seed": 3})
    assert isinstance(policy, FixedDepths)
    assert (policy.num_layers, policy.width, policy.initializer_range) == (6, 8, 0.1)
    assert (policy.skip_share, policy.seed) == (0.25, 3)


def test_decide_must_be_written() -> None:
    with pytest.raises(NotImplementedError):
        Policy(2, 8)(0, torch.zeros(1, 8), {}, rectangle(1, 1))


# ---- the contract


@pytest.mark.parametrize(
    "policy, settings, num_layers, skipped_kv",
    [
        ("dense", {}, 4, "keep"),
        ("middle_out", {}, 1, "drop"),
        ("middle_out", {}, 4, "keep"),
        *(("middle_out", {"start": start}, 3, "drop") for start in STARTS if start != "open"),
        (FIXED, {"skip_share": 0.4}, 4, "keep"),
        (FIXED, {"skip_share": 0.6, "fractional": True}, 3, "drop"),
    ],
)
def test_policies_that_keep_the_contract_pass(
    policy: str, settings: dict, num_layers: int | None, skipped_kv: str | None
) -> None:
    check_policy(policy, settings, num_layers=num_layers, skipped_kv=skipped_kv)
