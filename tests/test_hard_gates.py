"""Gates of exactly 0 or 1: their equations, how they learn, and what they must not change."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_exactness import check_equal, norm
from torch import Tensor, nn

from midskip import MidskipForCausalLM
from midskip.model.packing import PackedBatch
from midskip.policies import Decision, Policy
from midskip.policies.controls import Redrawn
from midskip.policies.difficulty import MEMORY, Difficulty, drawn, kinds
from midskip.policies.middle_out import BY_STATES, SCORES, MiddleOut
from midskip.regularizers import build_regularizer
from midskip.testing import check_policy
from midskip.testing.limits import limits

Make = Callable[..., MidskipForCausalLM]
STATES = {"gates": "hard", "scores": "hidden_states"}


class Half(Policy):
    """A policy of one's own: each layer has a score of its own, and those above 0 are kept."""

    is_hard = True

    def __init__(self, num_layers: int, width: int, initializer_range: float = 0.02):
        super().__init__(num_layers, width, initializer_range)
        self.score = nn.Linear(width, num_layers)

    def decide(self, layer: int, h_ND: Tensor, state: dict[str, Any], batch: PackedBatch) -> Decision:
        score_N = self.score(h_ND)[:, layer]
        return Decision.hard(score_N > 0, score_N)


def rectangle(*shape: int, ids: Tensor | None = None) -> PackedBatch:
    batch = PackedBatch.from_rectangle(torch.ones(shape).bool())
    batch.token_N = torch.randint(31, batch.column_N.shape) if ids is None else ids
    return batch


