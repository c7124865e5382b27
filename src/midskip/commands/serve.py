"""`midskip serve`: its options, and what it does."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from midskip.commands.parser import Parser, add_trust, at_least_one
from midskip.serving.settings import ServeSettings

GRACE_S = 5  # for requests that run when the server is stopped

REFUSED = {
    "compile": "it decodes over a static cache, and a model whose tokens skip layers has a cache that grows",
    "continuous_batching": "it decodes over a paged cache, which holds every token in every layer",
}


def run(arguments: list[str]) -> None:
    parser = Parser("serve")
    parser.add_argument("run", help="run folder, or a folder of save_pretrained with its tokenizer")
    parser.add_argument("--name", help="of the model, for clients (default: the folder as given)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    parser.add_argument("--budget", type=float, help="share of the blocks to run, in (0, 1] (default: as trained)")
    parser.add_argument("--max_layers", type=at_least_one, help="the most blocks that a token may run (default: all)")
    parser.add_argument(
        "--max_requests", type=at_least_one, default=64, help="taken at once by each replica (default: %(default)s)"
    )
    parser.add_argument(
        "--max_batch", type=at_least_one, default=8, help="run at once by each replica (default: %(default)s)"
    )
    parser.add_argument("--replicas", type=at_least_one, help="processes that serve, under Ray Serve (default: no Ray)")
    add_trust(parser)
    for name in REFUSED:
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", action="store_true", help="refused: see below")
    parser.epilog = "Options of `transformers serve` that a skipping model cannot have: " + "; ".join(
        f"--{name}, since {reason}" for name, reason in REFUSED.items()
    )
    options = parser.parse_args(arguments)
    for name, reason in REFUSED.items():
        if getattr(options, name):
            raise ValueError(f"--{name} cannot be used: {reason}; leave it out")
    if not 0 <= options.port <= 65535:
        raise ValueError(f"port is {options.port}; expected 1 to 65535, or 0 for any that is free")
    settings = ServeSettings(
        options.run, options.name, options.budget, options.max_layers, tuple(options.trust), options.max_requests,
        options.max_batch,
    )  # fmt: skip
    if options.replicas is not None:
        from midskip.serving.on_ray import serve_on_ray

        serve_on_ray(settings, options.host, options.port, options.replicas)
        return
    from midskip.serving.app import load_app

    app = load_app(settings)
    import uvicorn  # pyright: ignore[reportMissingImports]

    class Server(uvicorn.Server):
        async def shutdown(self, *sockets: Any, **named: Any) -> None:
            await super().shutdown(*sockets, **named)
            if self.server_state.tasks:  # cancelled by now: they tell their clients
                await asyncio.wait(self.server_state.tasks, timeout=1)

    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    with socket.create_server((options.host, options.port), family=family) as listener:
        host = f"[{options.host}]" if ":" in options.host else options.host
        print(f"serving {settings.model_name!r} at http://{host}:{listener.getsockname()[1]}/v1", flush=True)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GRACE_S)
        server = Server(config)
        server.run(sockets=[listener])
    if not server.started:
        raise OSError("the server did not start: see above")
    raise KeyboardInterrupt  # only a signal stops it; a shell may have SIGINT ignored in what it runs in the background
