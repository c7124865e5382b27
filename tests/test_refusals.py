"""What cannot work is found before the run: one clear line, no step taken, and the folder free for another try."""

import re
import shutil
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_runs import QUIET, history, write_documents
from torch import Tensor

from midskip.data import ShardWriter, bytes_tokenizer, encode_documents, open_prepared, prepare
from midskip.regularizers import Regularizer
from midskip.train import Recipe, train
from midskip.train.checkpoints import check_disk
from midskip.train.fsdp import SETTINGS
from midskip.train.trainer import MidskipTrainer

MakeRecipe = Callable[..., Recipe]
pytestmark = pytest.mark.usefixtures("on_the_cpu", "no_pictures")
Usage = namedtuple("Usage", "total used free")


def refused(recipe: Recipe, message: str, trainers: list[MidskipTrainer], **more: Any) -> None:
    """It says so on one line, no Trainer is made, and the folder is no run's."""
    with pytest.raises(ValueError, match=message) as error:
        train(recipe, console=QUIET, **more)
    assert "\n" not in str(error.value)
    assert trainers == []
    folder = Path(recipe.output)
    assert not folder.exists() or {path.name for path in folder.iterdir()} <= {"text"}


class Unsaved(Regularizer):
    changing = ("total",)


class ATermALayer(Regularizer):
    def loss(self, gates_LBT: Tensor, valid_BT: Tensor | None = None) -> Tensor:
        return gates_LBT.mean((1, 2))


# ---- settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"regularizer": "nonsense"}, "unknown regularizer 'nonsense'"),
        ({"regularizer": "target_share"}, "missing a required argument: 'target_share'"),
        (
            {"regularizer": f"{__name__}:Unsaved"},
            "Unsaved fails before the first step: .* no attribute 'total'",
        ),
        ({"regularizer": f"{__name__}:ATermALayer"}, r"ATermALayer gives \[\d+\]; expected a scalar tensor"),
        (
            {"regularizer": "target_share", "settings": {"target_share": 0.5}, "model": {"policy": "dense"}},
            "the policy Dense has no gates",
        ),
        ({"model": {"policy": "no_such_module:Policy"}}, r"'no_such_module:Policy' cannot be loaded"),
        ({"model": {"policy_settings": {"begin": "open"}}}, "does not know the setting 'begin'"),
        ({"model": {"num_attention_heads": 3}}, r"hidden_size \(16\) is not a multiple of num_attention_heads \(3\)"),
        ({"report_to": ["carrier_pigeon"]}, "report_to names 'carrier_pigeon', which is not installed or not known"),
    ],
)
def test_settings_that_do_not_fit(
    make_recipe: MakeRecipe, trainers: list[MidskipTrainer], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    recipe = make_recipe(**changes, source=write_documents(tmp_path / "text"))
    refused(recipe, message, trainers)
    assert not Path(recipe.output).exists(), "the text was not even read"


def test_reporters_are_named_with_those_there_are(make_recipe: MakeRecipe, trainers: list[MidskipTrainer]) -> None:
    message = r"report_to names 'tensorbored', which is .* known to transformers; installed: .*tensorboard"
    refused(make_recipe(report_to=["tensorboard", "tensorbored"]), message, trainers)


def test_accelerates_fsdp(
    make_recipe: MakeRecipe, trainers: list[MidskipTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in ("true", "1"):
        monkeypatch.setenv("ACCELERATE_USE_FSDP", value)
        refused(make_recipe(), r"accelerate was told to use FSDP, which it does on GPUs alone", trainers)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for name, (option, wanted) in SETTINGS.items():
        refused(make_recipe(), f"use FSDP with {option} None; expected {wanted}: accelerate launch", trainers)
        monkeypatch.setenv(name, wanted)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    train(make_recipe(max_steps=1), console=QUIET)


# ---- text


def test_held_out_text_too_small_for_a_window(
    make_recipe: MakeRecipe, trainers: list[MidskipTrainer], tmp_path: Path
) -> None:
    source, data = write_documents(tmp_path / "text"), {"vocab_size": 300, "validation_share": 0.01, "length": 100}
    recipe = make_recipe(source=source, data=data)
    message = (
        r"The held-out text has \d+ tokens \(.*run/text/validation_000000\.bin\)\. Expected at least data\.length, "
        r"100: raise data\.validation_share, give more text as data\.validation, or choose a shorter data\.length"
    )
    refused(recipe, message, trainers)
    again = replace(recipe, data=replace(recipe.data, length=16))
    train(again, console=QUIET)  # nothing to clear away, and the text is not prepared again
    assert len(history(again)) == 4


def test_text_too_small_for_a_step(make_recipe: MakeRecipe, prepared: Path, trainers: list[MidskipTrainer]) -> None:
    num_windows = open_prepared(prepared).summary["training"]["num_tokens"] // 16
    recipe = make_recipe(per_device_train_batch_size=num_windows // 2, gradient_accumulation_steps=3)
    message = (
        rf"There are \d+ tokens \(.*shards/train_000000\.bin\), which make {num_windows} windows of 16 tokens\. "
        rf"Expected {num_windows // 2 * 3} windows or more; give more text, or choose a shorter length or a smaller "
    )
    refused(recipe, message, trainers)
    train(replace(recipe, training=replace(recipe.training, gradient_accumulation_steps=2, max_steps=1)), console=QUIET)


def test_text_that_is_not_there(make_recipe: MakeRecipe, trainers: list[MidskipTrainer], tmp_path: Path) -> None:
    refused(make_recipe(source=tmp_path / "none"), r"none", trainers)
    both = {"validation": str(tmp_path / "none"), "validation_share": 0.5}
    refused(make_recipe(source=tmp_path / "none", data=both), "both validation text", trainers)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"validation": "other.txt"}, r"data\.validation is 'other\.txt', and the folder was prepared with None\. Exp"),
        (
            {"validation_share": 0.3},
            r"data\.validation_share is 0\.3, and the folder was prepared with 0\.2\. Expected",
        ),
        ({"tokenizer": "bytes"}, r"data\.tokenizer is 'bytes', and the folder was prepared with 'bpe'\. Expected"),
        ({"vocab_size": 400}, r"data\.vocab_size is 400, and the folder was prepared with 300\. Expected"),
        (
            {"max_tokens": 9, "max_validation_tokens": 8},
            r"data\.max_tokens is 9, .*; data\.max_validation_tokens is 8, ",
        ),
    ],
)
def test_settings_that_a_prepared_folder_contradicts(
    make_recipe: MakeRecipe, trainers: list[MidskipTrainer], data: dict[str, Any], message: str
) -> None:
    refused(make_recipe(data=data), message, trainers)


