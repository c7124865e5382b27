"""The demo: small from end to end, and, where there is time, the whole one with what it promises."""

import json
import time
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from midskip.data import DataError
from midskip.demo import demo, demo_recipe, time_prefill
from midskip.runs import load_run
from midskip.train import Recipe


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    documents = [f"The function returns {i}, or [bold]{i * i}[/bold] if x is {i % 7}.\n" * 8 for i in range(90)]
    (folder / "all.txt").write_text("<|endoftext|>\n".join(documents), encoding="utf-8")
    return folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is slow and tested elsewhere: the speed of this machine, measured once, and prefill, timed often."""
    monkeypatch.setattr("midskip.train.run.peak_flops", lambda arguments: (1e12, "slow to measure"))
    monkeypatch.setattr("midskip.demo.time_prefill", partial(time_prefill, repeats=1))


def run(output: Path, source: Path, steps: int = 2) -> tuple[dict, str]:
    """The report, and what was on the screen."""
    screen = Console(file=StringIO(), width=120)
    report = demo(str(output), steps, str(source), screen)
    assert isinstance(screen.file, StringIO)
    return report, screen.file.getvalue()


@pytest.mark.usefixtures("quick")
@pytest.mark.integration
def test_the_demo_trains_compares_and_reports(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    report, screen = run(folder, source)
    assert json.loads((folder / "report.json").read_text()) == report
    assert (folder / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    for name in ("report.json", "picture.png", "page.html"):
        assert str(folder / name) in screen

    gated, dense = (report[name]["validation"] for name in ("gated", "dense"))
    assert report["gated"]["training"]["steps"] == report["dense"]["training"]["steps"] == 2
    assert report["gated"]["training"]["num_tokens"] == report["dense"]["training"]["num_tokens"]
    assert gated["num_tokens"] == dense["num_tokens"]
    assert dense["executed_share"] == 1 and dense["flops_per_token"] == dense["dense_flops_per_token"]
    assert report["prefill"]["dense"]["executed_share"] == 1
    assert report["prefill"]["gated"]["seconds"] > 0 and report["prefill"]["dense"]["seconds"] > 0
    assert report["sample"].startswith("The function returns")

    rows = {line.split("│")[1].strip(): line for line in screen.splitlines() if line.count("│") == 4}
    for label, name, pattern in (
        ("held-out loss (nats a token)", "loss", "{:.4f}"),
        ("bits per byte", "bits_per_byte", "{:.4f}"),
        ("block-tokens that ran", "executed_share", "{:.1%}"),
        ("FLOPs a token, executed", "flops_per_token", "{:,.0f}"),
    ):
        assert [cell.strip() for cell in rows[label].split("│")[2:4]] == [
            pattern.format(x[name]) for x in (gated, dense)
        ]
    assert {"by layer, %", "tokens by blocks run, %", "training"} <= set(rows)
    batch, length = report["prefill_shape"]
    assert f"prefill of {batch} x {length} tokens" in rows and length == 256

    gated, dense = (load_run(folder / path)[0].config for path in ("gated", "gated/dense-4"))
    assert gated.policy == "middle_out" and dense.policy == "dense"
    assert (gated.num_hidden_layers, dense.num_hidden_layers) == (8, 4)
    assert dense.hidden_size == gated.hidden_size and dense.intermediate_size == gated.intermediate_size


def small(*arguments: Any) -> Recipe:
    """The demo's recipe, of a small model."""
    recipe = demo_recipe(*arguments)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 6, "num_attention_heads": 2}
    return replace(recipe, model=replace(recipe.model, **shape), dense_layers=[1])


@pytest.mark.integration
@pytest.mark.usefixtures("quick")
def test_a_second_demo_takes_the_place_of_the_first_and_of_nothing_else(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("midskip.train.report.write_picture", lambda path, *args: path.write_bytes(b"slow to draw"))
    monkeypatch.setattr("midskip.demo.demo_recipe", small)
    monkeypatch.setattr("midskip.demo.generate", lambda model, tokenizer, prompt, **_: tokenizer(prompt)["input_ids"])
    first, _ = run(tmp_path / "demo", source, steps=1)
    with pytest.raises(DataError, match="There is nothing at"):
        run(tmp_path / "demo", source / "none")
    assert json.loads((tmp_path / "demo" / "report.json").read_text()) == first, (
        "a demo that cannot start loses nothing"
    )
    second, _ = run(tmp_path / "demo", source, steps=2)
    assert json.loads((tmp_path / "demo" / "report.json").read_text()) == second
    assert second["gated"]["training"]["steps"] == 2

    (tmp_path / "demo" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="which holds other files; give a new or empty folder"):
        run(tmp_path / "demo", source)
    assert (tmp_path / "demo" / "thesis.txt").read_text() == "mine"
    assert (tmp_path / "demo" / "gated" / "model.safetensors").is_file()


def test_a_folder_of_something_else_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "gated").mkdir()  # the name alone does not make it a demo
    with pytest.raises(ValueError, match=r"output is '.*', which holds other files; give a new or empty folder"):
        run(tmp_path, source)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"output is '.*file', which is a file; expected a folder"):
        run(tmp_path / "file", source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "gated"]


def test_prefill_is_timed_and_metered(make_model) -> None:
    models = {name: make_model(gates, torch.float32).eval() for name, gates in (("open", "open"), ("gone", "gone"))}
    result = time_prefill(models, torch.randint(31, (3, 9)), repeats=2)
    assert {name: entry["executed_share"] for name, entry in result.items()} == {"open": 1.0, "gone": 0.0}
    head = 2 * 3 * 16 * 31  # at the last position of each sequence alone
    assert head < result["gone"]["flops"] < head + 5000 < result["open"]["flops"]
    assert all(entry["seconds"] > 0 for entry in result.values())


@pytest.mark.slow
def test_the_whole_demo_keeps_its_promises(tmp_path: Path) -> None:
    start = time.perf_counter()
    report = demo(str(tmp_path / "demo"), console=Console(file=StringIO(), width=120))
    seconds = time.perf_counter() - start
    gated, dense = (report[name]["validation"] for name in ("gated", "dense"))
    assert 0.48 <= gated["executed_share"] <= 0.52
    assert report["gated"]["training"]["collapse"] == {}
    assert gated["bits_per_byte"] <= 1.05 * dense["bits_per_byte"]
    assert sum(share >= 0.05 for share in gated["tokens_by_blocks"]) >= 3
    assert dense["loss"] < 6, "it learnt something: a guess among 2048 tokens has 7.6"
    assert gated["flops_per_token"] < 1.25 * dense["flops_per_token"]
    assert seconds < 240
