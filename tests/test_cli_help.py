"""The command line without a run: its help, and that it is a program."""

import os
import subprocess
import sys
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


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("demo", ["--output", "--steps", "--source", "pydocs"]),
        ("prepare", ["source", "--output", "--tokenizer", "--validation_share", "--max_tokens", "--shard_tokens"]),
        ("train", ["RECIPE.yaml", "--resume", "--accept_changes", "--training.learning_rate", "width of the hidden"]),
        ("sweep", ["SWEEP.yaml", "--jobs", "--ray", "ADDRESS", "--list"]),
        ("retrofit", ["model", "--data", "--validation", "--choice", "--distil_steps", "--share", "--skip_path"]),
        ("calibrate", ["--data", "--lowest", "--max_tokens", "--batch_size", "--name"]),
        ("evaluate", ["--data", "--batch_size", "--output", "--budgets", "--picture"]),
        (
            "generate",
            ["--prompt", "--temperature", "--seed", "--budget", "--max_layers", "--on_drift", "--draft_budget"],
        ),
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
    tested = {"demo", "prepare", "train", "sweep", "calibrate", "evaluate", "generate", "frontier", "bench", "retrofit"}
    assert set(cli.COMMANDS) == tested, "else a command is not tested"


def test_the_defaults_of_retrofit_are_those_of_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[RetrofitSettings] = []
    monkeypatch.setattr("midskip.retrofit.retrofit", given.append)
    assert main(["retrofit", "m", "--data", "d", "--validation", "v=t", "--output", "o"]) == 0
    assert given == [RetrofitSettings("m", "d", {"v": "t"}, "o")]


def test_it_runs_as_a_program(tmp_path: Path) -> None:
    """With its exit status, and no word from Python."""
    path = os.pathsep.join([str(Path(midskip.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "midskip.cli", "generate", str(tmp_path / "none"), "--prompt", "a"],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("midskip: error: there is no folder") and done.stderr.count("\n") == 1
