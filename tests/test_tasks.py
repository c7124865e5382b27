"""What `midskip evaluate --tasks` refuses before anything is read; that it measures is in test_hf_lm_eval.py."""

import sys
from pathlib import Path

import pytest

from midskip.cli import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "piqa"], "tasks are those of lm_eval, which is not installed: pip install 'midskip[tasks]'"),
        (["--tasks", "piqa", "--include_path", "nowhere"], "there is no folder 'nowhere' of tasks"),
        (["--tasks", "piqa", "--data", "text"], "--tasks bring their own text: leave --data, --picture and --page out"),
    ],
)
def test_what_is_refused(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert main(["evaluate", "run", *arguments]) == 2
    assert message in capsys.readouterr().err
