"""A saved folder loads where nobody has imported midskip."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

import midskip
from midskip import MidskipForCausalLM
from midskip.model.config import REMOTE_MODULE

PROGRAM = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM

assert "midskip" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__ == "midskip.model.modeling", type(model)
model.save_pretrained(sys.argv[2])
assert type(AutoConfig.from_pretrained(sys.argv[2], trust_remote_code=True)).__name__ == "MidskipConfig"
"""


def test_it_loads_and_saves_without_an_import(make_model: Callable[..., MidskipForCausalLM], tmp_path: Path) -> None:
    model = make_model(dtype=torch.float32)
    model.save_pretrained(tmp_path / "first")
    path = os.pathsep.join([str(Path(midskip.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    cache = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    folders = [str(tmp_path / name) for name in ("first", "second")]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *folders], env=os.environ | cache, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {file.name for file in Path(folders[1]).iterdir()} == {file.name for file in Path(folders[0]).iterdir()}
    assert f"{REMOTE_MODULE}.py" in {file.name for file in Path(folders[1]).iterdir()}
    found = load_file(Path(folders[1], "model.safetensors"))
    assert all(torch.equal(found[name], x) for name, x in model.state_dict().items())
