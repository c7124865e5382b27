"""The long commands, as tests have them killed and broken off: small ones, in folders of their own."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from killing import Attempt, Say
from tiny_runs import everything, tiny_recipe, write_documents
from tiny_sweep import write_sweep

from midskip import MidskipConfig, MidskipForCausalLM
from midskip.bench import run as bench
from midskip.budget import calibrate
from midskip.cli import main
from midskip.data import load_tokenizer
from midskip.train import report

TEXTS = ("text", "others")
TEXT = ["--data=text", "--validation=held_out=others"]


def nothing(given: Path) -> None:
    pass


def recipe(given: Path) -> None:
    """A checkpoint every step."""
    tiny_recipe(
        "text", "out", "target_share", {"target_share": 0.5}, data={"tokenizer": "bytes", "length": 64},
        model={"policy_settings": {"start": "spread"}},
        max_steps=4, save_steps=1, eval_steps=2,
    ).save(given / "recipe.yaml")  # fmt: skip


def gated(given: Path) -> None:
    """A run with a best model that is not its last."""
    recipe(given)
    assert main(["train", str(given / "recipe.yaml"), "--output=found/out"]) == 0


def dense(given: Path) -> None:
    """A model to retrofit."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer("bytes")
    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    config = MidskipConfig(
        **shape, num_hidden_layers=4, vocab_size=257, max_position_embeddings=64, policy="dense", norms="pre",
        initializer_range=0.3,
    )  # fmt: skip
    MidskipForCausalLM(config).save_pretrained(given / "dense")
    tokenizer.save_pretrained(given / "dense")


def grid(given: Path) -> None:
    write_sweep(given, output="out", seeds=[0, 1])


@dataclass(frozen=True)
class Command:
    """One that is killed.

    Args:
        first: its arguments, in a folder with `text`, beside the folder `given`; it writes to `out`.
        make: makes `given`, and in the working directory `found`, what is in the folder of the command before.
        more: arguments when it is called again.
        always: files of `out` that are whole whenever they are there.
    """

    first: list[str]
    make: Callable[[Path], None] = nothing
    more: list[str] = field(default_factory=list)
    always: list[str] = field(default_factory=list)


COMMANDS = {
    "prepare": Command(
        ["prepare", "text", "--output=out", "--vocab_size=300", "--shard_tokens=500"], always=["prepared.json"]
    ),
    "train": Command(
        ["train", "../given/recipe.yaml"], recipe, ["--resume"], always=["start.json", "checkpoint-*/complete.json"]
    ),
    "calibrate": Command(
        ["calibrate", "out", "--data=text", "--max_tokens=2500"], gated, always=["config.json", "best/config.json"]
    ),
    "retrofit": Command(
        ["retrofit", "../given/dense", *TEXT, "--output=out", "--length=64", "--fit_tokens=512", "--price_tokens=2048",
         "--batch_size=2", "--distil_steps=2", "--finetune_steps=1", "--save_steps=1"],
        dense,
        always=["retrofit.json"],
    ),
    "sweep": Command(["sweep", "../given/sweep.yaml"], grid, always=["sweep.json", "results/*.json"]),
    "bench": Command(
        ["bench", "--shape=tiny", "--dtypes=float32", "--gates=fractional", "--shares=0.5", "--repeats=1",
         "--num_hidden_layers=2", "--tasks=prefill,decode", "--batch_sizes=1", "--prompt_tokens=8",
         "--context_tokens=8", "--new_tokens=2", "--device=cpu", "--output=out"],
        always=["bench.json"],
    ),
}  # fmt: skip


def quick() -> None:
    """What takes long and is not looked at here is left out."""
    report.write_picture = bench.write_speed_picture = lambda path, *args: Path(path).write_bytes(b"slow to draw")
    calibrate.MOST_POINTS = 3


class Trials:
    """Folders in which a command is called, under `folder`; `whole` is what an undisturbed call took."""

    def __init__(self, name: str, folder: Path):
        self.command, self.folder, self.count = COMMANDS[name], folder, 0
        given, found = folder / "given", folder / "making" / "found"
        for count, text in enumerate(TEXTS, 150):  # held-out text must be another
            write_documents(folder / text, count)

        def make(say: Say) -> None:
            quick()
            given.mkdir()
            self.command.make(given)

        self._begin("making")
        Attempt(folder / "making", make)
        if found.is_dir():
            found.rename(given / "found")
        self.whole = self.attempt(self._begin("whole"))

    def begin(self) -> Path:
        """The next folder."""
        self.count += 1
        return self._begin(f"trial-{self.count - 1}")

    def _begin(self, name: str) -> Path:
        if (self.folder / "given" / "found").is_dir():
            shutil.copytree(self.folder / "given" / "found", self.folder / name)
        (self.folder / name).mkdir(exist_ok=True)
        for text in TEXTS:
            (self.folder / name / text).symlink_to(self.folder / text)
        return self.folder / name

    def attempt(self, where: Path, more: Sequence[str] = (), before: Callable[[], None] = quick, **how: Any) -> Attempt:
        return Attempt(where, lambda say: main([*self.command.first, *more]), before=before, **how)

    def took(self) -> dict[str, Any]:
        whole = self.whole
        return {
            "num_trials": self.count, "seconds": whole.seconds, "cpu_s": whole.cpu_s, "num_changes": whole.num_changes
        }  # fmt: skip


def check_whole(command: Command, folder: Path) -> None:
    """An error if a file is not whole that always has to be."""
    for file in (file for pattern in command.always for file in (folder / "out").glob(pattern)):
        json.loads(file.read_text())


def left(folder: Path) -> dict[str, Any]:
    """What a command left, as far as it must be the same; of times, that they are there."""
    found = everything(folder)
    if "bench.json" in found:
        result = json.loads(found["bench.json"])
        assert all(row.pop("time_s") > 0 for row in result["rows"])
        named = ("task", "side", "num_columns", "work")
        found["bench.json"] = result["complete"], [[row[name] for name in named] for row in result["rows"]]
    return found


def assert_all_ended_alike(folder: Path, num_trials: int) -> None:
    whole = left(folder / "whole" / "out")
    assert len(whole) > 1
    for number in range(num_trials):
        found = left(folder / f"trial-{number}" / "out")
        assert found.keys() == whole.keys(), f"trial {number}"
        assert [file for file in whole if found[file] != whole[file]] == [], f"trial {number}"
