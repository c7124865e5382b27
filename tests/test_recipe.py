"""Recipes: reading and writing them, what is refused, and the command line's help."""

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from midskip.cli import main
from midskip.train import Recipe, read_recipe
from midskip.train.read import read_yaml
from midskip.train.recipe import DataSettings, ModelSettings, RegularizerSettings, TrainingSettings, changes

GROUPS = {
    "data": DataSettings,
    "model": ModelSettings,
    "regularizer": RegularizerSettings,
    "training": TrainingSettings,
}


def test_a_recipe_survives_writing_and_reading(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = make_recipe(
        "target_share",
        {"target_share": 0.5, "ramp_steps": 3},
        model={"num_key_value_heads": 1, "skipped_kv": "keep", "norms": "pre", "policy_settings": {"start": "spread"}},
        data={"separate_documents": False, "validation": "there", "max_tokens": 7},
        adam_epsilon=1e-10,
        learning_rate=1e-4,
        peak_flops=3e12,
        report_to=["tensorboard", "none"],
    )
    recipe.save(tmp_path / "recipe.yaml")
    assert read_recipe(tmp_path / "recipe.yaml") == recipe
    assert [file.name for file in tmp_path.iterdir()] == ["recipe.yaml"]
    assert read_recipe() == Recipe()


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "output: there\n"
        "training: {max_steps: 3, learning_rate: 1e-4}\n"
        "regularizer: {name: target_share, settings: {target_share: 0.5, gain: 0.1}}\n"
    )
    recipe = read_recipe(
        file,
        [
            "--training.max_steps=5",
            "--model.skipped_kv",
            "keep",
            "--regularizer.settings.target_share=0.7",
            "--output=here",
        ],
    )
    assert recipe.output == "here" and recipe.model.skipped_kv == "keep"
    assert recipe.training == TrainingSettings(max_steps=5, learning_rate=1e-4)
    assert recipe.regularizer.settings == {"target_share": 0.7, "gain": 0.1}
    assert recipe.data == DataSettings()


def test_what_yaml_merges_does_not_stand_twice(tmp_path: Path) -> None:
    file = tmp_path / "merged.yaml"
    file.write_text("a: &a {k: 1}\nx: {y: &b {<<: *a, k: 2}}\nc: {<<: *b}\n")
    assert read_yaml(file)["c"] == {"k": 2}


def test_the_home_folder_is_meant_by_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "r.yaml").write_text("output: ~/run\n")
    for recipe in (read_recipe(tmp_path / "r.yaml"), read_recipe(None, ["--output=~/run"]), Recipe("~/run")):
        assert recipe.output == str(tmp_path / "run")


def test_changes_are_told_by_name() -> None:
    earlier = read_recipe(None, ["--regularizer.settings.target_share=0.5", "--output=there"])
    now = read_recipe(
        None, ["--regularizer.settings.target_share=0.6", "--model.skipped_kv=keep", "--data.validation=x.txt"]
    )
    assert changes(earlier, now) == [
        "data.validation: None -> 'x.txt'",
        "model.skipped_kv: 'drop' -> 'keep'",
        "regularizer.settings: {'target_share': 0.5} -> {'target_share': 0.6}",
    ]
    assert changes(now, now) == []


def test_a_vocabulary_is_padded_on_request() -> None:
    for multiple, expected in ((1, 50257), (64, 50304), (50257, 50257)):
        recipe = read_recipe(None, [f"--model.pad_vocab_to_multiple_of={multiple}"])
        assert recipe.build_config(50257).vocab_size == expected
    with pytest.raises(ValueError, match=r"model\.pad_vocab_to_multiple_of is 0; expected at least 1"):
        read_recipe(None, ["--model.pad_vocab_to_multiple_of=0"])


