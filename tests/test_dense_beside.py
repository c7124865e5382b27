"""A gated run trains the dense models of fewer layers that it is to be compared with, and reports them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_runs import QUIET, history, weights

from midskip.runs import load_run
from midskip.train import Recipe, train

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("on_the_cpu", "no_pictures")]
MakeRecipe = Callable[..., Recipe]
HALF = ("target_share", {"target_share": 0.5})


def test_dense_models_are_trained_as_long_and_reported(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(*HALF, dense_layers=[1, 3])
    report = train(recipe, console=QUIET)
    folder = Path(recipe.output)
    assert json.loads((folder / "report.json").read_text())["dense"] == report["dense"]
    page = (folder / "page.html").read_text(encoding="utf-8")
    for row, num_layers in zip(report["dense"], (1, 3), strict=True):
        own = json.loads((folder / row["folder"] / "report.json").read_text())
        assert row["num_hidden_layers"] == num_layers
        for name in ("loss", "bits_per_byte", "flops_per_token"):
            assert row[name] == own["validation"][name]
        model, _ = load_run(folder / row["folder"])
        assert (model.config.policy, model.config.num_hidden_layers) == ("dense", num_layers)
        assert row["num_parameters"] == model.num_parameters()
        assert own["training"]["num_tokens"] == report["training"]["num_tokens"]
        assert own["validation"]["num_targets"] == report["validation"]["num_targets"]
        assert f"dense, {num_layers} layers" in page and f"{row['loss']:.4f} nats a token" in page


def test_they_leave_the_gated_run_as_it_was(make_recipe: MakeRecipe) -> None:
    alone, beside = make_recipe(*HALF, output="alone"), make_recipe(*HALF, output="beside", dense_layers=[2])
    assert train(alone, console=QUIET)["dense"] == []
    train(beside, console=QUIET)
    left, right = weights(alone), weights(beside)
    assert all((left[name] == right[name]).all() for name in left)
    assert "none was trained (dense_layers)" in Path(alone.output, "page.html").read_text(encoding="utf-8")


def test_a_resumed_run_does_not_train_them_again(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(*HALF, dense_layers=[2], save_steps=2)
    expected = train(recipe, console=QUIET)
    Path(recipe.output, "page.html").unlink()
    rows = history(recipe)
    report = train(recipe, resume=True, console=QUIET)
    assert report["dense"] == expected["dense"] and report["validation"] == expected["validation"]
    assert history(recipe) == rows


def test_a_killed_run_that_has_moved_goes_on(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(*HALF, dense_layers=[2], save_steps=2)
    expected = train(recipe, console=QUIET)
    folder = Path(recipe.output)
    for file in ("page.html", "report.json"):  # the dense model was finished, the gated one was not
        (folder / file).unlink()
    moved = replace(recipe, output=str(folder.with_name("moved")))
    shutil.move(folder, moved.output)
    assert train(moved, resume=True, console=QUIET)["dense"] == expected["dense"]
    assert not Path(moved.output, "dense-2", "text").exists()


def test_what_a_finished_dense_model_cannot_take_changes_nothing(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(*HALF, dense_layers=[2], save_steps=2)
    train(recipe, console=QUIET)
    (Path(recipe.output) / "page.html").unlink()
    before = Path(recipe.output, "recipe.yaml").read_bytes()
    changed = replace(recipe, training=replace(recipe.training, learning_rate=1.0))
    with pytest.raises(ValueError, match=r"the run is finished, with another recipe .*learning_rate"):
        train(changed, resume=True, accept_changes=True, console=QUIET)
    assert Path(recipe.output, "recipe.yaml").read_bytes() == before


@pytest.mark.parametrize(("layers", "message"), [([0], "each at least 1"), ([2, 2], "different numbers of layers")])
def test_what_is_no_depth_is_refused(make_recipe: MakeRecipe, layers: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=rf"dense_layers is .*; expected .*{message}"):
        make_recipe(*HALF, dense_layers=layers)