def test_settings_that_a_prepared_folder_was_made_with(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    same = {"vocab_size": 300, "validation_share": 0.2, "tokenizer": "bpe"}
    source = write_documents(tmp_path / "text")
    for data in (same, {"vocab_size": 2048}):  # which is of bpe, and the text is of bytes
        if data is not same:
            prepare(str(source), tmp_path / "bytes", tokenizer="bytes", validation_share=0.2, console=QUIET)
        more = {} if data is same else {"source": tmp_path / "bytes"}
        assert train(make_recipe(output=f"{len(data)}", data=data, max_steps=1, **more), console=QUIET)


# ---- shards


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder of shards as FineWeb's are published: train_*.bin and val_*.bin, here of bytes."""
    documents = [f"Page {i} of the web, with {i * i} links.\n" for i in range(60)]
    folder = tmp_path / "fineweb"
    folder.mkdir()
    for name, some in (("train", documents[:50]), ("val", documents[50:])):
        with ShardWriter(folder, name, 257, shard_tokens=900) as writer:
            writer.write(encode_documents(bytes_tokenizer(), some))
    return folder


def shard_settings(shards: Path, **changes: Any) -> dict[str, Any]:
    data = {"validation": f"{shards}/val_*.bin", "tokenizer": "bytes"}
    return {"source": f"{shards}/train_*.bin", "data": data | changes}


def test_shards_are_trained_on_as_they_are(make_recipe: MakeRecipe, shards: Path) -> None:
    assert len(list(shards.glob("train_*.bin"))) == 3
    recipe = make_recipe(**shard_settings(shards), max_steps=2)
    report = train(recipe, console=QUIET)
    assert report["training"]["num_tokens"] == 64 and report["validation"]["bits_per_byte"] > 1
    assert not Path(recipe.output, "text").exists() and Path(recipe.output, "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation": None}, r"train_\*\.bin', shards of tokens, and there is no data\.validation\."),
        ({"tokenizer": "bpe"}, r"The tokenizer 'bpe' is trained on text, and shards hold tokens"),
        *(
            ({name: value}, rf"shards of tokens, and data\.{name} is {value!r}, a setting of text .* leave it out")
            for name, value in {
                "max_tokens": 100,
                "max_validation_tokens": 50,
                "vocab_size": 999,
                "validation_share": 0.2,
                "text_field": "body",
                "pad_token": "<pad>",
            }.items()
        ),
        ({"validation": "none_*.bin"}, r"none_\*\.bin"),
        ({"length": 100_000}, r"\d+ tokens \(.*train_000000\.bin and 2 more\), which make 0 windows of 100000"),
    ],
)
def test_shards_that_do_not_fit(
    make_recipe: MakeRecipe, shards: Path, trainers: list[MidskipTrainer], changes: dict[str, Any], message: str
) -> None:
    refused(make_recipe(**shard_settings(shards, **changes)), message, trainers)


