"""The regularizer that holds a compute target: its targets, its steps, its state, and that it arrives."""

import json
import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from midskip.model.packing import PackedBatch
from midskip.policies.dense import Dense
from midskip.policies.early_exit import EarlyExit
from midskip.policies.independent import Independent
from midskip.policies.middle_out import SCORES, MiddleOut
from midskip.regularizers import TargetShare, build_regularizer

DEPTHS = (1, 2, 3, 4, 5, 8, 9, 12)


def make(num_layers: int, **settings: Any) -> TargetShare:
    regularizer = build_regularizer("target_share", num_layers, **settings)
    assert isinstance(regularizer, TargetShare)
    return regularizer


def give(regularizer: TargetShare, share_L: Tensor | None) -> None:
    nothing_L = torch.zeros(regularizer.num_layers)
    regularizer.update(nothing_L, nothing_L, share_L)


def over_all_layers(half: Tensor, num_layers: int) -> Tensor:
    return torch.cat([half, half[: num_layers // 2].flip(0)])


# Targets


def test_the_mean_of_the_targets_is_the_target() -> None:
    for num_layers, spread, target in product(DEPTHS, (0.0, 0.3, 1.0), (0.0, 0.05, 0.5, 0.8, 1.0)):
        half = make(num_layers, target_share=target, spread=spread).targets
        targets_L = over_all_layers(half, num_layers)
        assert len(targets_L) == num_layers
        assert targets_L.double().mean().item() == pytest.approx(target, abs=1e-7)
        assert ((targets_L >= 0) & (targets_L <= 1)).all()
        assert (half.diff() <= 0).all(), "deeper layers run for fewer"


def test_the_targets_fall_evenly() -> None:
    for num_layers, (target, d) in product(DEPTHS, ((0.5, 0.5), (0.3, 0.3), (0.9, 0.1))):
        half = make(num_layers, target_share=target, spread=1.0).targets.double()
        if len(half) == 1:
            assert half.item() == pytest.approx(target)
            continue
        # with a middle layer of its own, which counts once, the outermost is not as far above as that is below
        above = d if num_layers % 2 == 0 else d * (num_layers - 1) / (num_layers + 1)
        assert half[0].item() == pytest.approx(target + above, abs=1e-6)
        assert half[-1].item() == pytest.approx(target - d, abs=1e-6)
        torch.testing.assert_close(half.diff(), half.diff().mean().expand(len(half) - 1), atol=1e-6, rtol=0)


def test_outer_layers_run_for_all_and_the_mean_is_still_the_target() -> None:
    for num_layers, target in product((5, 8, 9, 12), (0.5, 0.75, 1.0)):
        half = make(num_layers, target_share=target, outer=1).targets
        assert half[0] == 1 and (half.diff() <= 0).all() and half[-1] > 0
        assert over_all_layers(half, num_layers).mean().item() == pytest.approx(target, abs=1e-6)


def test_no_spread_is_the_same_target_for_every_layer() -> None:
    assert make(9, target_share=0.25, spread=0.0).targets.tolist() == [0.25] * 5


# Updates


@pytest.mark.parametrize("num_layers", [5, 8])
def test_the_bias_moves_by_the_error_and_the_targets_come_down_slowly(num_layers: int) -> None:
    regularizer = make(num_layers, target_share=0.4, spread=0.5, gain=0.25, ramp_steps=4)
    generator = torch.Generator().manual_seed(1)
    num_gates = (num_layers + 1) // 2
    bias, gains, before = torch.zeros(num_gates), torch.ones(num_gates), torch.zeros(num_gates)
    for step in range(1, 8):
        share_L = torch.rand(num_layers, generator=generator)
        target = 1 - (1 - regularizer.targets) * min(1.0, step / 4)
        assert regularizer.expected_share == pytest.approx(1 - 0.6 * min(1.0, step / 4))
        give(regularizer, share_L)
        error = (share_L + share_L.flip(0))[:num_gates] / 2 - target  # of a layer and its mirror
        gains = (gains * torch.where(error * before > 0, 1.2, 0.6)).clamp(0.2, 20)
        bias, before = bias + 0.25 * gains * error, error
        torch.testing.assert_close(regularizer.bias, bias)
    torch.testing.assert_close(target, regularizer.targets)


def test_at_the_target_it_rests() -> None:
    regularizer = make(4, target_share=0.5, ramp_steps=1)
    before = regularizer.bias
    give(regularizer, over_all_layers(regularizer.targets, 4))
    torch.testing.assert_close(regularizer.bias, before, atol=1e-7, rtol=0)


def test_it_adds_nothing_to_the_loss() -> None:
    regularizer = make(3, target_share=0.5)
    give(regularizer, torch.ones(3))
    gates_LBT = torch.rand(3, 2, 5, requires_grad=True)
    loss = regularizer.loss(gates_LBT)
    loss.backward()
    assert loss.item() == 0 and gates_LBT.grad is not None and not gates_LBT.grad.any()


@pytest.mark.parametrize(
    "share_L", [None, torch.ones(3), torch.ones(1, 4), torch.tensor([0.1, 0.2, math.nan, 0.1])], ids=str
)
def test_an_update_needs_the_share_of_every_layer(share_L: Tensor | None) -> None:
    regularizer = make(4, target_share=0.5)
    before = regularizer.state_dict()
    with pytest.raises(ValueError, match=r"share_L must be 4 finite numbers, got"):
        give(regularizer, share_L)
    assert regularizer.state_dict() == before


def test_its_state_survives_json_and_goes_on_bit_for_bit() -> None:
    settings = {"target_share": 0.3, "ramp_steps": 6}
    regularizer, other = make(5, **settings), make(5, **settings)
    shares = torch.rand(8, 5, generator=torch.Generator().manual_seed(2))
    for share_L in shares[:4]:
        give(regularizer, share_L)
    other.load_state_dict(json.loads(json.dumps(regularizer.state_dict())))
    assert not torch.equal(other.bias, make(5, **settings).bias)
    for share_L in shares[4:]:
        give(regularizer, share_L)
        give(other, share_L)
        assert torch.equal(regularizer.bias, other.bias)
    steered = make(8, **settings)
    steered.steer(MiddleOut(8, 4, gates="hard"))
    with pytest.raises(ValueError, match=r"state 'bias' must be finite numbers of shape \[4\]"):
        steered.load_state_dict(regularizer.state_dict())
    with pytest.raises(ValueError, match=r"has the keys \['bias', 'errors', 'gains', 'num_updates'\], got \['bias'\]"):
        other.load_state_dict({"bias": [0.0] * 3})


@pytest.mark.parametrize("outer", [0, 1])
def test_a_state_may_be_loaded_before_the_policy_is_seen(outer: int) -> None:
    saved, loaded = make(4, target_share=0.6, outer=outer), make(4, target_share=0.6, outer=outer)
    policy = Independent(4, 8, outer=outer)
    saved.steer(policy)
    for share_L in torch.rand(5, 4):
        give(saved, share_L)
    loaded.load_state_dict(saved.state_dict())
    loaded.steer(policy)
    assert torch.equal(loaded.bias, saved.bias) and loaded.state_dict() == saved.state_dict()
    other = make(4, target_share=0.6, outer=outer)
    other.load_state_dict(saved.state_dict())
    with pytest.raises(
        ValueError, match=r"the state that was loaded is of \d gates and the policy has 1: load the state"
    ):
        other.steer(EarlyExit(4, 8))


# Steering


def test_steering_sets_the_bias_and_no_optimizer_moves_it() -> None:
    policy = MiddleOut(6, 4, start="spread")
    policy.reset_parameters()
    regularizer = make(6, target_share=0.5, ramp_steps=1)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1, weight_decay=0.5)
    regularizer.steer(policy)
    for share in (1.0, 0.7, 0.2):
        give(regularizer, torch.full((6,), share))
        regularizer.steer(policy)
        bias = policy.bias.clone()
        assert torch.equal(bias, policy.open_bias + regularizer.bias)
        h_ND = torch.randn(9, 4)
        decision = policy.decide(0, h_ND, {}, PackedBatch.from_rectangle(torch.ones(1, 9, dtype=torch.bool)))
        before = policy.weight.detach().clone()
        assert decision.output_gate_N is not None
        decision.output_gate_N.sum().backward()
        optimizer.step()
        assert torch.equal(policy.bias, bias) and policy.bias.grad is None
        assert not torch.equal(policy.weight, before), "the weights still learn"


@pytest.mark.parametrize("gates", ["soft", "hard"])
def test_taking_an_open_policy_over_changes_nothing(gates: str) -> None:
    for num_layers in (1, 5, 8):
        policy = MiddleOut(num_layers, 4, gates=gates)
        policy.reset_parameters()
        before = policy.bias.clone()
        make(num_layers, target_share=0.5).steer(policy)
        assert torch.equal(policy.bias, before)


def test_outer_layers_that_alone_are_more_are_refused() -> None:
    message = r"target_share is 0\.4 and the layers that run for every token alone are 0\.5"
    regularizer = make(4, target_share=0.4, outer=1)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            regularizer.steer(MiddleOut(4, 8, gates="hard"))
    make(4, target_share=0.4, outer=1).steer(EarlyExit(4, 8, scores="straight_through"))  # its last layers are none


def test_other_policies_are_refused() -> None:
    with pytest.raises(ValueError, match="the policy Dense has no gates that a regularizer can set"):
        make(4, target_share=0.5).steer(Dense(4, 8))


def shares_over(regularizer: TargetShare, policy: MiddleOut, steps: int) -> tuple[Tensor, list[float]]:
    """Shares [steps, L] of a policy steered on hidden states that drift, as they do in training; and those expected."""
    generator = torch.Generator().manual_seed(0)
    if policy.weight is not None:
        policy.weight.normal_(std=0.05, generator=generator)
    drift_D = 0.02 * torch.randn(policy.width, generator=generator)
    batch = PackedBatch.from_rectangle(torch.ones(4, 128, dtype=torch.bool))
    shares, expected = [], []
    for step in range(steps):
        regularizer.steer(policy)
        if policy.adjustable:
            policy.set_limits(regularizer.score_scales[-1])
        h_ND = torch.randn(512, policy.width, generator=generator) * (1 + step / 300) + step * drift_D
        batch.token_N = torch.randint(200, (512,), generator=generator)
        batch.__dict__.pop("previous_token_N", None)  # of the step before
        if policy.difficulty is not None:
            nats_N = torch.rand(512, generator=generator) + batch.token_N / (100 + step)
            policy.difficulty.observe(batch.token_N, batch.previous_token_N, nats_N, torch.ones(512).bool())
            policy.absorb()
        state: dict[str, Any] = {}
        keeps = [policy(layer, h_ND, state, batch).keep_N for layer in range(policy.num_layers)]
        shares.append(torch.stack([keep_N.float().mean() for keep_N in keeps if keep_N is not None]))
        expected.append(regularizer.expected_share)
        give(regularizer, shares[-1])
    return torch.stack(shares), expected


@pytest.mark.parametrize(
    ("num_layers", "target", "settings"),
    [(5, 0.4, {}), *((8, 0.6, {"gates": "hard", "scores": scores}) for scores in SCORES)],
)
@torch.no_grad()
@pytest.mark.integration
def test_the_share_arrives_at_its_target_and_stays(num_layers: int, target: float, settings: dict[str, str]) -> None:
    policy = MiddleOut(num_layers, 16, **settings)
    policy.reset_parameters()
    regularizer = make(num_layers, target_share=target)
    shares_SL, _ = shares_over(regularizer, policy, 300)
    assert shares_SL[0].mean() > 0.95, "it starts with everything running"
    # half-way down the ramp it is half-way down, about
    assert abs(shares_SL[20:30].mean().item() - (1 + target) / 2) < 0.15
    assert abs(shares_SL[100:200].mean().item() - target) < 0.02
    assert abs(shares_SL[200:].mean().item() - target) < 0.02
    by_layer = over_all_layers(regularizer.targets, num_layers)
    torch.testing.assert_close(shares_SL[200:].mean(0), by_layer, atol=0.05, rtol=0)


@torch.no_grad()
def test_shares_are_drawn_every_second_step_and_held_as_at_run_time() -> None:
    policy = MiddleOut(8, 16, gates="hard")
    policy.reset_parameters()
    regularizer = make(8, target_share=0.5, lowest_share=0.3)
    shares_SL, expected = shares_over(regularizer, policy, 600)
    drawn = expected[100::2]
    assert set(expected[101::2]) == {0.5}
    assert min(drawn) < 0.31 and max(drawn) > 0.98 and abs(sum(drawn) / len(drawn) - 0.65) < 0.01
    errors = shares_SL.mean(1) - torch.tensor(expected)
    assert abs(errors[300::2].mean()) < 0.02 and abs(errors[301::2].mean()) < 0.02
    assert errors[300:].abs().mean() < 0.06
    all_of_it, lowest, _ = regularizer.score_scales
    policy.set_limits(lowest)
    batch = PackedBatch.from_rectangle(torch.ones(4, 128, dtype=torch.bool))
    batch.token_N, state, h_ND = torch.randint(200, (512,)), {}, torch.zeros(512, 16)
    kept = [policy(layer, h_ND, state, batch).keep_N for layer in range(8)]
    ran = torch.stack([keep_N for keep_N in kept if keep_N is not None])
    assert all_of_it == 0 and abs(ran.float().mean().item() - 0.3) < 0.06
    assert make(8, target_share=0.5, lowest_share=0.3).score_scales == (1.0,), "one pass on the ramp"
    assert make(8, target_share=0.5).score_scales == (1.0,)
    # the state goes on with the same draws
    other = make(8, target_share=0.5, lowest_share=0.3)
    other.load_state_dict(json.loads(json.dumps(regularizer.state_dict())))
    assert (other.drawn_share, other.score_scales) == (regularizer.drawn_share, regularizer.score_scales)


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {},
            "regularizer 'target_share' got .*: missing a required argument: 'target_share'; its settings are: target",
        ),
        ({"target_share": 0.5, "targets": 3}, "targets.*; its settings are: target_share, lowest_share, outer, spread"),
        ({"target_share": -0.1}, r"target_share must be a number from 0 to 1, got -0\.1"),
        ({"target_share": 50}, "target_share must be .*, got 50"),
        ({"target_share": "half"}, "target_share must be .*, got 'half'"),
        ({"target_share": True}, "target_share must be .*, got True"),
        ({"target_share": math.nan}, "target_share must be .*, got nan"),
        ({"target_share": 0.5, "spread": 1.5}, r"spread must be a number from 0 to 1, got 1\.5"),
        ({"target_share": 0.5, "outer": 2}, "outer must be a whole number from 0 to 1, got 2"),
        ({"target_share": 0.3, "lowest_share": 0.6}, r"lowest_share is 0\.6 and target_share 0\.3; expected the first"),
        ({"target_share": 0.5, "gain": -1}, "gain must be a number from 0 to .*, got -1"),
        ({"target_share": 0.5, "ramp_steps": 0}, "ramp_steps must be a number from 1 to .*, got 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_regularizer("target_share", 4, **settings)
