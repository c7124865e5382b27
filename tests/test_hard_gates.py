"""Gates of exactly 0 or 1: their equations, their surrogate gradient, and what they cost nowhere."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_exactness import check_equal, norm
from torch import Tensor, nn

from midskip import MidskipForCausalLM
from midskip.controllers import build_controller
from midskip.nn.layout import Layout
from midskip.policies import Decision, Policy
from midskip.policies.middle_out import MiddleOut
from midskip.testing import check_policy
from midskip.testing.effort import effort

Make = Callable[..., MidskipForCausalLM]
SURROGATES = ("loss", "straight_through")
STRAIGHT = {"gates": "hard", "surrogate": "straight_through"}


class Half(Policy):
    """A policy of one's own: each layer has a score of its own, and those above 0 are kept."""

    is_hard = True

    def __init__(self, num_layers: int, width: int, initializer_range: float = 0.02):
        super().__init__(num_layers, width, initializer_range)
        self.score = nn.Linear(width, num_layers)

    def decide(self, layer: int, h_ND: Tensor, state: dict[str, Any], layout: Layout) -> Decision:
        score_N = self.score(h_ND)[:, layer]
        return Decision.hard(score_N > 0, score_N)


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("num_layers", [1, 2, 5, 6])
def test_the_equations(num_layers: int, surrogate: str) -> None:
    policy = MiddleOut(num_layers, 8, gates="hard", surrogate=surrogate)
    nn.init.normal_(policy.weight)
    nn.init.constant_(policy.bias, -0.5)
    h_LND, layout = 3 * torch.randn(num_layers, 63, 8), Layout.from_rectangle(torch.ones(7, 9).bool())
    state: dict[str, Any] = {}
    decisions = [policy(layer, h_ND, state, layout) for layer, h_ND in enumerate(h_LND)]
    total_N = torch.zeros(63)
    for layer in range((num_layers + 1) // 2):
        cosine_N = torch.cosine_similarity(h_LND[layer], policy.weight[layer][None])
        total_N = total_N + (8**0.5 * cosine_N + policy.bias[layer]).exp()
        decision = decisions[layer]
        assert torch.equal(decision.keep_N, total_N < 1) and decisions[num_layers - 1 - layer] is decision
        gate_N = decision.output_gate_N
        assert decision.key_gate_N is None and (gate_N is None or (gate_N[decision.keep_N] == 1).all())
    assert 0 < decisions[0].keep_N.sum() < 63, "else the test tests little"


def test_straight_through_is_the_gradient_of_one_minus_the_depth_score() -> None:
    policy = MiddleOut(2, 8, **STRAIGHT)
    nn.init.normal_(policy.weight)
    nn.init.constant_(policy.bias, -0.5)
    h_ND, layout = torch.randn(63, 8, requires_grad=True), Layout.from_rectangle(torch.ones(7, 9).bool())
    state: dict[str, Any] = {}
    decision = policy(0, h_ND, state, layout)
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
        assert policy(0, h_ND, {}, layout).output_gate_N is None, "without gradients there is nothing to multiply"


def test_gates_that_learn_from_the_loss_find_the_tokens_that_are_hard() -> None:
    policy = MiddleOut(4, 8, gates="hard")
    policy.reset_parameters()
    h_ND, layout = torch.randn(512, 8), Layout.from_rectangle(torch.ones(8, 64).bool())
    nats_N = (2 + h_ND @ torch.randn(8)).clamp(min=0)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.02)
    for _ in range(300):
        state: dict[str, Any] = {}
        for layer in range(4):
            policy(layer, h_ND, state, layout)
        lesson_N = policy.lesson(state, nats_N)
        assert lesson_N is not None and lesson_N.shape == (512,)
        optimizer.zero_grad()
        lesson_N.mean().backward()
        optimizer.step()
    with torch.no_grad():
        policy.bias.fill_(0)
        keep_N = policy(0, h_ND, {}, layout).keep_N
    assert 0.2 < keep_N.float().mean() < 0.8
    assert nats_N[keep_N].mean() > 2 * nats_N[~keep_N].mean()


