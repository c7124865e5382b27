"""Streams of few parts: to send one costs a server, and its client, about as much as a step of a small model does."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

import torch

SEND_S = 0.03  # between two parts of a stream, at least


class Grouped:
    """Hands new tokens on in groups: the first at once, then whenever `SEND_S` have passed.

    Args:
        streamer: takes tokens as int64 of shape [tokens], and turns them into text.
    """

    def __init__(self, streamer: Any):
        self.streamer, self.sent_s = streamer, -math.inf
        self.held: list[int] = []

    def put(self, token: int) -> None:
        self.held.append(token)
        if time.perf_counter() >= self.sent_s + SEND_S:
            self._send()

    def end(self) -> None:
        self._send()
        self.streamer.end()

    def _send(self) -> None:
        held, self.held, self.sent_s = self.held, [], time.perf_counter()
        if held:
            self.streamer.put(torch.tensor(held))


class Joined:
    """A queue of which texts that wait are taken as one; what is not plain text stays what it is.

    Args:
        queue: that of a streamer of transformers.
    """

    def __init__(self, queue: asyncio.Queue[Any]):
        self.queue, self.held = queue, []

    async def get(self) -> Any:
        return self.held.pop() if self.held else self._joined(await self.queue.get())

    def get_nowait(self) -> Any:
        """Raises asyncio.QueueEmpty if nothing waits."""
        return self.held.pop() if self.held else self._joined(self.queue.get_nowait())

    def _joined(self, item: Any) -> Any:
        while type(item) is str and not self.queue.empty():  # a tool call, a thought, an error and the end are no str
            more = self.queue.get_nowait()
            if type(more) is not str:
                self.held.append(more)
                break
            item += more
        return item
