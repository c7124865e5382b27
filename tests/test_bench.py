"""`midskip bench`: what it times agrees with the reference, what it says is what was measured, and no more."""

import json
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_bench import DTYPE, settings

from midskip import MidskipForCausalLM
from midskip.bench import bench, bench_run, run_settings
from midskip.bench.models import Side
from midskip.bench.results import work_of
from midskip.budget.measured_on import hashes_of
from midskip.budget.monitor import BudgetDriftError, DriftMonitor

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    """What a whole run gives, its folder, and what was on the screen."""
    folder = tmp_path_factory.mktemp("bench") / "new"
    screen = Console(file=StringIO(), width=80)
    report = bench(settings(shape={"num_hidden_layers": 5}), folder, screen)
    assert isinstance(screen.file, StringIO)
    return report, folder, screen.file.getvalue()


def test_every_case_has_a_row_for_each_side(result: tuple[dict[str, Any], Path, str]) -> None:
    report, folder, _ = result
    assert json.loads((folder / "bench.json").read_text(encoding="utf-8")) == json.loads(json.dumps(report))
    assert (folder / "bench.png").read_bytes().startswith(b"\x89PNG")
    found = [(row["task"], row["batch_size"], row["side"]) for row in report["rows"]]
    ours = ["skip 0", "skip 0.5"]
    both = ["llama", "llama, static cache", *ours]
    expected = [("prefill", 1, name) for name in ["llama", *ours]]
    expected += [("decode", size, name) for size in (1, 3) for name in both]
    assert found == expected + [("training", 2, name) for name in ["llama", *ours]]
    for row in report["rows"]:
        steps = 6 if row["task"] == "decode" else 1
        assert len(row["all_s"]) == 3 and all(len(repeat) == steps for repeat in row["all_s"])
        assert row["time_s"] > 0 and (row["joules"] is None) == (report["energy"]["unavailable"] is not None)
        assert set(row["ratios"]) == {"llama", "fastest_llama", "dense"}


def test_ratios_are_of_what_was_measured(result: tuple[dict[str, Any], Path, str]) -> None:
    report, _, _ = result
    for row in report["rows"]:
        llama, dense = (
            next(one for one in report["rows"] if one["side"] == name and case(one) == case(row))
            for name in ("llama", "skip 0")
        )
        for against, name in ((llama, "llama"), (dense, "dense")):
            ratios = row["ratios"][name]
            assert ratios["of"] == against["side"]
            assert ratios["time"] == row["time_s"] / against["time_s"]
            assert ratios["work"] == pytest.approx(work_of(row) / work_of(against))
            assert ratios["time_over_work"] == pytest.approx(ratios["time"] / ratios["work"])
            assert ratios["flops"] == pytest.approx(row["work"]["flops"] / against["work"]["flops"])
        if row["side"] == "skip 0.5":
            assert 0.3 < row["work"]["executed_share"] < 0.7
            assert row["ratios"]["dense"]["work"] < 0.8


