"""Runs of tiny models: what the tests of training share."""

import json
import shutil
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import set_seed
from transformers.trainer_pt_utils import safe_globals

from midskip import MidskipForCausalLM
from midskip.data import TokenWindows, WindowOrder
from midskip.train import Recipe
from midskip.train.recipe import DataSettings, ModelSettings, RegularizerSettings, TrainingSettings
from midskip.train.text import cut_windows, open_text

TIMES = {"seconds", "step_seconds", "tokens_per_s", "utilisation", "finished"}  # what no two runs share
QUIET = Console(file=StringIO())


class Stop(Exception):
    """A run dies of it."""


def write_documents(folder: Path, count: int = 30) -> Path:
    """Text in two files of the folder."""
    folder.mkdir(exist_ok=True)
    sentences = [f"Document {i}: the cat sat on mat {i % 7}, and the dog saw it {i} times.\n" for i in range(count)]
    for number in (0, 1):
        (folder / f"{number}.txt").write_text("<|endoftext|>\n".join(sentences[number::2]), encoding="utf-8")
    return folder


def tiny_recipe(
    source: Path | str, output: Path | str, regularizer: str = "none", settings: dict[str, Any] | None = None,
    *, model: dict[str, Any] | None = None, data: dict[str, Any] | None = None, dense_layers: list[int] | None = None,
    **training: Any,
) -> Recipe:  # fmt: skip
    """A run of a tiny model, over in a moment."""
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
    optimisation = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "save_steps": 0,
        "peak_flops": 1e12,
        "report_to": [],
    }
    return Recipe(
        str(output),
        DataSettings(str(source), **({"length": 16} | (data or {}))),
        ModelSettings(**({**shape, "initializer_range": 0.1} | (model or {}))),
        RegularizerSettings(regularizer, settings or {}),
        TrainingSettings(**(optimisation | training)),
        dense_layers or [],
    )


def windows_of(recipe: Recipe) -> tuple[TokenWindows, TokenWindows]:
    """Those of training and of validation."""
    return cut_windows(open_text(recipe.data, Path(recipe.output), QUIET), recipe.data)


def first_windows(recipe: Recipe, count: int) -> list[int]:
    """Numbers of the windows that a run reads first."""
    windows, _ = windows_of(recipe)
    return list(WindowOrder(len(windows), count, recipe.training.seed))


def batch_of(windows: TokenWindows, *numbers: int) -> dict[str, Tensor]:
    """These windows as the model takes them."""
    return {name: torch.stack([windows[number][name] for number in numbers]) for name in windows[0]}


def starting_model(recipe: Recipe) -> MidskipForCausalLM:
    """The model before its first step."""
    text = open_text(recipe.data, Path(recipe.output), QUIET)
    set_seed(recipe.training.seed)
    return MidskipForCausalLM(recipe.build_config(text.vocab_size, text.end_of_text))


def history(recipe: Recipe) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(recipe.output, "history.jsonl").read_text().splitlines()]


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _timeless(part) for name, part in value.items() if name not in TIMES}
    return [_timeless(part) for part in value] if isinstance(value, list) else value


def weights(recipe: Recipe, folder: str = "") -> dict[str, Tensor]:
    return load_file(Path(recipe.output, folder, "model.safetensors"))


def assert_same_weights(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def distance(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    return max((left[name] - right[name]).abs().max().item() for name in left)


def state_of(file: Path) -> Any:
    """What `torch.save` wrote, with every tensor and array as (dtype, shape, bytes), so that == compares bits."""
    with safe_globals():
        return _plain(torch.load(file, weights_only=True))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if hasattr(value, "tobytes"):  # an array
        return str(value.dtype), value.shape, value.tobytes()
    return _plain(value.detach().numpy()) if isinstance(value, Tensor) else value


def everything(folder: Path) -> dict[str, Any]:
    """What a run left, as far as it must be the same bit for bit in every run of the same recipe."""
    found: dict[str, Any] = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.is_dir() or name.startswith("runs/") or file.name == "training_args.bin":  # these hold times and paths
            continue
        if file.suffix in (".pt", ".pth"):
            found[name] = state_of(file)
        elif file.suffix == ".lock":  # nobody reads what it holds
            found[name] = None
        elif file.suffix == ".jsonl":
            found[name] = _timeless([json.loads(line) for line in file.read_text().splitlines()])
        elif file.name in ("report.json", "retrofit.json") or file.parent.name == "results":
            found[name] = _timeless(json.loads(file.read_text()))
        elif name == "recipe.yaml":
            found[name] = file.read_text().replace(str(folder), "")
        elif file.name == "complete.json":  # the size of what holds paths
            marker = json.loads(file.read_text())
            found[name] = marker["step"], sorted(marker["files"])
        else:
            found[name] = file.read_bytes()
    return found


def differences(folder: Path, whole: Path) -> list[str]:
    """Files that two runs do not share, but for what was set aside."""
    for damaged in folder.glob("damaged-checkpoint-*"):
        shutil.rmtree(damaged)
    left, right = everything(folder), everything(whole)
    return sorted(name for name in left | right if left.get(name) != right.get(name))
