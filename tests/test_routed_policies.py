"""Policies beside middle_out against what they say they do; and a share is held for each that has gates to set."""

import math
from collections.abc import Callable
from itertools import cycle
from typing import Any

import pytest
import torch
from test_policies import decide_all, rectangle
from tiny_runs import QUIET, history
from torch import Tensor, nn

from midskip import MidskipForCausalLM, meter
from midskip.model.packing import PackedBatch
from midskip.policies import Policy, build_policy
from midskip.policies.controls import Redrawn
from midskip.policies.early_exit import EarlyExit
from midskip.policies.middle_out import MiddleOut
from midskip.policies.mixture_of_depths import MixtureOfDepths
from midskip.policies.scored import Router, ScoredPolicy, uniform
from midskip.testing import check_policy
from midskip.train import Recipe, train

ROUTED = {
    "independent": {"router": "linear"},
    "independent, some": {"outer": 1, "first_tokens": 2},
    "early_exit": {"scores": "straight_through"},
    "early_exit, by loss": {},
    "early_exit, some": {"scores": "straight_through", "router": "linear", "first_tokens": 1},
    "middle_out, some": {"gates": "hard", "scores": "linear", "first_tokens": 1},
    "mixture_of_depths": {"capacity": 0.5},
    "reinforce": {"cost": 0.1},
}
CONTROLS = {
    "static": {"share": 0.5},
    "random": {"share": 0.4},
    "random, exits": {"kind": "early_exit"},
    "random, middle": {"kind": "middle_out", "outer": 1},
}


def make(name: str, num_layers: int = 6, width: int = 8, **settings: Any) -> Any:
    given = {**ROUTED, **CONTROLS}.get(name, {}) | settings
    policy = build_policy(name.split(",")[0], num_layers, width, 0.02, given)
    policy.reset_parameters()
    return policy


def kept(policy: Policy, h_LND: Tensor, batch: PackedBatch) -> Tensor:
    """bool [L, N]."""
    decisions, _ = decide_all(policy, h_LND, batch)
    return torch.stack([torch.ones(len(h_LND[0])).bool() if d.keep_N is None else d.keep_N for d in decisions])


@pytest.mark.parametrize(("name", "skipped_kv"), list(zip([*ROUTED, *CONTROLS], cycle(["keep", "drop"]))))
@pytest.mark.integration
def test_the_contract(name: str, skipped_kv: str) -> None:
    check_policy(
        name.split(",")[0], {**ROUTED, **CONTROLS}[name], num_layers=4 if "middle" in name else 3, skipped_kv=skipped_kv
    )


# ---- what each decides


@torch.no_grad()
def test_independent_may_leave_out_layers_and_first_tokens() -> None:
    policy, h_LND = make("independent", outer=2, first_tokens=3), torch.randn(6, 40, 8)
    policy.bias.fill_(1e3)  # readiest to skip
    kept_LN = kept(policy, h_LND, rectangle(1, 40))
    assert kept_LN[[0, 1, 4, 5]].all() and kept_LN[2:4, :3].all() and not kept_LN[2:4, 3:].any()
    assert policy.share_profile(0) == [None, None, 0.0, 0.0, None, None]


@torch.no_grad()
@pytest.mark.parametrize("name", ["early_exit, some", "early_exit, by loss", "middle_out, some", "middle_out"])
def test_first_tokens_do_not_leave(name: str) -> None:
    settings = {"gates": "hard"} if name == "middle_out" else {}
    policy, h_LND, batch = make(name, first_tokens=3, **settings), torch.randn(6, 40, 8), rectangle(1, 40)
    batch.token_N = torch.randint(31, (40,))
    policy.bias.fill_(1e3)
    kept_LN = kept(policy, h_LND, batch)
    assert kept_LN[:, :3].all() and not kept_LN[:, 3:].any()
    policy.set_limits(1.0, max_layers=1)
    assert kept(policy, h_LND, batch).sum(0).max() <= 1


