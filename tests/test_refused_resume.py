"""A run that is refused to go on stays as it was, byte for byte, and one line says why."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_runs import QUIET, tiny_recipe, write_documents

from midskip.data import prepare
from midskip.train import Recipe, train
from midskip.train.recipe import DataSettings, RegularizerSettings

pytestmark = pytest.mark.usefixtures("on_the_cpu", "no_pictures")


@pytest.fixture(scope="module")
def killed(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A run that was killed after its last checkpoint, and its dense model before that."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    recipe = tiny_recipe(
        prepared, folder, "target_share", {"target_share": 0.4}, dense_layers=[2], max_steps=2, save_steps=1
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("midskip.train.report.write_picture", lambda *args, **kwargs: None)
        train(recipe, console=QUIET)
    for name in ("page.html", "dense-2/page.html"):
        (folder / name).unlink()
    return recipe


@pytest.fixture
def run(killed: Recipe, tmp_path: Path) -> Recipe:
    """A copy of it."""
    return replace(killed, output=str(shutil.copytree(killed.output, tmp_path / "run")))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """text: files; shards: the same, prepared with a larger vocabulary."""
    folder = tmp_path_factory.mktemp("texts")
    text = write_documents(folder / "text", 40)
    prepare(str(text), folder / "shards", vocab_size=320, validation_share=0.2, console=QUIET)
    return folder


def sums(folder: Path) -> dict[str, str]:
    """Of every file; "" for a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
    }


def refused(recipe: Recipe, message: str) -> None:
    before = sums(Path(recipe.output))
    with pytest.raises(ValueError, match=message) as error:
        train(recipe, resume=True, accept_changes=True, console=QUIET)
    assert "\n" not in str(error.value)
    assert sums(Path(recipe.output)) == before


def spoil(recipe: Recipe) -> None:
    """Its newest checkpoint has a part less: it would be set aside."""
    Path(recipe.output, "checkpoint-2", "optimizer.pt").unlink()


@pytest.mark.parametrize("kind", ["shards", "text"])
@pytest.mark.parametrize("broken", [False, True])
def test_text_of_another_vocabulary(run: Recipe, texts: Path, kind: str, broken: bool) -> None:
    if broken:
        spoil(run)
    data = DataSettings(str(texts / kind), length=16, vocab_size=320 if kind == "text" else None)
    place = rf"checkpoint-{2 - broken} of '.*run' has a model of 300 tokens"
    refused(replace(run, data=data), rf"{place}, and with the text '.*{kind}' it would need 320: .* another --output")


def test_text_of_another_vocabulary_for_a_dense_model_alone(run: Recipe, texts: Path) -> None:
    for checkpoint in Path(run.output).glob("checkpoint-*"):
        shutil.rmtree(checkpoint)  # it had only begun with the dense model
    data = DataSettings(str(texts / "shards"), length=16)
    refused(replace(run, data=data), r"checkpoint-2 of '.*dense-2' has a model of 300 tokens, .* need 320: ")


@pytest.mark.parametrize(
    ("regularizer", "message"),
    [
        (RegularizerSettings(), r"regularizer 'none' \(the state of this \w+ has the keys .*\): give the one it began"),
        (RegularizerSettings("proportional", {"mean_targets": [0.9, 0.2]}), r"regularizer 'proportional' \(the state "),
    ],
)
def test_another_regularizer(run: Recipe, regularizer: RegularizerSettings, message: str) -> None:
    spoil(run)
    refused(replace(run, regularizer=regularizer), rf"^checkpoint-1 of '.*run' cannot go on with the {message}")


def test_text_that_is_too_short(run: Recipe, texts: Path) -> None:
    spoil(run)
    for kind in ("shards", "text"):
        refused(
            replace(run, data=DataSettings(str(texts / kind), length=10_000)), "which make 0 windows of 10000 tokens"
        )


def test_what_fits_goes_on(run: Recipe, texts: Path, tmp_path: Path) -> None:
    prepare(str(texts / "text"), tmp_path / "shards", vocab_size=300, validation_share=0.2, console=QUIET)
    spoil(run)
    train(replace(run, data=DataSettings(str(tmp_path / "shards"), length=16)), True, True, console=QUIET)
    assert Path(run.output, "page.html").is_file() and Path(run.output, "damaged-checkpoint-2").is_dir()


def test_a_run_with_more_steps_than_are_asked_for(run: Recipe) -> None:
    asked = replace(run, training=replace(run.training, max_steps=1))
    more = r"checkpoint-2 of '.*run' has more steps than training.max_steps, which is 1: give at least 2, or another"
    refused(asked, more)


@pytest.mark.parametrize("text", ["", '{"num_pro', "[1]", "{}", '{"num_processes": 1, "shards": 3}', "\udcff"])
def test_what_a_run_began_with_cannot_be_read(run: Recipe, text: str) -> None:
    file = Path(run.output, "start.json")
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"run/start.json' cannot be read \(.*: put it back, or .* --accept_changes"):
        train(run, resume=True, console=QUIET)
    assert file.read_bytes() == text.encode(errors="surrogateescape")
