"""How far a long job is: a bar in a terminal, else a line now and then."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, track

from midskip.report import print_line

LINE_S, _BAR_S = 10.0, 0.1  # between updates
_said_s = [time.perf_counter()]  # when the last line was said

Item = TypeVar("Item")


def say(console: Console, text: str) -> None:
    """A line about a job."""
    begin_silence()
    print_line(console, text)


def begin_silence() -> None:
    """The next line is due ten seconds from now."""
    _said_s[0] = time.perf_counter()


def is_silent() -> bool:
    """Whether no job of the process has said anything for so long that a line is due."""
    return time.perf_counter() - _said_s[0] >= LINE_S


def progress_bar(items: Sequence[Item], description: str, show: bool, console: Console | None = None) -> Iterable[Item]:
    """Gives `items` one by one. If they are several, with a bar until the end where the console (by default stderr) is
    a terminal, and elsewhere with a line where nothing else was said for ten seconds."""
    console = console or Console(stderr=True)
    if show and len(items) > 1 and not console.is_terminal:
        return _with_lines(items, description, console)
    disable = not (show and len(items) > 1)
    return track(items, description, console=console, transient=True, disable=disable)


def _with_lines(items: Sequence[Item], description: str, console: Console) -> Iterator[Item]:
    started_s = time.perf_counter()
    for number, item in enumerate(items, 1):
        yield item
        if is_silent() and time.perf_counter() - started_s >= LINE_S / 10:
            say(console, f"{description}: {number} of {len(items)}")


class TokenBar:
    """Share done, tokens, tokens a second and time left of a job on tokens; a context manager.

    A bar in a terminal; elsewhere a line every ten seconds, and one at the end if there was one before.
    """

    def __init__(self, title: str, console: Console) -> None:
        self.title, self.console = title, console
        self.num_tokens, self.share = 0, None
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[numbers]}"),
        )
        self._bar = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
        self._every_s = _BAR_S if console.is_terminal else LINE_S

    def __enter__(self) -> TokenBar:
        self._bar.start()
        self._task = self._bar.add_task(escape(self.title), total=None, numbers="")
        self._started_s = self._shown_s = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None and (self.console.is_terminal or self._shown_s > self._started_s):
            self._show(time.perf_counter())
        self._bar.stop()

    def update(self, num_tokens: int, share: float | None) -> None:
        """`num_tokens` more are done, and with them a `share` in [0, 1] of the whole, None if that is not known."""
        self.num_tokens, self.share = self.num_tokens + num_tokens, share
        now_s = time.perf_counter()
        if now_s - self._shown_s >= self._every_s:
            self._show(now_s)

    def _show(self, now_s: float) -> None:
        self._shown_s = now_s
        seconds = max(now_s - self._started_s, 1e-9)
        numbers = f"{self.num_tokens:,} tokens, {self.num_tokens / seconds:,.0f}/s"
        if self.share is not None:
            numbers = f"{self.share:.0%}, {numbers}"
            self._bar.update(self._task, total=1.0, completed=self.share)
        self._bar.update(self._task, numbers=numbers)
        if not self.console.is_terminal:
            left = f", {seconds * (1 / self.share - 1):.0f} s left" if self.share else ""
            say(self.console, f"{self.title}: {numbers}{left}")


def note(text: str, console: Console) -> None:
    """A line that a user should know, if there is any text."""
    if text:
        say(console, f"midskip: {text}")