def test_the_loss_keeps_its_value_and_its_gradient_for_all_but_the_policy(make_model: Make) -> None:
    ids_BT = torch.randint(31, (3, 9))
    found = []
    for surrogate in SURROGATES:
        model = make_model("kept", policy_settings={"gates": "hard", "surrogate": surrogate})
        loss = model(ids_BT, labels=ids_BT).loss
        loss.backward()
        gradients = {name: x.grad for name, x in model.named_parameters() if "policy" not in name}
        found.append((loss.detach(), gradients, model.model.policy.weight.grad.norm()))
    assert found[0][0] == found[1][0] and found[0][2] != found[1][2]
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][name], rtol=0, atol=1e-12)


def test_every_token_starts_in_every_layer() -> None:
    policy = MiddleOut(12, 768, gates="hard")
    policy.reset_parameters()
    state: dict[str, Any] = {}
    layout = Layout.from_rectangle(torch.ones(1, 4096).bool())
    for layer in range(12):
        assert policy(layer, torch.randn(4096, 768), state, layout).keep_N.float().mean() > 0.999


@pytest.mark.parametrize("num_layers", [1, 2, 5, 6])
@pytest.mark.parametrize("norms", ["sandwich", "pre"])
@pytest.mark.parametrize("keys", ["gated", "all"])
@pytest.mark.parametrize("gates", ["kept", "mixed", "late", "gone"])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_packed_is_naive(
    make_model: Make, ragged: tuple[Tensor, Tensor], surrogate: str, gates: str, keys: str, norms: str, num_layers: int
) -> None:
    settings = {"gates": "hard", "surrogate": surrogate}
    model = make_model(gates, num_hidden_layers=num_layers, keys=keys, norms=norms, policy_settings=settings)
    packed, found = check_equal(model, *ragged)
    gate_LN = packed["gates"][:, ragged[1].bool()]
    assert ((gate_LN == 0) | (gate_LN == 1)).all()
    assert {"kept": (gate_LN == 1).all(), "gone": (gate_LN == 0).all()}.get(gates, 0 < gate_LN.mean() < 1)
    assert (norm(found, "policy") > 0) == (gates != "gone" or surrogate == "loss")


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("factor", [0.0, 0.4, 2.5])
def test_training_under_a_budget_is_naive_too(
    make_model: Make, ragged: tuple[Tensor, Tensor], factor: float, surrogate: str
) -> None:
    model = make_model("mixed", num_hidden_layers=5, policy_settings={"gates": "hard", "surrogate": surrogate})
    as_trained = check_equal(model, *ragged)[0]["gates"].mean()
    with effort(model.model.policy, factor):
        under = check_equal(model, *ragged)[0]["gates"].mean()
    assert (under > as_trained) == (factor < 1)


def test_hard_gates_pass_the_laws() -> None:
    for surrogate in SURROGATES:
        check_policy("middle_out", {"gates": "hard", "surrogate": surrogate}, num_layers=4)
    check_policy(f"{__name__}:Half", num_layers=3)


def test_a_policy_that_says_it_is_hard_is_held_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def soft(self: Half, layer: int, h_ND: Tensor, state: dict[str, Any], layout: Layout) -> Decision:
        return Decision(None, h_ND.new_full((len(h_ND),), 0.5))

    monkeypatch.setattr(Half, "decide", soft)
    with pytest.raises(AssertionError, match=r"law 'gates' broken: is_hard is True and a gate is neither 0 nor 1"):
        check_policy(f"{__name__}:Half", num_layers=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gates": "half"}, r"gates is 'half'; expected one of 'soft', 'hard'"),
        ({"gates": "hard", "start": "released"}, r"start is 'released', of soft gates; hard gates start 'open'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MiddleOut(4, 8, **settings)


def test_gates_that_learn_from_the_loss_need_a_budget() -> None:
    policy = MiddleOut(4, 8, gates="hard")
    with pytest.raises(ValueError, match=r"learn which tokens are hard, .*use the controller 'budget'"):
        build_controller("sparsity", 4).steer(policy)
    build_controller("budget", 4, target_share=0.5).steer(policy)
    build_controller("sparsity", 4).steer(MiddleOut(4, 8, **STRAIGHT))
