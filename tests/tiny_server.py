"""A server of a tiny model in a thread of this process: real sockets, and the model at hand."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai  # pyright: ignore[reportMissingImports]
import uvicorn  # pyright: ignore[reportMissingImports]
from tiny_curve import CURVE
from transformers import AutoTokenizer

from midskip import MidskipForCausalLM
from midskip.serving.app import build_app
from midskip.serving.served import Served, load_served
from midskip.serving.settings import ServeSettings

TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


def write_served(source: Path, folder: Path, template: str | None = TEMPLATE, **config: Any) -> Path:
    """The model in `source`, calibrated by `CURVE` and with a chat template."""
    model, tokenizer = MidskipForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    for name, value in ({"calibration": CURVE} | config).items():
        setattr(model.config, name, value)
    model.generation_config.eos_token_id = None  # answers are as long as asked for
    tokenizer.chat_template = template
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Running:
    """A server that runs, and the official client of it."""

    def __init__(self, served: Served, port: int):
        self.served, self.port, self.url = served, port, f"http://127.0.0.1:{port}/v1"
        self.client = openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=60)

    @contextmanager
    def passes(self) -> Iterator[list[int]]:
        """How many tokens each pass of the model read in the block."""
        lengths: list[int] = []

        def add(_: Any, arguments: Any, named: dict[str, Any], output: Any) -> None:
            lengths.append(named["input_ids"].shape[1])

        hook = self.served.model.register_forward_hook(add, with_kwargs=True)
        try:
            yield lengths
        finally:
            hook.remove()


@contextmanager
def running(folder: Path, **settings: Any) -> Iterator[Running]:
    served = load_served(ServeSettings(str(folder), "tiny", **settings))
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(build_app(served), log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    started = Running(served, listener.getsockname()[1])
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield started
    finally:
        started.client.close()
        server.should_exit = True
        thread.join()
        listener.close()
