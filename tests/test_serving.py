"""A run is served: completions and chat, streamed and whole, under the budgets of server and requests."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.extras
openai: Any = pytest.importorskip("openai")
pytest.importorskip("fastapi")

from doc_code import ROOT, blocks_of  # noqa: E402
from tiny_server import Running, running, write_served  # noqa: E402

from midskip.cli import main  # noqa: E402

PROMPT = "the cat sat on"


@pytest.fixture(scope="module")
def folder(saved_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_served(saved_model, tmp_path_factory.mktemp("served") / "model")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    with running(folder) as started:
        yield started


def complete(server: Running, **more: Any) -> Any:
    return server.client.completions.create(**({"model": "tiny", "prompt": PROMPT, "max_tokens": 12} | more))


def expected(server: Running, prompt: str, count: int, budget: float | None = None) -> tuple[str, float]:
    """What the model gives by `generate`, and the share that ran."""
    served = server.served
    served.model.set_budget(budget)
    ids = served.tokenizer(prompt, return_tensors="pt")["input_ids"]
    output = served.model.generate(ids, max_new_tokens=count, do_sample=False, return_dict_in_generate=True)
    served.model.set_budget()
    text = served.tokenizer.decode(output.sequences[0, ids.shape[1] :], skip_special_tokens=True)
    return text, output.past_key_values.executed_share


def whole(text: str) -> str:
    """Without the bytes at its end that are no character yet, which a stream waits to show."""
    return text.rstrip("\ufffd")


def test_a_completion_is_what_generate_gives(server: Running) -> None:
    text, share = expected(server, PROMPT, 12)
    answer = complete(server)
    assert answer.choices[0].text == text and answer.choices[0].finish_reason == "length"
    assert answer.model == "tiny" and answer.usage.completion_tokens == 12
    assert answer.usage.executed_share == pytest.approx(share, abs=1e-4) and 0 < share < 1
    parts = list(complete(server, stream=True))
    assert "".join(part.choices[0].text for part in parts) == whole(text)
    assert parts[-1].usage == answer.usage, "the share is in the last part of a stream too"


def test_the_code_of_the_page_runs(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = (block.text for block in blocks_of(ROOT / "docs" / "serving.md") if block.language == "python")
    exec(code.replace("http://127.0.0.1:8000/v1", server.url).replace('"mine"', '"tiny"'), names := {})
    text, _ = expected(server, "The function returns", 20)
    assert capsys.readouterr().out.endswith(whole(text)) and 0 < names["answer"].usage.executed_share < 1


def test_chat_goes_by_the_template(server: Running) -> None:
    messages = [{"role": "user", "content": "the cat"}, {"role": "user", "content": [{"type": "text", "text": "sat"}]}]
    text, share = expected(server, "user: the cat\nuser: sat\n", 9)
    answer = server.client.chat.completions.create(model="tiny", messages=messages, max_tokens=9)
    assert answer.choices[0].message.content == text
    assert answer.usage.executed_share == pytest.approx(share, abs=1e-4)
    parts = list(server.client.chat.completions.create(model="tiny", messages=messages, max_tokens=9, stream=True))
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole(text)
    assert parts[-1].usage == answer.usage


def test_requests_at_the_same_time_keep_their_budgets(server: Running) -> None:
    budgets = [1.0, 0.25, None, 0.5] * 6
    wanted = {budget: expected(server, PROMPT, 12, budget) for budget in set(budgets)}
    assert len({share for _, share in wanted.values()}) >= 3, "else this test sees nothing"

    def ask(number: int) -> tuple[str, float]:
        answer = complete(server, extra_body={"budget": budgets[number]}, stream=number % 2 == 1)
        if number % 2 == 0:
            return answer.choices[0].text, answer.usage.executed_share
        parts = list(answer)
        return "".join(part.choices[0].text for part in parts), parts[-1].usage.executed_share

    with ThreadPoolExecutor(len(budgets)) as pool:
        for budget, (text, share) in zip(budgets, pool.map(ask, range(len(budgets)))):
            assert text in (wanted[budget][0], whole(wanted[budget][0]))
            assert share == pytest.approx(wanted[budget][1], abs=1e-4)


def test_max_layers_of_a_request(server: Running) -> None:
    answer = complete(server, extra_body={"max_layers": 2})
    assert answer.usage.executed_share <= 0.5
    assert complete(server).usage.executed_share == pytest.approx(expected(server, PROMPT, 12)[1], abs=1e-4)


def test_an_answer_ends_with_a_stop_text(server: Running) -> None:
    text, _ = expected(server, PROMPT, 12)
    stop = whole(text)[3:5]
    answer = complete(server, stop=stop, temperature=0)
    assert answer.choices[0].finish_reason == "stop" and answer.usage.completion_tokens < 12
    assert text.startswith(answer.choices[0].text) and stop in answer.choices[0].text
    begun_in_the_prompt = PROMPT[-1] + whole(text)[0]
    assert begun_in_the_prompt not in text
    assert complete(server, stop=begun_in_the_prompt, temperature=0).choices[0].text == text


def test_sampling_goes_by_its_seed(server: Running) -> None:
    def ask(seed: int) -> str:
        return complete(server, temperature=1.5, seed=seed).choices[0].text

    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(ask, [1, 2, 1, 2, 1]))
    assert texts[0] == texts[2] == texts[4] and texts[1] == texts[3] != texts[0]
    unseeded = []
    for _ in range(3):
        ask(1)
        unseeded.append(complete(server, temperature=1.5).choices[0].text)
    assert len(set(unseeded)) > 1, "a seed is of its own request"


def test_without_max_tokens_an_answer_ends_with_the_context(server: Running) -> None:
    answer = server.client.completions.create(model="tiny", prompt=PROMPT)
    assert answer.usage.total_tokens == server.served.max_tokens


def test_the_budget_of_the_server(folder: Path) -> None:
    with running(folder, budget=0.25) as server:
        low = expected(server, PROMPT, 12, 0.25)[1]
        assert complete(server).usage.executed_share == pytest.approx(low, abs=1e-4)
        trained = expected(server, PROMPT, 12)[1]
        assert trained != pytest.approx(low, abs=1e-2)
        answer = complete(server, extra_body={"budget": None})
        assert answer.usage.executed_share == pytest.approx(trained, abs=1e-4), "null: as trained"


@pytest.mark.parametrize(
    ("stop", "before"), [(signal.SIGTERM, ":"), (signal.SIGINT, ":"), (signal.SIGINT, "trap '' INT")]
)
def test_the_command(folder: Path, stop: signal.Signals, before: str, tmp_path: Path) -> None:
    """It is told to stop while it streams, and while another client still sends its request; also where SIGINT was
    ignored when it began, as a script's shell has it for what runs in the background."""
    long = write_served(folder, tmp_path / "long", max_position_embeddings=100_000)
    shell = ["sh", "-c", f'{before}; exec "$@"', "sh"]
    command = [*shell, sys.executable, "-m", "midskip", "serve", str(long), "--name", "tiny", "--port", "0"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            line = process.stdout.readline()
            assert line.startswith("serving 'tiny' at http://127.0.0.1:"), line
            with openai.OpenAI(base_url=line.split()[-1], api_key="none", max_retries=0) as client:
                assert [model.id for model in client.models.list()] == ["tiny"]
                assert client.completions.create(model="tiny", prompt=PROMPT, max_tokens=3).usage.executed_share > 0
                stream = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=90_000, stream=True)
                next(iter(stream))
                with socket.create_connection(("127.0.0.1", client.base_url.port)) as sending:
                    sending.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 50\r\n\r\n{")
                    time.sleep(1)  # it has read that
                    process.send_signal(stop)
                    with pytest.raises(openai.APIError, match="was told to stop"):
                        list(stream)
                    assert sending.recv(100).startswith(b"HTTP/1.1 503 ")
                process.wait(timeout=30)
                said = process.stderr.read()
                assert "Traceback" not in said and ("midskip: interrupted" in said) == (stop == signal.SIGINT)
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--compile"], "--compile cannot be used: it decodes over a static cache"),
        (["--continuous-batching"], "--continuous_batching cannot be used: it decodes over a paged cache"),
        (["--budget", "1.5"], "budget is 1.5"),
        (["--max_layers", "9"], "max_layers is 9"),
        (["--port", "70000"], "port is 70000"),
    ],
)
def test_what_the_command_refuses(folder: Path, options: list[str], words: str, capsys: Any) -> None:
    assert main(["serve", str(folder), *options]) == 2
    line = capsys.readouterr().err
    assert words in line and line.count("\n") == 1


def test_a_policy_from_outside_needs_trust(folder: Path, tmp_path: Path, capsys: Any) -> None:
    copy = write_served(folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"policy": "elsewhere.policies:Thin"}))
    assert main(["serve", str(copy)]) == 2
    assert "--trust elsewhere.policies" in capsys.readouterr().err


def test_generation_is_on_one_thread(server: Running) -> None:
    """Budgets are state of the model: what would run beside it would run under the budget of another request."""
    threads: set[int] = set()
    hook = server.served.model.register_forward_hook(lambda *_: threads.add(threading.get_ident()))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: complete(server, max_tokens=4), range(8)))
    hook.remove()
    assert len(threads) == 1
    assert torch.is_grad_enabled()