def case(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["task"], row["batch_size"], row["dtype"], row["gates"]


def test_the_report_says_where_and_what_and_names_no_path(result: tuple[dict[str, Any], Path, str]) -> None:
    report, folder, _ = result
    assert {"cpu", "cores", "threads", "python", "torch", "transformers", "midskip", "commit"} <= set(report["machine"])
    assert report["settings"]["shape"]["num_hidden_layers"] == 5
    assert set(report["energy"]) == {"unavailable", "left_out", "idle_watts"}
    text = json.dumps(report)
    assert str(folder) not in text and str(Path.home()) + "/" not in text and str(Path(__file__).parents[1]) not in text


def test_the_screen_shows_work_beside_time(result: tuple[dict[str, Any], Path, str]) -> None:
    report, folder, screen = result
    for words in (
        "prefill: a prompt of 48 tokens; float32, sandwich norms, gates",
        "decode: batch 3, 6 tokens after 24", "blocks run", "memory at its peak, MB",
        "training: forward and backward of 2 x 24 tokens", "FLOPs a step", "time / bytes read, of Llama",
        "KV allocated, MB", "p50, p95, p99", str(folder / "bench.png"),
    ):  # fmt: skip
        assert words in screen, words
    lines = [line for line in screen.splitlines() if line.startswith("│ blocks run")]
    shares = [f"{row['work']['executed_share']:.1%}" for row in report["rows"]]
    assert [cell.strip() for line in lines for cell in line.split("│")[2:-1]] == shares
    unavailable = report["energy"]["unavailable"]
    assert ("joules a token" in screen) == (unavailable is None)
    assert (f"energy: unavailable: {unavailable}" if unavailable else "energy: joules above what is used") in screen


def test_agreement_is_part_of_the_report(result: tuple[dict[str, Any], Path, str]) -> None:
    report, _, _ = result
    assert all(one["difference"] <= one["bound"] for one in report["agreement"])
    what = {(one["side"], one["dtype"]) for one in report["agreement"]}
    assert what >= {(name, dtype) for name in ("skip 0", "skip 0.5") for dtype in ("float32", "float64")}
    assert {"llama", "llama, static cache", "ours with Llama's weights"} <= {one["side"] for one in report["agreement"]}


def test_llama_is_checked_once_a_dtype(tmp_path: Path) -> None:
    few = {"shares": (0.5,), "tasks": ("prefill",), "prompt_tokens": 4, "repeats": 1}
    given = settings(dtypes=("float32", "bfloat16"), gates=("fixed", "fractional"), **few)
    agreement = bench(given, tmp_path, Console(file=StringIO()))["agreement"]
    for dtype in ("float32", "bfloat16"):
        found = [(one["side"], one["gates"]) for one in agreement if one["dtype_timed"] == dtype]
        assert found.count(("llama", None)) == 2 and found.count(("skip 0.5", "fixed")) == 4
        assert {gates for name, gates in found if "llama" in name.lower()} == {None}


def test_joules_stand_beside_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a counter of a joule for every pass of a model, and next to nothing at rest."""
    import midskip.bench.energy as energy

    box, call = {"joules": 0.0}, Side.call

    def counted(*arguments: Any, **more: Any) -> Any:
        box["joules"] += 1
        return call(*arguments, **more)

    monkeypatch.setattr(Side, "call", counted)
    monkeypatch.setattr(energy, "cpu_domains", lambda root: [energy.Domain("box", lambda: box["joules"])])
    defaults = energy.EnergyMeter.__init__.__kwdefaults__ or {}
    rest = {"sleep": lambda duration_s: box.update(joules=box["joules"] + 1e-9)}
    monkeypatch.setattr(energy.EnergyMeter.__init__, "__kwdefaults__", defaults | rest)
    screen = Console(file=StringIO(), width=120)
    given = settings(tasks=("decode", "prefill"), batch_sizes=(3,), shares=(0.5,), repeats=1, energy_s=0.01)
    report = bench(given, tmp_path, screen)
    assert report["energy"]["unavailable"] is None and report["energy"]["idle_watts"]["box"] > 0
    for row in report["rows"]:
        joules = row["joules"]
        unit, expected = ("token", 1 / 3) if row["task"] == "decode" else ("prompt", 1)
        assert joules["unit"] == unit and joules["all"] == pytest.approx([expected] * 3, rel=1e-2)
        assert row["ratios"]["llama"]["joules"] == pytest.approx(1, rel=1e-2)
    assert isinstance(screen.file, StringIO)
    assert "joules a token" in screen.file.getvalue() and "at rest (box " in screen.file.getvalue()


def test_a_trained_model_on_text(make_model: Callable[..., MidskipForCausalLM], tmp_path: Path) -> None:
    model = make_model("mixed", DTYPE, num_hidden_layers=5).eval()
    given = run_settings(model, "mine", batch_sizes=(2,), repeats=1)
    assert (given.prompt_tokens, given.context_tokens, given.new_tokens) == (64, 48, 16)
    windows = [{"input_ids": torch.randint(31, (64,)), "attention_mask": torch.ones(64)} for _ in range(4)]
    windows[0]["attention_mask"][-1] = 0  # padded: not used
    given = replace(given, dtypes=("bfloat16",))
    report = bench_run(given, model, windows, tmp_path, Console(file=StringIO()))
    assert model.dtype == DTYPE  # and not rounded by the way
    assert report["weights"] == hashes_of(model)
    assert report["settings"]["run"] == "mine" and report["limits"] == {"score_scale": 1.0, "max_layers": None}
    assert {row["task"] for row in report["rows"]} == {"prefill", "decode", "training"}
    sides = [row["side"] for row in report["rows"] if (row["task"], row["dtype"]) == ("prefill", "bfloat16")]
    assert sides == ["llama", "dense twin", "trained"]
    with torch.no_grad():
        share = (model(windows[1]["input_ids"][None]).gates > 0).double().mean().item()
    trained = next(row for row in report["rows"] if (row["side"], row["dtype"]) == ("trained", "bfloat16"))
    assert trained["work"]["executed_share"] == pytest.approx(share, abs=0.02) and 0.1 < share < 0.9
    assert trained["ratios"]["dense"]["of"] == "dense twin" and trained["ratios"]["dense"]["work"] < 1
    for more, message in (
        ({"batch_sizes": (5,)}, "has 3 windows of 64 tokens; 5 are needed"),
        ({"prompt_tokens": 100}, "100 tokens are asked for and the model takes at most 64"),
        ({"context_tokens": 63, "new_tokens": 2, "tasks": ("decode",)}, "65 tokens are asked for"),
        ({"tasks": ("prefill",), "prompt_tokens": 10, "prompt_batch_size": 4}, "3 windows of 49 tokens; 4 are needed"),
    ):
        with pytest.raises(ValueError, match=message):
            bench_run(run_settings(model, "mine", **more), model, windows, tmp_path)
    with pytest.raises(ValueError, match=r"intermediate_size is \[24, 24, 24, 32\]; Llama, its opponent, has but one"):
        run_settings(make_model("mixed", intermediate_size=[24, 24, 24, 32]), "mine")


@pytest.mark.parametrize("parts", [{"qk_norm": True}, {"attention_bias": True}, {"no_rope_layers": [1, 0, 1, 1]}])
def test_llama_is_held_to_the_reference_without_parts_that_it_lacks(
    make_model: Callable[..., MidskipForCausalLM], parts: dict[str, Any], tmp_path: Path
) -> None:
    model = make_model("mixed", DTYPE, norms="pre", **parts).eval()
    windows = [{"input_ids": torch.randint(31, (64,))} for _ in range(4)]
    given = run_settings(model, "mine", tasks=("prefill",), repeats=1, prompt_tokens=12, batch_sizes=(1,))
    report = bench_run(given, model, windows, tmp_path, Console(file=StringIO()))
    assert {one["side"] for one in report["agreement"]} >= {"ours with Llama's weights"}


def test_only_the_tasks_asked_for_need_rows_and_columns(
    make_model: Callable[..., MidskipForCausalLM], tmp_path: Path
) -> None:
    """And a model may take fewer tokens than are checked else."""
    assert settings(tasks=("prefill",), prompt_batch_size=7, prompt_tokens=60).sizes == {"prefill": (7, 60)}
    assert settings(tasks=("decode",)).sizes == {"decode": (3, 30)} and settings(tasks=("training",)).most_rows == 2
    model = make_model("mixed", DTYPE, max_position_embeddings=12).eval()
    windows = [{"input_ids": torch.randint(31, (12,))} for _ in range(2)]
    for tasks in (("prefill",), ("decode",), ("training",)):
        unused = {"prompt_tokens": 99, "new_tokens": 99, "context_tokens": 99, "training_batch_size": 99}
        used = {
            "prefill": {"prompt_tokens": 12, "batch_sizes": (99,)},
            "decode": {"context_tokens": 10, "new_tokens": 2, "batch_sizes": (2,), "prompt_batch_size": 99},
            "training": {"context_tokens": 12, "training_batch_size": 1, "batch_sizes": (99,)},
        }[tasks[0]]
        given = run_settings(model, "mine", tasks=tasks, repeats=1, **unused | used)
        report = bench_run(given, model, windows, tmp_path, Console(file=StringIO()))
        assert {row["num_columns"] for row in report["rows"]} == {12}
        assert {one["num_tokens"] for one in report["agreement"] if one["dtype"] == "float64"} == {24}


def test_a_trained_model_under_a_budget(
    make_model: Callable[..., MidskipForCausalLM], calibrated: MidskipForCausalLM, tmp_path: Path
) -> None:
    """Timed as it runs, and no watch sees it; the twin runs all."""
    model = calibrated.float()
    model.config.calibration["block_tokens"] = 1
    windows = [{"input_ids": torch.randint(31, (64,))} for _ in range(2)]
    given = run_settings(model, "mine", tasks=("prefill", "decode"), batch_sizes=(2,), repeats=1)
    model.set_budget(0.3, 3)
    monitor = DriftMonitor(model, "error").attach()
    report = bench_run(given, model, windows, tmp_path, Console(file=StringIO()))
    assert report["limits"] == {"score_scale": pytest.approx(3.6), "max_layers": 3}
    shares = {row["side"]: row["work"]["executed_share"] for row in report["rows"] if row["task"] == "prefill"}
    with pytest.raises(BudgetDriftError):
        model(windows[0]["input_ids"][None])
    monitor.detach()
    gates_LBT = model(windows[0]["input_ids"][None]).gates
    assert shares["dense twin"] == 1 and shares["trained"] == pytest.approx((gates_LBT > 0).double().mean().item())
    for limits in ({"max_layers": 3}, {"budget": 0.5}):
        model.set_budget(**limits)
        with pytest.raises(ValueError, match="training is to be timed and the model is under a run-time budget"):
            bench_run(replace(given, tasks=("training",)), model, windows, tmp_path / "new")
    assert not (tmp_path / "new").exists()
