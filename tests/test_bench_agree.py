"""What `midskip bench` refuses to time: what does not compute what the reference implementation does."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_bench import DTYPE, ids, settings, side
from torch import Tensor

from midskip import MidskipForCausalLM
from midskip.bench import DisagreementError, bench
from midskip.bench.agree import _before_a_flip, _largest, _largest_flip, _Reference, bound, check_llama, check_ours
from midskip.bench.models import Side, build_llama
from midskip.bench.settings import CHECKED_COLUMNS
from midskip.cli import main
from midskip.model.layer_cache import LayerCache
from midskip.model.layers import Attention
from midskip.policies.middle_out import MiddleOut
from midskip.policies.scored import Router

pytestmark = pytest.mark.integration


def test_a_wrong_gate_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One key's gate of one layer, in the packed computation alone."""
    ask = Attention.project

    def wrong(self: Attention, x: Tensor, y: Tensor, queries: Any, keys: Any, key_gate_M: Tensor | None) -> Any:
        if key_gate_M is not None and len(key_gate_M):
            key_gate_M = key_gate_M.clone()
            key_gate_M[0] *= 0.999
        return ask(self, x, y, queries, keys, key_gate_M)

    good = side()
    check_ours(good, ids(), gradients=True)
    monkeypatch.setattr(Attention, "project", wrong)
    with pytest.raises(DisagreementError, match=r"skip 0.5 \(whole, float64\).*is not timed.*rounding explains"):
        check_ours(good, ids())
    with pytest.raises(DisagreementError):
        bench(settings(tasks=("prefill",)), tmp_path)
    assert not (tmp_path / "bench.json").exists()


def test_a_wrong_weight_is_not_timed() -> None:
    """In the dtype that is timed alone, as a broken kernel would be."""
    good = side(gates="fixed")
    broken = Side(good.name, good.model, stretch=good.stretch)
    check_ours(broken, ids())
    hook = good.model.lm_head.register_forward_hook(
        lambda head, arguments, logits: logits * (1 + 1e-4 * (logits.dtype == DTYPE) * torch.arange(61).remainder(2))
    )
    with pytest.raises(DisagreementError, match=r"skip 0.5 \(whole, float32\)"):
        check_ours(broken, ids())
    hook.remove()


def test_a_wrong_cache_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    good = side()
    monkeypatch.setattr(
        "midskip.model.attention.attend_past", lambda q_NHK, queries, past: q_NHK * 0 + past.values[0, 0].repeat(1, 1)
    )
    with pytest.raises(DisagreementError, match=r"skip 0.5 \(with its cache, float64\)"):
        check_ours(good, ids())


def test_a_gradient_that_is_nothing_but_rounding_agrees() -> None:
    """A query that sees its own key alone has none, and rounding makes something of it."""
    one, given = side(gates="hard"), ids(2)
    policy = one.model.model.policy
    with torch.no_grad():
        for bias in torch.linspace(-6, 6, 300):
            policy.bias[-1] = bias
            ran = one.model(given[:, :CHECKED_COLUMNS]).executed[policy.num_gates - 1].sum(1).tolist()
            if max(ran) == 1:
                break
    assert max(ran) == 1
    check_ours(one, given, gradients=True)


@pytest.mark.parametrize("size", [0.3, 3])
@pytest.mark.parametrize("seed", [0, 1])
@torch.no_grad()
def test_gradients_of_tokens_that_are_nearly_alike_agree(size: float, seed: int) -> None:
    """Those of queries and keys are then differences of numbers that nearly cancel, as in models that are trained."""
    torch.manual_seed(seed)
    one = side(gates="dense")
    weight = one.model.model.embed_tokens.weight
    weight += size * torch.randn(weight.shape[1])
    check_ours(one, ids(), gradients=True)


def test_a_wrong_gradient_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    good, real = side(), MidskipForCausalLM.forward

    def forward(self: MidskipForCausalLM, *arguments: Any, **more: Any) -> Any:
        output = real(self, *arguments, **more)
        if output.loss is not None:
            weight = self.model.layers[1].mlp.up_proj.weight
            output.loss = output.loss + 1e-9 * (weight - weight.detach()).sum()
        return output

    check_ours(good, ids(), gradients=True)
    monkeypatch.setattr(MidskipForCausalLM, "forward", forward)
    with pytest.raises(DisagreementError, match=r"training, float64.*gradient of model.layers.1.mlp.up_proj.weight"):
        check_ours(good, ids(), gradients=True)


def test_another_llama_is_not_timed() -> None:
    config = settings().config()
    llama = build_llama(config, DTYPE, "cpu")
    for static in (False, True):
        assert len(check_llama(Side("llama", llama, static=static), config, ids())) == 4
    llama.model.layers[2].self_attn.scaling *= 1.01
    with pytest.raises(DisagreementError, match=r"llama \(whole, float32\)"):
        check_llama(Side("llama", llama), config, ids())


