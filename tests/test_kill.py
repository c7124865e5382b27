"""Each long command that is killed at once, wherever it is, and called again until it ends, ends bit for bit where an
undisturbed one does, also where the clock is set back meanwhile and files are as old as chance has it."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from killing import Attempt, Program, Say, die_after, mix_times, set_clock_back
from tiny_runs import everything, tiny_recipe, write_documents
from tiny_sweep import write_sweep

from midskip import MidskipConfig, MidskipForCausalLM
from midskip.bench import run as bench
from midskip.budget import calibrate
from midskip.cli import main
from midskip.data import load_tokenizer
from midskip.train import run

TEXT = ["--data=text", "--validation=held_out=text"]


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
    more: tuple[str, ...] = ()
    always: tuple[str, ...] = ()


COMMANDS = {
    "prepare": Command(["prepare", "text", "--output=out", "--vocab_size=300", "--shard_tokens=500"], always=("prepared.json",)),
    "train": Command(["train", "../given/recipe.yaml"], recipe, ("--resume",), ("start.json", "checkpoint-*/complete.json")),
    "calibrate": Command(["calibrate", "out", "--data=text", "--max_tokens=2500"], gated, always=("config.json", "best/config.json")),
    "retrofit": Command(
        ["retrofit", "../given/dense", *TEXT, "--output=out", "--length=64", "--fit_tokens=512", "--price_tokens=2048",
         "--batch_size=2", "--distil_steps=3", "--finetune_steps=2", "--save_steps=1"],
        dense,
        always=("retrofit.json",),
    ),
    "sweep": Command(["sweep", "../given/sweep.yaml"], grid, always=("sweep.json", "results/*.json")),
    "bench": Command(
        ["bench", "--shape=tiny", "--dtypes=float32", "--gates=fractional", "--shares=0.5", "--repeats=1",
         "--num_hidden_layers=2", "--tasks=prefill,decode", "--batch_sizes=1", "--prompt_tokens=8",
         "--context_tokens=8", "--new_tokens=2", "--device=cpu", "--output=out"],
        always=("bench.json",),
    ),
}  # fmt: skip


# ---- what is called in the program


def quick() -> None:
    """What takes long and is not looked at here is left out."""
    run.write_picture = bench.write_speed_picture = lambda path, *args: Path(path).write_bytes(b"slow to draw")
    calibrate.MOST_POINTS = 5


def kill(name: str, place: str, num_kills: int, seed: int) -> dict[str, Any]:
    """Makes `whole`, `killed-0`, `killed-1`, ...: each killed up to three times, and then called until it ends.

    Returns:
        The number of those, and of kills at a change of the folder and at a moment.
    """
    command, folder, moments = COMMANDS[name], Path(place), random.Random(f"{name} {seed}")
    given = folder / "given"
    write_documents(folder / "text", 150)

    def attempt(where: Path, more: tuple[str, ...] = (), **how: Any) -> Attempt:
        return Attempt(where, lambda say: main([*command.first, *more]), **how)

    def make(say: Say) -> None:
        quick()
        given.mkdir()
        command.make(given)

    def begin(where: str) -> Path:
        if (given / "found").is_dir():
            shutil.copytree(given / "found", folder / where)
        (folder / where).mkdir(exist_ok=True)
        (folder / where / "text").symlink_to(folder / "text")
        return folder / where

    begin("making")
    Attempt(folder / "making", make)
    if (folder / "making" / "found").is_dir():
        (folder / "making" / "found").rename(given / "found")
    whole = attempt(begin("whole"), before=quick)
    num_trials, fell = 0, {"change": 0, "moment": 0}
    while sum(fell.values()) < num_kills:
        where, more = begin(f"killed-{num_trials}"), ()
        num_trials += 1
        for _ in range(moments.randint(1, 3)):
            kind, clock = moments.choice(list(fell)), random.Random(moments.random())
            after_s, number = moments.uniform(0, whole.seconds), moments.randint(1, whole.num_changes)

            def before(is_moment: bool = kind == "moment", after_s: float = after_s, clock: Any = clock) -> None:
                quick()
                set_clock_back(clock)
                if is_moment:
                    die_after(after_s)

            if not attempt(where, more, before=before, die_at_change=number if kind == "change" else 0).was_killed:
                break
            fell[kind] += 1
            more = command.more
            for file in (file for pattern in command.always for file in (where / "out").glob(pattern)):
                json.loads(file.read_text())
            mix_times(where / "out", moments)
        else:
            attempt(where, more, before=quick)
    return {
        "num_trials": num_trials,
        "fell": fell,
        "seconds": whole.seconds,
        "cpu_s": whole.cpu_s,
        "num_changes": whole.num_changes,
    }


# ---- the tests


def left(folder: Path) -> dict[str, Any]:
    """What a command left, as far as it must be the same; of times, that they are there."""
    found = everything(folder)
    if "bench.json" in found:
        result = json.loads(found["bench.json"])
        assert all(row.pop("time_s") > 0 for row in result["rows"])
        named = ("task", "side", "num_columns", "work")
        found["bench.json"] = result["complete"], [[row[name] for name in named] for row in result["rows"]]
    return found


@pytest.mark.parametrize("num_kills", [5, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command_ends_like_one_that_was_not(
    name: str, num_kills: int, tmp_path: Path, killer: Program
) -> None:
    killed = killer.call(Path(__file__).stem, "kill", name, str(tmp_path), num_kills, 0)
    print(name, killed)
    whole = left(tmp_path / "whole" / "out")
    assert len(whole) > 1
    for number in range(killed["num_trials"]):
        found = left(tmp_path / f"killed-{number}" / "out")
        assert found.keys() == whole.keys(), f"{name}, folder {number}"
        assert [file for file in whole if found[file] != whole[file]] == [], f"{name}, folder {number}"
