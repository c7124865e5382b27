"""`midskip prepare` whose disk is full, or that is interrupted, at any change of its folder: one line, and the same
command afterwards ends bit for bit where an undisturbed one does."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import write_documents

from midskip.cli import main

FAULTS = {
    "disk full": OSError(errno.ENOSPC, "No space left on device"),
    "read-only": OSError(errno.EROFS, "Read-only file system"),
    "interrupt": KeyboardInterrupt(),
}
CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
_faults: list[list[Any]] = []  # folder, changes to come before the fault, fault


def _look(event: str, args: tuple[Any, ...]) -> None:
    if not _faults or event not in CHANGES or not str(args[0]).startswith(_faults[-1][0]):
        return
    if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
        return
    _faults[-1][1] -= 1
    if not _faults[-1][1]:
        raise _faults[-1][2]


sys.addaudithook(_look)  # which stays as long as the process


@contextmanager
def faulty(folder: Path, number: int, fault: BaseException) -> Iterator[list[Any]]:
    """Have the change of that number, counted from 1, of what is in the folder fail; at [1] what is left of the
    number, above 0 if there were not so many."""
    _faults.append([str(folder), number, fault])
    try:
        yield _faults[-1]
    finally:
        _faults.pop()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("fault", FAULTS)
def test_prepare(tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str, step: int) -> None:
    text = write_documents(tmp_path / "text")
    before = contents(text)

    def prepare(name: str) -> int:
        options = ["--tokenizer=bytes", "--validation_share=0.2", "--shard_tokens=500"]
        return main(["prepare", str(text), f"--output={tmp_path / name}", *options])

    assert prepare("whole") == 0
    expected, out = contents(tmp_path / "whole"), tmp_path / "out"
    capsys.readouterr()
    for number in count(1, step):
        with faulty(out, number, FAULTS[fault]) as faults:
            status = prepare("out")
        if faults[1] > 0:
            break
        lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line or "interrupted" in line]
        if status or fault == "interrupt":  # else it could do without, as of a lock that is removed
            assert status == (130 if fault == "interrupt" else 2) and len(lines) == 1, (number, status, lines)
        assert prepare("out") == 0
        assert contents(out) == expected
        for path in sorted(out.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        out.rmdir()
    assert number > 20 and contents(text) == before