@pytest.fixture
def learned(make_model: Callable[..., MidskipForCausalLM]) -> Side:
    return Side("trained", make_model("mixed", DTYPE, num_hidden_layers=5).eval())


def test_learned_gates_are_compared_up_to_the_first_that_rounds_over(
    make_model: Callable[..., MidskipForCausalLM],
) -> None:
    logits_BTV, gates_LBT = torch.ones(2, 4, 3, dtype=torch.float64), torch.ones(2, 2, 4)
    got_BTV, other_LBT = logits_BTV.clone(), gates_LBT.clone()
    got_BTV[0, 2:] = 9  # from where a gate of row 0 differs
    got_BTV[1, 3] *= 1.5
    other_LBT[1, 0, 2] = 0
    same_BT = _before_a_flip(other_LBT, gates_LBT)
    assert same_BT.tolist() == [[True, True, False, False], [True] * 4]
    assert _largest(got_BTV, logits_BTV, same_BT) == (pytest.approx(0.5), 6)
    assert _largest(got_BTV, logits_BTV) == (pytest.approx(8), 8)
    assert _largest(got_BTV, logits_BTV, same_BT & False)[0] == float("inf")  # nothing is no agreement

    model = make_model("mixed", torch.bfloat16, num_hidden_layers=5).eval()
    found = check_ours(Side("trained", model), torch.randint(31, (2, 60)))
    assert {one.num_tokens for one in found if one.dtype == "float64"} == {2 * CHECKED_COLUMNS}
    assert all(0 < one.num_tokens < 2 * CHECKED_COLUMNS for one in found if one.dtype == "bfloat16")  # some do round


def test_only_the_first_of_the_gates_that_moved_has_to_be_near() -> None:
    gates_LBT = torch.full((3, 1, 4), 0.5, dtype=torch.float64)
    reference = _Reference(gates_LBT, gates_LBT, 1 - gates_LBT, 1.0, 1.0, settings().config())
    assert _largest_flip(gates_LBT * 0.9, reference) == 0  # all on the right side
    reference.gates[0, 0, 1], reference.depth_scores[0, 0, 1] = 1e-6, 1 - 1e-6
    got_LBT = reference.gates.clone()
    got_LBT[0, 0, 1] = 0
    got_LBT[1:, 0, 1:] = 0  # it has moved the layers after, of itself and of the tokens that see it
    assert _largest_flip(got_LBT, reference) == pytest.approx(1e-6)
    got_LBT[0, 0, 3] = 0  # but not the same layer of another
    assert _largest_flip(got_LBT, reference) == 0.5
    got_LBT[0, 0, 3] = 0.5
    got_LBT[2, 0, 0] = 0  # nor a token before it
    assert _largest_flip(got_LBT, reference) == 0.5
    # of one that should have left: both the score and the gate have to be near
    reference.gates[:] = got_LBT[:] = 0.0
    got_LBT[0, 0, 0] = 1e-6
    for score, expected in ((1.25, 0.25), (1.0, 1e-6)):
        reference.depth_scores[:] = score
        assert _largest_flip(got_LBT, reference) == pytest.approx(expected)


