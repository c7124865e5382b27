"""A run: what it writes, what it reads, its best model, and parts from outside the package."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_runs import (
    QUIET,
    assert_same_weights,
    batch_of,
    first_windows,
    history,
    starting_model,
    weights,
    windows_of,
    write_documents,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from midskip import MidskipForCausalLM
from midskip.data import WindowOrder, open_prepared, prepare, progress, token_bytes
from midskip.evaluate import evaluate
from midskip.runs import load_run
from midskip.train import Recipe, read_recipe, train
from midskip.train.trainer import MidskipTrainer

MakeRecipe = Callable[..., Recipe]
pytestmark = pytest.mark.usefixtures("on_the_cpu")
quick = pytest.mark.usefixtures("no_pictures")


# ---- what a run writes


@quick
def test_a_run_with_a_pad_token_of_its_own(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    data = {"vocab_size": 300, "validation_share": 0.2, "pad_token": "<|pad|>"}
    recipe = make_recipe(source=write_documents(tmp_path / "text"), data=data, max_steps=1)
    train(recipe, console=QUIET)
    model, tokenizer = load_run(recipe.output)
    assert model.config.vocab_size == len(tokenizer) == 300
    assert model.config.pad_token_id == tokenizer.pad_token_id == 299 and model.config.eos_token_id == 0
    prepared = replace(recipe.data, source=f"{recipe.output}/text", pad_token="<|other|>")
    with pytest.raises(ValueError, match=r"is '<\|other\|>', and the folder was prepared with '<\|pad\|>'"):
        train(replace(recipe, output=str(tmp_path / "again"), data=prepared), console=QUIET)


@quick
@pytest.mark.parametrize("is_prepared", [False, True])
def test_held_out_text_of_its_own_has_its_name(make_recipe: MakeRecipe, tmp_path: Path, is_prepared: bool) -> None:
    source, held_out = write_documents(tmp_path / "text"), write_documents(tmp_path / "unseen")
    data: dict[str, Any] = {"vocab_size": 300, "validation": str(held_out)}
    if is_prepared:
        prepare(str(source), tmp_path / "prepared", vocab_size=300, validation=str(held_out))
        source, data = tmp_path / "prepared", {}
    report = train(make_recipe(source=source, data=data, max_steps=1), console=QUIET)
    assert report["text"] == "unseen"


def test_a_run_from_a_folder_of_text_writes_all_its_files(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    data = {"vocab_size": 300, "validation_share": 0.2}
    more = {"eval_steps": 2, "save_steps": 3, "max_steps": 4, "logging_steps": 2, "report_to": ["tensorboard"]}
    recipe = make_recipe("sparsity", source=write_documents(tmp_path / "text"), data=data, **more)
    report = train(recipe, console=QUIET)
    folder = Path(recipe.output)

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert isinstance(model, MidskipForCausalLM) and model.config.num_hidden_layers == 4
    assert model.config.vocab_size == len(tokenizer) and model.config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.decode(tokenizer("the cat sat")["input_ids"]) == "the cat sat"
    assert tokenizer.model_max_length == model.config.max_position_embeddings == recipe.data.length
    assert read_recipe(folder / "recipe.yaml") == recipe
    text = open_prepared(folder / "text")
    assert json.loads((folder / "start.json").read_text()) == {"num_processes": 1, "shards": text.check(QUIET)}

    rows = history(recipe)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(len(row["share_by_layer"]) == len(row["gate_mean_by_layer"]) == 4 for row in rows)
    assert all(row["num_tokens"] == 2 * 16 for row in rows)
    seconds = [row["seconds"] for row in rows]
    assert seconds[0] > 0 and seconds == sorted(seconds)

    assert json.loads((folder / "report.json").read_text()) == report
    assert report["training"]["steps"] == 4 and report["training"]["num_tokens"] == 4 * 2 * 16
    assert report["training"]["executed_share"] == pytest.approx(sum(row["executed_share"] for row in rows) / 4)
    assert report["training"]["peak"] == {"flops_per_s": 1e12, "from": "the recipe"}
    assert report["num_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    validation = text.windows("validation", 16)
    assert report["validation"] == evaluate(model, validation, token_bytes(tokenizer), 2)
    assert report["validation"]["num_targets"] == text.summary["validation"]["num_tokens"] - 1, "all but the first"

    assert (folder / "picture.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "page.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and page.count("held-out text, passage") == 4
    assert list(folder.glob("runs/*/events*")), "the events for TensorBoard"
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-4"}
    assert {path.name for path in folder.iterdir() if path.is_dir()} > {"best", "runs", "text"}
    assert not list(folder.rglob("*.part"))


@pytest.mark.integration
@quick
def test_the_loss_falls_on_text_that_repeats_itself(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(max_steps=40, learning_rate=0.02, per_device_train_batch_size=4)
    report = train(recipe, console=QUIET)
    losses = [row["cross_entropy"] for row in history(recipe)]
    assert losses[0] > 5.5  # log(300) is 5.7
    assert max(losses[-5:]) < 3 and report["validation"]["loss"] < 3


@quick
def test_progress_is_told_in_lines_where_there_is_no_terminal(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However seldom a run logs; a line is due at once here."""
    monkeypatch.setattr("midskip.data.progress.LINE_S", 0.0)
    screen = StringIO()
    recipe = make_recipe(max_steps=12, logging_steps=100, eval_steps=6, save_steps=6)
    report = train(recipe, title="[bold]\x1b[31mtoy", console=Console(file=screen, width=40))
    lines = [line for line in screen.getvalue().splitlines() if line.startswith("[bold]␛[31mtoy, step ")]
    assert "\x1b" not in screen.getvalue() and "\r" not in screen.getvalue()
    told = [line.removeprefix("[bold]␛[31mtoy, step ").split("/12: ") for line in lines]
    steps = [int(step) for step, text in told if text.startswith("loss ")]
    assert all(" 100% ran, " in text and text.endswith(" s left") for _, text in told if text.startswith("loss "))
    assert steps == list(range(1, 13))
    losses = [float(text.split()[2].rstrip(",")) for _, text in told if text.startswith("held-out loss ")]
    assert len(losses) == 2 and losses[1] == pytest.approx(report["validation"]["loss"], abs=1e-4)
    assert [step for step, text in told if text == f"saved checkpoint-{step}"] == ["6", "12"]
    best = [step for step, text in told if text.endswith("the best so far: saved in best")]
    assert best == (["6", "12"] if losses[1] < losses[0] else ["6"])
    assert any(line.startswith("Evaluating: ") for line in screen.getvalue().splitlines())


