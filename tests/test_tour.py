"""The tour runs from top to bottom, with small numbers."""

import re
import runpy
from pathlib import Path

import pytest

from midskip import MidskipForCausalLM

TOUR = Path(__file__).parent.parent / "examples" / "tour.py"


@pytest.mark.slow
@pytest.mark.usefixtures("on_the_cpu")
def test_the_tour_runs(
    tmp_path: Path, pydocs_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(pydocs_cache))
    for name, value in (("FOLDER", str(tmp_path / "tour")), ("STEPS", "3"), ("WIDTH", "16")):
        monkeypatch.setenv(f"TOUR_{name}", value)
    names = runpy.run_path(str(TOUR))
    printed = capsys.readouterr().out
    assert len(re.findall(r"^budget 0\.\d\d: .* FLOPs for one window", printed, re.MULTILINE)) == 3
    assert names["prices"][0]["texts"]["held out"]["price"] == 0 and len(names["prices"]) > 3
    assert (tmp_path / "tour/gated/page.html").is_file()
    assert "## What budgets cost" in (tmp_path / "tour/retrofit/README.md").read_text(encoding="utf-8")
    assert MidskipForCausalLM.from_pretrained(tmp_path / "tour/mine").config.calibration is not None
