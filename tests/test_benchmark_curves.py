"""`benchmarks/curves.py`: means of stretches of a history, and their picture."""

from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_means_are_of_stretches_of_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    curves = import_module("curves")
    layers = {"share_by_layer": [1.0, 0.5], "gate_mean_by_layer": [0.8, 0.1]}
    rows = [{"step": step, "executed_share": 1 / step, "cross_entropy": float(step), **layers} for step in range(1, 6)]
    found = curves.curves_of(rows, 2)
    assert found == {
        "step": [2, 4, 5],
        "executed_share": [0.75, 0.2917, 0.2],
        "gate": [0.6, 0.6, 0.6],
        "cross_entropy": [1.5, 3.5, 5.0],
    }
    curves.draw({"arm-0": found, "arm-1": found}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
