"""What a sweep refuses, before anything runs."""

from pathlib import Path
from typing import Any

import pytest
from tiny_runs import QUIET
from tiny_sweep import DENSE, TUNED, write_sweep

from midskip import cli
from midskip.sweep import read_sweep, run_sweep

GATED = {"model.policy": "middle_out", "regularizer.name": "target_share"}


@pytest.mark.parametrize(
    "arms, more, message",
    [
        ([DENSE], {"seed": [0]}, "the file has the key 'seed', which is not known; did you mean 'seeds'"),
        ([DENSE | {"gird": {}}], {}, "arm 'dense': an arm has the key 'gird', which is not known; did you mean 'grid'"),
        ([DENSE | {"grid": {"training.max_step": [1]}}], {}, "grid has 'training.max_step'.*mean 'training.max_steps'"),
        ([DENSE], {"settings": {"model.depth": 2}}, "settings has 'model.depth', which is no setting of a recipe"),
        ([DENSE | {"grid": {"training.max_steps": ["many"]}}], {}, r"(?s)arm 'dense': .*training.max_steps.*many"),
        ([DENSE | {"grid": {"training.max_steps": []}}], {}, "grid: training.max_steps is .*at least one value"),
        ([DENSE | {"grid": {"training.max_steps": [2, 2]}}], {}, "expected each value once"),
        ([DENSE | {"grid": {"training.max_steps": [0]}}], {}, "training.max_steps is 0; expected at least 1"),
        ([DENSE | {"settings": {"model.num_hidden_layers": 3}}], {}, "num_hidden_layers is in settings and model.num"),
        (
            [DENSE | {"settings": {"regularizer.settings.gain": 1}, "grid": {"regularizer.settings": [{}]}}], {},
            "regularizer.settings.gain is in settings and regularizer.settings in grid; expected one",
        ),
        (
            [DENSE | {"grid": {"regularizer.settings.gain": [1, 2], "regularizer.settings": [{}]}}], {},
            "regularizer.settings and regularizer.settings.gain, a part of it, are in grid; expected one",
        ),
        ([DENSE | {"settings": {"training.seed": 3}}], {}, "training.seed, which is the sweep's; expected seeds"),
        ([DENSE | {"settings": {"model.num_attention_heads": 3}}], {}, "arm 'dense': .*num_attention_heads"),
        ([DENSE | {"settings": GATED}], {}, "arm 'dense': .*target_share"),
        ([DENSE, DENSE], {}, "two arms have the name 'dense'"),
        ([{"recipe": "recipe.yaml"}], {}, "the name of arm 1 is None"),
        ([{"name": "a"}], {}, "arm 'a': recipe is None; expected the path"),
        ([{"name": "a", "recipe": "none.yaml"}], {}, "there is no recipe 'none.yaml', neither beside"),
        ([DENSE], {"arms": []}, "expected a list of at least one arm"),
        ([DENSE], {"seeds": []}, "seeds is .*; expected a list of at least one value"),
        ([DENSE], {"seeds": [1.5]}, "seeds has 1.5; expected whole numbers"),
        ([DENSE], {"output": None}, "output is None; expected a folder"),
        ([DENSE], {"keep_runs": "no"}, "keep_runs is 'no'; expected true or false"),
        ([DENSE | {"learning_rates": [0.1, -1]}], {}, "learning_rates has -1; expected numbers above 0"),
        ([TUNED | {"settings": {"training.learning_rate": 1}}], {}, "learning_rates are to be tried; expected one"),
        ([TUNED, TUNED | {"name": "b", "learning_rates": [1, 2]}], {}, r"of learning_rates \(dense 3, b 2\)"),
    ],
)  # fmt: skip
def test_bad_files_are_refused_before_anything_runs(
    tmp_path: Path, arms: list[Any], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_sweep(write_sweep(tmp_path, *arms, **more))
    assert cli.main(["sweep", str(tmp_path / "sweep.yaml")]) == 2 and not (tmp_path / "out").exists()


def test_yaml_that_is_nested_too_deeply_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text("[" * 3000)
    with pytest.raises(ValueError, match="cannot be read: maximum recursion"):
        read_sweep(tmp_path / "sweep.yaml")


def test_a_name_that_stands_twice_is_refused(tmp_path: Path) -> None:
    file = write_sweep(tmp_path)
    file.write_text(file.read_text() + "seeds: [3]\n")
    with pytest.raises(ValueError, match=r"(?s)the sweep .* cannot be read: 'seeds' stands twice.*line"):
        read_sweep(file)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no sweep at .*; expected a YAML file"):
        read_sweep(tmp_path / "none.yaml")
    (tmp_path / "odd.yaml").write_text("arms: [")
    with pytest.raises(ValueError, match="cannot be read"):
        read_sweep(tmp_path / "odd.yaml")
    (tmp_path / "odd.yaml").write_text("[]")
    with pytest.raises(ValueError, match=r"the file is \[\]; expected names and values"):
        read_sweep(tmp_path / "odd.yaml")


def test_folders_that_hold_something_else(tmp_path: Path) -> None:
    sweep = read_sweep(write_sweep(tmp_path))
    sweep.output.write_text("")
    with pytest.raises(ValueError, match="which is a file; expected a folder"):
        run_sweep(sweep, console=QUIET)
    sweep.output.unlink()
    sweep.output.mkdir()
    (sweep.output / "recipe.yaml").write_text("")
    with pytest.raises(ValueError, match="which holds a run of `midskip train`"):
        run_sweep(sweep, console=QUIET)
    assert [path.name for path in sweep.output.iterdir()] == ["recipe.yaml"]
