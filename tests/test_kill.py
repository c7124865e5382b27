"""Each long command that is killed at once, wherever it is, and called again until it ends, ends bit for bit where an
undisturbed one does, also where the clock is set back meanwhile and files are as old as chance has it."""

import random
from pathlib import Path
from typing import Any

import pytest
from kill_commands import COMMANDS, Trials, assert_all_ended_alike, check_whole, quick
from killing import Program, die_after, mix_times, set_clock_back


def kill(name: str, folder: str, num_kills: int, seed: int) -> dict[str, Any]:
    """Makes trials, each killed up to five times, and then called until it ends. Gives what they took, and how many
    kills fell at a change of the folder and at a moment."""
    trials, moments = Trials(name, Path(folder)), random.Random(f"{name} {seed}")
    fell = {"change": 0, "moment": 0}
    while sum(fell.values()) < num_kills:
        where, more, left = trials.begin(), [], 1.0
        for _ in range(moments.randint(1, 5)):
            kind, clock, part = moments.choice(list(fell)), random.Random(moments.random()), left * moments.random()
            after_s, number = part * trials.whole.seconds, 1 + int(part * trials.whole.num_changes)
            left = min(1.0, left - part + 0.1)  # most of what ran is not run again

            def before(is_moment: bool = kind == "moment", after_s: float = after_s, clock: Any = clock) -> None:
                quick()
                set_clock_back(clock)
                if is_moment:
                    die_after(after_s)

            attempt = trials.attempt(where, more, before, die_at_change=number if kind == "change" else 0)
            if not attempt.was_killed:
                break
            fell[kind] += 1
            more = trials.command.more
            check_whole(trials.command, where)
            mix_times(where / "out", moments)
        else:
            trials.attempt(where, more)
    return trials.took() | fell


@pytest.mark.parametrize("num_kills", [5, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command_ends_like_one_that_was_not(
    name: str, num_kills: int, tmp_path: Path, killer: Program
) -> None:
    took = killer.call(Path(__file__).stem, "kill", name, str(tmp_path), num_kills, 0)
    print(name, took)
    assert_all_ended_alike(tmp_path, took["num_trials"])
