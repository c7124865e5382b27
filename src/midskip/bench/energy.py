"""Joules that a stretch of work took above idle, from the counters a machine offers.

Processors of Intel and AMD count by package, some also for memory (RAPL); the Linux kernel gives the counters as files
in micro-joules. NVIDIA's GPUs count since the driver was loaded (NVML), read through NVIDIA's own `nvidia-ml-py`. A
counter is one domain; domains never overlap, so that their sum is the machine's.

There is no sum, and `unavailable` says why, if a counter of what is named (GPUs, or the processor with its memory)
cannot be read, or that of a GPU or a package of it does not move. What else does not count is left out, and `left_out`
says so: memory whose counter does not move, and beside a GPU the processor where it was not named (each of its counters
that does not move; all of them if one cannot be read).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SHORTEST_IDLE_S = 0.5  # in which every counter that works has moved
POWERCAP = Path("/sys/class/powercap")


class NoCounter(Exception):
    """Why a machine's energy cannot be read, in words."""


@dataclass(frozen=True)
class Domain:
    """One counter.

    Attributes:
        name: what it counts.
        read: joules since a moment that stays the same until the counter wraps around.
        range_joules: where it starts again at 0; None if it never does.
    """

    name: str
    read: Callable[[], float]
    range_joules: float | None = None

    def since(self, before_joules: float) -> float:
        """Joules since the reading `before_joules`, if the counter has wrapped around at most once."""
        used = self.read() - before_joules
        if used < 0 and self.range_joules is not None:
            used += self.range_joules
        return used


def cpu_domains(root: Path = POWERCAP) -> list[Domain]:
    """Every package of the processor, and its memory where that is counted apart.

    Left out is what lies within a package (its cores) or around it (`psys`, the whole board), and the same package
    counted a second time (`intel-rapl-mmio`).

    Raises:
        NoCounter: there is none, or one of them cannot be read.
    """
    zones = sorted(zone for zone in root.glob("intel-rapl:*") if (zone / "energy_uj").exists())
    domains = []
    for zone in zones:
        name = (zone / "name").read_text().strip()
        if not name.startswith(("package", "dram")):
            continue
        counter = zone / "energy_uj"
        try:
            counter.read_text()
        except PermissionError:
            raise NoCounter(
                "the processor's energy counters may be read by root alone: "
                f"`sudo chmod a+r {root}/intel-rapl*/energy_uj` opens them until the next start"
            ) from None
        except OSError as error:
            raise NoCounter(f"the processor's energy counter {zone.name} cannot be read: {error.strerror}") from None
        package = "" if name.startswith("package") else f" of package {zone.name.split(':')[1]}"
        limit = float((zone / "max_energy_range_uj").read_text()) / 1e6
        domains.append(Domain(name + package, lambda counter=counter: float(counter.read_text()) / 1e6, limit))
    if not domains:
        raise NoCounter("this machine shows no energy counter of its processor (RAPL)")
    return domains


def gpu_domains(devices: Sequence[torch.device]) -> list[Domain]:
    """One domain for each of the GPUs.

    Raises:
        NoCounter: the library or the driver is not there, or a GPU does not count.
    """
    try:
        import pynvml  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise NoCounter('a GPU\'s energy counter needs a library: `pip install "midskip[energy]"`') from None
    domains = []
    try:
        pynvml.nvmlInit()
        for device in devices:
            # by its own number: the driver's order need not be torch's, nor are all its GPUs torch's
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
            read = _joules_of(pynvml, handle)
            read()
            domains.append(Domain(f"GPU {pynvml.nvmlDeviceGetName(handle)}", read))
    except pynvml.NVMLError as error:
        raise NoCounter(f"the GPU's energy counter cannot be read: {error}") from None
    return domains


def _joules_of(pynvml: Any, handle: Any) -> Callable[[], float]:
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3


@dataclass(frozen=True)
class Energy:
    """What was used from one moment to another.

    Attributes:
        joules: above idle.
        gross_joules: all that the counters counted.
        duration_s: how long it took.
    """

    joules: float
    gross_joules: float
    duration_s: float