@pytest.mark.parametrize("name", ["early_exit", "mixture_of_depths", "reinforce", "random", "Redrawn"])
def test_what_is_counted_in_training_starts_at_0(name: str) -> None:
    """A dense model's checkpoint lacks it, and its memory is then not set."""
    policy = Redrawn(4, 8) if name == "Redrawn" else build_policy(name, 4, 8, 0.02, {})
    for buffer in policy.buffers():
        buffer.fill_(7)
    policy.reset_parameters()
    assert dict(policy.named_buffers())["num_steps"] == 0 and not any(buffer.any() for buffer in policy.buffers())


@torch.no_grad()
@pytest.mark.parametrize("scores", ["predicted_loss", "straight_through"])
def test_first_tokens_that_drop_out_do_not_come_back(scores: str) -> None:
    policy = make("early_exit", scores=scores, first_tokens=3, layer_dropout=1.0).train()
    batch = rectangle(8, 5)
    batch.token_N = torch.randint(31, (40,))
    policy.bias.fill_(-1e3)
    kept_LN = kept(policy, torch.randn(6, 40, 8), batch)
    assert kept_LN[0].all() and not kept_LN[-1].any() and kept_LN[1:-1].any()
    assert not (kept_LN[1:] & ~kept_LN[:-1]).any()


@torch.no_grad()
@pytest.mark.parametrize("name", ["independent", "early_exit, some", "middle_out, some"])
def test_a_linear_gate_is_set(name: str) -> None:
    policy, h_LND = make(name, first_tokens=0), torch.randn(6, 40, 8)
    assert policy.has_linear_gates
    policy.bias.fill_(-1e4)
    weight_D = torch.randn(8)
    policy.set_linear_gate(2, weight_D, 0.5)
    normed_ND = h_LND[2] / h_LND[2].square().mean(1, keepdim=True).sqrt()
    kept_LN = kept(policy, h_LND, rectangle(1, 40))
    assert torch.equal(kept_LN[2], normed_ND @ weight_D > 0.5) and kept_LN[:2].all()
    away = [layer for layer in range(6) if not kept_LN[layer].all()]
    assert away == list(range(2, policy.skip_path_end(2)))
    for other in ("early_exit, by loss", "reinforce"):
        with pytest.raises(ValueError, match="has no gates that are a linear map"):
            make(other).set_linear_gate(0, weight_D, 0.0)


@torch.no_grad()
def test_independent_layers_ask_anew() -> None:
    policy, h_LND = make("independent"), torch.randn(6, 40, 8)
    policy.bias.copy_(torch.linspace(-1, 1, 6))
    normed_LND = h_LND / h_LND.square().mean(-1, keepdim=True).sqrt()
    above_LN = torch.stack(
        [(y @ router.weight[0]) > b for y, router, b in zip(normed_LND, policy.routers, policy.bias)]
    )
    assert torch.equal(kept(policy, h_LND, rectangle(4, 10)), above_LN)
    assert (above_LN[1:] & ~above_LN[:-1]).any(), "who skips a layer may run the next"
    policy.set_limits(1.0, 2)
    assert torch.equal(kept(policy, h_LND, rectangle(4, 10)), above_LN & (above_LN.cumsum(0) <= 2))


@torch.no_grad()
@pytest.mark.parametrize("scores", ["predicted_loss", "straight_through"])
def test_early_exit_is_for_good(scores: str) -> None:
    policy, h_LND = make("early_exit", scores=scores), torch.randn(6, 40, 8)
    policy.bias.fill_(-0.3)
    above_LN = torch.stack([router(h_ND) > -0.3 for router, h_ND in zip(policy.routers, h_LND)])
    kept_LN = kept(policy, h_LND, rectangle(4, 10))
    assert torch.equal(kept_LN, above_LN.long().cummin(0).values.bool())
    state, batch = {}, rectangle(4, 10)
    for layer, h_ND in enumerate(h_LND):  # who has left is not scored again
        policy(layer, h_ND, state, batch)
        scored = int(kept_LN[layer - 1].sum()) if layer else 40
        assert policy.flops(layer, state, batch) == policy.routers[layer].flops * scored
    policy.set_limits(1.0, 2)
    assert torch.equal(kept(policy, h_LND, rectangle(4, 10))[:2], kept_LN[:2])
    assert not kept(policy, h_LND, rectangle(4, 10))[2:].any()


