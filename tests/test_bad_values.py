"""Every setting of a recipe with values that mean nothing: one line and exit status 2, before anything is written."""

import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import pytest
import torch
import yaml

from midskip import MidskipForCausalLM
from midskip.cli import main
from midskip.train import Recipe
from midskip.train.checks import BLOCK_OBJECTS_BYTES, check_memory, fewest_parameters
from midskip.train.recipe import DataSettings, ModelSettings, RegularizerSettings, TrainingSettings

pytestmark = pytest.mark.usefixtures("on_the_cpu", "no_pictures")
GROUPS = {"": Recipe, "data": DataSettings, "model": ModelSettings}
GROUPS |= {"regularizer": RegularizerSettings, "training": TrainingSettings}
Refused = Callable[[str, Any], str]


@pytest.fixture
def refused(
    make_recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[[str, Any], str]:
    """refused("training.max_steps", 0): the line with which `midskip train` refuses a recipe that says so."""
    make_recipe().save(tmp_path / "tiny.yaml")
    tiny = (tmp_path / "tiny.yaml").read_text()

    def of(name: str, value: Any) -> str:
        recipe = yaml.safe_load(tiny)
        group, _, last = name.rpartition(".")
        (recipe[group] if group else recipe)[last] = value
        file = tmp_path / "bad.yaml"
        file.write_text(yaml.safe_dump(recipe))
        assert main(["train", str(file)]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("midskip: error: "), lines
        assert not (tmp_path / "run").exists()
        return lines[0]

    return of


@pytest.mark.parametrize("group", GROUPS)
def test_null_where_it_means_nothing(refused: Refused, group: str) -> None:
    annotations = get_type_hints(GROUPS[group])
    names = [one.name for one in fields(GROUPS[group]) if NoneType not in get_args(annotations[one.name])]
    assert names
    for name in names:
        whole = f"{group}.{name}".lstrip(".")
        if whole in GROUPS:
            expected = f"{name} is None; expected settings by name"
        else:
            expected = f"{whole} is null; expected a value of the type "
        assert expected in refused(whole, None)


@pytest.mark.parametrize("group", GROUPS)
def test_numbers_that_nothing_can_count(refused: Refused, group: str) -> None:
    for one in fields(GROUPS[group]):
        if "int" in str(one.type):
            value = [10**30] if "list" in str(one.type) else 10**30
            whole = f"{group}.{one.name}".lstrip(".")
            assert f"{whole} has {10**30}; expected below 2**63" in refused(whole, value)


# ---- models that no machine holds


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.num_hidden_layers", 10**8),
        ("model.num_hidden_layers", 2**62),
        ("model.hidden_size", 2**62),
        ("model.intermediate_size", 2**62),
        ("model.pad_vocab_to_multiple_of", 2**62),
        ("dense_layers", [2, 10**9]),
    ],
)
def test_models_that_no_machine_holds(refused: Refused, name: str, value: Any) -> None:
    line = refused(name, value)
    assert re.search(r"blocks with [\d,]+ parameters or more, whose .* need [\d,.]+ GiB, and this machine has", line)
    assert "lower model.num_hidden_layers" in line and line.count("dense-1000000000'") == (name == "dense_layers")


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"tie_word_embeddings": True, "num_key_value_heads": 1},
        {"skip_unit": "sublayer", "skip_path": "linear", "policy": "early_exit"},
    ],
)
def test_what_a_model_needs(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, model: dict[str, Any]
) -> None:
    recipe = make_recipe(model={"hidden_size": 64, "intermediate_size": 200} | model)
    config = recipe.build_config(300)
    with torch.device("meta"):
        built = MidskipForCausalLM(config)
    matrices = [
        *built.model.embed_tokens.parameters(),
        *([] if config.tie_word_embeddings else built.lm_head.parameters()),
    ]
    matrices += [weight for layer in built.model.layers for weight in layer.parameters() if weight.dim() == 2]
    least = sum(weight.numel() for weight in matrices)
    assert fewest_parameters(config) == least <= built.num_parameters()
    for copies, has_gpu in ((4, False), (1, True)):
        monkeypatch.setattr("torch.cuda.is_available", lambda has_gpu=has_gpu: has_gpu)
        needed = 4 * copies * least + BLOCK_OBJECTS_BYTES * 4
        monkeypatch.setattr("midskip.train.checks.memory_bytes", lambda needed=needed: needed)
        check_memory(recipe, 300)
        monkeypatch.setattr("midskip.train.checks.memory_bytes", lambda needed=needed: needed - 1)
        with pytest.raises(ValueError, match=rf"4 blocks with {least:,} parameters or more"):
            check_memory(recipe, 300)
    monkeypatch.setattr("midskip.train.checks.memory_bytes", lambda: None)
    check_memory(make_recipe(model={"num_hidden_layers": 10**9}))
