"""Operations with a backward pass of their own: values and gradients against plain torch."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from midskip.model.ops import rotate, scaled_norm

EPS = 1e-5


def draw(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = True) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


def plain_norm(
    x_ND: Tensor, weight_D: Tensor, eps: float, gate_N: Tensor | None = None, residual_ND: Tensor | None = None
) -> Tensor:
    out_ND = x_ND / (x_ND.square().mean(-1, keepdim=True) + eps).sqrt() * weight_D
    out_ND = out_ND if gate_N is None else out_ND * gate_N[:, None]
    return out_ND if residual_ND is None else residual_ND + out_ND


def plain_rotate(x_NHK: Tensor, angle_NP: Tensor, feature_N: Tensor | None = None) -> Tensor:
    turned = torch.complex(*x_NHK.chunk(2, -1)) * torch.polar(torch.ones_like(angle_NP), angle_NP)[:, None]
    out_NHK = torch.cat((turned.real, turned.imag), -1)
    if feature_N is None:
        return out_NHK
    return torch.cat((out_NHK, feature_N[:, None, None].expand(-1, x_NHK.shape[1], 1)), -1)


def rotary(angle_NP: Tensor) -> tuple[Tensor, Tensor]:
    return angle_NP.cos().repeat(1, 2)[:, None], angle_NP.sin()[:, None]


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 63])
@pytest.mark.parametrize("has_gate, has_residual", [(False, False), (True, False), (False, True), (True, True)])
def test_scaled_norm_is_the_plain_one(num_tokens: int, has_gate: bool, has_residual: bool) -> None:
    x, weight = draw(num_tokens, 5), draw(5)
    gate = torch.rand(num_tokens, dtype=torch.float64).requires_grad_() if has_gate else None
    residual = draw(num_tokens, 5) if has_residual else None
    inputs = [tensor for tensor in (x, weight, gate, residual) if tensor is not None]
    got, expected = scaled_norm(x, weight, EPS, gate, residual), plain_norm(x, weight, EPS, gate, residual)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)
    ahead = draw(num_tokens, 5, grad=False)
    for one, other in zip(
        torch.autograd.grad(got, inputs, ahead), torch.autograd.grad(expected, inputs, ahead), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("has_gate, has_residual", [(False, False), (True, False), (False, True), (True, True)])
def test_scaled_norm_gradcheck(has_gate: bool, has_residual: bool) -> None:
    gate = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64).requires_grad_() if has_gate else None
    residual = draw(3, 4) if has_residual else None
    assert gradcheck(scaled_norm, (draw(3, 4), draw(4), EPS, gate, residual))


def test_scaled_norm_leaves_its_inputs_alone() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        inputs = draw(3, 4, dtype=dtype), draw(4, dtype=dtype), torch.rand(3), draw(3, 4, dtype=dtype)
        copies = [tensor.detach().clone() for tensor in inputs]
        x, weight, gate, residual = inputs
        scaled_norm(x, weight, EPS, gate, residual).sum().backward()
        scaled_norm(x, weight, EPS).sum().backward()
        assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))


def test_scaled_norm_of_zeros_is_zero() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    out = scaled_norm(x, torch.ones(4), EPS)
    out.sum().backward()
    assert (out == 0).all() and x.grad.isfinite().all()


@pytest.mark.parametrize("has_gate, has_residual", [(False, False), (True, True)])
def test_scaled_norm_in_bfloat16_rounds_only_the_result(has_gate: bool, has_residual: bool) -> None:
    x, weight = draw(63, 32, dtype=torch.bfloat16), torch.ones(32, dtype=torch.bfloat16, requires_grad=True)
    gate = torch.rand(63).requires_grad_() if has_gate else None
    residual = draw(63, 32, dtype=torch.bfloat16) if has_residual else None
    inputs = [tensor for tensor in (x, weight, gate, residual) if tensor is not None]
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact = plain_norm(wide[0], wide[1], EPS, *wide[2:])
    got = scaled_norm(x, weight, EPS, gate, residual)
    assert got.dtype == torch.bfloat16
    # half a unit in the last of 8 bits, for the result and, where it is a sum, for what is added
    size = exact.abs() + (0 if residual is None else (exact - wide[-1]).abs())
    assert ((got.double() - exact).abs() <= 2**-8 * size + 1e-6).all()
    ahead = torch.randn(63, 32).bfloat16()
    found = torch.autograd.grad(got, inputs, ahead)
    for one, other, tensor in zip(found, torch.autograd.grad(exact, wide, ahead.double()), inputs, strict=True):
        assert one.dtype == tensor.dtype
        assert (one.double() - other).norm() <= 2**-8 * other.norm()


def test_scaled_norm_takes_the_dtype_of_its_residual() -> None:
    x, residual = draw(3, 4, dtype=torch.bfloat16), draw(3, 4, dtype=torch.float32)
    out = scaled_norm(x, torch.ones(4), EPS, torch.rand(3), residual)
    assert out.dtype == torch.float32
    out.sum().backward()
    assert x.grad.dtype == torch.bfloat16 and torch.equal(residual.grad, torch.ones(3, 4))


@pytest.mark.parametrize("has_feature", [False, True])
@pytest.mark.parametrize("num_tokens, width", [(0, 4), (1, 2), (7, 6), (63, 8)])
def test_rotate_is_the_plain_one(num_tokens: int, width: int, has_feature: bool) -> None:
    x, angle = draw(num_tokens, 3, width), 3 * draw(num_tokens, width // 2, grad=False)
    feature = draw(num_tokens) if has_feature else None
    inputs = [x] if feature is None else [x, feature]
    got, expected = rotate(x, rotary(angle), feature), plain_rotate(x, angle, feature)
    assert got.shape == (num_tokens, 3, width + has_feature)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)
    ahead = torch.randn_like(got)
    for one, other in zip(
        torch.autograd.grad(got, inputs, ahead), torch.autograd.grad(expected, inputs, ahead), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(got[..., :width].norm(dim=-1), x.norm(dim=-1))  # it only turns


@pytest.mark.parametrize("has_feature", [False, True])
def test_rotate_gradcheck(has_feature: bool) -> None:
    angle = draw(3, 2, grad=False)
    feature = draw(3) if has_feature else None
    assert gradcheck(lambda x, f: rotate(x, rotary(angle), f), (draw(3, 2, 4), feature))


def test_rotate_gives_no_gradient_to_a_constant_feature() -> None:
    x = draw(3, 2, 4)
    rotate(x, rotary(draw(3, 2, grad=False)), torch.ones(3, dtype=torch.float64)).sum().backward()
    assert x.grad is not None


def test_rotate_in_bfloat16() -> None:
    x, angle = draw(63, 2, 8, dtype=torch.bfloat16), 3 * draw(63, 4, dtype=torch.float32, grad=False)
    before = x.detach().clone()
    got = rotate(x, rotary(angle), torch.ones(63).bfloat16())
    exact = plain_rotate(x.detach().double(), angle.double())
    assert got.dtype == torch.bfloat16 and (got[..., 8] == 1).all() and torch.equal(x, before)
    # cosine, sine, two products and a sum are rounded
    size = x.detach().double().abs().amax(-1, keepdim=True)
    assert ((got[..., :8].double() - exact).abs() <= 4 * 2**-8 * size).all()
