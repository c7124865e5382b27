"""The gate regularizers: against numbers of the released code, and against their own definitions."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from midskip.regularizers import FeedbackRegularizer, Regularizer, build_regularizer, gate_targets

REFERENCE = json.loads((Path(__file__).parent / "data" / "controllers.json").read_text())
TARGETS = {"mean_target_start": 1.0, "mean_target_end": 0.25}
FEEDBACK = ("adaptive", "proportional", "proportional_derivative")
EVERY: dict[str, dict[str, Any]] = {
    "none": {},
    "sparsity": {},
    "sparsity_variance": {},
    "sparsity_variance_l2": TARGETS,
    **{name: TARGETS | {"mean_target_start": 0.9} for name in FEEDBACK},
}


class ShareRegularizer(Regularizer):
    """An outside author's: one coefficient, moved by the share of tokens present."""

    def __init__(self, num_layers: int, *, target: float) -> None:
        super().__init__(num_layers)
        self.target = target
        self.mean_coefficients = torch.zeros(num_layers)
        self.changing = ("mean_coefficients",)

    def update(self, mean_L: Tensor, variance_L: Tensor, share_L: Tensor | None = None) -> None:
        assert share_L is not None
        self.mean_coefficients = self.mean_coefficients + (share_L.mean() - self.target)


def make(name: str, num_layers: int) -> Regularizer:
    """A regularizer of each kind with coefficients that are not all 0, if it has any."""
    settings = EVERY[name]
    if num_layers <= 2 and settings:
        settings = {"mean_targets": [0.5]}
    regularizer = build_regularizer(name, num_layers, **settings)
    generator = torch.Generator().manual_seed(num_layers)
    for _ in range(3):
        regularizer.update(*torch.rand(2, num_layers, generator=generator))
    return regularizer


