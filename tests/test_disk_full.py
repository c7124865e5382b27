"""Each long command whose disk is full from some moment on says so in one line, and the same command afterwards ends
bit for bit where an undisturbed one does. (`test_broken_off.py` has `prepare`, at each change of its folder.)"""

import errno
import io
import json
import os
import random
import re
import resource
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
from kill_commands import Trials, assert_all_ended_alike, check_whole, quick
from killing import Attempt, Program, Say, changed_path

from midskip.cli import main

LIGHT, HEAVY = ("prepare", "train", "calibrate"), ("retrofit", "sweep")


def full_from(folder: Path, number: int) -> None:
    """From the change of the folder of that number on, counted from 1, the disk has no room; things can be removed."""
    num_changes = 0

    def look(event: str, args: tuple[Any, ...]) -> None:
        nonlocal num_changes
        path = changed_path(event, args)
        if path is not None and path.startswith(str(folder)):
            num_changes += 1
            if num_changes >= number and event in ("open", "os.mkdir", "os.symlink"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    sys.addaudithook(look)


def no_file_above(num_bytes: int) -> None:
    """Files are cut there, whoever writes them: what a full disk does to libraries that are not Python's."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def break_off(name: str, folder: str, num_faults: int, seed: int) -> dict[str, Any]:
    """Makes trials, each with a full disk up to three times, and then called until it ends. Gives what they took, and
    the distinct ends of the calls: their statuses, and what they said of errors."""
    trials, moments = Trials(name, Path(folder)), random.Random(f"{name} {seed}")
    sizes = [path.stat().st_size for path in (Path(folder) / "whole" / "out").rglob("*") if path.is_file()]
    ends: list[tuple[int, str]] = []
    while len(ends) < num_faults:
        where, more = trials.begin(), []
        for _ in range(moments.randint(1, 3)):
            fault: Callable[[], None]
            if moments.random() < 0.5:
                number = moments.randint(1, trials.whole.num_changes)
                fault = lambda where=where, number=number: full_from(where, number)  # noqa: E731
            else:
                size = moments.choice(sizes) - 1
                fault = lambda size=size: no_file_above(max(size, 0))  # noqa: E731

            def work(say: Say, more: Any = more, fault: Any = fault) -> None:
                quick()
                with redirect_stderr(io.StringIO()) as said:
                    try:
                        fault()
                        status = main([*trials.command.first, *more])
                    except BaseException:
                        status = 1
                        traceback.print_exc()
                told = said.getvalue().splitlines()
                errors = [line for line in told if line.startswith("midskip: error") or "Traceback" in line]
                say(json.dumps([status, errors]))

            status, errors = json.loads(Attempt(where, work).phases[-1][1])
            if status == 0:
                break
            ends.append((status, " | ".join(errors)))
            more = trials.command.more
            check_whole(trials.command, where)
        else:
            trials.attempt(where, more)
    return trials.took() | {"ends": sorted(set(ends))}


@pytest.mark.parametrize(
    "name, num_faults",
    [*((name, 3) for name in LIGHT), *(pytest.param(name, 40, marks=pytest.mark.slow) for name in LIGHT + HEAVY)],
)
@pytest.mark.integration
def test_a_full_disk_is_told_and_the_same_command_goes_on(
    name: str, num_faults: int, tmp_path: Path, killer: Program
) -> None:
    took = killer.call(Path(__file__).stem, "break_off", name, str(tmp_path), num_faults, 0)
    print(name, took)
    for status, said in took["ends"]:
        assert status in (1, 2) and said.startswith("midskip: error: ") and " | " not in said, said
        assert re.search(
            r"(No space left on device|File too large): '.*out|'out' \((No space|File too)|make room", said
        ), said
    assert_all_ended_alike(tmp_path, took["num_trials"])