class EnergyMeter:
    """Reads the energy of work: of the processor, and of the GPUs that are named.

        meter = EnergyMeter("cpu")
        meter.measure_idle(3.0)
        meter.start()
        ...
        energy = meter.stop()  # None where nothing can be read; meter.unavailable says why

    A stretch must be shorter than a counter takes to wrap around (RAPL: some minutes under full load) and longer than
    it takes to move (RAPL 1 ms, NVML up to 0.1 s), or one of many. All that the machine does meanwhile is counted.

    Attributes:
        unavailable: why there are no joules; None if there are.
        domains: what is counted.
        left_out: what else is not counted, and why; None if all is.
        idle_watts: power of each domain at rest; empty until it was measured.
    """

    def __init__(
        self,
        *devices: torch.device | str,
        root: Path = POWERCAP,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ):
        kinds = {device: torch.device(device).type for device in devices or ("cpu",)}
        self.domains: list[Domain] = []
        self.unavailable: str | None = None
        self.left_out: str | None = None
        self.idle_watts: list[float] = []
        self._clock, self._sleep = clock, sleep
        try:
            for kind in kinds.values():
                if kind not in ("cpu", "cuda"):
                    raise NoCounter(f"the energy of a device of the kind {kind} cannot be read here")
            if gpus := [torch.device(device) for device, kind in kinds.items() if kind == "cuda"]:
                self.domains = gpu_domains(gpus)
        except NoCounter as reason:
            self.unavailable = str(reason)
            return
        self._needed = list(self.domains)
        try:
            processor = cpu_domains(root)
        except NoCounter as reason:
            self.left_out = str(reason)
            self.unavailable = self.left_out if "cpu" in kinds.values() else None
            return
        self.domains += processor
        if "cpu" in kinds.values():
            self._needed += [domain for domain in processor if domain.name.startswith("package")]

    def measure_idle(self, duration_s: float = 3.0) -> None:
        """Take the power at rest over so many seconds, at least 0.5, in which nothing else should run. Counters that do
        not move meanwhile, as in some virtual machines, are taken for dead."""
        if self.unavailable:
            return
        before, start_s = [domain.read() for domain in self.domains], self._clock()
        self._sleep(max(duration_s, SHORTEST_IDLE_S))
        duration_s = self._clock() - start_s
        used = [domain.since(joules) for domain, joules in zip(self.domains, before, strict=True)]
        if dead := [domain for domain, joules in zip(self.domains, used, strict=True) if not joules]:
            names = " and ".join(domain.name for domain in dead)
            reason = f"the energy counter of {names} does not move (a virtual machine?)"
            self.left_out = f"{self.left_out}; {reason}" if self.left_out else reason
            self.domains = [domain for domain in self.domains if domain not in dead]
            if any(domain in self._needed for domain in dead):
                self.unavailable = self.left_out
                return
        self.idle_watts = [joules / duration_s for joules in used if joules]

    def start(self) -> None:
        """Begin a stretch. A GPU must have been waited for."""
        self._before, self._start_s = [domain.read() for domain in self._usable()], self._clock()

    def stop(self) -> Energy | None:
        """End the stretch that `start` began. A GPU must have been waited for.

        Raises:
            RuntimeError: `measure_idle` has not run.
        """
        domains = self._usable()
        if not domains:
            return None
        if not self.idle_watts:
            raise RuntimeError("energy is asked for and the power at rest is not known: call measure_idle first")
        duration_s = self._clock() - self._start_s
        used = sum(domain.since(joules) for domain, joules in zip(domains, self._before, strict=True))
        return Energy(used - sum(self.idle_watts) * duration_s, used, duration_s)

    def _usable(self) -> list[Domain]:
        return [] if self.unavailable else self.domains

    def as_dict(self) -> dict[str, Any]:
        """What is known of the counters, for a report."""
        names = [domain.name for domain in self._usable()]
        idle_watts = dict(zip(names, self.idle_watts, strict=False))
        return {"unavailable": self.unavailable, "left_out": self.left_out, "idle_watts": idle_watts}
