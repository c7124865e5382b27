"""Runs with hard gates: what they learn is kept, the same however a step is cut up, and refused without a budget."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import QUIET, assert_same_weights, history, starting_model, timeless, weights

from midskip import MidskipForCausalLM
from midskip.regularizers import TargetShare
from midskip.runs import load_run
from midskip.train import Recipe, train
from midskip.train.trainer import MidskipTrainer

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("on_the_cpu", "no_pictures")]
MakeRecipe = Callable[..., Recipe]
BUDGET = ("target_share", {"target_share": 0.5, "outer": 1, "lowest_share": 0.3, "ramp_steps": 3})
HARD = {"model": {"num_hidden_layers": 6, "policy_settings": {"gates": "hard", "scores": "difficulty"}}}


def test_a_resumed_run_equals_one_that_never_stopped(make_recipe: MakeRecipe) -> None:
    whole = make_recipe(*BUDGET, output="whole", max_steps=8, save_steps=4, **HARD)
    train(whole, console=QUIET)
    parts = make_recipe(*BUDGET, output="parts", max_steps=8, save_steps=4, **HARD)
    train(parts, console=QUIET)
    folder = Path(parts.output)
    for file in ("page.html", "checkpoint-8/complete.json"):
        (folder / file).unlink()
    train(parts, resume=True, console=QUIET)
    assert_same_weights(weights(parts), weights(whole))
    assert timeless(history(parts)) == timeless(history(whole))
    assert weights(whole)["model.policy.difficulty.seen"].any()


@pytest.mark.parametrize("batches", [1, 2])
def test_a_step_learns_from_the_mean_of_its_passes(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, batches: int
) -> None:
    score_scales, seen, compute_loss = (0.0, 30.0, 1.0), [], MidskipTrainer.compute_loss

    def look(trainer: MidskipTrainer, model: MidskipForCausalLM, inputs: dict[str, torch.Tensor], **more: Any) -> Any:
        seen.append((model.model.policy.score_scale, inputs))
        return compute_loss(trainer, model, inputs, **more)

    monkeypatch.setattr(TargetShare, "score_scales", score_scales)
    monkeypatch.setattr(MidskipTrainer, "compute_loss", look)
    given = {"max_steps": 1, "per_device_train_batch_size": 4 // batches, "gradient_accumulation_steps": batches}
    recipe = make_recipe("target_share", {"target_share": 0.5}, model={"policy_settings": {"start": "spread"}}, **given)
    train(recipe, console=QUIET)
    assert [score_scale for score_scale, _ in seen] == [*score_scales] * batches
    model, losses = starting_model(recipe), []
    model.model.policy.bias.requires_grad_(False)
    for score_scale, inputs in seen:
        model.model.policy.set_limits(score_scale)
        losses.append(model(**inputs).loss)
        (losses[-1] / len(seen)).backward()
    norm = torch.stack([x.grad.norm() for x in model.parameters() if x.grad is not None]).norm().item()
    (row,) = history(recipe)
    assert row["gradient_norm"] == pytest.approx(norm, rel=1e-4)
    assert row["cross_entropy"] == pytest.approx(torch.stack(losses[2::3]).mean().item(), rel=1e-5), "of the last pass"
    assert len({loss.item() for loss in losses}) == 3 * batches


def test_a_run_is_evaluated_and_kept_as_trained_whatever_budget_is_drawn(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(*BUDGET, max_steps=8, eval_steps=3, **HARD)
    report = train(recipe, console=QUIET)
    rows = history(recipe)
    assert {row["expected_share"] for row in rows[3::2]} == {0.5}
    assert len({row["expected_share"] for row in rows[2::2]}) == 3
    model, _ = load_run(recipe.output)
    assert (model.model.policy.score_scale, model.model.policy.max_layers) == (1.0, None)
    assert 0 < report["validation"]["executed_share"] <= 1


def test_two_passes_of_two_learn_what_one_pass_of_four_learns(make_recipe: MakeRecipe) -> None:
    found = []
    for passes in (1, 2):
        recipe = make_recipe(
            "target_share", {"target_share": 1.0}, output=f"{passes}", max_steps=1,
            per_device_train_batch_size=4 // passes, gradient_accumulation_steps=passes, **HARD,
        )  # fmt: skip
        train(recipe, console=QUIET)
        found.append(weights(recipe)["model.policy.difficulty.seen"])
    assert found[0][:, 1].sum() > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_several_passes_over_a_batch_are_observed_once(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for score_scales in ((1.0,), (0.0, 30.0, 1.0)):
        monkeypatch.setattr(TargetShare, "score_scales", score_scales)
        recipe = make_recipe("target_share", {"target_share": 1.0}, output=f"{len(score_scales)}", max_steps=1, **HARD)
        train(recipe, console=QUIET)
        found.append(weights(recipe)["model.policy.difficulty.seen"])
    assert found[0][:, 1].sum() > 0 and torch.equal(found[0], found[1])


def test_hard_gates_without_a_budget_are_refused_before_the_run(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("proportional", {"mean_target_start": 1.0, "mean_target_end": 0.5}, **HARD)
    with pytest.raises(ValueError, match=r"use the regularizer 'target_share'"):
        train(recipe, console=QUIET)
    assert not Path(recipe.output).exists()
