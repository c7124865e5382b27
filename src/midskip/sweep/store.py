"""The folder of a sweep: results, failures, and who runs what.

sweep.json          the index, see `Sweep.index`
results/KEY.json    a run that has ended; written last
failed/KEY.txt      why a run failed; KEY.log beside it has the traceback
runs/KEY/           its run folder
locks/KEY.lock      held by the process that runs it, and by none after its death
running/KEY         there while it runs
text/               what several runs share: text that was prepared
"""

from __future__ import annotations

import json
import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from midskip.runs import RECIPE_FILE, REPORT_FILE, to_json, write_atomically
from midskip.sweep.plan import Run, Sweep, user_code
from midskip.train.checkpoints import HISTORY_FILE

KEPT = (REPORT_FILE, RECIPE_FILE, HISTORY_FILE)  # of the folder of a run that has ended
DIVERGED = "FloatingPointError"
FOLDERS = ("results", "failed", "runs", "locks", "running", "text")


class Store:
    """That folder. What others write there is seen; a result, once seen, stays."""

    def __init__(self, output: Path):
        self.output = output
        self._results: dict[str, dict[str, Any]] = {}

    def path(self, kind: str, key: str) -> Path:
        """Of the file or folder `kind` of a run."""
        endings = {"results": ".json", "failed": ".txt", "locks": ".lock"}
        return self.output / kind / (key + endings.get(kind, ""))

    def make(self) -> None:
        for name in FOLDERS:
            (self.output / name).mkdir(parents=True, exist_ok=True)

    @contextmanager
    def claimed(self, key: str) -> Iterator[bool]:
        """Whether the run is now this process's alone; it is released at the end, or by the process's death."""
        lock = FileLock(self.path("locks", key), timeout=0)
        try:
            lock.acquire()
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Waits until no other process is in here."""
        with FileLock(self.output / "locks" / f"{name}.lock"):
            yield

    def result(self, key: str) -> dict[str, Any] | None:
        """What a run gave, if it has ended."""
        if key not in self._results:
            path = self.path("results", key)
            try:
                result = json.loads(path.read_text(encoding="utf-8"))
                _ = float(result["report"]["validation"]["loss"]), float(result["seconds"])
            except FileNotFoundError:
                return None
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{str(path)!r} is no result of a run ({error!r}): remove it") from error
            self._results[key] = result
        return self._results[key]

    def user_code_changed(self, run: Run) -> bool:
        """Whether it has ended, and a file of a class of the user's own has changed since."""
        before = (self.result(run.key) or {}).get("user_code", {})  # early results do not say
        now = user_code(run.recipe)
        return any(before[module] != now[module] for module in before.keys() & now.keys())

    def loss(self, key: str) -> float | None:
        result = self.result(key)
        return None if result is None else float(result["report"]["validation"]["loss"])

    def failure(self, key: str) -> str | None:
        """Why a run failed, as `KIND: what was wrong`."""
        try:
            return self.path("failed", key).read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return None

    def losses(self, sweep: Sweep) -> dict[str, float | None]:
        """Of the trials that have ended, for `Sweep.runs`: None for one that diverged. One that failed otherwise has
        not ended."""
        found: dict[str, float | None] = {}
        for key in {trial.key for point in sweep.points for trial in point.trials()}:
            if (loss := self.loss(key)) is not None:
                found[key] = loss
            elif (self.failure(key) or "").startswith(DIVERGED):
                found[key] = None
        return found

    def write_result(self, key: str, result: dict[str, Any]) -> None:
        write_atomically(self.path("results", key), to_json(result) + "\n")

    def write_failure(self, key: str, error: Exception) -> None:
        path = self.path("failed", key)
        write_atomically(path.with_suffix(".log"), "".join(traceback.format_exception(error)))
        write_atomically(path, f"{type(error).__name__}: {error}\n")

    def write_index(self, sweep: Sweep) -> None:
        with self.alone("sweep"):
            write_atomically(self.output / "sweep.json", to_json(sweep.index(self.losses(sweep))) + "\n")

    def running(self) -> set[str]:
        """Keys of what runs."""
        return {path.name for path in self.path("running", "").iterdir()}

    def tidy(self, keep_runs: bool) -> None:
        """Remove what processes that were killed have left: their notes, and weights of runs that have ended."""
        left = self.running() | ({path.name for path in self.path("runs", "").iterdir()} if not keep_runs else set())
        for key in left:
            with self.claimed(key) as is_ours:
                if not is_ours:
                    continue
                self.path("running", key).unlink(missing_ok=True)
                if not keep_runs and self.path("results", key).is_file():
                    strip(self.path("runs", key))

    def forget_failures(self, sweep: Sweep) -> None:
        """They are tried again, but for learning rates that diverged: these are known, and points wait for them."""
        trials = {trial.key for point in sweep.points for trial in point.trials()}
        for run in sweep.runs(self.losses(sweep)):
            if run.key in trials and (self.failure(run.key) or "").startswith(DIVERGED):
                continue
            with self.claimed(run.key) as is_ours:  # else another process is at it
                if is_ours:
                    for path in (why := self.path("failed", run.key)), why.with_suffix(".log"):
                        path.unlink(missing_ok=True)


def strip(folder: Path) -> None:
    """Leave of a run's folder what is small."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name in KEPT:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
