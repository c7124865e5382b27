"""A run that is killed in any phase, and resumed until it ends, ends bit for bit where a quiet one does."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from killing import Attempt, Program, Say, die_after
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


# ---- what is called in the program


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


def die_in_phase(phase: str, number: int, after_s: float) -> Callable[[str], None]:
    """Have this process killed so long after that phase begins for that time; to be told of each that begins."""
    num_begun = 0

    def begun(name: str) -> None:
        nonlocal num_begun
        num_begun += name == phase
        if num_begun == number:
            die_after(after_s)

    return begun


def go_on(recipe: Recipe, die_at_change: int = 0, die_in: tuple[str, int, float] | None = None) -> Attempt:
    """An attempt of the run, to its end or to where it is killed."""

    def work(say: Say) -> None:
        begun = die_in_phase(*die_in) if die_in else lambda phase: None

        def both(phase: str) -> None:
            say(phase)
            begun(phase)

        both("begin")
        announce(both)
        run.write_picture = lambda path, *args: Path(path).write_bytes(b"slow to draw")
        train(recipe, resume=True)

    return Attempt(Path(recipe.output), work, die_at_change)


def durations(phases: list[tuple[float, str]]) -> dict[str, float]:
    """Mean seconds of each phase."""
    found: dict[str, list[float]] = {}
    for (begin_s, name), (end_s, _) in pairwise(phases):
        found.setdefault(name, []).append(end_s - begin_s)
    return {name: sum(seconds) / len(seconds) for name, seconds in found.items()}


def killed_in(recipe: Recipe, aim: str, typical_s: dict[str, float], moments: random.Random) -> str | None:
    """Go on with the run, and kill it there, at a random moment; the phase it was in, None if it ended before."""
    number, share = moments.randint(1, 3 if aim in AGAIN else 1), moments.random()
    attempt = go_on(recipe, die_in=(aim, number, share * typical_s[aim]))
    return attempt.phases[-1][1] if attempt.was_killed else None


def kill_at_every_file(place: str) -> list[list[str]]:
    """Makes `whole/run`, `killed-0/run`, ...; for each of these, the phase it was killed in."""
    folder = Path(place)

    def recipe(name: str) -> Recipe:
        made = recipe_of(folder / name / "run")
        return replace(made, training=replace(made.training, max_steps=2, eval_steps=1, save_total_limit=1))

    go_on(recipe("whole"))
    kills = []
    while (broken := go_on(recipe(f"killed-{len(kills)}"), die_at_change=len(kills) + 1)).was_killed:
        kills.append([broken.phases[-1][1]])
        go_on(recipe(f"killed-{len(kills) - 1}"))
    return kills


def kill_at_random(place: str) -> list[list[str]]:
    """Makes `whole/run`, `killed-0/run`, ...; for each of these, the phases it was killed in."""
    folder = Path(place)
    random_moments = random.Random(0)
    typical_s = durations(go_on(recipe_of(folder / "whole" / "run")).phases)
    kills: list[list[str]] = []
    aims = iter(PHASES)
    for aim in aims:
        recipe = recipe_of(folder / f"killed-{len(kills)}" / "run")
        kills.append([])
        while aim and (phase := killed_in(recipe, aim, typical_s, random_moments)):
            kills[-1].append(phase)
            aim = next(aims, None)
        go_on(recipe)  # which does nothing where the run has ended
    return kills


# ---- the tests


def kills_of(killer: Program, function: str, folder: Path) -> list[list[str]]:
    """Call the function, and compare each run it killed with the quiet one; the phases that each was killed in."""
    kills = killer.call(Path(__file__).stem, function, str(folder))
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


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_like_one_that_was_not(tmp_path: Path, killer: Program) -> None:
    fell = Counter(phase for phases in kills_of(killer, "kill_at_random", tmp_path) for phase in phases)
    print("the kills fell in", dict(fell))
    assert fell.total() >= len(PHASES) - 2
    assert fell["checkpoint"] + fell["marker"] >= 1 and len(fell) >= 4, "else the test tests little"


@pytest.mark.slow
def test_a_run_killed_at_any_file_ends_like_one_that_was_not(tmp_path: Path, killer: Program) -> None:
    fell = Counter(phase for phases in kills_of(killer, "kill_at_every_file", tmp_path) for phase in phases)
    print("the kills fell in", dict(fell))
    assert {"begin", "text", "steps", "checkpoint", "marker", "best", "end", "pages"} <= set(fell)