@quick
def test_a_line_is_due_after_ten_silent_seconds(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = time.perf_counter()
    for ago_s, due in ((9.0, False), (11.0, True)):
        monkeypatch.setattr(progress, "_said_s", [now_s - ago_s])
        assert progress.is_silent() is due
    monkeypatch.setattr(progress, "_said_s", [now_s + 1000.0])  # never due
    screen = StringIO()
    train(make_recipe(max_steps=3, logging_steps=1), title="toy", console=Console(file=screen, width=200))
    (line,) = [line for line in screen.getvalue().splitlines() if line.startswith("toy, step 3/3: loss ")]
    assert line.endswith(" s left")


# ---- what it reads


@quick
def test_windows_come_shuffled_anew_each_epoch(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(per_device_train_batch_size=5, gradient_accumulation_steps=2, max_steps=9)
    windows, _ = windows_of(recipe)
    seen: list[list[int]] = []
    original = MidskipTrainer.compute_loss

    def watched(self: MidskipTrainer, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        seen.extend(inputs["input_ids"].tolist())
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(MidskipTrainer, "compute_loss", watched)
    train(recipe, console=QUIET)
    contents = [windows[number]["input_ids"].tolist() for number in range(len(windows))]
    numbers = [contents.index(ids) for ids in seen]
    assert len(set(map(tuple, contents))) == len(windows) and len(seen) == 90 > 2 * len(windows)
    epochs = [numbers[start : start + len(windows)] for start in range(0, 90, len(windows))]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(len(windows)))
    assert epochs[0] != epochs[1] and len(set(epochs[2])) == len(epochs[2])
    assert numbers == list(WindowOrder(len(windows), 90, recipe.training.seed))


@quick
def test_documents_are_apart_unless_the_recipe_says_otherwise(make_recipe: MakeRecipe) -> None:
    losses = []
    for apart, others in ((True, {}), (False, {"separate_documents": False})):
        recipe = make_recipe(
            output=f"{apart}", data=others, model={"initializer_range": 0.5}, max_steps=1, per_device_train_batch_size=4
        )
        train(recipe, console=QUIET)
        windows, validation = windows_of(recipe)
        assert ("position_ids" in windows[0]) == ("position_ids" in validation[0]) == apart
        batch = batch_of(windows, *first_windows(recipe, 4))
        starts = batch["input_ids"] == open_prepared(recipe.data.source).end_of_text
        assert starts[:, 1:].any(), "else the test tests nothing"
        if apart:
            assert ((batch["position_ids"] == 0) == starts | (torch.arange(16) == 0)).all()
        losses.append(history(recipe)[0]["cross_entropy"])
        assert losses[-1] == pytest.approx(starting_model(recipe)(**batch).loss.item(), rel=1e-5)
    assert abs(losses[0] - losses[1]) > 1e-3


# ---- the best model


@quick
def test_best_is_the_model_of_the_lowest_loss(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    # a rate at which it soon gets worse
    recipe = make_recipe(max_steps=6, eval_steps=1, save_steps=1, save_total_limit=9, learning_rate=1.0)
    found: list[float] = []
    keep_best = MidskipTrainer.keep_best

    def watched(self: MidskipTrainer, loss: float) -> None:
        found.append(loss)
        keep_best(self, loss)

    monkeypatch.setattr(MidskipTrainer, "keep_best", watched)
    report = train(recipe, console=QUIET)
    best = 1 + found.index(min(found))
    assert len(found) == 7 and found[-1] == found[-2] == report["validation"]["loss"] and best < 6, "else no test"
    assert report["best"] == {"step": best, "loss": found[best - 1]}
    assert json.loads(Path(recipe.output, "best", "evaluation.json").read_text()) == report["best"]
    assert_same_weights(weights(recipe, "best"), weights(recipe, f"checkpoint-{best}"))
    model, tokenizer = load_run(Path(recipe.output, "best"))
    _, validation = windows_of(recipe)
    assert evaluate(model, validation, token_bytes(tokenizer), 2)["loss"] == found[best - 1]


@quick
@pytest.mark.parametrize("eval_steps, num_passes", [(0, 1), (2, 2), (3, 2)])
def test_a_model_is_evaluated_once(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, eval_steps: int, num_passes: int
) -> None:
    """Also where a run ends with a step that is evaluated: 4 is one, for every 2 steps."""
    seen = []

    def counted(*arguments: Any, **more: Any) -> dict[str, Any]:
        seen.append(arguments)
        return evaluate(*arguments, **more)

    monkeypatch.setattr("midskip.train.run.evaluate", counted)
    train(make_recipe(max_steps=4, eval_steps=eval_steps), console=QUIET)
    assert len(seen) == num_passes


# ---- from outside

POLICY = '''
import torch
from torch import nn

from midskip.policies import Decision, Policy

OPEN = torch.zeros(1)  # on the CPU, whoever imports this, and when


class Alternate(Policy):
    """Runs odd layers for all, and even ones for tokens whose learnt gate is open."""

    def __init__(self, num_layers, width, initializer_range=0.02, offset=0.0):
        super().__init__(num_layers, width, initializer_range)
        self.offset = offset
        self.linear = nn.Linear(width, 1)

    def decide(self, layer, h_ND, state, batch):
        if layer % 2:
            return Decision()
        gate_N = (self.linear(h_ND).squeeze(1) + self.offset).clamp(0, 1)
        return Decision(gate_N > OPEN, gate_N, gate_N)
'''
REGULARIZER = '''
import torch

from midskip.regularizers import Regularizer


class Rising(Regularizer):
    """A coefficient that rises by a step an update."""

    changing = ("mean_coefficients",)

    def __init__(self, num_layers, *, step):
        super().__init__(num_layers)
        self.step, self.mean_coefficients = step, torch.zeros(num_layers)

    def update(self, mean_L, variance_L, share_L=None):
        self.mean_coefficients = self.mean_coefficients + self.step
'''


@quick
def test_a_policy_and_a_regularizer_from_outside(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "outside_policy.py").write_text(POLICY)
    (tmp_path / "outside_regularizer.py").write_text(REGULARIZER)
    monkeypatch.syspath_prepend(str(tmp_path))
    model = {"policy": "outside_policy:Alternate", "policy_settings": {"offset": 0.1}}
    recipe = make_recipe("outside_regularizer:Rising", {"step": 0.25}, model=model, max_steps=3, save_steps=3)
    recipe.save(tmp_path / "recipe.yaml")
    report = train(read_recipe(tmp_path / "recipe.yaml"), console=QUIET)
    share = report["validation"]["share_by_layer"]
    assert share[1] == share[3] == 1 and 0 < share[0] < 1 and 0 < share[2] < 1
    for row, coefficient in zip(history(recipe), (0.0, 0.25, 0.5), strict=True):
        assert row["regularizer"] == pytest.approx(coefficient * sum(row["gate_mean_by_layer"]) / 4, rel=1e-5)
    state = json.loads(Path(recipe.output, "checkpoint-3", "regularizer.json").read_text())
    assert state == {"mean_coefficients": [0.75] * 4}
    loaded, tokenizer = load_run(recipe.output, trust=["outside_policy"])
    assert evaluate(loaded, windows_of(recipe)[1], token_bytes(tokenizer), 2) == report["validation"]
