"""Commands that are killed at once, wherever they are: what tests of that share.

This file as a program imports everything once, and forks a process for each attempt, so that an attempt takes no longer
than what it does. It is told on its standard input which function to call.
"""

import gc
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink")
DAY_S = 86_400.0
Say = Callable[[str], None]


def changed_path(event: str, args: tuple[Any, ...]) -> str | None:
    """The path that an audited event is about to change, None if it changes nothing."""
    if event not in CHANGES:
        return None
    path = os.path.abspath(args[1] if event == "os.symlink" else args[0]) if isinstance(args[0], str | Path) else ""
    if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
        return None
    return None if event == "os.mkdir" and os.path.isdir(path) else path


def count_changes(folder: Path, die_at: int) -> Callable[[], int]:
    """Have this process killed when it changes the folder for that time, 0 for never, a file that it would write being
    half written; gives how many changes there were."""
    num_changes = 0

    def look(event: str, args: tuple[Any, ...]) -> None:
        nonlocal num_changes
        path = changed_path(event, args)
        if path is None or not path.startswith(str(folder)):
            return
        num_changes += 1
        if num_changes == die_at:
            if event == "open":
                os.write(os.open(path, args[2], 0o600), b'{"half')
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)
    return lambda: num_changes


def die_after(seconds: float) -> None:
    """Have this process killed then: by an alarm that nobody handles, which the system answers as it does kill -9."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))


def set_clock_back(moments: random.Random) -> None:
    """The clock stands a day and more before what it was, and goes back by another day while this process runs."""
    real, jump_s = time.time, time.perf_counter() + moments.random()
    back_s = DAY_S * moments.randint(1, 9)
    time.time = lambda: real() - back_s - DAY_S * (time.perf_counter() > jump_s)


def mix_times(folder: Path, moments: random.Random) -> None:
    """Files are as old as chance has it, some from the future, as after a clock that was set back."""
    for path in folder.rglob("*"):
        moment_s = time.time() + moments.uniform(-DAY_S, DAY_S)
        os.utime(path, (moment_s, moment_s), follow_symlinks=False)


class Attempt:
    """A process that does some work, to its end or to where it is killed. Its working directory is `folder`.

    Args:
        work: what it does; it is given a function that says where it is. Any status but 0 is an error.
        die_at_change: of what is in the folder, counted from 1.
        before: called first in that process.

    Attributes:
        was_killed, seconds, cpu_s
        num_changes: of what is in the folder; 0 if it was killed.
        phases: moment in seconds, and what was said.
    """

    def __init__(
        self, folder: Path, work: Callable[[Say], int | None], die_at_change: int = 0,
        before: Callable[[], None] = lambda: None,
    ):  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        log = folder.with_name(f"{folder.name}.log")
        output, pipe = os.pipe()
        started_s = time.perf_counter()
        self.process = os.fork()
        if not self.process:
            os.close(output)
            self._child(folder, work, die_at_change, before, pipe, log)
        os.close(pipe)
        with open(output) as lines:  # until the process ends
            self.phases = [(float(moment_s), name) for moment_s, name in (line.strip().split(" ", 1) for line in lines)]
        _, status, used = os.wait4(self.process, 0)
        self.cpu_s = used.ru_utime + used.ru_stime
        self.seconds, self.num_changes = time.perf_counter() - started_s, 0
        if self.phases and self.phases[-1][1].startswith("changes "):
            self.num_changes = int(self.phases.pop()[1].removeprefix("changes "))
        self.was_killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGALRM)
        if status and not self.was_killed:
            raise RuntimeError(f"an attempt failed with status {status}, after {self.phases}:\n{log.read_text()}")

    @staticmethod
    def _child(
        folder: Path, work: Callable[[Say], int | None], die_at_change: int, before: Callable[[], None], pipe: int,
        log: Path,
    ) -> None:  # fmt: skip
        status = 1

        def say(phase: str) -> None:
            os.write(pipe, f"{time.perf_counter()} {phase}\n".encode())

        try:
            with log.open("w") as said:
                for stream in (1, 2):
                    os.dup2(said.fileno(), stream)
            os.chdir(folder)
            num_changes = count_changes(folder, die_at_change)
            before()
            status = work(say) or 0
            say(f"changes {num_changes()}")
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(status)


class Program:
    """This file as a process. `call` has it call a function of a module of tests, with JSON for arguments."""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        environment["CUDA_VISIBLE_DEVICES"] = ""
        self.process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def call(self, module: str, function: str, *arguments: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([module, function, *arguments]) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def end(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        assert self.process.wait(60) == 0


def serve() -> None:
    for line in sys.stdin:
        module, function, *arguments = json.loads(line)
        try:
            answer = {"result": getattr(importlib.import_module(module), function)(*arguments)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    import torch

    import midskip
    import midskip.bench
    import midskip.retrofit
    import midskip.sweep.run
    import midskip.train.run  # noqa: F401

    torch.set_num_threads(1)
    gc.freeze()  # what is imported stays as it is, in every process
    serve()
