"""A run folder while a run goes on: which checkpoints it keeps, and a run killed as it begins or ends."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
from safetensors.torch import save_file
from tiny_runs import (
    QUIET,
    Stop,
    assert_same_weights,
    differences,
    everything,
    history,
    weights,
)

from midskip.train import Recipe, train
from midskip.train.checkpoints import fault_of

MakeRecipe = Callable[..., Recipe]
pytestmark = pytest.mark.usefixtures("on_the_cpu", "no_pictures")

TARGET_SHARE = ("target_share", {"target_share": 0.4, "ramp_steps": 5})


# ---- which are there


def test_the_newest_checkpoints_are_kept(make_recipe: MakeRecipe) -> None:
    for kept, expected in ((1, {"checkpoint-5"}), (3, {"checkpoint-3", "checkpoint-4", "checkpoint-5"})):
        recipe = make_recipe(output=f"{kept}", max_steps=5, save_steps=1, save_total_limit=kept)
        train(recipe, console=QUIET)
        assert {path.name for path in Path(recipe.output).glob("checkpoint-*")} == expected
        assert all(fault_of(path) is None for path in Path(recipe.output).glob("checkpoint-*"))
    assert_same_weights(weights(recipe, "checkpoint-5"), weights(recipe))


def test_an_old_checkpoint_goes_only_when_the_new_one_is_whole(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dying(folder: Path, num_kept: int) -> None:
        if (folder / "checkpoint-2").is_dir():
            assert fault_of(folder / "checkpoint-2") is None, "not yet"
            raise Stop

    recipe = make_recipe(max_steps=3, save_steps=1, save_total_limit=1)
    monkeypatch.setattr("midskip.train.trainer.remove_old", dying)
    with pytest.raises(Stop):
        train(recipe, console=QUIET)
    assert {path.name for path in Path(recipe.output).glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}


def test_the_end_is_reached_once(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(*TARGET_SHARE, max_steps=4, save_steps=2, eval_steps=9)
    report = train(recipe, console=QUIET)
    folder, rows = Path(recipe.output), history(recipe)
    found = everything(folder)

    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert train(recipe, resume=True, console=QUIET) == report
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == times

    for name in ("model.safetensors", "report.json", "page.html"):  # it was killed after the last step
        (folder / name).unlink()
    shutil.rmtree(folder / "best")
    assert train(recipe, resume=True, console=QUIET) == report
    assert everything(folder) == found and history(recipe) == rows

    moved = replace(recipe, output=str(folder.with_name("moved")))
    shutil.move(folder, moved.output)
    assert train(moved, resume=True, console=QUIET) == report


def test_a_finished_run_without_checkpoints_is_not_trained_again(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(save_steps=0, max_steps=2)
    report = train(recipe, console=QUIET)
    rows = history(recipe)
    assert not list(Path(recipe.output).glob("checkpoint-*"))
    assert train(recipe, resume=True, console=QUIET) == report
    assert history(recipe) == rows


# ---- killed while it begins or ends


@pytest.mark.parametrize(
    ("writer", "before"),
    [
        ("midskip.train.recipe.Recipe.save", True),
        ("midskip.train.folder.write_atomically", True),
        ("midskip.train.folder.write_atomically", False),
        ("transformers.PreTrainedTokenizerBase.save_pretrained", False),
    ],
)
def test_a_run_killed_as_it_begins_can_go_on(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, writer: str, before: bool
) -> None:
    owner, _, name = writer.rpartition(".")
    original = getattr(resolve_name(owner), name)

    def dying(*args: Any, **kwargs: Any) -> None:
        if not before:
            original(*args, **kwargs)
        raise Stop

    recipe = make_recipe(max_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(writer, dying)
        with pytest.raises(Stop):
            train(recipe, console=QUIET)
    assert not Path(recipe.output, "history.jsonl").exists(), "not a step yet"
    train(recipe, resume=True, console=QUIET)
    whole = make_recipe(max_steps=1, output="whole/run")
    train(whole, console=QUIET)
    assert differences(Path(recipe.output), Path(whole.output)) == []


@pytest.mark.parametrize("of", ["the best", "the last"])
def test_nothing_is_left_of_a_model_half_written(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, of: str
) -> None:
    """safetensors writes to another name first."""
    names: list[str] = []

    def half(tensors: Any, path: str, **more: Any) -> None:
        names.append(path)
        if len(names) == ["the best", "the last"].index(of) + 1:
            Path(path).with_name(".tmpA1b2C3").write_bytes(b"half")
            raise Stop
        save_file(tensors, path, **more)

    recipe = make_recipe(max_steps=1, eval_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr("transformers.modeling_utils.safe_save_file", half)
        with pytest.raises(Stop):
            train(recipe, console=QUIET)
    train(recipe, resume=True, console=QUIET)
    whole = make_recipe(max_steps=1, eval_steps=1, output="whole/run")
    train(whole, console=QUIET)
    assert differences(Path(recipe.output), Path(whole.output)) == []


def test_half_a_page_is_not_the_end(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(path: Path, *args: Any) -> None:
        path.write_text("<!doctype")
        raise Stop

    recipe = make_recipe(max_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr("midskip.train.report.write_page", half)
        with pytest.raises(Stop):
            train(recipe, console=QUIET)
    assert not Path(recipe.output, "page.html").exists()
    train(recipe, resume=True, console=QUIET)
    assert Path(recipe.output, "page.html").read_text().endswith("</html>\n")
    assert not list(Path(recipe.output).glob("*.part"))


def test_half_a_model_card_is_not_kept(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text = Path.write_text

    def half(path: Path, text: str, *args: Any, **kwargs: Any) -> int:
        if path.name.startswith("README.md"):
            write_text(path, "half")
            raise Stop
        return write_text(path, text, *args, **kwargs)

    recipe = make_recipe(max_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", half)
        with pytest.raises(Stop):
            train(recipe, console=QUIET)
    train(recipe, resume=True, console=QUIET)
    assert "midskip" in Path(recipe.output, "README.md").read_text()
    assert not list(Path(recipe.output).glob("*.part"))
