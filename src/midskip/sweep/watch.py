"""A sweep while it runs: a table in a terminal, else a line for each run that ends."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from midskip.report import print_line, visible
from midskip.sweep.plan import Run, Sweep
from midskip.sweep.store import Store

POLL_S = 0.5


@dataclass
class Progress:
    """How far a sweep is. Counts are of runs."""

    total: int
    done: int
    failed: int
    running: int
    seconds_left: float | None

    def words(self) -> str:
        found = [f"{self.done} of {self.total} runs done"]
        found += [f"{count} {name}" for name, count in (("running", self.running), ("failed", self.failed)) if count]
        if self.seconds_left is not None:
            found.append(f"about {time_of(self.seconds_left)} left")
        return ", ".join(found)


def progress(sweep: Sweep, store: Store) -> Progress:
    """How far it is, and the time left if every run takes as long as those of its point did so far, or as all did."""
    losses, running = store.losses(sweep), store.running()
    seconds: dict[str, float] = {}
    known: dict[str, Run] = {}
    unknown, later_s = 0, 0.0
    of_points = [point.own_runs(losses) for point in sweep.points]
    for runs in of_points:
        known |= runs
        seconds |= {key: result["seconds"] for key in runs if (result := store.result(key))}
    failed = {key for key in known if key not in seconds and store.failure(key) is not None}
    mean_s = statistics.fmean(seconds.values()) if seconds else None
    counted: set[str] = set()
    for point, runs in zip(sweep.points, of_points, strict=True):
        rest = max(0, point.num_runs() - len(runs))
        unknown += rest
        own = [seconds[key] for key in runs if key in seconds]
        todo = [key for key in runs if key not in seconds and key not in failed and key not in counted]
        counted.update(todo)
        if mean_s is not None:
            later_s += (statistics.fmean(own) if own else mean_s) * (len(todo) + rest)
    total = len(known) + unknown
    left = (
        None if mean_s is None or len(seconds) + len(failed) == total else later_s / max(1, len(running & set(known)))
    )
    return Progress(total, len(seconds), len(failed), len(running & set(known) - set(seconds)), left)


def table(sweep: Sweep, store: Store) -> RenderableType:
    """A row a point of the grid."""
    losses, running = store.losses(sweep), store.running()
    shown = Table(title=f"sweep {sweep.path}", title_justify="left")
    for name in ("arm", "grid point"):
        shown.add_column(name, overflow="fold")
    for name in ("done", "running", "failed", "learning rate", "loss"):
        shown.add_column(name, justify="right")
    for point in sweep.points:
        runs = point.own_runs(losses)
        done = [key for key in runs if store.result(key)]
        failed = sum(key not in done and store.failure(key) is not None for key in runs)
        ends = [loss for run in point.of_seeds(losses).values() if (loss := store.loss(run.key)) is not None]
        rate = point.learning_rate(losses)
        cells = (
            point.arm,
            point.label.removeprefix(point.arm).strip(),
            f"{len(done)}/{point.num_runs()}",
            str(len(running & runs.keys() - set(done)) or ""),
            str(failed or ""),
            "tuning" if rate is None else f"{rate:g}",
            f"{statistics.fmean(ends):.4f}" if ends else "",
        )
        shown.add_row(*(Text(visible(cell)) for cell in cells))
    return Group(shown, Text(progress(sweep, store).words()))


@contextmanager
def watched(sweep: Sweep, console: Console) -> Iterator[None]:
    """Shows what others do while this block runs, and the table at its end."""
    store = Store(sweep.output)  # of this thread alone
    if console.is_terminal:
        with Live(get_renderable=lambda: table(sweep, store), console=console, refresh_per_second=1):
            yield
        return
    lines, ended = _Lines(sweep, store, console), threading.Event()

    def look() -> None:
        while not ended.wait(POLL_S):
            lines.tell()

    thread = threading.Thread(target=look, daemon=True)
    console.print(progress(sweep, store).words(), highlight=False)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    lines.tell()
    console.print(table(sweep, store))


class _Lines:
    """A line for each run that has ended or failed since the line before."""

    def __init__(self, sweep: Sweep, store: Store, console: Console):
        self.sweep, self.store, self.console = sweep, store, console
        self.told = {run.key for run in self._runs() if store.result(run.key)}

    def _runs(self) -> list[Run]:
        return self.sweep.runs(self.store.losses(self.sweep))

    def tell(self) -> None:
        for run in self._runs():
            if run.key in self.told:
                continue
            if (result := self.store.result(run.key)) is not None:
                what = f"loss {result['report']['validation']['loss']:.4f}, {time_of(result['seconds'])}"
            elif (failure := self.store.failure(run.key)) is not None:
                what = f"failed: {failure}"
            else:
                continue
            self.told.add(run.key)
            line = f"{run.label}: {what} ({progress(self.sweep, self.store).words()})"
            print_line(self.console, line)


def time_of(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