@pytest.mark.parametrize("exit_share", [1.0, 0.6])
def test_early_exit_learns_what_leaving_costs(make_model: Callable[..., MidskipForCausalLM], exit_share: float) -> None:
    """The router's squared error and the exit loss, of the tokens present in the layer whose turn it is, or of a share
    of them."""
    model = make_model(None, policy="early_exit", policy_settings={"exit_share": exit_share}, num_hidden_layers=3)
    policy = model.model.policy
    assert isinstance(policy, EarlyExit)
    ids_BT, total = torch.randint(31, (2, 9)), 0
    for layer in range(3):
        nn.init.constant_(policy.bias, policy.mean_L[:layer].mean().item() if layer else -1)  # half of the tokens leave
        output = model(ids_BT, labels=ids_BT, output_hidden_states=True)
        h_BTD = output.hidden_states[layer] if layer < 3 else None
        present_BT = output.executed[layer - 1] if layer else torch.ones(2, 9).bool()
        logits_BTV = model.lm_head(model.model.norm(h_BTD))[:, :-1]
        nats = torch.nn.functional.cross_entropy(logits_BTV.transpose(1, 2), ids_BT[:, 1:], reduction="none")
        predicted = policy.routers[layer](h_BTD.flatten(0, 1)).view(2, 9)[:, :-1]
        batch = rectangle(2, 9)
        batch.token_N = ids_BT.flatten()
        drawn_BT = uniform(batch, layer).view(2, 9) < exit_share
        counted = (present_BT & drawn_BT)[:, :-1]
        expected = ((0.1 * (predicted - nats).square() + 0.1 * nats) * counted).sum() / counted.sum()
        torch.testing.assert_close(output.auxiliary_loss, expected)
        total += int(counted.sum())
        policy.absorb()
        torch.testing.assert_close(policy.mean_L[layer], (nats * counted).sum() / counted.sum(), check_dtype=False)
    assert (16 if exit_share == 1 else 4) < total < 48 * exit_share, "somebody left, and somebody stayed"
    nn.init.constant_(policy.bias, 50.0)
    known = policy.mean_L.clone()
    for layer in range(3):  # where nobody is, nothing is learned
        model(ids_BT.flip(1), labels=ids_BT.flip(1))
        policy.absorb()
        assert torch.equal(policy.mean_L[layer], known[layer]) == (layer > 0)
    assert model.eval()(ids_BT, labels=ids_BT).auxiliary_loss is None


