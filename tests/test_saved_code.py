"""A folder that somebody else made is data: nothing in it, nor beside it, is imported because it says so."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from midskip import MidskipConfig, MidskipForCausalLM, build_regularizer
from midskip.bench import last_regularizer
from midskip.card import model_card
from midskip.cli import main
from midskip.policies.dense import Dense
from midskip.runs import load_run
from midskip.train import train
from midskip.train.checkpoints import mark_complete
from midskip.train.recipe import Recipe
from midskip.train.saved import read_saved_recipe

pytestmark = pytest.mark.usefixtures("on_the_cpu", "no_pictures")
PLANTED = """
from pathlib import Path

from midskip.data import LabelledData
from midskip.policies.dense import Dense
from midskip.regularizers import Regularizer

Path(__file__).with_name("ran").touch()


class Evil(Dense):
    pass


class Price(Regularizer):
    pass


class Items(LabelledData):
    pass
"""
CONSENT = r"if you trust the module 'planted', add --trust planted to the command, or trust=\['planted'\] to the call"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, which is on the import path and has a module that leaves a file where it is imported."""
    (tmp_path / "planted.py").write_text(PLANTED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "planted", raising=False)
    return tmp_path


@pytest.fixture
def run(place: Path, saved_model: Path) -> Path:
    """A run folder whose configuration names that module."""
    shutil.copytree(saved_model, place / "run")
    write_config(place / "run", policy="planted:Evil", policy_settings={})
    return place / "run"


def write_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def ran(place: Path) -> bool:
    return (place / "ran").exists() or "planted" in sys.modules


