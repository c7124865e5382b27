"""The contract that every policy must keep: each way to break it is noticed, and named."""

from itertools import count, cycle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from midskip.model.packing import PackedBatch
from midskip.policies import Decision, Policy
from midskip.policies.middle_out import MiddleOut
from midskip.testing import check_policy


class Threshold(Policy):
    """Lawful: a token runs a layer if a learned score of it is below 1, with 1 minus the score as its gate. What
    follows fails one check each."""

    def __init__(self, num_layers: int, width: int, initializer_range: float = 0.02) -> None:
        super().__init__(num_layers, width, initializer_range)
        self.score = nn.Linear(width, num_layers)

    def scores(self, layer: int, h_ND: Tensor, batch: PackedBatch) -> Tensor:
        score_N = self.score(h_ND)[:, layer]
        return torch.sigmoid(score_N.to(torch.promote_types(score_N.dtype, torch.float32))) * 1.6

    def decide(self, layer: int, h_ND: Tensor, state: dict[str, Any], batch: PackedBatch) -> Decision:
        return self.decision(self.scores(layer, h_ND, batch))

    def decision(self, score_N: Tensor) -> Decision:
        keep_N = score_N < 1
        gate_N = torch.where(keep_N, 1 - score_N, 0)
        return Decision(keep_N, gate_N, gate_N)


class NoDecision(Threshold):
    def decide(self, layer: int, h_ND: Tensor, state: dict[str, Any], batch: PackedBatch) -> Any:
        return self.scores(layer, h_ND, batch) < 1


class KeepIsANumber(Threshold):
    def decision(self, score_N: Tensor) -> Decision:
        return Decision((score_N < 1).long())


class KeepIsAList(Threshold):
    def decision(self, score_N: Tensor) -> Decision:
        return Decision((score_N < 1).tolist())  # pyright: ignore[reportArgumentType]


class GateAboveOne(Threshold):
    def decision(self, score_N: Tensor) -> Decision:
        return Decision(None, 0.5 + score_N, None)


class GateBelowZero(Threshold):
    def decision(self, score_N: Tensor) -> Decision:
        return Decision(None, 0.5 - score_N, None)


class GateIsNotANumber(Threshold):
    def decision(self, score_N: Tensor) -> Decision:
        return Decision(None, score_N.log() / 0, None)


class KeyGateOfZero(Threshold):
    def decision(self, score_N: Tensor) -> Decision:
        return Decision(None, None, (1 - score_N).clamp(min=0))


class HalfPrecision(Threshold):
    def decision(self, score_N: Tensor) -> Decision:
        return Decision(None, score_N.bfloat16() / 2, None)


class HalfPrecisionInAHalfModel(Threshold):
    def scores(self, layer: int, h_ND: Tensor, batch: PackedBatch) -> Tensor:
        return torch.sigmoid(self.score(h_ND)[:, layer]) * 1.6


class OneGateForAll(Threshold):
    def decision(self, score_N: Tensor) -> Decision:
        return Decision(None, score_N[:1] / 2, None)


class GateOnlyWrongInTraining(Threshold):
    def decision(self, score_N: Tensor) -> Decision:
        return Decision(None, score_N / (0.5 if self.training else 2), None)


class TossesACoin(Threshold):
    def scores(self, layer: int, h_ND: Tensor, batch: PackedBatch) -> Tensor:
        return super().scores(layer, h_ND, batch) * torch.rand(len(h_ND), dtype=h_ND.dtype)


class SeesTheNextToken(Threshold):
    def scores(self, layer: int, h_ND: Tensor, batch: PackedBatch) -> Tensor:
        own_N = super().scores(layer, h_ND, batch)
        follows_N = batch.sequence_N == batch.sequence_N.roll(-1)
        return torch.where(follows_N, own_N.roll(-1), own_N)


class SeesTheMean(Threshold):
    def scores(self, layer: int, h_ND: Tensor, batch: PackedBatch) -> Tensor:
        return super().scores(layer, h_ND + h_ND.mean(0), batch)


class SeesItsBatchMates(Threshold):
    """By the first token of each sequence, which is no future of any."""

    def scores(self, layer: int, h_ND: Tensor, batch: PackedBatch) -> Tensor:
        return super().scores(layer, h_ND + h_ND[batch.position_N == 0].mean(0), batch)


class CountsPads(Threshold):
    def scores(self, layer: int, h_ND: Tensor, batch: PackedBatch) -> Tensor:
        return super().scores(layer, h_ND, batch) * (batch.column_N % batch.num_columns) / 10


class KnowsTheLength(Threshold):
    def scores(self, layer: int, h_ND: Tensor, batch: PackedBatch) -> Tensor:
        length_N = torch.tensor(batch.seqlens, dtype=h_ND.dtype)[batch.sequence_N]
        return super().scores(layer, h_ND, batch) * length_N / 10