# ---- what is refused


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("training: {stepz: 3}", "'stepz'"),
        ("trainin: {max_steps: 3}", "trainin"),
        ("training: {max_steps: many}", r"training\.max_steps.*many"),
        ("training: {max_steps: 1.5}", r"training\.max_steps.*1\.5"),
        ("training: {bf16: 3}", r"training\.bf16.*3"),
        ("training: {report_to: tensorboard}", r"training\.report_to.*tensorboard"),
        ("model: {norms: post}", r"model\.norms.*sandwich.*pre.*post"),
        ("data: {separate_documents: maybe}", r"data\.separate_documents.*maybe"),
        ("training: {seed: 1}\ntraining: {max_steps: 3}", "'training' stands twice"),
        ("training: {seed: 1, max_steps: 3, seed: 2}", "'seed' stands twice"),
        ("training: 3", "training is 3; expected settings by name"),
        ("training: null\noutput: x", "training is None; expected settings by name"),
        ("- a\n- b", "cannot be used"),
        ("", "it holds None; expected settings by name"),
        ("training: {max_steps: [", "cannot be used"),
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
        "--training.max_step=3",
        "--trainin.max_steps=3",
        "--training.stepz=3",
        "--nonsense=1",
        "nonsense",
        "--training.max_steps",
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
        ("max_steps", (0, -1, 2**31), (1, 2**31 - 1)),
        ("per_device_train_batch_size", (0,), (1,)),
        ("gradient_accumulation_steps", (0,), (1,)),
        ("logging_steps", (0,), (1,)),
        ("save_total_limit", (0, -1), (1,)),
        ("eval_steps", (-1,), (0,)),
        ("save_steps", (-1,), (0,)),
        ("learning_rate", (0.0, -1e-3, math.nan, math.inf), (1e-9,)),
        ("gate_learning_rate_scale", (-0.1, math.nan), (0.0, 2.0)),
        ("warmup_ratio", (-0.1, 1.0, math.nan), (0.0, 0.99)),
        ("warmup_start", (-0.1, 1.1, math.nan), (0.0, 0.1, 1.0)),
        ("adam_beta1", (-0.1, 1.0, math.nan), (0.0,)),
        ("adam_beta2", (-0.1, 1.0, math.nan), (0.999,)),
        ("adam_epsilon", (0.0, -1e-8, math.nan), (1e-10,)),
        ("weight_decay", (-0.1, math.nan, math.inf), (0.0,)),
        ("max_grad_norm", (-1.0, math.nan), (0.0,)),
        ("peak_flops", (0.0, -1.0, math.nan), (1e12,)),
        ("seed", (-1, 2**32), (0, 2**32 - 1)),
        ("data_seed", (-1, 2**32), (None, 0, 2**32 - 1)),
    ],
)
def test_settings_out_of_range_are_refused(name: str, bad: tuple, good: tuple) -> None:
    for value in bad:
        with pytest.raises(ValueError, match=rf"training\.{name} is {value}; expected "):
            TrainingSettings(**{name: value})
    for value in good:
        assert asdict(TrainingSettings(**{name: value}))[name] == value


def test_settings_out_of_range_are_refused_on_the_command_line_too() -> None:
    for name, text, value in (
        ("max_steps", "0", "0"),
        ("learning_rate", ".nan", "nan"),
        ("max_grad_norm", "-1", "-1.0"),
    ):
        with pytest.raises(ValueError, match=rf"training\.{name} is {value}; expected "):
            read_recipe(None, [f"--training.{name}={text}"])
    assert read_recipe(None, ["--training.adam_epsilon=1e-10"]).training.adam_epsilon == 1e-10


# ---- help


def explained(settings: type) -> dict[str, str]:
    """What the docstring says of each field, without its white space."""
    text = inspect.cleandoc(settings.__doc__ or "").split("Args:\n")[1]
    entries = re.split(r"^    (?=\w+: )", text, flags=re.MULTILINE)[1:]
    return {name: "".join(sentence.split()) for name, _, sentence in (entry.partition(": ") for entry in entries)}


def test_help_explains_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    for switch in ("--resume", "--accept_changes", "torchrun", "--output", "folder of the run"):
        assert switch in out
    entries = {entry.split()[0]: "".join(entry.split()) for entry in re.split(r"^  (?=--)", out, flags=re.MULTILINE)}
    for group, settings in GROUPS.items():
        sentences = explained(settings)
        assert list(sentences) == [field.name for field in fields(settings)]
        for name, sentence in sentences.items():
            assert len(sentence) > 5 and sentence in entries[f"--{group}.{name}"], f"{group}.{name}"
