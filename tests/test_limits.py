"""A policy under limits: against its equations, the reference and the dense model; and what may not be set."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from midskip import MidskipForCausalLM
from midskip.cost import Meter
from midskip.model.packing import PackedBatch
from midskip.policies import Decision, Policy
from midskip.policies.dense import Dense
from midskip.policies.middle_out import MiddleOut
from midskip.testing import check_policy, reference_forward
from midskip.testing.limits import limits

Make = Callable[..., MidskipForCausalLM]


def outputs(model: MidskipForCausalLM, ids_BT: Tensor, valid_BT: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        output = model(ids_BT, attention_mask=valid_BT, labels=ids_BT, output_hidden_states=True)
    hidden = torch.stack(output.hidden_states)
    scores = () if output.depth_scores is None else (("depth_scores", output.depth_scores.clamp(max=1)),)
    return {"loss": output.loss, "logits": output.logits, "gates": output.gates, "hidden": hidden, **dict(scores)}


# ---- what limits do


@pytest.mark.parametrize("num_layers", [1, 2, 5, 6])
def test_gates_are_those_of_the_scaled_sum_below_the_ceiling(num_layers: int) -> None:
    policy = MiddleOut(num_layers, 8).eval()
    nn.init.normal_(policy.weight, std=0.2)
    nn.init.normal_(policy.bias, std=0.1)
    h_LND, batch = torch.randn(num_layers, 63, 8), PackedBatch.from_rectangle(torch.ones(7, 9).bool())
    for score_scale, max_layers in product((0.0, 0.5, 1.0, 3.0), (None, *range(1, num_layers + 1))):
        policy.set_limits(score_scale, max_layers)
        state: dict[str, Any] = {}
        decisions = [policy(layer, h_ND, state, batch) for layer, h_ND in enumerate(h_LND)]
        total_N = torch.zeros(63)
        for layer in range((num_layers + 1) // 2):
            total_N = total_N + (h_LND[layer] @ policy.weight[layer] + policy.bias[layer]).relu()
            entered = len({layer for outer in range(layer + 1) for layer in (outer, num_layers - 1 - outer)})
            gate_N = 1 - (score_scale * total_N).clamp(0, 1)
            if max_layers is not None and entered > max_layers:
                gate_N = torch.zeros(63)
            decision = decisions[layer]
            torch.testing.assert_close(decision.output_gate_N, gate_N)
            assert torch.equal(decision.keep_N, decision.output_gate_N > 0)
            torch.testing.assert_close(1 - state["depth_scores"][layer].clamp(max=1), gate_N)
            assert decisions[num_layers - 1 - layer] is decision
            scored = (
                0 if max_layers is not None and entered > max_layers else policy._scored(layer, state, batch).num_tokens
            )
            assert policy.flops(layer, state, batch) == 2 * 8 * scored


@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
@pytest.mark.parametrize("num_layers", [4, 5])
def test_factor_0_is_the_dense_model(
    make_model: Make, ragged: tuple[Tensor, Tensor], num_layers: int, skipped_kv: str
) -> None:
    model = make_model("mixed", num_hidden_layers=num_layers, skipped_kv=skipped_kv).eval()
    dense = make_model(policy="dense", num_hidden_layers=num_layers, skipped_kv=skipped_kv).eval()
    dense.load_state_dict(model.state_dict(), strict=False)
    expected = outputs(dense, *ragged)
    model.model.policy.set_limits(0.0)
    got = outputs(model, *ragged)
    assert (got["gates"][:, ragged[1].bool()] == 1).all()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor.double(), rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
@pytest.mark.parametrize(
    ("score_scale", "max_layers", "num_layers"), [(0.4, None, 4), (2.5, None, 5), (1.0, 2, 4), (0.4, 3, 5), (0.0, 2, 5)]
)
def test_packed_is_reference_under_limits(
    make_model: Make,
    ragged: tuple[Tensor, Tensor],
    skipped_kv: str,
    score_scale: float,
    max_layers: int | None,
    num_layers: int,
) -> None:
    model = make_model("mixed", num_hidden_layers=num_layers, skipped_kv=skipped_kv).eval()
    as_trained = outputs(model, *ragged)
    with limits(model.model.policy, score_scale, max_layers):
        got = outputs(model, *ragged)
        with torch.no_grad():
            reference = reference_forward(model, ragged[0], ragged[1], labels=ragged[0])
    expected = {
        "loss": reference.loss,
        "logits": reference.logits,
        "gates": reference.gates,
        "hidden": reference.hidden_states,
    }
    expected["depth_scores"] = reference.depth_scores.clamp(max=1)
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-12, msg=name)
    assert not torch.equal(got["gates"], as_trained["gates"]), "the limits did something"
    assert all(torch.equal(x, as_trained[name]) for name, x in outputs(model, *ragged).items()), "and is gone"


@pytest.mark.parametrize(("num_layers", "most"), [(1, [1]), (4, [0, 2, 2, 4]), (5, [0, 2, 2, 4, 5])])
def test_no_token_runs_more_blocks_than_the_ceiling(
    make_model: Make, ragged: tuple[Tensor, Tensor], num_layers: int, most: list[int]
) -> None:
    model = make_model("kept", num_hidden_layers=num_layers).eval()
    for max_layers, blocks in enumerate(most, 1):
        model.model.policy.set_limits(1.0, max_layers)
        with Meter(model) as meter, torch.no_grad():
            gates = model(*ragged).gates
        assert ((gates > 0).sum(0)[ragged[1].bool()] == blocks).all()
        assert sum(meter.query_rows_L) == blocks * int(ragged[1].sum()), "and no block ran on more"


def test_limits_are_not_saved(make_model: Make, tmp_path: Any) -> None:
    model = make_model("mixed", torch.float32)
    names = set(model.state_dict())
    model.model.policy.set_limits(0.5, 2)
    assert set(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    policy = MidskipForCausalLM.from_pretrained(tmp_path).model.policy
    assert (policy.score_scale, policy.max_layers) == (1.0, None)


# ---- what may not be set


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-0.1,), r"score_scale is -0\.1; expected a finite number of at least 0"),
        ((float("inf"),), "score_scale is inf"),
        ((float("nan"),), "score_scale is nan"),
        (("1",), "score_scale is '1'"),
        ((True,), "score_scale is True"),
        ((1.0, 0), "max_layers is 0; expected a whole number of blocks from 1 to 4, or None"),
        ((1.0, 5), "max_layers is 5"),
        ((1.0, 2.0), r"max_layers is 2\.0"),
        ((1.0, True), "max_layers is True"),
    ],
)
def test_limits_out_of_range_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    policy = MiddleOut(4, 8)
    policy.set_limits(0.5, 2)
    with pytest.raises(ValueError, match=message):
        policy.set_limits(*arguments)
    assert (policy.score_scale, policy.max_layers) == (0.5, 2), "what was set stays"


def test_a_policy_without_a_budget_says_so() -> None:
    policy = Dense(4, 8)
    policy.set_limits()
    for arguments in ((0.0,), (1.0, 4)):
        with pytest.raises(ValueError, match="the policy Dense has no run-time budget"):
            policy.set_limits(*arguments)


@pytest.mark.parametrize(("score_scale", "max_layers"), [(0.5, None), (1.5, 2)])
def test_training_under_an_effort_is_as_in_evaluation(
    make_model: Make, score_scale: float, max_layers: int | None
) -> None:
    model, ids_BT = make_model("mixed"), torch.randint(31, (3, 9))
    as_trained = model(ids_BT).gates
    model.model.policy.set_limits(score_scale, max_layers)
    under = model.train()(ids_BT).gates
    assert torch.equal(under, model.eval()(ids_BT).gates) and not torch.equal(under, as_trained)


# ---- the contract for other people's policies


class Deep(Policy):
    """All run the first of two layers; the second those whose first hidden feature, scaled, is below 1."""

    adjustable = True

    def decide(self, layer: int, h_ND: Tensor, state: dict[str, Any], batch: PackedBatch) -> Decision:
        if self.max_layers is not None and layer >= self.max_layers:
            return Decision(torch.zeros(len(h_ND), dtype=torch.bool))
        return Decision(self.score_scale * h_ND[:, 0] < 1)


class DeafToScale(Deep):
    def decide(self, layer: int, h_ND: Tensor, state: dict[str, Any], batch: PackedBatch) -> Decision:
        return Decision(h_ND[:, 0] < 0 if layer else None)


class DeafToMaxLayers(Deep):
    def decide(self, layer: int, h_ND: Tensor, state: dict[str, Any], batch: PackedBatch) -> Decision:
        return Decision(self.score_scale * h_ND[:, 0] < 1)


class Backwards(Deep):
    def decide(self, layer: int, h_ND: Tensor, state: dict[str, Any], batch: PackedBatch) -> Decision:
        return Decision(None if self.score_scale == 0 else h_ND[:, 0] < self.score_scale)


class BackwardsBelow(Backwards):
    """The first layer is as it should be."""

    def decide(self, layer: int, h_ND: Tensor, state: dict[str, Any], batch: PackedBatch) -> Decision:
        return super().decide(layer, h_ND, state, batch) if layer else Decision()


class Shared(Deep):
    """Looks at who shares the batch, under one of the limits that are tried."""

    def decide(self, layer: int, h_ND: Tensor, state: dict[str, Any], batch: PackedBatch) -> Decision:
        if self.score_scale != 3.0:
            return super().decide(layer, h_ND, state, batch)
        return Decision(torch.full((len(h_ND),), batch.batch_size == 1))


class Sticky(Deep):
    """Remembers a max_layers after it was taken back."""

    lowest: int | None = None

    def decide(self, layer: int, h_ND: Tensor, state: dict[str, Any], batch: PackedBatch) -> Decision:
        self.lowest = self.max_layers if self.lowest is None else min(self.lowest, self.max_layers or self.lowest)
        return Decision(torch.full((len(h_ND),), self.lowest is None or layer < self.lowest))


@pytest.mark.parametrize(
    ("policy", "problem"),
    [
        (Deep, ""),
        (DeafToScale, "'budget' failed: under score_scale 0 a token does not run every block"),
        (DeafToMaxLayers, r"'budget' failed: a token runs 2 blocks under max_layers 1 "),
        (Backwards, "'budget' failed: score_scale 1.0 keeps a token in layer 0 that a smaller one sends away"),
        (BackwardsBelow, "'budget' failed: score_scale 1.0 keeps a token in layer 1 that a smaller one sends away"),
        (Shared, r"failed: .*score_scale 3.0, max_layers None"),
        (Sticky, "'budget' failed: after limits were set and taken back"),
    ],
)
def test_the_contract_sees_what_is_wrong(policy: type[Policy], problem: str) -> None:
    def check() -> None:
        check_policy(f"{policy.__module__}:{policy.__name__}", num_layers=2, skipped_kv="drop")

    if not problem:
        return check()
    with pytest.raises(AssertionError, match=problem):
        check()
