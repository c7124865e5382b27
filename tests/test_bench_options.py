"""The settings of `midskip bench`: what it refuses before anything is built, and the command."""

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_bench import DTYPE, settings

from midskip import MidskipForCausalLM
from midskip.bench import BenchSettings, bench, run_settings
from midskip.cli import main
from midskip.data import load_tokenizer
from midskip.policies.controls import FixedDepths


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "huge"], "shape is 'huge'; expected one of paper, wiki-small, small, tiny"),
        (
            ["--tasks", "prefill,sleep"],
            "tasks has 'sleep'; expected some of prefill, decode, training, trainer, products",
        ),
        (["--tasks", "prefill,prefill"], "none of them twice"),
        (["--dtypes", "int8"], "dtypes has 'int8'"),
        (["--dtypes", "float64"], "dtypes has 'float64'"),
        (["--gates", "open"], "gates has 'open'; expected some of fixed, fractional, hard"),
        (["--shares", "0,1.5"], "shares has 1.5; expected shares of skipped block-tokens, from 0 to below 1"),
        (["--shares", "nan"], "shares has nan"),
        (["--shares", "0.5,0.5000001"], "expected shares that differ in their first six digits"),
        (["--seed", "-1"], "seed is -1; expected a whole number from 0 to 4294967295"),
        (["--seed", str(2**32)], "seed is 4294967296; expected"),
        (["--batch_sizes", "1,0"], "0 is less than 1"),
        (["--repeats", "0"], "0 is less than 1"),
        (["--norms", "post"], "norms has 'post'; expected some of sandwich, pre"),
        (["--attention", "auto,flex"], "attention has 'flex', which needs a GPU"),
        (["--attention", "padded", "--num_key_value_heads", "1"], "fewer key heads than query heads"),
        (["--tasks", "trainer", "--dtypes", "float16"], "trains in float32 or bfloat16 alone"),
        (["--preset", "fast"], "preset is 'fast'; expected one of core, skipping, decode, training, memory, gpu"),
        (["--device", "toaster"], "device is 'toaster'; expected cpu, cuda or cuda:N"),
        (["--hidden_size", "33"], "hidden_size (33)"),
        (["--data", "text"], "give its run folder by --run"),
        (["--run", "nowhere"], "there is no folder 'nowhere'"),
        (["--batch_sizes", "1000000", "--tasks", "decode"], "GB free: give smaller --batch_sizes"),
        (["--output", "a_file"], "which is a file; expected a folder"),
        (["--output=~nobody/x", "--shares", "nan"], "shares has nan"),
        (["--speed", "fast"], "unrecognized arguments: --speed fast"),
    ],
)
def test_options_that_cannot_be_used(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").write_text("")
    size = [] if {"--shape", "--run"} & set(arguments) else ["--shape", "tiny"]
    assert main(["bench", *size, "--device", "cpu", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.integration
def test_the_smallest_sizes(tmp_path: Path) -> None:
    sizes = {"prompt_tokens": 1, "context_tokens": 1, "new_tokens": 1, "batch_sizes": (1,), "repeats": 1}
    report = bench(settings(tasks=("prefill", "decode"), **sizes), tmp_path, Console(file=StringIO()))
    assert len(report["rows"]) == 7
    with pytest.raises(ValueError, match="needs a token to predict"):
        settings(tasks=("training",), **sizes)


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device in ("cuda", "cuda:1"):
        assert settings(device=device).device == device
    assert settings(device="cuda", tasks=("trainer",)) and settings(device="cuda", attention=("auto", "flex"))
    with pytest.raises(ValueError, match="the task trainer runs on the first GPU: give cuda"):
        settings(device="cuda:1", tasks=("trainer",))
    with pytest.raises(ValueError, match="the task trainer runs where transformers' Trainer would, on the GPU"):
        settings(device="cpu", tasks=("trainer",))
    with pytest.raises(ValueError, match=r"device is 'cuda:2'; torch finds 2 GPU, cuda:0 to cuda:1"):
        settings(device="cuda:2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="torch finds no GPU"):
        settings(device="cuda")
    with pytest.raises(ValueError, match="device is 3; expected"):
        settings(device=3)


@pytest.mark.integration
def test_the_largest_seed(tmp_path: Path) -> None:
    given = settings(seed=2**32 - 1, tasks=("prefill",), repeats=1)
    assert bench(given, tmp_path, Console(file=StringIO()))["rows"]
    for seed in (-1, 2**32 + 1, 0.5, True):
        with pytest.raises(ValueError, match=r"seed is .*; expected a whole number from 0 to 4294967296"):
            FixedDepths(4, 8, seed=seed)  # pyright: ignore[reportArgumentType]


def test_settings_that_a_run_brings_itself(make_model: Callable[..., MidskipForCausalLM]) -> None:
    with pytest.raises(ValueError, match="--shares is of models with imposed depths; a run has its own"):
        run_settings(make_model(), "mine", shares=(0.5,))
    changed = BenchSettings.of("paper", {"num_hidden_layers": 3}, device="cpu", repeats=None)
    assert (changed.shape["num_hidden_layers"], changed.repeats) == (3, 9)


@pytest.mark.integration
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--shape tiny --tasks prefill --shares 0.5 --dtypes float32 --gates fixed --repeats 1 --device cpu"
    assert main(["bench", *arguments.split(), "--num_hidden_layers", "3", "--output", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "bench.json").read_text(encoding="utf-8"))
    assert [row["side"] for row in report["rows"]] == ["llama", "skip 0.5"]
    assert report["settings"]["shape"]["num_hidden_layers"] == 3
    assert "time to first token" in capsys.readouterr().out


@pytest.mark.integration
def test_the_command_on_a_run(
    make_model: Callable[..., MidskipForCausalLM], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_tokenizer("bytes")
    make_model("mixed", DTYPE, vocab_size=len(tokenizer), num_hidden_layers=5).save_pretrained(tmp_path / "mine")
    tokenizer.save_pretrained(tmp_path / "mine")
    (tmp_path / "text.txt").write_text("A token skips the middle layers, or it does not. " * 20, encoding="utf-8")
    arguments = ["bench", "--run", str(tmp_path / "mine"), "--data", str(tmp_path / "text.txt"), "--device", "cpu"]
    arguments += ["--tasks", "decode", "--batch_sizes", "2", "--repeats", "1", "--new_tokens", "3"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "bench.json").read_text(encoding="utf-8"))
    assert [row["side"] for row in report["rows"]] == ["llama", "llama, static cache", "dense twin", "trained"]
    assert report["settings"]["run"] == "mine" and str(tmp_path) not in json.dumps(report)
    assert report["rows"][0]["num_columns"] == 64 and report["rows"][0]["num_steps"] == 3
    capsys.readouterr()
    assert main([*arguments, "--shares", "0.5"]) == 2
    assert "a run has its own: leave it out" in capsys.readouterr().err
