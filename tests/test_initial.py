"""A run that starts from the weights of another."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import QUIET, Stop, assert_same_weights, history, weights, write_documents

from midskip.cli import main
from midskip.train import Recipe, train
from midskip.train.initial import InitialWeights
from midskip.train.trainer import MidskipTrainer

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("on_the_cpu", "no_pictures")]


@pytest.fixture
def first(make_recipe: Callable[..., Recipe], tmp_path: Path) -> Recipe:
    """A run that has ended."""
    write_documents(tmp_path / "text")
    recipe = make_recipe(
        source=tmp_path / "text", output=tmp_path / "first", model={"policy": "dense"}, max_steps=2,
        data={"tokenizer": "bytes", "validation_share": 0.2},
    )  # fmt: skip
    train(recipe, console=QUIET)
    return recipe


def next_of(first: Recipe, name: str = "next", model: dict[str, Any] | None = None, **training: Any) -> Recipe:
    """A run that starts from its weights."""
    return replace(
        first,
        output=str(Path(first.output).with_name(name)),
        model=replace(first.model, init_from=first.output, **(model or {})),
        training=replace(first.training, **training),
    )


def test_it_starts_from_those_weights_and_goes_on_like_one_that_was_not_killed(
    first: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[dict[str, torch.Tensor]] = []
    original = MidskipTrainer.training_step

    def training_step(trainer: MidskipTrainer, *args: Any, **kwargs: Any) -> Any:
        begun.append({name: x.clone() for name, x in trainer.bare_model.state_dict().items()})
        if len(begun) == 7:
            raise Stop
        return original(trainer, *args, **kwargs)

    monkeypatch.setattr(MidskipTrainer, "training_step", training_step)
    whole, killed = (next_of(first, name, save_steps=1, eval_steps=2, max_steps=4) for name in ("whole", "killed"))
    train(whole, console=QUIET)
    assert_same_weights(begun[0], weights(first))
    assert history(whole)[0]["step"] == 1 and (Path(whole.output) / "best" / "model.safetensors").is_file()
    with pytest.raises(Stop):
        train(killed, console=QUIET)
    shutil.rmtree(first.output)  # which is not needed any more
    train(killed, resume=True, console=QUIET)
    assert_same_weights(weights(killed), weights(whole))


def test_a_model_that_begins_to_skip_has_a_new_policy(first: Recipe) -> None:
    gated = next_of(first, model={"policy": "middle_out"}, max_steps=1, learning_rate=1e-30)
    train(gated, console=QUIET)
    found = weights(gated)
    assert any(name.startswith("model.policy.") for name in found)
    assert_same_weights({name: x for name, x in found.items() if not name.startswith("model.policy.")}, weights(first))


def test_weights_that_changed_are_refused(first: Recipe) -> None:
    begun = next_of(first, save_steps=1)
    train(begun, console=QUIET)
    (Path(begun.output) / "page.html").unlink()
    other = replace(first, training=replace(first.training, seed=1), output=first.output + "-other")
    train(other, console=QUIET)
    shutil.copy(Path(other.output, "model.safetensors"), Path(first.output, "model.safetensors"))
    with pytest.raises(ValueError, match=r"did not begin like that \(other weights in model\.init_from\)"):
        train(begun, resume=True, console=QUIET)
    with pytest.raises(ValueError, match=r"model\.init_from: '.*' -> None"):
        train(replace(begun, model=first.model), resume=True, console=QUIET)


@pytest.mark.parametrize(
    "model, message",
    [
        ({"hidden_size": 32}, r"another shape than the recipe's \(.*is \[257, 32\], there \[257, 16\]"),
        ({"num_hidden_layers": 3}, r"layers\.3\.[\w.]+ is not, there \["),
        ({"num_attention_heads": 4}, r"num_attention_heads is 4, there 2"),
        ({"rope_theta": 500.0}, r"rope_parameters is \{.*500.*\}, there \{.*10000"),
        ({"init_from": "nowhere"}, r"model\.init_from is 'nowhere', and its config\.json cannot be read"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_anything_is_written(
    first: Recipe, model: dict[str, Any], message: str
) -> None:
    recipe = replace(first, output=str(Path(first.output).with_name("next")))
    recipe.model = replace(first.model, **({"init_from": first.output} | model))
    with pytest.raises(ValueError, match=message):
        train(recipe, console=QUIET)
    assert not (Path(recipe.output) / "recipe.yaml").exists()


def test_text_of_another_tokenizer_is_refused(first: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, folder = Path(first.output, "recipe.yaml"), Path(first.output).with_name("next")
    options = [f"--output={folder}", f"--model.init_from={first.output}"]
    bpe = ["--data.tokenizer=bpe", "--data.vocab_size=257"]
    assert main(["train", str(recipe), *options, *bpe]) == 2
    assert f"another tokenizer than that model's: give --data.tokenizer={first.output}" in capsys.readouterr().err
    assert main(["train", str(recipe), *options, f"--data.tokenizer={first.output}"]) == 0


def test_what_is_no_midskip_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="a model of the type 'llama'; expected the folder of a finished run"):
        InitialWeights(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "midskip"}))
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        InitialWeights(str(tmp_path))
