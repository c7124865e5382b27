"""Going on after a stop: which checkpoint is used, that the end is the same, and what may not have changed."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_runs import (
    QUIET,
    Stop,
    differences,
    everything,
    history,
    tiny_recipe,
    write_documents,
)

from midskip.data import open_prepared, prepare
from midskip.regularizers import FeedbackRegularizer, Regularizer, TargetShare, build_regularizer
from midskip.runs import load_run
from midskip.train import Recipe, read_recipe, train
from midskip.train.checkpoints import MARKER_FILE, fault_of
from midskip.train.optimizer import build_optimizer, build_scheduler
from midskip.train.trainer import MidskipTrainer

MakeRecipe = Callable[..., Recipe]
pytestmark = pytest.mark.usefixtures("on_the_cpu", "no_pictures")

TARGET_SHARE = ("target_share", {"target_share": 0.4, "ramp_steps": 5}, TargetShare)
GROWING = ("proportional_derivative", {"mean_targets": [0.9, 0.2], "coef_update_multiplier": 5.0}, FeedbackRegularizer)


def stop_at_step(monkeypatch: pytest.MonkeyPatch, family: type[Regularizer], step: int) -> None:
    """The run dies in the regularizer's update of that step, once."""
    update, seen = family.update, []

    def dying(self: Regularizer, *args: Any) -> None:
        seen.append(1)
        if len(seen) == step:
            raise Stop
        update(self, *args)

    monkeypatch.setattr(family, "update", dying)


def going_on(folder: Path, **more: Any) -> tuple[dict[str, Any], str]:
    """Resume what is in a folder, wherever it was begun; its report, and what was said."""
    screen = Console(file=StringIO(), width=500)
    report = train(replace(read_recipe(folder / "recipe.yaml"), output=str(folder)), True, console=screen, **more)
    assert isinstance(screen.file, StringIO)
    return report, screen.file.getvalue()


# ---- the same end


@pytest.mark.parametrize(
    ("regularizer", "settings", "family"), [TARGET_SHARE, GROWING], ids=lambda value: str(value)[:6]
)
@pytest.mark.integration
def test_a_stopped_run_goes_on_as_if_it_had_never_stopped(
    make_recipe: MakeRecipe,
    monkeypatch: pytest.MonkeyPatch,
    regularizer: str,
    settings: dict[str, Any],
    family: type[Regularizer],
) -> None:
    common = {
        "max_steps": 8,
        "save_steps": 2,
        "eval_steps": 3,
        "logging_steps": 3,
        "per_device_train_batch_size": 7,
    }  # 1.3 epochs
    whole, recipe = (
        make_recipe(regularizer, settings, output=f"{name}/run", **common) for name in ("whole", "stopped")
    )
    expected = train(whole, console=QUIET)
    with monkeypatch.context() as patch:
        stop_at_step(patch, family, 6)
        with pytest.raises(Stop):
            train(recipe, console=QUIET)
    folder = Path(recipe.output)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert [row["step"] for row in history(recipe)] == [1, 2, 3, 4, 5]
    with (folder / "history.jsonl").open("a") as file:
        file.write('{"step": 6, "cross_')

    report = train(recipe, resume=True, console=QUIET)
    assert differences(folder, Path(whole.output)) == []
    assert [row["step"] for row in history(recipe)] == list(range(1, 9))
    assert report["validation"] == expected["validation"]
    seconds = [row["seconds"] for row in history(recipe)]
    assert seconds == sorted(seconds) and report["training"]["seconds"] == seconds[-1]
    state = json.loads((folder / "checkpoint-8" / "regularizer.json").read_text())
    fresh = build_regularizer(regularizer, 4, **settings).state_dict()
    assert next(iter(fresh.values())) != state[next(iter(fresh))], "else the test tests nothing"