def random_gates(num_layers: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(num_layers, *shape, generator=torch.Generator().manual_seed(7), dtype=dtype)


@pytest.mark.parametrize("case", REFERENCE["cases"], ids=lambda case: case["controller"])
def test_agrees_with_the_released_code(case: dict[str, Any]) -> None:
    gates_LBT = torch.tensor(REFERENCE["gates"])
    regularizer = build_regularizer(case["controller"], len(gates_LBT), **case["config"])
    assert len(case["steps"]) == len(REFERENCE["gates_mean"]) == 8
    for step, mean_L, variance_L in zip(case["steps"], REFERENCE["gates_mean"], REFERENCE["gates_var"], strict=True):
        loss = regularizer.loss(gates_LBT)
        assert loss.shape == () and loss.dtype == torch.float32
        assert loss.item() == pytest.approx(step["loss_before_update"], abs=1e-6)
        regularizer.update(torch.tensor(mean_L), torch.tensor(variance_L))
        for got_L, expected_L in (
            (regularizer.mean_coefficients, step["mean_coefs"]),
            (regularizer.variance_coefficients, step["var_coefs"]),
        ):
            assert got_L.dtype == torch.float32
            torch.testing.assert_close(got_L, torch.tensor(expected_L), atol=1e-6, rtol=0)


@pytest.mark.parametrize("num_layers", [1, 5])
@pytest.mark.parametrize("name", EVERY)
def test_gradient_is_that_of_the_loss(name: str, num_layers: int) -> None:
    regularizer = make(name, num_layers)
    gates_LBT = random_gates(num_layers, 2, 3, dtype=torch.float64).requires_grad_()
    valid_BT = torch.tensor([[True, True, False], [True, True, True]])
    assert regularizer.loss(gates_LBT).dtype == torch.float64
    assert torch.autograd.gradcheck(regularizer.loss, (gates_LBT,))
    assert torch.autograd.gradcheck(lambda gates_LBT: regularizer.loss(gates_LBT, valid_BT), (gates_LBT,))


@pytest.mark.parametrize("name", EVERY)
def test_tokens_that_are_not_valid_are_as_if_absent(name: str) -> None:
    regularizer = make(name, 5)
    gates_LBT = random_gates(5, 2, 7)
    valid_BT = torch.tensor([[False, True, True, True, False, True, False], [True] * 7])
    present_LBT = gates_LBT[:, valid_BT][:, None].requires_grad_()
    expected = regularizer.loss(present_LBT)
    expected.backward()
    for junk in (1.0, torch.nan, torch.inf):
        padded_LBT = gates_LBT.where(valid_BT, junk).requires_grad_()
        loss = regularizer.loss(padded_LBT, valid_BT)
        loss.backward()
        torch.testing.assert_close(loss, expected)
        assert padded_LBT.grad is not None and present_LBT.grad is not None
        torch.testing.assert_close(padded_LBT.grad[:, valid_BT][:, None], present_LBT.grad)
        assert (padded_LBT.grad[:, ~valid_BT] == 0).all()


@pytest.mark.parametrize("name", EVERY)
def test_one_valid_token_has_no_variance_and_none_has_no_gradient(name: str) -> None:
    regularizer = make(name, 3)
    gates_LBT = random_gates(3, 2, 2).requires_grad_()
    one_BT = torch.tensor([[False, False], [False, True]])
    mean_L, variance_L = regularizer.moments(gates_LBT, one_BT)
    assert torch.equal(mean_L, gates_LBT[:, 1, 1]) and torch.equal(variance_L, torch.zeros(3))
    torch.testing.assert_close(regularizer.loss(gates_LBT, one_BT), regularizer.loss(gates_LBT[:, 1:, 1:]))
    for valid_BT in (one_BT, torch.zeros_like(one_BT)):
        gates_LBT.grad = None
        loss = regularizer.loss(gates_LBT, valid_BT)
        loss.backward()
        assert gates_LBT.grad is not None
        assert loss.isfinite() and gates_LBT.grad.isfinite().all()
    assert (gates_LBT.grad == 0).all()


def test_losses_are_what_they_say() -> None:
    gates_LBT = random_gates(3, 4, 5)
    mean_L = gates_LBT.mean((1, 2))
    variance_L = gates_LBT.flatten(1).var(1)
    settings = {"mean_coefficient": 3.0, "variance_coefficient": -2.0}
    loss = build_regularizer("sparsity_variance", 3, **settings).loss(gates_LBT)
    torch.testing.assert_close(loss, 3 * mean_L.mean() - 2 * variance_L.mean())

    distance = build_regularizer("sparsity_variance_l2", 3, mean_targets=[0.8, 0.3], **settings)
    targets = torch.tensor([0.8, 0.3, 0.8]), torch.tensor([0.16, 0.21, 0.16])
    expected = 3 * (mean_L - targets[0]).norm() - 2 * (variance_L - targets[1]).norm()
    torch.testing.assert_close(distance.loss(gates_LBT), expected)


def test_distance_of_zero_has_gradient_zero() -> None:
    gates_LBT = torch.tensor([[[0.0, 1.0, 0.0, 1.0]]], requires_grad=True)
    delta = (1 / 3) - 0.25  # unbiased variance of the four gates, less 0.5 * (1 - 0.5)
    regularizer = build_regularizer("sparsity_variance_l2", 1, mean_targets=[0.5], var_target_delta=delta)
    regularizer.loss(gates_LBT).backward()
    assert gates_LBT.grad is not None and gates_LBT.grad.isfinite().all()


def test_math_is_float32_even_under_autocast() -> None:
    regularizer = make("proportional", 4)
    gates_LBT = random_gates(4, 2, 9)
    with torch.autocast("cpu", torch.bfloat16):
        loss = regularizer.loss(gates_LBT)
    assert torch.equal(loss, regularizer.loss(gates_LBT))
    low = gates_LBT.to(torch.bfloat16)
    assert torch.equal(regularizer.loss(low), regularizer.loss(low.float()))


def test_tensors_are_float32_whatever_the_default() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        regularizer = make("proportional_derivative", 3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {getattr(regularizer, name).dtype for name in regularizer.changing} == {torch.float32}


@pytest.mark.parametrize(
    ("num_layers", "settings", "expected"),
    [
        (4, TARGETS, [1.0, 0.25, 0.25, 1.0]),
        (5, TARGETS, [1.0, 0.625, 0.25, 0.625, 1.0]),
        (3, TARGETS, [1.0, 0.25, 1.0]),
        (2, {"mean_target_start": 0.5, "mean_target_end": 0.5}, [0.5, 0.5]),
        (1, {"mean_target_start": 0, "mean_target_end": 0}, [0.0]),
        (1, {"mean_targets": [0.3]}, [0.3]),
        (5, {"mean_targets": (0.9, 0.6, 0.2)}, [0.9, 0.6, 0.2, 0.6, 0.9]),
    ],
)
def test_targets_are_linear_and_mirrored(num_layers: int, settings: dict[str, Any], expected: list[float]) -> None:
    given = dict.fromkeys(("mean_target_start", "mean_target_end", "mean_targets")) | settings
    mean_L, variance_L = gate_targets(num_layers, **given, var_target_delta=0.0)
    torch.testing.assert_close(mean_L, torch.tensor(expected))
    torch.testing.assert_close(variance_L, mean_L * (1 - mean_L))
    _, shifted_L = gate_targets(num_layers, **given, var_target_delta=-0.1)
    torch.testing.assert_close(shifted_L, (variance_L - 0.1).clamp(min=0))


def test_proportional_derivative_moves_only_while_the_error_grows() -> None:
    regularizer = build_regularizer("proportional_derivative", 1, mean_targets=[0.5])
    moves: list[float] = []
    for mean in (0.9, 0.8, 0.8, 0.95, 0.95, 0.05):
        before = regularizer.mean_coefficients
        regularizer.update(torch.tensor([mean]), torch.tensor([0.25]))
        moves.append(round((regularizer.mean_coefficients - before).item(), 6))
    # Not at the first error; not while it shrinks; while it is above its average; and on the far side of 0.
    assert moves == [0.0, 0.0, 0.0, 0.0045, 0.0045, -0.0045]
    assert regularizer.variance_coefficients.item() == 0  # an error that stays 0


def test_a_steady_error_does_not_count_as_growing() -> None:
    regularizer = build_regularizer("proportional_derivative", 4, mean_targets=[0.1, 0.2])
    statistics = random_gates(2, 4)
    for _ in range(50):
        regularizer.update(*statistics)
    assert not regularizer.mean_coefficients.any() and not regularizer.variance_coefficients.any()


@pytest.mark.parametrize("name", FEEDBACK)
def test_coefficients_are_clamped_and_small_errors_ignored(name: str) -> None:
    settings = {"mean_targets": [0.5], "coef_max": 0.02, "coef_min": -0.01, "delta_min": 0.1}
    regularizer = build_regularizer(name, 2, coef_update_multiplier=1.0, **settings)
    for error in (0.05, 0.09, 0.3):
        assert not regularizer.mean_coefficients.any()
        regularizer.update(torch.tensor([0.5 + error, 0.5 - error]), torch.full((2,), 0.25))
    torch.testing.assert_close(regularizer.mean_coefficients, torch.tensor([0.02, -0.01]))
    assert not regularizer.variance_coefficients.any()


@pytest.mark.parametrize("name", EVERY)
def test_resumed_run_is_the_same_bit_for_bit(name: str) -> None:
    steps = random_gates(9, 2, 5)
    gates_LBT = random_gates(5, 2, 7)
    whole = build_regularizer(name, 5, **EVERY[name])
    for stop in (0, 1, 4):
        for step in steps[:stop]:
            whole.update(*step)
        resumed = build_regularizer(name, 5, **EVERY[name])
        resumed.load_state_dict(json.loads(json.dumps(whole.state_dict(), allow_nan=False)))
        for step in steps[stop:]:
            whole.update(*step)
            resumed.update(*step)
            assert resumed.state_dict() == whole.state_dict()
            assert torch.equal(resumed.mean_coefficients, whole.mean_coefficients)
            assert torch.equal(resumed.variance_coefficients, whole.variance_coefficients)
        assert torch.equal(resumed.loss(gates_LBT), whole.loss(gates_LBT))


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"mean_coefficients": [0.0, 0.0]},
        {"mean_coefficients": [0.0, 0.0], "variance_coefficients": [0.0, 0.0], "momentum": 1.0},
        {"mean_coefficients": [0.0, float("nan")], "variance_coefficients": [0.0, 0.0]},
        {"mean_coefficients": "many", "variance_coefficients": [0.0, 0.0]},
        {"mean_coefficients": [0.0, 0.0], "variance_coefficients": [[0.0], [0.0, 0.0]]},
        {"mean_coefficients": [1.0, 1.0], "variance_coefficients": 0.0},
    ],
)
def test_a_state_of_another_shape_is_refused_and_changes_nothing(broken: dict[str, Any]) -> None:
    regularizer = build_regularizer("adaptive", 2, mean_targets=[0.5])
    before = regularizer.state_dict()
    with pytest.raises(ValueError, match=r"keys .* got|must be finite numbers of shape \[2\], got"):
        regularizer.load_state_dict(broken)
    assert regularizer.state_dict() == before


