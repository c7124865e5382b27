"""A run that is killed at once, wherever it is, and resumed until it ends, ends bit for bit where a quiet one does.

This file as a program does the runs. It imports everything once, and forks a process for each attempt.
"""

import gc
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import everything, tiny_recipe, write_documents

from midskip.train import Recipe, run, train, trainer

AGAIN = ("steps", "checkpoint", "marker")  # phases of which a run has many
# where a run can be; a kill is aimed at each in turn, and falls at a random moment from its beginning on
PHASES = ["begin", "text", "steps", *["checkpoint"] * 2, "marker", "best", "checkpoint", "evaluation", "end", "pages"]


def recipe_of(folder: Path) -> Recipe:
    """Two and a half epochs, a checkpoint every step, a growing regularizer that moves the model's bias."""
    return tiny_recipe(
        write_documents(folder.parent.parent / "text", 50), folder, "target_share",
        {"target_share": 0.4, "ramp_steps": 8}, model={"policy_settings": {"start": "spread"}},
        data={"vocab_size": 300, "length": 64, "validation_share": 0.2},
        max_steps=10, per_device_train_batch_size=4, save_steps=1, eval_steps=3, logging_steps=2,
    )  # fmt: skip


# ---- the program


def announce(say: Callable[[str], None]) -> None:
    """Have a run say where it is, whenever it goes from one phase to another."""
    phases = ["begin"]

    def phase(owner: Any, function: str, name: str) -> None:
        original = getattr(owner, function)

        def announced(*args: Any, **kwargs: Any) -> Any:
            phases.append(name)
            say(name)
            result = original(*args, **kwargs)
            phases.pop()
            if name == "steps":
                phases[0] = "end"
            say(phases[-1])
            return result

        setattr(owner, function, announced)

    phase(run, "open_windows", "text")
    phase(trainer.MidskipTrainer, "train", "steps")
    phase(trainer.MidskipTrainer, "_save_checkpoint", "checkpoint")
    phase(trainer._AroundStep, "on_save", "marker")
    phase(trainer.MidskipTrainer, "evaluate", "evaluation")
    phase(trainer.MidskipTrainer, "keep_best", "best")
    phase(run, "write_pages", "pages")


def die_at_file(folder: Path, number: int) -> None:
    """Have this process killed when it changes the folder for that time, a file it would write being half written."""
    num_changes = 0

    def look(event: str, args: tuple[Any, ...]) -> None:
        nonlocal num_changes
        if event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            return
        path, flags = args[0], args[2] if event == "open" else 0
        if not str(path).startswith(str(folder)) or (event == "os.mkdir" and os.path.isdir(path)):
            return
        if event == "open" and not flags & (os.O_WRONLY | os.O_RDWR):
            return
        num_changes += 1
        if num_changes == number:
            if event == "open":
                os.write(os.open(path, flags, 0o600), b'{"half')
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)


def die_in_phase(phase: str, number: int, after_s: float) -> Callable[[str], None]:
    """Have this process killed so long after that phase begins for that time; to be told of each that begins.

    By an alarm that nobody handles, which the system answers as it answers a kill with -9.
    """
    num_begun = 0

    def begun(name: str) -> None:
        nonlocal num_begun
        num_begun += name == phase
        if num_begun == number:
            signal.setitimer(signal.ITIMER_REAL, max(after_s, 1e-6))

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    return begun


class Attempt:
    """A process that goes on with a run, to its end or to where it is killed."""

    def __init__(self, recipe: Recipe, die_at_change: int = 0, die_in: tuple[str, int, float] | None = None):
        output, pipe = os.pipe()
        self.process = os.fork()
        if not self.process:
            os.close(output)
            if die_at_change:
                die_at_file(Path(recipe.output), die_at_change)
            begun = die_in_phase(*die_in) if die_in else lambda phase: None

            def say(phase: str) -> None:
                os.write(pipe, f"{time.perf_counter()} {phase}\n".encode())
                begun(phase)

            self._work(recipe, say)
        os.close(pipe)
        with open(output) as lines:  # until the process ends
            self.phases = [(float(moment_s), phase) for moment_s, phase in map(str.split, lines)]
        status = os.waitpid(self.process, 0)[1]
        self.was_killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGALRM)
        if status and not self.was_killed:
            raise RuntimeError(f"an attempt failed with status {status}, after {self.phases}")

    @staticmethod
    def _work(recipe: Recipe, say: Callable[[str], None]) -> None:
        status = 1
        try:
            say("begin")
            announce(say)
            train(recipe, resume=True)
            status = 0
        except BaseException:
            traceback.print_exc()
        os._exit(status)