@pytest.fixture(scope="module")
def place(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """whole/run: a run of six steps; stopped/run: the same stopped in its fifth, with checkpoints of steps 2 and 4."""
    place = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("midskip.train.report.write_picture", lambda *args, **kwargs: None)
        for name in ("whole", "stopped"):
            more = {
                "max_steps": 6,
                "save_steps": 2,
                "save_total_limit": 3,
                "eval_steps": 5,
                "gradient_accumulation_steps": 2,
            }
            recipe = tiny_recipe(prepared, place / name / "run", *TARGET_SHARE[:2], **more)
            if name == "whole":
                train(recipe, console=QUIET)
            else:
                stop_at_step(patch, TargetShare, 5)
                with pytest.raises(Stop):
                    train(recipe, console=QUIET)
    return place


@pytest.fixture
def stopped(place: Path, tmp_path: Path) -> Path:
    """A copy of the stopped run."""
    return Path(shutil.copytree(place / "stopped" / "run", tmp_path / "run"))


def cut(file: Path) -> None:
    """Leave the first half."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    """Change a bit in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


PARTS = ("model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth", "regularizer.json")
BREAKS: dict[str, tuple[Callable[[Path], None], str]] = {
    **{f"no {name}": (lambda folder, name=name: (folder / name).unlink(), f"lacks {name}") for name in PARTS},
    **{
        f"half of {name}": (lambda folder, name=name: cut(folder / name), f"another size than were written: {name}")
        for name in PARTS
    },
    **{
        f"a bit of {name}": (lambda folder, name=name: flip(folder / name), f"other bytes than were written: {name}")
        for name in (*PARTS, "config.json")
    },
    "no marker": (lambda folder: (folder / MARKER_FILE).unlink(), "was not written to its end"),
    "half of the marker": (lambda folder: cut(folder / MARKER_FILE), "marker (complete.json) that cannot be read"),
    "an empty marker": (lambda folder: (folder / MARKER_FILE).write_text("{}"), "that cannot be read: 'files'"),
    "a marker of nothing": (lambda folder: (folder / MARKER_FILE).write_text('{"files": {}}\n') and [
        (folder / name).unlink() for name in PARTS[1:]], "lacks optimizer*, scheduler.pt"),
    "nothing": (lambda folder: [file.unlink() for file in folder.iterdir()] and None, "was not written to its end"),
}  # fmt: skip


def test_whatever_is_broken_in_a_checkpoint_is_named(place: Path, tmp_path: Path) -> None:
    for number, (what, (spoil, word)) in enumerate(BREAKS.items()):
        folder = Path(shutil.copytree(place / "stopped" / "run" / "checkpoint-4", tmp_path / f"{number}"))
        assert fault_of(folder) is None
        spoil(folder)
        assert word in str(fault_of(folder)), what


@pytest.mark.parametrize(
    "what", ["half of optimizer.pt", "no marker", "half of the marker", "a bit of model.safetensors"]
)
@pytest.mark.integration
def test_a_broken_checkpoint_is_set_aside_and_the_one_before_it_used(place: Path, stopped: Path, what: str) -> None:
    spoil, word = BREAKS[what]
    spoil(stopped / "checkpoint-4")
    marked = (stopped / "checkpoint-4" / MARKER_FILE).is_file()
    _, said = going_on(stopped)
    (line,) = (line for line in said.splitlines() if line.startswith("checkpoint-4 "))
    assert word in line and "the one before it used" in line
    assert (stopped / "damaged-checkpoint-4").is_dir() == marked == ("set aside as damaged-checkpoint-4" in line)
    assert differences(stopped, place / "whole" / "run") == []


def test_a_checkpoint_without_checksums_is_used(place: Path, stopped: Path) -> None:
    marker = json.loads((stopped / "checkpoint-4" / MARKER_FILE).read_text())
    assert marker["sha256"].keys() == marker["files"].keys() > {"model.safetensors", "optimizer.pt"}
    del marker["sha256"]  # as early versions wrote it
    (stopped / "checkpoint-4" / MARKER_FILE).write_text(json.dumps(marker))
    assert "checkpoint-4" not in going_on(stopped)[1]


def test_without_a_whole_checkpoint_it_begins_again(place: Path, stopped: Path) -> None:
    (stopped / "checkpoint-4" / MARKER_FILE).unlink()
    (stopped / "checkpoint-2" / "optimizer.pt").unlink()
    _, said = going_on(stopped)
    assert "checkpoint-4 was not written to its end" in said and "checkpoint-2 lacks optimizer.pt" in said
    assert differences(stopped, place / "whole" / "run") == []


def test_a_whole_checkpoint_is_used_without_a_word(place: Path, stopped: Path) -> None:
    (stopped / "checkpoint-best").mkdir()  # somebody's own is neither used nor removed
    _, said = going_on(stopped)
    assert re.findall(r"\S*checkpoint\S*", said) == ["checkpoint-6"] and (stopped / "checkpoint-best").is_dir()
    assert differences(stopped, place / "whole" / "run") == []


# ---- what changed


def test_a_changed_recipe_is_named_and_needs_a_flag(place: Path, stopped: Path) -> None:
    recipe = replace(read_recipe(stopped / "recipe.yaml"), output=str(stopped))
    changed = replace(
        recipe,
        data=replace(recipe.data, separate_documents=False),
        training=replace(recipe.training, learning_rate=1e-4, max_grad_norm=0.0),
    )
    names = (
        r"data\.separate_documents: True -> False; training\.learning_rate: 0\.003 -> 0\.0001; "
        r"training\.max_grad_norm: 1\.0 -> 0\.0"
    )
    before = everything(stopped)
    with pytest.raises(ValueError, match=rf"not the one this run began with \({names}\): .*--accept_changes"):
        train(changed, resume=True, console=QUIET)
    assert everything(stopped) == before
    train(changed, resume=True, accept_changes=True, console=QUIET)
    assert read_recipe(stopped / "recipe.yaml") == changed
    rows, unchanged = (everything(folder)["history.jsonl"] for folder in (stopped, place / "whole" / "run"))
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert rows[:4] == unchanged[:4] and rows[4] != unchanged[4]


def test_accepted_changes_of_the_optimisation_take_effect(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(read_recipe(stopped / "recipe.yaml"), output=str(stopped))
    changed = {"learning_rate": 1e-4, "gate_learning_rate_scale": 0.5, "weight_decay": 0.2, "adam_beta2": 0.5}
    changed |= {"adam_epsilon": 1e-3, "save_steps": 1, "eval_steps": 3}
    settings = replace(recipe.training, **changed)
    seen: list[list[dict[str, Any]]] = []
    original = MidskipTrainer.training_step

    def groups_of(scheduler: Any) -> list[dict[str, Any]]:
        return [group | {"params": None} for group in scheduler.optimizer.param_groups]

    def training_step(trainer: MidskipTrainer, *args: Any, **kwargs: Any) -> Any:
        seen.append(groups_of(trainer.lr_scheduler))
        return original(trainer, *args, **kwargs)

    monkeypatch.setattr(MidskipTrainer, "training_step", training_step)
    train(replace(recipe, training=settings), resume=True, accept_changes=True, console=QUIET)
    scheduler = build_scheduler(build_optimizer(load_run(stopped)[0], settings), settings)
    expected = []
    for _ in range(6):
        expected += 2 * [groups_of(scheduler)]  # two passes a step
        scheduler.optimizer.step()
        scheduler.step()
    assert seen == expected[8:], "of steps 5 and 6"
    assert {path.name for path in stopped.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (4, 5, 6)}
    assert json.loads((stopped / "best" / "evaluation.json").read_text())["step"] == 6, "evaluated there alone"


@pytest.mark.parametrize(
    ("step", "changes", "stays"),
    [
        (4, {}, True),
        (5, {}, True),  # the same step will be taken again
        (4, {"learning_rate": 1e-4}, True),
        (5, {"learning_rate": 1e-4}, False),
        (4, {"num_processes": 8}, True),
        (5, {"num_processes": 8}, False),
        (2, {"separate_documents": False}, False),  # losses on windows that are cut otherwise
    ],
)
def test_the_best_model_is_one_of_this_run(stopped: Path, step: int, changes: dict[str, Any], stays: bool) -> None:
    recipe = replace(read_recipe(stopped / "recipe.yaml"), output=str(stopped))
    for group in ("data", "training"):
        own = {name: value for name, value in changes.items() if hasattr(getattr(recipe, group), name)}
        recipe = replace(recipe, **{group: replace(getattr(recipe, group), **own)})
    shutil.copytree(stopped / "checkpoint-4", stopped / "best")
    (stopped / "best" / "evaluation.json").write_text(json.dumps({"step": step, "loss": 0.1}))  # lower than any
    if "num_processes" in changes:
        start = json.loads((stopped / "start.json").read_text())
        (stopped / "start.json").write_text(json.dumps(start | changes))
    train(recipe, resume=True, accept_changes=True, console=QUIET)
    assert (json.loads((stopped / "best" / "evaluation.json").read_text())["loss"] == 0.1) == stays


def test_the_shape_of_a_model_never_changes(stopped: Path) -> None:
    recipe = replace(read_recipe(stopped / "recipe.yaml"), output=str(stopped))
    wider = replace(recipe, model=replace(recipe.model, hidden_size=32))
    before = everything(stopped)
    message = r"the shape of a model cannot change in a run \(model\.hidden_size: 16 -> 32\): give another --output"
    with pytest.raises(ValueError, match=message):
        train(wider, resume=True, accept_changes=True, console=QUIET)
    assert everything(stopped) == before


def test_a_finished_run_takes_more_steps_and_no_other_recipe(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(max_steps=2, save_steps=1, eval_steps=1, dense_layers=[2])
    train(recipe, console=QUIET)
    folder, before = Path(recipe.output), everything(Path(recipe.output))

    def other(**training: Any) -> Recipe:
        return replace(recipe, training=replace(recipe.training, **training))

    told = r"the run is finished, with another recipe \(training\."
    for given, accept_changes, message in (
        ({"max_steps": 4}, False, r"max_steps: 2 -> 4\): give another --output, or train it for longer with --accept"),
        ({"max_steps": 4, "seed": 5}, True, r".*\): give another --output; --accept_changes allows more training.max"),
        ({"max_steps": 1}, True, r"max_steps: 2 -> 1\): give another --output; --accept_changes allows more"),
    ):
        with pytest.raises(ValueError, match=told + message):
            train(other(**given), True, accept_changes, console=QUIET)
    assert everything(folder) == before
    report = train(other(max_steps=4), True, True, console=QUIET)
    assert [row["step"] for row in history(recipe)] == [1, 2, 3, 4] and report["training"]["steps"] == 4
    assert (folder / "page.html").is_file() and len(report["dense"]) == 1
    dense = [json.loads(line)["step"] for line in (folder / "dense-2" / "history.jsonl").read_text().splitlines()]
    assert dense == [1, 2, 3, 4] and read_recipe(folder / "recipe.yaml").training.max_steps == 4
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    with pytest.raises(ValueError, match=r"max_steps: 4 -> 5\), and has no checkpoint to go on from"):
        train(other(max_steps=5), True, True, console=QUIET)
    with pytest.raises(ValueError, match=r"run' already holds a run; go on with it by --resume, or give another"):
        train(recipe, console=QUIET)


def test_changed_shards_are_noticed(
    make_recipe: MakeRecipe, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(*TARGET_SHARE[:2], source=shutil.copytree(prepared, tmp_path / "shards"), save_steps=2)
    with monkeypatch.context() as patch:
        stop_at_step(patch, TargetShare, 3)
        with pytest.raises(Stop):
            train(recipe, console=QUIET)
    shutil.rmtree(tmp_path / "shards")
    text = write_documents(tmp_path / "text", 31)  # one more
    prepare(str(text), tmp_path / "shards", vocab_size=300, validation_share=0.2, console=QUIET)
    shards = r"other training data: train_000000\.bin; other validation data: validation_000000\.bin"
    with pytest.raises(ValueError, match=rf"this run did not begin like that \({shards}\): .*--accept_changes"):
        train(recipe, resume=True, console=QUIET)
    assert [row["step"] for row in history(recipe)] == [1, 2]
    train(recipe, resume=True, accept_changes=True, console=QUIET)
    assert [row["step"] for row in history(recipe)] == [1, 2, 3, 4]
    found = json.loads(Path(recipe.output, "start.json").read_text())["shards"]
    assert found == open_prepared(tmp_path / "shards").check(QUIET)


def test_another_number_of_processes_is_noticed(stopped: Path) -> None:
    start = json.loads((stopped / "start.json").read_text())
    (stopped / "start.json").write_text(json.dumps(start | {"num_processes": 8}))
    with pytest.raises(ValueError, match=r"did not begin like that \(8 processes and now 1\): .*--accept_changes"):
        going_on(stopped)
    going_on(stopped, accept_changes=True)
    assert json.loads((stopped / "start.json").read_text()) == start
