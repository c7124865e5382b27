"""`transformers.pipeline("text-generation")` on a saved folder, where nobody imported midskip, and on objects."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import midskip
from midskip import MidskipForCausalLM
from midskip.model.config import REMOTE_MODULE

PROMPTS = ["Document 3 says", "And so", "Document 5 says that layer 2 was left out.\n\nAnd"]
PROGRAM = """
import json, sys
from transformers import AutoConfig, AutoModelForCausalLM, pipeline

assert "midskip" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__ == "midskip.model.modeling", type(model)
model.save_pretrained(sys.argv[3])
assert type(AutoConfig.from_pretrained(sys.argv[3], trust_remote_code=True)).__name__ == "MidskipConfig"
generator = pipeline("text-generation", model=sys.argv[1], trust_remote_code=True)
found = generator(json.loads(sys.argv[2]), batch_size=3, max_new_tokens=6, do_sample=False)
print(json.dumps([texts[0]["generated_text"] for texts in found]))
"""


@pytest.fixture(scope="module")
def alone(saved_model: Path) -> list[str]:
    """What the model makes of each prompt by itself."""
    model: MidskipForCausalLM = AutoModelForCausalLM.from_pretrained(saved_model)
    tokenizer = AutoTokenizer.from_pretrained(saved_model)
    texts, shares = [], []
    for prompt in PROMPTS:
        ids_1T = tokenizer(prompt, return_tensors="pt")["input_ids"]
        shares.append(model(ids_1T).executed_share)
        texts.append(tokenizer.decode(model.generate(ids_1T, max_new_tokens=6, do_sample=False)[0]))
    assert 0.2 < min(shares) < 0.8
    return texts


@pytest.mark.integration
def test_a_folder_where_nobody_imported_midskip(saved_model: Path, alone: list[str], tmp_path: Path) -> None:
    """It is loaded, saved again, and generated from."""
    path = os.pathsep.join([str(Path(midskip.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    place = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(saved_model), json.dumps(PROMPTS), str(tmp_path / "again")],
        env=os.environ | place, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == alone
    names = {file.name for file in (tmp_path / "again").iterdir()}
    assert f"{REMOTE_MODULE}.py" in names and names <= {file.name for file in saved_model.iterdir()}
    found, saved = (load_file(folder / "model.safetensors") for folder in (tmp_path / "again", saved_model))
    assert found.keys() == saved.keys() and all(torch.equal(found[name], saved[name]) for name in saved)


def test_a_model_and_a_tokenizer(saved_model: Path, alone: list[str]) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(saved_model), AutoTokenizer.from_pretrained(saved_model)
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    for batch_size in (1, 3):
        found = generator(PROMPTS, batch_size=batch_size, max_new_tokens=6, do_sample=False)
        assert [texts[0]["generated_text"] for texts in found] == alone
    assert tokenizer.padding_side == "left", "the pipeline's own doing"


def test_a_prompt_that_leaves_no_room(saved_model: Path) -> None:
    """The pipeline asks for 256 new tokens unless it is told."""
    generator = pipeline("text-generation", model=str(saved_model), trust_remote_code=True)
    with pytest.raises(ValueError, match=r"this model takes at most 64 .*shorten the prompt, or ask for fewer"):
        generator(PROMPTS[0])