def test_mixture_of_depths_trains_by_rank_and_runs_by_a_threshold() -> None:
    policy = make("mixture_of_depths", capacity=0.25, ramp_steps=1)
    assert isinstance(policy, MixtureOfDepths)
    valid_BT = torch.ones(3, 20).bool()
    valid_BT[1, 11:] = False
    batch, h_LND = PackedBatch.from_rectangle(valid_BT), torch.randn(6, 51, 8)
    decisions, state = decide_all(policy.train(), h_LND, batch)
    policy.observe(state, torch.zeros(51), torch.ones(51).bool())
    policy.absorb()
    lowest = []
    for layer, decision in enumerate(decisions):
        if layer % 2 == 0:
            assert decision.keep_N is None
            continue
        numbers = policy.routers[layer // 2](h_LND[layer]).split(batch.seqlens)
        best = [number.topk(math.ceil(len(number) / 4)).values.min() for number in numbers]
        expected = torch.cat([number >= least for number, least in zip(numbers, best)])
        assert torch.equal(decision.keep_N, expected)
        lowest.append(torch.stack(best).mean())
    assert decisions[1].output_gate_N.requires_grad
    torch.testing.assert_close(policy.bias.detach(), torch.stack(lowest).detach())
    kept_LN = kept(policy.eval(), h_LND, batch)
    for layer in (1, 3, 5):
        assert torch.equal(kept_LN[layer], policy.routers[layer // 2](h_LND[layer]) > lowest[layer // 2])
    with pytest.raises(ValueError, match="the policy MixtureOfDepths has no gates that a regularizer can set"):
        policy.share_profile(0)


def test_reinforce_makes_what_pays_more_likely(make_model: Callable[..., MidskipForCausalLM]) -> None:
    """Where layers cost and losses are all alike, they are skipped; where running pays, they are run."""
    for cost, sign in ((5.0, -1), (0.0, 1)):
        policy = make("reinforce", num_layers=2, cost=cost, weight=1.0).train()
        torch.nn.init.constant_(policy.bias, 0.0)
        optimizer = torch.optim.Adam(policy.routers.parameters(), 0.02)
        h_ND, before = torch.randn(400, 8), None
        for _ in range(60):
            batch = rectangle(4, 100)
            decisions, state = decide_all(policy, h_ND.expand(2, -1, -1), batch)
            share_N = torch.stack([decision.keep_N for decision in decisions]).float().mean(0)
            before = share_N.mean() if before is None else before
            nats_N = torch.full((400,), 2.0) if cost else 3 - 2 * share_N
            loss = policy.objective(state, nats_N, torch.ones(400).bool(), lambda h, i: h)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            policy.absorb()
        assert sign * (share_N.mean() - before) > 0.2


@pytest.mark.parametrize("kind", ["independent", "early_exit", "middle_out"])
def test_random_skips_have_their_share_and_shape(kind: str) -> None:
    for share, outer in ((0.3, 0), (0.5, 1), (0.9, 1)):
        policy = make("random", num_layers=8, kind=kind, share=share, outer=outer)
        kept_LN = kept(policy.eval(), torch.zeros(8, 6000, 8), batch := rectangle(1, 6000))
        assert kept_LN.float().mean() == pytest.approx(share, abs=0.02)
        assert kept_LN[:outer].all()
        if kind == "early_exit":
            assert torch.equal(kept_LN, kept_LN.long().cummin(0).values.bool())
        if kind == "middle_out":
            assert torch.equal(kept_LN, kept_LN.flip(0))
        policy.train()
        first = kept(policy, torch.zeros(8, 6000, 8), batch)
        policy.absorb()
        assert not torch.equal(first, kept(policy, torch.zeros(8, 6000, 8), batch))
        assert torch.equal(kept_LN, kept(policy.eval(), torch.zeros(8, 6000, 8), batch))


@pytest.mark.parametrize("by", ["pair", "token"])
def test_random_skips_by_pair_or_token_are_the_same_wherever_it_stands(by: str) -> None:
    policy = make("random", num_layers=8, share=0.5, outer=1, redraw=False, by=by).train()
    batch = rectangle(1, 6000)
    batch.token_N = torch.randint(50, (6000,))
    batch.previous_token_N = batch.token_N.roll(1)
    kept_LN = kept(policy, torch.zeros(8, 6000, 8), batch)
    policy.absorb()
    assert torch.equal(kept_LN, kept(policy, torch.zeros(8, 6000, 8), batch)), "not drawn anew"
    assert kept_LN.float().mean() == pytest.approx(0.5, abs=0.03) and not torch.equal(kept_LN[1], kept_LN[2])
    group_N = batch.token_N * 50 + batch.previous_token_N if by == "pair" else batch.token_N
    ran_LG = torch.zeros(8, 2500).index_add(1, group_N, kept_LN.float())
    assert ((ran_LG == 0) | (ran_LG == group_N.bincount(minlength=2500))).all(), "a layer runs for all of it, or none"


def test_random_skips_may_have_a_share_for_each_layer() -> None:
    shares = [1, 0, 0.25, 0.8]
    policy = make("random", num_layers=4, share=None, shares=shares, redraw=False).eval()
    ran_L = kept(policy, torch.zeros(4, 6000, 8), rectangle(1, 6000)).float().mean(1)
    assert ran_L.tolist() == pytest.approx(shares, abs=0.02) and ran_L[:2].tolist() == [1, 0]


def test_static_runs_its_layers() -> None:
    for settings, expected in (({"share": 0.5}, [0, 1, 5]), ({"layers": [1, 4], "share": None}, [1, 4])):
        policy = make("static", **settings)
        assert kept(policy, torch.zeros(6, 5, 8), rectangle(1, 5)).all(1).nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("kind", ["linear", "bottleneck"])
def test_a_router_counts_its_flops_and_stays_in_float32(kind: str) -> None:
    router = Router(24, kind)
    router.reset_parameters(torch.nn.init)
    h_ND = torch.randn(2000, 24)
    assert router.flops == 2 * sum(parameter.numel() for parameter in router.parameters())
    assert router(h_ND).std().item() == pytest.approx(1, abs=0.75), "numbers of about normal spread at the start"
    torch.testing.assert_close(router(7 * h_ND), router(h_ND), rtol=1e-3, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(router(h_ND), router(h_ND.clone())) and router(h_ND).dtype == torch.float32
    assert router.bfloat16()(h_ND.bfloat16()).dtype == torch.float32


# ---- trained


@pytest.mark.usefixtures("no_pictures", "on_the_cpu")
@pytest.mark.parametrize("name", ["independent", "early_exit, by loss", "reinforce", "mixture_of_depths"])
@pytest.mark.integration
def test_a_share_is_held_in_training(make_recipe: Callable[..., Recipe], name: str) -> None:
    holds_its_own = name == "mixture_of_depths"
    regularizer = ("none", {}) if holds_its_own else ("target_share", {"target_share": 0.6, "ramp_steps": 10})
    settings = ROUTED[name] | ({"ramp_steps": 10} if holds_its_own else {})
    recipe = make_recipe(
        *regularizer, max_steps=40, learning_rate=0.003, per_device_train_batch_size=8,
        model={"policy": name.split(",")[0], "policy_settings": settings},
    )  # fmt: skip
    report = train(recipe, console=QUIET)
    rows, target = history(recipe), 0.75 if holds_its_own else 0.6
    late = sum(row["executed_share"] for row in rows[-15:]) / 15
    assert late == pytest.approx(target, abs=0.06) and rows[0]["executed_share"] > 0.9
    assert report["validation"]["executed_share"] == pytest.approx(target, abs=0.12)
    assert all(math.isfinite(row["auxiliary"]) for row in rows)
    assert any(row["auxiliary"] for row in rows) is (name in ("early_exit, by loss", "reinforce"))
    assert rows[5]["total"] == pytest.approx(
        sum(rows[5][part] for part in ("cross_entropy", "regularizer", "auxiliary"))
    )


@torch.no_grad()
@pytest.mark.parametrize("name", [*ROUTED, *CONTROLS])
def test_what_ran_is_what_is_claimed(make_model: Callable[..., MidskipForCausalLM], name: str) -> None:
    """Rows that went into the queries' projection, by hooks of this test, against outputs and meter."""
    settings = {**ROUTED, **CONTROLS}[name]
    model = make_model(None, policy=name.split(",")[0], policy_settings=settings, num_hidden_layers=4).eval()
    policy, seen = model.model.policy, [0] * 4
    if isinstance(policy, ScoredPolicy | MiddleOut):
        policy.bias.fill_(-0.2)  # half of the tokens stay, or about
    for layer, block in enumerate(model.model.layers):
        block.self_attn.q_proj.register_forward_pre_hook(
            lambda _, given, layer=layer: seen.__setitem__(layer, seen[layer] + len(given[0]))
        )
    for batch_size in (1, 8, 32):
        ids_BT, cache, claimed_L = torch.randint(31, (batch_size, 13)), None, torch.zeros(4, dtype=torch.int64)
        seen[:] = [0] * 4
        with meter(model) as work:
            for part_BT in ids_BT.split([9, 1, 1, 2], 1):  # a prompt, and steps of decoding
                output = model(part_BT, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                claimed_L += output.executed.sum((1, 2))
        assert seen == claimed_L.tolist() == list(work.query_rows_L)
        assert work.executed_share == pytest.approx(sum(seen) / (4 * 13 * batch_size))
    assert 0 < sum(seen) < 4 * 13 * 32
