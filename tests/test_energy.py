"""Joules, read from counters that are simulated: files as the kernel has them, and a module as NVIDIA's."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from midskip.bench.energy import Domain, EnergyMeter, NoCounter, cpu_domains, gpu_domains

LIMIT_UJ = 262_143_328_850  # of the counters of many processors


class Machine:
    """Counters that go up with a clock that only `sleep` moves: name of each zone, its power, and its reading."""

    def __init__(self, root: Path) -> None:
        self.root, self.now_s = root, 0.0
        self.watts: dict[str, float] = {}
        self.joules: dict[str, float] = {}
        self.gpu_watts: dict[str, float] = {}
        self.gpu_joules: dict[str, float] = {}

    def zone(self, folder: str, name: str, watts: float, joules: float = 0.0) -> Path:
        path = self.root / folder
        path.mkdir(parents=True)
        (path / "name").write_text(name + "\n")
        (path / "max_energy_range_uj").write_text(f"{LIMIT_UJ}\n")
        self.watts[folder], self.joules[folder] = watts, joules
        self._write(folder)
        return path

    def _write(self, folder: str) -> None:
        counted = round(self.joules[folder] * 1e6) % (LIMIT_UJ + 1)
        (self.root / folder / "energy_uj").write_text(f"{counted}\n")

    def sleep(self, duration_s: float, times: float = 1.0) -> None:
        """Pass time, at so many times the power."""
        self.now_s += duration_s
        for folder, watts in self.watts.items():
            self.joules[folder] += times * watts * duration_s
            self._write(folder)
        for uuid, watts in self.gpu_watts.items():
            self.gpu_joules[uuid] = self.gpu_joules.get(uuid, 0.0) + times * watts * duration_s

    def meter(self, *devices: str) -> EnergyMeter:
        return EnergyMeter(*devices, root=self.root, clock=lambda: self.now_s, sleep=self.sleep)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Two packages, each with its cores, one with memory; beside them what must not be counted."""
    machine = Machine(tmp_path / "powercap")
    machine.zone("intel-rapl:0", "package-0", 40.0)
    machine.zone("intel-rapl:0:0", "core", 30.0)
    machine.zone("intel-rapl:0:1", "dram", 5.0)
    machine.zone("intel-rapl:1", "package-1", 50.0)
    machine.zone("intel-rapl:2", "psys", 200.0)
    machine.zone("intel-rapl-mmio:0", "package-0", 40.0)
    return machine


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """nvml(machine, fails=None): NVIDIA's module over the GPUs of a machine, torch's numbers the other way round."""

    def install(machine: Machine, fails: str | None = None) -> ModuleType:
        module = ModuleType("pynvml")

        class NVMLError(Exception):
            pass

        def step(name: str, give: Callable[..., object] = lambda *_: None) -> Callable[..., object]:
            def run(*arguments: object) -> object:
                if fails == name:
                    raise NVMLError("Not Supported")
                return give(*arguments)

            return run

        parts = {
            "NVMLError": NVMLError,
            "nvmlInit": step("nvmlInit"),
            "nvmlDeviceGetHandleByUUID": step("nvmlDeviceGetHandleByUUID", lambda uuid: uuid.removeprefix("GPU-")),
            "nvmlDeviceGetName": step("nvmlDeviceGetName", lambda handle: f"Fast {handle}"),
            "nvmlDeviceGetTotalEnergyConsumption": step(
                "nvmlDeviceGetTotalEnergyConsumption", lambda handle: round(machine.gpu_joules.get(handle, 0.0) * 1e3)
            ),
        }
        vars(module).update(parts)
        monkeypatch.setitem(sys.modules, "pynvml", module)
        uuids = list(machine.gpu_watts)[::-1]
        monkeypatch.setattr(
            torch.cuda,
            "get_device_properties",
            lambda device: SimpleNamespace(uuid=uuids[torch.device(device).index]),
        )
        return module

    return install


