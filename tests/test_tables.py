"""The tables in the docs are those that `midskip frontier` and scripts in `benchmarks` make of committed results."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_the_tables_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tables

    shown = set()
    for page in tables.PAGES:
        text = page.read_text(encoding="utf-8")
        assert text == tables.filled(text), f"run python benchmarks/tables.py: {page.name} is not of the results"
        found = tables.MARKED.findall(text)
        assert len(found) == text.count("<!-- end -->") > 0
        shown |= {Path(file).name for _, _, file, *_ in found}
    results = ROOT / "benchmarks" / "results"
    kinds = ("reasons", "agreement")
    assert {file.name for kind in kinds for file in results.glob(f"*_{kind}.json")} <= shown, "no result is left out"
