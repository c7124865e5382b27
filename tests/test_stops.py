"""Numbers that are none: the run stops before the step, says so, and leaves the last good checkpoint."""

import math
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_runs import QUIET, assert_same_weights, history, timeless, weights
from torch import Tensor

from midskip import MidskipForCausalLM
from midskip.policies import Policy
from midskip.regularizers import FeedbackRegularizer, Regularizer
from midskip.train import Recipe, train
from midskip.train.checkpoints import fault_of
from midskip.train.trainer import MidskipTrainer

MakeRecipe = Callable[..., Recipe]
pytestmark = pytest.mark.usefixtures("on_the_cpu", "no_pictures")
BAD_STEP = 4


class Poison(FeedbackRegularizer):
    """From the fourth step on its term, or the gradient of its term alone, is not finite."""

    changing = ("num_steps",)

    def __init__(self, num_layers: int, kind: str) -> None:
        super().__init__(num_layers, rule="error", coef_update_multiplier=1.0, mean_targets=[0.5, 0.5])
        self.kind, self.num_steps = kind, torch.zeros(())
        self.changing += Poison.changing

    def update(self, mean_L: Tensor, variance_L: Tensor, share_L: Tensor | None = None) -> None:
        super().update(mean_L, variance_L, share_L)
        self.num_steps = self.num_steps + 1

    def loss(self, gates_LBT: Tensor, valid_BT: Tensor | None = None) -> Tensor:
        term = super().loss(gates_LBT, valid_BT)
        if self.num_steps < BAD_STEP - 1 or self.kind == "none":
            return term
        if self.kind == "gradient":
            return term + (term - term.detach()).sqrt()  # 0, with an infinite slope
        return term * float(self.kind)


@pytest.mark.parametrize(("kind", "passes"), [("nan", 1), ("inf", 2), ("gradient", 1), ("gradient", 2)])
def test_a_step_that_is_not_finite_is_not_taken(
    make_recipe: MakeRecipe, trainers: list[MidskipTrainer], kind: str, passes: int
) -> None:
    recipe = make_recipe(
        f"{__name__}:Poison",
        {"kind": kind},
        max_steps=6,
        save_steps=1,
        per_device_train_batch_size=2 // passes,
        gradient_accumulation_steps=passes,
    )
    message = r"step 4 is not finite \(cross-entropy 5\.\d+, regularizer .*, norm of the gradient .*\), so it was not"
    for resume in (False, True):
        with pytest.raises(FloatingPointError, match=message) as error:
            train(recipe, resume, console=QUIET)
        regularizer = str(error.value).split("regularizer ")[1].split(",")[0]
        assert math.isfinite(float(regularizer)) == (kind == "gradient")
        assert [row["step"] for row in history(recipe)] == [1, 2, 3]
        stopped = trainers[-1]
        assert_same_weights(weights(recipe, "checkpoint-3"), dict(stopped.bare_model.state_dict()))
        assert {int(moments["step"]) for moments in stopped.optimizer.state_dict()["state"].values()} == {3}
        assert stopped.regularizer.num_steps == 3
    folder = Path(recipe.output)
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}
    assert fault_of(folder / "checkpoint-3") is None
    assert not {"report.json", "model.safetensors", "page.html"} & {path.name for path in folder.iterdir()}


def test_the_checkpoint_that_is_kept_is_good(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    common = {"max_steps": 6, "save_steps": 2}
    recipe, whole = (make_recipe(f"{__name__}:Poison", {"kind": "none"}, output=name, **common) for name in ("a", "b"))
    train(whole, console=QUIET)
    forward, calls = MidskipForCausalLM.forward, []

    def ill(self: MidskipForCausalLM, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        calls.append(self.training)
        output.loss = output.loss * (math.nan if len(calls) == 3 else 1)
        return output

    with monkeypatch.context() as patch:
        patch.setattr(MidskipForCausalLM, "forward", ill)
        with pytest.raises(FloatingPointError, match=r"step 3 is not finite \(cross-entropy nan, regularizer -?\d"):
            train(recipe, console=QUIET)
    train(recipe, resume=True, console=QUIET)
    assert_same_weights(weights(recipe), weights(whole))
    assert timeless(history(recipe)) == timeless(history(whole))


class Runaway(Regularizer):
    """Steers to where no number is, after the first step."""

    bias = 0.0

    def update(self, *statistics: Any) -> None:
        self.bias = math.inf

    @torch.no_grad()
    def steer(self, policy: Policy) -> None:
        policy.bias.fill_(self.bias)


@pytest.mark.parametrize(("save_steps", "eval_steps"), [(0, 0), (1, 0), (0, 1)])
def test_weights_that_are_not_finite_are_not_kept(make_recipe: MakeRecipe, save_steps: int, eval_steps: int) -> None:
    recipe = make_recipe(f"{__name__}:Runaway", max_steps=1, save_steps=save_steps, eval_steps=eval_steps)
    with pytest.raises(FloatingPointError, match=r"a weight is no longer finite after step 1: lower the learning rate"):
        train(recipe, console=QUIET)
    assert history(recipe)[0]["total"] > 5
    folder = Path(recipe.output)
    assert not {"model.safetensors", "best"} & {path.name for path in folder.iterdir()}
    assert all(fault_of(checkpoint) for checkpoint in folder.glob("checkpoint-*"))


def test_the_cursor_is_back_after_a_stop(make_recipe: MakeRecipe) -> None:
    screen = StringIO()
    recipe = make_recipe(f"{__name__}:Poison", {"kind": "nan"}, max_steps=6)
    with pytest.raises(FloatingPointError):
        train(recipe, console=Console(file=screen, force_terminal=True, width=120))
    hidden, shown = screen.getvalue().rfind("\x1b[?25l"), screen.getvalue().rfind("\x1b[?25h")
    assert 0 < hidden < shown
