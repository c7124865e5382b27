"""Several documents in a row, told apart by positions that start again: each is as if it were alone."""

from collections.abc import Callable

import pytest
import torch
from test_exactness import FIXED, check_equal, same
from torch import Tensor

from midskip import MidskipForCausalLM
from midskip.model.packing import PackedBatch
from midskip.testing import reference_forward

Make = Callable[..., MidskipForCausalLM]
# what each row holds: one document; three, one of one token; pads on both sides; pads within and between documents;
# positions with gaps, from elsewhere, and one that repeats; nothing; documents of one token and one of two
POSITIONS = [
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10],
    [0, 1, 2, 3, 0, 0, 1, 2, 3, 4, 5],
    [-1, -1, 0, 1, 2, 0, 1, 2, 3, -1, 99],
    [0, 1, None, 2, 0, None, 1, None, 0, 1, 2],
    [3, 5, 9, 5, 6, 6, 7, 20, 8, 9, 30],
    [None] * 11,
    [0, 0, 0, 0, 0, 7, 7, 6, 5, 4, 0],
]
LENGTHS = [11, 4, 1, 6, 3, 4, 3, 2, 3, 3, 2, 3, 3, 1, 1, 1, 1, 2, 1, 1, 1, 1, 1]
POLICIES = {
    "dense": {"policy": "dense"},
    "mixed": {"gates": "mixed"},
    "open": {"gates": "open"},
    "late": {"gates": "late"},
    "fixed": {"policy": FIXED, "policy_settings": {"skip_share": 0.5}},
    "fractional": {"policy": FIXED, "policy_settings": {"skip_share": 0.3, "fractional": True}},
}


