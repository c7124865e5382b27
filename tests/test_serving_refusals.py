"""What a server cannot answer it refuses, in the shape of OpenAI's errors, and clients that go leave nothing behind."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.extras
pytest.importorskip("openai")
pytest.importorskip("fastapi")

from tiny_server import Running, running, write_served  # noqa: E402

from midskip.serving import admission  # noqa: E402
from midskip.serving.batches import Request, Waiting  # noqa: E402
from midskip.serving.work import REQUEST  # noqa: E402

BODY: dict[str, Any] = {"model": "tiny", "prompt": "the cat", "max_tokens": 4}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "the cat"}], "max_tokens": 4}
LONG = 4000


@pytest.fixture(scope="module")
def server(saved_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("served") / "model"
    with running(write_served(saved_model, folder, max_position_embeddings=LONG), max_requests=8) as started:
        yield started


def fetch(server: Running, path: str, body: Any, method: str = "POST") -> tuple[int, str]:
    """Status and text of the answer."""
    raw = json.dumps(body).encode() if isinstance(body, dict) else body
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request(method, path, raw, {"content-type": "application/json"})
    with connection.getresponse() as answer:
        found = answer.status, answer.read().decode()
    connection.close()
    return found


def ask(server: Running, path: str, body: Any, method: str = "POST") -> tuple[int, Any]:
    """The same of an answer in JSON."""
    status, text = fetch(server, path, body, method)
    return status, json.loads(text)


@pytest.mark.parametrize(
    ("change", "status", "param", "words"),
    [
        ({"model": "another\ud800"}, 404, "model", "this server has 'tiny'"),
        ({"prompt": None}, 400, "prompt", "expected one text"),
        ({"prompt": ""}, 400, "prompt", "expected one text"),
        ({"prompt": ["a", "b"]}, 400, "prompt", "expected one text"),
        ({"prompt": "\ud800"}, 400, None, "cannot be turned into a prompt"),
        ({"prompt": "cat " * 5000}, 400, "prompt", "at most 4000"),
        ({"max_tokens": 4000}, 400, "max_tokens", "ask for at most 399"),
        ({"max_tokens": -1}, 400, "max_tokens", "at least 1"),
        ({"max_tokens": "many"}, 400, "max_tokens", "'many'"),
        ({"temperature": "hot"}, 400, "temperature", "'hot'"),
        ({"temperature": float("nan")}, 400, "temperature", "nan"),
        ({"top_p": 0}, 400, "top_p", "above 0"),
        ({"seed": -1}, 400, "seed", "-1"),
        ({"stop": [""]}, 400, "stop", "1 to 128 characters"),
        ({"stop": "a" * 129}, 400, "stop", "1 to 128 characters"),
        ({"stop": "\ud800"}, 400, "stop", "1 to 128 characters"),
        ({"suffix": "\ud800"}, 400, "suffix", "a text"),
        ({"stream": "yes"}, 400, "stream", "true or false"),
        ({"n": 2}, 400, "n", "one answer"),
        ({"logprobs": 5}, 400, "logprobs", "left out"),
        ({"generation_config": '{"cache_implementation": "static"}'}, 400, "generation_config", "left out"),
        ({"unheard_of": 1}, 422, None, "unheard_of"),
        ({"budget": -0.5}, 400, "budget", "-0.5"),
        ({"budget": 1.5}, 400, "budget", "1.5"),
        ({"budget": "half"}, 400, "budget", "'half'"),
        ({"budget": [0.5]}, 400, "budget", "[0.5]"),
        ({"budget": float("nan")}, 400, "budget", "nan"),
        ({"max_layers": 0}, 400, "max_layers", "from 1 to 4"),
        ({"max_layers": 2.5}, 400, "max_layers", "2.5"),
    ],
)
def test_bad_fields_of_a_completion(
    server: Running, change: dict[str, Any], status: int, param: str | None, words: str
) -> None:
    assert_refused(ask(server, "/v1/completions", BODY | change), status, param, words)


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"messages": []}, "messages", "not empty"),
        ({"messages": "hello"}, "messages", "'hello'"),
        ({"messages": [{"content": "a"}]}, "messages", "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages", "text"),
        ({"chat_template_kwargs": {"chat_template": "{{ x }}"}}, "chat_template_kwargs", "chat_template,"),
        ({"tools": "all"}, "tools", "list"),
    ],
)
def test_bad_fields_of_chat(server: Running, change: dict[str, Any], param: str, words: str) -> None:
    assert_refused(ask(server, "/v1/chat/completions", CHAT | change), 400, param, words)


@pytest.mark.parametrize(
    ("path", "method", "body", "status", "words"),
    [
        ("/v1/completions", "POST", b"{", 400, "not a JSON object"),
        ("/v1/completions", "POST", b"[1]", 400, "not a JSON object"),
        ("/v1/completions", "POST", b"[" * 100_000, 400, ""),
        ("/v1/completions", "POST", b" " * 100_000_000, 413, "bytes"),
        ("/v1/completions", "GET", b"", 405, "POST"),
        ("/load_model", "POST", b'{"model": "gpt2"}', 404, "/load_model"),
        ("/reset", "POST", b"", 404, "/reset"),
    ],
)
def test_bad_bodies_and_addresses(
    server: Running, path: str, method: str, body: bytes, status: int, words: str
) -> None:
    assert_refused(ask(server, path, body, method), status, None, words)


def assert_refused(answer: tuple[int, Any], status: int, param: str | None, words: str) -> None:
    error = answer[1]["error"]
    assert answer[0] == status, error
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param) and words in error["message"]


def test_a_body_without_a_length_is_bounded_too(server: Running) -> None:
    status, answer = ask(server, "/v1/completions", iter([b" " * 2**20] * 3))
    assert (status, answer["error"]["code"]) == (413, "body_too_large")


def test_a_request_that_does_not_arrive_gives_its_place_back(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "BODY_S", 0.2)
    with socket.create_connection(("127.0.0.1", server.port)) as sending:
        sending.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 50\r\n\r\n{")
        answer = http.client.HTTPResponse(sending)
        answer.begin()
        error = json.loads(answer.read())["error"]
    assert (answer.status, error["code"]) == (408, "request_timeout")


def test_a_client_that_does_not_read_gives_its_place_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a stream that is longer than what systems hold between them."""
    monkeypatch.setattr(admission, "READ_S", 0.2)
    given = [{"type": "http.request", "body": b"{}", "more_body": False}]
    works = []

    async def receive() -> Any:
        return given.pop() if given else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        if message.get("body"):
            await asyncio.Event().wait()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        works.append(REQUEST.get())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"text", "more_body": True})

    stands = admission.Admission(app, max_requests=1, max_body=100)
    asyncio.run(stands({"type": "http", "path": "/v1/completions", "method": "POST", "headers": []}, receive, send))
    assert stands.num_requests == 0 and works[0].gone.is_set()


