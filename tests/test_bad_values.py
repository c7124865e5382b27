"""Every setting of a recipe with values that mean nothing: one line and exit status 2, before anything is written."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from midskip.cli import main
from midskip.train import Recipe
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