@pytest.fixture
def packed() -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, attention_mask and position_ids [7, 11]; positions at pads are anything."""
    mask_BT = torch.tensor([[p is not None and p not in (-1, 99) for p in row] for row in POSITIONS]).long()
    position_BT = torch.tensor([[-5 if p is None else p for p in row] for row in POSITIONS])
    return torch.randint(31, mask_BT.shape), mask_BT, position_BT


def documents(mask_BT: Tensor, position_BT: Tensor) -> list[tuple[int, list[int]]]:
    """Row and columns of each."""
    found: list[tuple[int, list[int]]] = []
    for b in range(len(mask_BT)):
        before = None
        for t in mask_BT[b].nonzero().flatten().tolist():
            position = int(position_BT[b, t])
            if before is None or position <= before:
                found.append((b, []))
            found[-1][1].append(t)
            before = position
    return found


# ---- who is where


def test_a_position_that_does_not_rise_starts_a_document(packed: tuple[Tensor, Tensor, Tensor]) -> None:
    _, mask_BT, position_BT = packed
    batch = PackedBatch.from_rectangle(mask_BT.bool(), position_BT)
    expected = documents(mask_BT, position_BT)
    assert batch.seqlens == [len(columns) for _, columns in expected] == LENGTHS
    assert batch.sequence_N.tolist() == [d for d, (_, columns) in enumerate(expected) for _ in columns]
    assert batch.column_N.tolist() == [b * 11 + t for b, columns in expected for t in columns]
    assert torch.equal(batch.position_N, position_BT[mask_BT.bool()])
    one = PackedBatch.from_rectangle(mask_BT.bool(), torch.arange(11)[None])
    assert one.seqlens == mask_BT.sum(1).tolist() and one.document_N is None, "a row is one sequence"
    assert PackedBatch.from_rectangle(torch.ones(2, 6).bool(), torch.tensor([[0, 1, 0, 1, 0, 1]])).is_even
    nobody = PackedBatch.from_rectangle(torch.zeros(2, 3).bool(), torch.zeros(2, 3).long())
    assert nobody.num_tokens == 0 and nobody.seqlens == [0, 0] and nobody.is_even


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_keeping_some_keeps_their_documents(packed: tuple[Tensor, Tensor, Tensor], share: float) -> None:
    batch = PackedBatch.from_rectangle(packed[1].bool(), packed[2])
    keep_N = torch.rand(batch.num_tokens) < share
    kept = batch.keep(keep_N)
    assert torch.equal(kept.sequence_N, batch.sequence_N[keep_N])
    assert kept.seqlens == [int((kept.sequence_N == d).sum()) for d in range(len(LENGTHS))]
    assert torch.equal(kept.position_N, batch.position_N[keep_N])
    twice = kept.keep(torch.arange(kept.num_tokens) % 2 == 0)
    assert torch.equal(twice.sequence_N, kept.sequence_N[::2]) and sum(twice.seqlens) == twice.num_tokens


# ---- values and gradients


@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
@pytest.mark.parametrize("policy", POLICIES)
def test_documents_equal_the_reference(
    make_model: Make, packed: tuple[Tensor, Tensor, Tensor], policy: str, skipped_kv: str
) -> None:
    model = make_model(**POLICIES[policy], skipped_kv=skipped_kv, num_hidden_layers=5)
    ids_BT, mask_BT, position_BT = packed
    found, _ = check_equal(model, ids_BT, mask_BT, position_BT)
    present = found["gates"][:, mask_BT.bool()] > 0
    assert present.any() and present.all() == (policy in ("dense", "open"))
    even_1T = torch.tensor([[0, 2, 3, 0, 1, 2, 1, 4, 5]])  # all of one length, which has a path of its own
    check_equal(model, ids_BT[:, :9], torch.ones_like(mask_BT[:, :9]), even_1T)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
@pytest.mark.parametrize("policy", ["mixed", "fractional"])
def test_a_document_among_others_is_as_if_alone(
    make_model: Make, packed: tuple[Tensor, Tensor, Tensor], policy: str, skipped_kv: str, mode: str
) -> None:
    model = make_model(**POLICIES[policy], skipped_kv=skipped_kv).train(mode == "train")
    ids_BT, mask_BT, position_BT = packed
    with torch.set_grad_enabled(mode == "train"):
        together = model(ids_BT, attention_mask=mask_BT, position_ids=position_BT)
        for b, columns in documents(mask_BT, position_BT):
            position_1T = position_BT[b, None, columns]
            alone = model(ids_BT[b, None, columns], position_ids=position_1T)
            same(together.logits[b, columns], alone.logits[0], "logits")
            same(together.gates[:, b, columns], alone.gates[:, 0], "gates")
            if position_1T[0].tolist() == list(range(len(columns))):  # as counted by itself
                same(model(ids_BT[b, None, columns]).logits, alone.logits, "logits without positions")


def test_the_loss_crosses_from_one_document_to_the_next(make_model: Make) -> None:
    model, ids_BT = make_model(), torch.randint(31, (2, 7))
    position_BT = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 1]])
    output = model(ids_BT, position_ids=position_BT, labels=ids_BT)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
    same(output.loss, expected, "loss")


@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
@pytest.mark.parametrize("policy", ["mixed", "dense", "fixed"])
def test_no_leak_to_another_document_or_the_past(make_model: Make, policy: str, skipped_kv: str) -> None:
    model = make_model(**POLICIES[policy], skipped_kv=skipped_kv, num_hidden_layers=5)
    position_BT = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 2, 3, 4, 5, 0, 1]])
    first_BT = torch.tensor([[0, 0, 0, 3, 3, 3, 3, 7], [0, 0, 0, 0, 0, 0, 6, 6]])  # column where its document begins
    embedded_BTD = model.model.embed_tokens(torch.randint(31, (2, 8))).detach().requires_grad_()
    output = model(inputs_embeds=embedded_BTD, position_ids=position_BT)
    for b in range(2):
        for t in range(8):
            reached = output.logits[b, t].sum() + output.gates[:, b, t].sum()
            (gradient_BTD,) = torch.autograd.grad(reached, embedded_BTD, retain_graph=True)
            moves_BT = (gradient_BTD != 0).any(-1)
            first = int(first_BT[b, t])
            assert moves_BT[b, t] and not moves_BT[b, :first].any() and not moves_BT[b, t + 1 :].any()
            assert not moves_BT[1 - b].any()
            assert policy != "dense" or moves_BT[b, first : t + 1].all()


# ---- other precisions


@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
@pytest.mark.parametrize("policy", ["open", "fractional"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_documents_in_less_precision(
    make_model: Make,
    packed: tuple[Tensor, Tensor, Tensor],
    dtype: torch.dtype,
    tolerance: float,
    policy: str,
    skipped_kv: str,
) -> None:
    model = make_model(**POLICIES[policy], skipped_kv=skipped_kv, num_hidden_layers=2)
    ids_BT, mask_BT, position_BT = packed
    expected_BTV = reference_forward(model, ids_BT, mask_BT, position_ids=position_BT).logits.detach()
    for mode in (True, False):
        model.to(dtype).train(mode)
        got_BTV = model(ids_BT, attention_mask=mask_BT, position_ids=position_BT).logits
        assert got_BTV.dtype == dtype
        error = (got_BTV.double() - expected_BTV).norm() / expected_BTV.norm()
        assert 0 < error < tolerance


# ---- positions that are given and tell nothing new


def test_positions_that_go_on_are_one_sequence(make_model: Make, ragged: tuple[Tensor, Tensor]) -> None:
    model = make_model().eval()
    ids_BT, mask_BT = ragged
    expected = model(ids_BT, attention_mask=mask_BT)
    counted_BT = mask_BT.cumsum(1) - 1
    for at_pads in (-1, 1, 10**6):  # as `generate` and others have them
        position_BT = torch.where(mask_BT.bool(), counted_BT, at_pads)
        same(model(ids_BT, attention_mask=mask_BT, position_ids=position_BT).logits, expected.logits, "logits")
    with pytest.raises(ValueError, match="position_ids reach from 0 to 70; this model takes 0 to 63"):
        model(ids_BT, attention_mask=mask_BT, position_ids=torch.where(counted_BT == 8, 70, counted_BT.clamp(min=0)))
    for nobody in (model, make_model(policy_settings={"gates": "hard"}).eval()):
        output = nobody(ids_BT, attention_mask=mask_BT * 0, position_ids=counted_BT)
        assert (output.logits == 0).all()
