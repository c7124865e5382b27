"""An output folder is written by one command at a time, and is free again when that one has ended or died."""

import errno
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_runs import QUIET, write_documents

from midskip import locks
from midskip.cli import main
from midskip.locks import LOCK_FILE, locked
from midskip.runs import write_atomically
from midskip.train import Recipe, train

pytestmark = pytest.mark.usefixtures("on_the_cpu", "no_pictures")
HOLD = f"""
import runpy, sys, time
from pathlib import Path
with runpy.run_path({locks.__file__!r})["locked"](Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def hold() -> Iterator[Callable[[Path], subprocess.Popen[bytes]]]:
    """hold(folder): a process that holds the folder until it is killed."""
    holders: list[subprocess.Popen[bytes]] = []

    def start(folder: Path) -> subprocess.Popen[bytes]:
        holders.append(subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE))
        assert holders[-1].stdout and holders[-1].stdout.readline() == b"held\n"
        return holders[-1]

    yield start
    for holder in holders:
        holder.kill()
        holder.communicate()


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def in_use(folder: Path, holder: int) -> str:
    """The refusal, as a pattern."""
    since = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d"
    return rf"{re.escape(repr(str(folder)))} is in use by process {holder} on {socket.gethostname()} since {since}; "


def test_a_folder_is_free_when_its_holder_has_died(tmp_path: Path, hold: Callable) -> None:
    folder = tmp_path / "some" / "run"
    holder = hold(folder)
    for _ in range(2):  # a refusal does not change what the next one says
        with pytest.raises(ValueError, match=in_use(folder, holder.pid)), locked(folder):
            pass
    holder.kill()
    holder.wait()
    assert (folder / LOCK_FILE).is_file()
    with locked(folder):
        assert f"process {os.getpid()} " in (folder / LOCK_FILE).read_text()
    assert list(folder.iterdir()) == []


def test_nothing_is_left_of_a_lock(tmp_path: Path) -> None:
    for name in ("empty", "full"):
        with locked(tmp_path / name / "run"):
            if name == "full":
                (tmp_path / name / "run" / "file").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "run", "file"]


def test_a_run_beside_a_live_one_is_refused(make_recipe: Callable[..., Recipe], hold: Callable) -> None:
    recipe = make_recipe(max_steps=2, save_steps=1)
    folder = Path(recipe.output)
    holder = hold(folder)
    with pytest.raises(ValueError, match=in_use(folder, holder.pid)):
        train(recipe, console=QUIET)
    assert [path.name for path in folder.iterdir()] == [LOCK_FILE]
    holder.kill()
    holder.wait()
    train(recipe, console=QUIET)  # what the dead one left of its lock is no run
    assert not (folder / LOCK_FILE).exists()
    (folder / LOCK_FILE).write_text("left by one that was killed at the end")
    train(recipe, resume=True, console=QUIET)
    assert not (folder / LOCK_FILE).exists()
    (folder / "page.html").unlink()
    holder = hold(folder)
    before = files(folder)
    with pytest.raises(ValueError, match=in_use(folder, holder.pid)):
        train(recipe, resume=True, console=QUIET)
    assert files(folder) == before


@pytest.mark.parametrize("command", ["train", "prepare", "retrofit", "demo"])
def test_every_command_says_who_holds_the_folder(
    tmp_path: Path, hold: Callable, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    text = str(write_documents(tmp_path / "text"))
    (tmp_path / "recipe.yaml").write_text("model: {num_hidden_layers: 2}\n")
    arguments = {
        "train": [str(tmp_path / "recipe.yaml"), f"--data.source={text}"],
        "prepare": [text],
        "retrofit": [str(tmp_path / "no_model"), "--data", text, "--validation", f"held_out={text}"],
        "demo": ["--source", text],
    }
    folder = tmp_path / "out"
    holder = hold(folder)
    assert main([command, *arguments[command], "--output", str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"midskip: error: {in_use(folder, holder.pid)}expected .*, or give another --output", line)
    assert [path.name for path in folder.iterdir()] == [LOCK_FILE]


def test_prepared_text_is_read_by_many(tmp_path: Path, hold: Callable) -> None:
    arguments = ["prepare", str(write_documents(tmp_path / "text")), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--vocab_size=300", "--validation_share=0.2"]) == 0
    holder = hold(tmp_path / "out")
    for is_held in (True, False):
        assert main([*arguments, "--vocab_size=300", "--validation_share=0.2"]) == 0
        assert (tmp_path / "out" / LOCK_FILE).exists() == is_held, "what a dead one left is removed"
        holder.kill()
        holder.wait()


def test_a_file_without_room_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **named: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*sweep.json'"):
        write_atomically(tmp_path / "sweep.json", "{}")
