"""The same app in several processes, under Ray Serve: it shares requests out, and replaces a process that dies.

A request that runs in a process that dies is answered by Ray, with an error of 500 or above, or, if its answer had
begun, is cut off. Clients of OpenAI's API try again in the first case, by themselves.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from midskip.plugins import search_folder
from midskip.serving.app import check_installed, load_app
from midskip.serving.settings import ServeSettings

NEEDED = "--replicas needs Ray Serve: pip install 'midskip[serving,ray]'"
HEALTH_S = 2  # between two looks of Ray at a replica


@contextmanager
def served_on_ray(settings: ServeSettings, host: str, port: int, replicas: int) -> Iterator[None]:
    """Ray, started on this machine, serves in the block.

    Raises:
        ValueError: Ray is not installed or cannot be started, or what `load_app` refuses.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]
        from ray import serve  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(NEEDED) from None
    check_installed()
    from midskip.serving.served import load_served

    load_served(settings)  # what is wrong with it is told here, in one line, and not by each replica
    torch.cuda.empty_cache()  # it was on the GPU that the replicas get
    settings = replace(settings, folder=str(Path(settings.folder).resolve()), name=settings.model_name)
    here = str(Path.cwd())

    def build() -> Any:
        if settings.trust:
            search_folder(Path(here))
        return load_app(settings)

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ValueError(f"Ray cannot be started on this machine: {error}") from error
    try:
        resources: dict[str, float] = ray.cluster_resources()
        cpus, gpus = resources.get("CPU", 1) / replicas, resources.get("GPU", 0) / replicas
        serve.start(http_options={"host": host, "port": port}, logging_config={"log_level": "ERROR"})
        deployment: Any = serve.deployment(
            num_replicas=replicas,
            max_ongoing_requests=2 * settings.max_requests,  # more than `Admission` takes: it tells the others
            health_check_period_s=HEALTH_S,
            ray_actor_options={"num_cpus": int(cpus) if cpus > 1 else cpus, "num_gpus": min(1, gpus)},
        )(serve.ingress(build)())
        serve.run(deployment.bind())
        yield
    finally:
        serve.shutdown()
        ray.shutdown()


def serve_on_ray(settings: ServeSettings, host: str, port: int, replicas: int) -> None:
    """As `served_on_ray`, until the process is told to stop."""
    stopped = threading.Event()
    with served_on_ray(settings, host, port, replicas):
        signal.signal(signal.SIGTERM, lambda *_: stopped.set())  # here: Ray sets one of its own as it starts
        print(f"serving {settings.model_name!r} at http://{host}:{port}/v1, {replicas} replicas", flush=True)
        while not stopped.wait(1):
            pass