class ReadsItsPast(Threshold):
    """Of each sequence, the token before; nothing else is wrong with it."""

    def scores(self, layer: int, h_ND: Tensor, batch: PackedBatch) -> Tensor:
        follows_N = batch.sequence_N == batch.sequence_N.roll(1)
        follows_N[:1] = False
        return super().scores(layer, h_ND + torch.where(follows_N[:, None], h_ND.roll(1, 0), 0), batch)


class ReadsItsPastAndSaysSo(ReadsItsPast):
    looks_back = True


class AsksForItsFirstToken(Threshold):
    """It is not there where a pass goes on from a cache."""

    def scores(self, layer: int, h_ND: Tensor, batch: PackedBatch) -> Tensor:
        if batch.position_N[batch.index_in_sequence_N == 0].any():
            raise RuntimeError("where is it")
        return super().scores(layer, h_ND, batch)


class SlopeWithoutEnd(Threshold):
    """At its start the weight is 0 in one layer: the square root's slope is infinite there."""

    def scores(self, layer: int, h_ND: Tensor, batch: PackedBatch) -> Tensor:
        return super().scores(layer, h_ND, batch) * 0.1 + (h_ND[:, 0] * 0).sqrt()


class UnusedParameter(Threshold):
    def __init__(self, num_layers: int, width: int, initializer_range: float = 0.02) -> None:
        super().__init__(num_layers, width, initializer_range)
        self.spare = nn.Parameter(torch.zeros(width))


class _ByBatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_N: Tensor) -> Tensor:
        return x_N.clone()

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> Tensor:
        return grad_N / max(1, len(grad_N))


class GradientByBatchSize(Threshold):
    def scores(self, layer: int, h_ND: Tensor, batch: PackedBatch) -> Tensor:
        return _ByBatch.apply(super().scores(layer, h_ND, batch))


class GrowsWithEachCall(Threshold):
    """Counts its calls over all passes."""

    calls = 0

    def scores(self, layer: int, h_ND: Tensor, batch: PackedBatch) -> Tensor:
        self.calls += 1
        return super().scores(layer, h_ND, batch) * 0.5 ** (self.calls % 7)


class Forgets(Threshold):
    """Each one made has another temper, and it is not saved."""

    number = count()

    def __init__(self, num_layers: int, width: int, initializer_range: float = 0.02) -> None:
        super().__init__(num_layers, width, initializer_range)
        self.temper = 1 / (2 + next(self.number))

    def scores(self, layer: int, h_ND: Tensor, batch: PackedBatch) -> Tensor:
        return super().scores(layer, h_ND, batch) * self.temper


class ForgetsATensor(Threshold):
    """A plain tensor is no part of the state, and stays behind where models are loaded."""

    def __init__(self, num_layers: int, width: int, initializer_range: float = 0.02) -> None:
        super().__init__(num_layers, width, initializer_range)
        self.direction = torch.rand(num_layers)

    def scores(self, layer: int, h_ND: Tensor, batch: PackedBatch) -> Tensor:
        return super().scores(layer, h_ND, batch) * self.direction[layer]


class ForgetsItsSteps(Threshold):
    """What it learns from steps is not saved."""

    learnt = 1.0

    def absorb(self) -> None:
        self.learnt *= 0.8

    def scores(self, layer: int, h_ND: Tensor, batch: PackedBatch) -> Tensor:
        return super().scores(layer, h_ND, batch) * self.learnt


class ForgetsASum(ForgetsItsSteps):
    """What it has learnt is saved, and what it learns from is not."""

    def __init__(self, num_layers: int, width: int, initializer_range: float = 0.02) -> None:
        super().__init__(num_layers, width, initializer_range)
        self.kept, self.total = nn.Buffer(torch.ones(())), 1.0

    def reset_parameters(self, init: Any = nn.init) -> None:
        init.ones_(self.kept)

    def absorb(self) -> None:
        self.total *= 0.8
        self.kept.fill_(self.total)

    def scores(self, layer: int, h_ND: Tensor, batch: PackedBatch) -> Tensor:
        return super().scores(layer, h_ND, batch) * self.kept


class LearnsFromGradients(Threshold):
    """Lawful: what it notes in a backward pass is absorbed and saved."""

    def __init__(self, num_layers: int, width: int, initializer_range: float = 0.02) -> None:
        super().__init__(num_layers, width, initializer_range)
        self.kept, self.seen = nn.Buffer(torch.ones(())), []

    def reset_parameters(self, init: Any = nn.init) -> None:
        init.ones_(self.kept)

    def scores(self, layer: int, h_ND: Tensor, batch: PackedBatch) -> Tensor:
        score_N = super().scores(layer, h_ND, batch) * self.kept
        if score_N.requires_grad:
            score_N.register_hook(lambda slope_N: self.seen.append(slope_N.detach().abs().sum()))
        return score_N

    def absorb(self) -> None:
        self.kept.mul_(1 + torch.stack(self.seen).sum().clamp(max=1) / 100)
        self.seen.clear()