def test_joules_of_packages_and_memory_above_idle(machine: Machine) -> None:
    meter = machine.meter()
    assert meter.unavailable is None and meter.left_out is None
    assert [domain.name for domain in meter.domains] == ["package-0", "dram of package 0", "package-1"]
    meter.measure_idle(3.0)
    assert meter.idle_watts == pytest.approx([40, 5, 50])
    meter.start()
    machine.sleep(2.0, times=3.0)
    energy = meter.stop()
    assert energy is not None
    assert energy.duration_s == 2 and energy.gross_joules == pytest.approx(3 * 95 * 2)
    assert energy.joules == pytest.approx(2 * 95 * 2)
    assert meter.as_dict()["idle_watts"] == pytest.approx({"package-0": 40, "dram of package 0": 5, "package-1": 50})


def test_what_uses_no_more_than_idle_uses_nothing(machine: Machine) -> None:
    meter = machine.meter("cpu")
    meter.measure_idle(1.0)
    meter.start()
    machine.sleep(10.0)
    energy = meter.stop()
    assert energy is not None and energy.joules == pytest.approx(0, abs=1e-6) and energy.gross_joules > 900


def test_a_counter_that_wraps_around(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.zone("intel-rapl:0", "package-0", 100.0, joules=LIMIT_UJ / 1e6 - 250)
    meter = machine.meter()
    meter.measure_idle(1.0)
    meter.start()
    machine.sleep(2.0, times=2.0)
    energy = meter.stop()
    assert float((tmp_path / "intel-rapl:0" / "energy_uj").read_text()) < 1e9  # it did
    assert energy is not None and energy.gross_joules == pytest.approx(400, abs=1e-3)
    assert Domain("no end", lambda: 3.0).since(5.0) == -2  # nothing is made up where no range is known


def test_counters_for_root_alone(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    closed, read = machine.root / "intel-rapl:1" / "energy_uj", Path.read_text

    def read_text(path: Path, *arguments: object, **more: object) -> str:
        if path == closed:
            raise PermissionError(13, "Permission denied")
        return read(path, *arguments, **more)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(Path, "read_text", read_text)
    meter = machine.meter()
    assert meter.unavailable is not None and "root alone" in meter.unavailable and "chmod" in meter.unavailable
    meter.measure_idle(1.0)
    meter.start()
    assert meter.stop() is None  # a part of the sum is no sum
    assert meter.as_dict() == {"unavailable": meter.unavailable, "left_out": meter.left_out, "idle_watts": {}}


def test_a_counter_that_cannot_be_read(machine: Machine) -> None:
    counter = machine.root / "intel-rapl:1" / "energy_uj"
    counter.unlink()
    counter.mkdir()
    with pytest.raises(NoCounter, match=r"intel-rapl:1 cannot be read: Is a directory"):
        cpu_domains(machine.root)


def test_no_counter_at_all(tmp_path: Path) -> None:
    meter = Machine(tmp_path).meter("cpu")
    assert meter.unavailable == "this machine shows no energy counter of its processor (RAPL)"
    meter.measure_idle(1000.0)  # takes no time
    meter.start()
    assert meter.stop() is None


def test_counters_that_stand_still(machine: Machine) -> None:
    machine.watts["intel-rapl:0:1"] = 0.0
    meter = machine.meter()
    meter.measure_idle(1.0)
    assert meter.unavailable is None and len(meter.domains) == len(meter.idle_watts) == 2
    assert meter.left_out == "the energy counter of dram of package 0 does not move (a virtual machine?)"
    machine.watts["intel-rapl:1"] = 0.0
    meter = machine.meter()
    meter.measure_idle(1.0)
    assert meter.unavailable is not None and "of dram of package 0 and package-1 does not move" in meter.unavailable
    meter.start()
    assert meter.stop() is None  # one package would look like all
    assert meter.as_dict()["idle_watts"] == {}


def test_a_gpus_counter_that_stands_still(machine: Machine, nvml: Callable[..., ModuleType]) -> None:
    machine.gpu_watts = {"a": 0.0}
    nvml(machine)
    meter = machine.meter("cuda:0")
    meter.measure_idle(1.0)
    assert meter.unavailable == "the energy counter of GPU Fast a does not move (a virtual machine?)"
    meter.start()
    machine.sleep(1.0)
    assert meter.stop() is None  # the processor's alone would look like all


def test_all_that_is_left_out_beside_a_gpu_is_said(
    machine: Machine, nvml: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.gpu_watts = {"a": 50.0, "b": 0.0}
    machine.watts["intel-rapl:1"] = machine.watts["intel-rapl:0:1"] = 0.0
    nvml(machine)
    meter = machine.meter("cuda:1")
    meter.measure_idle(1.0)
    assert meter.unavailable is None and sum(meter.idle_watts) == pytest.approx(50 + 40)
    assert meter.left_out == "the energy counter of dram of package 0 and package-1 does not move (a virtual machine?)"
    both = machine.meter("cuda:1", "cpu")
    both.measure_idle(1.0)
    assert both.unavailable == meter.left_out, "the processor was asked for too"
    monkeypatch.setattr("midskip.bench.energy.cpu_domains", lambda root: cpu_domains(Path("nowhere")))
    meter = machine.meter("cuda:0", "cuda:1")
    meter.measure_idle(1.0)
    assert meter.unavailable is not None and meter.unavailable.startswith("this machine shows no energy counter")
    assert meter.unavailable.endswith("; the energy counter of GPU Fast b does not move (a virtual machine?)")


def test_idle_is_measured_for_as_long_as_counters_take_to_move(machine: Machine) -> None:
    for asked_s, taken_s in ((0.01, 0.5), (3.0, 3.0)):
        before_s = machine.now_s
        machine.meter().measure_idle(asked_s)
        assert machine.now_s - before_s == taken_s


def test_idle_has_to_be_measured_first(machine: Machine) -> None:
    meter = machine.meter()
    meter.start()
    with pytest.raises(RuntimeError, match="measure_idle first"):
        meter.stop()


def test_several_gpus_and_the_processor(machine: Machine, nvml: Callable[..., ModuleType]) -> None:
    machine.gpu_watts = {"a": 70.0, "b": 60.0, "c": 10.0}  # torch's number 0 is c
    nvml(machine)
    meter = machine.meter("cuda:1", "cuda:2")
    assert [domain.name for domain in meter.domains][:2] == ["GPU Fast b", "GPU Fast a"]
    meter.measure_idle(1.0)
    assert sum(meter.idle_watts) == pytest.approx(60 + 70 + 95)
    meter.start()
    machine.sleep(4.0, times=2.0)
    energy = meter.stop()
    assert energy is not None and energy.joules == pytest.approx(4 * 225)


def test_a_gpu_beside_a_processor_without_counter(tmp_path: Path, nvml: Callable[..., ModuleType]) -> None:
    machine = Machine(tmp_path)
    machine.gpu_watts = {"a": 100.0}
    nvml(machine)
    meter = machine.meter("cuda:0")
    assert meter.unavailable is None and meter.left_out is not None and "RAPL" in meter.left_out
    assert machine.meter("cuda:0", "cpu").unavailable == meter.left_out  # here the processor is asked for too
    meter.measure_idle(2.0)
    meter.start()
    machine.sleep(1.0, times=4.0)
    energy = meter.stop()
    assert energy is not None and energy.joules == pytest.approx(300)


@pytest.mark.parametrize("fails", ["nvmlInit", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetTotalEnergyConsumption"])
def test_a_gpu_that_does_not_count(machine: Machine, nvml: Callable[..., ModuleType], fails: str) -> None:
    machine.gpu_watts = {"a": 100.0}
    nvml(machine, fails)
    meter = machine.meter("cuda:0")
    assert meter.unavailable == "the GPU's energy counter cannot be read: Not Supported"
    assert meter.domains == []  # the processor's alone would look like all


def test_the_library_is_asked_for(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(NoCounter, match=r'pip install "midskip\[energy\]"'):
        gpu_domains([torch.device("cuda:0")])


def test_another_kind_of_device(machine: Machine) -> None:
    unavailable = machine.meter("mps").unavailable
    assert unavailable is not None and "kind mps" in unavailable


def test_the_real_library_has_what_is_called() -> None:
    pynvml = pytest.importorskip("pynvml")
    for name in ("nvmlInit", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetName", "nvmlDeviceGetTotalEnergyConsumption"):
        assert callable(getattr(pynvml, name))
    assert issubclass(pynvml.NVMLError, Exception)