def test_a_state_keeps_its_dtypes() -> None:
    regularizer = ShareRegularizer(2, target=0.5)
    regularizer.mean_coefficients = torch.tensor([1 / 3, 2 / 3], dtype=torch.float64)
    again = ShareRegularizer(2, target=0.5)
    again.mean_coefficients = torch.zeros(2, dtype=torch.float64)
    again.load_state_dict(json.loads(json.dumps(regularizer.state_dict())))
    assert torch.equal(again.mean_coefficients, regularizer.mean_coefficients)
    again.mean_coefficients = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="must be finite numbers"):
        again.load_state_dict(regularizer.state_dict())


def test_a_state_of_another_rule_is_refused() -> None:
    state = build_regularizer("proportional", 4, **TARGETS).state_dict()
    with pytest.raises(ValueError, match="slow_errors"):
        build_regularizer("proportional_derivative", 4, **TARGETS).load_state_dict(state)
    with pytest.raises(ValueError, match="like the one that saved it"):
        build_regularizer("none", 4).load_state_dict(state)


def test_an_outside_class_is_built_by_import_path() -> None:
    regularizer = build_regularizer(f"{__name__}:ShareRegularizer", 3, target=0.5)
    assert isinstance(regularizer, ShareRegularizer)
    share_L = torch.tensor([1.0, 0.5, 0.75])
    regularizer.update(torch.zeros(3), torch.zeros(3), share_L)
    assert regularizer.loss(torch.ones(3, 1, 2)).item() == pytest.approx(0.25)
    copy = build_regularizer(f"{__name__}:ShareRegularizer", 3, target=0.5)
    copy.load_state_dict(regularizer.state_dict())
    assert torch.equal(copy.mean_coefficients, regularizer.mean_coefficients)


