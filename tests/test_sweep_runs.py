"""Sweeps that really train: what a run leaves, that it goes on where it was, and several processes at once.

This file as a program is what the tests kill: it imports everything once, and forks a process for each attempt.
"""

import gc
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_runs import QUIET, write_documents
from tiny_sweep import DENSE, RECIPE, stand_in, write_sweep

from midskip.runs import load_run
from midskip.sweep import read_sweep, run_sweep, work
from midskip.sweep.plan import Run, Sweep
from midskip.sweep.store import Store
from midskip.train import report as train_report
from midskip.train.trainer import MidskipTrainer

pytestmark = pytest.mark.integration

GRID = {"model.num_hidden_layers": [1, 2], "training.learning_rate": [0.001, 0.002, 0.003, 0.004, 0.005]}
FORTY = DENSE | {"grid": GRID}  # at four seeds


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    monkeypatch.chdir(tmp_path)
    write_documents(tmp_path / "text")
    return read_sweep(write_sweep(tmp_path, DENSE | {"grid": {}}))


# ---- the program


def log_runs(folder: Path) -> None:
    """Have each run write a line to `log` where it starts, and where its result has been written."""
    train_run, write_result = work.train_run, Store.write_result

    def log(word: str, key: str) -> None:
        with (folder / "log").open("a") as file:
            file.write(f"{word} {key}\n")

    def started(sweep: Sweep, run: Run) -> dict[str, Any]:
        log("start", run.key)
        return train_run(sweep, run)

    def finished(store: Store, key: str, result: dict[str, Any]) -> None:
        word = "again" if store.path("results", key).exists() else "finish"
        write_result(store, key, result)
        log(word, key)

    work.train_run, Store.write_result = started, finished


def fork(sweep: Sweep) -> int:
    """A process that does the sweep."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        run_sweep(sweep, console=QUIET)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def ended(pids: list[int]) -> list[int]:
    """Their statuses: 0, or minus the signal that killed them."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def num_lines(folder: Path) -> int:
    log = folder / "log"
    return log.read_text().count("\n") if log.is_file() else 0


def kill_ten_times(folder: Path) -> None:
    """Two processes on a sweep of 40 runs, killed ten times together."""
    write_documents(folder / "text")
    train_report.write_picture = lambda *args, **kwargs: None  # slow to draw
    sweep, moments = read_sweep(write_sweep(folder, FORTY, seeds=[0, 1, 2, 3])), random.Random(0)
    log_runs(folder)
    killed = []
    for _ in range(10):
        lines = num_lines(folder) + moments.randint(1, 6)  # of 80, so that ten kills come before the end
        pids = [fork(sweep) for _ in range(2)]
        while num_lines(folder) < lines:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.3))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        killed += ended(pids)
    last = ended([fork(sweep) for _ in range(2)])
    (folder / "ends.json").write_text(json.dumps([killed, last]))


def three_at_once(folder: Path) -> None:
    """Three processes on a sweep of 40 runs, that a stand-in does."""

    def slow(sweep: Sweep, run: Run) -> dict[str, Any]:
        time.sleep(0.01)
        return stand_in(sweep, run)

    work.train_run, work.PAUSE_S = slow, 0.01
    sweep = read_sweep(write_sweep(folder, FORTY, seeds=[0, 1, 2, 3]))
    log_runs(folder)
    (folder / "ends.json").write_text(json.dumps(ended([fork(sweep) for _ in range(3)])))


def run_program(name: str, folder: Path) -> Any:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, name, str(folder)]
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "ends.json").read_text())


def counts(folder: Path) -> dict[str, Counter[str]]:
    """How often each run did what."""
    found: dict[str, Counter[str]] = {"start": Counter(), "finish": Counter(), "again": Counter()}
    for line in (folder / "log").read_text().splitlines():
        word, key = line.split()
        found[word][key] += 1
    return found


# ---- the tests


def test_a_run_leaves_its_result_and_little_else(sweep: Sweep, no_pictures: None, on_the_cpu: None) -> None:
    run_sweep(sweep, console=QUIET)
    runs = sweep.runs({})
    for run in runs:
        result = json.loads((sweep.output / "results" / f"{run.key}.json").read_text())
        folder = sweep.output / "runs" / run.key
        assert result["report"] == json.loads((folder / "report.json").read_text())
        assert result["training_flops"] == result["report"]["training"]["flops"] > 0
        assert result["report"]["validation"]["kv_bytes_per_token"] == 4 * 2 * 16 * 4
        assert {path.name for path in folder.iterdir()} == {"report.json", "recipe.yaml", "history.jsonl"}
    assert len({run.seed for run in runs}) == 2
    assert len(list((sweep.output / "text").iterdir())) == 1, "text is prepared once for all runs"


