"""A run that is killed with -9, wherever it is, and resumed until it ends, ends bit for bit where a quiet one does.

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

NUM_KILLS = 20
KILLS_OF_A_RUN = 7  # then it may end
AGAIN = ("steps", "checkpoint", "marker", "evaluation")  # phases of which a run has many
# where a run can be, as often as a kill is aimed there; it falls at a random moment from then on
PHASES = ["begin", "text", *["steps"] * 3, *["checkpoint"] * 4, "marker", "evaluation", *["best"] * 2, "end", "pages"]


def recipe_of(folder: Path) -> Recipe:
    """Two and a half epochs, a checkpoint every step, a growing regularizer that moves the model's bias."""
    return tiny_recipe(
        write_documents(folder.parent.parent / "text", 50), folder, "target_share",
        {"target_share": 0.4, "ramp_steps": 8}, model={"policy_settings": {"start": "spread"}},
        data={"vocab_size": 300, "length": 64, "validation_share": 0.2},
        steps=10, batch_size=4, save_steps=1, eval_steps=3, logging_steps=2,
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

    phase(run, "open_text", "text")
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


class Attempt:
    """A process that goes on with a run, and where it is."""

    def __init__(self, recipe: Recipe, die_at: int = 0):
        self.output, pipe = os.pipe()
        self.process = os.fork()
        if not self.process:
            os.close(self.output)
            if die_at:
                die_at_file(Path(recipe.output), die_at)
            self._work(recipe, lambda phase: os.write(pipe, f"{phase}\n".encode()))
        os.close(pipe)
        self.phases: list[tuple[float, str]] = [(time.perf_counter(), "begin")]
        self._read = b""

    @staticmethod
    def _work(recipe: Recipe, say: Callable[[str], Any]) -> None:
        status = 1
        try:
            announce(say)
            train(recipe, resume=True)
            status = 0
        except BaseException:
            traceback.print_exc()
        os._exit(status)

    def follow(self, enough: Callable[[], bool] = lambda: False) -> bool:
        """Wait until that many phases have begun; False if the process ended before."""
        while not enough():
            part = os.read(self.output, 4096)
            if not part:
                return False
            *names, self._read = (self._read + part).split(b"\n")
            self.phases += [(time.perf_counter(), name.decode()) for name in names]
        return True

    def end(self, kill: bool = False) -> bool:
        """Whether it was killed, rather than at its own end; RuntimeError if it failed."""
        if kill:
            os.kill(self.process, signal.SIGKILL)
        self.follow()
        os.close(self.output)
        status = os.waitpid(self.process, 0)[1]
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            return True
        if status:
            raise RuntimeError(f"an attempt failed with status {status}, after {self.phases}")
        return False


def durations(phases: list[tuple[float, str]]) -> dict[str, float]:
    """Mean seconds of each phase."""
    found: dict[str, list[float]] = {}
    for (begin_s, name), (end_s, _) in pairwise(phases):
        found.setdefault(name, []).append(end_s - begin_s)
    return {name: sum(seconds) / len(seconds) for name, seconds in found.items()}


def killed_in(recipe: Recipe, typical_s: dict[str, float], moments: random.Random) -> str | None:
    """Go on with the run, and kill it at a random moment; the phase it was in, None if it ended before."""
    aim = moments.choice(PHASES)
    number, share = moments.randint(1, 3 if aim in AGAIN else 1), moments.random()
    attempt = Attempt(recipe)
    if attempt.follow(lambda: [name for _, name in attempt.phases].count(aim) >= number):
        time.sleep(share * typical_s[aim])
    return attempt.phases[-1][1] if attempt.end(kill=True) else None


def kill_at_every_file(folder: Path) -> None:
    """Writes `whole/run`, `killed-0/run`, ..., and `kills.json`: for each of these, the phase it was killed in."""
    run.write_picture = lambda path, *args: Path(path).write_bytes(b"slow to draw")

    def recipe(name: str) -> Recipe:
        made = recipe_of(folder / name / "run")
        return replace(made, training=replace(made.training, steps=2, eval_steps=1, save_total_limit=1))

    Attempt(recipe("whole")).end()
    kills = []
    while True:
        broken = Attempt(recipe(f"killed-{len(kills)}"), die_at=len(kills) + 1)
        if not broken.end():
            break
        kills.append([broken.phases[-1][1]])
        Attempt(recipe(f"killed-{len(kills) - 1}")).end()
    (folder / "kills.json").write_text(json.dumps(kills))


def kill_at_random(folder: Path) -> None:
    """Writes `whole/run`, `killed-0/run`, ..., and `kills.json`: for each of these, the phases it was killed in."""
    random_moments = random.Random(0)
    whole = Attempt(recipe_of(folder / "whole" / "run"))
    whole.end()
    typical_s = durations(whole.phases)
    kills: list[list[str]] = []
    while sum(map(len, kills)) < NUM_KILLS:
        recipe = recipe_of(folder / f"killed-{len(kills)}" / "run")
        kills.append([])
        for _ in range(min(KILLS_OF_A_RUN, NUM_KILLS - sum(map(len, kills)))):
            phase = killed_in(recipe, typical_s, random_moments)
            if phase is None:
                break
            kills[-1].append(phase)
        else:
            Attempt(recipe).end()
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
    assert fell.total() == NUM_KILLS
    assert fell["checkpoint"] + fell["marker"] >= 4 and len(fell) >= 4, "else the test tests little"


@pytest.mark.slow
def test_a_run_killed_at_any_file_ends_like_one_that_was_not(tmp_path: Path) -> None:
    fell = Counter(phase for phases in kills_of("every_file", tmp_path) for phase in phases)
    print("the kills fell in", dict(fell))
    assert {"begin", "text", "steps", "checkpoint", "marker", "best", "end", "pages"} <= set(fell)


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # what is imported stays as it is, in every process
    {"random": kill_at_random, "every_file": kill_at_every_file}[sys.argv[1]](Path(sys.argv[2]))