def test_shards_of_another_tokenizer(make_recipe: MakeRecipe, shards: Path, trainers: list[MidskipTrainer]) -> None:
    with ShardWriter(shards, "train", 2**16) as writer:
        writer.write(np.arange(500, dtype=np.uint16))
    message = r"train_000000\.bin' holds the token id 257, at place 257 .* outside the vocabulary\. .* below 257"
    refused(make_recipe(**shard_settings(shards)), message, trainers)


def test_a_shard_that_is_not_whole(make_recipe: MakeRecipe, shards: Path, trainers: list[MidskipTrainer]) -> None:
    file = shards / "train_000001.bin"
    file.write_bytes(file.read_bytes()[:-2])
    refused(make_recipe(**shard_settings(shards)), r"train_000001\.bin' is truncated", trainers)


# ---- disks and folders


def test_a_disk_without_room(
    make_recipe: MakeRecipe, trainers: list[MidskipTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 10**5, 10**5))
    recipe = make_recipe(save_steps=1, save_total_limit=50)
    message = (
        rf"would write up to 0\.1 GiB to '{re.escape(recipe.output)}' and its disk has 0\.0 GiB free: make room, give "
        r"an --output on another disk, or keep fewer checkpoints \(training\.save_total_limit, training\.save_steps=0"
    )
    refused(recipe, message, trainers)
    monkeypatch.undo()
    train(replace(recipe, training=replace(recipe.training, max_steps=1)), console=QUIET)


@pytest.mark.parametrize(
    ("num_checkpoints", "best", "num_copies"), [(0, False, 1), (0, True, 3), (2, False, 10), (2, True, 12)]
)
def test_room_is_needed_for_checkpoints_best_and_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_checkpoints: int, best: bool, num_copies: int
) -> None:
    needed = num_copies * 4 * 1000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, needed - there))
    there = 0
    check_disk(tmp_path / "not" / "yet", 1000, num_checkpoints, best)
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "optimizer.pt").write_bytes(bytes(700))
    there = 700  # which will make room, or is what would be written
    check_disk(tmp_path, 1000, num_checkpoints, best)
    there = 701
    with pytest.raises(ValueError, match="keep fewer checkpoints"):
        check_disk(tmp_path, 1000, num_checkpoints, best)


def test_folders_that_hold_something_else(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(max_steps=1)
    folder = Path(recipe.output)
    folder.write_text("a file")
    with pytest.raises(ValueError, match=r"run', which is a file; expected a folder"):
        train(recipe, console=QUIET)
    folder.unlink()
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    (folder / "checkpoint-1").mkdir()
    for resume in (False, True):
        with pytest.raises(ValueError, match=r"run', which holds other files; give a new or empty folder"):
            train(recipe, resume, console=QUIET)
    assert {path.name for path in folder.iterdir()} == {"thesis.txt", "checkpoint-1"}
    shutil.rmtree(folder)
    folder.mkdir()
    train(recipe, console=QUIET)
