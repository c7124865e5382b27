"""Two replicas under Ray Serve: of which one is killed under load, and under more load than they take; nothing is lost
in silence."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
pytest.importorskip("ray")
openai: Any = pytest.importorskip("openai")

import psutil  # noqa: E402
from tiny_server import write_served  # noqa: E402

NUM_CLIENTS, ANSWERS_EACH = 8, 6


def replicas(server: psutil.Process) -> set[int]:
    """Processes that serve, by their names."""
    found = set()
    for process in server.children(recursive=True):
        try:
            if "ServeReplica" in " ".join(process.cmdline()):
                found.add(process.pid)
        except psutil.Error:
            continue
    return found


@contextmanager
def two_replicas(folder: Path, *options: str) -> Iterator[tuple[str, psutil.Process]]:
    """Their address, and the process that started them."""
    command = [sys.executable, "-m", "midskip", "serve", str(folder), "--name", "tiny", "--port", "8971", *options]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    with subprocess.Popen([*command, "--replicas", "2"], stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            lines = iter(process.stdout.readline, "")
            line = next((line for line in lines if line.startswith("serving")), "it has not started")
            assert "2 replicas" in line, line
            yield line.split()[3].rstrip(","), psutil.Process(process.pid)
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=120)
        finally:
            process.kill()


@pytest.fixture
def folder(saved_model: Path, tmp_path: Path) -> Path:
    return write_served(saved_model, tmp_path / "model", max_position_embeddings=2000)


def test_a_replica_is_killed_under_load(folder: Path) -> None:
    with two_replicas(folder) as (url, server):
        under_load(url, server)


def test_too_many_requests_are_told_to_come_again(folder: Path) -> None:
    with two_replicas(folder, "--max_requests", "2") as (url, _):
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)

        def ask(number: int) -> str:
            try:
                client.completions.create(model="tiny", prompt="the cat", max_tokens=400)
            except openai.APIStatusError as error:
                return f"{error.status_code} {error.code}"
            return "whole"

        with ThreadPoolExecutor(24) as pool:
            seen = Counter(pool.map(ask, range(24)))
        client.close()
    print(dict(seen))
    assert set(seen) == {"whole", "503 overloaded"} and seen["whole"] >= 2


def under_load(url: str, server: psutil.Process) -> None:
    before = replicas(server)
    assert len(before) == 2
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)
    seen: Counter[str] = Counter()

    def ask(number: int) -> None:
        """Whole answers, half of them streamed; after an error, which is counted, the same again."""
        is_streamed, left, budget = number % 2 == 1, ANSWERS_EACH, [0.25, 1.0][number // 2 % 2]
        while left:
            more: Any = {"model": "tiny", "prompt": "the cat", "max_tokens": 100, "extra_body": {"budget": budget}}
            try:
                answer = client.completions.create(**more, stream=is_streamed)
                last = list(answer)[-1] if is_streamed else answer
            except openai.APIStatusError as error:
                assert error.status_code >= 500, error
                seen["told"] += 1
            except openai.APIConnectionError:
                seen["cut"] += 1
            else:
                usage = last.usage
                assert usage.completion_tokens == 100, "an answer that ends without an error is whole"
                assert (usage.executed_share == 1) == (budget == 1), "under its own budget"
                seen["whole"] += 1
                left -= 1
                continue
            assert seen["told"] + seen["cut"] < 200
            time.sleep(0.2)

    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        clients = [pool.submit(ask, number) for number in range(NUM_CLIENTS)]
        while seen["whole"] < NUM_CLIENTS:
            assert not any(client.done() and client.exception() for client in clients)
            time.sleep(0.02)
        killed = min(before)
        os.kill(killed, signal.SIGKILL)
        for running in clients:
            running.result(timeout=300)
    client.close()
    print(f"{dict(seen)} after {killed} was killed")
    assert seen["whole"] == NUM_CLIENTS * ANSWERS_EACH
    assert seen["told"] + seen["cut"] >= 1, "nothing ran in the replica that was killed, so this has shown nothing"
    deadline = time.monotonic() + 120
    while len(now := replicas(server) - {killed}) < 2:
        assert time.monotonic() < deadline, f"no replica has taken the place of the one that was killed: {now}"
        time.sleep(1)
