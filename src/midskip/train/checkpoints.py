"""Checkpoints that count only when whole, and what a run may find in its folder when it goes on.

`transformers.Trainer` writes a checkpoint file by file and resumes from whatever the newest folder holds: without its
optimizer, scheduler or random state, or with a byte of them changed, a run goes on, in silence, to another result. So a
marker with the name, the size and the checksum of every file is written last, and a checkpoint that does not match its
marker is not used.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from midskip.runs import write_atomically

MARKER_FILE = "complete.json"  # in a checkpoint: written last, {"step", "files": {name: bytes}, "sha256": {name: hex}}
REGULARIZER_FILE = "regularizer.json"  # in a checkpoint: the state of the regularizer
HISTORY_FILE = "history.jsonl"  # in the run folder: a line a step
PARTS = (
    "model*.safetensors",
    "optimizer*",
    "scheduler.pt",
    "trainer_state.json",
    "rng_state*.pth",
    REGULARIZER_FILE,
)


def mark_complete(checkpoint: Path) -> None:
    """Say that all of a checkpoint is written."""
    files = {
        str(file.relative_to(checkpoint)): file
        for file in sorted(checkpoint.rglob("*"))
        if file.is_file() and file.name != MARKER_FILE
    }
    marker = {
        "step": step_of(checkpoint),
        "files": {name: file.stat().st_size for name, file in files.items()},
        "sha256": {name: _sha256(file) for name, file in files.items()},
    }
    write_atomically(checkpoint / MARKER_FILE, json.dumps(marker, indent=1))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # a piece at a time


def fault_of(checkpoint: Path) -> str | None:
    """What keeps a checkpoint from being used, in words; None if it is whole."""
    try:
        marker = json.loads((checkpoint / MARKER_FILE).read_text(encoding="utf-8"))
        files, sums = marker["files"], marker.get("sha256", {})  # which early versions did not write
    except FileNotFoundError:
        return "was not written to its end"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"has a marker ({MARKER_FILE}) that cannot be read: {error}"
    if lacking := [name for name in files if not (checkpoint / name).is_file()]:
        return f"lacks {', '.join(lacking)}"
    if cut := [name for name, size in files.items() if (checkpoint / name).stat().st_size != size]:
        return f"has files of another size than were written: {', '.join(cut)}"
    if changed := [name for name, sum_ in sums.items() if _sha256(checkpoint / name) != sum_]:
        return f"has files with other bytes than were written: {', '.join(changed)}"
    if lacking := [part for part in PARTS if not any(checkpoint.glob(part))]:
        return f"lacks {', '.join(lacking)}"
    return None


def find_checkpoint(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest whole checkpoint, if any, and what is wrong with each newer one."""
    faults: dict[Path, str] = {}
    for checkpoint in sorted(checkpoints_in(folder), key=step_of, reverse=True):
        fault = fault_of(checkpoint)
        if fault is None:
            return checkpoint, faults
        faults[checkpoint] = fault
    return None, faults


def put_aside(faults: dict[Path, str], tell: Callable[[str], None]) -> None:
    """What is left of broken checkpoints must not mix with what the run will write there again."""
    for checkpoint, fault in faults.items():
        if (checkpoint / MARKER_FILE).is_file():
            aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)
            tell(f"{checkpoint.name} {fault}: set aside as {aside.name}, and the one before it used")
        else:
            shutil.rmtree(checkpoint)
            tell(f"{checkpoint.name} {fault}: removed, and the one before it used")


def newest_checkpoint(folder: Path, tell: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint, if any; newer ones are put out of the way, with a word to `tell`."""
    checkpoint, faults = find_checkpoint(folder)
    put_aside(faults, tell)
    return checkpoint


def remove_old(folder: Path, num_kept: int) -> None:
    """Keep the newest `num_kept` checkpoints."""
    for checkpoint in sorted(checkpoints_in(folder), key=step_of)[:-num_kept]:
        (checkpoint / MARKER_FILE).unlink(missing_ok=True)  # first: what is half removed must not pass for whole
        shutil.rmtree(checkpoint)


def checkpoints_in(folder: Path) -> list[Path]:
    """Folders named as the Trainer names its checkpoints."""
    return [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def check_disk(folder: Path, num_parameters: int, num_checkpoints: int, best: bool) -> None:
    """ValueError if the disk has no room for what a run writes.

    A checkpoint holds weights and two moments in float32; one more than is kept is there while it is being written;
    the model at the end, and the best one, are weights alone.
    """
    parent = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(parent).free
    num_copies = 3 * (num_checkpoints + 1) * (num_checkpoints > 0) + 1 + 2 * best
    there = sum(file.stat().st_size for path in checkpoints_in(folder) for file in path.rglob("*") if file.is_file())
    needed = num_copies * 4 * num_parameters - there
    if needed > free:
        gigabytes = 2**30
        raise ValueError(
            f"the run would write up to {math.ceil(needed / gigabytes * 10) / 10:g} GiB to {str(folder)!r} and its "
            f"disk has {free / gigabytes:.1f} GiB free: make room, give an --output on another disk, or keep fewer "
            "checkpoints (training.save_total_limit, training.save_steps=0 for none)"
        )


def history_until(path: Path, step: int) -> list[dict[str, Any]]:
    """The rows of a history up to `step`, which are also all that is left in the file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break  # cut short when the run was killed
        if row["step"] <= step:
            rows.append(row)
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows
