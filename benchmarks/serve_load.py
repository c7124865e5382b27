"""A server under load: clients that ask for long and short prompts, half of which go midway; beside Llama.

    python benchmarks/serve_load.py [--output FILE] [--seconds 60] [--rounds 5] [--max_batch 8]
    python benchmarks/serve_load.py --run RUN --output FILE [--rounds 9]

Without `--run`: a model of random weights, of which half of the block-tokens are skipped (imposed), and transformers'
`LlamaForCausalLM` of the same shape, each under the same server in a process of its own, one thread each. They are
loaded in turns, `--rounds` times each for `--seconds`, by the same requests: of each round the times to the first token
and for each token after it (tokens of one part of a stream share its time alike), and every second the memory of the
server's process.

With `--run`: how fast the model of a run folder decodes when it is served, beside `model.generate`, in turns; one
request at a time.
"""

import argparse
import asyncio
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import openai
import psutil

SHAPE = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
}
SHORTEST, LONGEST, NEW_TOKENS = 16, 2000, 64
CLIENTS = 32
SKIP_SHARE = 0.5
SIDES = ("midskip", "llama")


def words_tokenizer() -> Any:
    """Each word w0, w1, ... is a token, so that the tokens of each part of a stream can be counted."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(SHAPE["vocab_size"])}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0")


def serve(side: str, max_batch: int) -> None:
    """Of the child: serve a side at any port that is free, and print which."""
    import socket

    import torch
    import uvicorn
    from transformers import LlamaConfig, LlamaForCausalLM

    from midskip import MidskipConfig, MidskipForCausalLM
    from midskip.commands.parser import quiet_transformers
    from midskip.runs import load_run
    from midskip.serving.app import build_app
    from midskip.serving.served import Served
    from midskip.serving.settings import ServeSettings

    quiet_transformers()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer: Any = words_tokenizer()
    shape = SHAPE | {"max_position_embeddings": LONGEST + NEW_TOKENS}
    if side == "midskip":
        policy = {"policy": "midskip.policies.controls:FixedDepths", "policy_settings": {"skip_share": SKIP_SHARE}}
        model: Any = MidskipForCausalLM(MidskipConfig(**shape, **policy))
    elif side == "llama":
        model = LlamaForCausalLM(LlamaConfig(**shape, eos_token_id=None))
    else:
        model, tokenizer = load_run(side)
    model.generation_config.eos_token_id = None  # answers are as long as asked for
    app = build_app(Served(ServeSettings(side, "model", max_batch=max_batch), model.eval(), tokenizer))
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="error")).run(sockets=[listener])


class Server:
    """A child that serves a side."""

    def __init__(self, side: str, max_batch: int):
        command = [sys.executable, __file__, "--serve", side, "--max_batch", str(max_batch)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        assert self.process.stdout is not None
        self.url = f"http://127.0.0.1:{self.process.stdout.readline().strip()}/v1"

    def megabytes(self) -> float:
        return psutil.Process(self.process.pid).memory_info().rss / 1e6


async def request(client: openai.AsyncOpenAI, draw: random.Random, found: dict[str, Any]) -> None:
    """One stream, which half of the clients leave midway."""
    prompt = " ".join(f"w{draw.randrange(1, SHAPE['vocab_size'])}" for _ in range(draw.randint(SHORTEST, LONGEST)))
    leaves_after = draw.randint(1, NEW_TOKENS // 2) if draw.random() < 0.5 else None
    before, is_first, count = time.perf_counter(), True, 0
    stream = await client.completions.create(model="model", prompt=prompt, max_tokens=NEW_TOKENS, stream=True)
    async for part in stream:
        now = time.perf_counter()
        tokens = len(part.choices[0].text.split())
        if not tokens:
            continue
        if is_first:
            found["first"].append(now - before)
        else:
            found["between"].append(now - before)
            found["each"] += [(now - before) / tokens] * tokens
        found["tokens"] += tokens
        before, is_first, count = now, False, count + tokens
        if leaves_after is not None and count >= leaves_after:
            await stream.close()
            found["left"] += 1
            return
    found["whole"] += 1


async def load(server: Server, seconds: float, seed: int) -> dict[str, Any]:
    """What the clients saw, and the memory of the server."""
    found: dict[str, Any] = {name: [] for name in ("first", "between", "each", "megabytes")}
    found |= dict.fromkeys(("tokens", "left", "whole", "failed"), 0)
    end = time.monotonic() + seconds

    async def ask_again(number: int) -> None:
        draw = random.Random(seed * CLIENTS + number)
        while time.monotonic() < end:
            try:
                await request(client, draw, found)
            except openai.APIError:
                found["failed"] += 1

    async def watch() -> None:
        while time.monotonic() < end:
            await asyncio.sleep(1)
            found["megabytes"].append(server.megabytes())

    start = time.monotonic()
    async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=300) as client:
        await asyncio.gather(watch(), *(ask_again(number) for number in range(CLIENTS)))
    found["seconds"] = time.monotonic() - start  # to the end of the last answer
    return found


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one side over its rounds."""

    def quantiles(name: str) -> dict[str, float]:
        values = [1000 * value for found in rounds for value in found[name]]
        cuts = statistics.quantiles(values, n=100)
        return {f"p{q}": round(cuts[q - 1], 2) for q in (50, 95, 99)} | {"count": len(values)}

    by_round = {
        "first_token_p50_ms": [round(1000 * statistics.median(found["first"]), 1) for found in rounds],
        "per_token_p50_ms": [round(1000 * statistics.median(found["each"]), 2) for found in rounds],
        "tokens_per_s": [round(found["tokens"] / found["seconds"], 1) for found in rounds],
    }
    memory = [found["megabytes"] for found in rounds]
    by_minute = [[statistics.median(of[start : start + 60]) for start in range(0, len(of), 60)] for of in memory]
    tokens = sum(found["tokens"] for found in rounds)
    return {
        "first_token_ms": quantiles("first"),
        "per_token_ms": quantiles("each"),
        "between_parts_ms": quantiles("between"),
        "tokens_per_s": round(tokens / sum(found["seconds"] for found in rounds), 1),
        **{name: sum(found[name] for found in rounds) for name in ("whole", "left", "failed")},
        "by_round": by_round,
        "megabytes_by_minute": [[round(median, 1) for median in minutes] for minutes in by_minute],
        "memory_growth_after_first_minute": round(by_minute[-1][-1] / by_minute[0][0] - 1, 4),
    }


def measure_load(seconds: float, num_rounds: int, max_batch: int) -> dict[str, Any]:
    servers = {side: Server(side, max_batch) for side in SIDES}
    rounds: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    busy = []
    try:
        for number in range(num_rounds):
            for side in SIDES if number % 2 == 0 else SIDES[::-1]:
                rounds[side].append(asyncio.run(load(servers[side], seconds, number)))
                busy.append(round(os.getloadavg()[0], 1))
                print(side, number, summary(rounds[side][-1:]), flush=True)
    finally:
        for server in servers.values():
            server.process.kill()
    sides = {side: summary(rounds[side]) for side in SIDES}
    settings = {"shape": SHAPE, "prompt_tokens": [SHORTEST, LONGEST], "new_tokens": NEW_TOKENS, "clients": CLIENTS}
    settings |= {"skip_share": SKIP_SHARE, "seconds": seconds, "rounds": num_rounds, "max_batch": max_batch}
    settings |= {"threads_of_each_server": 1}
    return {"settings": settings, "load_average_after_each_round": busy, "sides": sides}


def measure_decode(run: str, num_rounds: int) -> dict[str, Any]:
    """Tokens a second of the same greedy request, served and by `generate`."""
    import torch

    from midskip.runs import load_run

    torch.set_num_threads(1)
    model, tokenizer = load_run(run)
    ids_BT = tokenizer("The function returns", return_tensors="pt")["input_ids"]
    count = min(200, model.config.max_position_embeddings - ids_BT.shape[1])
    server = Server(run, 1)
    client = openai.OpenAI(base_url=server.url, api_key="none", timeout=300)
    rates: dict[str, list[float]] = {"generate": [], "served": [], "streamed": []}

    def ask(name: str) -> None:
        more: Any = {"model": "model", "prompt": "The function returns", "max_tokens": count}
        start = time.perf_counter()
        if name == "generate":
            model.generate(ids_BT, max_new_tokens=count, do_sample=False, eos_token_id=None)  # pyright: ignore
        elif name == "served":
            assert client.completions.create(**more).usage.completion_tokens == count
        else:
            assert list(client.completions.create(**more, stream=True))[-1].usage.completion_tokens == count
        rates[name].append(count / (time.perf_counter() - start))

    try:
        for number in range(num_rounds + 1):
            for name in rates if number % 2 else reversed(rates):
                ask(name)
    finally:
        server.process.kill()
    medians = {name: statistics.median(values[1:]) for name, values in rates.items()}
    ratios = {
        name: statistics.median(x / y for x, y in zip(rates[name][1:], rates["generate"][1:]))
        for name in ("served", "streamed")
    }
    return {
        "settings": {"new_tokens": count, "rounds": num_rounds, "threads": 1, "batch": 1},
        "load_average": round(os.getloadavg()[0], 1),
        "tokens_per_s": {name: round(value, 1) for name, value in medians.items()},
        "of_generate": {name: round(value, 3) for name, value in ratios.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max_batch", type=int, default=8)
    parser.add_argument("--run")
    parser.add_argument("--beside", default="", help="what else ran on the machine, for the file")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve, options.max_batch)
    from midskip.bench.results import machine
    from midskip.runs import to_json, write_atomically

    if options.run:
        found = measure_decode(options.run, options.rounds)
    else:
        found = measure_load(options.seconds, options.rounds, options.max_batch)
    text = to_json({"machine": machine(), "beside": options.beside} | found)
    print(text)
    if options.output:
        write_atomically(options.output, text + "\n")


if __name__ == "__main__":
    main()
