"""The command line without a run: its help, and that it is a program."""

import os
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest

import midskip
from midskip import cli
from midskip.cli import main
from midskip.retrofit import RetrofitSettings


def test_midskip_alone_tells_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["-h"], ["--help"]):
        assert main(arguments) == 0
        out = capsys.readouterr().out
        assert out.startswith("usage: midskip COMMAND")
        assert all(f"  {command} " in out for command in cli.COMMANDS)


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"midskip {midskip.__version__}\n"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("demo", ["--output", "--steps", "--source", "pydocs"]),
        ("prepare", ["source", "--output", "--tokenizer", "--validation_share", "--max_tokens", "--shard_tokens"]),
        ("train", ["RECIPE.yaml", "--resume", "--accept_changes", "--training.learning_rate", "width of the hidden"]),
        ("sweep", ["SWEEP.yaml", "--jobs", "--ray", "ADDRESS", "--list"]),
        ("retrofit", ["model", "--data", "--validation", "--choice", "--distil_steps", "--share", "--skip_path"]),
        ("calibrate", ["--data", "--lowest", "--max_tokens", "--batch_size", "--name"]),
        ("card", ["run", "--name", "--trust", "license", "evaluated.json"]),
        ("evaluate", ["--data", "--batch_size", "--output", "--budgets", "--picture"]),
        (
            "generate",
            ["--prompt", "--temperature", "--seed", "--budget", "--max_layers", "--on_drift", "--draft_budget"],
        ),
        ("serve", ["--budget", "--max_layers", "--host", "127.0.0.1", "--replicas", "--trust"]),
        ("app", ["run", "--host", "127.0.0.1", "--port", "--text_file", "--open", "--trust"]),
        ("frontier", ["--output", "--cost", "kv_bytes"]),
        ("bench", ["--tasks", "--batch_sizes", "--shares", "--dtypes", "--gates", "--run", "--shape", "--output"]),
    ],
)
def test_every_command_has_help(command: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        assert main([command, "--help"]) == 0
    except SystemExit as end:
        assert end.code == 0
    out = capsys.readouterr().out
    assert f"midskip {command}" in out and [word for word in words if word not in out] == []
    tested = "demo prepare train sweep retrofit calibrate evaluate card generate serve app frontier bench"
    assert set(cli.COMMANDS) == set(tested.split()), "else a command is not tested"


NO_TORCH = """
import contextlib, io, sys
import midskip_command
from midskip.cli import main

RECIPE = sys.argv[1]

def says(*arguments):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            status = main(list(arguments))
        except SystemExit as end:
            status = end.code
    assert "midskip" in out.getvalue(), out.getvalue()
    loaded = {"torch", "transformers", "matplotlib", "datasets"} & set(sys.modules)
    assert not loaded, f"midskip {' '.join(arguments)} imports {loaded}"
    return status

assert says() == says("--help") == says("--version") == 0
from midskip.commands.parser import COMMANDS

for command in COMMANDS:
    assert says(command, "--help") == 0
    assert says(command, "--unknown") == 2
assert says("trian") == says("train", "none.yaml") == 2
assert says("train", RECIPE, "--training.max_steps=0") == 2

import midskip  # what a user's own policy may do
for name in midskip.__all__:
    assert name in dir(midskip) and getattr(midskip, name).__name__ == name
from midskip.bench import DisagreementError
from midskip.train import train
from transformers import AutoConfig
assert type(AutoConfig.for_model("midskip")) is midskip.MidskipConfig
"""

INTERRUPTED = """
import sys

class Interrupt:
    def find_spec(self, name, *_):
        if name == "WHERE":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupt())
import midskip_command
sys.argv = ["midskip", "generate", "none", "--prompt", "a"]
sys.exit(midskip_command.main())
"""


LINGERING = """
import atexit, sys, threading, time
import midskip.commands.train as command

def run(arguments):
    threading.Thread(target=time.sleep, args=(1000,)).start()
    atexit.register(time.sleep, 1000)
    raise {"input": ValueError, "code": TypeError}[sys.argv[3]]("it failed")

command.run = run
sys.argv[1], start = "train", sys.argv[1]
if start == "midskip_command":
    import midskip_command
    sys.exit(midskip_command.main())
import runpy
runpy.run_module(start, run_name="__main__", alter_sys=False)
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(midskip.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path}
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.integration
def test_help_and_refused_arguments_do_not_wait_for_torch(tmp_path: Path) -> None:
    """And a module of a user's own can import all that is public, as it can elsewhere."""
    pyproject = Path(midskip.__file__).parents[2] / "pyproject.toml"
    assert tomllib.loads(pyproject.read_text())["project"]["scripts"] == {"midskip": "midskip_command:main"}
    (tmp_path / "recipe.yaml").write_text("{}")
    done = python("-c", NO_TORCH, str(tmp_path / "recipe.yaml"))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("module", ["midskip.cli", "torch"])
def test_an_interrupt_during_imports_is_one_line(module: str) -> None:
    done = python("-c", INTERRUPTED.replace("WHERE", module))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "midskip: interrupted\n")


@pytest.mark.parametrize(
    ("start", "kind", "status", "said"),
    [
        ("midskip_command", "input", 2, "midskip: error: it"),
        ("midskip", "code", 1, "TypeError: it"),
        ("midskip.cli", "input", 2, "midskip: error: it"),
    ],
)
@pytest.mark.integration
def test_no_process_outlives_its_error(start: str, kind: str, status: int, said: str) -> None:
    done = python("-W", "ignore", "-c", LINGERING, start, "recipe.yaml", kind)
    assert done.returncode == status and f"{said} failed\n" in done.stderr and not done.stdout


@pytest.mark.integration
def test_importing_midskip_is_enough_for_the_auto_classes() -> None:
    code = "import midskip; from transformers import AutoConfig, AutoModelForCausalLM as A; "
    code += "config = AutoConfig.for_model('midskip'); assert type(config) in A._model_mapping"
    done = python("-c", code)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_defaults_of_retrofit_are_those_of_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[RetrofitSettings] = []
    monkeypatch.setattr("midskip.retrofit.retrofit", given.append)
    assert main(["retrofit", "m", "--data", "d", "--validation", "v=t", "--output", "o"]) == 0
    assert given == [RetrofitSettings("m", "d", {"v": "t"}, "o")]


def test_a_warning_is_one_line_without_a_place_in_the_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def warned(arguments: list[str]) -> None:  # as Python tells a warning; under pytest it tells none
        print(warnings.formatwarning(UserWarning("of two\n  lines\x1b"), UserWarning, "file.py", 3), end="")

    monkeypatch.setattr("midskip.commands.generate.run", warned)
    shown = warnings.formatwarning
    assert main(["generate"]) == 0
    assert capsys.readouterr().out == "midskip: warning: of two lines␛\n"
    assert warnings.formatwarning is shown


@pytest.mark.integration
def test_it_runs_as_a_program(tmp_path: Path) -> None:
    """With its exit status, and no word from Python."""
    done = python("-m", "midskip.cli", "generate", str(tmp_path / "none"), "--prompt", "a")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("midskip: error: there is no folder") and done.stderr.count("\n") == 1
