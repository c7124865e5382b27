"""Where the workers of a sweep run: in this process, in several on this machine, or on Ray."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from midskip.sweep.plan import Sweep
from midskip.sweep.work import work_elsewhere

RETRIES = 10  # of a Ray task whose process or machine died


def in_processes(sweep: Sweep, jobs: int) -> list[str]:
    """`jobs` processes, each with its share of the threads and one of the GPUs; those that died, in words."""
    context = multiprocessing.get_context("spawn")
    jobs = min(jobs, sweep.num_runs())
    num_threads = max(1, torch.get_num_threads() // jobs)
    workers = [context.Process(target=_as_child, args=(sweep, num_threads), name=f"worker {n}") for n in range(jobs)]
    try:
        for number, worker in enumerate(workers):
            with _one_gpu(number):
                worker.start()
        for worker in workers:
            worker.join()
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.kill()
    return [f"{worker.name} ended with {worker.exitcode}" for worker in workers if worker.exitcode]


def _as_child(sweep: Sweep, num_threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this one
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)  # the parent was killed

    threading.Thread(target=follow, daemon=True).start()
    work_elsewhere(sweep, num_threads)


@contextmanager
def _one_gpu(number: int) -> Iterator[None]:
    """What is started in here sees one GPU, another for each number as far as there are more."""
    name, count = "CUDA_VISIBLE_DEVICES", torch.cuda.device_count()
    before = os.environ.get(name)
    if count > 1:
        visible = before.split(",") if before else [str(n) for n in range(count)]
        os.environ[name] = visible[number % count]
    try:
        yield
    finally:
        if count > 1:
            os.environ.pop(name)
            os.environ |= {} if before is None else {name: before}


def on_ray(sweep: Sweep, address: str | None, jobs: int | None) -> list[str]:
    """`jobs` tasks on Ray, on this machine or on the cluster at `address`; by default one for each GPU, or else for
    each CPU. A task whose process dies is started again. Gives those that died for good, in words.

    Raises:
        ValueError: Ray is not installed, or there is no cluster at this address.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError("--ray needs the package ray: pip install 'midskip[sweep]'") from None
    try:
        ray.init(
            address=address,
            include_dashboard=False if address is None else None,
            log_to_driver=False,
            logging_level="ERROR",
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ValueError(f"Ray cannot be used at {address or 'this machine'}: {error}") from error
    try:
        resources: dict[str, float] = ray.cluster_resources()
        num_gpus, num_cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
        jobs = min(jobs or num_gpus or num_cpus, sweep.num_runs())
        cpus_each = max(1, num_cpus // jobs)
        task: Any = ray.remote(max_retries=RETRIES, num_cpus=cpus_each, num_gpus=min(1, num_gpus / jobs))(
            work_elsewhere
        )
        died = []
        for number, reference in enumerate([task.remote(sweep, cpus_each) for _ in range(jobs)]):
            try:
                ray.get(reference)
            except ray.exceptions.RayError as error:
                died.append(f"Ray task {number} ended with {str(error).strip().splitlines()[-1]}")
        return died
    finally:
        ray.shutdown()
