"""The command line: `midskip COMMAND ...`; commands are in commands/."""

from __future__ import annotations

import importlib
import os
import re
import sys
import sysconfig
import traceback
import warnings
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from midskip.commands.parser import COMMANDS
from midskip.plugins import search_folder


def program() -> NoReturn:
    """`main` as a process. One that failed ends once that is told, whatever else still runs in it: threads of loaders
    and of logs, or what a library does at exit, must not keep a terminal or a queue of jobs waiting."""
    try:
        status = main()
    except Exception:
        traceback.print_exc()
        status = 1
    if status == 0:
        sys.exit(0)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(status)


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, 1 for a run that failed, 2 for input that cannot be used."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"  {name:<10} {text}" for name, text in COMMANDS.items()]
        print(
            "usage: midskip COMMAND ...\n\n"
            + "\n".join(lines)
            + "\n\n`midskip COMMAND --help` tells more, `midskip --version` which one this is."
        )
        return 0
    if arguments[0] == "--version":
        print(f"midskip {sys.modules['midskip'].__version__}")
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        return _fail(f"there is no command {command!r}; expected one of {', '.join(COMMANDS)}", 2)
    if command in ("train", "sweep") or any(option.partition("=")[0] == "--trust" for option in rest):
        search_folder(Path.cwd())  # a recipe's own policy or regularizer may lie beside it
    shown = warnings.formatwarning
    warnings.formatwarning = _one_line
    try:
        importlib.import_module(f"midskip.commands.{command}").run(rest)
    except (ValueError, OSError) as error:
        return _fail(str(error) + _place_in_user_code(error), 2)
    except FloatingPointError as error:
        return _fail(str(error), 1)
    except RuntimeError as error:
        from midskip.bench import DisagreementError
        from midskip.budget.monitor import BudgetDriftError
        from midskip.sweep import FailedRunsError

        if not isinstance(error, BudgetDriftError | DisagreementError | FailedRunsError):
            raise
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    finally:
        warnings.formatwarning = shown
    return 0


def _one_line(message: Warning | str, *where: object, **line: object) -> str:
    """A warning as a command tells it, without the place in the code."""
    return _harmless(f"midskip: warning: {message}") + "\n"


def _harmless(text: str) -> str:
    from midskip.report import visible

    return visible(re.sub(r"\s*\n\s*", " ", text))


def _place_in_user_code(error: BaseException | None) -> str:
    """Where an error arose, if in a file of the user's own, as that of a policy: " (in my_policies.py, line 12)"."""
    others = [Path(__file__).parent, Path(sysconfig.get_path("stdlib"))]
    while error is not None:
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            file = Path(frame.filename)
            is_installed = {"site-packages", "dist-packages"} & set(file.parts)
            if file.suffix == ".py" and not is_installed and not any(map(file.is_relative_to, others)):
                return f" (in {file.name}, line {frame.lineno})"
        error = error.__cause__
    return ""


def _fail(message: str, status: int) -> int:
    return _say(f"error: {message}", status)


def _say(text: str, status: int) -> int:
    line = _harmless(f"midskip: {text}")
    Console(stderr=True).print(line, style="red", markup=False, highlight=False, emoji=False, soft_wrap=True)
    return status


if __name__ == "__main__":
    program()
