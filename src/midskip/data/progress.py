"""How far a long job is: a bar in a terminal, else a line now and then."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, track

_LINE_S, _BAR_S = 10.0, 0.1  # between updates

Item = TypeVar("Item")


def progress_bar(items: Sequence[Item], description: str, show: bool) -> Iterable[Item]:
    """Gives `items` one by one; if they are several and stderr is a terminal, with a bar until the end."""
    console = Console(stderr=True)
    disable = not (show and console.is_terminal and len(items) > 1)
    return track(items, description, console=console, transient=True, disable=disable)


class TokenBar:
    """Share done, tokens, tokens a second and time left of a job on tokens; a context manager.

    A bar in a terminal; elsewhere a line every ten seconds, and one at the end if there was one before.
    """

    def __init__(self, title: str, console: Console) -> None:
        self.title, self.console = escape(title), console
        self.num_tokens, self.share = 0, None
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[numbers]}"),
        )
        self._bar = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
        self._every_s = _BAR_S if console.is_terminal else _LINE_S

    def __enter__(self) -> TokenBar:
        self._bar.start()
        self._task = self._bar.add_task(self.title, total=None, numbers="")
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
            self.console.print(f"{self.title}: {numbers}{left}", highlight=False, soft_wrap=True)