def test_no_budget_without_a_calibration_and_no_chat_without_a_template(saved_model: Path, tmp_path: Path) -> None:
    with running(write_served(saved_model, tmp_path / "model", template=None, calibration=None)) as server:
        assert_refused(ask(server, "/v1/completions", BODY | {"budget": 0.5}), 400, "budget", "midskip calibrate")
        assert ask(server, "/v1/completions", BODY | {"max_layers": 2})[0] == 200
        assert_refused(ask(server, "/v1/chat/completions", CHAT), 400, "messages", "no chat template")


def test_a_failure_of_the_model_is_an_error_of_the_server(server: Running) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError('it "broke"')

    hook = server.served.model.register_forward_hook(fail)
    try:
        status, answer = ask(server, "/v1/completions", BODY)
        assert (
            status == 500 and answer["error"]["type"] == "server_error" and 'it "broke"' in answer["error"]["message"]
        )
        text = fetch(server, "/v1/completions", BODY | {"stream": True})[1]
        told = json.loads(text.split("data: ")[-1])["error"]
        assert told["type"] == "server_error" and 'it "broke"' in told["message"]
    finally:
        hook.remove()
    assert ask(server, "/v1/completions", BODY)[0] == 200


def begin(server: Running, is_stream: bool) -> socket.socket:
    """A client that has asked for a long answer."""
    raw = json.dumps(BODY | {"max_tokens": 3000, "stream": is_stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}"
    client = socket.create_connection(("127.0.0.1", server.port))
    client.sendall(head.encode() + b"\r\n\r\n" + raw)
    return client


@pytest.fixture
def came(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """The requests that wait for their turn, or have waited."""
    requests, add = [], Waiting.add

    def added(waiting: Waiting, request: Request, *others: Any) -> None:
        add(waiting, request, *others)
        requests.append(request)

    monkeypatch.setattr(Waiting, "add", added)
    return requests


def until(is_so: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_goes_stops_its_generation(server: Running, is_stream: bool, came: list[Request]) -> None:
    with server.passes() as lengths:
        first = begin(server, is_stream)
        until(lambda: lengths)
        waiting = [begin(server, is_stream) for _ in range(3)]
        until(lambda: len(came) == 4)
        for client in waiting:
            client.close()
        until(lambda: all(request.work.gone.is_set() for request in came[1:]))
        first.close()
        until(lambda: all(request.has_ended for request in came))
    assert len(lengths) < 2500, "an answer has 3000 tokens, and nobody waits for them"
    assert sum(length > 1 for length in lengths) == 1, "one prompt was run: the others had gone before their turn"
    assert ask(server, "/v1/completions", BODY)[0] == 200


def test_too_many_requests_are_told_to_come_again(server: Running, came: list[Request]) -> None:
    clients = [begin(server, False) for _ in range(8)]
    until(lambda: len(came) == 8)
    status, answer = ask(server, "/v1/completions", BODY)
    for client in clients:
        client.close()
    assert (status, answer["error"]["code"], answer["error"]["type"]) == (503, "overloaded", "server_error")
    until(lambda: ask(server, "/v1/completions", BODY)[0] == 200)
