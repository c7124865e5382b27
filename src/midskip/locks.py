"""An output folder is written by one command at a time, and what hinders it is an error of the system."""

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

LOCK_FILE = ".midskip.lock"  # in the folder, while a command writes there; says which


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps the folder, which is made if it does not exist, for this process: to the end, or to its death of any kind.

    Nothing is left of the lock at the end, nor of folders that were made for it and are still empty.

    Raises:
        ValueError: another process has it.
        OSError: what is written in here finds no room, or the like, whatever library writes it.
    """
    made = [path for path in (folder.absolute(), *folder.absolute().parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / LOCK_FILE
    lock = FileLock(file, timeout=0)
    before = _holder(file)  # some versions of filelock empty the file
    try:
        lock.acquire()
    except Timeout:
        holder = _holder(file) or before or "another process"
        raise ValueError(
            f"{str(folder)!r} is in use by {holder}; expected a folder that nobody else writes to: wait until that one "
            "has ended, or give another --output"
        ) from None
    try:
        since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        with errors_of_the_system(folder):
            file.write_text(f"process {os.getpid()} on {socket.gethostname()} since {since}", encoding="utf-8")
            yield
    finally:
        try:
            with suppress(OSError):
                file.unlink()  # while it is locked: who has opened it by now sees that it is gone, and tries again
        finally:
            lock.release()  # if interrupted too
        with suppress(OSError):
            for path in made:
                path.rmdir()


def tidy(folder: Path) -> None:
    """Remove what a process left of its lock that died with all else done."""
    if (folder / LOCK_FILE).exists():
        with suppress(ValueError, OSError), locked(folder):
            pass


@contextmanager
def errors_of_the_system(place: Path) -> Iterator[None]:
    """A write that fails is an OSError with the path `place`, also from safetensors, tokenizers and torch, which have
    other kinds for it."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(place)) from error
    except Exception as error:
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(place)) from error
        if isinstance(error, RuntimeError) and re.search(
            "inline_container|PytorchStreamWriter|iostream error", str(error)
        ):
            raise OSError(
                f"a file in {str(place)!r} could not be written to its end, probably for lack of room: make room on "
                f"its disk, and give the same command again ({error})"
            ) from error
        raise


def _holder(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