class CannotAbsorb(Threshold):
    def absorb(self) -> None:
        raise RuntimeError("no steps")


@pytest.mark.parametrize(
    ("policy", "skipped_kv"),
    [(Threshold, "drop"), (Threshold, "keep"), (ReadsItsPastAndSaysSo, "drop"), (LearnsFromGradients, "keep")],
)
def test_what_the_lawless_are_made_from_is_lawful(policy: type[Policy], skipped_kv: str) -> None:
    check_policy(f"{__name__}:{policy.__name__}", num_layers=4, skipped_kv=skipped_kv, seed=3)


LAWLESS: list[tuple[type[Policy], str, str]] = [
    (KeepIsAList, "gates", r"keep_N is list; expected torch.bool \[\d+\]"),
    (NoDecision, "gates", "decide returned Tensor; expected a Decision"),
    (KeepIsANumber, "gates", r"keep_N is torch.int64 \[\d+\]; expected torch.bool \[\d+\]"),
    (GateAboveOne, "gates", "output_gate_N reaches from .* where kept; expected 0 to 1, in layer 0"),
    (GateBelowZero, "gates", "output_gate_N reaches from -"),
    (GateIsNotANumber, "gates", "output_gate_N reaches from"),
    (KeyGateOfZero, "gates", "key_gate_N is 0 for a token that is kept"),
    (HalfPrecision, "gates", "output_gate_N is torch.bfloat16"),
    (HalfPrecisionInAHalfModel, "gates", "output_gate_N is torch.bfloat16"),
    (OneGateForAll, "gates", r"output_gate_N is torch.float32 \[1\]; expected .* \[\d+\]"),
    (GateOnlyWrongInTraining, "gates", "output_gate_N reaches from"),
    (TossesACoin, "repeatable", "the same input twice"),
    (GrowsWithEachCall, "repeatable", "the same input twice"),
    (
        SeesTheNextToken,
        "no future leak",
        r"token \d was changed and the results before it changed; gates differ by",
    ),
    (SeesTheMean, "no future leak", "the results before it changed"),
    (SeesItsBatchMates, "batch", "sequence . of a batch, and the same alone"),
    (CountsPads, "batch", "2 more pads on the left"),
    (KnowsTheLength, "prefix", "the first 1 of 7 tokens alone"),
    (ReadsItsPast, "decode", "1 columns at a time .* set looks_back = True.*; gates differ by"),
    (AsksForItsFirstToken, "decode", "the former fails: where is it; if the policy reads the past, set looks_back"),
    (SlopeWithoutEnd, "finite gradients", "gets a gradient that is not finite"),
    (UnusedParameter, "finite gradients", "model.policy.spare gets no gradient in training, not even 0"),
    (GradientByBatchSize, "packed = reference", "the gradients of .* differ by"),
    (Forgets, "state", "a model, and the same saved and loaded; gates differ by"),
    (ForgetsATensor, "state", ""),
    (ForgetsItsSteps, "state", "a model, and the same saved and loaded; gates differ by"),
    (ForgetsASum, "state", "a model and the same saved and loaded, trained on; gates differ by"),
    (CannotAbsorb, "state", "a pass of training, or `absorb` after it, fails: no steps"),
]


@pytest.mark.parametrize(
    ("policy", "check", "where", "skipped_kv"),
    [(*lawless, skipped_kv) for lawless, skipped_kv in zip(LAWLESS, cycle(("drop", "keep")))],
)
def test_a_failed_check_is_named(policy: type[Policy], check: str, where: str, skipped_kv: str) -> None:
    with pytest.raises(
        AssertionError,
        match=f"^check '{check}' failed: .*{where}.*{policy.__name__}.*4 layers, skipped_kv='{skipped_kv}'",
    ):
        check_policy(f"{__name__}:{policy.__name__}", num_layers=4, skipped_kv=skipped_kv)


def test_settings_reach_the_policy_that_is_checked() -> None:
    with pytest.raises(ValueError, match="policy 'dense' does not know the setting 'start'"):
        check_policy("dense", {"start": "open"})
    with pytest.raises(ValueError, match="skipped_kv is 'some'"):
        check_policy("dense", skipped_kv="some")


class Rare(MiddleOut):
    """Hard gates that go by a number of one's own for each token."""

    def __init__(self, num_layers: int, width: int, initializer_range: float = 0.02):
        super().__init__(num_layers, width, initializer_range, gates="hard")

    def priority(self, token_N: Tensor, previous_N: Tensor) -> Tensor:
        return (token_N % 5 + 2 * (previous_N < 0)).float() - 2


@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
def test_middle_out_with_another_priority_is_lawful(skipped_kv: str) -> None:
    check_policy(f"{__name__}:Rare", num_layers=4, skipped_kv=skipped_kv)


def test_checking_leaves_the_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    check_policy("middle_out", num_layers=2, skipped_kv="drop")
    assert torch.equal(torch.random.get_rng_state(), before)