@pytest.mark.parametrize("moved", [0.5, -0.5])
def test_a_gate_that_is_wrong_in_the_timed_dtype_is_not_rounding(
    moved: float, learned: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One score of the last token, as of a broken kernel: no token before it shows anything."""
    score = MiddleOut._score

    def wrong(self: MiddleOut, layer: int, h_ND: Tensor) -> Tensor:
        score_N = score(self, layer, h_ND)
        if h_ND.dtype == DTYPE and layer == 0 and len(score_N) > 4:
            score_N = score_N.index_add(0, torch.tensor([len(score_N) - 1]), torch.tensor([moved]))
        return score_N

    ids_BT = torch.randint(31, (2, 20))
    with torch.no_grad():
        last = learned.model(ids_BT).depth_scores[0, 1, -1].item()
        learned.model.model.policy.bias[0] += (1 - moved / 2) - last  # it leaves, or does not, and not by a hair
    found = check_ours(learned, ids_BT)
    assert {one.num_tokens for one in found} == {40}
    monkeypatch.setattr(MiddleOut, "_score", wrong)
    message = r"trained \(whole, float32\).*a token is present or not that is 2\.50e-01 away from where that changes"
    with pytest.raises(DisagreementError, match=message):
        check_ours(learned, ids_BT)


@pytest.mark.parametrize("policy", ["independent", "mixture_of_depths", "reinforce", "early_exit"])
def test_hard_gates_may_round_over_and_wrong_ones_are_found(
    policy: str, make_model: Callable[..., MidskipForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, index = {"scores": "straight_through"} if policy == "early_exit" else {}, 1
    model = make_model(None, torch.bfloat16, num_hidden_layers=5, policy=policy, policy_settings=settings).eval()
    ids_BT, decider = torch.randint(31, (2, CHECKED_COLUMNS)), model.model.policy
    number_2N: list[torch.Tensor] = []
    with torch.no_grad():
        decider.bias.fill_(-9)  # all run
        for one in (model, copy.deepcopy(model).double()):
            router = one.model.policy.routers[index]
            hook = router.register_forward_hook(lambda router, given, number_N: number_2N.append(number_N.double()))
            one(ids_BT)
            hook.remove()
        between_N = torch.stack(number_2N).mean(0).bfloat16().double()
        between_N = between_N[(number_2N[0] - between_N) * (number_2N[1] - between_N) < 0]
        decider.bias[index] = between_N[0]  # one token is on one side of it in bfloat16, and on the other in float64
    rounded = Side("trained", model)
    assert any(one.num_tokens < ids_BT.numel() for one in check_ours(rounded, ids_BT))
    forward = Router.forward

    def wrong(self: Router, h_ND: torch.Tensor) -> torch.Tensor:
        number_N = forward(self, h_ND)
        return -number_N if h_ND.dtype == torch.bfloat16 else number_N

    monkeypatch.setattr(Router, "forward", wrong)
    with pytest.raises(DisagreementError, match=r"trained \(whole, bfloat16\).*away from where that changes"):
        check_ours(rounded, ids_BT)


def test_imposed_depths_do_not_round(monkeypatch: pytest.MonkeyPatch) -> None:
    one = side(gates="fixed")
    one.model.bfloat16()
    check_ours(one, ids(2, 60))
    policy = type(one.model.model.policy)
    decide = policy.decide

    def wrong(self: Any, layer: int, h_ND: Tensor, state: Any, batch: Any) -> Any:
        decision = decide(self, layer, h_ND, state, batch)
        if layer == 1 and h_ND.dtype == torch.bfloat16 and len(h_ND) > 40:
            keep_N = decision.keep_N.clone()
            keep_N[-1] = ~keep_N[-1]
            return replace(decision, keep_N=keep_N)
        return decision

    monkeypatch.setattr(policy, "decide", wrong)
    with pytest.raises(DisagreementError, match=r"bfloat16\).*a token is present or not that is 1\.00e\+00 away"):
        check_ours(one, ids(2, 60))


def test_the_cache_that_is_checked_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    good, sizes = side(0.25), []
    make_room = LayerCache._make_room

    def seen(self: LayerCache, *arguments: Any, **more: Any) -> None:
        make_room(self, *arguments, **more)
        sizes.append(self.keys.shape[1])

    monkeypatch.setattr(LayerCache, "_make_room", seen)
    check_ours(good, ids(2, 60))
    assert len(set(sizes)) >= 3

    def lost(self: LayerCache, *arguments: Any, **more: Any) -> None:
        before = self.buffers
        make_room(self, *arguments, **more)
        if before and before is not self.buffers:
            self.values[:, 0] = 0  # what was there first

    monkeypatch.setattr(LayerCache, "_make_room", lost)
    with pytest.raises(DisagreementError, match=r"with its cache, float64"):
        check_ours(good, ids(2, 60))


def test_a_model_that_passes_errors_on_without_end_agrees_with_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("midskip.bench.agree._before_a_flip", lambda gates_LBT, true_LBT: gates_LBT[0] < 0)
    with pytest.raises(DisagreementError, match="rounding explains inf"):
        check_ours(side(), ids())


def test_what_disagrees_ends_the_command_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("midskip.bench.agree.bound", lambda *_: 0.0)
    arguments = "--shape tiny --tasks prefill --dtypes float32 --gates fixed --repeats 1 --device cpu --output"
    assert main(["bench", *arguments.split(), str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("midskip: error: skip 0 (whole, float64) does not compute what it should")
    monkeypatch.setattr("midskip.bench.bench", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):  # no other error is hidden
        main(["bench", *arguments.split(), str(tmp_path / "out")])


def test_the_bound_follows_from_dtype_shape_and_condition() -> None:
    config = settings().config()
    assert bound(torch.bfloat16, config, 5.0) == 2**-8 * 5 * 16**0.5
    assert bound(torch.float32, config, 3.0) == 2**-24 * 3 * (16 + 6 * 32 + 48) ** 0.5
    assert bound(torch.float32, config, 0.1) == bound(torch.float32, config, 1.0)
