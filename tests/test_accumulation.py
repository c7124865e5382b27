"""What is added up over the passes of a step: the loss, the regularizer, and the statistics of the gates."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import (
    QUIET,
    batch_of,
    distance,
    first_windows,
    history,
    starting_model,
    timeless,
    weights,
    windows_of,
)
from torch import Tensor

from midskip.evaluate import evaluate
from midskip.regularizers import Regularizer
from midskip.train import Recipe, train
from midskip.train.trainer import MidskipTrainer

MakeRecipe = Callable[..., Recipe]
pytestmark = pytest.mark.usefixtures("on_the_cpu")
quick = pytest.mark.usefixtures("no_pictures")


@quick
@pytest.mark.parametrize("passes", [1, 2])
def test_cross_entropy_regularizer_and_total_are_logged_apart(make_recipe: MakeRecipe, passes: int) -> None:
    settings = {"mean_coefficient": 0.5}
    recipe = make_recipe(
        "sparsity", settings, per_device_train_batch_size=4 // passes, gradient_accumulation_steps=passes, max_steps=2
    )
    train(recipe, console=QUIET)
    rows = history(recipe)
    for row in rows:
        assert row["total"] == pytest.approx(row["cross_entropy"] + row["regularizer"], rel=1e-12)
        mean_gate = sum(row["gate_mean_by_layer"]) / 4
        assert row["regularizer"] == pytest.approx(0.5 * mean_gate, rel=1e-5) and mean_gate > 0.1

    model, batch = starting_model(recipe), batch_of(windows_of(recipe)[0], *first_windows(recipe, 4))
    before = model(**batch)
    (before.loss + 0.5 * before.gates.mean()).backward()
    norm = math.sqrt(sum(parameter.grad.square().sum().item() for parameter in model.parameters()))
    present_LBT = (before.gates > 0).float()
    assert rows[0]["cross_entropy"] == pytest.approx(before.loss.item(), rel=1e-5)
    assert rows[0]["gradient_norm"] == pytest.approx(norm, rel=1e-4)
    assert rows[0]["share_by_layer"] == pytest.approx(present_LBT.mean((1, 2)).tolist())
    assert rows[0]["executed_share"] == pytest.approx(present_LBT.mean().item())


@quick
@pytest.mark.parametrize(
    ("regularizer", "settings"),
    [("none", {}), ("sparsity", {"mean_coefficient": 1.0}), ("target_share", {"target_share": 0.3, "ramp_steps": 1})],
)
def test_two_passes_of_two_are_one_pass_of_four(
    make_recipe: MakeRecipe, regularizer: str, settings: dict[str, Any]
) -> None:
    # a large epsilon, for AdamW makes steps of full size from gradients that are nothing but rounding
    common = {"max_steps": 3, "save_steps": 3, "warmup_ratio": 0.0, "adam_epsilon": 1e-3, "learning_rate": 0.02}
    common |= {"model": {"policy_settings": {"start": "released"}, "initializer_range": 0.3}}
    recipes = [
        make_recipe(
            regularizer,
            settings,
            output=f"{passes}",
            per_device_train_batch_size=4 // passes,
            gradient_accumulation_steps=passes,
            **common,
        )
        for passes in (1, 2)
    ]
    for recipe in recipes:
        train(recipe, console=QUIET)
    assert distance(weights(recipes[0]), weights(recipes[1])) < 1e-5
    assert distance(weights(recipes[0]), dict(starting_model(recipes[0]).named_parameters())) > 1e-3
    rows = [timeless(history(recipe)) for recipe in recipes]
    assert [row["num_tokens"] for row in rows[1]] == [64, 64, 64]
    assert 0 < min(row["executed_share"] for row in rows[0]) < 1, "else the test tests little"
    for one, two in zip(*rows, strict=True):
        assert one.keys() == two.keys()
        for name in one:
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
    states = [json.loads(Path(r.output, "checkpoint-3", "regularizer.json").read_text()) for r in recipes]
    for name in states[0]:
        assert states[0][name] == pytest.approx(states[1][name], rel=1e-5)
    assert states[1].get("num_updates") == (3 if regularizer == "target_share" else None)


class Recorder(Regularizer):
    """Keeps what it is told."""

    calls: list[tuple[Tensor, ...]] = []

    def update(self, mean_L: Tensor, variance_L: Tensor, share_L: Tensor | None = None) -> None:
        assert share_L is not None
        Recorder.calls.append((mean_L, variance_L, share_L))


@quick
def test_the_regularizer_is_updated_once_a_step_from_the_whole_step(make_recipe: MakeRecipe) -> None:
    Recorder.calls.clear()
    released = {"policy_settings": {"start": "released"}}
    recipe = make_recipe(
        f"{__name__}:Recorder",
        model=released,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=3,
        max_steps=2,
    )
    train(recipe, console=QUIET)
    assert len(Recorder.calls) == 2
    batch = batch_of(windows_of(recipe)[0], *first_windows(recipe, 3))
    gates_LN = starting_model(recipe)(**batch).gates.flatten(1)
    assert 0 < (gates_LN > 0).float().mean() < 1, "else the test tests nothing"
    expected = gates_LN.mean(1), gates_LN.var(1, correction=0), (gates_LN > 0).float().mean(1)
    for got_L, expected_L in zip(Recorder.calls[0], expected, strict=True):
        assert got_L.dtype == torch.float32
        torch.testing.assert_close(got_L, expected_L.detach(), atol=1e-6, rtol=1e-5)


@quick
def test_the_regularizer_is_part_of_training_alone(make_recipe: MakeRecipe, trainers: list[MidskipTrainer]) -> None:
    recipe = make_recipe("sparsity", {"mean_coefficient": 100.0}, max_steps=1)
    train(recipe, console=QUIET)
    (trainer,), (_, validation) = trainers, windows_of(recipe)
    model, batch = trainer.bare_model, batch_of(validation, 0)
    plain = model(**batch).loss.item()
    losses = [trainer.compute_loss(model.train(training), batch).item() for training in (False, True)]
    assert losses[0] == pytest.approx(plain, rel=1e-6) and losses[1] > plain + 50
    assert trainer.evaluate()["eval_loss"] == evaluate(model, validation, batch_size=2)["loss"] < 7
