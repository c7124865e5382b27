"""Training: what a run writes, logs and adds up, how it goes on after a stop, and what it refuses."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed

import midskip
from midskip import MidskipForCausalLM
from midskip.controllers import BudgetController, Controller, FeedbackController, build_controller
from midskip.data import TokenWindows
from midskip.evaluate import evaluate
from midskip.train import Recipe, read_recipe, run, train
from midskip.train.recipe import ControllerSettings, DataSettings, ModelSettings, TrainingSettings
from midskip.train.run import PreparedData, build_optimizer, prepare_data
from midskip.train.trainer import MidskipTrainer

QUIET = Console(file=StringIO())
MakeRecipe = Callable[..., Recipe]


def sentences(count: int = 30) -> list[str]:
    return [f"Document {i}: the cat sat on mat {i % 7}, and the dog saw it {i} times.\n" for i in range(count)]


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits are promised there."""
    for module in (torch.cuda, torch.accelerator):
        monkeypatch.setattr(module, "is_available", lambda: False)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text: 30 documents in two files."""
    folder = tmp_path_factory.mktemp("text")
    for number in (0, 1):
        documents = sentences()[number::2]
        (folder / f"{number}.txt").write_text("<|endoftext|>\n".join(documents), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def data(text: Path) -> PreparedData:
    return prepare_data(DataSettings(str(text), vocab_size=300, length=16, validation_share=0.2), progress=False)


@pytest.fixture
def make_recipe(text: Path, tmp_path: Path) -> MakeRecipe:
    """make_recipe("budget", {"target_share": 0.5}, model={...}, **training): a run of a tiny model into "run"."""

    def make(controller: str = "none", settings: dict | None = None, model: dict | None = None, **more: Any) -> Recipe:
        shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
        output = str(tmp_path / more.pop("output", "run"))
        optimisation = {"steps": 4, "batch_size": 2, "save_steps": 0, "report_to": []}
        return Recipe(
            output,
            DataSettings(str(text), vocab_size=300, length=16, validation_share=0.2),
            ModelSettings(**({**shape, "initializer_range": 0.1} | (model or {}))),
            ControllerSettings(controller, settings or {}),
            TrainingSettings(**(optimisation | more)),
        )

    return make


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[MidskipTrainer]:
    """The trainers that `train` makes, in order."""
    made: list[MidskipTrainer] = []

    class Seen(MidskipTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(run, "MidskipTrainer", Seen)
    return made


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are slow to draw; for tests of something else."""
    monkeypatch.setattr(run, "write_picture", lambda *args, **kwargs: None)


def history(recipe: Recipe) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(recipe.output, "history.jsonl").read_text().splitlines()]


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def weights(recipe: Recipe, checkpoint: str = "") -> dict[str, Tensor]:
    return load_file(Path(recipe.output, checkpoint, "model.safetensors"))


