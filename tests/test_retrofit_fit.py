"""A dense model made to skip in closed form, and what the fit looks at."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from midskip import MidskipForCausalLM
from midskip.budget.monitor import temporary_limits
from midskip.data.labelled import Items
from midskip.evaluate import evaluate
from midskip.retrofit.fit import FitReport, fit
from midskip.retrofit.moments import Moments
from midskip.retrofit.watch import look

Make = Callable[..., MidskipForCausalLM]
POLICIES: dict[str, dict[str, Any]] = {
    "independent": {"router": "linear", "outer": 1, "first_tokens": 1},
    "middle_out": {"gates": "hard", "scores": "linear", "first_tokens": 1},
    "early_exit": {"scores": "straight_through", "router": "linear", "first_tokens": 1},
}


def to_skip(make_model: Make, policy: str = "independent", **changes: Any) -> MidskipForCausalLM:
    given = {"num_hidden_layers": 5, "norms": "pre", "skipped_kv": "keep", "skip_path": "linear"}
    return make_model(policy=policy, policy_settings=POLICIES[policy], **(given | changes)).eval()


def windows(count: int = 6, length: int = 12) -> Items:
    ids = torch.randint(31, (count, length), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": row, "labels": row} for row in ids]


# ---- regression


def test_moments_give_least_squares() -> None:
    torch.manual_seed(0)
    z_ND = torch.randn(50, 4)
    y_NK = z_ND @ torch.randn(4, 3) + torch.randn(3) + 0.3 * torch.randn(50, 3)
    moments = Moments(4, 3)
    for rows in torch.arange(50).split(20):
        moments.add(z_ND[rows], y_NK[rows])
    weight_KD, constant_K = moments.solve(0.0)
    z_NE = torch.cat([z_ND, torch.ones(50, 1)], 1).double()
    expected_EK = torch.linalg.lstsq(z_NE, y_NK.double()).solution
    torch.testing.assert_close(torch.cat([weight_KD.T, constant_K[None]]), expected_EK, rtol=1e-5, atol=1e-5)
    left_K = (y_NK - z_NE @ expected_EK).square().sum(0) / (y_NK - y_NK.mean(0)).square().sum(0)
    torch.testing.assert_close(moments.explained(weight_KD, constant_K), 1 - left_K, rtol=1e-4, atol=1e-4)
    assert moments.solve(10.0)[0].norm() < weight_KD.norm()


# ---- what layers add


def looked(model: MidskipForCausalLM, ids: Tensor, layers: range) -> dict[int, tuple[Tensor, Tensor, Tensor | None]]:
    seen: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}
    look(model, {"input_ids": ids}, layers, lambda layer, *found: seen.update({layer: found}))
    assert list(seen) == list(layers)
    return seen


def states(model: MidskipForCausalLM, ids: Tensor) -> list[Tensor]:
    """[N, D], that enter each block, and that leave the last before the norm."""
    before_norm: list[Tensor] = []
    hook = model.model.norm.register_forward_pre_hook(lambda _, given: before_norm.append(given[0]))
    hidden = model.model(ids, use_cache=False, output_hidden_states=True).hidden_states
    hook.remove()
    return [*(h_BTD.flatten(0, 1) for h_BTD in hidden[:-1]), *before_norm]


@torch.no_grad()
@pytest.mark.parametrize("skip_unit", ["block", "sublayer"])
def test_a_look_sees_what_a_layer_would_add(make_model: Make, skip_unit: str) -> None:
    """To a token that skips it too, while the pass goes on as if nobody looked."""
    model = to_skip(make_model, skip_unit=skip_unit)
    torch.nn.init.normal_(model.model.skip_paths["2"].weight)  # pyright: ignore[reportArgumentType]
    model.model.policy.bias.zero_()
    ids = torch.stack([window["input_ids"] for window in windows(3)])
    inside, parts = range(1, model.model.policy.num_layers - 1), 1 if skip_unit == "block" else 2
    seen = looked(model, ids, inside)
    for layer in range(parts, inside.stop, parts):
        torch.testing.assert_close(seen[layer][0], states(model, ids)[layer // parts], rtol=0, atol=0)
    h_ND, added_ND, taking_N = seen[2]
    assert taking_N is not None and 0 < int(taking_N.sum()) < len(taking_N)
    model.model.policy.bias[1] = -1e4  # now layer 2 runs for all
    h_later_ND, added_later_ND, nobody = looked(model, ids, inside)[2]
    assert nobody is None
    torch.testing.assert_close(h_ND, h_later_ND, rtol=0, atol=0)
    torch.testing.assert_close(added_ND, added_later_ND, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("policy", ["middle_out", "early_exit"])
def test_a_look_at_spans_leads_to_the_state_behind_them(make_model: Make, policy: str) -> None:
    model = to_skip(make_model, policy)
    torch.nn.init.normal_(model.model.skip_paths["1"].weight)  # pyright: ignore[reportArgumentType]
    ids = torch.stack([window["input_ids"] for window in windows(3)])
    layers = model.model.policy.skip_path_layers
    model.model.policy.bias.fill_(-1e4)
    whole = states(model, ids)
    for layer, (h_ND, added_ND, nobody) in looked(model, ids, layers).items():
        assert nobody is None or not nobody.any()
        torch.testing.assert_close(h_ND, whole[layer], rtol=0, atol=0)
        torch.testing.assert_close(h_ND + added_ND, whole[model.model.policy.skip_path_end(layer)], rtol=0, atol=1e-12)
    model.model.policy.bias[:3] = torch.tensor([-1e4, 0.0, 0.0])  # some leave at 1, some at 2
    own, executed = states(model, ids), model(ids).executed
    left = [~executed[layer].flatten() for layer in range(5)]
    h_MD, added_MD, taking_M = looked(model, ids, layers)[2]
    assert taking_M is not None and 0 < int(taking_M.sum()) < len(taking_M) < len(left[1])
    torch.testing.assert_close(h_MD, own[2][~left[1]], rtol=0, atol=0)
    torch.testing.assert_close(taking_M, left[2][~left[1]])
    end = model.model.policy.skip_path_end(2)
    torch.testing.assert_close(h_MD + added_MD, whole[end][~left[1]], rtol=0, atol=1e-12)


# ---- the fit


@torch.no_grad()
@pytest.mark.parametrize(
    ("policy", "skip_path", "skip_unit", "choice"),
    [
        ("independent", "linear", "block", "tokens"),
        ("independent", "low_rank", "block", "tokens"),
        ("independent", "linear", "sublayer", "layers"),
        ("middle_out", "linear", "block", "tokens"),
        ("early_exit", "linear", "sublayer", "tokens"),
    ],
)
@pytest.mark.integration
def test_the_fit_repairs_and_leaves_the_rest_alone(
    make_model: Make, policy: str, skip_path: str, skip_unit: str, choice: str
) -> None:
    model = to_skip(
        make_model, policy, skip_path=skip_path, skip_unit=skip_unit, skip_path_rank=4 if "low" in skip_path else None
    )
    before = {name: x.clone() for name, x in model.state_dict().items()}
    whole = _nothing_skipped(model)
    outer = 0 if policy == "independent" else 1
    report = fit(model, windows(200), share=0.75, choice=choice, num_cost_windows=2, outer=outer, batch_size=24)
    changed = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert all(".skip_paths." in name or ".policy." in name for name in changed) and changed
    torch.testing.assert_close(_nothing_skipped(model), whole, rtol=0, atol=0)
    result = evaluate(model, windows(24))
    assert result["executed_share"] == pytest.approx(0.75, abs=0.08) and result["share_by_layer"][0] == 1
    _check_report(report, model, choice)
    repaired = _gap(model, whole)
    for parameter in model.model.skip_paths.parameters():
        parameter.zero_()
    assert repaired < 0.8 * _gap(model, whole)


def _check_report(report: FitReport, model: MidskipForCausalLM, choice: str) -> None:
    policy = model.model.policy
    inner = [layer for layer in policy.skip_path_layers if layer > 0]
    assert report.layers == inner and set(report.order) <= set(inner)
    assert len(report.cost) == len(report.order if choice == "layers" else report.error) == len(inner)
    assert all(0 < error < 10 for error in report.error)


@pytest.mark.integration
@torch.no_grad()
def test_layers_are_left_out_in_the_order_asked_for(make_model: Make) -> None:
    """Adjacent ones stay together; by influence they rise in what they change of the direction."""
    orders = {}
    for order in ("loss", "adjacent", "influence"):
        model = to_skip(make_model, num_hidden_layers=8)
        report = fit(model, windows(24), choice="layers", order=order, refits=0, num_cost_windows=2)
        orders[order] = report.order
        ran = [evaluate(model, windows(8))["share_by_layer"][layer] for layer in report.order]
        assert ran == sorted(ran) and sorted(report.order) == list(range(1, 7)), "the first go first"
    spread = {
        order: [max(gone[:count]) - min(gone[:count]) + 1 - count for count in range(1, 7)]
        for order, gone in orders.items()
    }
    assert not any(spread["adjacent"]) and any(spread["loss"])
    model = to_skip(make_model, num_hidden_layers=8)
    states_LND = states(model, torch.stack([window["input_ids"] for window in windows(24)]))
    cosine = [torch.cosine_similarity(states_LND[k], states_LND[k + 1]).mean() for k in range(8)]
    assert sorted(range(1, 7), key=lambda layer: -cosine[layer]) == orders["influence"] != orders["loss"]


def _nothing_skipped(model: MidskipForCausalLM) -> Tensor:
    with temporary_limits(model, score_scale=0.0):
        return _logits(model)


def _logits(model: MidskipForCausalLM) -> Tensor:
    return model(torch.stack([window["input_ids"] for window in windows(4)]), use_cache=False).logits


def _gap(model: MidskipForCausalLM, whole: Tensor) -> float:
    return (_logits(model) - whole).square().mean().item()


@torch.no_grad()
def test_a_low_rank_fit_of_full_rank_is_the_linear_one(make_model: Make) -> None:
    linear, low_rank = (
        to_skip(make_model, skip_path=kind, skip_path_rank=rank) for kind, rank in (("linear", None), ("low_rank", 16))
    )
    for model in (linear, low_rank):
        fit(model, windows(12), refits=0, num_cost_windows=1)
    for layer in ("1", "2", "3"):
        path = low_rank.model.skip_paths[layer]
        product = path.weight @ path.down  # pyright: ignore[reportOperatorIssue]
        torch.testing.assert_close(product, linear.model.skip_paths[layer].weight, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("skip_path", ["linear", "low_rank"])
def test_a_refit_changes_the_maps_of_tokens_that_skip_and_no_others(make_model: Make, skip_path: str) -> None:
    """Also where nobody runs a layer, and the model does not call it."""
    maps = []
    for refits in (0, 1):
        model = to_skip(make_model, skip_path=skip_path, skip_path_rank=4 if "low" in skip_path else None)
        model.model.policy.first_tokens = 0
        order = fit(model, windows(24), share=0.9, choice="layers", refits=refits, num_cost_windows=2).order
        maps.append({int(layer): path(torch.ones(1, 16).double()) for layer, path in model.model.skip_paths.items()})
    assert not torch.equal(maps[0][order[0]], maps[1][order[0]])
    torch.testing.assert_close(maps[0][order[-1]], maps[1][order[-1]], rtol=1e-6, atol=1e-9)


def test_forced_tokens_teach_routers_nothing(make_model: Make) -> None:
    model = to_skip(make_model)
    policy = model.model.policy
    torch.nn.init.constant_(policy.bias, 2.0)  # pyright: ignore[reportArgumentType]
    ids = torch.stack([window["input_ids"] for window in windows(2)])
    for forced, learns in ((ids.shape[1], False), (1, True)):
        policy.first_tokens = forced
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        assert bool(policy.bias.grad.any()) == learns  # pyright: ignore[reportOptionalMemberAccess]


def test_what_the_fit_refuses(make_model: Make) -> None:
    with pytest.raises(ValueError, match="skip_path is 'adapter'; only 'linear' and 'low_rank' can be fitted"):
        fit(to_skip(make_model, skip_path="adapter"), windows())
    with pytest.raises(ValueError, match="a fit needs linear gates: 'independent' or 'early_exit' with"):
        fit(make_model(), windows())
    with pytest.raises(ValueError, match="there is no window to fit on"):
        fit(to_skip(make_model), [])
    with pytest.raises(ValueError, match="choice is 'layers'; expected 'tokens', since skip paths of this policy"):
        fit(to_skip(make_model, "middle_out"), windows(), choice="layers")
    with pytest.raises(ValueError, match="order is 'size'; expected one of 'loss', 'influence', 'adjacent'"):
        fit(to_skip(make_model), windows(), order="size")
    with pytest.raises(ValueError, match=r"share is 0\.3; expected a share of the blocks above 0\.4"):
        fit(to_skip(make_model), windows(), share=0.3)
