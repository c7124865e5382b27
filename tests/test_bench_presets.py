"""Presets of `midskip bench`: they set what the command line sets, and each runs, as far as it can without a GPU."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch._dynamo.utils import counters

from midskip.bench import PRESETS, BenchSettings, last_regularizer, with_preset
from midskip.cli import main
from midskip.commands.bench import SHAPE, parser
from midskip.train import Recipe, train


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[BenchSettings, Path]]:
    """What would be timed, and where to: nothing is."""
    calls: list[tuple[BenchSettings, Path]] = []
    monkeypatch.setattr("midskip.bench.bench", lambda settings, output: calls.append((settings, output)))
    return calls


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_sets_options_and_can_be_timed(
    name: str, asked: list[tuple[BenchSettings, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {action.dest for action in parser()._actions}
    assert PRESETS[name].options.keys() <= options - {"preset", "output", "run", "data"}
    gpu = PRESETS[name].options.get("device") == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert main(["bench", "--preset", name]) == 0
    for settings, _ in asked:
        assert settings.preset == name and settings.device == ("cuda" if gpu else "cpu")
        for option, value in PRESETS[name].options.items():
            assert option == "shape" or getattr(settings, option) == value


def test_the_command_line_wins(asked: list[tuple[BenchSettings, Path]]) -> None:
    arguments = "--preset core --shape tiny --shares 0.5 --norms pre --hidden_size 16 --device cpu --output out"
    assert main(["bench", *arguments.split()]) == 0
    ((settings, output),) = asked
    assert (settings.shares, settings.norms, settings.shape["hidden_size"]) == ([0.5], ("pre",), 16)
    assert settings.tasks == PRESETS["core"].options["tasks"] and output == Path("out")
    assert settings.prompt_tokens == 48, "sizes go with the shape"
    assert main(["bench", "--preset", "gpu", "--device", "cpu", "--no-torch_compile", "--output", "out"]) == 0
    assert [(one.shape["hidden_size"], folder) for one, folder in asked[1:]] == [
        (768, Path("out/paper")),
        (512, Path("out/wiki-small")),
    ]
    assert not asked[1][0].torch_compile and asked[1][0].dtypes == ("bfloat16",)


def test_an_unknown_preset_and_the_list_of_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--preset", "fast"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert f"preset is 'fast'; expected one of {', '.join(PRESETS)}" in err
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    lines = capsys.readouterr().out.splitlines()
    for name, preset in PRESETS.items():
        assert f"  {name:<10} {preset.what}" in lines and len(preset.what) < 108


def test_of_a_trained_model_a_preset_leaves_out_what_that_brings() -> None:
    options = with_preset("training", {"repeats": 2}, of_a_run=True)
    assert options == {"tasks": ("trainer",), "dtypes": ("float32",), "repeats": 2, "preset": "training"}
    given = {"shares": (0.1,)}  # refused later, by name
    assert with_preset("skipping", given, of_a_run=True)["shares"] == (0.1,)
    assert not {"shares", "gates", "norms", "shape", *SHAPE} & with_preset("tiny", {}, of_a_run=True).keys()


@pytest.mark.integration
def test_the_tiny_preset_times_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--preset", "tiny", "--device", "cpu", "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    found: dict[tuple[str, str], list[str]] = {}
    for row in report["rows"]:
        found.setdefault((row["task"], row["gates"]), []).append(row["side"])
        assert row["time_s"] > 0 and row["utilisation"] is None
        assert (row["peak_bytes"] is not None) == (row["task"] == "training")
    ours, both = ["skip 0.5", "skip 0.5, padded"], ["llama", "llama, static cache"] * 2
    for gates in ("fractional", "hard"):
        assert found["prefill", gates] == found["training", gates] == found["trainer", gates] == ["llama", *ours]
        assert found["products", gates] == ["llama", "skip 0.5"]
        assert sorted(found["decode", gates]) == sorted([*both, "skip 0.5", "skip 0.5"])
    assert report["settings"]["preset"] == "tiny"
    screen = capsys.readouterr().out
    assert "optimizer steps in the Trainer, 2 x 24 tokens" in screen and "the matrix products with weights" in screen


@pytest.mark.slow  # its compiler takes long; presets, bfloat16 and compiled blocks are tested apart
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, as it compiles
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
def test_the_gpu_preset_in_miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the GPU, its kernels and the compiler's last stage."""
    monkeypatch.setattr("midskip.bench.models.BACKEND", "aot_eager")
    counters.clear()
    sizes = "--training_batch_size 2 --context_tokens 12 --prompt_batch_size 2 --prompt_tokens 20 --batch_sizes 2"
    few = "--shares 0.5 --gates fractional --repeats 1 --num_hidden_layers 2 --new_tokens 3"
    arguments = f"--preset gpu --shape tiny --device cpu {sizes} {few} --output {tmp_path}"
    assert main(["bench", *arguments.split()]) == 0
    report: dict[str, Any] = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    found = {(row["task"], row["compiled"]) for row in report["rows"]}
    assert found == {("prefill", True), ("decode", False), ("training", True)}
    assert {row["dtype"] for row in report["rows"]} == {"bfloat16"} and report["settings"]["torch_compile"]
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.integration
def test_the_training_preset_trains_a_run_on_with_its_regularizer(
    make_recipe: Callable[..., Recipe], tmp_path: Path, no_pictures: None
) -> None:
    recipe = make_recipe(
        "target_share", {"target_share": 0.6}, max_steps=4, save_steps=2,
        model={"policy_settings": {"gates": "hard"}},
    )  # fmt: skip
    train(recipe, console=Console(quiet=True))
    run = Path(recipe.output)
    regularizer = last_regularizer(run)
    assert regularizer is not None
    assert regularizer.state_dict() == json.loads((run / "checkpoint-4" / "regularizer.json").read_text())
    assert last_regularizer(tmp_path) is None
    arguments = ["bench", "--preset", "training", "--run", recipe.output, "--repeats", "1", "--device", "cpu"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "bench.json").read_text(encoding="utf-8"))
    assert [(row["task"], row["side"]) for row in report["rows"]] == [
        ("trainer", name) for name in ("llama", "dense twin", "trained")
    ]
    assert report["regularizer"] == "TargetShare"
