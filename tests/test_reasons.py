"""`benchmarks/reasons.py`: what is exchanged, and what a gradient by a gate says."""

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from midskip import MidskipForCausalLM
from midskip.evaluate import evaluate
from midskip.policies import Decision

Make = Callable[..., MidskipForCausalLM]


@pytest.fixture
def reasons(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return import_module("reasons")


@pytest.mark.parametrize("half", ["exchanged", "skipped", "run"])
@pytest.mark.parametrize("soft", [False, True])
def test_one_layer_is_changed_and_an_exchange_keeps_its_share(
    reasons: Any, make_model: Make, windows: list[dict[str, Tensor]], half: str, soft: bool
) -> None:
    model = make_model("mixed", policy_settings={} if soft else {"gates": "hard"}).eval()
    seen: list[list[Tensor]] = []
    hook = model.model.policy.register_forward_hook(lambda _, given, decision: seen[-1].append(decision.keep_N))
    seen.append([])
    plain = evaluate(model, windows[:8])
    hook.remove()
    changed: list[Tensor] = []
    exchange = reasons.exchange

    def noted(decision: Any, *given: Any) -> Any:
        changed.append(decision.keep_N)
        decision, count = exchange(decision, *given)
        changed.append(decision.keep_N)
        gates = decision.output_gate_N
        assert gates is None or (gates[decision.keep_N] > 0).all()
        return decision, count

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reasons, "exchange", noted)
        loss, count = reasons.loss_exchanged(model, windows[:8], 1, half)
    before_N, after_N = changed
    assert torch.equal(before_N, seen[0][1]) and 0 < count <= 0.1 * len(before_N) and loss != plain["loss"]
    left, came = (before_N & ~after_N).sum(), (after_N & ~before_N).sum()
    assert [left, came] == {"exchanged": [count] * 2, "skipped": [count, 0], "run": [0, count]}[half]


def test_no_other_token_takes_a_skip_path(reasons: Any) -> None:
    keep_N = torch.tensor([True, True, False, False] * 10)
    path_N = torch.tensor([False, False, True, False] * 10)
    given = Decision(keep_N, skip_path_N=path_N)
    decision, count = reasons.exchange(given, True, True, torch.Generator().manual_seed(0))
    came_N, left_N = decision.keep_N & ~keep_N, keep_N & ~decision.keep_N
    assert count == came_N.sum() == left_N.sum() > 0 and (came_N & path_N).any()
    assert torch.equal(decision.skip_path_N, path_N & ~came_N)


def test_where_all_run_nothing_can_be_exchanged(
    reasons: Any, make_model: Make, windows: list[dict[str, Tensor]]
) -> None:
    model = make_model(policy="dense").eval()
    loss, count = reasons.loss_exchanged(model, windows[:8], 0, "exchanged")
    assert count == 0 and loss == pytest.approx(evaluate(model, windows[:8])["loss"])


def test_gradients_are_those_of_small_changes(reasons: Any, make_model: Make, windows: list[dict[str, Tensor]]) -> None:
    model = make_model("mixed", policy_settings={"gates": "hard"}).eval()
    found = reasons.gradients(model, windows[:8])
    step, predictions = 1e-5, 8 * 47
    for layer in (0, 3):
        losses, kept = [], 0
        for sign in (-1, 1):

            def scaled(at: int, decision: Any, layer: int = layer, sign: int = sign) -> Any:
                nonlocal kept
                if at != layer:
                    return decision
                kept = int(decision.keep_N.sum())
                return replace(decision, output_gate_N=1 + sign * step * torch.ones_like(decision.keep_N).double())

            with reasons.changed(model, scaled):
                losses.append(evaluate(model, windows[:8])["loss"] * predictions)
        assert found[layer]["mean"] == pytest.approx((losses[1] - losses[0]) / (2 * step) / kept, rel=1e-4)
        assert found[layer]["root_mean_square"] > abs(found[layer]["mean"])


def test_what_the_token_tells_of_its_depth(reasons: Any, make_model: Make, windows: list[dict[str, Tensor]]) -> None:
    by_position = make_model(policy="midskip.policies.controls:FixedDepths").eval()
    found = reasons.constancy_and_norms(by_position, windows[:8])
    assert found["told_by_token"] < 0.3 and found["most_frequent"] < 0.9
    assert len(found["rms_of_states"]) == len(found["rms_of_added"]) == 3
    all_alike = reasons.constancy_and_norms(make_model(policy="dense").eval(), windows[:8])
    assert all_alike["told_by_token"] is None and all_alike["most_frequent"] == 1.0


def test_places_in_words_are_counted_from_spaces_and_signs(reasons: Any, make_model: Make) -> None:
    class Letters:
        texts = ("a", "b", " c", ".", " ")

        def __len__(self) -> int:
            return len(self.texts)

        def batch_decode(self, rows: list[list[int]]) -> list[str]:
            return [self.texts[row[0]] for row in rows]

    tokens_T = torch.tensor([0, 1, 3, 0, 2, 1, 4, 1] + [0] * 10)  # ab.a cb b and ten times a
    model = make_model(policy="dense").eval()
    found = reasons.by_place_in_word(model, Letters(), [{"input_ids": tokens_T, "labels": tokens_T}])
    counts = {row["place"]: row["tokens"] for row in found}
    assert counts == {0: 2, 1: 4, 2: 3, 3: 1, 4: 1, 5: 1, 6: 1, 7: 1, 8: 3}, "the last token predicts nothing"
    assert {row["layers"] for row in found} == {model.config.num_hidden_layers}
    mean = sum(row["loss"] * row["tokens"] for row in found) / 17
    logits_TV = model(input_ids=tokens_T[None]).logits[0]
    assert mean == pytest.approx(torch.nn.functional.cross_entropy(logits_TV[:-1], tokens_T[1:]).item())