def test_a_run_goes_on_inside(
    sweep: Sweep, no_pictures: None, on_the_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    original = MidskipTrainer.training_step

    def training_step(trainer: MidskipTrainer, *args: Any, **kwargs: Any) -> Any:
        if len(steps) == 1:
            steps.append(-1)
            raise KeyboardInterrupt
        steps.append(trainer.state.global_step)
        return original(trainer, *args, **kwargs)

    monkeypatch.setattr(MidskipTrainer, "training_step", training_step)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(sweep, console=QUIET)
    assert not any((sweep.output / "results").iterdir())
    run_sweep(read_sweep("sweep.yaml"), console=QUIET)
    assert steps == [0, -1, 1, 0, 1], "the first run goes on with its second step"


def test_labelled_data_need_no_text(sweep: Sweep, no_pictures: None, on_the_cpu: None) -> None:
    given = {"data": {"source": "pointers", "settings": {"num_training": 8, "num_validation": 2}, "length": 65}}
    Path("pointers.yaml").write_text(yaml.safe_dump(RECIPE | given))
    write_sweep(Path(), DENSE | {"recipe": "pointers.yaml", "grid": {}}, seeds=[0])
    pointers = read_sweep("sweep.yaml")
    run_sweep(pointers, console=QUIET)
    (result,) = (json.loads(path.read_text()) for path in (pointers.output / "results").iterdir())
    assert len(result["report"]["validation"]["accuracy_by_group"]) == 9
    assert not list((pointers.output / "text").iterdir())


def test_run_folders_can_be_kept(sweep: Sweep, no_pictures: None, on_the_cpu: None) -> None:
    write_sweep(Path(), DENSE | {"grid": {}}, keep_runs=True, seeds=[0])
    kept = read_sweep("sweep.yaml")
    run_sweep(kept, console=QUIET)
    model, _ = load_run(kept.output / "runs" / kept.runs({})[0].key)
    assert model.config.num_hidden_layers == 4


@pytest.mark.slow
def test_three_processes_do_each_run_once(tmp_path: Path) -> None:
    assert run_program("three_at_once", tmp_path) == [0, 0, 0]
    found = counts(tmp_path)
    assert len(found["start"]) == 40 and set(found["start"].values()) == {1}
    assert found["finish"] == found["start"] and not found["again"]


@pytest.mark.slow
def test_a_sweep_killed_ten_times_ends_with_every_run_once(tmp_path: Path) -> None:
    killed, last = run_program("kill_ten_times", tmp_path)
    found = counts(tmp_path)
    print(f"{killed.count(-9)} killed, {found['start'].total()} starts, {found['finish'].total()} logged finishes")
    assert killed == [-9] * 20 and last == [0, 0]
    results = sorted(path.stem for path in (tmp_path / "out" / "results").iterdir())
    assert len(results) == 40 and results == sorted(found["start"])
    assert set(found["finish"].values()) == {1} and not found["again"], "no run has finished twice"
    assert 40 < found["start"].total() <= 40 + killed.count(-9), "a run starts again only where it was killed"
    assert not any((tmp_path / "out" / "failed").iterdir()) and not any((tmp_path / "out" / "running").iterdir())


@pytest.mark.slow
def test_jobs_are_processes_that_die_with_their_parent(sweep: Sweep) -> None:
    write_sweep(Path(), FORTY, output="out", seeds=[0])
    command = [sys.executable, "-m", "midskip.cli", "sweep", "sweep.yaml", "--jobs", "2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    parent = subprocess.Popen(command, env=environment)
    store = Store(Path("out"))
    while not (len(list(Path("out/results").glob("*.json"))) >= 3 and len(store.running()) == 2):
        assert parent.poll() is None
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    time.sleep(3)
    for key in store.running():
        with store.claimed(key) as is_ours:
            assert is_ours, "a worker goes on although its parent was killed"
    assert len(list(Path("out/results").iterdir())) < 10
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert len(list(Path("out/results").glob("*.json"))) == 10 and "10 of 10 runs done" in done.stderr


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # what is imported stays as it is, in every process
    {"kill_ten_times": kill_ten_times, "three_at_once": three_at_once}[sys.argv[1]](Path(sys.argv[2]))
