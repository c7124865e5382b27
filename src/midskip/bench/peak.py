"""What a device could do, and the most memory that a stretch of work takes."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from midskip.train.peak import BFLOAT16_PEAKS, known_name

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def flops_per_s(device: torch.device | str, dtype: torch.dtype) -> float | None:
    """The peak of a known GPU in half precision, by its data sheet; None for anything else."""
    if torch.device(device).type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = known_name(torch.cuda.get_device_name(device))
    return None if name is None else BFLOAT16_PEAKS[name]


def peak_bytes(work: Callable[[], Any], device: torch.device | str) -> int | None:
    """The most memory that the work takes at once, above what is there before it; None where it cannot be told.

    On a GPU what torch has handed out; on a CPU the resident set of this process, as Linux counts it.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # or what was freed before would be used again, and not be seen
    try:
        CLEAR.write_text("5")  # the peak starts from here
        before = _status("VmRSS")
    except OSError:
        return None
    work()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
