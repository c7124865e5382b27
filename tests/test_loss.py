"""The cross-entropy in chunks: torch's own values and gradients, and no more memory than it says."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from midskip import MidskipForCausalLM, meter
from midskip.model.loss import cross_entropy, divergence

TARGET_N = torch.tensor([3, -100, 0, 6, 6, -100, 2])


@pytest.fixture(autouse=True)
def _chunks_of_two_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("midskip.model.loss.CHUNK_LOGITS", 15)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("backend", [None, pytest.param("aot_eager", marks=pytest.mark.integration)])
def test_it_is_torchs(dtype: torch.dtype, overwrite: bool, backend: str | None) -> None:
    plain_NV = torch.randn(7, 7, dtype=dtype).requires_grad_()
    ours_NV = plain_NV.detach().clone().requires_grad_()
    wide = torch.promote_types(dtype, torch.float32)
    expected_N = F.cross_entropy(plain_NV.to(wide), TARGET_N, reduction="none")
    found_N = cross_entropy(ours_NV.clone(), TARGET_N, overwrite, backend)
    assert found_N.dtype == wide
    torch.testing.assert_close(found_N, expected_N, **({} if backend else {"rtol": 0, "atol": 0}))
    ahead_N = torch.randn(7, dtype=wide)
    expected_N.backward(ahead_N)
    found_N.backward(ahead_N)
    torch.testing.assert_close(ours_NV.grad, plain_NV.grad)
    assert torch.equal(cross_entropy(ours_NV.detach(), TARGET_N), expected_N) and not len(
        cross_entropy(ours_NV[:0], TARGET_N[:0])
    )


def test_gradcheck() -> None:
    assert gradcheck(
        lambda x_NV: cross_entropy(x_NV, TARGET_N), torch.randn(7, 7, dtype=torch.float64).requires_grad_()
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_divergence_is_torchs(dtype: torch.dtype) -> None:
    """Of more rows than are worked on at a time, and of none."""
    logits, target = (torch.randn(11, 7).to(dtype).requires_grad_() for _ in range(2))
    weight_N = torch.rand(11, dtype=torch.promote_types(dtype, torch.float32))
    wide = weight_N.dtype
    plain = F.kl_div(
        logits.to(wide).log_softmax(1), target.detach().to(wide).log_softmax(1), reduction="none", log_target=True
    ).sum(1)
    found = divergence(logits, target)
    torch.testing.assert_close(found, plain)
    (got,) = torch.autograd.grad((weight_N * found).sum(), logits)
    (expected,) = torch.autograd.grad((weight_N * plain).sum(), logits)
    torch.testing.assert_close(got, expected)
    assert divergence(logits, logits).abs().max() < 1e-6 and divergence(logits[:0], target[:0]).shape == (0,)


def test_the_gradient_is_written_over_the_logits_only_if_told() -> None:
    for overwrite in (False, True):
        weight = torch.ones((), requires_grad=True)
        logits_NV = weight * torch.randn(7, 7)
        before_NV, gradients = logits_NV.detach().clone(), []
        logits_NV.register_hook(gradients.append)
        nats_N = cross_entropy(logits_NV, TARGET_N, overwrite)
        nats_N.sum().backward(retain_graph=True)
        assert torch.equal(logits_NV, before_NV) is not overwrite
        assert (gradients[0].data_ptr() == logits_NV.data_ptr()) is overwrite
        if overwrite:
            with pytest.raises(RuntimeError, match="a second backward pass of one forward pass"):
                nats_N.sum().backward()
        else:
            nats_N.sum().backward()


def test_a_meter_does_not_keep_the_logits(make_model: Callable[..., MidskipForCausalLM]) -> None:
    model, ids_BT = make_model("mixed"), torch.randint(31, (2, 9))
    with meter(model) as work:
        loss = model(ids_BT, labels=ids_BT, output_logits=False).loss
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="a second backward pass"):  # they were written over
            loss.backward()
    assert work.head_rows == 18


@pytest.mark.parametrize("hooked", [False, True])
def test_a_model_without_logits_has_the_same_loss_and_gradients(
    make_model: Callable[..., MidskipForCausalLM], ragged: tuple[Tensor, Tensor], hooked: bool
) -> None:
    ids_BT, valid_BT = ragged
    model, seen, found = make_model("mixed"), [], []
    if hooked:
        model.lm_head.register_forward_hook(lambda head, given, logits: seen.append(logits))
    for output_logits in (True, False):
        model.zero_grad()
        output = model(ids_BT, attention_mask=valid_BT, labels=ids_BT, output_logits=output_logits)
        assert (output.logits is not None) is output_logits
        held = [logits.detach().clone() for logits in seen]
        output.loss.backward()
        found.append([output.loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        assert all(map(torch.equal, held, seen)), "what a hook holds stays"
    assert len(found[0]) > 20
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