def assert_same_weights(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def distance(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    return max((left[name] - right[name]).abs().max().item() for name in left)


def starting_model(recipe: Recipe, data: PreparedData) -> MidskipForCausalLM:
    set_seed(recipe.training.seed)
    return MidskipForCausalLM(recipe.build_config(len(data.tokenizer), data.tokenizer.eos_token_id))


def only_windows(data: PreparedData, count: int) -> PreparedData:
    """The same with the first `count` windows to train on."""
    return replace(data, training=TokenWindows(data.training.token_ids[: count * 16], 16))


# What a run writes


def test_a_run_from_a_folder_of_text_writes_all_its_files(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("sparsity", evaluation_steps=2, save_steps=3, steps=4, report_to=["tensorboard"])
    report = train(recipe, console=QUIET)
    folder = Path(recipe.output)

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert isinstance(model, MidskipForCausalLM) and model.config.num_hidden_layers == 4
    assert model.config.vocab_size == len(tokenizer) and model.config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.decode(tokenizer("the cat sat")["input_ids"]) == "the cat sat"
    assert read_recipe(folder / "recipe.yaml") == recipe

    rows = history(recipe)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(len(row["share_by_layer"]) == len(row["gate_mean_by_layer"]) == 4 for row in rows)
    assert all(row["num_tokens"] == 2 * 16 for row in rows)
    seconds = [row["seconds"] for row in rows]
    assert seconds[0] > 0 and seconds == sorted(seconds)

    assert json.loads((folder / "report.json").read_text()) == report
    assert report["training"]["steps"] == 4 and report["training"]["num_tokens"] == 4 * 2 * 16
    assert report["training"]["executed_share"] == pytest.approx(sum(row["executed_share"] for row in rows) / 4)
    assert report["num_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    data = prepare_data(recipe.data, False, tokenizer)
    assert report["validation"] == evaluate(model, data.validation, data.token_bytes, 2)

    assert (folder / "picture.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "page.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and page.count("held-out text, passage") == 4
    assert list(folder.glob("runs/*/events*")), "the events for TensorBoard"
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-4"}
    assert not list(folder.rglob("*.part"))


@pytest.mark.usefixtures("no_pictures")
def test_the_loss_falls_on_text_that_repeats_itself(make_recipe: MakeRecipe, data: PreparedData) -> None:
    recipe = make_recipe(steps=40, learning_rate=0.02, batch_size=4)
    report = train(recipe, data=data, console=QUIET)
    losses = [row["cross_entropy"] for row in history(recipe)]
    assert losses[0] > 5.5  # log(300) is 5.7
    assert max(losses[-5:]) < 3 and report["validation"]["loss"] < 3


# What is added up


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("passes", [1, 2])
def test_cross_entropy_regulariser_and_total_are_logged_apart(
    make_recipe: MakeRecipe, data: PreparedData, trainers: list[MidskipTrainer], passes: int
) -> None:
    recipe = make_recipe(
        "sparsity", {"mean_coefficient": 0.5}, batch_size=2 // passes, accumulation_steps=passes, steps=3, log_steps=2
    )
    data = only_windows(data, 2)
    train(recipe, data=data, console=QUIET)
    rows = history(recipe)
    for row in rows:
        assert row["total"] == pytest.approx(row["cross_entropy"] + row["regulariser"], rel=1e-12)
        mean_gate = sum(row["gate_mean_by_layer"]) / 4
        assert row["regulariser"] == pytest.approx(0.5 * mean_gate, rel=1e-5) and mean_gate > 0.1

    batch = {name: torch.stack([data.training[i][name] for i in (0, 1)]) for name in data.training[0]}
    before = starting_model(recipe, data)(**batch)
    assert rows[0]["cross_entropy"] == pytest.approx(before.loss.item(), rel=1e-5)
    assert rows[0]["share_by_layer"] == pytest.approx((before.gates > 0).float().mean((1, 2)).tolist())
    assert rows[0]["executed_share"] == pytest.approx((before.gates > 0).float().mean().item())

    logged = [entry for entry in trainers[0].state.log_history if "total" in entry]
    assert [entry["step"] for entry in logged] == [2]
    for name in ("cross_entropy", "regulariser", "total", "executed_share"):
        assert logged[0][name] == rows[1][name]


def test_evaluation_has_no_regulariser(make_recipe: MakeRecipe, data: PreparedData, tmp_path: Path) -> None:
    model = starting_model(make_recipe(), data)
    batch = {name: value[None] for name, value in data.validation[0].items()}
    arguments = TrainingArguments(str(tmp_path / "run"), report_to=[], use_cpu=True, disable_tqdm=True)

    def measure(module: Any) -> dict[str, float]:
        return {"loss": evaluate(module, data.validation)["loss"]}

    metrics, losses = [], []
    for name, settings in (("none", {}), ("sparsity", {"mean_coefficient": 100.0})):
        trainer = MidskipTrainer(
            build_controller(name, 4, **settings), measure, model=model, args=arguments, eval_dataset=data.validation
        )
        metrics.append(trainer.evaluate())
        assert trainer.state.log_history[-1]["eval_loss"] == metrics[-1]["eval_loss"]
        losses.append([trainer.compute_loss(model.train(training), batch).item() for training in (False, True)])
    assert metrics[0] == metrics[1]
    assert metrics[0] == {"eval_loss": evaluate(model, data.validation)["loss"], "epoch": 0}
    plain = model(**batch).loss.item()
    assert losses[0] == [plain, plain]
    assert losses[1][0] == plain and losses[1][1] > plain + 50


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("controller", "settings"),
    [("none", {}), ("sparsity", {"mean_coefficient": 1.0}), ("budget", {"target_share": 0.3, "ramp_steps": 1})],
)
def test_two_passes_of_one_are_one_pass_of_two(
    make_recipe: MakeRecipe,
    data: PreparedData,
    trainers: list[MidskipTrainer],
    controller: str,
    settings: dict[str, Any],
) -> None:
    # a large epsilon, for AdamW makes steps of full size from gradients that are nothing but rounding
    common = {"steps": 2, "warmup_share": 0.0, "epsilon": 1e-3, "learning_rate": 0.02}
    recipes = [
        make_recipe(
            controller, settings, output=f"{passes}", batch_size=2 // passes, accumulation_steps=passes, **common
        )
        for passes in (1, 2)
    ]
    for recipe in recipes:
        train(recipe, data=only_windows(data, 6), console=QUIET)
    assert distance(weights(recipes[0]), weights(recipes[1])) < 1e-5
    assert distance(weights(recipes[0]), dict(starting_model(recipes[0], data).named_parameters())) > 1e-3
    one, two = history(recipes[0]), history(recipes[1])
    assert [row["num_tokens"] for row in two] == [row["num_tokens"] for row in one] == [32, 32]
    for name in ("cross_entropy", "regulariser", "total", "executed_share"):
        assert [row[name] for row in two] == pytest.approx([row[name] for row in one], rel=1e-5)
    states = [trainer.controller.state_dict() for trainer in trainers]
    for name in states[0]:
        assert states[0][name] == pytest.approx(states[1][name], rel=1e-5)
    assert states[0].get("num_updates") == (2 if controller == "budget" else None)


@pytest.mark.usefixtures("no_pictures")
def test_gradient_checkpointing_changes_no_weight(
    make_recipe: MakeRecipe, data: PreparedData, trainers: list[MidskipTrainer]
) -> None:
    recipes = [make_recipe("sparsity", output=f"{on}", gradient_checkpointing=on) for on in (False, True)]
    for recipe in recipes:
        train(recipe, data=data, console=QUIET)
    assert [trainer.model.model.gradient_checkpointing for trainer in trainers] == [False, True]  # pyright: ignore
    assert_same_weights(weights(recipes[0]), weights(recipes[1]))


@pytest.mark.usefixtures("no_pictures")
def test_bf16_trains_float32_weights_to_about_the_same(make_recipe: MakeRecipe, data: PreparedData) -> None:
    recipes = [make_recipe(output=f"{on}", bf16=on) for on in (False, True)]
    for recipe in recipes:
        train(recipe, data=data, console=QUIET)
    losses = [[row["cross_entropy"] for row in history(recipe)] for recipe in recipes]
    assert losses[0] == pytest.approx(losses[1], abs=0.05) and losses[0] != losses[1]
    assert {weight.dtype for weight in weights(recipes[1]).values()} == {torch.float32}


class Recorder(Controller):
    """Keeps what it is told."""

    calls: list[tuple[Tensor, ...]] = []

    def update(self, mean_L: Tensor, variance_L: Tensor, share_L: Tensor | None = None) -> None:
        assert share_L is not None
        Recorder.calls.append((mean_L, variance_L, share_L))


@pytest.mark.usefixtures("no_pictures")
def test_the_controller_is_updated_once_a_step_from_the_whole_step(make_recipe: MakeRecipe, data: PreparedData) -> None:
    Recorder.calls.clear()
    recipe = make_recipe(
        f"{__name__}:Recorder",
        model={"policy_settings": {"start": "released"}},
        batch_size=1,
        accumulation_steps=3,
        steps=2,
    )
    data = only_windows(data, 3)
    train(recipe, data=data, console=QUIET)
    assert len(Recorder.calls) == 2
    gates_LBT = starting_model(recipe, data)(torch.stack([data.training[i]["input_ids"] for i in range(3)])).gates
    by_layer = gates_LBT.flatten(1)
    assert 0 < (by_layer > 0).float().mean() < 1, "else the test tests nothing"
    expected = by_layer.mean(1), by_layer.var(1, correction=0), (by_layer > 0).float().mean(1)
    for got_L, expected_L in zip(Recorder.calls[0], expected, strict=True):
        assert got_L.dtype == torch.float32
        torch.testing.assert_close(got_L, expected_L.detach(), atol=1e-6, rtol=1e-5)


def test_parameters_are_in_three_groups(make_recipe: MakeRecipe, data: PreparedData) -> None:
    recipe = make_recipe(weight_decay=0.1, gate_learning_rate_scale=0.25, beta1=0.7, beta2=0.8, epsilon=1e-5)
    model = starting_model(recipe, data)
    optimizer = build_optimizer(model, recipe.training)
    names = {parameter: name for name, parameter in model.named_parameters()}
    listed = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(listed) == len(names) and set(listed) == set(names)
    policies = []
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.7, 0.8), 1e-5)
        for parameter in group["params"]:
            is_policy = "policy" in names[parameter]
            policies += [names[parameter]] * is_policy
            assert group["lr"] == (3e-3 * 0.25 if is_policy else 3e-3)
            assert group["weight_decay"] == (0.1 if parameter.ndim == 2 and not is_policy else 0)
    assert policies == ["model.policy.weight", "model.policy.bias"]


@pytest.mark.usefixtures("no_pictures")
def test_the_scale_of_the_gates_learning_rate_reaches_the_weights(make_recipe: MakeRecipe, data: PreparedData) -> None:
    moved = []
    for scale in (0.0, 1.0):
        recipe = make_recipe(output=f"{scale}", gate_learning_rate_scale=scale)
        train(recipe, data=data, console=QUIET)
        before, after = starting_model(recipe, data).state_dict(), weights(recipe)
        moved.append([bool((before[name] != after[name]).any()) for name in ("model.policy.weight", "lm_head.weight")])
    assert moved == [[False, True], [True, True]]


# Going on after a stop


class Stop(Exception):
    pass


def stop_at_step(monkeypatch: pytest.MonkeyPatch, family: type[Controller], step: int) -> None:
    """The run dies in the controller's update of that step, once."""
    update, seen = family.update, []

    def dying(self: Controller, *args: Any) -> None:
        seen.append(1)
        if len(seen) == step:
            raise Stop
        update(self, *args)

    monkeypatch.setattr(family, "update", dying)


BUDGET = ("budget", {"target_share": 0.4, "ramp_steps": 5}, BudgetController)
GROWING = ("proportional_derivative", {"mean_targets": [0.9, 0.2], "coef_update_multiplier": 5.0}, FeedbackController)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(("controller", "settings", "family"), [BUDGET, GROWING], ids=lambda value: str(value)[:6])
@pytest.mark.parametrize("half_written", [False, True])
def test_a_stopped_run_goes_on_as_if_it_had_never_stopped(
    make_recipe: MakeRecipe,
    data: PreparedData,
    monkeypatch: pytest.MonkeyPatch,
    controller: str,
    settings: dict[str, Any],
    family: type[Controller],
    half_written: bool,
) -> None:
    data = only_windows(data, 7)  # an epoch has four steps, the last one of a single window
    common = {"steps": 8, "save_steps": 2, "evaluation_steps": 3}
    whole = make_recipe(controller, settings, output="whole", **common)
    expected = train(whole, data=data, console=QUIET)
    recipe = make_recipe(controller, settings, **common)
    with monkeypatch.context() as patch:
        stop_at_step(patch, family, 6)
        with pytest.raises(Stop):
            train(recipe, data=data, console=QUIET)
    folder = Path(recipe.output)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert [row["step"] for row in history(recipe)] == [1, 2, 3, 4, 5]
    with Path(folder, "history.jsonl").open("a") as file:
        file.write('{"step": 6, "cross_')
    if half_written:
        (folder / "checkpoint-4" / "controller.json").unlink()
    with pytest.raises(ValueError, match="already holds a run; go on with it by --resume"):
        train(recipe, data=data, console=QUIET)

    report = train(recipe, resume=True, data=data, console=QUIET)
    assert_same_weights(weights(recipe), weights(whole))
    assert [row["step"] for row in history(recipe)] == list(range(1, 9))
    assert timeless(history(recipe)) == timeless(history(whole))
    assert report["validation"] == expected["validation"]
    seconds = [row["seconds"] for row in history(recipe)]
    assert seconds == sorted(seconds) and report["training"]["seconds"] == seconds[-1]
    states = [json.loads(Path(r.output, "checkpoint-8", "controller.json").read_text()) for r in (recipe, whole)]
    assert states[0] == states[1]
    fresh = build_controller(controller, 4, **settings).state_dict()
    assert next(iter(fresh.values())) != states[0][next(iter(fresh))], "else the test tests nothing"


KILLER = """
import os, signal
from pathlib import Path
from midskip.controllers import BudgetController

class Killer(BudgetController):
    def update(self, *args):
        super().update(*args)
        armed = Path(__file__).with_name("armed")
        if armed.exists() and self.num_updates == 5:
            armed.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.usefixtures("no_pictures")
def test_a_killed_process_goes_on_as_if_it_had_never_stopped(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "midskip_killer.py").write_text(KILLER)
    monkeypatch.syspath_prepend(str(tmp_path))
    common = {"steps": 6, "save_steps": 2}
    recipe, whole = (
        make_recipe("midskip_killer:Killer", {"target_share": 0.5}, output=name, **common) for name in ("run", "whole")
    )
    recipe.save(tmp_path / "recipe.yaml")
    (tmp_path / "armed").touch()
    paths = [str(tmp_path), str(Path(midskip.__file__).parents[1])]
    same = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "CUDA_VISIBLE_DEVICES": ""}
    killed = subprocess.run(
        [sys.executable, "-m", "midskip.cli", "train", str(tmp_path / "recipe.yaml")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), **same},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "armed").exists()
    assert [row["step"] for row in history(recipe)] == [1, 2, 3, 4]
    train(recipe, resume=True, console=QUIET)
    train(whole, console=QUIET)
    assert_same_weights(weights(recipe), weights(whole))
    assert timeless(history(recipe)) == timeless(history(whole))


@pytest.mark.usefixtures("no_pictures")
def test_the_end_is_reached_once(make_recipe: MakeRecipe, data: PreparedData) -> None:
    recipe = make_recipe(*BUDGET[:2], steps=4, save_steps=2)
    report = train(recipe, data=data, console=QUIET)
    folder, final, rows = Path(recipe.output), weights(recipe), history(recipe)

    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert train(recipe, resume=True, data=data, console=QUIET) == report
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == times

    for name in ("model.safetensors", "report.json", "page.html"):  # it was killed after the last step
        (folder / name).unlink()
    assert train(recipe, resume=True, data=data, console=QUIET) == report
    assert_same_weights(weights(recipe), final)
    assert history(recipe) == rows

    moved = replace(recipe, output=str(folder.with_name("moved")))
    shutil.move(folder, moved.output)
    assert train(moved, resume=True, data=data, console=QUIET) == report


@pytest.mark.usefixtures("no_pictures")
def test_a_finished_run_without_checkpoints_is_not_trained_again(make_recipe: MakeRecipe, data: PreparedData) -> None:
    recipe = make_recipe(save_steps=0, steps=2)
    report = train(recipe, data=data, console=QUIET)
    rows = history(recipe)
    assert train(recipe, resume=True, data=data, console=QUIET) == report
    assert history(recipe) == rows


@pytest.mark.usefixtures("no_pictures")
def test_a_checkpoint_that_lacks_a_part_is_refused(
    make_recipe: MakeRecipe, data: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(*BUDGET[:2], steps=4, save_steps=2)
    stop_at_step(monkeypatch, BudgetController, 3)
    with pytest.raises(Stop):
        train(recipe, data=data, console=QUIET)
    checkpoint = Path(recipe.output, "checkpoint-2")
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        aside = checkpoint / "aside"
        (checkpoint / name).rename(aside)
        with pytest.raises(ValueError, match=rf"checkpoint-2' lacks {name[:5]}.*, so the run would not go on"):
            train(recipe, resume=True, data=data, console=QUIET)
        aside.rename(checkpoint / name)
    Path(recipe.output, "checkpoint-best").mkdir()  # somebody's own is neither used nor removed
    train(recipe, resume=True, data=data, console=QUIET)
    assert Path(recipe.output, "checkpoint-best").is_dir()


@pytest.mark.usefixtures("no_pictures")
def test_folders_that_hold_something_else_are_refused(make_recipe: MakeRecipe, data: PreparedData) -> None:
    recipe = make_recipe(steps=1)
    folder = Path(recipe.output)
    folder.write_text("a file")
    with pytest.raises(ValueError, match=r"run', which is a file; expected a folder"):
        train(recipe, data=data, console=QUIET)
    folder.unlink()
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(ValueError, match=r"run', which holds other files; give a new or empty folder"):
            train(recipe, resume, data, console=QUIET)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
    (folder / "thesis.txt").unlink()
    train(recipe, data=data, console=QUIET)
    before = weights(recipe)
    with pytest.raises(ValueError, match=r"run' already holds a run; go on with it by --resume, or give another"):
        train(recipe, data=data, console=QUIET)
    changed = replace(recipe, training=replace(recipe.training, seed=5))
    with pytest.raises(ValueError, match=r"the recipe is not the one in .*recipe\.yaml': resume with that, or give"):
        train(changed, resume=True, data=data, console=QUIET)
    assert_same_weights(weights(recipe), before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"controller": "nonsense"}, "unknown controller 'nonsense'"),
        ({"controller": "budget"}, "missing a required argument: 'target_share'"),
        ({"controller": "budget", "settings": {"target_share": 0.5}, "model": {"policy": "dense"}}, "got Dense"),
        ({"model": {"policy": "no_such_module:Policy"}}, r"'no_such_module:Policy' cannot be loaded"),
        ({"model": {"policy_settings": {"begin": "open"}}}, "does not know the setting 'begin'"),
        ({"model": {"num_attention_heads": 3}}, r"hidden_size \(16\) is not a multiple of num_attention_heads \(3\)"),
        ({"report_to": ["carrier_pigeon"]}, "report_to names 'carrier_pigeon', which is not installed or not known"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_folder_is_taken(
    make_recipe: MakeRecipe, data: PreparedData, changes: dict[str, Any], message: str
) -> None:
    recipe = make_recipe(**changes)
    with pytest.raises(ValueError, match=message):
        train(recipe, data=data, console=QUIET)
    assert not Path(recipe.output).exists()


# Numbers that are none


class Poison(FeedbackController):
    """Its term is not finite from the fourth step on."""

    def __init__(self, num_layers: int) -> None:
        super().__init__(num_layers, rule="error", coef_update_multiplier=1.0, mean_targets=[0.5, 0.5])
        self.seen = torch.zeros(())
        self.changing += ("seen",)

    def update(self, mean_L: Tensor, variance_L: Tensor, share_L: Tensor | None = None) -> None:
        super().update(mean_L, variance_L, share_L)
        self.seen = self.seen + 1

    def loss(self, gates_LBT: Tensor, valid_BT: Tensor | None = None) -> Tensor:
        return super().loss(gates_LBT, valid_BT) * (math.nan if self.seen >= 3 else 1)


@pytest.mark.usefixtures("no_pictures")
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    make_recipe: MakeRecipe, data: PreparedData
) -> None:
    recipe = make_recipe(f"{__name__}:Poison", steps=6, save_steps=2)
    screen = StringIO()
    for resume in (False, True):
        with pytest.raises(
            FloatingPointError, match=r"the loss is nan in step 4 \(cross-entropy 5\.\d+, regulariser nan"
        ):
            train(recipe, resume, data, console=Console(file=screen, force_terminal=True, width=120))
        assert [path.name for path in Path(recipe.output).glob("checkpoint-*")] == ["checkpoint-2"]
        assert [row["step"] for row in history(recipe)] == [1, 2, 3]
        assert all(weight.isfinite().all() for weight in weights(recipe, "checkpoint-2").values())
    assert not Path(recipe.output, "report.json").exists()
    hidden, shown = screen.getvalue().rfind("\x1b[?25l"), screen.getvalue().rfind("\x1b[?25h")
    assert 0 < hidden < shown, "the cursor is back"


class Overflow(Controller):
    """Its term is 0 and the gradient of its term infinite."""

    def loss(self, gates_LBT: Tensor, valid_BT: Tensor | None = None) -> Tensor:
        total = gates_LBT.sum()
        return (total - total.detach()).sqrt()


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("save_steps", [0, 1])
def test_weights_that_are_not_finite_are_not_saved(
    make_recipe: MakeRecipe, data: PreparedData, save_steps: int
) -> None:
    recipe = make_recipe(f"{__name__}:Overflow", steps=1, save_steps=save_steps)
    with pytest.raises(FloatingPointError, match=r"a weight is no longer finite after step 1: lower the learning rate"):
        train(recipe, data=data, console=QUIET)
    assert history(recipe)[0]["total"] > 5
    folder = Path(recipe.output)
    assert not (folder / "model.safetensors").exists() and not list(folder.rglob("controller.json"))


@pytest.mark.usefixtures("no_pictures")
def test_the_seed_decides_every_bit(make_recipe: MakeRecipe, data: PreparedData) -> None:
    recipes = [make_recipe("sparsity", output=f"{i}", seed=seed) for i, seed in enumerate((3, 3, 4))]
    for recipe in recipes:
        torch.rand(17)  # the caller's generator is no part of it
        train(recipe, data=data, console=QUIET)
    assert_same_weights(weights(recipes[0]), weights(recipes[1]))
    assert timeless(history(recipes[0])) == timeless(history(recipes[1]))
    assert distance(weights(recipes[0]), weights(recipes[2])) > 0.01


def test_progress_is_told_in_lines_where_there_is_no_terminal(
    make_recipe: MakeRecipe, data: PreparedData, no_pictures: None
) -> None:
    screen = StringIO()
    train(make_recipe(steps=12, log_steps=1), data=data, title="[bold]toy", console=Console(file=screen, width=200))
    lines = screen.getvalue().splitlines()
    assert len(lines) == 2
    for line, step in zip(lines, (10, 12), strict=True):
        assert line.startswith(f"[bold]toy, step {step}/12: loss ")
        assert "100% ran" in line and "tokens/s" in line and line.endswith(" s left")


# Recipes


def test_a_recipe_survives_writing_and_reading(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(
        "budget",
        {"target_share": 0.5, "ramp_steps": 3},
        model={"num_key_value_heads": 1, "keys": "all", "norms": "pre", "policy_settings": {"start": "spread"}},
        epsilon=1e-10,
        learning_rate=1e-4,
        report_to=["tensorboard", "none"],
    )
    recipe.save(tmp_path / "recipe.yaml")
    assert read_recipe(tmp_path / "recipe.yaml") == recipe
    assert read_recipe() == Recipe()


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "output: there\n"
        "training: {steps: 3, learning_rate: 1e-4}\n"
        "controller: {name: budget, settings: {target_share: 0.5, gain: 0.1}}\n"
    )
    recipe = read_recipe(
        file, ["--training.steps=5", "--model.keys", "all", "--controller.settings.target_share=0.7", "--output=here"]
    )
    assert recipe.output == "here" and recipe.model.keys == "all"
    assert recipe.training == TrainingSettings(steps=5, learning_rate=1e-4)
    assert recipe.controller.settings == {"target_share": 0.7, "gain": 0.1}
    assert recipe.data == DataSettings()


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("training: {stepz: 3}", "'stepz'"),
        ("trainin: {steps: 3}", "trainin"),
        ("training: {steps: many}", r"training\.steps.*many"),
        ("training: {steps: 1.5}", r"training\.steps.*1\.5"),
        ("training: {bf16: 3}", r"training\.bf16.*3"),
        ("training: {report_to: tensorboard}", r"training\.report_to.*tensorboard"),
        ("model: {norms: post}", r"model\.norms.*sandwich.*pre.*post"),
        ("training: 3", "training is 3; expected settings by name"),
        ("training: null\noutput: x", "training is None; expected settings by name"),
        ("- a\n- b", "cannot be used"),
        ("", "cannot be used"),
        ("training: {steps: [", "cannot be used"),
        (b"\xff\xfe", "cannot be used.*utf-8"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, yaml: str | bytes, message: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(yaml if isinstance(yaml, bytes) else yaml.encode())
    with pytest.raises(ValueError, match=r"(?s)the recipe cannot be used: .*" + message.replace("cannot be used", "")):
        read_recipe(file)


@pytest.mark.parametrize(
    "override",
    [
        "--training.learning_rat=1",
        "--training.step=3",
        "--trainin.steps=3",
        "--training.stepz=3",
        "--nonsense=1",
        "nonsense",
        "--training.steps",
    ],
)
def test_overrides_that_are_no_settings_are_refused(override: str) -> None:
    with pytest.raises(ValueError, match=r"the recipe cannot be used: .*" + override.split("=")[0]):
        read_recipe(None, [override])


def test_a_recipe_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.yaml"):
        with pytest.raises(ValueError, match=r"there is no recipe at '.*'; expected a YAML file"):
            read_recipe(path)


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("steps", (0, -1), (1,)),
        ("batch_size", (0,), (1,)),
        ("accumulation_steps", (0,), (1,)),
        ("log_steps", (0,), (1,)),
        ("evaluation_steps", (-1,), (0,)),
        ("save_steps", (-1,), (0,)),
        ("learning_rate", (0.0, -1e-3, math.nan, math.inf), (1e-9,)),
        ("gate_learning_rate_scale", (-0.1, math.nan), (0.0, 2.0)),
        ("warmup_share", (-0.1, 1.0, math.nan), (0.0, 0.99)),
        ("beta1", (-0.1, 1.0, math.nan), (0.0,)),
        ("beta2", (-0.1, 1.0, math.nan), (0.999,)),
        ("epsilon", (0.0, -1e-8, math.nan), (1e-10,)),
        ("weight_decay", (-0.1, math.nan, math.inf), (0.0,)),
        ("clip_norm", (-1.0, math.nan), (0.0,)),
        ("seed", (-1, 2**32), (0, 2**32 - 1)),
    ],
)
def test_settings_out_of_range_are_refused(name: str, bad: tuple, good: tuple) -> None:
    for value in bad:
        with pytest.raises(ValueError, match=rf"training\.{name} is {value}; expected "):
            TrainingSettings(**{name: value})
        text = {"nan": ".nan", "inf": ".inf"}.get(str(value), str(value))
        with pytest.raises(ValueError, match=rf"training\.{name} is {value}; expected "):
            read_recipe(None, [f"--training.{name}={text}"])
    for value in good:
        assert asdict(read_recipe(None, [f"--training.{name}={value}"]).training)[name] == value


# From outside

OUTSIDE = '''
import torch
from torch import nn

from midskip.controllers import Controller
from midskip.policies import Decision, Policy


class Alternate(Policy):
    """Runs odd layers for all, and even ones for tokens whose learnt gate is open."""

    def __init__(self, num_layers, width, initializer_range=0.02, offset=0.0):
        super().__init__(num_layers, width, initializer_range)
        self.offset = offset
        self.linear = nn.Linear(width, 1)

    def decide(self, layer, h_ND, state, layout):
        if layer % 2:
            return Decision()
        gate_N = (self.linear(h_ND).squeeze(1) + self.offset).clamp(0, 1)
        return Decision(gate_N > 0, gate_N, gate_N)


class Rising(Controller):
    """A coefficient that rises by a step an update."""

    changing = ("mean_coefficients",)

    def __init__(self, num_layers, *, step):
        super().__init__(num_layers)
        self.step, self.mean_coefficients = step, torch.zeros(num_layers)

    def update(self, mean_L, variance_L, share_L=None):
        self.mean_coefficients = self.mean_coefficients + self.step
'''


@pytest.mark.usefixtures("no_pictures")
def test_a_policy_and_a_controller_from_outside(
    make_recipe: MakeRecipe, data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "outside_author.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(str(tmp_path))
    model = {"policy": "outside_author:Alternate", "policy_settings": {"offset": 0.1}}
    recipe = make_recipe("outside_author:Rising", {"step": 0.25}, model=model, steps=3, save_steps=3)
    recipe.save(tmp_path / "recipe.yaml")
    report = train(read_recipe(tmp_path / "recipe.yaml"), data=data, console=QUIET)
    share = report["validation"]["share_by_layer"]
    assert share[1] == share[3] == 1 and 0 < share[0] < 1 and 0 < share[2] < 1
    rows = history(recipe)
    for row, coefficient in zip(rows, (0.0, 0.25, 0.5), strict=True):
        assert row["regulariser"] == pytest.approx(coefficient * sum(row["gate_mean_by_layer"]) / 4, rel=1e-5)
    state = json.loads(Path(recipe.output, "checkpoint-3", "controller.json").read_text())
    assert state == {"mean_coefficients": [0.75] * 4}
    loaded = AutoModelForCausalLM.from_pretrained(recipe.output)
    assert evaluate(loaded, data.validation, data.token_bytes, 2) == report["validation"]
