"""Tests with several ranks: a program of its own, which forks one process for each."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch


def start_ranks(run_rank: Callable[..., None], *arguments: Any, num_ranks: int = 2, method: str = "fork") -> None:
    """run_rank(rank, first argument, a free port, the other arguments) in a process for each rank, to their ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    first, *others = arguments
    torch.multiprocessing.start_processes(run_rank, (first, port, *others), nprocs=num_ranks, start_method=method)


def run_program(file: str, *arguments: Any, timeout_s: int, device: str = "cpu") -> None:
    """Run a file of the tests as a program; on a CPU it sees no GPU."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, file, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, done.stderr
