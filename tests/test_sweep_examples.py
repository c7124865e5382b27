"""The sweeps that come with the project, and the one in its page."""

import re
from pathlib import Path

import pytest

from midskip.sweep.read import read_sweep

ROOT = Path(__file__).parent.parent


def test_the_examples_are_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")
    (tmp_path / "SWEEP.yaml").write_text(re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)[0])
    monkeypatch.chdir(ROOT)
    shown, depth = read_sweep(tmp_path / "SWEEP.yaml"), read_sweep("sweeps/pydocs-depth.yaml")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    assert len(read_sweep("sweeps/pointers.yaml").runs({})) == 3 * 43
    assert len(read_sweep("sweeps/bytes.yaml").runs({})) == 3 * 37
    assert sum(point.num_runs() for point in shown.points) == 5 * (3 + 2)
    assert [run.label for run in depth.runs({})][:4] == [
        *(f"dense num_hidden_layers={layers} seed=0" for layers in (2, 4, 8)), "gated seed=0",
    ]  # fmt: skip
    assert len(depth.runs({})) == 12
