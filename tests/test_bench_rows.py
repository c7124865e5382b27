"""What `midskip bench` makes of seconds, work and joules: turns, statistics, rows, table and picture."""

import random
import shutil
import subprocess
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from tiny_bench import ids

from midskip.bench.models import Side
from midskip.bench.results import case_rows, commit
from midskip.bench.table import case_table
from midskip.bench.tasks import Decode, Work
from midskip.bench.timing import Clock, interleave, quantile, spread, stretch_mean
from midskip.report.speed import write_speed_picture


def test_quantiles() -> None:
    values = [float(number) for number in random.Random(0).sample(range(101), 101)]
    assert [quantile(values, share) for share in (0, 0.5, 0.95, 0.99, 1)] == [0, 50, 95, 99, 100]
    assert quantile([1.0, 2.0], 0.25) == 1.25 and quantile([7.0], 0.99) == 7
    assert spread([4.0, 1.0, 2.0, 3.0, 5.0]) == {"median": 3, "lower": 2, "upper": 4}
    for wrong in ([], [1.0]):
        with pytest.raises(ValueError, match="quantile"):
            quantile(wrong, 1.5)


def test_the_mean_of_a_stretch_is_of_the_medians_of_its_steps() -> None:
    assert stretch_mean([[1.0, 10.0], [2.0, 20.0], [300.0, 12.0]]) == (2 + 12) / 2


def test_sides_take_turns_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, calls, begun = 0.0, [], []

    def begin(name: str) -> Callable[[], Callable[[int], None]]:
        def step(number: int) -> None:
            nonlocal now_s
            calls.append((name, number))
            now_s += {"a": 1.0, "b": 2.0}[name] * (number + 1)

        def make() -> Callable[[int], None]:
            nonlocal now_s
            begun.append(name)
            now_s += 100  # making ready is not timed
            return step

        return make

    monkeypatch.setattr("time.perf_counter", lambda: now_s)
    ticks: list[int] = []
    seconds = interleave(
        {name: begin(name) for name in "ab"}, 3, 20, random.Random(0), Clock(), lambda: ticks.append(1)
    )
    assert seconds == {"a": [[1, 2, 3]] * 20, "b": [[2, 4, 6]] * 20}
    assert len(begun) == len(ticks) == 2 * 21  # one turn is warm-up
    assert [number for _, number in calls] == [0, 0, 1, 1, 2, 2] * 21
    firsts = [calls[place][0] for place in range(0, len(calls), 2)]
    assert 20 < firsts.count("a") < 43  # the order is drawn


def test_rows_of_known_times() -> None:
    works = {
        "llama": Work(1.0, 100, [1], 1, 60, 40, 10, 20),
        "llama, static cache": Work(1.0, 100, [1], 1, 60, 40, 10, 20),
        "skip 0.5": Work(0.5, 60, [1], 1, 35, 15, 5, 12),
    }
    times = {"llama": [[4.0, 4.0]], "llama, static cache": [[2.0, 3.0]], "skip 0.5": [[1.0, 2.0]]}
    joules = {"llama": [8.0], "llama, static cache": [9.0], "skip 0.5": [2.0]}
    sides = [Side(name, None, 0.5 if "skip" in name else None) for name in works]
    case = {"dtype": "float32", "norms": "sandwich", "gates": "fixed", "compiled": False}
    peaks = {"llama": 40, "llama, static cache": 44, "skip 0.5": 30}
    rows = case_rows(case, Decode(ids(2, 5), 2), sides, times, works, joules, peaks, 100.0)
    ratios = rows[-1]["ratios"]
    assert ratios["llama"] == {
        "of": "llama", "time": 1.5 / 4, "median_time": 1.5 / 4, "flops": 0.6, "work": 0.5, "time_over_work": 0.75,
        "kv_used_bytes": 0.5, "kv_allocated_bytes": 0.6, "peak_bytes": 0.75, "joules": 0.25,
    }  # fmt: skip
    assert ratios["fastest_llama"]["of"] == "llama, static cache" and ratios["fastest_llama"]["time"] == 0.6
    assert "dense" not in ratios
    assert rows[-1]["utilisation"] == pytest.approx(60 / 2 / 1.5 / 100)  # two steps, each 1.5 s
    assert rows[-1]["step_s"] == {"median": 1.5, "p95": pytest.approx(1.95), "p99": pytest.approx(1.99)}
    screen = Console(file=StringIO(), width=120)
    rows[-1]["side"] = "skip \x1b[31m[bold]"
    screen.print(case_table(rows))
    assert isinstance(screen.file, StringIO)
    text = screen.file.getvalue()
    assert "\x1b" not in text and "[31m[bold]" in text
    cells = {line.split("│")[1].strip(): line.split("│")[4].strip() for line in text.splitlines() if "│" in line}
    assert cells["of Llama, static cache"] == "0.600" and cells["time / bytes read, of Llama"] == "0.750"


def test_the_picture_needs_points(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no points"):
        write_speed_picture(tmp_path / "empty.png", {"decode": {"a": []}})
    write_speed_picture(tmp_path / "one.png", {"decode": {"a": [(0.5, 0.6)]}}, "a $title")
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


def test_the_commit_says_whether_files_differ_from_it(tmp_path: Path) -> None:
    if shutil.which("git") is None:
        pytest.skip("there is no git")
    assert commit(tmp_path) is None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    (tmp_path / "file").write_text("a")
    for arguments in (["init"], ["add", "file"], ["commit", "-m", "first"], ["tag", "-a", "v1", "-m", "one"]):
        git(*arguments)
    assert commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("b")
    assert commit(tmp_path) == git("rev-parse", "HEAD") + "-dirty"
