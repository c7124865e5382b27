"""Requests that wait at the same time run as one batch, and each gets what it would get alone."""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.extras
pytest.importorskip("openai")
pytest.importorskip("fastapi")

from tiny_server import Running, running, write_served  # noqa: E402

from midskip.model.cache import SkipCache  # noqa: E402
from midskip.serving import stream  # noqa: E402
from midskip.serving.batches import Waiting  # noqa: E402

Answers = list[tuple[str, Any]]
PROMPTS = ["the cat", "the dog sat on the mat and", "a", "the cat sat"]


@pytest.fixture(scope="module")
def server(saved_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(write_served(saved_model, tmp_path_factory.mktemp("served") / "model"), max_batch=4) as started:
        yield started


def ask(server: Running, request: dict[str, Any]) -> tuple[str, Any]:
    """Text, without bytes at its end that are no character yet, and usage."""
    more = {"model": "tiny", "max_tokens": 12} | request
    leaves = more.pop("leaves", False)  # after the first part
    fails = more.pop("fails", None)
    answer = server.client.completions.create(**more)
    if fails:
        with pytest.raises(Exception, match=fails):
            list(answer)
        return "", None
    if leaves:
        next(iter(answer))
        time.sleep(0.2)
        answer.close()
        return "", None
    parts = list(answer) if more.get("stream") else [answer]
    return "".join(part.choices[0].text for part in parts).rstrip("\ufffd"), parts[-1].usage


@pytest.fixture
def together(server: Running, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Answers, list[int]]]:
    """together(request, ...): their answers, and how many ran in each batch, where all of them wait in this order while
    another runs."""
    has_come, add = threading.Semaphore(0), Waiting.add

    def added(*arguments: Any) -> None:
        add(*arguments)
        has_come.release()

    def run(*requests: dict[str, Any]) -> tuple[Answers, list[int]]:
        batches, has_begun, all_wait = [], threading.Event(), threading.Event()
        while has_come.acquire(blocking=False):  # of requests before
            pass

        def look(_: Any, arguments: Any, named: dict[str, Any]) -> None:
            if not has_begun.is_set():
                has_begun.set()
                assert all_wait.wait(60)
            elif named["input_ids"].shape[1] > 1 or named["past_key_values"].get_seq_length() == 0:
                batches.append(len(named["input_ids"]))

        def send(request: dict[str, Any]) -> Future[tuple[str, Any]]:
            sent = pool.submit(ask, server, request)
            assert has_come.acquire(timeout=60)
            return sent

        hook = server.served.model.register_forward_pre_hook(look, with_kwargs=True)
        try:
            with ThreadPoolExecutor(1 + len(requests)) as pool:
                first = send({"prompt": "another", "max_tokens": 1})
                assert has_begun.wait(60)
                found = [send(request) for request in requests]
                all_wait.set()
                first.result(60)
                return [one.result(60) for one in found], batches
        finally:
            hook.remove()

    monkeypatch.setattr(Waiting, "add", added)
    return run


def test_each_gets_what_it_gets_alone(server: Running, together: Any) -> None:
    requests = [
        {"prompt": prompt, "max_tokens": 12 - 3 * number, "stream": number % 2 == 1}
        for number, prompt in enumerate(PROMPTS)
    ]
    found, batches = together(*requests)
    assert batches == [4]
    for request, (text, usage) in zip(requests, found):
        alone, its_usage = ask(server, request)
        assert text == alone
        assert (usage.prompt_tokens, usage.completion_tokens) == (its_usage.prompt_tokens, request["max_tokens"])
        assert usage.executed_share == pytest.approx(its_usage.executed_share, abs=2e-4)


def test_a_batch_has_its_limit(together: Any) -> None:
    _, batches = together(*[{"prompt": "the cat"}] * 9)
    assert batches == [4, 4, 1]


def test_those_that_ask_for_something_else_run_apart(server: Running, together: Any) -> None:
    requests = [{"prompt": "the cat", "extra_body": {"budget": budget}} for budget in (0.25, 1.0, 0.25, 1.0)]
    found, batches = together(*requests)
    assert batches == [2, 2] and found[0][1].executed_share < found[1][1].executed_share == 1
    alone = [
        {"stop": "zzz"}, {"stop": "zzz"}, {"seed": 1, "temperature": 1.0}, {"seed": 1, "temperature": 1.0},
        {"frequency_penalty": 0.5}, {"frequency_penalty": 0.5},
    ]  # fmt: skip
    found, batches = together(*({"prompt": "the cat"} | more for more in alone))
    assert batches == [1] * 6 and found[2][0] == found[3][0]


def test_a_batch_fits_into_the_model(server: Running, together: Any) -> None:
    """Each fits alone: a long prompt with a short answer, and a short one with a long answer."""
    most = server.served.max_tokens
    long, count = "the cat sat on the mat " * 20, most // 3
    text = server.served.tokenizer.decode(server.served.tokenizer(long)["input_ids"][: most - count])
    found, batches = together({"prompt": text, "max_tokens": count}, {"prompt": "a", "max_tokens": most - 2})
    assert batches == [1, 1] and [usage.completion_tokens for _, usage in found] == [count, most - 2]


