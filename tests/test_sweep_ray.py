"""A sweep on Ray: a worker that is killed is started again, and all results are there."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import write_documents
from tiny_sweep import DENSE, write_sweep

pytestmark = pytest.mark.slow
pytest.importorskip("ray")

PROGRAM = """
import os, sys, time
from pathlib import Path
from midskip import cli
from midskip.sweep import work

train_run = work.train_run
def told(sweep, run):
    with Path("log").open("a") as file:
        file.write(f"{os.getpid()} {run.key}\\n")
    time.sleep(1)
    return train_run(sweep, run)

def work_elsewhere(sweep, num_threads):  # of this program, so that Ray sends it with the task
    from midskip.sweep import work
    work.train_run = told
    real(sweep, num_threads)

real = work.work_elsewhere
from midskip.sweep import executors
executors.work_elsewhere = work_elsewhere
sys.exit(cli.main(["sweep", "sweep.yaml", "--ray", "--jobs", "2"]))
"""


def test_a_worker_that_is_killed_is_started_again(tmp_path: Path) -> None:
    write_documents(tmp_path / "text")
    write_sweep(tmp_path, DENSE, seeds=[0, 1, 2, 3, 4])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    environment["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # Ray warns of it otherwise
    (tmp_path / "program.py").write_text(PROGRAM)
    with (tmp_path / "errors").open("w") as errors:
        driver = subprocess.Popen([sys.executable, "program.py"], cwd=tmp_path, env=environment, stderr=errors)
        try:
            while len(workers := started(tmp_path)) < 2 or sum(map(len, workers.values())) < 4:
                assert driver.poll() is None, (tmp_path / "errors").read_text()
                time.sleep(0.05)
            killed = next(iter(workers))
            os.kill(killed, signal.SIGKILL)
            assert driver.wait(timeout=300) == 0, (tmp_path / "errors").read_text()
        finally:
            driver.kill()
    workers = started(tmp_path)
    print(f"{killed} was killed; runs by worker: { {pid: len(keys) for pid, keys in workers.items()} }")
    assert len(workers) >= 3, "Ray has not started another worker"
    results = {path.stem for path in (tmp_path / "out" / "results").iterdir()}
    runs = [key for keys in workers.values() for key in keys]
    assert len(results) == 10 and set(runs) == results
    assert len(runs) <= 11, "only what the killed worker was in is begun again"


def started(folder: Path) -> dict[int, list[str]]:
    """The runs that each worker has begun, by its process."""
    found: dict[int, list[str]] = {}
    log = folder / "log"
    for line in log.read_text().splitlines() if log.is_file() else []:
        pid, key = line.split()
        found.setdefault(int(pid), []).append(key)
    return found
