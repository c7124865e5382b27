"""The sweeps that come with the project."""

from pathlib import Path

import pytest

from midskip.sweep.read import read_sweep

ROOT = Path(__file__).parent.parent


@pytest.mark.integration
def test_the_examples_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    depth = read_sweep("sweeps/pydocs-depth.yaml")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    assert len(read_sweep("sweeps/pointers.yaml").runs({})) == 3 * 43
    assert {point.num_runs() for point in read_sweep("sweeps/pointers-tuned.yaml").points} == {5 + 4}
    in_bytes = read_sweep("sweeps/bytes.yaml").points  # whose learning rates stand above its arms
    dense = [point for point in in_bytes if point.arm in ("dense", "dense, d 96", "dense, d 48")]
    assert all(point.num_runs() == 3 + 2 for point in dense) and len(dense) == 8, "the opponent is tuned at each"
    assert {len(point.learning_rates) for point in in_bytes} == {0, 3}
    assert {len(point.learning_rates) for point in read_sweep("sweeps/paper.yaml").points} == {0}
    assert len(read_sweep("sweeps/longer.yaml").runs({})) == 3 * 3
    assert len(read_sweep("sweeps/key-heads.yaml").runs({})) == 3 * 2
    pairs = read_sweep("sweeps/pairs.yaml").points
    assert [len(point.learning_rates) for point in pairs] == [3, 3, 3, 0, 0, 0, 0], (
        "the opponent is the one that is tuned"
    )
    assert len(read_sweep("sweeps/wiki-small.yaml").runs({})) == 3 * 7
    assert [run.label for run in depth.runs({})][:4] == [
        *(f"dense num_hidden_layers={layers} seed=0" for layers in (2, 4, 8)), "gated seed=0",
    ]  # fmt: skip
    assert len(depth.runs({})) == 12