@pytest.fixture
def answered(server: Running, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, str], None]]:
    """answered(N, prompts): the model's pass N begins when these prompts, with blanks between, have been answered."""
    prompts, waits, number, plainly = set(), {}, 0, ask

    def ask_and_tell(server: Running, request: dict[str, Any]) -> tuple[str, Any]:
        answer = plainly(server, request)
        prompts.add(request["prompt"])
        return answer

    def wait(*_: Any) -> None:
        nonlocal number
        number += 1
        deadline = time.monotonic() + 20
        while not waits.get(number, set()) <= prompts:
            if time.monotonic() > deadline:
                late.append(f"before pass {number}, {sorted(prompts)} were answered, not {sorted(waits[number])}")
                return
            time.sleep(0.01)

    late: list[str] = []
    monkeypatch.setattr(sys.modules[__name__], "ask", ask_and_tell)
    hook = server.served.model.register_forward_pre_hook(wait)
    yield lambda number, prompts: waits.update({number: set(prompts.split())})
    hook.remove()
    assert not late and number > max(waits)


def test_an_answer_does_not_wait_for_its_turn(together: Any, answered: Any) -> None:
    """Of four that wait, all but the second run as one batch, in passes 2 to 13."""
    answered(4, "another short")  # not for the longest of its batch
    answered(14, "another short first last")  # the last, not for the second
    other = {"prompt": "second", "extra_body": {"budget": 0.25}}
    _, batches = together({"prompt": "first"}, other, {"prompt": "short", "max_tokens": 2}, {"prompt": "last"})
    assert batches == [3, 1]


def test_a_stream_that_fails_does_not_wait_for_its_turn(server: Running, together: Any, answered: Any) -> None:
    """Of three that wait, the first and the last run as one batch, and fail in pass 2."""

    def fail(_: Any, arguments: Any, named: dict[str, Any]) -> None:
        if len(named["input_ids"]) > 1:
            raise RuntimeError("it broke")

    answered(3, "another first last")
    hook = server.served.model.register_forward_pre_hook(fail, with_kwargs=True)
    breaks = {"stream": True, "fails": "it broke"}
    other = {"prompt": "second", "extra_body": {"budget": 0.25}}
    try:
        together({"prompt": "first"} | breaks, other, {"prompt": "last"} | breaks)
    finally:
        hook.remove()


@pytest.mark.parametrize("send_s", [0, 1e9])
def test_a_client_that_goes_leaves_the_others_their_answers(
    server: Running, together: Any, monkeypatch: pytest.MonkeyPatch, send_s: float
) -> None:
    """Also if tokens of its stream are still held."""
    monkeypatch.setattr(stream, "SEND_S", send_s)
    expected = ask(server, {"prompt": "the cat", "max_tokens": 40})
    slow = server.served.model.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    try:
        found, batches = together(
            {"prompt": "the dog", "max_tokens": 40, "stream": True, "leaves": True},
            {"prompt": "the cat", "max_tokens": 40},
        )
    finally:
        slow.remove()
    assert batches == [2] and found[1] == expected


def test_tokens_that_are_no_text_end_one_stream(
    server: Running, together: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put(self: Any, token: int) -> None:
        raise Exception("Invalid prefix encountered")  # as tokenizers' streams of bytes do

    monkeypatch.setattr(stream.Grouped, "put", put)
    expected = ask(server, {"prompt": "the cat"})
    with pytest.raises(Exception, match="Invalid prefix"):
        ask(server, {"prompt": "the dog", "stream": True})
    told = {"prompt": "the dog", "stream": True, "fails": "Invalid prefix"}
    found, batches = together(told, {"prompt": "the cat"})
    assert batches == [2] and found[1] == expected


def test_a_policy_that_looks_back_reads_all_anew(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """So its passes are not added up."""
    monkeypatch.setattr(type(server.served.model.model.policy), "looks_back", True)
    usage = ask(server, {"prompt": "the cat", "extra_body": {"budget": 1.0}})[1]
    assert usage.executed_share == 1


def test_what_breaks_a_batch_is_told_to_all_of_it(server: Running, together: Any) -> None:
    def fail(_: Any, arguments: Any, named: dict[str, Any]) -> None:
        if len(named["input_ids"]) > 1:
            raise RuntimeError("it broke")

    hook = server.served.model.register_forward_pre_hook(fail, with_kwargs=True)
    gc.collect()
    gc.disable()
    try:
        together({"prompt": "the cat"}, {"prompt": "the dog", "stream": True})
    except Exception as error:
        assert "it broke" in str(error)
    else:
        pytest.fail("nothing was told")
    finally:
        hook.remove()
        kept = [one for one in gc.get_objects() if isinstance(one, SkipCache)]
        gc.enable()
    assert not kept, "what was computed so far goes with the batch"
    assert ask(server, {"prompt": "the cat"})[0]
