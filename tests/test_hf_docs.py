"""The code of docs/huggingface.md runs as printed. Its command is run in test_hf_lm_eval.py."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, ModelCard, RepoUrl
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel
from tiny_runs import QUIET
from transformers import AutoModelForCausalLM

from midskip import MidskipForCausalLM
from midskip.train import train

PAGE = (Path(__file__).parent.parent / "docs" / "huggingface.md").read_text(encoding="utf-8")


def test_every_block_is_code_that_is_run() -> None:
    kinds = re.findall(r"^```(\S+)", PAGE, re.MULTILINE)
    assert kinds.count("sh") == 2 and set(kinds) == {"python", "sh"}


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")  # transformers' default, without a GPU
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks
def test_the_python_runs_as_printed(
    make_recipe: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(make_recipe(output="runs/mine", data={"length": 64}, per_device_train_batch_size=1), console=QUIET)
    uploads: list[list[str]] = []

    def load(name: str, **others: Any) -> ModelCard:
        raise EntryNotFoundError("no card")

    def create_commit(self: HfApi, *, operations: list[Any], **others: Any) -> None:
        uploads.append(sorted(operation.path_in_repo for operation in operations))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **others: RepoUrl(f"https://huggingface.co/{name}"))
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(ModelCard, "load", load)
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        exec(compile(block, "huggingface.md", "exec"), names)
    assert [len(texts) for texts in names["texts"]] == [1, 1]
    assert names["texts"][0][0]["generated_text"].startswith("The function")
    assert type(AutoModelForCausalLM.from_pretrained("tuned")) is MidskipForCausalLM
    assert names["trainer"].state.global_step == 4 and "trainable params" in capsys.readouterr().out
    assert isinstance(names["adapted"], PeftModel) and Path("adapter", "adapter_config.json").is_file()
    assert type(names["merged"]) is MidskipForCausalLM
    assert ["README.md" in files for files in uploads] == [True, True] and "model.safetensors" in uploads[0]