@pytest.mark.parametrize(
    ("name", "settings", "match"),
    [
        ("sparse", {}, "unknown regularizer 'sparse'.*'none', 'sparsity', .*package.module:Class"),
        ("midskip.regularizers:", {}, "unknown regularizer"),
        ("midskip.no_such_module:Thing", {}, "cannot be loaded: No module named"),
        ("midskip.regularizers:Thing", {}, "cannot be loaded: .*Thing"),
        ("midskip.regularizers:build_regularizer", {}, "is <function.*expected a subclass of .*Regularizer"),
        (f"{__name__}:ShareRegularizer", {"aim": 1}, "settings are: target"),
        (f"{__name__}:ShareRegularizer", {}, "missing a required argument: 'target'"),
        ("none", {"mean_coefficient": 1.0}, "mean_coefficient cannot be set; its settings are: none"),
        ("sparsity", {"mean_target_start": 1.0}, "unexpected.*settings are: mean_coefficient$"),
        ("sparsity_variance_l2", TARGETS | {"mean_coefficient": None}, "mean_coefficient must be a number"),
        ("adaptive", TARGETS | {"coef_update_multipler": 1.0}, "unexpected.*coef_update_multiplier"),
        ("adaptive", {}, "give mean_target_start and mean_target_end, or mean_targets"),
        ("adaptive", {"mean_target_start": 1.0}, "mean_target_start=1.0, mean_target_end=None"),
        ("adaptive", TARGETS | {"mean_targets": [1.0, 0.5]}, "or mean_targets instead of them"),
        ("adaptive", {"mean_targets": [1.0]}, r"list of 2 numbers.*first half of 4.*got \[1.0\]"),
        ("adaptive", {"mean_targets": "10"}, "list of 2 numbers.*got '10'"),
        (
            "adaptive",
            {"mean_targets": [1.0, 1.5]},
            "each of mean_targets must be a number from 0 to 1, got 1.5",
        ),
        ("adaptive", TARGETS | {"mean_target_end": -0.1}, "mean_target_end must be .* got -0.1"),
        (
            "adaptive",
            TARGETS | {"var_target_delta": 2},
            "var_target_delta must be a number from -1 to 1, got 2",
        ),
        ("adaptive", TARGETS | {"coef_max": -0.1}, "coef_max must be a number from 0 to inf, got -0.1"),
        ("adaptive", TARGETS | {"coef_min": 0.1}, "coef_min must be a number from -inf to 0, got 0.1"),
        ("adaptive", TARGETS | {"delta_min": -1.0}, "delta_min must be"),
        ("adaptive", TARGETS | {"coef_update_multiplier": float("nan")}, "coef_update_multiplier must be"),
        ("sparsity", {"mean_coefficient": True}, "mean_coefficient must be .* got True"),
    ],
)
def test_names_and_settings_that_are_not_known_are_refused(name: str, settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build_regularizer(name, 4, **settings)


@pytest.mark.parametrize("num_layers", [0, 2.0, True])
def test_a_number_of_layers_that_is_none_is_refused(num_layers: Any) -> None:
    with pytest.raises(ValueError, match="num_layers must be a whole number of at least 1, got"):
        build_regularizer("none", num_layers)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_an_end_that_would_change_nothing_is_refused(num_layers: int) -> None:
    with pytest.raises(ValueError, match=r"room for one mean target.* must be equal, got 1.0 and 0.25"):
        build_regularizer("adaptive", num_layers, **TARGETS)


def test_a_rule_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rule must be 'sign', 'error' or 'growing', got 'errors'"):
        FeedbackRegularizer(2, rule="errors", coef_update_multiplier=1.0, mean_targets=[1])  # pyright: ignore[reportArgumentType]


def test_gates_of_another_shape_are_refused() -> None:
    regularizer = make("adaptive", 4)
    gates_LBT = torch.zeros(4, 2, 3)
    for wrong in (gates_LBT[0], gates_LBT[:3], gates_LBT.bool()):
        with pytest.raises(ValueError, match=r"gates must be floating point \[4 layers, sequences, positions\], got"):
            regularizer.loss(wrong)
    for wrong in (torch.ones(3, 2).bool(), torch.ones(2, 3).long(), torch.ones(2, 1).bool()):
        with pytest.raises(ValueError, match=r"valid must be torch.bool \[2, 3\].* got"):
            regularizer.loss(gates_LBT, wrong)


def test_statistics_of_another_shape_or_not_finite_are_refused() -> None:
    regularizer = make("adaptive", 2)
    before = regularizer.state_dict()
    right_L = torch.full((2,), 0.2)
    for wrong_L in (right_L[:1], right_L[None], torch.tensor([0.1, torch.nan])):
        with pytest.raises(ValueError, match="mean_L must be 2 finite numbers, got"):
            regularizer.update(wrong_L, right_L)
        with pytest.raises(ValueError, match="variance_L must be 2 finite numbers, got"):
            regularizer.update(right_L, wrong_L)
    assert regularizer.state_dict() == before