def durations(phases: list[tuple[float, str]]) -> dict[str, float]:
    """Mean seconds of each phase."""
    found: dict[str, list[float]] = {}
    for (begin_s, name), (end_s, _) in pairwise(phases):
        found.setdefault(name, []).append(end_s - begin_s)
    return {name: sum(seconds) / len(seconds) for name, seconds in found.items()}


def killed_in(recipe: Recipe, aim: str, typical_s: dict[str, float], moments: random.Random) -> str | None:
    """Go on with the run, and kill it there, at a random moment; the phase it was in, None if it ended before."""
    number, share = moments.randint(1, 3 if aim in AGAIN else 1), moments.random()
    attempt = Attempt(recipe, die_in=(aim, number, share * typical_s[aim]))
    return attempt.phases[-1][1] if attempt.was_killed else None


def kill_at_every_file(folder: Path) -> None:
    """Writes `whole/run`, `killed-0/run`, ..., and `kills.json`: for each of these, the phase it was killed in."""
    run.write_picture = lambda path, *args: Path(path).write_bytes(b"slow to draw")

    def recipe(name: str) -> Recipe:
        made = recipe_of(folder / name / "run")
        return replace(made, training=replace(made.training, max_steps=2, eval_steps=1, save_total_limit=1))

    Attempt(recipe("whole"))
    kills = []
    while (broken := Attempt(recipe(f"killed-{len(kills)}"), die_at_change=len(kills) + 1)).was_killed:
        kills.append([broken.phases[-1][1]])
        Attempt(recipe(f"killed-{len(kills) - 1}"))
    (folder / "kills.json").write_text(json.dumps(kills))


def kill_at_random(folder: Path) -> None:
    """Writes `whole/run`, `killed-0/run`, ..., and `kills.json`: for each of these, the phases it was killed in."""
    random_moments = random.Random(0)
    typical_s = durations(Attempt(recipe_of(folder / "whole" / "run")).phases)
    kills: list[list[str]] = []
    aims = iter(PHASES)
    for aim in aims:
        recipe = recipe_of(folder / f"killed-{len(kills)}" / "run")
        kills.append([])
        while aim and (phase := killed_in(recipe, aim, typical_s, random_moments)):
            kills[-1].append(phase)
            aim = next(aims, None)
        Attempt(recipe)  # which does nothing where the run has ended
    (folder / "kills.json").write_text(json.dumps(kills))


# ---- the tests


def kills_of(program: str, folder: Path) -> list[list[str]]:
    """Run the program, and compare each run it killed with the quiet one; the phases that each was killed in."""
    paths = os.pathsep.join(sys.path)
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, __file__, program, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    kills = json.loads((folder / "kills.json").read_text())
    whole = everything(folder / "whole" / "run")
    for number, phases in enumerate(kills):
        found = everything(folder / f"killed-{number}" / "run")
        assert found.keys() == whole.keys(), f"run {number}, killed in {phases}"
        assert [name for name in whole if found[name] != whole[name]] == [], f"run {number}, killed in {phases}"
    assert {"best/model.safetensors", "history.jsonl", "page.html"} < set(whole)
    last = f"checkpoint-{len(whole['history.jsonl'])}"
    parts = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "regularizer.json")
    assert {f"{last}/{part}" for part in parts} < set(whole)
    return kills


def test_a_run_killed_at_any_moment_ends_like_one_that_was_not(tmp_path: Path) -> None:
    fell = Counter(phase for phases in kills_of("random", tmp_path) for phase in phases)
    print("the kills fell in", dict(fell))
    assert fell.total() >= len(PHASES) - 2
    assert fell["checkpoint"] + fell["marker"] >= 1 and len(fell) >= 4, "else the test tests little"


@pytest.mark.slow
def test_a_run_killed_at_any_file_ends_like_one_that_was_not(tmp_path: Path) -> None:
    fell = Counter(phase for phases in kills_of("every_file", tmp_path) for phase in phases)
    print("the kills fell in", dict(fell))
    assert {"begin", "text", "steps", "checkpoint", "marker", "best", "end", "pages"} <= set(fell)


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # what is imported stays as it is, in every process
    {"random": kill_at_random, "every_file": kill_at_every_file}[sys.argv[1]](Path(sys.argv[2]))
