"""Names that are not known: an error says which known one is near, or nothing where none is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from midskip.data.labelled import build_labelled
from midskip.names import near
from midskip.policies import build_policy
from midskip.regularizers import build_regularizer
from midskip.train import read_recipe


def test_the_nearest_name() -> None:
    assert near("hiden_size", ["vocab_size", "hidden_size"]) == "; did you mean 'hidden_size'?"
    assert near("zebra", ["vocab_size", "hidden_size"]) == near("x", []) == near(3, ["x"]) == ""


@pytest.mark.parametrize(
    ("build", "known"),
    [
        (lambda: build_policy("midle_out", 4, 8, 0.02, {}), "middle_out"),
        (lambda: build_policy("middle_out", 4, 8, 0.02, {"strat": "open"}), "start"),
        (lambda: build_regularizer("target_shares", 4), "target_share"),
        (lambda: build_regularizer("target_share", 4, target_share=0.5, gian=1), "gain"),
        (lambda: build_labelled("pointers", {"num_chain": 4}), "num_chains"),
    ],
)
def test_names_of_and_in_classes(build: Callable[[], Any], known: str) -> None:
    with pytest.raises(ValueError, match=rf"; did you mean '{known}'\?$"):
        build()


@pytest.mark.parametrize(
    ("yaml", "overrides", "known"),
    [
        ("model: {hiden_size: 3}", [], "hidden_size"),
        ("model: {settings: {}}", [], "policy_settings"),
        ("model: {learning_rate: 1}", [], "training.learning_rate"),
        ("learning_rate: 1", [], "training.learning_rate"),
        ("trainin: {max_steps: 3}", [], "training.max_steps"),
        ("trainin: {max_stepz: 3}", [], "training"),
        ("outptu: here", [], "output"),
        ("training: {max_steps: 3}", ["--training.learning_rat=1"], "learning_rate"),
        ("training: {max_steps: 3}", ["--model.skipped_kv", "keep", "--modle.norms", "pre"], "model.norms"),
        ("training: {max_steps: 3}", ["--polcy_settings.start=open"], None),
        ("training: {max_steps: many}", ["--model.policy_settings.start=open"], None),
        ("training: {zebra: 3}", [], None),
        ("training: {zebra: {}}", [], None),
        ("trainin: {}", [], "training"),
        ("- a", [], None),
        ("training: {max_steps: [", ["--zebra"], None),
    ],
)
def test_settings_of_recipes(tmp_path: Path, yaml: str, overrides: list[str], known: str | None) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml)
    with pytest.raises(ValueError, match="the recipe cannot be used: ") as error:
        read_recipe(file, overrides)
    _, *hint = str(error.value).split("; did you mean ")
    assert hint == ([] if known is None else [f"{known!r}?"])
