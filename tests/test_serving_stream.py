"""What a stream is made of: parts that are few, in order and whole. (It needs none of the packages of serving.)"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from midskip.serving import stream


def test_tokens_that_come_closely_are_handed_on_together(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[int]] = []

    class Streamer:
        def put(self, value: torch.Tensor) -> None:
            given.append(value.flatten().tolist())

        def end(self) -> None:
            given.append([])

    now_s = iter([0, 0, 0.01, 0.015, 0.03, 0.03, 0.04, 0.045, 9])
    monkeypatch.setattr(stream.time, "perf_counter", lambda: next(now_s))
    grouped = stream.Grouped(Streamer())
    for token in range(6):
        grouped.put(token)
    grouped.end()
    assert given == [[0], [1, 2, 3], [4, 5], []]


def test_texts_that_wait_are_one() -> None:
    class Thought(str):
        pass

    async def taken() -> list[Any]:
        queue: asyncio.Queue[Any] = asyncio.Queue()
        joined, found = stream.Joined(queue), []
        for item in ("a", "b", Thought("c"), "d", None):
            queue.put_nowait(item)
        for _ in range(2):
            found.append(await joined.get())
        while found[-1] is not None:
            found.append(joined.get_nowait())
        with pytest.raises(asyncio.QueueEmpty):
            joined.get_nowait()
        return found

    found = asyncio.run(taken())
    assert found == ["ab", "c", "d", None] and type(found[1]) is Thought
