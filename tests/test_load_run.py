"""A run folder: it is read as it was written, its model is evaluated on any text, and what is not whole is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sample_text import DOCUMENTS
from tiny_runs import QUIET
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from midskip import MidskipForCausalLM
from midskip.cli import main
from midskip.data import TokenWindows, encode_documents, open_prepared, prepare, token_bytes, train_tokenizer
from midskip.evaluate import evaluate
from midskip.runs import load_run

MakeModel = Callable[..., MidskipForCausalLM]


@pytest.fixture
def folder(model: MidskipForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "run")
    tokenizer.save_pretrained(tmp_path / "run")
    return tmp_path / "run"


def test_a_run_is_read_as_it_was_written(
    folder: Path, model: MidskipForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    read, its_tokenizer = load_run(folder)
    assert not read.training
    ids = tokenizer(DOCUMENTS[0])["input_ids"][:20]
    assert its_tokenizer(DOCUMENTS[0])["input_ids"][:20] == ids
    assert torch.equal(read.cpu()(torch.tensor([ids])).logits, model(torch.tensor([ids])).logits)


def test_the_command_takes_any_text(
    folder: Path, model: MidskipForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("<|endoftext|>\n".join(DOCUMENTS), encoding="utf-8")
    options = ["--data", str(tmp_path / "text.txt"), "--output", str(tmp_path / "numbers.json"), "--json"]
    assert main(["evaluate", str(folder), *options]) == 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "numbers.json").read_text()
    assert len(printed.splitlines()) < 20, "a list is one line"
    read, tokenizer = load_run(folder)
    ids = encode_documents(tokenizer, DOCUMENTS)
    apart = TokenWindows(ids, 64, drop_last=False, end_of_text=tokenizer.eos_token_id)
    expected = evaluate(read, apart, token_bytes(tokenizer))
    assert json.loads(printed) == {"text": str(tmp_path / "text.txt"), **expected}
    longest = max(np.diff(np.append(np.flatnonzero(ids == tokenizer.eos_token_id), len(ids))))
    reached = [position for position, count in enumerate(expected["num_targets_by_position"]) if count]
    assert max(reached) < longest < 64, "documents are kept apart"


def test_the_held_out_side_of_a_prepared_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("<|endoftext|>\n".join(DOCUMENTS * 3), encoding="utf-8")
    for name, tokenizer in (("own", str(folder)), ("other", "bytes")):
        prepare(str(text), tmp_path / name, tokenizer=tokenizer, validation_share=0.3, console=QUIET)
    assert main(["evaluate", str(folder), "--data", str(tmp_path / "own"), "--json"]) == 0
    read, tokenizer = load_run(folder)
    expected = evaluate(read, open_prepared(tmp_path / "own").windows("validation", 64), token_bytes(tokenizer))
    assert json.loads(capsys.readouterr().out) == {"text": str(tmp_path / "own"), **expected}
    assert main(["evaluate", str(folder), "--data", str(tmp_path / "other")]) == 2
    assert "was prepared with another tokenizer than that of" in capsys.readouterr().err


def test_a_page_of_ones_own_text(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.txt").write_text("the cat <b>sat</b> 你好", encoding="utf-8")
    page = tmp_path / "own.html"
    assert main(["evaluate", str(folder), "--data", str(tmp_path / "own.txt"), "--page", str(page)]) == 0
    assert f"\npage         {page}\n" in capsys.readouterr().out
    text = page.read_text(encoding="utf-8")
    assert "passage 1" in text and "passage 2" not in text and "你" in text and "<b>" not in text
    assert main(["evaluate", str(folder), "--data", str(tmp_path / "own.txt"), "--page", str(tmp_path / "no/p")]) == 2
    assert "for --page: make it first" in capsys.readouterr().err
    for wrong, words in (
        (["--output", str(tmp_path)], f"--output is {str(tmp_path)!r}, which is a folder; expected a file"),
        (["--limit", "3"], "--limit is of tasks: give --tasks too, or leave it out"),
    ):
        assert main(["evaluate", str(folder), "--data", str(tmp_path / "own.txt"), *wrong]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "the path does not exist"),
        (b"", "holds no text"),
        (b"d\xe9j\xe0 vu", "is not UTF-8 text: byte 0xe9 at offset 1"),
    ],
)
def test_text_that_cannot_be_evaluated_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: bytes | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "some.txt").write_bytes(text)
    assert main(["evaluate", str(folder), "--data", str(tmp_path / "some.txt")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("midskip: error: ") and message in err and "some.txt" in err
    assert main(["evaluate", str(folder)]) == 2
    assert "has no recipe.yaml that names its held-out text: give text by --data" in capsys.readouterr().err


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


def test_weights_may_be_sharded(folder: Path) -> None:
    model = load_run(folder)[0]
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="1KB")
    assert not (folder / "model.safetensors").exists()
    for name, weight in load_run(folder)[0].state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, r"there is no folder '.*run'; expected a run folder, as `midskip train` writes it"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"lacks model\.safetensors\): give a run folder"),
        (lambda folder: cut(folder / "model.safetensors"), "run' cannot be read: "),
        (lambda folder: cut(folder / "config.json"), "run' cannot be read: "),
        (lambda folder: cut(folder / "tokenizer.json"), "run' cannot be read: "),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "run' cannot be read: "),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'),
            "its model is of the type 'llama'; expected 'midskip'",
        ),
        (
            lambda folder: change_weights(folder, lambda weights: weights.pop("lm_head.weight")),
            r"the weights lack lm_head\.weight of the shape",
        ),
        (
            lambda folder: change_weights(folder, lambda weights: weights.update({"model.norm.weight": torch.ones(3)})),
            r"the weights lack model\.norm\.weight of the shape",
        ),
        (
            lambda folder: change_weights(folder, lambda weights: weights.update({"model.more": torch.ones(3)})),
            r"config\.json has no place for the weights model\.more: it is of another model",
        ),
    ],
)
def test_a_run_that_is_not_whole_is_refused(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=message):
        load_run(folder)


def test_a_run_that_is_not_finished_says_how_to_go_on(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    for make in ((folder / "checkpoint-2").mkdir, (folder / "recipe.yaml").touch):
        make()
        with pytest.raises(ValueError, match=r"holds no finished run .*: go on with `midskip train \.\.\. --resume`"):
            load_run(folder)
        shutil.rmtree(folder / "checkpoint-2", ignore_errors=True)


def test_a_recipe_that_is_none_does_not_hide_what_lacks(folder: Path) -> None:
    (folder / "recipe.yaml").write_text("data: text\nregularizer: none\n")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"holds no finished run \(it lacks tokenizer\.json\)"):
        load_run(folder)


def test_a_tokenizer_whose_settings_make_no_sense_is_refused(folder: Path) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": ""}))
    with pytest.raises(ValueError, match="cannot be read: '>' not supported"):
        load_run(folder)


def test_a_tokenizer_of_another_model_is_refused(folder: Path) -> None:
    train_tokenizer([*DOCUMENTS, "entirely other words in there"], 300).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"has 300 tokens and its model 290: they do not belong together"):
        load_run(folder)