def error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command says, in one line, of input that it cannot use."""
    assert main(list(arguments)) == 2
    err = capsys.readouterr().err
    assert err.startswith("midskip: error: ") and err.count("\n") == 1
    return err


# ---- models


@pytest.mark.parametrize(
    "load",
    [
        MidskipForCausalLM.from_pretrained,
        AutoModelForCausalLM.from_pretrained,
        lambda folder: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True),
        lambda folder: MidskipForCausalLM.from_pretrained(folder, config=folder, trust=["planted.other", "plant"]),
        AutoConfig.from_pretrained,
        MidskipConfig.from_pretrained,
        lambda folder: MidskipConfig.from_json_file(folder / "config.json"),
        load_run,
    ],
)
def test_a_policy_that_a_folder_names_is_not_imported(run: Path, place: Path, load: Callable[[Path], Any]) -> None:
    (run / "load_midskip.py").write_text(PLANTED)  # which is for those who have not imported midskip
    with pytest.raises(ValueError, match=CONSENT):
        load(run)
    assert not ran(place) and not (run / "ran").exists()


def test_with_the_callers_consent_it_is(run: Path, place: Path) -> None:
    model: MidskipForCausalLM = AutoModelForCausalLM.from_pretrained(run, policy="dense")
    assert type(model.model.policy) is Dense and not ran(place), "a policy of the caller's own"
    for loaded in (
        MidskipForCausalLM.from_pretrained(run, trust=["planted"]),
        AutoModelForCausalLM.from_pretrained(run, trust=["planted:Evil"]),
        AutoModelForCausalLM.from_pretrained(run, config=AutoConfig.from_pretrained(run, trust=["planted"])),
        load_run(run, trust=("else.where", "planted"))[0],
    ):
        assert type(loaded.model.policy).__name__ == "Evil" and ran(place)
    write_config(run, policy="midskip.policies.dense:Dense")
    assert type(MidskipForCausalLM.from_pretrained(run).model.policy) is Dense, "it is built in"


@pytest.mark.parametrize("trust", ["planted", True, [1]])
def test_consent_names_modules(run: Path, place: Path, trust: Any) -> None:
    with pytest.raises(ValueError, match=r"trust is .*; expected a list of names of modules, as \['package.module'\]"):
        MidskipForCausalLM.from_pretrained(run, trust=trust)
    assert not ran(place)


def test_what_is_no_import_path_is_not_for_typing_after_trust(run: Path) -> None:
    for path in ("planted; rm:X", ":X", "midskip.policies.:X", ".planted:X"):
        write_config(run, policy=path)
        with pytest.raises(ValueError, match=r"expected 'package.module:Class'|cannot be loaded"):
            MidskipForCausalLM.from_pretrained(run)


def test_weights_in_pickles_are_not_read(run: Path) -> None:
    write_config(run, policy="dense")
    torch.save(MidskipForCausalLM.from_pretrained(run).state_dict(), run / "pytorch_model.bin")
    (run / "model.safetensors").unlink()
    for load in (MidskipForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            load(run)


def test_an_adapter_beside_a_model_imports_nothing(run: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_config(run, policy="dense")
    adapter = {"peft_type": "LORA", "target_modules": ["q_proj"], "megatron_config": {"a": 1}}
    (run / "adapter_config.json").write_text(json.dumps(adapter | {"megatron_core": "planted"}))
    with pytest.raises(ValueError, match=r"config\.megatron_core='planted' does not start with a valid prefix"):
        MidskipForCausalLM.from_pretrained(run)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.19.1")
    with pytest.raises(ValueError, match=r"The version of PEFT .* >= 0\.20"):
        MidskipForCausalLM.from_pretrained(run)
    assert not ran(place)


# ---- commands


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["evaluate", "run"], "--trust planted"),
        (["evaluate", "run", "--tasks", "piqa"], "--trust planted"),
        (["calibrate", "run"], "--trust planted"),
        (["generate", "run", "--prompt", "The"], "--trust planted"),
        (["bench", "--run", "run"], "--trust planted"),
        (["retrofit", "run", "--data", "a", "--validation", "b", "--output", "c"], "already skips"),
    ],
)
def test_commands_that_are_given_a_folder_import_nothing(
    run: Path, place: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("midskip.tasks.check_tasks", lambda *args: None)
    assert words in error(capsys, *arguments)
    assert not ran(place)
    places = [path for path in sys.path if path != str(place)]
    monkeypatch.setattr(sys, "path", places[:])
    error(capsys, *arguments)
    assert sys.path == places, "nor is what lies in the current folder found for other reasons"


def test_a_command_with_consent_finds_a_module_beside_it(
    run: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", sys.path[1:])
    assert main(["generate", "run", "--prompt", "The", "--max_new_tokens", "2", "--trust", "planted"]) == 0
    assert "of the blocks ran" in capsys.readouterr().out
    assert ran(place) and sys.path[-1] == str(place), "after all that is installed"


# ---- recipes in run folders


@pytest.mark.parametrize(
    "recipe, words",
    [
        ({"data": {"source": "planted:Items"}, "regularizer": {}}, "--trust planted"),
        ({"data": {"class_path": "planted.Items"}}, "there is no setting 'data.class_path'"),
        ({"model": "planted.Items"}, "model is 'planted.Items'; expected settings by name"),
        ({"config": "other.yaml"}, "there is no setting 'config'"),
    ],
)
def test_a_recipe_in_a_folder_is_data(
    run: Path, place: Path, recipe: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(run, policy="dense")
    if "source" in recipe.get("data", {}):
        (run / "tokenizer.json").unlink()  # as labelled data have it
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (place / "other.yaml").write_text("model: {policy_settings: {one: {class_path: planted.Items}}}\n")
    (place / "mine.yaml").write_text("output: run\n")
    assert words in error(capsys, "evaluate", "run")
    resumed = error(capsys, "train", "mine.yaml", "--resume")
    assert (words if "source" not in recipe.get("data", {}) else "the recipe is not the one") in resumed
    assert not ran(place)


def test_settings_that_look_like_classes_stay_settings(place: Path) -> None:
    look = {"one": {"class_path": "planted.Items", "init_args": {}}}
    (place / "recipe.yaml").write_text(yaml.safe_dump({"model": {"policy_settings": look}}))
    assert read_saved_recipe(place / "recipe.yaml").model.policy_settings == look
    assert not ran(place)


@pytest.mark.parametrize(
    "text, message",
    [
        ("training: {max_steps: 2.5}", "training.max_steps is 2.5; expected int"),
        ("training: {bf16: 1}", "training.bf16 is 1; expected bool"),
        ("training: {seed: 9223372036854775808}", "training.seed is 9223372036854775808; expected int"),
        ("training: {report_to: [1]}", r"training.report_to is \[1\]; expected list"),
        ("model: {norms: post}", r"model.norms is 'post'; expected Literal\['sandwich', 'pre'\]"),
        ("model: {hidden_siz: 4}", "there is no setting 'model.hidden_siz'; did you mean 'hidden_size'"),
        ("data: {settings: {1: 2}}", r"data.settings is \{1: 2\}; expected dict"),
        ("[1]", r"it is \[1\]; expected settings by name"),
        ("training: {steps: [", "while parsing"),
        ("training: {max_steps: 0}", "training.max_steps is 0; expected at least 1"),
    ],
)
def test_a_saved_recipe_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"(?s)the recipe in .* cannot be used: .*{message}"):
        read_saved_recipe(file)


def test_a_saved_recipe_is_read_as_it_was_written(tmp_path: Path) -> None:
    recipe = Recipe(dense_layers=[2, 3])
    recipe.data.settings, recipe.training.learning_rate, recipe.training.data_seed = {"a": [1, {"b": None}]}, 1e-9, 3
    recipe.save(tmp_path / "recipe.yaml")
    assert read_saved_recipe(tmp_path / "recipe.yaml") == recipe
    (tmp_path / "recipe.yaml").write_text("training: {learning_rate: 1e-3, adam_beta1: 0}\n")
    assert read_saved_recipe(tmp_path / "recipe.yaml").training.learning_rate == 1e-3


def test_a_regularizer_that_a_run_names_is_not_imported(
    make_recipe: Callable[..., Recipe], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe("planted:Price", save_steps=2, max_steps=2)
    with monkeypatch.context() as without:
        without.setattr(Recipe, "build_regularizer", lambda self: build_regularizer("none", 4))
        train(recipe)
    with pytest.raises(ValueError, match=f"names the regularizer 'planted:Price'.*{CONSENT}"):
        last_regularizer(Path(recipe.output))
    assert not ran(place)


def test_a_resumed_run_has_the_policy_of_its_recipe(make_recipe: Callable[..., Recipe], place: Path) -> None:
    recipe = make_recipe(save_steps=2, max_steps=2)
    report = train(recipe)
    folder = Path(recipe.output)
    (folder / "page.html").unlink()  # it was killed at its end
    for place_of in (folder, folder / "checkpoint-2"):
        write_config(place_of, policy="planted:Evil", policy_settings={})
    mark_complete(folder / "checkpoint-2")
    assert train(recipe, resume=True)["validation"] == report["validation"]
    assert json.loads((folder / "config.json").read_text())["policy"] == "middle_out"
    assert not ran(place)


# ---- what is installed


def install(folder: Path, name: str, offers: str) -> None:
    (folder / f"{name}-1.dist-info").mkdir(parents=True)
    (folder / f"{name}-1.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (folder / f"{name}-1.dist-info" / "entry_points.txt").write_text(offers)


def test_an_installed_package_offers_by_name_and_by_path(run: Path, place: Path, tmp_path: Path) -> None:
    site, offers = tmp_path / "site", "[midskip.policies]\nevil = planted:Evil\n"
    install(place, "downloaded", offers)
    for path, message in (("planted:Evil", CONSENT), ("evil", "unknown policy 'evil'")):
        write_config(run, policy=path)
        with pytest.raises(ValueError, match=message):  # the current folder is no installation
            MidskipForCausalLM.from_pretrained(run)
    assert not ran(place)
    install(site, "theirs", f"{offers}[midskip.regularizers]\nprice = planted:Price\n")
    sys.path.append(str(site))
    for path in ("planted:Evil", "evil"):
        write_config(run, policy=path)
        model = MidskipForCausalLM.from_pretrained(run)
        assert type(model.model.policy).__name__ == "Evil" and model.config.policy == path
    assert type(build_regularizer("price", 4)).__name__ == "Price"
    write_config(run, policy="planted:Other")
    with pytest.raises(ValueError, match=CONSENT):
        MidskipForCausalLM.from_pretrained(run)
    write_config(run, policy="evli")
    with pytest.raises(
        ValueError, match=r"unknown policy 'evli'.*'evil' or 'package.module:Class'; did you mean 'evil'"
    ):
        MidskipForCausalLM.from_pretrained(run)
    install(site, "others", "[midskip.policies]\nevil = elsewhere:Evil\n")
    write_config(run, policy="evil")
    with pytest.raises(
        ValueError, match="offered by several installed packages, as elsewhere:Evil, planted:Evil: give"
    ):
        MidskipForCausalLM.from_pretrained(run)


def test_a_card_says_how_to_consent(place: Path) -> None:
    code = "MidskipForCausalLM.from_pretrained(name{})\n"
    for policy, consent in (("planted.policies:Evil", ', trust=["planted.policies"]'), ("evil", ""), ("dense", "")):
        assert code.format(consent) in model_card("name", MidskipConfig(policy=policy), 1)
    assert not ran(place)
