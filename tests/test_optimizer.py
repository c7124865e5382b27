"""How a run takes its steps: groups of parameters, learning rate, clipping, precision, and the seed of it all."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_runs import QUIET, assert_same_weights, distance, history, starting_model, timeless, weights

from midskip.train import Recipe, train
from midskip.train.optimizer import build_optimizer, build_scheduler
from midskip.train.recipe import TrainingSettings
from midskip.train.trainer import MidskipTrainer

MakeRecipe = Callable[..., Recipe]
pytestmark = pytest.mark.usefixtures("on_the_cpu", "no_pictures")


def test_parameters_are_in_three_groups(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(
        weight_decay=0.1, gate_learning_rate_scale=0.25, adam_beta1=0.7, adam_beta2=0.8, adam_epsilon=1e-5
    )
    model = starting_model(recipe)
    groups = {group["name"]: group for group in build_optimizer(model, recipe.training).param_groups}
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {name: {names[parameter] for parameter in group["params"]} for name, group in groups.items()}
    assert sum(map(len, found.values())) == len(names) and set().union(*found.values()) == set(names.values())
    assert found["gates"] == {"model.policy.weight", "model.policy.bias"}
    assert found["norms"] == {name for name in names.values() if "norm" in name}
    assert {"model.embed_tokens.weight", "lm_head.weight"} < found["weights"]
    assert {name: group["weight_decay"] for name, group in groups.items()} == {"weights": 0.1, "norms": 0, "gates": 0}
    assert {name: group["lr"] for name, group in groups.items()} == {
        "weights": 3e-3, "norms": 3e-3, "gates": 3e-3 * 0.25
    }  # fmt: skip
    assert all((group["betas"], group["eps"]) == ((0.7, 0.8), 1e-5) for group in groups.values())


def test_the_scale_of_the_gates_learning_rate_reaches_the_weights(make_recipe: MakeRecipe) -> None:
    moved = []
    for scale in (0.0, 1.0):
        recipe = make_recipe(output=f"{scale}", gate_learning_rate_scale=scale)
        train(recipe, console=QUIET)
        before, after = starting_model(recipe).state_dict(), weights(recipe)
        moved.append([bool((before[name] != after[name]).any()) for name in ("model.policy.weight", "lm_head.weight")])
    assert moved == [[False, True], [True, True]]


@pytest.mark.parametrize(("warmup_ratio", "warmup_start"), [(0.25, 0.0), (0.25, 0.1), (0.0, 0.1)])
def test_the_learning_rate_rises_on_a_line_and_falls_on_a_cosine(warmup_ratio: float, warmup_start: float) -> None:
    settings = TrainingSettings(max_steps=20, warmup_ratio=warmup_ratio, warmup_start=warmup_start)
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=settings.learning_rate)
    scheduler, found = build_scheduler(optimizer, settings), []
    for _ in range(21):
        found.append(optimizer.param_groups[0]["lr"] / settings.learning_rate)
        optimizer.step()
        scheduler.step()
    rise = [warmup_start + (1 - warmup_start) * step / 5 for step in range(5)] if warmup_ratio else []
    fall = [(1 + math.cos(math.pi * step / (20 - len(rise)))) / 2 for step in range(21 - len(rise))]
    assert found == pytest.approx(rise + fall, abs=1e-12)
    assert max(found) == 1 and found[-1] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("max_grad_norm", [0.01, 0.0])
def test_the_gradient_is_clipped_for_the_step_and_told_unclipped(make_recipe: MakeRecipe, max_grad_norm: float) -> None:
    recipe = make_recipe(max_steps=1, save_steps=1, max_grad_norm=max_grad_norm, adam_beta1=0.75)
    train(recipe, console=QUIET)
    (row,) = history(recipe)
    assert row["gradient_norm"] > 0.1
    state = torch.load(Path(recipe.output, "checkpoint-1", "optimizer.pt"), weights_only=True)["state"]
    taken = math.sqrt(sum(moments["exp_avg"].square().sum().item() for moments in state.values())) / (1 - 0.75)
    assert taken == pytest.approx(max_grad_norm or row["gradient_norm"], rel=1e-3)


def test_gradient_checkpointing_changes_no_weight(make_recipe: MakeRecipe, trainers: list[MidskipTrainer]) -> None:
    recipes = [
        make_recipe("sparsity", output=f"{on}", gradient_checkpointing=on, logging_steps=2) for on in (False, True)
    ]
    for recipe in recipes:
        train(recipe, console=QUIET)
    assert [trainer.bare_model.model.gradient_checkpointing for trainer in trainers] == [False, True]
    assert_same_weights(weights(recipes[0]), weights(recipes[1]))
    assert timeless(history(recipes[0])) == timeless(history(recipes[1])), "what is worked out twice counts once"


def test_bf16_trains_float32_weights_to_about_the_same(make_recipe: MakeRecipe) -> None:
    recipes = [make_recipe(output=f"{on}", bf16=on) for on in (False, True)]
    for recipe in recipes:
        train(recipe, console=QUIET)
    losses = [[row["cross_entropy"] for row in history(recipe)] for recipe in recipes]
    assert losses[0] == pytest.approx(losses[1], abs=0.05) and losses[0] != losses[1]
    assert {weight.dtype for weight in weights(recipes[1]).values()} == {torch.float32}


def test_the_seed_decides_every_bit(make_recipe: MakeRecipe) -> None:
    recipes = [make_recipe("sparsity", output=f"{i}", seed=seed) for i, seed in enumerate((3, 3, 4))]
    for recipe in recipes:
        torch.rand(17)  # the caller's generator is no part of it
        train(recipe, console=QUIET)
    assert_same_weights(weights(recipes[0]), weights(recipes[1]))
    assert timeless(history(recipes[0])) == timeless(history(recipes[1]))
    assert distance(weights(recipes[0]), weights(recipes[2])) > 0.01