# ---- equations


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("num_layers", [1, 2, 5, 6])
def test_the_equations(num_layers: int, scores: str) -> None:
    policy = MiddleOut(num_layers, 8, gates="hard", scores=scores)
    nn.init.constant_(policy.bias, -0.5)
    h_LND, batch = 3 * torch.randn(num_layers, 63, 8), rectangle(7, 9)
    if scores == "difficulty":
        policy.difficulty.seen[:, 0].normal_(std=40)
        policy.difficulty.seen[:, 1].fill_(20)
        priority_N = policy.difficulty(batch.token_N, batch.previous_token_N)
    elif scores == "hash":
        priority_N = drawn(batch.token_N, batch.previous_token_N)
    else:
        nn.init.normal_(policy.weight)
    state: dict[str, Any] = {}
    decisions = [policy(layer, h_ND, state, batch) for layer, h_ND in enumerate(h_LND)]
    total_N = torch.zeros(63)
    for layer in range((num_layers + 1) // 2):
        if scores in ("hash", "difficulty"):
            ease_N = -priority_N
        elif scores == "linear":
            normed_ND = h_LND[layer] / h_LND[layer].square().mean(1, keepdim=True).sqrt()
            ease_N = -normed_ND @ policy.weight[layer]
        else:
            ease_N = 8**0.5 * torch.cosine_similarity(h_LND[layer], policy.weight[layer][None])
        score_N = (ease_N + policy.bias[layer]).exp()
        total_N = torch.maximum(total_N, score_N) if scores == "linear" else total_N + score_N
        decision = decisions[layer]
        assert torch.equal(decision.keep_N, total_N < 1) and decisions[num_layers - 1 - layer] is decision
        gate_N = decision.output_gate_N
        assert decision.key_gate_N is None and (gate_N is None or (gate_N[decision.keep_N] == 1).all())
    assert 0 < decisions[0].keep_N.sum() < 63, "else the test tests little"


@pytest.mark.parametrize("scores", SCORES)
def test_every_token_starts_in_every_layer(scores: str) -> None:
    policy = MiddleOut(12, 768, gates="hard", scores=scores)
    policy.reset_parameters()
    state: dict[str, Any] = {}
    batch = rectangle(1, 4096)
    for layer in range(12):
        assert policy(layer, torch.randn(4096, 768), state, batch).keep_N.float().mean() > 0.999


# ---- learning


@pytest.mark.parametrize("scores", BY_STATES)
def test_hidden_states_have_the_gradient_of_one_minus_the_depth_score(scores: str) -> None:
    policy = MiddleOut(2, 8, gates="hard", scores=scores)
    nn.init.normal_(policy.weight)
    nn.init.constant_(policy.bias, -0.5)
    h_ND, batch = torch.randn(63, 8, requires_grad=True), rectangle(7, 9)
    state: dict[str, Any] = {}
    decision = policy(0, h_ND, state, batch)
    value_N = torch.randn(63)
    gate_N = torch.where(decision.keep_N, decision.output_gate_N, 0)
    soft_N = torch.where(decision.keep_N, 1 - state["depth_scores"][0], 0)
    got, expected = (
        torch.autograd.grad((value_N * gate).sum(), [*policy.parameters(), h_ND], retain_graph=True, allow_unused=True)
        for gate in (gate_N, soft_N)
    )
    for one, other in zip(got[:2], expected[:2], strict=True):
        assert torch.equal(one, other) and one.any()
    assert got[2] is None, "hidden states learn nothing from it"
    with torch.no_grad():
        assert policy(0, h_ND, {}, batch).output_gate_N is None, "without gradients there is nothing to multiply"


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_difficulty_stays_in_float32_through_loading(make_model: Make, dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model(policy_settings={"gates": "hard", "scores": "difficulty"}).float()
    seen = model.model.policy.difficulty.seen
    seen[:, 0].normal_(std=1e5)
    seen[:, 1].fill_(1e5)  # more than float16 can hold
    for folder, saved in (("wide", model), ("narrow", copy.deepcopy(model).to(dtype))):
        saved.save_pretrained(tmp_path / folder)
        for asked in (dtype, "auto"):
            loaded = MidskipForCausalLM.from_pretrained(tmp_path / folder, dtype=asked)
            found = loaded.model.policy.difficulty.seen
            assert found.dtype == torch.float32 and torch.equal(found, seen.float())


def test_difficulty_is_the_mean_excess_of_the_pair() -> None:
    difficulty = Difficulty()
    tokens, previous = torch.tensor([3, 3, 5, 5] * 500), torch.tensor([1, 2, 1, 2] * 500)
    nats = torch.tensor([1.0, 2.0, 3.0, 6.0] * 500)
    scored = torch.ones(2000, dtype=torch.bool)
    difficulty.observe(tokens, previous, torch.where(scored, nats, 0), scored)
    assert not difficulty(tokens, previous).any(), "nothing changes before it is absorbed"
    difficulty.absorb()
    torch.testing.assert_close(difficulty(tokens[:4], previous[:4]), nats[:4] - 3, rtol=0.1, atol=0.1)
    # a pair that was never seen has what is known of its token; an unknown token has nothing
    new = difficulty(torch.tensor([3, 5, 9]), torch.tensor([7, 7, 7]))
    torch.testing.assert_close(new, torch.tensor([-1.5, 1.5, 0.0]), rtol=0.1, atol=0.1)
    before = difficulty.seen.clone()
    difficulty.observe(tokens, previous, nats, ~scored)  # none counts
    difficulty.absorb()
    torch.testing.assert_close(difficulty.seen, before * MEMORY)


def test_kinds_differ_and_are_spread() -> None:
    token_N, previous_N = torch.arange(256).repeat(64), torch.arange(64).repeat_interleave(256) - 1
    of_token, of_pair = kinds(token_N, previous_N)
    assert of_token.unique().numel() == 256
    assert of_pair.unique().numel() > 0.6 * 2**14  # of as many pairs: a random hash fills 63 %
    big = kinds(torch.tensor([2**31 - 1]), torch.tensor([2**31 - 2]))
    assert all(0 <= int(kind) < 2**14 for kind in big)


def test_what_is_drawn_for_a_pair_is_spread_evenly_and_stays() -> None:
    token_N, previous_N = torch.arange(256).repeat(64), torch.arange(64).repeat_interleave(256) - 1
    first = drawn(token_N, previous_N)
    assert torch.equal(first, drawn(token_N, previous_N))
    counts = first.add(2).mul(4).long().bincount(minlength=16).double()
    assert len(counts) == 16 and abs(counts / 1024 - 1).max() < 0.15
    by_token, by_previous = first.view(64, 256).mean(0), first.view(64, 256).mean(1)
    assert by_token.std() < 0.25 and by_previous.std() < 0.15, "it tells pairs apart, not tokens"
    other = drawn(token_N, previous_N, seed=1)
    assert abs(torch.corrcoef(torch.stack([first, other]))[0, 1]) < 0.05


def test_a_model_in_training_learns_what_is_hard(make_model: Make) -> None:
    model = make_model(None, policy_settings={"gates": "hard", "scores": "difficulty"})
    ids_BT = torch.randint(2, (8, 32)) * 2  # 0 and 2 ...
    ids_BT[:, 1::2] = ids_BT[:, ::2] + 1  # ... and after each its successor: odd tokens alone are hard to go on from
    policy = model.model.policy
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(ids_BT, labels=ids_BT).loss
        loss.backward()
        optimizer.step()
        policy.absorb()
    even, odd = (policy.difficulty(torch.tensor([token]), torch.tensor([-1])).item() for token in (0, 1))
    assert odd > even + 0.3
    before = policy.difficulty.seen.clone()
    model.eval()(ids_BT, labels=ids_BT)
    policy.absorb()
    assert torch.equal(policy.difficulty.seen, before), "evaluation teaches nothing"


# ---- exactness


@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
@pytest.mark.parametrize("gates", ["kept", "mixed", "late", "gone"])
@pytest.mark.parametrize(("scores", "num_layers"), [("hash", 6), ("difficulty", 1), ("hidden_states", 5)])
def test_packed_is_reference(
    make_model: Make, ragged: tuple[Tensor, Tensor], scores: str, num_layers: int, gates: str, skipped_kv: str
) -> None:
    settings = {"gates": "hard", "scores": scores}
    model = make_model(gates, num_hidden_layers=num_layers, skipped_kv=skipped_kv, policy_settings=settings)
    packed, found = check_equal(model, *ragged)
    gate_LN = packed["gates"][:, ragged[1].bool()]
    assert ((gate_LN == 0) | (gate_LN == 1)).all()
    assert {"kept": (gate_LN == 1).all(), "gone": (gate_LN == 0).all()}.get(gates, 0 < gate_LN.mean() < 1)
    if scores == "hidden_states":
        assert (norm(found, "policy") > 0) == (gates != "gone")


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("score_scale", [0.0, 0.4, 2.5])
def test_training_under_a_budget_is_reference_too(
    make_model: Make, ragged: tuple[Tensor, Tensor], score_scale: float, scores: str
) -> None:
    model = make_model("mixed", num_hidden_layers=5, policy_settings={"gates": "hard", "scores": scores})
    as_trained = model(ragged[0], attention_mask=ragged[1]).gates.mean()
    with limits(model.model.policy, score_scale):
        under = check_equal(model, *ragged)[0]["gates"].mean()
    assert (under > as_trained) == (score_scale < 1)


def test_documents_of_a_window_do_not_see_each_others_tokens(make_model: Make) -> None:
    model = make_model("mixed", num_hidden_layers=3, policy_settings={"gates": "hard"}).eval()
    ids_BT = torch.randint(31, (2, 9))
    positions_BT = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 2)
    check_equal(model, ids_BT, torch.ones_like(ids_BT), positions_BT)
    together = model(ids_BT, position_ids=positions_BT).gates
    torch.testing.assert_close(together[..., 4:], model(ids_BT[:, 4:]).gates)


@pytest.mark.parametrize("num_columns", [1, 2, 5])
def test_steps_with_a_cache_are_one_pass(make_model: Make, ragged: tuple[Tensor, Tensor], num_columns: int) -> None:
    model = make_model("mixed", num_hidden_layers=5, policy_settings={"gates": "hard"}).eval()
    ids_BT, mask_BT = ragged
    with torch.no_grad():
        expected = model(ids_BT, attention_mask=mask_BT)
        cache, found = None, []
        for start in range(0, 9, num_columns):
            stop = start + num_columns
            step = model(ids_BT[:, start:stop], attention_mask=mask_BT[:, :stop], past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            found.append(step)
            if start == 0:  # taken back and done again: the cache knows the token before
                cache.crop(-1)
                again = slice(min(stop, 9) - 1, min(stop, 9))
                model(ids_BT[:, again], attention_mask=mask_BT[:, : again.stop], past_key_values=cache)
    for name in ("gates", "logits"):
        dimension = 2 if name == "gates" else 1
        got = torch.cat([getattr(step, name) for step in found], dimension)
        torch.testing.assert_close(got, getattr(expected, name), rtol=0, atol=1e-9)


@pytest.mark.integration
def test_hard_gates_keep_the_contract() -> None:
    for scores, num_layers, skipped_kv in zip(SCORES, (3, 4, 3, 4), ("drop", "keep", "keep", "drop"), strict=True):
        settings = {"gates": "hard", "scores": scores}
        check_policy("middle_out", settings, num_layers=num_layers, skipped_kv=skipped_kv)
    check_policy(f"{__name__}:Half", num_layers=3, skipped_kv="drop")


def test_a_policy_that_says_it_is_hard_is_held_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def soft(self: Half, layer: int, h_ND: Tensor, state: dict[str, Any], batch: PackedBatch) -> Decision:
        return Decision(None, torch.full((len(h_ND),), 0.5))

    monkeypatch.setattr(Half, "decide", soft)
    with pytest.raises(AssertionError, match=r"check 'gates' failed: is_hard is True and a gate is neither 0 nor 1"):
        check_policy(f"{__name__}:Half", num_layers=1)


# ---- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gates": "half"}, r"gates is 'half'; expected one of 'soft', 'hard'"),
        ({"gates": "hard", "scores": "ids"}, r"scores is 'ids'; expected one of 'hash', 'difficulty', 'hidden_states'"),
        ({"first_tokens": 2}, r"first_tokens is 2, of hard gates; add gates: hard, or leave it out"),
        ({"gates": "hard", "start": "released"}, r"start is 'released', of soft gates; hard gates start 'open'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MiddleOut(4, 8, **settings)


def test_gates_without_a_gradient_need_a_budget() -> None:
    policy = MiddleOut(4, 8, gates="hard")
    with pytest.raises(ValueError, match=r"have no gradient, so .*use the regularizer 'target_share'"):
        build_regularizer("sparsity", 4).steer(policy)
    build_regularizer("target_share", 4, target_share=0.5).steer(policy)
    build_regularizer("sparsity", 4).steer(MiddleOut(4, 8, **STATES))


def test_scores_of_soft_gates_are_refused() -> None:
    with pytest.raises(ValueError, match=r"scores is 'hash', of hard gates; add gates: hard, or leave it out"):
        MiddleOut(4, 8, scores="hash")


@pytest.mark.parametrize("num_layers", [4, 15, 48])
def test_hard_gates_start_open_at_any_depth(num_layers: int) -> None:
    policy = MiddleOut(num_layers, 8, gates="hard")
    policy.reset_parameters()
    assert (policy.bias.exp().sum() * math.exp(2)).item() < 1  # 2: the lowest priority is -2


def test_counts_of_difficulty_stay_in_float32_in_a_model_of_half_precision() -> None:
    policy = MiddleOut(4, 8, gates="hard", scores="difficulty")
    policy.difficulty.seen += 70_001  # more than float16 can hold
    policy.half()
    assert policy.bias.dtype == torch.float16
    assert policy.difficulty.seen.dtype == torch.float32 and (policy.difficulty.seen == 70_001).all()


def test_gates_that_go_by_tokens_need_tokens(make_model: Make) -> None:
    model = make_model("mixed", policy_settings={"gates": "hard"})
    with pytest.raises(ValueError, match=r"go by token ids, and it was given inputs_embeds: give input_ids"):
        model(inputs_embeds=torch.randn(1, 3, 16, dtype=torch.float64))


def test_redrawn_gates_change_every_so_many_steps() -> None:
    policy = Redrawn(4, 8, redraw_steps=2)
    token_N, drawn = torch.arange(20), []
    for _ in range(4):
        drawn.append(policy.priority(token_N, token_N - 1))
        policy.absorb()
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[2], drawn[3]) and not torch.equal(drawn[1], drawn[2])
