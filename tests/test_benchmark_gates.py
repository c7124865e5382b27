"""`benchmarks/gates.py`: which gates are 0 at the start, and which tokens can move them."""

from pathlib import Path

import pytest

SHAPE = {
    "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 6, "num_attention_heads": 2,
    "max_position_embeddings": 512,
}  # fmt: skip


def test_gates_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import gates

    opened = gates.measure(SHAPE, "open", "sandwich", seed=0)
    assert opened == {"gates_exactly_0": [0, 0, 0], "tokens_with_gradient": [1, 1, 1]}
    wide = SHAPE | {"hidden_size": 512, "num_attention_heads": 8}  # scores grow with the width
    released = gates.measure(wide, "released", "sandwich", seed=0)
    closed, moved = released["gates_exactly_0"], released["tokens_with_gradient"]
    assert closed == sorted(closed) and 0 < closed[-1] < 1, "who has left does not come back before the middle"
    assert all(0 < share < 1 - gone for share, gone in zip(moved, closed)), "a closed gate feels nothing"
    rows = [{"start": "released", "norms": "sandwich", **released}]
    assert gates.table(rows).splitlines()[-1].startswith("| `released` | sandwich | ")
