"""Runs with hard gates: what they learn is kept, the same however a step is cut up, and refused without a budget."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_runs import QUIET, assert_same_weights, history, timeless, weights

from midskip.runs import load_run
from midskip.train import Recipe, train

pytestmark = pytest.mark.usefixtures("on_the_cpu", "no_pictures")
MakeRecipe = Callable[..., Recipe]
BUDGET = ("budget", {"target_share": 0.5, "outer": 1, "lowest_share": 0.3, "ramp_steps": 3})
HARD = {"model": {"num_hidden_layers": 6, "policy_settings": {"gates": "hard", "scores": "difficulty"}}}


def test_a_resumed_run_equals_one_that_never_stopped(make_recipe: MakeRecipe) -> None:
    whole = make_recipe(*BUDGET, output="whole", steps=8, save_steps=4, **HARD)
    train(whole, console=QUIET)
    parts = make_recipe(*BUDGET, output="parts", steps=8, save_steps=4, **HARD)
    train(parts, console=QUIET)
    folder = Path(parts.output)
    for file in ("page.html", "checkpoint-8/complete.json"):
        (folder / file).unlink()
    train(parts, resume=True, console=QUIET)
    assert_same_weights(weights(parts), weights(whole))
    assert timeless(history(parts)) == timeless(history(whole))
    assert weights(whole)["model.policy.difficulty.seen"].any()


def test_a_run_is_evaluated_and_kept_as_trained_whatever_budget_is_drawn(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(*BUDGET, steps=8, evaluation_steps=3, **HARD)
    report = train(recipe, console=QUIET)
    rows = history(recipe)
    assert {row["expected_share"] for row in rows[3::2]} == {0.5}
    assert len({row["expected_share"] for row in rows[2::2]}) == 3
    model, _ = load_run(recipe.output)
    assert (model.model.policy.factor, model.model.policy.ceiling) == (1.0, None)
    assert 0 < report["validation"]["executed_share"] <= 1


def test_two_passes_of_two_learn_what_one_pass_of_four_learns(make_recipe: MakeRecipe) -> None:
    found = []
    for passes in (1, 2):
        recipe = make_recipe(
            "budget", {"target_share": 1.0}, output=f"{passes}", steps=1, batch_size=4 // passes,
            accumulation_steps=passes, **HARD,
        )  # fmt: skip
        train(recipe, console=QUIET)
        found.append(weights(recipe)["model.policy.difficulty.seen"])
    assert found[0][:, 1].sum() > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_hard_gates_without_a_budget_are_refused_before_the_run(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("proportional", {"mean_target_start": 1.0, "mean_target_end": 0.5}, **HARD)
    with pytest.raises(ValueError, match=r"use the controller 'budget'"):
        train(recipe, console=QUIET)
    assert not Path(recipe.output).exists()
